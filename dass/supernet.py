"""The relaxed network of the search: every edge computes a weighted sum of its operations.

    network = Supernet(channels=16, layers=8, classes=10)
    architecture = Architecture(network.choices)
    logits = network(x, architecture.weights())

The architecture parameters (alphas) are no part of the network: an optimiser of
``network.parameters()`` cannot reach them (method.md, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dass.genotype import CELLS, Edge, Genotype
from dass.live import LiveOp, live_op
from dass.mixing import Term, mix
from dass.space import (
    CONCAT,
    EDGES,
    INPUTS,
    NODES,
    OPS,
    FactorizedReduce,
    Zero,
    edge_ends,
    edge_index,
    relu_conv_bn,
)

__all__ = ["CELLS", "Architecture", "Candidates", "Choice", "Supernet", "choices_of"]

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

    def genotype(self, prices: Mapping[str, Tensor] | None = None) -> Genotype:
        """Per node the two incoming edges whose best choice other than none is strongest.

        prices: ``[14, choices]`` per cell, taken off the logarithms of the softmaxed alphas.
        """
        return Genotype(**{cell: self._derive(cell, prices) for cell in CELLS})

    @torch.no_grad()
    def _derive(self, cell: str, prices: Mapping[str, Tensor] | None):
        strength = getattr(self, cell).log_softmax(-1)
        strength = strength - prices[cell] if prices else strength.clone()
        strength[
            :, [i for i, choice in enumerate(self.choices) if choice.op == "none"]
        ] = -torch.inf
        strongest, best = strength.max(-1)
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


class Candidates(nn.Module):
    """The operations of one edge, in the order of the choices; ``stride`` is theirs."""

    def __init__(self, ops: Sequence[nn.Module], stride: int):
        super().__init__()
        self.ops, self.stride = nn.ModuleList(ops), stride


class _Sources:
    """What the operations of a cell read, and what has been computed of it, in one forward pass.

    Edges from the same source share what does not depend on the edge: the pools, which have no
    weights, and the ReLU that convolutions begin with.
    """

    def __init__(self, taking_part: int, live: Mapping[nn.Module, LiveOp]):
        self.taking_part, self.live = taking_part, live
        self.states: list[Tensor] = []
        self.done: dict[object, Tensor] = {}

    def once(self, key: object, source: int, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, made the first time."""
        if (key, source) not in self.done:
            self.done[key, source] = make()
        return self.done[key, source]

    def part(self, source: int) -> Tensor:
        """The channels that take part."""
        x = self.states[source]
        return x if x.size(1) == self.taking_part else x[:, : self.taking_part]

    def term(self, op: nn.Module, source: int, place: int) -> Term | None:
        """op(source), weighted by the place's weight; None if it is zero."""
        if isinstance(op, Zero):
            return None
        if not hasattr(op, "after_relu"):
            return Term(self.once(op, source, lambda: op(self.part(source))), place)
        x = self.once("relu", source, lambda: F.relu(self.part(source)))
        live = self.live.get(op)
        if live is None:
            return Term(op.after_relu(x), place)
        y = live.after_relu(x)
        return None if y is None else Term(y, place, live.live)


