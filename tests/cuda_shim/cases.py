"""Shapes and masks every emulated kernel is checked on, and the check: float64, proven bounds."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import dass_kernels as dk
from dass_kernels import formats, reference, testing


@dataclasses.dataclass(frozen=True)
class Case:
    """One weight and one input. ``weight`` of two dimensions is a linear layer."""

    name: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    density: float = 0.15
    format: str = "csr"
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    activation: str | None = None
    bias: bool = False
    residual: bool = False
    offset: int = 0  # elements from an aligned address to the start of x


CASES = [
    Case("conv 3x3", (2, 20, 9, 7), (70, 20, 3, 3), padding=1, bias=True),
    Case("stride, dilation, groups", (2, 20, 9, 8), (70, 10, 3, 2), stride=2, padding=(2, 1),
         dilation=(1, 2), groups=2, activation="relu", bias=True),
    Case("stride 3, wide padding", (1, 5, 7, 11), (6, 5, 2, 3), 0.5, stride=(3, 2), padding=(3, 4)),
    Case("same padding, even kernel", (1, 9, 6, 5), (11, 9, 4, 2), padding="same"),
    Case("1x1 in vectors", (2, 65, 4, 6), (67, 65, 1, 1), 0.1, activation="relu", residual=True),
    Case("1x1, misaligned", (2, 65, 4, 6), (67, 65, 1, 1), 0.1, residual=True, offset=1),
    Case("1x1 on odd planes", (3, 33, 5, 5), (10, 33, 1, 1), 0.3, activation="hardswish"),
    Case("1x1 images", (130, 20, 1, 1), (70, 20, 1, 1), 0.3, bias=True, residual=True),
    Case("depthwise", (2, 70, 6, 6), (70, 1, 3, 3), 0.5, padding=1, groups=70, activation="relu6"),
    Case("groups across tiles", (1, 12, 5, 5), (150, 4, 1, 1), 0.4, groups=3),
    Case("4x1 blocks", (1, 17, 6, 5), (10, 17, 3, 3), 0.2, format="4x1"),
    Case("16x1 blocks", (1, 30, 4, 5), (70, 30, 1, 1), 0.2, format="16x1"),
    Case("2:4", (1, 16, 4, 5), (9, 16, 3, 1), format="2:4"),
    Case("empty rows and columns", (2, 140, 4, 5), (130, 140, 1, 1), 0.004),
    Case("nothing kept", (1, 3, 4, 4), (5, 3, 3, 3), 0.0, bias=True),
    Case("everything kept", (1, 40, 5, 4), (33, 40, 3, 3), 1.0, padding=1),
    Case("spmm, one column", (1, 130, 1, 1), (65, 130, 1, 1), 0.2),
    Case("spmm, many columns", (2, 70, 1, 300), (20, 70, 1, 1), 0.2),
    Case("more pixels than partial sums", (1, 3, 96, 97), (2, 3, 1, 1), 0.7),
    Case("no images", (0, 3, 4, 4), (5, 3, 3, 3), 0.5),
    Case("linear", (150, 130), (70, 130), 0.1, bias=True, activation="relu"),
    Case("linear, one row", (1, 65), (129, 65), 0.3, bias=True),
    Case("linear, 8x1 blocks", (9, 33), (20, 33), 0.3, format="8x1", activation="hardswish"),
    Case("linear, no rows", (0, 7), (5, 7), 0.5),
    Case("linear, no inputs", (3, 0), (5, 0), 0.5, bias=True),
]  # fmt: skip


def mask_of(case: Case) -> Tensor:
    if case.density in (0.0, 1.0):
        return torch.full(case.weight, bool(case.density))
    return testing.random_mask(case.weight, case.density, case.format, seed=3)


def operands(case: Case, dtype: torch.dtype, mask: Tensor) -> dict[str, Tensor | None]:
    """x, weight, bias and residual of a case, as the op gets them."""
    flat = testing.randn(case.offset + torch.Size(case.x).numel(), dtype=dtype, seed=1)
    x = flat[case.offset :].view(case.x)
    weight = testing.randn(*case.weight, dtype=dtype, seed=2)
    bias = testing.randn(case.weight[0], dtype=dtype, seed=4) if case.bias else None
    given = {"x": x, "weight": weight, "bias": bias, "residual": None}
    if case.residual:
        like = dense(case, **{k: v for k, v in given.items() if v is not None}, mask=mask)
        given["residual"] = testing.randn(*like.shape, dtype=dtype, seed=5)
    return given


def dense(case: Case, x, weight, mask, bias=None, residual=None, activation=None) -> Tensor:
    """The float64 truth of a case."""
    if len(case.weight) == 2:
        return reference.linear(x, weight * mask, bias, activation)
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    return reference.conv2d(x, weight * mask, bias, *geometry, activation, residual)


def kernel_calls(ops, case: Case, packed: dk.Packed, given: dict, grad: Tensor) -> dict:
    """Forward, dX and dW of a case by the ops of a library (``torch.ops.dass`` or emulated)."""
    x, bias, residual = given["x"], given["bias"], given["residual"]
    values, pattern = packed.values, packed.pattern
    code = dk.ops.activation_code(case.activation)
    if len(case.weight) == 2:
        return {
            "y": ops.linear(x, values, pattern, bias, case.weight[0], code),
            "dx": ops.linear_dx(grad, values, pattern, case.weight[1]),
            "dw": ops.linear_dw(grad, x, pattern, len(values)),
        }
    geometry = (case.stride, case.padding, case.dilation)
    spec = dk.conv_spec(case.weight, *geometry)
    return {
        "y": ops.conv2d(x, values, pattern, bias, residual, [*spec[:-1], code]),
        "dx": ops.conv2d_dx(grad, values, pattern, spec, *x.shape[1:]),
        "dw": ops.conv2d_dw(grad, x, pattern, spec, len(values)),
    }


def bound(dtype: torch.dtype, length: int, size: Tensor, want: Tensor, activation=None) -> Tensor:
    """Sums are float32 whatever the dtype; a half is rounded once, at the end."""
    sums = testing.forward_bound(torch.float32, length, size, activation)
    if dtype == torch.float32:
        return sums
    rounding = torch.finfo(dtype).eps / 2 * (want.abs() + sums)
    return sums + rounding + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2


def check(ops, case: Case, dtype: torch.dtype, mask: Tensor | None = None) -> None:
    """Asserts that a library's forward, dX and dW of a case agree with float64."""
    mask = mask_of(case) if mask is None else mask
    given = operands(case, dtype, mask)
    packed = dk.pack(given["weight"], mask, case.format, case.groups)
    exact = {k: v.double().requires_grad_() for k, v in given.items() if v is not None}
    sizes = {k: v.detach().abs().requires_grad_() for k, v in exact.items()}
    pre, size = dense(case, **exact, mask=mask), dense(case, **sizes, mask=mask)
    grad = testing.randn(*pre.shape, dtype=dtype, seed=6)
    got = kernel_calls(ops, case, packed, given, grad)
    assert all(t.dtype == dtype for t in got.values())

    want = dense(case, **exact, mask=mask, activation=case.activation)
    length = testing.row_length(mask)
    limit = bound(dtype, length, size, want, case.activation)
    testing.assert_within(got["y"], want, limit, f"{case.name}: output")

    leaves = [exact["x"], exact["weight"]]
    dx, dw = torch.autograd.grad(pre, leaves, grad.double())
    sx, sw = torch.autograd.grad(size, [sizes["x"], sizes["weight"]], grad.double().abs())
    grouped = (
        mask.view(case.groups, mask.shape[0] // case.groups, *mask.shape[1:])
        .transpose(1, 2)
        .flatten(0, 1)
    )
    lengths = testing.row_length(grouped), grad.numel() // max(case.weight[0], 1)
    testing.assert_within(got["dx"], dx, bound(dtype, lengths[0], sx, dx), f"{case.name}: dX")
    at = formats.flat_index(packed.pattern).long()
    dw, sw = dw.flatten()[at], sw.flatten()[at]
    kept = _stored(packed, mask)  # a block's padding is no weight
    limit = bound(dtype, lengths[1], sw, dw)[kept]
    testing.assert_within(got["dw"][kept], dw[kept], limit, f"{case.name}: dW")


def _stored(packed: dk.Packed, mask: Tensor) -> Tensor:
    """Which of the values are weights of the mask."""
    real = torch.zeros(len(packed.values), dtype=torch.bool)
    real[packed.perm.long()] = True
    return real & mask.flatten()[formats.flat_index(packed.pattern).long()]


def dlmc(path, sparsity: str, layer: int, rows: int, columns: int) -> Tensor:
    """The corner of a pruned ResNet-50 layer's mask (Gale et al., SC 2020), ``[rows, columns]``."""
    import numpy as np

    with np.load(path) as z:
        name = z["layers"][layer]
        indptr, indices = z[f"{sparsity}/{name}/indptr"], z[f"{sparsity}/{name}/indices"]
        mask = torch.zeros(*map(int, z["shapes"][layer]), dtype=torch.bool)
    row = torch.repeat_interleave(torch.from_numpy(np.diff(indptr)).long())
    mask[row, torch.from_numpy(indices.astype("int64"))] = True
    return mask[:rows, :columns].contiguous()
