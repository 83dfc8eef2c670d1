"""What `dass.engine.translate` writes the graph with: values, paddings not yet spent, fallbacks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from dass.engine.geometry import Four, output_size
from dass.engine.graph import Conv, Flatten, Input, Node, Torch

BATCH = object()  # the size of the batch, where an operation's arguments ask for it


class NoStep(Exception):
    """The engine has no step for an operation; the message says why."""


@dataclass(eq=False)
class Value:
    """A tensor of the graph, with what is still to be done to it before it can be read.

    name: of its node. shape: the node's. What follows costs nothing if the reader can do it: first
    `padding` with zeros or, where negative, a crop; then every `step`-th pixel; then the channels
    of these numbers, -1 being zeros.
    """

    name: str
    shape: tuple[int, ...]
    padding: Four = (0, 0, 0, 0)
    step: tuple[int, int] = (1, 1)
    channels: tuple[int, ...] | None = None

    @property
    def is_plain(self) -> bool:
        return not any(self.padding) and self.step == (1, 1) and self.channels is None


def is_batch(size: object) -> bool:
    """Whether a symbolic size is the batch's, rather than computed from it."""
    return isinstance(size, torch.SymInt) and size.node.expr.is_Symbol


class Builder:
    """The nodes made so far.

    batch: the batch that the exported program is bound to, or None.
    """

    def __init__(self, batch: int | None):
        self.batch = batch
        self.nodes: list[Node] = []
        self._names: set[str] = set()

    def input(self, node: fx.Node) -> Value:
        return self.add(Input, node, [], self.logical(node))

    def add(self, kind, node: fx.Node, inputs: list[Value], shape, *args, **fields) -> Value:
        """Appends a node of the graph for an exported one."""
        name, count = node.name, 1
        while name in self._names:
            name, count = f"{node.name}_{count}", count + 1
        self._names.add(name)
        fields["source"] = _source(node)
        names = [value.name for value in inputs]
        self.nodes.append(kind(name, names, tuple(shape), *args, **fields))
        return Value(name, tuple(shape))

    def logical(self, node: fx.Node) -> tuple[int, ...]:
        """The shape in torch without the batch: (C, 1, 1) of a mean that the graph has as (C,)."""
        meta = node.meta["val"]
        if not isinstance(meta, Tensor):
            raise ValueError(f"{node.target} gives several tensors: not supported")
        if meta.dtype != torch.float32:
            raise ValueError(f"{node.target} gives {meta.dtype}: the graph is float32 throughout")
        first = meta.shape[0] if meta.dim() else None
        if not (is_batch(first) if self.batch is None else first == self.batch):
            raise ValueError(
                f"{node.name} ({node.target}) gives {list(meta.shape)}, whose first dimension is "
                "not the batch: not supported"
            )
        if any(isinstance(size, torch.SymInt) for size in meta.shape[1:]):
            raise ValueError(f"{node.name} mixes the batch into {list(meta.shape)}: not supported")
        return tuple(meta.shape[1:])

    def plain(self, node: fx.Node, value: object) -> Value:
        """The value with nothing left to do: what is pending becomes a 1x1 convolution."""
        if not isinstance(value, Value):
            raise NoStep("it mixes constants with computed tensors in a way the engine has not")
        if value.is_plain:
            return value
        channels = value.shape[0]
        if value.channels is None:
            weight = torch.ones(channels, 1, 1, 1, dtype=torch.float64)
        else:
            rows = torch.tensor(value.channels)
            weight = torch.zeros(len(rows), channels, 1, 1, dtype=torch.float64)
            kept = (rows >= 0).nonzero()[:, 0]
            weight[kept, rows[kept]] = 1
        shape = (len(weight), *output_size(value.shape[1:], (1, 1), value.step, value.padding))
        source = Value(value.name, value.shape)
        return self.add(
            Conv, node, [source], shape, weight, torch.zeros(len(weight), dtype=torch.float64),
            stride=value.step, padding=value.padding,
            groups=channels if value.channels is None else 1,
        )  # fmt: skip

    def vector(self, node: fx.Node, value: object) -> Value:
        """The value as (C,), of a vector or a picture of one pixel."""
        value = self.plain(node, value)
        if len(value.shape) == 3 and value.shape[1:] == (1, 1):
            return self.add(Flatten, node, [value], value.shape[:1])
        if len(value.shape) != 1:
            raise NoStep(f"it takes vectors, and this is {value.shape}")
        return value

    def picture(self, node: fx.Node, value: object) -> Value:
        """The value as (C, H, W)."""
        value = self.plain(node, value)
        if len(value.shape) == 1:
            return self.exact(value, (*value.shape, 1, 1), node)
        if len(value.shape) != 3:
            raise NoStep(f"it takes pictures (C, H, W), and this is {value.shape}")
        return value

    def exact(self, value: Value, shape: tuple[int, ...], node: fx.Node | None = None) -> Value:
        """The value in the very shape it has in torch."""
        value = self.plain(node or _Named("output"), value)
        if value.shape == shape:
            return value
        return self.add(
            Torch, node or _Named("output"), [value], shape, "aten.reshape.default",
            [{"input": 0}, [{"batch": True}, *shape]], {}, reason="a vector read as a picture",
        )  # fmt: skip

    def pad(self, node: fx.Node, value: Value, padding: Four) -> Value:
        """Leaves zeros around the picture, or a crop, to whoever reads it."""
        value = value if len(value.shape) == 3 else self.picture(node, value)
        crossed = any(old < 0 < new for old, new in zip(value.padding, padding, strict=True))
        stepped = [step != 1 for step in value.step for _ in range(2)]
        if crossed or any(new for new, after in zip(padding, stepped, strict=True) if after):
            value = self.plain(node, value)
        total = tuple(old + new for old, new in zip(value.padding, padding, strict=True))
        return replace(value, padding=total)

    def fallback(self, node: fx.Node, values: dict, reason: str) -> Value:
        """A Torch node."""
        if node.target.namespace != "aten":
            raise ValueError(f"{node.target} is no operation of torch: not supported")
        shape, inputs, constants = self.logical(node), [], {}

        def encode(item):
            if isinstance(item, fx.Node):
                found = values[item]
                if found is BATCH:
                    return {"batch": True}
                if isinstance(found, Value):
                    inputs.append(self.exact(found, self.logical(item), node))
                    return {"input": len(inputs) - 1}
                if not isinstance(found, Tensor):
                    return found
                constants[item.name] = found
                return {"constant": item.name}
            if isinstance(item, (list, tuple)):
                return [encode(each) for each in item]
            if item is None or isinstance(item, (bool, int, float, str)):
                return item
            if isinstance(item, (torch.dtype, torch.memory_format, torch.layout)):
                return {"torch": str(item).removeprefix("torch.")}
            raise ValueError(f"{node.target} with an argument {item!r}: not supported")

        arguments = encode(node.args)
        options = {key: encode(item) for key, item in node.kwargs.items()}
        return self.add(
            Torch, node, inputs, shape, str(node.target), arguments, options, constants, reason
        )


class _Named:
    """Stands for an exported node where there is none."""

    def __init__(self, name: str):
        self.name, self.meta = name, {}


def _source(node: fx.Node) -> str:
    """ "features.0.0 (Conv2d)": the module in whose forward the operation stands."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return node.name
    path, kind = stack[-1]
    kind = kind if isinstance(kind, str) else kind.__name__
    return f"{path or 'model'} ({kind.rpartition('.')[2]})"
