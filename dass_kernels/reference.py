"""What the ops compute, written to be read: slow, in float64, and without any kernel.

``conv2d``, ``linear`` and ``spmm`` are the dense torch ops on the dense weight. ``conv2d_kept`` and
``linear_kept`` add up the kept weights one by one: unlike a dense op they say what NaN and infinity
do, because a pruned weight is absent and ``0 * nan`` never happens. All are differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import Packed

_ACTIVATIONS = {None: lambda y: y, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish}


def dense_weight(weight: Tensor | Packed) -> Tensor:
    """The dense weight in float64."""
    return (weight.to_dense() if isinstance(weight, Packed) else weight).double()


def _double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def _finish(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    return _ACTIVATIONS[activation](y if residual is None else y + residual.double())


def conv2d(
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """:func:`dass_kernels.conv2d` in float64: ``act(conv(x, W) + bias + residual)``."""
    y = F.conv2d(x.double(), dense_weight(weight), _double(bias), stride, padding, dilation, groups)
    return _finish(y, residual, activation)


def linear(
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """:func:`dass_kernels.linear` in float64: ``act(x W^T + bias)``."""
    return _finish(F.linear(x.double(), dense_weight(weight), _double(bias)), None, activation)


def spmm(weight: Tensor | Packed, x: Tensor) -> Tensor:
    """:func:`dass_kernels.spmm` in float64: ``W x``."""
    return dense_weight(weight) @ x.double()


def _paddings(padding, kernel, dilation) -> list[int]:
    """Zeros left, right, above and below, as ``F.pad`` takes them."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        (top, left), (bottom, right) = [t // 2 for t in total], [t - t // 2 for t in total]
    else:
        top, left = _pair(padding)
        bottom, right = top, left
    return [left, right, top, bottom]


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def conv2d_kept(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """conv2d of a batch ``[N, C, H, W]``, one kept weight after the other, in float64.

    ``y[n, o] = sum over kept (c, i, j): W[o, c, i, j] * shifted(x[n, c], i, j)``.
    """
    (sh, sw), (dh, dw), kernel = _pair(stride), _pair(dilation), weight.shape[2:]
    padded = F.pad(x.double(), _paddings(padding, kernel, (dh, dw)))
    height = (padded.shape[2] - dh * (kernel[0] - 1) - 1) // sh + 1
    width = (padded.shape[3] - dw * (kernel[1] - 1) - 1) // sw + 1
    per_group = weight.shape[0] // groups
    rows = []
    for o in range(weight.shape[0]):
        row = padded.new_zeros(x.shape[0], height, width)
        if bias is not None:
            row = row + bias[o].double()
        for c, i, j in mask[o].nonzero().tolist():
            plane = padded[:, o // per_group * weight.shape[1] + c]
            shifted = plane[:, i * dh :, j * dw :][:, ::sh, ::sw][:, :height, :width]
            row = row + weight[o, c, i, j].double() * shifted
        rows.append(row)
    y = torch.stack(rows, 1) if rows else padded.new_zeros(x.shape[0], 0, height, width)
    return _finish(y, residual, activation)


def linear_kept(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """linear of ``[N, I]``, one kept weight after the other, in float64."""
    y = conv2d_kept(x[:, :, None, None], weight[:, :, None, None], mask[:, :, None, None], bias)
    return _finish(y[:, :, 0, 0], None, activation)
