"""An order of a network's channels in which a pattern's blocks keep more of its weights.

A block keeps or drops neighbouring channels together, so it matters which channels are neighbours.
`permute` puts alike ones side by side, in every tensor that counts them: the network computes what
it did. Reordering for a pattern is an old idea (Ji et al., Tetris, NeurIPS 2018; Pool & Yu, Channel
permutations for N:M sparsity, NeurIPS 2021); the search here exchanges pairs, see `_exchange`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from dass import zoo
from dass.channels import ChannelGroup, channel_groups
from dass.masks import Pattern, keep_count, parse_pattern
from dass.pruning import Rule, Unit, find_units
from dass.sparse_layer import SparseLayer

_SWEEPS = 3  # over all groups: what is best for one depends on the order of the others
_ROUNDS = 64  # of exchanges, for one group in one sweep
_WORK = 1 << 27  # multiply-adds per round, about 0.1 s
_LEAST = 1e-7  # of a layer's energy: less is not worth an exchange


@dataclass(frozen=True)
class PermuteReport:
    """What an order of channels gains: `norm_before` and `norm_after` are `||w m|| / ||w||` over
    all layers that would be pruned; `layers` has both for each (name -> (before, after)).

    groups, channels: how many groups of channels were free to move, and their channels.
    """

    pattern: str
    sparsity: float
    norm_before: float
    norm_after: float
    layers: dict[str, tuple[float, float]]
    groups: int
    channels: int

    def to_dict(self) -> dict:
        """Plain numbers, strings, lists and dicts, as JSON knows them."""
        return {**asdict(self), "layers": {name: [*pair] for name, pair in self.layers.items()}}

    def __str__(self) -> str:
        return (
            f"permuted for {self.pattern} at {self.sparsity:.2%}: norm kept {self.norm_before:.2%} "
            f"-> {self.norm_after:.2%}; {self.channels:,} channels in {self.groups} groups"
        )


def permute(
    model: nn.Module,
    example_inputs: Tensor | tuple,
    pattern: str,
    sparsity: float | None = None,
    *,
    scope: str = "uniform",
    exclude: str | Iterable[str] = (),
    floor: int | float = 1,
    densities: Mapping[str, float] | None = None,
) -> PermuteReport:
    """Reorders the channels of `model` in place so that a magnitude mask of `pattern` keeps more.

    What the network computes stays the same, up to the order of its sums. Parameters stay the same
    objects. An optimiser that remembers something of them does not follow: permute before it is
    made. Layers that are sparse already take their masks along.

    example_inputs: what the model is called with, a tensor or a tuple; any batch size. Which
        channels may move, and what is raised where that cannot be told: `dass.channels`.
    pattern: a word of `dass.masks`; "unstructured" has nothing to gain, and all stays as it is.
    sparsity, scope, exclude, floor, densities: of the `dass.prune` that follows, for which the
        order is chosen. sparsity: default 0.9, or that of n:m.

    Raises ValueError as `prune` and `channel_groups` do; the model is then unchanged.
    """
    rule = Rule("magnitude", scope, pattern, floor, densities=densities or {})
    spec = parse_pattern(pattern)
    if sparsity is None:
        sparsity = 1 - spec.n / spec.m if spec.kind == "n:m" else 0.9
    rule.check_sparsity(sparsity)
    return permute_for(rule, model, example_inputs, find_units(model, exclude)[0], sparsity)


def permute_for(
    rule: Rule, model: nn.Module, example_inputs: Tensor | tuple, units: list[Unit], sparsity: float
) -> PermuteReport:
    """As `permute`, for the units and the rule of a pruning. ValueError: not by magnitude."""
    if rule.method != "magnitude":
        raise ValueError(f"channels are permuted for magnitude pruning, not for {rule.method!r}")
    masks = rule.masks(units, sparsity)
    before = rule.report(units, masks, sparsity, ())
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    groups = channel_groups(model, inputs)
    for group, order in _search(groups, _layers(units, masks, rule)):
        _reorder(model, group, order)
    for module in model.modules():
        if isinstance(module, SparseLayer):
            module.refresh()
    after = rule.report(units, rule.masks(units, sparsity), sparsity, ())
    return PermuteReport(
        pattern=rule.pattern,
        sparsity=sparsity,
        norm_before=before.norm_kept,
        norm_after=after.norm_kept,
        layers={
            old.names[0]: (old.norm_kept, new.norm_kept)
            for old, new in zip(before.layers, after.layers, strict=True)
        },
        groups=len(groups),
        channels=sum(group.size for group in groups),
    )


def example_of(model: nn.Module) -> Tensor:
    """A batch of one input for a network of the zoo; ValueError for another one."""
    if not hasattr(model, "_dass_zoo"):
        raise ValueError("permute needs example_inputs: the network is not one of dass.zoo")
    name, overrides = model._dass_zoo
    channels, *size = zoo.input_shape(name)
    weight = next(model.parameters())
    return weight.new_zeros(1, overrides.get("in_channels", channels), *size)


@dataclass
class _Layer:
    """A weight's squares, [outputs, inputs, taps], adding up to 1; they move with the channels."""

    energy: Tensor
    spec: Pattern
    density: float

    def dims(self) -> tuple[int, ...]:
        """The dimensions in which it matters to the pattern what lies side by side."""
        if self.spec.kind == "n:m":
            return (1,) if self.spec.n < self.spec.m else ()
        return tuple(
            dim for dim, length in enumerate((self.spec.rows, self.spec.cols)) if length > 1
        )

    def kept(self) -> float:
        """The share of the energy that the mask keeps."""
        if self.spec.kind == "n:m":
            return _top_of_m(self.energy.movedim(1, 0).flatten(1), self.spec)[0].sum().item()
        energy, size = self._blocks()
        best = (energy / size).flatten().topk(keep_count(energy.numel(), self.density)).indices
        return energy.flatten()[best].sum().item()

    def threshold(self) -> float:
        """The least energy per weight of a block that is kept."""
        energy, size = self._blocks()
        count = keep_count(energy.numel(), self.density)
        return (energy / size).flatten().topk(count).values[-1].item()

    def _blocks(self) -> tuple[Tensor, Tensor]:
        spec, both = self.spec, []
        for cells in (self.energy, torch.ones_like(self.energy)):
            both.append(_pool(_pool(cells, 0, spec.rows), 1, spec.cols))
        return both[0], both[1]

    def terms(self, dim: int) -> _Terms:
        """What an exchange of two channels of a dimension changes."""
        if self.spec.kind == "n:m":
            return _n_of_m_terms(self.energy.movedim(1, 0).flatten(1), self.spec)
        own, across = (self.spec.rows, self.spec.cols)[:: 1 if dim == 0 else -1]
        cells = _pool(self.energy, 1 - dim, across).movedim(dim, 0).flatten(1)
        size = _pool(torch.ones_like(self.energy), 1 - dim, across).movedim(dim, 0).flatten(1)
        return _block_terms(cells - self.threshold() * size, cells, own)


