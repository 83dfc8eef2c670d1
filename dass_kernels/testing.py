"""Helpers for tests and benchmarks of kernels: the table, random masks, justified error bounds.

    for info in kernel_table("avx2"): ...
    with isa("scalar"): ...
    check_conv2d(x, weight, mask, bias, padding=1)      # forward and gradients against float64

Shapes, masks and weights depend on their arguments and a seed only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _C, reference
from .build import active_isa, set_isa
from .formats import pack, parse_format
from .ops import conv2d, conv_spec, linear

FORMATS = ("csr", "4x1", "8x1", "16x1")


class KernelInfo(NamedTuple):
    """One row of the kernel table.

    ``pixels`` is the width of the kernel's tile: vectors times the lanes of the dtype.
    """

    name: str
    op: str
    format: str
    dtype: torch.dtype
    pixels: int


def kernel_table(isa: str | None = None) -> list[KernelInfo]:
    """The kernels of an instruction set (default: the active one), one row each."""
    dtypes = {"f32": torch.float32, "f64": torch.float64}
    rows = _C.kernel_table(isa or active_isa())
    return [
        KernelInfo(name, op, fmt, dtypes[dtype], pixels) for name, op, fmt, dtype, pixels in rows
    ]


def lanes(dtype: torch.dtype = torch.float32, isa: str | None = None) -> int:
    """Elements of ``dtype`` in one register of an instruction set (default: the active one)."""
    name = "f64" if dtype == torch.float64 else "f32"
    return _C.lanes(isa or active_isa(), name)


@contextlib.contextmanager
def isa(name: str) -> Iterator[None]:
    """Runs the body with the kernels of one instruction set, then goes back to the one before."""
    before = active_isa()
    set_isa(name)
    try:
        yield
    finally:
        set_isa(before)


def generator(seed: int) -> torch.Generator:
    """A CPU generator with a seed."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers that depend on the shape and the seed only."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def random_mask(shape, density: float, format: str = "csr", seed: int = 0) -> Tensor:
    """A bool mask of a format that keeps ``round(density * count)`` weights (or blocks).

    An n:m format keeps n of every m inputs whatever the density.
    """
    kind, a, b = parse_format(format)
    gen = generator(seed)
    outputs, columns = shape[0], int(torch.Size(shape[1:]).numel())
    if kind == "nm":
        taps = int(torch.Size(shape[2:]).numel())
        order = torch.rand(outputs, taps, shape[1] // b, b, generator=gen).argsort(-1).argsort(-1)
        mask = (order < a).view(outputs, taps, shape[1]).transpose(1, 2)
        return mask.reshape(shape).contiguous()
    rows = -(-outputs // a)
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    kept = torch.randperm(rows * columns, generator=gen)[: round(density * rows * columns)]
    mask[kept] = True
    return mask.view(rows, columns).repeat_interleave(a, 0)[:outputs].reshape(shape)


def random_weight(
    shape, density: float, format: str = "csr", dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(weight, mask): a dense weight without zeros, of which the mask keeps a part."""
    return randn(*shape, dtype=dtype, seed=seed), random_mask(shape, density, format, seed + 1)


def poison_scratch() -> None:
    """Fills the calling thread's scratch buffers with NaN.

    The kernels keep their scratch between calls, so what a kernel reads without having written it
    first is whatever the last call left there: here, NaN.
    """
    for dtype in (torch.float32, torch.float64):
        count = 2 * lanes(dtype) + 1
        weight = torch.full((40, 40, 3, 3), torch.nan, dtype=dtype, requires_grad=True)
        x = torch.full((count, 40, 12, 12), torch.nan, dtype=dtype, requires_grad=True)
        conv2d(x, pack(weight, format="csr"), padding=1).sum().backward()
        matrix = torch.full((64, 64), torch.nan, dtype=dtype, requires_grad=True)
        rows = torch.full((200, 64), torch.nan, dtype=dtype, requires_grad=True)
        linear(rows, pack(matrix, format="csr")).sum().backward()


def tolerance(dtype: torch.dtype, length: int) -> float:
    """Largest relative difference of two sums of ``length`` products, in any orders of summation.

    One is computed in ``dtype``, the other, the reference, in float64. With unit roundoff u,
    ``|computed - exact| <= length * u / (1 - length * u) * sum |w| |x|`` (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1), so the result is to be multiplied by that sum,
    the *magnitude*. Two more roundings are allowed for, those of bias and residual.
    """
    roundings = [(length + 2) * torch.finfo(t).eps / 2 for t in (dtype, torch.float64)]
    return sum(n / (1 - n) for n in roundings)


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor, what: str = "result") -> None:
    """Raises AssertionError unless ``|actual - expected| <= bound``, element for element.

    Where ``expected`` is NaN or infinite, ``actual`` must be the same. Equal shapes are required.
    """
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    )
    got, want = actual.detach().double(), expected.detach().double()
    error = (got - want).abs()
    good = (error <= bound.detach()) | (got == want) | (got.isnan() & want.isnan())
    if not bool(good.all()):
        at = tuple(int(i) for i in (~good).nonzero()[0])
        raise AssertionError(
            f"{what}: {int((~good).sum())} of {good.numel()} elements wrong; first at {at}: "
            f"got {got[at].item()!r}, expected {want[at].item()!r}"
        )


def _slope(activation: str | None) -> float:
    # Lipschitz constant: the slope of hardswish, (2 y + 3) / 6, is at most 1.5.
    return 1.5 if activation == "hardswish" else 1.0


def forward_bound(
    dtype: torch.dtype, length: int, magnitude: Tensor, activation: str | None = None
) -> Tensor:
    """Error bound of ``act(sum + bias + residual)``; hardswish itself rounds four times."""
    bound = _slope(activation) * tolerance(dtype, length) * magnitude
    if activation == "hardswish":
        bound = bound + tolerance(dtype, 2) * (magnitude + bound)
    return bound


def row_length(mask: Tensor) -> int:
    """Kept weights of the fullest output: the length of the forward sums."""
    return int(mask.flatten(1).sum(1).max()) if mask.numel() else 0


def _abs(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().double().abs().requires_grad_()


def _leaf(t: Tensor | None) -> Tensor | None:
    """The same numbers with the same strides, to be differentiated."""
    return None if t is None else t.detach().requires_grad_()


def _check(
    ours, theirs, operands: dict, mask: Tensor, lengths: dict, activation, seed: int
) -> None:
    """Compares ``ours(**operands)`` and its gradients with ``theirs`` in float64.

    The magnitudes come from ``theirs`` on absolute values: every product is then positive, so the
    result and its gradients are sums of |w| |x|.
    """
    leaves = {k: _leaf(v) for k, v in operands.items()}
    y = ours(**leaves)
    dtype = operands["x"].dtype
    exact = {k: None if v is None else v.detach().double() for k, v in operands.items()}
    exact = {k: _leaf(v) for k, v in exact.items()}
    masked = {**exact, "weight": exact["weight"] * mask}
    want = theirs(**masked, activation=activation)
    sizes = {k: _abs(v) for k, v in operands.items()}
    size = theirs(**{**sizes, "weight": sizes["weight"] * mask}, activation=None)
    bound = forward_bound(dtype, lengths["y"], size.detach(), activation)
    assert y.dtype == dtype
    assert_within(y, want, bound, "output")
    if not want.requires_grad:
        return
    grad = randn(*want.shape, dtype=dtype, seed=seed)
    if activation:  # a kink is not differentiable: rounding may fall on either side of it
        pre = theirs(**masked, activation=None).detach()
        for kink in {"relu": (0,), "relu6": (0, 6)}[activation]:
            grad = grad * ((pre - kink).abs() > bound)
    names = [k for k, v in leaves.items() if v is not None]
    got = torch.autograd.grad(y, [leaves[k] for k in names], grad)
    ref = torch.autograd.grad(want, [exact[k] for k in names], grad.double())
    mag = torch.autograd.grad(size, [sizes[k] for k in names], grad.double().abs())
    for k, g, r, m in zip(names, got, ref, mag, strict=True):
        assert_within(g, r, tolerance(dtype, lengths[k]) * m, f"gradient of {k}")


def check_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    format: str = "csr",
    activation: str | None = None,
    groups: int = 1,
    seed: int = 7,
    **geometry,
) -> None:
    """Asserts that conv2d and all its gradients agree with float64 within proven bounds.

    ``geometry``: stride, padding, dilation. Gradients are left out for hardswish, whose slope moves
    with the rounding of its argument.
    """
    stride, padding, dilation = (
        geometry.get(k, d) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1))
    )

    def ours(x, weight, bias, residual):
        packed = pack(weight, mask, format, groups)
        return conv2d(x, packed, bias, stride, padding, dilation, groups, activation, residual)

    def theirs(x, weight, bias, residual, activation):
        return reference.conv2d(
            x, weight, bias, groups=groups, activation=activation, residual=residual, **geometry
        )

    operands = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    pixels = _pixels(x, conv_spec(weight.shape, stride, padding, dilation))
    per_channel = mask.view(groups, mask.shape[0] // groups, *mask.shape[1:]).transpose(1, 2)
    lengths = {
        "y": row_length(mask),
        "x": row_length(per_channel.flatten(0, 1)),
        "weight": pixels,
        "bias": pixels,
        "residual": 1,
    }
    run = torch.no_grad() if activation == "hardswish" else contextlib.nullcontext()
    with run:
        _check(ours, theirs, operands, mask, lengths, activation, seed)


def _pixels(x: Tensor, spec: list[int]) -> int:
    """Output pixels times images: the length of the weight gradient's sums."""
    _, kh, kw, sh, sw, pt, pb, pl, pr, dh, dw, _ = spec
    h, w = x.shape[-2:]
    oh = (h + pt + pb - dh * (kh - 1) - 1) // sh + 1
    ow = (w + pl + pr - dw * (kw - 1) - 1) // sw + 1
    return (x.shape[0] if x.dim() == 4 else 1) * oh * ow


def check_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    format: str = "csr",
    activation: str | None = None,
    seed: int = 7,
) -> None:
    """Asserts that linear and all its gradients agree with float64 within proven bounds."""

    def ours(x, weight, bias):
        return linear(x, pack(weight, mask, format), bias, activation)

    rows = x.shape[:-1].numel()
    lengths = {
        "y": row_length(mask),
        "x": row_length(mask.t()),
        "weight": rows,
        "bias": rows,
    }
    operands = {"x": x, "weight": weight, "bias": bias}
    run = torch.no_grad() if activation == "hardswish" else contextlib.nullcontext()
    with run:
        _check(ours, reference.linear, operands, mask, lengths, activation, seed)


__all__ = [
    "FORMATS",
    "KernelInfo",
    "assert_within",
    "check_conv2d",
    "check_linear",
    "forward_bound",
    "generator",
    "isa",
    "kernel_table",
    "lanes",
    "poison_scratch",
    "randn",
    "random_mask",
    "random_weight",
    "row_length",
    "tolerance",
]
