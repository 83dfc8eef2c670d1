"""The weighted sum at a node of the relaxed network, as one differentiable step.

    out = sum_i weights[place_i] y_i
    dL/dy_i = weights[place_i] dL/dout
    dL/dweights[p] = sum over place_i = p of <dL/dout, y_i>

A term may hold only some channels of the node, the others being zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Term", "mix"]


class Term(NamedTuple):
    """One summand. y: [B, channels, H, W], or [B, len(live), H, W] with `live` the numbers of the
    channels it holds (int64); place: of its weight."""

    y: Tensor
    place: int
    live: Tensor | None = None


def mix(weights: Tensor, terms: Sequence[Term], shape: Sequence[int]) -> Tensor:
    """The sum of the terms, float [B, C, H, W] = `shape`; without terms, zeros.

    Args:
        weights: 1-d, one per place.
        terms: those that are not zero.

    First derivatives only: the second order of :mod:`dass.bilevel` takes differences of them.
    """
    if not terms:
        return weights.new_zeros(shape)
    ys, places, lives = zip(*terms, strict=True)
    return _Mix.apply(weights, places, lives, tuple(shape), *ys)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights: Tensor, places, lives, shape, *ys: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *ys)
        ctx.places, ctx.lives = places, lives
        factors = weights.tolist()
        out = None
        for y, place, live in zip(ys, places, lives, strict=True):
            if live is None:
                out = y * factors[place] if out is None else out.add_(y, alpha=factors[place])
        out = ys[0].new_zeros(shape) if out is None else out
        for y, place, live in zip(ys, places, lives, strict=True):
            if live is not None:
                out.index_add_(1, live, y, alpha=factors[place])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        weights, *ys = ctx.saved_tensors
        wants_weights, wants = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        factors, found = weights.tolist(), [0.0] * len(weights)
        gradients: list[Tensor | None] = []
        flat = grad.contiguous().view(-1)
        for y, place, live, wanted in zip(ys, ctx.places, ctx.lives, wants, strict=True):
            part = flat if live is None else grad.index_select(1, live).view(-1)
            if wants_weights:
                found[place] += torch.dot(part, y.reshape(-1)).item()
            gradients.append(part.mul(factors[place]).view(y.shape) if wanted else None)
        dweights = weights.new_tensor(found) if wants_weights else None
        return dweights, None, None, None, *gradients
