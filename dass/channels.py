"""Which channels of a network can change places without changing what it computes.

The network is traced; each operation then says which dimensions of which tensors count the same
channels. A residual sum ties the outputs of all that is added, a concatenation joins channels, a
depthwise convolution passes them on. What no rule is known for keeps its channels where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from dass.convert import densify

# What treats every channel alike and leaves dimension 1 where it is, as far as the shape shows.
_ACTIVATIONS = """relu relu6 hardtanh silu sigmoid hardswish hardsigmoid leaky_relu elu gelu tanh
mish clamp neg abs exp"""
_COPIES = "dropout clone contiguous alias detach to zeros_like flatten view reshape squeeze slice"
_POOLS = """max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d
upsample_bilinear2d"""
_CHANNELWISE = frozenset(f"{_ACTIVATIONS} {_COPIES} {_POOLS}".split())
_PAIRWISE = frozenset(["add", "sub", "mul", "div", "maximum", "minimum"])


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only move together.

    size: how many. places: where they are, as (name of a Parameter or buffer, dimension, index of
    the first of them in it).
    """

    size: int
    places: tuple[tuple[str, int, int], ...]


def channel_groups(model: nn.Module, example_inputs: tuple) -> list[ChannelGroup]:
    """The groups of channels whose order is free, as the network runs in eval mode.

    A group's channels may take any order, as long as it is the same in all places. Channels whose
    order shows (inputs, outputs, those of grouped convolutions, of a flattened picture, and of any
    operation without a rule) are in none.

    Raises ValueError if the network cannot be traced by torch.export, or if a Parameter is not used
    in eval mode (an auxiliary head): which channels it reads is then not known.
    """
    try:
        program = torch.export.export(densify(model).eval(), example_inputs)
    except Exception as error:
        raise ValueError(f"torch.export cannot trace the network: {error}") from error
    places: dict[_Run, list[tuple[str, int, int]]] = {}
    for (name, dim), runs in _Walk(program, _one_name_each(model)).axes.items():
        first = 0
        for run in _leaves(runs):
            places.setdefault(run, []).append((name, dim, first))
            first += run.size
    return [
        ChannelGroup(run.size, tuple(found))
        for run, found in places.items()
        if run.size > 1 and not run.fixed
    ]


def _one_name_each(model: nn.Module) -> dict[str, str]:
    """Every name of a Parameter or buffer -> the first one of the same tensor."""
    first: dict[Tensor, str] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: first.setdefault(tensor, name) for name, tensor in named}


@dataclass(eq=False)
class _Run:
    """Consecutive channels. parts: the two it was split into, or the one it was found equal to."""

    size: int
    fixed: bool = False
    parts: tuple[_Run, ...] = ()


def _leaves(runs: list[_Run]) -> list[_Run]:
    found = []
    for run in runs:
        found += _leaves([*run.parts]) if run.parts else [run]
    return found


def _next(stack: list[_Run]) -> _Run:
    while stack[-1].parts:
        stack.extend(reversed(stack.pop().parts))
    return stack.pop()


def _tie(first: list[_Run], second: list[_Run]) -> None:
    """Makes two lists of equally many channels one, splitting runs where the others end."""
    left, right = first[::-1], second[::-1]
    while left and right:
        a, b = _next(left), _next(right)
        if a.size != b.size:
            big, length = (a, b.size) if a.size > b.size else (b, a.size)
            big.parts = (_Run(length, big.fixed), _Run(big.size - length, big.fixed))
            left.append(a)
            right.append(b)
        elif a is not b:
            a.fixed |= b.fixed
            b.parts = (a,)


def _fix(runs: list[_Run]) -> None:
    for run in _leaves(runs):
        run.fixed = True


