"""First and second derivatives, the op contract (opcheck), torch.compile and torch.export."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import dass_kernels as dk
from dass_kernels import testing
from dass_kernels.testing import check_conv2d, check_linear, lanes, randn, random_weight

pytestmark = [
    pytest.mark.usefixtures("poisoned", "one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

ops = torch.ops.dass


def leaf(t):
    return t.detach().clone().requires_grad_()


def double(*shape, seed=0):
    return randn(*shape, dtype=torch.float64, seed=seed).requires_grad_()


def packed_with_empty_rows(shape, format="csr", groups=1):
    """A float64 weight with an output, and an input, that keep nothing."""
    weight, mask = random_weight(shape, 0.5, format, torch.float64)
    mask[-1:] = False
    mask[:, :1] = mask[:, :1] & (shape[1] == 1)
    packed = dk.pack(weight, mask, format, groups)
    return leaf(packed.values), packed.pattern


CONVS = [
    # weight, groups, stride, padding, dilation, image
    ((4, 2, 1, 1), 1, 1, 0, 1, (3, 4)),
    ((4, 2, 3, 3), 1, 1, 1, 1, (3, 4)),
    ((4, 2, 3, 2), 2, (2, 1), (1, 0), (1, 2), (5, 4)),
    ((3, 1, 3, 3), 3, 2, 1, 1, (4, 4)),
    ((3, 2, 2, 3), 1, 1, "same", 1, (3, 4)),
]


@pytest.mark.parametrize("format", ["csr", "4x1"])
@pytest.mark.parametrize("case", CONVS, ids=str)
@pytest.mark.parametrize("many", [False, True], ids=["one image", "lanes and one"])
def test_conv2d_first_and_second_derivatives(isa, case, format, many):
    shape, groups, stride, padding, dilation, image = case
    if format == "4x1" and groups > 1:
        shape = (4 * groups, *shape[1:])
    values, pattern = packed_with_empty_rows(shape, format, groups)
    spec = dk.conv_spec(shape, stride, padding, dilation)
    n = lanes(torch.float64) + 1 if many else 1
    x, bias = double(n, shape[1] * groups, *image), double(shape[0], seed=1)
    residual = leaf(dk.conv2d_values(x, values, pattern, spec))

    def run(x, values, bias, residual):
        return dk.conv2d_values(x, values, pattern, spec, bias, residual)

    # The fast mode projects on random vectors; the slow one runs where the sizes allow it.
    assert gradcheck(run, (x, values, bias, residual), fast_mode=many)
    assert gradgradcheck(run, (x, values, bias, residual), fast_mode=True)
    if not many and shape[0] < 5:
        assert gradgradcheck(lambda x, v: run(x, v, None, None), (x, values))


@pytest.mark.parametrize("format", ["csr", "4x1", "8x1"])
@pytest.mark.parametrize("rows", [1, 2, 11])
def test_linear_first_and_second_derivatives(isa, format, rows):
    values, pattern = packed_with_empty_rows((9, 5), format)
    x, bias = double(rows, 5), double(9, seed=1)

    def run(x, values, bias):
        return dk.linear_values(x, values, pattern, 9, bias)

    assert gradcheck(run, (x, values, bias))
    assert gradgradcheck(run, (x, values, bias), fast_mode=rows > 2)


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
def test_derivatives_of_the_activations(isa, activation):
    """Through the wrapper, and through the op itself, which differentiates what it has fused."""
    values, pattern = packed_with_empty_rows((5, 3, 3, 3))
    spec = dk.conv_spec((5, 3, 3, 3), 1, 1, 1, activation)
    x, bias = double(2, 3, 4, 4), double(5, seed=1)
    residual = double(2, 5, 4, 4, seed=2)
    inputs = (x, values, bias, residual)
    wrapper = lambda x, v, b, r: dk.conv2d_values(x, v, pattern, spec, b, r)  # noqa: E731
    op = lambda x, v, b, r: ops.conv2d(x, v, pattern, b, r, spec)  # noqa: E731
    for run in (wrapper, op):
        assert gradcheck(run, inputs)
        assert gradgradcheck(run, inputs, fast_mode=True)
    torch.testing.assert_close(op(*inputs), wrapper(*inputs))
    weights, layout = packed_with_empty_rows((6, 5))
    rows, code = double(4, 5), spec[-1]
    wrapper = lambda x, v, b: dk.linear_values(x, v, layout, 6, b, code)  # noqa: E731
    op = lambda x, v, b: ops.linear(x, v, layout, b, 6, code)  # noqa: E731
    for run in (wrapper, op):
        assert gradcheck(run, (rows, weights, double(6, seed=1)))
        assert gradgradcheck(run, (rows, weights, double(6, seed=1)), fast_mode=True)


def test_only_what_needs_a_gradient_gets_one():
    weight, mask = random_weight((8, 4, 3, 3), 0.5)
    packed = dk.pack(weight, mask)
    spec = dk.conv_spec(packed.shape, 1, 1, 1)
    operands = {"x": randn(2, 4, 5, 5), "values": packed.values, "bias": randn(8)}
    operands["residual"] = randn(2, 8, 5, 5)
    full = {k: leaf(v) for k, v in operands.items()}

    def run(x, values, bias, residual):
        return dk.conv2d_values(x, values, packed.pattern, spec, bias, residual)

    want = dict(zip(full, torch.autograd.grad(run(**full).sum(), full.values()), strict=True))
    for count in range(1, 4):
        for names in itertools.combinations(operands, count):
            part = {k: leaf(v) if k in names else v for k, v in operands.items()}
            run(**part).sum().backward()
            for k, v in part.items():
                assert (v.grad is not None) == (k in names)
                assert k not in names or torch.equal(v.grad, want[k])
    assert run(**operands).grad_fn is None
    with torch.no_grad():
        assert run(**full).grad_fn is None
    with torch.inference_mode():
        assert torch.equal(run(**full), run(**operands))


def test_changing_a_saved_tensor_is_noticed():
    packed = dk.pack(randn(8, 4, 3, 3))
    x = randn(2, 4, 5, 5).requires_grad_()
    hidden = x * 1
    values = leaf(packed.values)
    y = dk.conv2d_values(hidden, values, packed.pattern, dk.conv_spec(packed.shape, 1, 1, 1))
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_accumulate_and_reach_the_dense_weight():
    """Two uses of one weight, then an optimiser step: what a layer does."""
    weight, mask = random_weight((6, 5), 0.5)
    ours, dense = leaf(weight), leaf(weight)
    for x in (randn(3, 5), randn(7, 5, seed=1)):
        dk.linear(x, dk.pack(ours, mask)).square().sum().backward()
        (x @ (dense * mask).t()).square().sum().backward()
    torch.testing.assert_close(ours.grad, dense.grad)
    assert bool((ours.grad[~mask] == 0).all())


sizes = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3),
    st.integers(0, 3), st.integers(1, 3), st.integers(1, 3),
)  # fmt: skip


@given(
    st.integers(0, 20), st.integers(1, 6), st.integers(1, 20), st.integers(1, 3), st.integers(1, 9),
    st.integers(1, 40), sizes, st.floats(0, 1), st.sampled_from(testing.FORMATS),
    st.sampled_from([torch.float32, torch.float64]), st.sampled_from([None, "relu", "relu6"]),
    st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
def test_any_convolution(
    n, inputs, outputs, groups, h, w, size, density, format, dtype, activation, residual, seed
):
    """Forward and every gradient of an arbitrary convolution, on every instruction set."""
    kh, kw, sh, sw, ph, pw, dh, dw = size
    rows = int(format.split("x")[0]) if format != "csr" else 1
    outputs = -(-outputs // rows) * rows if groups > 1 else outputs
    h, w = max(h, dh * (kh - 1) + 1 - 2 * ph), max(w, dw * (kw - 1) + 1 - 2 * pw)
    geometry = {"stride": (sh, sw), "padding": (ph, pw), "dilation": (dh, dw)}
    weight, mask = random_weight((outputs * groups, inputs, kh, kw), density, format, dtype, seed)
    x, bias = randn(n, inputs * groups, h, w, dtype=dtype), randn(len(weight), dtype=dtype)
    packed = dk.pack(weight, mask, format, groups)
    shape = dk.conv2d(x, packed, None, *geometry.values(), groups).shape
    extra = randn(*shape, dtype=dtype, seed=seed) if residual else None
    for name in dk.available_isas():
        with testing.isa(name):
            check_conv2d(
                x, weight, mask, bias, extra,
                format=format, activation=activation, groups=groups, seed=seed, **geometry,
            )  # fmt: skip


@given(
    st.integers(0, 150), st.integers(0, 40), st.integers(1, 40), st.floats(0, 1),
    st.sampled_from(testing.FORMATS), st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([None, "relu", "relu6"]), st.integers(0, 10**6),
)  # fmt: skip
def test_any_matrix(rows, inputs, outputs, density, format, dtype, activation, seed):
    weight, mask = random_weight((outputs, inputs), density, format, dtype, seed)
    x, bias = randn(rows, inputs, dtype=dtype, seed=seed), randn(outputs, dtype=dtype)
    for name in dk.available_isas():
        with testing.isa(name):
            check_linear(x, weight, mask, bias, format=format, activation=activation, seed=seed)


def op_arguments():
    """For each op: calls as a user could make them, with and without the optional operands."""
    weight, mask = random_weight((6, 4, 3, 3), 0.5)
    conv, spec = dk.pack(weight, mask), dk.conv_spec(weight.shape, (2, 1), 1, 1)
    fused = dk.conv_spec(weight.shape, (2, 1), 1, 1, "relu")
    x, values = randn(2, 4, 5, 6).requires_grad_(), leaf(conv.values)
    grad = randn(2, 6, 3, 6).requires_grad_()
    bias, residual = randn(6).requires_grad_(), randn(2, 6, 3, 6, seed=1).requires_grad_()
    matrix = dk.pack(*random_weight((6, 5), 0.5))
    rows, entries = randn(3, 5).requires_grad_(), leaf(matrix.values)
    out = randn(3, 6).requires_grad_()
    blocks = dk.pack(*random_weight((10, 5), 0.5, "4x1"), "4x1")
    uneven = dk.pack(*random_weight((6, 4, 2, 4), 0.5))  # "same" pads its four sides unequally
    sides = dk.conv_spec(uneven.shape, 1, "same", (3, 1))
    return {
        "conv2d": [
            (x, values, conv.pattern, None, None, spec),
            (x, values, conv.pattern, bias, residual, spec),
            (x, values, conv.pattern, bias, None, fused),
            (x.detach()[:0], values, conv.pattern, None, None, spec),
            (x, leaf(uneven.values), uneven.pattern, None, None, sides),
        ],
        "conv2d_dx": [
            (grad, values, conv.pattern, spec, 4, 5, 6),
            (leaf(randn(2, 6, 5, 6)), leaf(uneven.values), uneven.pattern, sides, 4, 5, 6),
        ],
        "conv2d_dw": [
            (grad, x, conv.pattern, spec, len(values)),
            (leaf(randn(2, 6, 5, 6)), x, uneven.pattern, sides, len(uneven.values)),
        ],
        "linear": [
            (rows, entries, matrix.pattern, None, 6, 0),
            (rows, entries, matrix.pattern, bias, 6, 3),
            (rows, leaf(blocks.values), blocks.pattern, None, 10, 0),
        ],
        "linear_dx": [(out, entries, matrix.pattern, 5)],
        "linear_dw": [(out, rows, matrix.pattern, len(entries))],
    }


OPS = list(op_arguments())
# Ops without a derivative or a fake kernel, used by compiled programs only.
INFERENCE_ONLY = {"conv2d_lanes"}


def test_every_op_of_the_library_is_checked():
    names = {
        n.removeprefix("dass::") for n in torch._C._dispatch_get_all_op_names() if "dass::" in n
    }
    assert names - INFERENCE_ONLY == set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, report):
    """Schema, autograd registration, fake kernel, AOT dispatch with static and dynamic shapes."""
    calls = op_arguments()[name]
    for arguments in calls:
        result = torch.library.opcheck(getattr(ops, name).default, arguments)
        assert set(result.values()) == {"SUCCESS"}, result
    report(f"opcheck dass::{name}: {len(calls)}/{len(calls)} calls, {len(result)} tests each")


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "hardswish"])
def test_compile_fullgraph(activation, dynamic):
    weight, mask = random_weight((6, 4, 3, 3), 0.5)
    conv, matrix = dk.pack(weight, mask), dk.pack(*random_weight((5, 6), 0.5))
    spec = dk.conv_spec(weight.shape, 1, 1, 1, activation)

    def network(x, values, bias, entries):
        y = dk.conv2d_values(x, values, conv.pattern, spec, bias).mean((2, 3))
        return dk.linear_values(y, entries, matrix.pattern, 5)

    fast = compiled(network, dynamic=dynamic)
    for n, h in ((2, 5), (3, 6), (2, 5)) if dynamic else ((2, 5),):
        inputs = [randn(n, 4, h, h), conv.values, randn(6), matrix.values]
        ours, eager = [leaf(t) for t in inputs], [leaf(t) for t in inputs]
        y, want = fast(*ours), network(*eager)
        torch.testing.assert_close(y, want)
        y.square().sum().backward()
        want.square().sum().backward()
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        with torch.inference_mode():
            torch.testing.assert_close(fast(*inputs), network(*inputs))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_of_the_calls_that_take_a_packed_weight(dynamic):
    conv, matrix = dk.pack(*random_weight((6, 4, 3, 3), 0.5)), dk.pack(*random_weight((5, 6), 0.5))
    grouped = dk.pack(*random_weight((6, 2, 3, 3), 0.5), groups=2)

    def network(x):
        y = dk.conv2d(x, conv, padding="same", activation="relu6", residual=None)
        y = y[:, :4] + dk.conv2d(x, grouped, padding=1, groups=2)[:, 2:]
        return (
            dk.linear(y.mean((2, 3)).repeat(1, 2)[:, :6], matrix)
            + dk.spmm(matrix, x[:6, 0, 0]).sum()
        )

    fast = compiled(network, dynamic=dynamic)
    x = randn(6, 4, 5, 5)
    ours, eager = leaf(x), leaf(x)
    y, want = fast(ours), network(eager)
    torch.testing.assert_close(y, want)
    y.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(ours.grad, eager.grad)


def test_compile_under_autocast_and_in_halves():
    matrix = dk.pack(*random_weight((5, 6), 0.5))

    def run(x, values):
        return dk.linear_values(x, values, matrix.pattern, 5)

    fast = compiled(run)
    with torch.autocast("cpu", torch.bfloat16):
        x = randn(3, 6)
        assert torch.equal(fast(x, matrix.values), run(x, matrix.values))
    half = randn(3, 6, dtype=torch.float16)
    assert torch.equal(fast(half, matrix.values.half()), run(half, matrix.values.half()))


@pytest.mark.slow
def test_compile_with_inductor():
    weight, mask = random_weight((6, 4, 3, 3), 0.5)
    packed = dk.pack(weight, mask)
    spec = dk.conv_spec(weight.shape, 1, 1, 1)

    def run(x, values):
        return dk.conv2d_values(x * 2, values, packed.pattern, spec).relu()

    torch._dynamo.reset()
    fast = torch.compile(run, fullgraph=True)
    ours = [leaf(t) for t in (randn(2, 4, 5, 5), packed.values)]
    eager = [leaf(t) for t in ours]
    fast(*ours).sum().backward()
    run(*eager).sum().backward()
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


class Layer(torch.nn.Module):
    """What a converted network holds: the kept values as a parameter, the pattern as a buffer."""

    def __init__(self, packed, spec):
        super().__init__()
        self.values = torch.nn.Parameter(packed.values.detach().clone())
        self.register_buffer("pattern", packed.pattern)
        self.spec = spec

    def forward(self, x):
        return dk.conv2d_values(x, self.values, self.pattern, self.spec)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(strict, tmp_path):
    weight, mask = random_weight((6, 4, 3, 3), 0.5)
    layer = Layer(dk.pack(weight, mask), dk.conv_spec(weight.shape, 2, 1, 1))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        layer, (randn(3, 4, 8, 8),), dynamic_shapes={"x": {0: batch}}, strict=strict
    )
    torch.export.save(program, tmp_path / "layer.pt2")
    again = torch.export.load(tmp_path / "layer.pt2").module()
    for n in (1, 5, 17):
        x = randn(n, 4, 8, 8)
        assert torch.equal(again(x), layer(x))
    again(randn(2, 4, 8, 8)).sum().backward()
    layer(randn(2, 4, 8, 8)).sum().backward()
    assert torch.equal(again.values.grad, layer.values.grad)
