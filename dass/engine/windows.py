"""Pools of torch as Pool nodes: what ceil_mode and divisors mean, as explicit padding and scale."""

from __future__ import annotations

import torch

from dass.engine.builder import Builder, NoStep, Value
from dass.engine.geometry import Four, output_size
from dass.engine.graph import Mean, Pool


def pair(value) -> tuple[int, int]:
    """(height, width) of one number or of one or two."""
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1])


def max_pool2d(
    b: Builder, node, x, kernel, stride=(), padding=0, dilation=1, ceil_mode=False
) -> Value:
    x, kernel, dilation = b.picture(node, x), pair(kernel), pair(dilation)
    stride, shape = pair(stride or kernel), b.logical(node)
    sides = _covering(x.shape, shape, kernel, stride, pair(padding), dilation)
    return b.add(Pool, node, [x], shape, "max", kernel, stride, sides, dilation)


def avg_pool2d(
    b: Builder, node, x, kernel, stride=(), padding=0, ceil_mode=False, count_include_pad=True,
    divisor_override=None,
) -> Value:  # fmt: skip
    kernel, padding, shape = pair(kernel), pair(padding), b.logical(node)
    stride = pair(stride or kernel)
    x = b.picture(node, x)
    symmetric = (padding[0], padding[0], padding[1], padding[1])
    sides = _covering(x.shape, shape, kernel, stride, padding, (1, 1))
    scale = bias = None
    counts = count_include_pad
    if divisor_override:
        counts = True
        factor = kernel[0] * kernel[1] / divisor_override
        scale = torch.full((shape[0],), factor, dtype=torch.float64)
        bias = torch.zeros_like(scale)
    elif counts and sides != symmetric:
        # The overhang of ceil_mode is never counted; with padding besides, neither rule holds.
        if any(padding):
            raise NoStep("a mean that counts its padding but not what ceil_mode adds")
        counts = False
    return b.add(
        Pool, node, [x], shape, "avg", kernel, stride, sides,
        count_padding=counts, scale=scale, bias=bias,
    )  # fmt: skip


def adaptive_avg_pool2d(b: Builder, node, x, size) -> Value:
    if len(x.shape) == 1:
        x, shape = b.plain(node, x), b.logical(node)
        if shape[1:] == (1, 1):
            return x
    x, shape = b.picture(node, x), b.logical(node)
    if shape[1:] == (1, 1):
        return b.add(Mean, node, [x], shape[:1])
    if x.shape == shape:
        return x
    kernel = (x.shape[1] // shape[1], x.shape[2] // shape[2])
    if (kernel[0] * shape[1], kernel[1] * shape[2]) != x.shape[1:]:
        raise NoStep(f"its windows differ in size: {x.shape[1:]} to {shape[1:]}")
    return b.add(Pool, node, [x], shape, "avg", kernel, kernel)


def _covering(x, y, kernel, stride, padding, dilation) -> Four:
    """The padding with what the last window of ceil_mode needs: (C, H, W) x to y windows."""
    sides = []
    for size, windows, k, s, p, d in zip(
        x[1:], y[1:], kernel, stride, padding, dilation, strict=True
    ):
        sides += [p, max(p, (windows - 1) * s + d * (k - 1) + 1 - size - p)]
    if output_size(x[1:], kernel, stride, tuple(sides), dilation) != tuple(y[1:]):
        raise NoStep("its windows do not lie as torch documents them")
    return tuple(sides)
