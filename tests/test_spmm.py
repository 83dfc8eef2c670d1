"""spmm, sparse times dense, against float64."""

from __future__ import annotations

import pytest
import torch

import dass_kernels as dk
from dass_kernels import reference, testing
from dass_kernels.testing import FORMATS, lanes, randn, random_weight, row_length

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

FLOATS = [torch.float32, torch.float64]


def check(x, weight, mask, format="csr"):
    """Forward and both gradients within the bounds that testing.tolerance proves."""
    dtype = x.dtype
    ours = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    sizes = [t.detach().double().abs().requires_grad_() for t in (x, weight)]
    y = dk.spmm(dk.pack(ours[1], mask, format), ours[0])
    want = reference.spmm(exact[1] * mask, exact[0])
    size = reference.spmm(sizes[1] * mask, sizes[0])
    testing.assert_within(y, want, testing.tolerance(dtype, row_length(mask)) * size, "output")
    grad = randn(*want.shape, dtype=dtype, seed=5)
    got = torch.autograd.grad(y, ours, grad)
    ref = torch.autograd.grad(want, exact, grad.double())
    mag = torch.autograd.grad(size, sizes, grad.double().abs())
    lengths = (row_length(mask.t()), x.numel() // max(x.shape[-2], 1))
    for name, g, r, m, n in zip(("x", "weight"), got, ref, mag, lengths, strict=True):
        testing.assert_within(g, r, testing.tolerance(dtype, n) * m, name)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_columns_around_every_tile_width(isa, dtype, format):
    count = lanes(dtype)
    weight, mask = random_weight((19, 13), 0.5, format, dtype)
    for vectors in range(1, 10):
        for columns in {vectors * count - 1, vectors * count, vectors * count + 1} - {0}:
            check(randn(13, columns, dtype=dtype), weight, mask, format)


@pytest.mark.parametrize("batch", [0, 1, 3, "lanes", "lanes + 1"])
def test_batches(isa, batch):
    for dtype in FLOATS:
        n = batch if isinstance(batch, int) else lanes(dtype) + batch.endswith("1")
        weight, mask = random_weight((10, 6), 0.6, dtype=dtype)
        check(randn(n, 6, 7, dtype=dtype), weight, mask)


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 0.99, 1])
def test_sparsity(isa, sparsity):
    for format in (*FORMATS, "2:4"):
        weight, mask = random_weight((32, 24), 1 - sparsity, format)
        check(randn(24, 37), weight, mask, format)


@pytest.mark.parametrize("shape", [(6, 0), (2, 6, 0), (0, 6, 4), (0, 6, 0)])
def test_zero_columns_as_torch_mm(isa, shape):
    weight, mask = random_weight((4, 6), 0.5)
    check(randn(*shape), weight, mask)


@pytest.mark.parametrize(("outputs", "inputs"), [(0, 6), (4, 0), (0, 0)])
def test_zero_rows(isa, outputs, inputs):
    weight = randn(outputs, inputs)
    check(randn(inputs, 5), weight, torch.ones(weight.shape, dtype=torch.bool))


def test_layouts(isa):
    weight, mask = random_weight((10, 6), 0.5)
    flat = torch.empty(6 * 7 + 1)
    flat[1:] = randn(42)
    for x in (
        randn(7, 6).t(),
        randn(6, 14)[:, ::2],
        randn(6, 1).expand(6, 7),
        flat[1:].view(6, 7),
        randn(3, 7, 6).transpose(1, 2),
        randn(1, 6, 7).expand(3, 6, 7),
    ):
        check(x, weight, mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(isa, dtype):
    weight, mask = random_weight((10, 6), 0.5, dtype=dtype)
    x = randn(6, 40, dtype=dtype)
    y = dk.spmm(dk.pack(weight, mask), x)
    wide = dk.spmm(dk.pack(weight.float(), mask), x.float())
    assert y.dtype == dtype and torch.equal(y, wide.to(dtype))


def test_is_the_transpose_of_linear(isa):
    weight, mask = random_weight((10, 6), 0.5, dtype=torch.float64)
    packed, x = dk.pack(weight, mask), randn(6, 9, dtype=torch.float64)
    torch.testing.assert_close(dk.spmm(packed, x), dk.linear(x.t(), packed).t())


def test_gradcheck(isa):
    weight, mask = random_weight((5, 4), 0.5, dtype=torch.float64)
    mask[1] = False
    weight.requires_grad_()
    for shape in ((4, 3), (2, 4, 3)):
        x = randn(*shape, dtype=torch.float64).requires_grad_()

        def run(x, weight):
            return dk.spmm(dk.pack(weight, mask), x)

        assert torch.autograd.gradcheck(run, (x, weight))
        assert torch.autograd.gradgradcheck(run, (x, weight))