class _Walk:
    """One pass over a traced network. axes: (tensor, dimension) -> the channels that it counts."""

    def __init__(self, program: torch.export.ExportedProgram, one_name: dict[str, str]):
        signature = program.graph_signature
        parameters = signature.inputs_to_parameters
        names = {**parameters, **signature.inputs_to_buffers}
        self.axes: dict[tuple[str, int], list[_Run]] = {}
        self.values: dict[Node, list[_Run]] = {}  # channels of an activation, dimension 1
        self.tensors: dict[Node, str] = {}
        odd: set[str] = set()  # tensors that something without a rule reads
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name in names:
                self.tensors[node] = one_name[names[node.name]]
                continue
            rule = self._rule(node)
            runs = rule(node) if rule else None
            if runs is None:
                for source in node.all_input_nodes:
                    _fix(self.values.get(source, []))
                    odd.update([self.tensors[source]] if source in self.tensors else [])
                runs = [_Run(size, fixed=True) for size in _shape(node)[1:2]]
            self.values[node] = runs
        for (name, _), runs in self.axes.items():
            if name in odd:
                _fix(runs)
        used = {name for node, name in self.tensors.items() if node.users}
        for name in map(one_name.get, parameters.values()):
            if name not in used:
                raise ValueError(
                    f"{name} is not used in eval mode: the order of the channels that it reads is "
                    "not known"
                )

    def _rule(self, node: Node) -> Callable[[Node], list[_Run] | None] | None:
        """The rule of a node: -> its channels, or None where they have to stay."""
        if node.op != "call_function" or not hasattr(node.target, "overloadpacket"):
            return None
        word = node.target.overloadpacket.__name__.removesuffix("_")
        if word in _CHANNELWISE:
            return self._channelwise
        if word in _PAIRWISE:
            return self._pairwise
        return getattr(self, f"_{word}", None)

    def _count(self, tensor: Node | None, dim: int, runs: list[_Run]) -> None:
        """Notes that a dimension of a Parameter or buffer counts these channels."""
        if tensor is None:
            return
        if tensor not in self.tensors:
            _fix(runs)
            return
        key = (self.tensors[tensor], dim)
        _tie(self.axes.setdefault(key, runs), runs)

    def _channelwise(self, node: Node) -> list[_Run] | None:
        source = node.args[0]
        same = _shape(source)[:2] == _shape(node)[:2] and len(_shape(node)) > 1
        alone = node.all_input_nodes == [source]  # no bound or slope of each channel's own
        return self.values.get(source) if same and alone else None

    def _mean(self, node: Node) -> list[_Run] | None:
        source, dims = node.args[0], _argument(node, 1, "dim", None)
        rank = len(_shape(source))
        if dims is None or any(dim % rank < 2 for dim in dims):
            return None
        return self._channelwise(node)

    def _pairwise(self, node: Node) -> list[_Run] | None:
        sources = [source for source in node.args[:2] if isinstance(source, Node)]
        if any(source not in self.values for source in sources):
            return None
        runs = [self.values[s] for s in sources if _shape(s)[1:2] == _shape(node)[1:2]]
        ranks = {len(_shape(source)) for source in sources} - {0}
        if not runs or ranks != {len(_shape(node))}:
            return None
        for others in runs[1:]:
            _tie(runs[0], others)
        return runs[0]

    def _conv2d(self, node: Node) -> list[_Run] | None:
        x, weight = node.args[:2]
        bias, groups = _argument(node, 2, "bias", None), _argument(node, 6, "groups", 1)
        if x not in self.values or len(_shape(x)) != 4:
            return None
        outputs, runs = _shape(node)[1], self.values[x]
        if groups == 1:
            self._count(weight, 1, runs)
            runs = [_Run(outputs)]
        elif not groups == _shape(x)[1] == outputs:
            _fix(runs)
            runs = [_Run(outputs, fixed=True)]
        self._count(weight, 0, runs)
        self._count(bias, 0, runs)
        return runs

    def _linear(self, node: Node) -> list[_Run] | None:
        x, weight = node.args[:2]
        if x not in self.values or len(_shape(x)) != 2:
            return None
        self._count(weight, 1, self.values[x])
        runs = [_Run(_shape(node)[1])]
        self._count(weight, 0, runs)
        self._count(_argument(node, 2, "bias", None), 0, runs)
        return runs

    def _batch_norm(self, node: Node) -> list[_Run] | None:
        if (runs := self.values.get(node.args[0])) is None:
            return None
        for tensor in node.args[1:5]:
            self._count(tensor, 0, runs)
        return runs

    def _cat(self, node: Node) -> list[_Run] | None:
        sources, dim = node.args[0], _argument(node, 1, "dim", 0)
        if dim % len(_shape(node)) != 1 or any(source not in self.values for source in sources):
            return None
        return [run for source in sources for run in self.values[source]]

    def _pad(self, node: Node) -> list[_Run] | None:
        source, pads = node.args[:2]
        constant = _argument(node, 2, "mode", "constant") == "constant"
        channels = [*pads[2 * len(_shape(source)) - 4 :], 0, 0]
        if source not in self.values or len(pads) > 2 * len(_shape(source)) - 2:
            return None
        if channels[:2] == [0, 0]:
            return self.values[source]
        if not constant or min(channels) < 0:
            return None
        before, after = ([_Run(size)] if size else [] for size in channels[:2])
        return [*before, *self.values[source], *after]


def _argument(node: Node, position: int, name: str, default):
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(getattr(node.meta.get("val"), "shape", ()))
