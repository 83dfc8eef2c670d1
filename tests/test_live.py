"""Operations on their living channels: equal to the whole, and nothing else is computed."""

import pytest
import torch
from torch import nn

from dass.live import live_op
from dass.mixing import Term, mix
from dass.pruning import prune
from dass.space import OPS, ReLUFirst
from dass.sparse_supernet import sparse_layers
from dass.supernet import Architecture, Supernet

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTED = [name for name in OPS if "conv" in name]


def pruned(name: str, channels: int, stride: int, density: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    op = OPS[name](channels, stride, affine=False, pool_norm=True).double()
    prune(op, 1 - density, method="random", seed=seed)
    return op


@pytest.mark.parametrize("density", [0.02, 0.05, 0.2, 1.0])
@pytest.mark.parametrize(("name", "stride"), [(n, s) for n in WEIGHTED for s in (1, 2)])
def test_the_living_part_is_the_operation(name, stride, density):
    if name == "skip_connect" and stride == 1:
        pytest.skip("no weights")
    zero = 0
    for seed in range(4):
        op = pruned(name, 8, stride, density, seed)
        live = live_op(op)
        if density == 1.0:
            assert live is None  # nothing to gain
            continue
        x = torch.randn(3, 8, 7, 6, dtype=torch.double, requires_grad=True)
        expected = op(x)
        found = torch.zeros_like(expected)
        y = live.after_relu(x.relu())
        if y is None:
            zero += 1
            assert not bool(expected.any())
            continue
        dead = torch.ones(8, dtype=torch.bool)
        dead[live.live] = False
        assert not bool(expected[:, dead].any())
        found = found.index_copy(1, live.live, y)
        torch.testing.assert_close(found, expected)

        sign = torch.randn_like(expected)
        wanted = [x, *op.parameters()]
        dense = torch.autograd.grad((sign * expected).sum(), wanted)
        ours = torch.autograd.grad((sign * found).sum(), wanted, allow_unused=True)
        for a, b in zip(ours, dense, strict=True):
            torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)
    assert zero == 0 if density > 0.05 else True


@pytest.mark.parametrize("depthwise", [True, False])
def test_full_layers_beside_sparse_ones(depthwise):
    """A depthwise layer of 48 channels without a pruned weight runs dense, on what lives."""
    torch.manual_seed(0)
    op = OPS["sep_conv_3x3"](48, 1, affine=False).double()
    prune(op, 0.0)
    for layer in sparse_layers(op):
        if (layer.groups > 1) != depthwise:
            layer.set_mask(torch.rand(layer.weight.shape) < 0.05)
    live = live_op(op)
    ((steps, _),) = live.branches
    assert any(step.index is None for step in steps)
    x = torch.randn(2, 48, 6, 6, dtype=torch.double)
    expected = op(x)
    found = torch.zeros_like(expected).index_copy(1, live.live, live.after_relu(x.relu()))
    torch.testing.assert_close(found, expected)


def test_dead_channels_are_not_computed():
    op = OPS["dil_conv_3x3"](8, 1, affine=False)
    prune(op, 0.0)
    depthwise, pointwise = sparse_layers(op)
    keep = torch.zeros(8, 1, 3, 3, dtype=torch.bool)
    keep[[1, 4, 6], 0, 1, 1] = True
    depthwise.set_mask(keep)
    keep = torch.zeros(8, 8, 1, 1, dtype=torch.bool)
    keep[2, 4], keep[2, 5], keep[3, 0], keep[7, 6] = True, True, True, True
    pointwise.set_mask(keep)
    live = live_op(op)
    assert live.live.tolist() == [2, 7]  # 3 reads a channel that no depthwise weight makes
    ((steps, _),) = live.branches
    assert [step.spec[0] for step in steps] == [2, 2]
    assert steps[0].inputs.tolist() == [4, 6]  # 1 is made, and nobody reads it
    assert [len(step.gather) for step in steps] == [2, 2]


def test_what_has_no_living_part_of_its_own():
    assert live_op(OPS["max_pool_3x3"](4, 1, pool_norm=True)) is None
    assert live_op(OPS["skip_connect"](4, 1)) is None
    op = OPS["sep_conv_3x3"](4, 1, affine=False)
    assert isinstance(op, ReLUFirst) and live_op(op) is None  # dense
    prune(op, 0.5)
    assert live_op(op) is not None
    next(sparse_layers(op)).learn_mask()
    assert live_op(op) is None


@pytest.mark.parametrize("partial", [1, 2])
def test_a_network_that_skips_what_is_dead(partial):
    torch.manual_seed(0)
    network = Supernet(4, 3, 5, partial=partial).double()
    architecture = Architecture(network.choices).double()
    prune(network, 0.9)
    x = torch.randn(3, 3, 8, 8, dtype=torch.double)
    wanted = [*architecture.parameters(), *network.parameters()]

    def outcome():
        y = network(x, architecture.weights())
        loss = y.square().sum()
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        return y, [
            torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)
        ]

    y, gradients = outcome()
    network.skip_dead()
    assert all(cell.live for cell in network.cells)
    z, others = outcome()
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(others, gradients)

    # Other masks come in with a state dict, and are followed.
    twin = Supernet(4, 3, 5, partial=partial).double()
    prune(twin, 0.8, method="random", seed=3)
    network.load_state_dict(twin.state_dict())
    torch.testing.assert_close(network(x, architecture.weights()), twin(x, architecture.weights()))
    network.skip_dead(False)
    assert not any(cell.live for cell in network.cells)


def test_the_mixed_sum_and_its_gradient():
    torch.manual_seed(0)
    live = torch.tensor([3, 1])
    weights = torch.rand(5, dtype=torch.double, requires_grad=True)
    full = torch.randn(2, 4, 3, 3, dtype=torch.double, requires_grad=True)
    part = torch.randn(2, 2, 3, 3, dtype=torch.double, requires_grad=True)

    def function(weights, full, part):
        terms = [Term(part, 4, live), Term(full, 0), Term(full, 2), Term(part, 0, live)]
        return mix(weights, terms, (2, 4, 3, 3))

    spread = torch.zeros_like(full).index_copy(1, live, part)
    expected = (weights[0] + weights[2]) * full + (weights[4] + weights[0]) * spread
    torch.testing.assert_close(function(weights, full, part), expected)
    assert torch.autograd.gradcheck(function, (weights, full, part))
    only = mix(weights, [Term(part, 1, live)], (2, 4, 3, 3))
    torch.testing.assert_close(only, weights[1] * spread)
    assert not bool(mix(weights, [], (2, 4, 3, 3)).any())
