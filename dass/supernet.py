"""The relaxed network of the search: every edge computes a weighted sum of its operations.

    network = Supernet(channels=16, layers=8, classes=10)
    architecture = Architecture(network.choices)
    logits = network(x, architecture.weights())

The architecture parameters (alphas) are no part of the network: an optimiser of
``network.parameters()`` cannot reach them (method.md, section 4).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dass.genotype import CELLS, Edge, Genotype
from dass.space import CONCAT, EDGES, INPUTS, NODES, OPS, FactorizedReduce, edge_index, relu_conv_bn

__all__ = ["CELLS", "Architecture", "Choice", "Supernet", "choices_of", "still_statistics"]

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Choice:
    """One candidate of an edge. density: of its convolutions; None: the network's."""

    op: str
    density: float | None = None

    def __str__(self) -> str:
        return self.op if self.density is None else f"{self.op}@{self.density:g}"


def choices_of(densities: Sequence[float] = ()) -> tuple[Choice, ...]:
    """All operations, those with weights once per density if densities are a choice."""
    found = []
    for op in OPS:
        weighted = "conv" in op
        found += [Choice(op, d) for d in densities] if weighted and densities else [Choice(op)]
    return tuple(found)


class Architecture(nn.Module):
    """The alphas: one row per edge, one column per choice, for each kind of cell.

    Args:
        choices: the candidates of an edge, in the order of the columns.
        seed: of the initial values, 1e-3 N(0, 1) (Liu et al. 2019, arXiv 1806.09055).
    """

    def __init__(self, choices: Sequence[Choice], seed: int = 0):
        super().__init__()
        self.choices = tuple(choices)
        generator = torch.Generator().manual_seed(seed)
        for cell in CELLS:
            alpha = 1e-3 * torch.randn(EDGES, len(choices), generator=generator)
            self.register_parameter(cell, nn.Parameter(alpha))

    def weights(self) -> Weights:
        """softmax(alpha) per edge: ``{"normal": [14, choices], "reduce": ...}``."""
        return {cell: getattr(self, cell).softmax(-1) for cell in CELLS}

    def genotype(self) -> Genotype:
        """Per node the two incoming edges whose best choice other than none is strongest."""
        return Genotype(**{cell: self._derive(cell) for cell in CELLS})

    @torch.no_grad()
    def _derive(self, cell: str):
        weights = getattr(self, cell).softmax(-1).clone()
        weights[:, [i for i, choice in enumerate(self.choices) if choice.op == "none"]] = -1
        strongest, best = weights.max(-1)
        nodes = []
        for node in CONCAT:
            order = sorted(
                range(node), key=lambda source: -float(strongest[edge_index(node, source)])
            )
            found = []
            for source in sorted(order[:2]):
                choice = self.choices[int(best[edge_index(node, source)])]
                found.append(Edge(choice.op, source, choice.density))
            nodes.append(tuple(found))
        return tuple(nodes)


class MixedOp(nn.Module):
    """``sum_i weight_i op_i(x)``; with ``partial`` = p only the first C / p channels take part
    (Xu et al. 2020, PC-DARTS, arXiv 1907.05737), and the channels are then interleaved."""

    def __init__(self, channels: int, stride: int, choices: Sequence[Choice], partial: int):
        super().__init__()
        self.taking_part, self.stride = channels // partial, stride
        self.ops = nn.ModuleList()
        for choice in choices:
            op = OPS[choice.op](self.taking_part, stride, affine=False, pool_norm=True)
            op.choice_density = choice.density
            self.ops.append(op)
        self.pool = nn.MaxPool2d(2) if stride == 2 and partial > 1 else nn.Identity()

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        if self.taking_part == x.size(1):
            return self._mix(x, weights)
        mixed = self._mix(x[:, : self.taking_part], weights)
        out = torch.cat([mixed, self.pool(x[:, self.taking_part :])], 1)
        parts = out.size(1) // self.taking_part
        return out.unflatten(1, (parts, self.taking_part)).transpose(1, 2).flatten(1, 2)

    def _mix(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(w * op(x) for w, op in zip(weights, self.ops, strict=True))


class SearchCell(nn.Module):
    """Two inputs, four nodes; a node is the sum of its edges, the output all nodes side by side."""

    def __init__(
        self,
        before: tuple[int, int],
        channels: int,
        reduction: bool,
        after_reduction: bool,
        choices: Sequence[Choice],
        partial: int,
    ):
        super().__init__()
        self.kind = "reduce" if reduction else "normal"
        first = FactorizedReduce if after_reduction else relu_conv_bn
        self.inputs = nn.ModuleList(
            [
                first(before[0], channels, affine=False),
                relu_conv_bn(before[1], channels, affine=False),
            ]
        )
        self.edges = nn.ModuleList(
            MixedOp(channels, 2 if reduction and source < INPUTS else 1, choices, partial)
            for node in CONCAT
            for source in range(node)
        )

    def forward(self, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
        states = [self.inputs[0](a), self.inputs[1](b)]
        for node in CONCAT:
            edges = [edge_index(node, source) for source in range(node)]
            states.append(
                sum(self.edges[e](x, weights[e]) for e, x in zip(edges, states, strict=True))
            )
        return torch.cat(states[INPUTS:], 1)


class Supernet(nn.Module):
    """The search network: stem, cells with reductions at 1/3 and 2/3 of the depth, classifier.

    Args:
        channels: of the first cells (C); they double at each reduction.
        layers: cells.
        classes: outputs.
        choices: candidates of every edge; default all operations, without densities.
        in_channels: of the images.
        stem: the stem has ``stem * channels`` channels.
        partial: see :class:`MixedOp`; must divide channels.
        recompute: keep only each cell's inputs for the backward pass and compute the rest again:
            memory of one cell instead of all, for a third more time.

    Raises:
        ValueError: sizes below 1, or partial does not divide channels.
    """

    def __init__(
        self,
        channels: int,
        layers: int,
        classes: int,
        choices: Sequence[Choice] | None = None,
        *,
        in_channels: int = 3,
        stem: int = 3,
        partial: int = 1,
        recompute: bool = False,
    ):
        super().__init__()
        for name, value in (("channels", channels), ("layers", layers), ("classes", classes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if partial < 1 or channels % partial:
            raise ValueError(f"partial must divide channels, got {partial} and {channels}")
        self.choices = tuple(choices or choices_of())
        self.layers, self.recompute = layers, recompute
        width = stem * channels
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )
        self.cells = nn.ModuleList()
        before, reduced = (width, width), False
        for layer in range(layers):
            reduction = layers > 2 and layer in (layers // 3, 2 * layers // 3)
            channels *= 2 if reduction else 1
            self.cells.append(
                SearchCell(before, channels, reduction, reduced, self.choices, partial)
            )
            before, reduced = (before[1], NODES * channels), reduction
        self.classifier = nn.Linear(before[1], classes)

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """x float32 [B, C, H, W] and :meth:`Architecture.weights` -> logits [B, classes]."""
        a = b = self.stem(x)
        for cell in self.cells:
            a, b = b, self._run(cell, a, b, weights[cell.kind])
        return self.classifier(b.mean((2, 3)))

    def _run(self, cell: SearchCell, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
        if not self.recompute or not torch.is_grad_enabled():
            return cell(a, b, weights)
        again = lambda: (contextlib.nullcontext(), still_statistics(cell))  # noqa: E731
        return checkpoint(cell, a, b, weights, use_reentrant=False, context_fn=again)


@contextlib.contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Within, BatchNorm in training mode leaves its running statistics as they are."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm._buffers["num_batches_tracked"] = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm._buffers["num_batches_tracked"] = count
