"""Layers, masks and inputs to measure: random, and the same for the same case every time."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from bench.cases import Conv, Linear
from dass.nn import SparseConv2d, SparseLinear
from dass_kernels import Packed


def seed(*words: object) -> torch.Generator:
    """A generator that depends on the words alone."""
    return torch.Generator().manual_seed(zlib.crc32(repr(words).encode()))


def random_mask(
    shape: tuple[int, ...], sparsity: float, generator: torch.Generator, rows: int = 1
) -> Tensor:
    """A bool mask that keeps a random ``1 - sparsity`` of the weights, the count exact.

    Args:
        shape: ``[O, ...]``.
        rows: weights are kept in blocks of so many outputs, which must divide O.
    """
    outputs, *rest = shape
    blocks = outputs // rows * torch.Size(rest).numel()
    kept = max(1, round((1 - sparsity) * blocks))
    mask = torch.zeros(blocks, dtype=torch.bool)
    mask[torch.randperm(blocks, generator=generator)[:kept]] = True
    return mask.view(outputs // rows, *rest).repeat_interleave(rows, 0)


def masked_layer(
    case: Conv | Linear, sparsity: float, *, rows: int = 1, bias: bool = True
) -> tuple[nn.Module, Tensor]:
    """A dense layer with exact zeros where pruned, in eval mode, and its mask."""
    generator = seed(case, sparsity, rows)
    layer = case.module(bias).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        mask = random_mask(tuple(layer.weight.shape), sparsity, generator, rows)
        layer.weight.masked_fill_(~mask, 0)
    return layer, mask


def sparse_layer(layer: nn.Module, mask: Tensor) -> SparseConv2d | SparseLinear:
    """The sparse twin of a masked layer, on the same Parameters."""
    kind = SparseConv2d if isinstance(layer, nn.Conv2d) else SparseLinear
    return kind.from_dense(layer, mask)


def random_input(case: Conv | Linear, batch: int | None = None) -> Tensor:
    shape = case.input_shape(batch)
    return torch.randn(shape, generator=seed(case, batch, "input"))


def packed_constant(layer: SparseConv2d | SparseLinear) -> Packed:
    """The packed weight of a layer with its values gathered once, outside any graph."""
    packed = layer.packed()
    return packed.with_values(packed.values.detach().clone())
