"""linear and its gradients against float64: every batch width, format, dtype and layout."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import dass_kernels as dk
from dass_kernels import reference, testing
from dass_kernels.testing import FORMATS, check_linear, lanes, randn, random_mask, random_weight

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

FLOATS = [torch.float32, torch.float64]


def batches(count: int) -> list[int]:
    """Rows around every tile width, up to the 16 vectors of the weight gradient."""
    near = {1, 2, 3, count - 1, count, count + 1}
    for vectors in range(2, 18):
        near |= {vectors * count - 1, vectors * count, vectors * count + 1}
    return sorted(near - {0})


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_batch_widths(isa, dtype, format):
    weight, mask = random_weight((19, 13), 0.5, format, dtype)
    bias = randn(19, dtype=dtype)
    for rows in batches(lanes(dtype)):
        check_linear(randn(rows, 13, dtype=dtype), weight, mask, bias, format=format)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_tail_of_every_tile(isa, dtype):
    """Every number of rows up to a tile of the forward, and of the weight gradient."""
    weight, mask = random_weight((9, 7), 0.5, dtype=dtype)
    for rows in range(1, 16 * lanes(dtype) + 2):
        check_linear(randn(rows, 7, dtype=dtype), weight, mask, randn(9, dtype=dtype))


@pytest.mark.parametrize("features", [1, 15, 16, 17, 31, 32, 33, 64, 255, 257])
@pytest.mark.parametrize("outputs", [1, 3, 4, 5, 16, 255, 256, 257, 513])
def test_feature_counts(isa, features, outputs):
    """Around the 16 columns of a mask word, the rows of a gemv and the rows of one output chunk."""
    for format in ("csr", "8x1"):
        weight, mask = random_weight((outputs, features), 0.4, format)
        for rows in (1, 3, lanes() + 1):
            check_linear(randn(rows, features), weight, mask, randn(outputs), format=format)


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 0.99, 1])
@pytest.mark.parametrize("format", [*FORMATS, "2:4", "1:8"])
def test_sparsity(isa, format, sparsity):
    for dtype in FLOATS:
        weight, mask = random_weight((48, 64), 1 - sparsity, format, dtype)
        for rows in (1, 2, 3 * lanes(dtype)):
            x, bias = randn(rows, 64, dtype=dtype), randn(48, dtype=dtype)
            check_linear(x, weight, mask, bias, format=format)


def test_empty_rows_and_columns(isa):
    weight = randn(10, 9)
    for keep in ([], [0], [9], [3, 4, 7]):
        mask = torch.zeros(10, 9, dtype=torch.bool)
        mask[keep] = random_mask((len(keep), 9), 0.6)
        for rows in (1, lanes(), lanes() + 1):
            check_linear(randn(rows, 9), weight, mask, randn(10))
            check_linear(randn(rows, 10), weight.t(), mask.t(), None)


@pytest.mark.parametrize("format", ["4x1", "8x1", "16x1"])
def test_short_last_blocks_and_masks_that_are_not_blocks(isa, format):
    height = int(format.split("x")[0])
    for outputs in (1, height - 1, height, height + 1, 2 * height + 3):
        for dtype in FLOATS:
            weight, mask = random_weight((outputs, 11), 0.5, format, dtype)
            for kept in (mask, random_mask(weight.shape, 0.4)):
                x = randn(5, 11, dtype=dtype)
                check_linear(x, weight, kept, randn(outputs, dtype=dtype), format=format)


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "hardswish"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_epilogue(isa, activation, with_bias):
    for dtype in FLOATS:
        for rows in (1, 4, lanes(dtype) * 3 + 1):
            for format in ("csr", "4x1"):
                weight, mask = random_weight((13, 17), 0.6, format, dtype)
                bias = randn(13, dtype=dtype) if with_bias else None
                x = 2 * randn(rows, 17, dtype=dtype)
                check_linear(x, weight, mask, bias, format=format, activation=activation)


@pytest.mark.parametrize("shape", [(9,), (1, 9), (2, 3, 9), (2, 1, 3, 9), (0, 9), (2, 0, 9)])
def test_leading_dimensions(isa, shape):
    weight, mask = random_weight((5, 9), 0.5)
    check_linear(randn(*shape), weight, mask, randn(5))


@pytest.mark.parametrize(("outputs", "features"), [(0, 9), (5, 0), (0, 0)])
def test_zero_sizes(isa, outputs, features):
    for shape in ((3, features), (0, features), (2, 3, features), (features,)):
        x = randn(*shape).requires_grad_()
        weight, bias = randn(outputs, features).requires_grad_(), randn(outputs).requires_grad_()
        mask = torch.ones(outputs, features, dtype=torch.bool)
        y = dk.linear(x, dk.pack(weight, mask), bias)
        assert torch.equal(y, bias.expand(*shape[:-1], outputs))
        y.sum().backward()
        assert x.grad.shape == shape and bool((x.grad == 0).all())
        assert torch.equal(bias.grad, torch.full((outputs,), float(math.prod(shape[:-1]))))


def test_layouts(isa):
    weight, mask = random_weight((10, 9), 0.5)
    flat = torch.empty(6 * 9 + 1)
    flat[1:] = randn(54)
    for x in (
        randn(9, 6).t(),
        randn(6, 18)[:, ::2],
        randn(12, 9)[::2],
        flat[1:].view(6, 9),
        randn(1, 9).expand(6, 9),
        randn(6, 1).expand(6, 9),
        randn(1, 9).as_strided((1, 9), (77, 1)),
        randn(2, 9, 3).transpose(1, 2),
    ):
        check_linear(x, weight, mask, randn(10))
        check_linear(x, weight.t().contiguous().t(), mask, randn(20)[::2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32_and_rounded_once(isa, dtype):
    weight, mask = random_weight((10, 40), 0.5, dtype=dtype)
    for rows in (1, 20):
        x, bias = randn(rows, 40, dtype=dtype), randn(10, dtype=dtype)
        y = dk.linear(x, dk.pack(weight, mask), bias)
        wide = dk.linear(x.float(), dk.pack(weight.float(), mask), bias.float())
        assert y.dtype == dtype and torch.equal(y, wide.to(dtype))
        exact = reference.linear(x, weight * mask, bias)
        size = reference.linear(x.abs(), weight.abs() * mask, bias.abs())
        inner = testing.forward_bound(torch.float32, 40, size)
        info = torch.finfo(dtype)
        rounding = (exact.abs() + inner) * info.eps / 2 + info.smallest_normal * info.eps
        testing.assert_within(y, exact, inner + rounding)


def test_autocast(isa):
    weight, mask = random_weight((10, 40), 0.5)
    weight.requires_grad_()
    x = randn(3, 40).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = dk.linear(x, dk.pack(weight, mask), randn(10))
        assert y.dtype == F.linear(x, weight).dtype == torch.bfloat16
        double = dk.linear(x.double(), dk.pack(weight.double(), mask))
        assert double.dtype == F.linear(x.double(), weight.double()).dtype == torch.float64
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    wide = dk.linear(x, dk.pack(weight, mask), randn(10))
    assert torch.equal(y, wide.to(torch.bfloat16))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_nan_and_infinity_reach_exactly_the_outputs_that_use_them(isa, bad, rows):
    """Also where weights are expanded from a bit mask: an absent weight is not a zero."""
    for format in ("csr", "4x1"):
        for activation in (None, "relu", "relu6", "hardswish"):
            weight, mask = random_weight((24, 33), 0.3, format)
            x = randn(rows, 33)
            x[0, 4] = x[-1, 32] = bad
            y = dk.linear(x, dk.pack(weight, mask, format), activation=activation)
            want = reference.linear_kept(x, weight, mask, activation=activation)
            touched = int((~want.isfinite()).sum())
            assert touched < want.numel() and (touched or activation), "the test is void"
            size = reference.linear_kept(x.nan_to_num(0, 0, 0).abs(), weight.abs(), mask)
            bound = testing.forward_bound(torch.float32, 33, size, activation)
            testing.assert_within(y, want, bound)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_nan_in_the_input_reaches_exactly_the_gradients_that_use_it(isa, rows):
    weight, mask = random_weight((12, 9), 0.5)
    x = randn(rows, 9)
    x[0, 4] = math.nan
    leaf = weight.clone().requires_grad_()
    dk.linear(x, dk.pack(leaf, mask)).sum().backward()
    want = torch.zeros(12, 9, dtype=torch.bool)
    want[:, 4] = mask[:, 4]
    assert torch.equal(leaf.grad.isnan(), want)


def test_reference_agrees_with_itself():
    weight, mask = random_weight((12, 9), 0.5, dtype=torch.float64)
    x, bias = randn(4, 9, dtype=torch.float64), randn(12, dtype=torch.float64)
    torch.testing.assert_close(
        reference.linear(x, weight * mask, bias), reference.linear_kept(x, weight, mask, bias)
    )
