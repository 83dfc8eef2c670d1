"""Where the windows of convolutions and pools lie, one dimension at a time."""

from __future__ import annotations

import torch
from torch import Tensor

Four = tuple[int, int, int, int]


def count(size: int, kernel: int, stride: int, before: int, after: int, dilation: int = 1) -> int:
    """How many windows there are: floor((size + before + after - extent) / stride) + 1."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def output_size(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: Four,
    dilation: tuple[int, int] = (1, 1),
) -> tuple[int, int]:
    """(height, width) of what a convolution or pool makes of a picture of `size`."""
    top, bottom, left, right = padding
    return (
        count(size[0], kernel[0], stride[0], top, bottom, dilation[0]),
        count(size[1], kernel[1], stride[1], left, right, dilation[1]),
    )


def taps_inside(node, size: tuple[int, int]) -> Tensor:
    """bool [windows high, windows wide, kh, kw]: which taps of which window meet a pixel.

    node: a Conv or Pool whose input has height and width `size`.
    """
    kernel = node.kernel if hasattr(node, "kernel") else tuple(node.weight.shape[2:])
    rows = _inside(size[0], kernel[0], node.stride[0], node.padding[:2], node.dilation[0])
    cols = _inside(size[1], kernel[1], node.stride[1], node.padding[2:], node.dilation[1])
    return rows[:, None, :, None] & cols[None, :, None, :]


def _inside(size: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int) -> Tensor:
    """bool [windows, kernel]."""
    windows = count(size, kernel, stride, *padding, dilation)
    at = stride * torch.arange(windows)[:, None] + dilation * torch.arange(kernel) - padding[0]
    return (at >= 0) & (at < size)
