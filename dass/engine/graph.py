"""The network between torch and the program: a list of nodes, each with the name of its inputs.

Shapes leave out the batch: (C, H, W) for pictures, (K,) for vectors. Activations are words:
"relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid", or None.

Weights, biases and scales are float64 while the graph is being simplified and rounded once, at the
end of `dass.engine.passes.simplify`; what is said of their dtype here holds from then on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

ACTIVATIONS = ("relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid")


@dataclass
class Node:
    """One step: ``shape = op(inputs)``.

    name: unique in the graph. inputs: names of earlier nodes. shape: without the batch.
    source: what it was in the model, for people: "features.3.conv (Conv2d)"; joined by " + " where
    several became one.
    """

    name: str
    inputs: list[str]
    shape: tuple[int, ...]
    source: str = field(default="", kw_only=True)

    @property
    def op(self) -> str:
        return type(self).__name__.lower()


@dataclass
class Input(Node):
    """The network's input, float32."""


@dataclass
class Conv(Node):
    """y = act(conv(x, weight) + bias + residual), the convolution of torch.nn.functional.conv2d.

    inputs: [x] or [x, residual]. weight: float32 [O, I / groups, kh, kw]. bias: float32 [O], never
    None. padding: top, bottom, left, right; a negative one crops.
    """

    weight: Tensor
    bias: Tensor
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: str | None = None

    @property
    def is_depthwise(self) -> bool:
        """One output per input channel, each from its own channel."""
        return self.groups > 1 and self.weight.shape[1] == 1 and self.weight.shape[0] == self.groups


@dataclass
class Linear(Node):
    """y = act(weight x + bias) on vectors. weight: float32 [O, K]; bias: float32 [O]."""

    weight: Tensor
    bias: Tensor
    activation: str | None = None


@dataclass
class Pool(Node):
    """Maximum or mean of each window, then act(scale y + bias) per channel.

    kind: "max" (padding is minus infinity) or "avg". padding: top, bottom, left, right, already
    with what ceil_mode adds. count_padding: whether the mean divides by the size of the window
    (True) or by its pixels inside the picture. scale, bias: float32 [C] or None.
    """

    kind: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    count_padding: bool = True
    scale: Tensor | None = None
    bias: Tensor | None = None
    activation: str | None = None


@dataclass
class Mean(Node):
    """The mean of each channel over all its pixels: (C, H, W) -> (C,)."""


@dataclass
class Add(Node):
    """y = act(a + b), equal shapes."""

    activation: str | None = None


@dataclass
class Mul(Node):
    """y = a * b: b has the shape of a, or (C,): one factor per channel."""


@dataclass
class Affine(Node):
    """y = act(scale x + bias) per channel; scale, bias: float32 [C]."""

    scale: Tensor
    bias: Tensor
    activation: str | None = None


@dataclass
class Act(Node):
    """y = act(x)."""

    activation: str | None = None


@dataclass
class Concat(Node):
    """The inputs' channels, one after the other."""


@dataclass
class Flatten(Node):
    """(C, H, W) -> (C * H * W,)."""


@dataclass
class Torch(Node):
    """What the engine has no step for; it runs in torch.

    target: an overload of torch.ops.aten, as "aten.roll.default". arguments, options: positional
    and keyword arguments as JSON knows them, where {"input": i} stands for inputs[i] and
    {"constant": key} for constants[key], {"batch": true} for the size of the batch and
    {"torch": name} for torch.float32 and its like. reason: why it is not a step of the engine, for
    people.
    """

    target: str
    arguments: list
    options: dict
    constants: dict[str, Tensor] = field(default_factory=dict)
    reason: str = ""


@dataclass
class Graph:
    """Nodes in an order in which each comes after its inputs; the first one is the Input.

    batch: the only size of batch that the graph is good for; None: any.
    """

    nodes: list[Node]
    outputs: list[str]
    batch: int | None = None

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __getitem__(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def readers(self) -> dict[str, list[Node]]:
        """For each name the nodes that read it, in order."""
        found: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found[name].append(node)
        return found