class SearchCell(nn.Module):
    """Two inputs, four nodes; a node is the sum of its edges, the output all nodes side by side.

    An edge is ``sum_i weight_i op_i(source)``. With ``partial`` = p only the first C / p channels
    take part (Xu et al. 2020, PC-DARTS, arXiv 1907.05737); the others are added up as they are,
    and both are then interleaved.
    """

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
        self.channels, self.taking_part = channels, channels // partial
        first = FactorizedReduce if after_reduction else relu_conv_bn
        self.inputs = nn.ModuleList(
            [
                first(before[0], channels, affine=False),
                relu_conv_bn(before[1], channels, affine=False),
            ]
        )
        self.live: dict[nn.Module, LiveOp] = {}
        self.edges = nn.ModuleList()
        shared: dict[tuple[int, int], nn.Module] = {}
        for node in CONCAT:
            for source in range(node):
                stride = 2 if reduction and source < INPUTS else 1
                ops = [self._candidate(choice, stride) for choice in choices]
                for c, op in enumerate(ops):
                    if not any(True for _ in op.parameters()):
                        ops[c] = shared.setdefault((source, c), op)
                self.edges.append(Candidates(ops, stride))

    def _candidate(self, choice: Choice, stride: int) -> nn.Module:
        op = OPS[choice.op](self.taking_part, stride, affine=False, pool_norm=True)
        op.choice_density = choice.density
        return op

    def forward(self, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
        """a, b: outputs of the cell before the last and of the last; weights [14, choices]."""
        sources = _Sources(self.taking_part, self.live)
        sources.states += [self.inputs[0](a), self.inputs[1](b)]
        for node in CONCAT:
            mixed = self._mixed(sources, node, weights)
            if self.taking_part < self.channels:
                mixed = self._interleaved(mixed, sources, node)
            sources.states.append(mixed)
        return torch.cat(sources.states[INPUTS:], 1)

    def _mixed(self, sources: _Sources, node: int, weights: Tensor) -> Tensor:
        terms = []
        for source in range(node):
            edge = edge_index(node, source)
            for c, op in enumerate(self.edges[edge].ops):
                term = sources.term(op, source, edge * weights.size(1) + c)
                if term is not None:
                    terms.append(term)
        batch, _, height, width = sources.states[0].shape
        stride = self.edges[edge_index(node, 0)].stride
        shape = (batch, self.taking_part, -(-height // stride), -(-width // stride))
        return mix(weights.reshape(-1), terms, shape)

    def _interleaved(self, mixed: Tensor, sources: _Sources, node: int) -> Tensor:
        def rest(source: int) -> Tensor:
            x = sources.states[source][:, self.taking_part :]
            return F.max_pool2d(x, 2, ceil_mode=True) if x.shape[2:] != mixed.shape[2:] else x

        others = [sources.once("rest", s, lambda s=s: rest(s)) for s in range(node)]
        out = torch.cat([mixed, sum(others)], 1)
        parts = self.channels // self.taking_part
        return out.unflatten(1, (parts, self.taking_part)).transpose(1, 2).flatten(1, 2)


class Supernet(nn.Module):
    """The search network: stem, cells with reductions at 1/3 and 2/3 of the depth, classifier.

    BatchNorms normalise by their batch, in eval mode too: there are no running statistics.

    Args:
        channels: of the first cells (C); they double at each reduction.
        layers: cells.
        classes: outputs.
        choices: candidates of every edge; default all operations, without densities.
        in_channels: of the images.
        stem: the stem has ``stem * channels`` channels.
        partial: see :class:`SearchCell`; must divide channels.
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
        self.layers, self.recompute, self.skips_dead = layers, recompute, False
        self.register_load_state_dict_post_hook(_loaded)
        width = stem * channels
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width, track_running_stats=False),
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
        return checkpoint(cell, a, b, weights, use_reentrant=False)

    def skip_dead(self, skip: bool = True) -> None:
        """Computes only channels that are not zero and matter, as the frozen masks now have it.

        See :mod:`dass.live`. To be called again when a mask was changed; loading a state dict does.
        """
        self.skips_dead = skip
        for cell in self.cells:
            found = {op: live_op(op) for edge in cell.edges for op in edge.ops} if skip else {}
            cell.live = {op: live for op, live in found.items() if live is not None}

    def edge_shapes(self, image: Sequence[int]) -> dict[Candidates, tuple[int, int, int]]:
        """The shape [C, H, W] that the operations of every edge get for one image [C, H, W]."""
        height, width = image[1:]
        shapes = {}
        for cell in self.cells:
            small = (-(-height // 2), -(-width // 2)) if cell.kind == "reduce" else (height, width)
            for edge, candidates in enumerate(cell.edges):
                size = (height, width) if edge_ends(edge)[1] < INPUTS else small
                shapes[candidates] = (cell.taking_part, *size)
            height, width = small
        return shapes


def _loaded(network: Supernet, _) -> None:
    network.skip_dead(network.skips_dead)
