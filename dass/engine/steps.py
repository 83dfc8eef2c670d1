"""Steps of a program, and how layers become one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
from torch import Tensor

from dass.engine import graph as g
from dass.engine.layout import Place

ACTIVATION_CODES = {
    None: 0, "relu": 1, "relu6": 2, "hardswish": 3, "hardsigmoid": 4, "sigmoid": 5, "silu": 6,
}  # fmt: skip
# Those that the kernels of products know.
SIMPLE_ACTIVATIONS = (None, "relu", "relu6", "hardswish")
COMBINE = {"copy": 0, "add": 1, "mul": 2, "mul_channel": 3}
# A depthwise layer with fewer of its weights than this runs as sparse rows.
DEPTHWISE_LEAST = 0.35
# A linear layer with fewer of its weights than this is stored as a bit mask and values.
GEMV_MOST = 0.5


@dataclass
class Step:
    """One step of a program and what people want to know of it.

    kind, fields: what C++ makes it from. reads: key -> name of a place; writes: the one of "y".
    source: of the nodes it came from. macs: multiply-adds of one image, zeros counted; nonzeros: of
    its weights. inner: the steps that a fused one is made of, by role.
    """

    kind: str
    reads: dict[str, str]
    writes: str
    fields: dict
    source: str
    macs: int = 0
    nonzeros: int = 0
    note: str = ""
    inner: dict[str, Step] = field(default_factory=dict)

    def parts(self) -> list[Step]:
        """Itself, or what it is made of."""
        return list(self.inner.values()) or [self]


@dataclass
class Plan:
    """A program before it is built.

    images: per pass. apart: floats from image to image of each tensor of the call.
    """

    images: int
    steps: list[Step]
    places: dict[str, Place] = field(default_factory=dict)
    apart: list[int] = field(default_factory=list)
    arena: int = 0

    def described(self) -> list[dict]:
        """The steps as dicts for :class:`dass_kernels.Program`."""
        return [self._described(step) for step in self.steps]

    def _described(self, step: Step) -> dict:
        places = {key: asdict(self.places[name]) for key, name in step.reads.items()}
        places["y"] = asdict(self.places[step.writes])
        inner = {key: self._described(part) for key, part in step.inner.items()}
        return {"kind": step.kind, **places, **step.fields, **inner}


@dataclass
class Offsets:
    """Where the entries of a product's rows find their pixels, before places are known.

    taps: place -> floats from its start, [channels, kh, kw]. channel, tap: of each entry.
    """

    taps: Callable[[Place], np.ndarray]
    channel: np.ndarray
    tap: np.ndarray

    def resolve(self, place: Place) -> np.ndarray:
        table = self.taps(place)
        return table.reshape(len(table), -1)[self.channel, self.tap].astype(np.int32)


def rows_step(
    node: g.Conv,
    reads: dict[str, str],
    writes: str,
    taps: Callable[[Place], np.ndarray],
    *,
    relu_in: bool = False,
) -> Step:
    """A convolution as sparse rows; grouped ones, too. taps: see :class:`Offsets`."""
    outputs, per_group = node.weight.shape[:2]
    weight = node.weight.numpy().reshape(outputs, -1)
    kernel = weight.shape[1] // per_group
    row, column = np.nonzero(weight)
    channel = column // kernel + row // (outputs // node.groups) * per_group
    starts = np.cumsum(np.bincount(row, minlength=outputs))
    simple = node.activation in SIMPLE_ACTIVATIONS
    fields = {
        "indptr": np.concatenate([[0], starts]).astype(np.int32),
        "offsets": Offsets(taps, channel, column % kernel),
        "values": weight[row, column].astype(np.float32),
        "bias": floats(node.bias),
        "activation": ACTIVATION_CODES[node.activation if simple else None],
        "relu_in": relu_in, "emitted": False, "height": 28, "vectors": 8,
        "chunk": 0, "deep": 1, "depth": 0,
    }  # fmt: skip
    macs = node.weight.numel() * node.shape[1] * node.shape[2]
    return Step("rows", reads, writes, fields, node.source, macs=macs, nonzeros=len(row))


def suits_depthwise(node: g.Conv, pixel: int) -> bool:
    """Whether the dense depthwise kernels take it, and it has weights enough for them."""
    kh, kw = node.weight.shape[2:]
    return (
        node.is_depthwise
        and len(node.inputs) == 1
        and kh == kw in (3, 5, 7)
        and (pixel > 1 or node.stride[1] in (1, 2))
        and min(node.padding) >= 0
        and node.activation in SIMPLE_ACTIVATIONS
        and float((node.weight != 0).float().mean()) >= DEPTHWISE_LEAST
    )


def depthwise_step(node: g.Conv, x: str, y: str, relu_in: bool) -> Step:
    fields = {
        "kernel": node.weight.shape[2], "stride_h": node.stride[0], "stride_w": node.stride[1],
        "top": node.padding[0], "left": node.padding[2],
        "dilation_h": node.dilation[0], "dilation_w": node.dilation[1],
        "weights": floats(node.weight), "bias": floats(node.bias),
        "activation": ACTIVATION_CODES[node.activation], "emitted": True, "relu_in": relu_in,
    }  # fmt: skip
    macs = node.weight.numel() * node.shape[1] * node.shape[2]
    nonzeros = int((node.weight != 0).sum())
    return Step("depthwise", {"x": x}, y, fields, node.source, macs=macs, nonzeros=nonzeros)


def pointwise_taps(node: g.Conv) -> Callable[[Place], np.ndarray]:
    channels, zero = np.arange(node.weight.shape[1]), np.zeros(1, int)
    return lambda p: offsets_of(p, channels, zero, zero)


def floats(values: Tensor | None) -> np.ndarray:
    if values is None:
        return np.zeros(0, np.float32)
    return np.ascontiguousarray(values.detach().numpy().reshape(-1), np.float32)


def offsets_of(p: Place, channels: np.ndarray, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
    """Floats from a picture's start, [I, kh, kw]."""
    return channels[:, None, None] * p.channel + (dy[:, None] * p.pitch + dx) * p.pixel


def reach(node: g.Conv, shape: tuple[int, int, int]) -> int:
    """How many zeros around its input a convolution reads."""
    found = 0
    for axis in (0, 1):
        before = node.padding[2 * axis]
        span = (node.weight.shape[2 + axis] - 1) * node.dilation[axis]
        last = (node.shape[1 + axis] - 1) * node.stride[axis] + span - before
        found = max(found, before, last - (shape[1 + axis] - 1))
    return found
