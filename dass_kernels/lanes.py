"""Convolution on batches that lie innermost: the layout in which every tap is aligned.

``x[n, c, h, w, lane]`` holds image ``n * lanes + lane``; ``lanes`` are the elements of a register.
A network that keeps its activations so converts only at its borders. Inference only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C
from .formats import Packed
from .ops import _check_packed, conv_spec

_PAGE = 4096  # channels a multiple of this apart would compete for the same cache sets


def register_lanes(dtype: torch.dtype = torch.float32) -> int:
    """Elements of a register of the active instruction set: the batch multiple of this layout."""
    return _C.lanes(_C.active_isa(), "f64" if dtype == torch.float64 else "f32")


def to_lanes(x: Tensor, padding: int | tuple[int, int] = 0) -> Tensor:
    """Brings ``(N, C, H, W)`` into the layout, with zeros around every plane.

    Returns:
        ``(N / lanes, C, H + 2 ph, W + 2 pw, lanes)``, planes contiguous, channels a little apart.

    Raises:
        ValueError: N is no multiple of ``register_lanes(x.dtype)``, or x is not 4-d.
    """
    lanes = register_lanes(x.dtype)
    if x.dim() != 4 or x.size(0) % lanes:
        raise ValueError(
            f"x must be (N, C, H, W) with N a multiple of {lanes}, got shape {tuple(x.shape)}"
        )
    ph, pw = (padding, padding) if isinstance(padding, int) else padding
    x = F.pad(x, (pw, pw, ph, ph)).unflatten(0, (-1, lanes)).permute(0, 2, 3, 4, 1)
    groups, channels, height, width, _ = x.shape
    pitch = height * width * lanes
    if pitch * x.element_size() % _PAGE == 0:
        pitch += 3 * lanes
    out = x.new_empty(groups * channels * pitch).as_strided(
        x.shape, (channels * pitch, pitch, width * lanes, lanes, 1)
    )
    return out.copy_(x)


def from_lanes(y: Tensor) -> Tensor:
    """The way back: ``(n, C, H, W, lanes)`` to contiguous ``(n * lanes, C, H, W)``."""
    return y.permute(0, 4, 1, 2, 3).flatten(0, 1).contiguous()


def conv2d_lanes(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None = None,
    dilation=1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """:func:`dass_kernels.conv2d` of stride 1 on ``to_lanes(x, padding)``; no gradient.

    Args:
        x: ``(n, C, H, W, lanes)`` from :func:`to_lanes`, padding included; float32 or float64.
        packed, bias, dilation, groups, activation: as for :func:`dass_kernels.conv2d`.

    Returns:
        ``(n, O, H', W', lanes)``, contiguous, without padding.
    """
    _check_packed(packed, 4)
    packed = packed.with_groups(groups)
    packed.validate()
    spec = conv_spec(packed.shape, 1, 0, dilation, activation)
    return torch.ops.dass.conv2d_lanes(x, packed.values, packed.pattern, bias, spec)