@dataclass
class _Terms:
    """For N channels in blocks: `value(p with q in its place) = const[p] + sum relu(cells[q] +
    base[p])`, and `now[p]` the value of p's block as it is. cells, base: [N, F]; block: [N]."""

    cells: Tensor
    base: Tensor
    const: Tensor
    now: Tensor
    block: Tensor

    def part(self, first: int, size: int) -> _Terms:
        return _Terms(*(t.narrow(0, first, size) for t in vars(self).values()))

    def gains(self, some: range) -> Tensor:
        """What exchanging p and q adds to the kept energy: [len(some), N], p in `some`."""
        found = torch.empty(len(some), len(self.cells))
        for i, p in enumerate(some):
            there = (self.cells + self.base[p]).relu_().sum(1) + self.const[p]
            here = (self.base + self.cells[p]).relu_().sum(1) + self.const
            found[i] = (there + here - self.now[p] - self.now).masked_fill_(
                self.block == self.block[p], 0
            )
        return found


def _block_terms(excess: Tensor, cells: Tensor, length: int) -> _Terms:
    """A block of channels is worth `relu(sum of its cells' excess over the threshold)`, per column.

    At the threshold that the mask has now this is its energy, but for a constant.
    """
    block = torch.arange(len(cells)) // length
    total = _pool(excess, 0, length)
    now = total.relu().sum(1)
    # A channel in the place of another one pays the same threshold, so only the energies differ.
    return _Terms(cells, total[block] - cells, torch.zeros(len(cells)), now[block], block)


def _n_of_m_terms(cells: Tensor, spec: Pattern) -> _Terms:
    """Of the m - 1 others of a group the n largest stand, and a channel replaces the last of them
    if it is larger."""
    total, last, following = _top_of_m(cells, spec)
    block = torch.arange(len(cells)) // spec.m
    total, last, following = total[block], last[block], following[block]
    bar = torch.where(cells >= last, following, last)  # the n-th largest of the others
    const = (total - (cells - bar).relu()).sum(1)
    return _Terms(cells, -bar, const, total.sum(1), block)


def _top_of_m(cells: Tensor, spec: Pattern) -> tuple[Tensor, Tensor, Tensor]:
    """Per group and column: sum of the n largest, the n-th and the one after it; [N / m, F]."""
    top = cells.unflatten(0, (-1, spec.m)).topk(spec.n + 1, dim=1).values
    return top[:, : spec.n].sum(1), top[:, spec.n - 1], top[:, spec.n]


