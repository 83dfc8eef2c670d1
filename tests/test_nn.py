"""The sparse layers against nn.Conv2d and nn.Linear with a masked weight: values, gradients, state
dicts, copies."""

import copy
import io
import itertools
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from dass.masks import keep_count, parse_pattern, pattern_mask, topk_mask
from dass.nn import SparseConv2d, SparseLinear

CONVS = [
    dict(kernel_size=1),
    dict(kernel_size=3, padding=1),
    dict(kernel_size=3, stride=2, padding=1, bias=False),
    dict(kernel_size=(3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
    dict(kernel_size=3, groups=4, padding=1),
    dict(kernel_size=3, groups=8, padding=1, stride=2),
    dict(kernel_size=(4, 3), padding="same", dilation=(1, 2)),
    dict(kernel_size=3, padding="valid"),
    dict(kernel_size=3, padding=2, padding_mode="circular"),
    dict(kernel_size=(3, 5), padding=(1, 2), padding_mode="reflect", stride=2),
    dict(kernel_size=(2, 3), padding="same", padding_mode="replicate"),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def random_mask(weight, density=0.3):
    return torch.rand(weight.shape) < density


def pair(density=0.3, dtype=None, **arguments):
    """A dense convolution with a masked weight, and its sparse twin on other Parameters."""
    dense = nn.Conv2d(8, 8, dtype=dtype, **arguments)
    sparse = SparseConv2d.from_dense(copy.deepcopy(dense), random_mask(dense.weight, density))
    with torch.no_grad():
        dense.weight.mul_(sparse.mask)
    return dense, sparse


def both_gradients(dense, sparse, x):
    """Outputs agree, and so do the gradients of input, bias and, on the mask, of the weight."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    want, got = dense(a), sparse(b)
    assert_close(got, want)
    grad = torch.randn_like(want)
    want.backward(grad)
    got.backward(grad)
    assert_close(b.grad, a.grad)
    for (name, p), (other, q) in zip(
        dense.named_parameters(), sparse.named_parameters(), strict=False
    ):
        assert name == other
        expected = p.grad * sparse.current_mask() if name.endswith("weight") else p.grad
        assert_close(q.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arguments", CONVS, ids=str)
def test_conv_is_the_masked_dense_conv(arguments):
    dense, sparse = pair(dtype=torch.float64, **arguments)
    x = torch.randn(3, 8, 9, 7, dtype=torch.float64)
    both_gradients(dense, sparse, x)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=layout)
        assert_close(sparse(y), dense(y))
    assert_close(sparse(x[0]), dense(x[0]))
    sparse.eval()
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            for y in (x, x, x[0], x[:, :, ::2].expand(3, 8, 5, 7), x[:0]):
                assert_close(sparse(y), dense(y))


@pytest.mark.parametrize("shape", [(6,), (5, 6), (1, 6), (2, 3, 6), (0, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_masked_dense_linear(shape, bias):
    dense = nn.Linear(6, 9, bias=bias)
    sparse = SparseLinear.from_dense(copy.deepcopy(dense), random_mask(dense.weight))
    dense.weight.data *= sparse.mask
    x = torch.randn(shape)
    both_gradients(dense, sparse, x)
    sparse.eval()
    with torch.inference_mode():
        for _ in range(3):
            assert_close(sparse(x), dense(x))


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_masks_that_keep_nothing_or_everything(density):
    dense, sparse = pair(density, kernel_size=3)
    assert sparse.density == density
    both_gradients(dense, sparse, torch.randn(2, 8, 5, 5))
    linear = SparseLinear.from_dense(nn.Linear(5, 4), torch.full((4, 5), density))
    x = torch.randn(3, 5)
    assert_close(linear(x), F.linear(x, linear.masked_weight(), linear.bias))


def test_empty_layers():
    x = torch.randn(2, 3)
    with pytest.warns(UserWarning, match="zero-element"):
        assert SparseLinear(3, 0)(x).shape == (2, 0)
    with pytest.warns(UserWarning, match="zero-element"):
        layer = SparseLinear(0, 3)
    assert_close(layer(torch.ones(2, 0)), layer.bias.expand(2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_halves_are_computed_in_float_and_rounded_once(dtype, training):
    _, sparse = pair(kernel_size=3)
    sparse.to(dtype).train(training)
    x = torch.randn(2, 8, 6, 6, dtype=dtype)
    exact = F.conv2d(x.double(), sparse.masked_weight().double(), sparse.bias.double())
    with torch.set_grad_enabled(training):
        got = sparse(x)
    assert got.dtype == dtype and sparse.weight.dtype == dtype
    assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)
    if training:
        got.sum().backward()
        assert sparse.weight.grad.dtype == dtype


@pytest.mark.parametrize("training", [True, False])
def test_autocast_gives_the_dtype_that_the_dense_layer_gives(training):
    dense, sparse = pair(kernel_size=3)
    line = SparseLinear(8, 4, density=0.5)
    x = torch.randn(2, 8, 6, 6)
    for module in (dense, sparse, line):
        module.train(training)
    with torch.set_grad_enabled(training):
        _ = sparse(x), line(x[..., 0, 0])  # fills the caches before autocast is on
        with torch.autocast("cpu", dtype=torch.bfloat16):
            want, got = dense(x), sparse(x)
            flat = line(x[..., 0, 0])
        again = sparse(x)
    assert got.dtype == want.dtype == flat.dtype == torch.bfloat16 and again.dtype == x.dtype
    assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert_close(again, dense(x))


def test_from_dense_shares_the_parameters_and_draws_nothing():
    dense = nn.Conv2d(4, 6, 3, (1, 2), padding="valid", dilation=2, groups=2, padding_mode="zeros")
    dense.double().eval()
    dense.bias.requires_grad_(False)
    dense.weight.data[:, 0] = 0
    state = torch.get_rng_state()
    sparse = SparseConv2d.from_dense(dense)
    assert torch.equal(torch.get_rng_state(), state)
    assert sparse.weight is dense.weight and sparse.bias is dense.bias
    assert not sparse.training and not sparse.bias.requires_grad
    assert torch.equal(sparse.mask, dense.weight != 0) and sparse.mask.dtype == torch.bool
    assert sparse.density == 0.5 and sparse.scores is None and sparse.pattern == "unstructured"
    for name in ("in_channels", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(sparse, name) == getattr(dense, name)
    again = SparseConv2d.from_dense(sparse)
    assert again.weight is dense.weight and torch.equal(again.mask, sparse.mask)
    assert SparseLinear.from_dense(nn.Linear(3, 2, bias=False)).bias is None


def test_from_dense_refuses_what_it_cannot_stand_for():
    with pytest.raises(ValueError, match=r"SparseConv2d stands for nn.Conv2d, got Linear"):
        SparseConv2d.from_dense(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"stands for nn.Linear, got SparseConv2d"):
        SparseLinear.from_dense(SparseConv2d(2, 2, 1))
    with pytest.raises(ValueError, match="make it permanent"):
        SparseLinear.from_dense(nn.LazyLinear(2))
    with pytest.raises(ValueError, match="make it permanent"):
        SparseLinear.from_dense(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"weight's shape \(2, 3\), got \(3,\)"):
        SparseLinear.from_dense(nn.Linear(3, 2), torch.ones(3))


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "16x1", "32x2", "2:4"])
def test_the_constructor_has_the_dense_one_and_a_density(pattern):
    torch.manual_seed(1)
    dense = nn.Conv2d(16, 32, 3, 2, 1, bias=False)
    torch.manual_seed(1)
    sparse = SparseConv2d(16, 32, 3, 2, 1, bias=False, density=0.5, pattern=pattern)
    assert torch.equal(sparse.weight, dense.weight)  # whole: learn_mask may still choose any
    assert torch.equal(sparse.mask, pattern_mask(dense.weight, 0.5, pattern))
    x = torch.randn(2, 16, 7, 7)
    assert_close(sparse(x), F.conv2d(x, dense.weight * sparse.mask, None, 2, 1))
    assert f"density=0.5, pattern='{pattern}', frozen" in repr(sparse)
    assert set(sparse.state_dict()) == {"weight", "mask"}
    assert SparseLinear(4, 3, True, "cpu", torch.float64).mask.all()


def test_wrong_densities_patterns_and_masks_are_refused():
    for density in (0, -0.1, 1.1):
        with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
            SparseLinear(4, 4, density=density)
        with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
            SparseLinear(4, 4).learn_mask(density)
    with pytest.raises(ValueError, match="unknown pattern"):
        SparseConv2d(4, 4, 1, pattern="3x3")
    layer = SparseLinear(4, 4)
    with pytest.raises(ValueError, match=r"weight's shape \(4, 4\), got \(4,\)"):
        layer.set_mask(torch.ones(4))
    with pytest.raises(ValueError, match=r"must be a torch.Tensor, got list"):
        layer.set_mask([[1]])
    with pytest.raises(ValueError, match="scores must have the weight's shape"):
        layer.learn_mask(scores=torch.ones(4))
    assert layer.mask.all()
    with pytest.raises(TypeError):
        SparseLinear(4, 4, True, None, None, 0.5)


def test_set_mask_zeroes_in_place_and_takes_numbers():
    layer = SparseLinear(6, 4)
    weight = layer.weight
    whole = weight.detach().clone()
    mask = random_mask(weight)
    for given in (mask, mask.float() * 3, mask.int().t().contiguous().t()):
        assert layer.set_mask(given) is layer
        assert layer.weight is weight and torch.equal(weight, whole * mask)
        assert layer.mask.dtype == torch.bool and torch.equal(layer.mask, mask)
        assert layer.density == int(mask.sum()) / 24
    given = torch.ones(4, 6, dtype=torch.bool)
    layer.mask = given  # assignment is set_mask
    x = torch.randn(2, 6)
    assert_close(layer(x), F.linear(x, weight, layer.bias))
    weight.data.fill_(float("nan"))
    layer.set_mask(torch.zeros(4, 6))
    assert torch.equal(layer(x), layer.bias.expand(2, 4))


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1:4"])
def test_the_learned_mask_has_the_straight_through_gradient(kind, pattern):
    density = 0.25
    if kind == "conv":
        layer = SparseConv2d(8, 8, 3, padding=1, pattern=pattern).double()
        x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    else:
        layer = SparseLinear(8, 8, pattern=pattern).double()
        x = torch.randn(5, 8, dtype=torch.float64)
    assert layer.learn_mask(density) is layer
    weight = layer.weight.detach().clone()
    fan_in = weight[0].numel()
    assert isinstance(layer.scores, nn.Parameter) and "learned" in repr(layer)
    assert_close(layer.scores.detach(), (6 / fan_in) ** 0.5 * weight / weight.abs().max())
    mask = pattern_mask(weight, density, pattern)
    assert torch.equal(layer.current_mask(), mask)
    assert mask.sum() == keep_count(weight.numel(), density)
    if pattern == "unstructured":
        assert torch.equal(mask, topk_mask(weight, density))

    with torch.no_grad():
        layer.scores.copy_(torch.randn_like(weight))
        layer.scores.view(-1)[0] = 0  # sign(0) = 0
    mask = pattern_mask(layer.scores, density, pattern)
    effective = (weight * mask).requires_grad_()

    def dense(x):
        if kind == "linear":
            return F.linear(x, effective, layer.bias)
        return F.conv2d(x, effective, layer.bias, padding=1)

    assert_close(layer(x), dense(x))
    grad = torch.randn_like(dense(x))
    layer(x).backward(grad)
    layer.bias.grad = None
    dense(x).backward(grad)
    assert_close(layer.weight.grad, effective.grad * mask)
    assert_close(layer.scores.grad, effective.grad * weight * layer.scores.detach().sign())
    assert torch.equal(layer.weight, weight)  # nothing is zeroed while the mask moves

    learned = layer(x).detach()
    weight_grad, layer.weight.grad = layer.weight.grad, None
    assert layer.freeze_mask() is layer and layer.scores is None
    assert torch.equal(layer.mask, mask) and torch.equal(layer.weight, weight * mask)
    frozen = layer(x)
    assert_close(frozen, learned)
    frozen.backward(grad)
    assert_close(layer.weight.grad, weight_grad)


def test_learning_again_keeps_the_scores_and_set_mask_ends_it():
    layer = SparseLinear(8, 8, density=0.5).learn_mask()
    scores = layer.scores
    assert layer.density == 0.5 and layer.current_mask().sum() == 32
    layer.learn_mask(0.25)
    assert layer.scores is scores and layer.current_mask().sum() == 16
    mine = torch.randn(8, 8)
    layer.learn_mask(scores=mine)
    assert torch.equal(layer.current_mask(), topk_mask(mine, 0.25))
    assert layer.scores.data_ptr() != mine.data_ptr()
    layer.set_mask(torch.eye(8))
    assert layer.scores is None and layer.density == 0.125
    layer.weight.data.zero_()
    layer.learn_mask()  # max|w| = 0
    assert torch.equal(layer.scores, torch.zeros(8, 8)) and layer.current_mask().sum() == 8


def eval_pair():
    dense, sparse = pair(kernel_size=3)
    x = torch.randn(2, 8, 6, 6)
    for module in (dense, sparse):
        module.eval()
    with torch.no_grad():
        assert_close(sparse(x), dense(x))  # the cache is warm
    assert sparse._hot is not None

    def agree():
        mask = sparse.current_mask()
        want = F.conv2d(x, sparse.weight * mask, sparse.bias, sparse.stride, sparse.padding)
        for guard in (torch.no_grad, torch.inference_mode):
            with guard():
                for _ in range(2):
                    assert_close(sparse(x), want.detach())

    return sparse, agree


def change(name, layer):
    """Everything that changes what a layer in eval mode computes."""
    weight = layer.weight
    fresh = nn.Parameter(torch.randn_like(weight))
    if name == "in place":
        with torch.no_grad():
            weight.mul_(2)
    elif name == "data and refresh":
        weight.data.mul_(2)
        layer.refresh()
    elif name == "data and eval":
        weight.data.mul_(2)
        layer.eval()
    elif name == "new parameter":
        layer.weight = fresh
    elif name == "new bias":
        layer.bias = nn.Parameter(torch.randn(8))
    elif name == "bias data":
        layer.bias.data.add_(1)
    elif name == "no bias":
        layer.bias = None
    elif name == "mask":
        layer.set_mask(random_mask(weight, 0.6))
    elif name == "mask in place":
        layer.mask.copy_(random_mask(weight, 0.6))
    elif name == "mask behind torch's back":
        layer.mask.numpy()[:] = random_mask(weight, 0.6).numpy()
        layer.eval()
    elif name == "load":
        layer.load_state_dict({"weight": fresh, "mask": random_mask(weight), "bias": layer.bias})
    elif name == "assign":
        state = {"weight": fresh, "mask": random_mask(weight), "bias": layer.bias}
        layer.load_state_dict(state, assign=True)
    elif name == "stride":
        layer.stride = (2, 2)
    elif name == "padding":
        layer.padding = (2, 0)
    elif name == "reset_parameters":
        layer.reset_parameters()
    elif name == "learn":
        layer.learn_mask(0.5)
    elif name == "fused optimiser":
        weight.grad = torch.ones_like(weight)
        layer.train()
        torch.optim.AdamW([weight], lr=0.1, fused=True).step()
        layer.eval()
    else:
        raise AssertionError(name)


CHANGES = (
    *("in place", "data and refresh", "data and eval", "new parameter", "new bias", "bias data"),
    *("no bias", "mask", "mask in place", "mask behind torch's back", "load", "assign", "stride"),
    *("padding", "reset_parameters", "learn", "fused optimiser"),
)


@pytest.mark.parametrize("name", CHANGES)
def test_cached_values_never_outlive_a_change(name):
    layer, agree = eval_pair()
    change(name, layer)
    agree()


def test_functional_call_uses_the_weight_it_is_given():
    layer, agree = eval_pair()
    weight = torch.randn_like(layer.weight)
    x = torch.randn(1, 8, 4, 4)
    for _ in range(2):
        with torch.no_grad():
            got = torch.func.functional_call(layer, {"weight": weight}, x)
        assert_close(got, F.conv2d(x, weight * layer.mask, layer.bias))
        agree()
    grad = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(layer, {"weight": w}, x).sum(), weight
    )
    assert torch.equal(grad != 0, layer.mask)


def test_parametrized_weights_are_followed():
    layer = SparseLinear(6, 5, density=0.5).eval()
    nn.utils.parametrizations.weight_norm(layer)
    x = torch.randn(3, 6)
    with torch.no_grad():
        for _ in range(3):
            layer.parametrizations.weight.original0.mul_(1.5)
            assert_close(layer(x), F.linear(x, layer.weight * layer.mask, layer.bias))
    layer.train()
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original1.grad.count_nonzero() > 0


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_their_own(copier):
    layer, agree = eval_pair()
    if copier == "deepcopy":
        twin = copy.deepcopy(layer)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        assert torch.equal(twin(x), layer(x))
        twin.weight.mul_(2)
        twin.set_mask(random_mask(twin.weight))
        assert_close(twin(x), F.conv2d(x, twin.weight, twin.bias))
    agree()
    assert not twin.training


def test_dtype_moves_follow():
    layer, _ = eval_pair()
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        want = layer(x)
        assert_close(layer.double()(x.double()), want.double())
        assert_close(layer.half()(x.half()), want.half(), rtol=1e-2, atol=1e-2)
        assert layer.float()(x).dtype == torch.float32
        layer.to(memory_format=torch.channels_last)
        assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias))
    layer.train()
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad != 0, layer.mask)


def test_a_meta_layer_gets_its_mask_when_loaded():
    source = SparseConv2d(4, 8, 3, density=0.2)
    x = torch.randn(1, 4, 5, 5)
    layer = SparseConv2d(4, 8, 3, density=0.2, device="meta")
    assert layer(x.to("meta")).shape == (1, 8, 3, 3)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert_close(layer(x), source(x))
    layer = SparseConv2d(4, 8, 3, device="meta").to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    assert_close(layer(x), source(x))
    layer = source.to("meta").to_empty(device="cpu")
    layer.load_state_dict(SparseConv2d(4, 8, 3, density=0.7).state_dict())
    assert_close(layer(x), F.conv2d(x, layer.weight * layer.mask, layer.bias))


def test_layers_made_in_inference_mode_run_and_can_be_trained_no_less_than_dense_ones():
    x = torch.randn(2, 3, 5, 5)
    with torch.inference_mode():
        layer = SparseConv2d(3, 4, 3, density=0.5).eval()
        for _ in range(2):
            assert_close(layer(x), F.conv2d(x, layer.masked_weight(), layer.bias))
    layer = SparseConv2d(3, 4, 3)
    with torch.inference_mode():
        layer.set_mask(random_mask(layer.weight))
        layer(x)
        twin = copy.deepcopy(layer)
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad != 0, layer.mask)
    with torch.no_grad():
        assert_close(twin(x), layer(x))


def test_state_dicts_of_every_kind_restore_what_was_saved():
    x = torch.randn(3, 6)
    frozen = SparseLinear(6, 4).set_mask(random_mask(torch.empty(4, 6)))
    learned = SparseLinear(6, 4).learn_mask(0.25)
    learned.scores.data.normal_()
    dense = nn.Linear(6, 4)
    dense.weight.data[:2] = 0
    for source, target in itertools.product(
        (frozen, learned, dense),
        (SparseLinear(6, 4), SparseLinear(6, 4, density=0.1), SparseLinear(6, 4).learn_mask(0.25)),
    ):
        target = copy.deepcopy(target)
        if source is dense and target.scores is not None:
            with pytest.raises(RuntimeError, match=r'Missing key.*"scores"'):
                target.load_state_dict(source.state_dict())
            continue
        keys = target.load_state_dict(source.state_dict())
        assert not keys.missing_keys and not keys.unexpected_keys
        assert_close(target(x), source(x))
        expected = source.weight != 0 if source is dense else source.current_mask()
        assert torch.equal(target.mask, expected)
        assert (target.scores is None) == (source is not learned)
    # Inside a network, and without the weight: the mask is left alone.
    net = nn.Sequential(nn.Linear(6, 6), copy.deepcopy(frozen))
    net.load_state_dict(nn.Sequential(nn.Linear(6, 6), dense).state_dict())
    assert torch.equal(net[1].mask, dense.weight != 0)
    bias = torch.randn(4)
    keys = net.load_state_dict({"1.bias": bias}, strict=False)
    assert "1.mask" in keys.missing_keys and torch.equal(net[1].bias, bias)
    assert torch.equal(net[1].mask, dense.weight != 0)
    # What the state dict says is pruned does not come back through the weight.
    state = {**frozen.state_dict(), "weight": torch.ones(4, 6)}
    target = SparseLinear(6, 4)
    target.load_state_dict(state)
    assert torch.equal(target.weight.detach(), frozen.mask.float()) and state["weight"].all()


def test_a_dense_layer_loads_the_state_of_a_frozen_one():
    sparse = SparseLinear(6, 4).set_mask(random_mask(torch.empty(4, 6)))
    dense = nn.Linear(6, 4)
    assert dense.load_state_dict(sparse.state_dict(), strict=False).unexpected_keys == ["mask"]
    x = torch.randn(2, 6)
    assert_close(dense(x), sparse(x))


def test_packed_is_the_weight():
    layer = SparseConv2d(16, 16, 3, groups=2, density=0.2, pattern="8x1")
    packed = layer.packed()
    assert packed.format == "8x1" and packed.groups == 2 and packed.nnz == layer.mask.sum()
    assert torch.equal(packed.to_dense(), layer.masked_weight())
    packed.values.sum().backward()
    assert torch.equal(layer.weight.grad, layer.mask.float())
    with pytest.raises(ValueError, match="freeze_mask"):
        layer.learn_mask().packed()
    assert parse_pattern(layer.pattern).rows == 8


def test_without_kernels_it_runs_masked_dense():
    """On a device without kernels the layer runs masked-dense."""
    layer = SparseConv2d(4, 4, 3, density=0.5)
    layer.is_packed = False
    x = torch.randn(2, 4, 5, 5)
    assert_close(layer(x), F.conv2d(x, layer.weight * layer.mask, layer.bias))
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad != 0, layer.mask)


def test_import_dass_imports_nothing_until_a_name_is_used():
    script = """
import sys, dass
assert "torch" not in sys.modules and "SparseConv2d" in dir(dass)
try:
    dass.nothing
except AttributeError as error:
    assert "has no attribute 'nothing'" in str(error)
for name in dass.__all__:
    getattr(dass, name)
assert dass.timing.measure and dass.SparseLinear is dass.nn.SparseLinear
assert dass.__version__ == __import__("dass_kernels").__version__
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(("channels", "dilation"), [(6, 1), (6, 2), (24, 2)])
def test_dense_depthwise_layers_that_suit_the_kernels(channels, dilation):
    """A full mask and a mask that is learned run on the kernels there; nothing else changes."""
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, groups=channels)
    plain = plain.double()
    layer = SparseConv2d.from_dense(copy.deepcopy(plain), torch.ones_like(plain.weight))
    assert layer.is_packed
    x = torch.randn(2, channels, 9, 8, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(layer(x), plain(x))

    layer.learn_mask(0.3)
    y = F.conv2d(
        x, layer.weight * layer.current_mask(), layer.bias, 1, dilation, dilation, channels
    )
    torch.testing.assert_close(layer(x), y)
    grad = torch.randn_like(y)
    dw, ds, dx = torch.autograd.grad(layer(x), (layer.weight, layer.scores, x), grad)
    w_eff = (layer.weight * layer.current_mask()).detach().requires_grad_()
    again = F.conv2d(x, w_eff, layer.bias, 1, dilation, dilation, channels)
    dw_eff, expected = torch.autograd.grad(again, (w_eff, x), grad)
    torch.testing.assert_close(dx, expected)
    torch.testing.assert_close(dw, dw_eff * layer.current_mask())
    torch.testing.assert_close(ds, (dw_eff * layer.weight * layer.scores.sign()).detach())


def test_a_full_mask_runs_dense():
    layer = SparseConv2d(8, 16, 3)
    assert not layer.is_packed and not SparseLinear(8, 4).is_packed
    mask = torch.ones_like(layer.mask)
    mask[0, 0, 0, 0] = False
    assert layer.set_mask(mask).is_packed
    assert not layer.set_mask(torch.ones_like(mask)).is_packed