def _pool(cells: Tensor, dim: int, length: int) -> Tensor:
    """Sums of `length` neighbours along a dimension; the last one may have fewer."""
    if length == 1:
        return cells
    shape = list(cells.shape)
    shape[dim] = -(-shape[dim] // length)
    block = torch.arange(cells.shape[dim]) // length
    return cells.new_zeros(shape).index_add_(dim, block, cells)


def _layers(units: list[Unit], masks: list[Tensor], rule: Rule) -> dict[str, _Layer]:
    """Name of a weight -> what the search needs of it, where the order can matter."""
    found = {}
    for unit, mask in zip(units, masks, strict=True):
        energy = unit.weight.detach().float().cpu().square()
        energy = energy.reshape(*energy.shape[:2], -1)
        layer = _Layer(
            energy / energy.sum().clamp(min=1e-30),
            parse_pattern(rule.pattern_of(unit)),
            max(int(mask.sum()), 1) / mask.numel(),
        )
        if unit.groups == 1 and layer.dims():
            found.update((f"{name}.weight", layer) for name in unit.names)
    return found


def _search(
    groups: list[ChannelGroup], layers: dict[str, _Layer]
) -> list[tuple[ChannelGroup, Tensor]]:
    """The groups that gain by another order, each with it: channel order[p] comes to place p."""
    orders = {group: torch.arange(group.size) for group in groups}
    for _ in range(_SWEEPS):
        moved = False
        for group in groups:
            order = _exchange(group, layers)
            moved |= not torch.equal(order, torch.arange(group.size))
            orders[group] = orders[group][order]
        if not moved:
            break
    return [(g, o) for g, o in orders.items() if not torch.equal(o, torch.arange(g.size))]


def _exchange(group: ChannelGroup, layers: dict[str, _Layer]) -> Tensor:
    """An order of a group's channels: pairs are exchanged as long as that keeps more energy.

    A round computes for each channel exactly what exchanging it with any other would add, the
    thresholds of the masks held, in all weights together, and makes the best exchanges that have no
    block in common. A large group is gone through in parts.
    """
    places = [place for place in group.places if place[0] in layers]
    counting = [place for place in places if place[1] in layers[place[0]].dims()]
    involved = {id(layers[name]): layers[name] for name, _, _ in counting}.values()
    order = same = torch.arange(group.size)
    step = _rows_per_round(group.size, [layers[name].energy.numel() for name, _, _ in counting])
    kept = sum(layer.kept() for layer in involved)
    start = idle = 0
    for _ in range(_ROUNDS if counting else 0):
        some = range(start, min(start + step, group.size))
        start = 0 if some.stop == group.size else some.stop
        swap = _best_swaps(counting, layers, group.size, some)
        idle += len(some)
        if not torch.equal(swap, same):
            _move(places, layers, swap)
            now = sum(layer.kept() for layer in involved)
            if now > kept:
                order, kept, idle = order[swap], now, 0
            else:  # with the masks chosen anew it did not pay
                _move(places, layers, swap.argsort())
        if idle >= group.size:
            break
    return order


def _rows_per_round(size: int, weights: list[int]) -> int:
    """So many channels that comparing them with all others is about `_WORK`."""
    return min(size, max(8, _WORK // max(1, 2 * sum(weights))))


def _best_swaps(counting, layers: dict[str, _Layer], size: int, some: range) -> Tensor:
    parts = [layers[name].terms(dim).part(first, size) for name, dim, first in counting]
    gains = sum(part.gains(some) for part in parts)
    best, partner = gains.max(1)
    order, taken = list(range(size)), set()
    for i in best.argsort(descending=True).tolist():
        if best[i] <= _LEAST:
            break
        p, q = some[i], partner[i].item()
        blocks = {(n, part.block[x].item()) for n, part in enumerate(parts) for x in (p, q)}
        if not blocks & taken:
            taken |= blocks
            order[p], order[q] = order[q], order[p]
    return torch.tensor(order)


def _move(places, layers: dict[str, _Layer], order: Tensor) -> None:
    for name, dim, first in places:
        _reorder_tensor(layers[name].energy, dim, first, order)


def _reorder_tensor(tensor: Tensor, dim: int, first: int, order: Tensor) -> None:
    part = tensor.narrow(dim, first, len(order))
    part.copy_(part.index_select(dim, order.to(tensor.device)))


@torch.no_grad()
def _reorder(model: nn.Module, group: ChannelGroup, order: Tensor) -> None:
    """Gives a group's channels another order in every tensor of the model, masks included."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sparse = [module for module in model.modules() if isinstance(module, SparseLayer)]
    for name, dim, first in group.places:
        _reorder_tensor(tensors[name], dim, first, order)
        for layer in sparse:
            if layer.weight is tensors[name]:
                for own in (layer.mask, layer.scores):
                    if own is not None:
                        _reorder_tensor(own, dim, first, order)
