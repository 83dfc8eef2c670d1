"""From a graph to the steps of a program: geometry, offsets of every weight, memory.

plan = make_plan(graph, pixel=1)
program = dass_kernels.Program(plan.images, plan.arena, plan.apart, plan.described())
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from torch import Tensor

from dass.engine import ahead
from dass.engine import graph as g
from dass.engine.depth_first import Fusion
from dass.engine.layout import Layout, Place, assign_offsets, tensor, vector
from dass.engine.phases import phases_read
from dass.engine.steps import (
    ACTIVATION_CODES,
    COMBINE,
    GEMV_MOST,
    SIMPLE_ACTIVATIONS,
    Plan,
    Step,
    depthwise_step,
    floats,
    offsets_of,
    pointwise_taps,
    reach,
    rows_step,
    suits_depthwise,
)


class _Planner:
    """Turns the nodes of one segment into steps."""

    def __init__(
        self,
        graph: g.Graph,
        pixel: int,
        sparse_gemv: bool,
        emitted: bool,
        fusions: Iterable[Fusion],
    ):
        self.graph, self.pixel, self.sparse_gemv = graph, pixel, sparse_gemv
        self.emitted = emitted and pixel == 1
        self.fusions = {fusion.last: fusion for fusion in fusions}
        self.inside = {name for fusion in fusions for name in fusion.members} - {*self.fusions}
        self.layout = Layout(pixel)
        self.steps: list[Step] = []
        self.fixed: dict[str, Place] = {}  # tensors of the call, vectors
        self.parts: dict[
            str, tuple[str, int]
        ] = {}  # picture -> (the concatenation it is part of, channel)
        self.nodes = {node.name: node for node in graph}
        self.splits: dict[tuple, str] = {}
        self.imports: dict[str, str] = {}
        self.relus: dict[str, str] = {}  # a ReLU that its readers do -> what it reads
        self.sums: dict[str, str] = {}  # a sum that a pool does -> the pool
        self.scratch: list[tuple[Fusion, str, str]] = []

    def plan(self) -> Plan:
        inputs = [node for node in self.graph if isinstance(node, g.Input)]
        for space, node in enumerate(inputs, 1):
            self.fixed[node.name] = tensor(space, node.shape)
        for node in self.graph:
            if isinstance(node, g.Concat):
                self._part(node)
        if self.emitted:
            readers = self.graph.readers()
            self.relus = ahead.relus_read_through(self.graph, readers)
            self.sums = ahead.sums_of_pools(self.graph, readers, {*self.relus, *self.parts})
        for node in self.graph:
            if not isinstance(node, g.Input):
                self._declare(node)
        for node in self.graph:
            if node.name in self.fusions:
                self._fused(self.fusions[node.name])
            elif not isinstance(node, g.Input) and not self._done_elsewhere(node.name):
                getattr(self, f"_{node.op}")(node)
        shapes = [node.shape for node in inputs]
        for space, name in enumerate(self.graph.outputs, len(inputs) + 1):
            self._write_out(name, space)
            shapes.append(self.nodes[name].shape)
        return self._finish([int(np.prod(shape)) for shape in shapes])

    def _done_elsewhere(self, name: str) -> bool:
        return name in self.inside or name in self.relus or name in self.sums.values()

    # Geometry

    def _declare(self, node: g.Node) -> None:
        if len(node.shape) == 1:
            self.fixed[node.name] = vector(node.shape[0], self.pixel)
        else:
            self.layout.add(node.name, node.shape)

    def _part(self, node: g.Concat) -> None:
        """Its inputs are written where the whole lies, if nothing speaks against it."""
        taken = len(set(node.inputs)) < len(node.inputs) or len(node.shape) == 1
        for name in node.inputs:
            taken |= isinstance(self.nodes[name], g.Input | g.Concat) or name in self.parts
        channel = 0
        for name in node.inputs if not taken else ():
            self.parts[name] = (node.name, channel)
            channel += self.nodes[name].shape[0]

    def _link(self, a: str, b: str) -> None:
        if a in self.layout.shapes and b in self.layout.shapes:
            self.layout.link(a, b)

    def _shape(self, name: str) -> tuple[int, int, int]:
        if name in self.layout.shapes:
            return self.layout.shapes[name]
        shape = self.nodes[name].shape
        return shape if len(shape) == 3 else (shape[0], 1, 1)

    def _picture(self, name: str) -> str:
        """`name` as a picture in the arena: tensors of the call are brought in once.

        For a ReLU that its readers do, what it reads.
        """
        name = self.relus.get(name, name)
        if name not in self.fixed or self.fixed[name].space == 0:
            return name
        if name not in self.imports:
            shape = self.nodes[name].shape
            inside = self.imports[name] = f"{name} inside"
            if len(shape) == 1:
                self.fixed[inside] = vector(shape[0], self.pixel)
                self._bring_vector(name, inside)
            else:
                self.layout.add(inside, shape)
                self._bring(name, inside)
        return self.imports[name]

    def _bring(self, name: str, inside: str) -> None:
        if self.pixel > 1:
            self._step("gather", {"x": name}, inside, {}, name, note="images side by side")
        else:
            self._map({"x": name}, inside, name, note="zeros around the planes")

    def _bring_vector(self, name: str, inside: str) -> None:
        flat = f"{inside} flat"
        self.fixed[flat] = self._as_row(inside)
        if self.pixel > 1:
            self._step("gather", {"x": name}, flat, {}, name)
        else:
            self._map({"x": name}, flat, name)

    def _as_row(self, name: str) -> Place:
        """A vector as one row of pixels: the same memory."""
        length = self.fixed[name].channels
        return Place(1, 1, length, length * self.pixel, length, pixel=self.pixel)

    # Steps

    def _step(self, kind: str, reads: dict, writes: str, fields: dict, source: str, **rest) -> None:
        self.steps.append(Step(kind, reads, writes, fields, source, **rest))

    def _map(self, reads: dict, writes: str, source: str, combine: str = "copy", **fields) -> None:
        note = fields.pop("note", "")
        empty = np.zeros(0, np.int32)
        self._step(
            "map", reads, writes,
            {
                "combine": COMBINE[combine], "channels": empty, "shift_h": empty, "shift_w": empty,
                "stride_h": 1, "stride_w": 1, "activation": 0,
                "scale": floats(None), "bias": floats(None),
                **fields,
            },
            source, note=note,
        )  # fmt: skip

    def _conv(self, node: g.Conv) -> None:
        if len(node.shape) == 1 or len(self.nodes[node.inputs[0]].shape) == 1:
            return self._matrix(node, node.weight.flatten(1), node.bias, node.activation)
        if suits_depthwise(node, self.pixel):
            return self._depthwise(node)
        x, taps = self._taps(node)
        reads = {"x": x}
        split = x in self.splits.values()
        if self.pixel == 1:
            self._link(x, node.name)
        if len(node.inputs) > 1:
            reads["residual"] = self._picture(node.inputs[1])
            self._link(reads["residual"], node.name)
        self._rows(node, reads, taps, relu_in=node.inputs[0] in self.relus and not split)

    def _depthwise(self, node: g.Conv) -> None:
        x = self._picture(node.inputs[0])
        self.layout.need(x, reach(node, self._shape(x)))
        self.steps.append(depthwise_step(node, x, node.name, node.inputs[0] in self.relus))

    def _fused(self, fusion: Fusion) -> None:
        """[1x1 ->] depthwise [-> 1x1] as one step; what lies between is scratch."""
        middle = self.nodes[fusion.depthwise]
        first = self.nodes[fusion.expand] if fusion.expand else middle
        last = self.nodes[fusion.last]
        x = self._picture(first.inputs[0])
        self.layout.need(x, reach(middle, self._shape(x)))
        hidden = [f"{fusion.depthwise} in", f"{fusion.depthwise} out"]
        source, target = (
            hidden[0] if fusion.expand else x,
            hidden[1] if fusion.project else last.name,
        )
        relu_in = first.inputs[0] in self.relus
        inner = {"depthwise": depthwise_step(middle, source, target, relu_in and first is middle)}
        reads = {"x": x}
        if fusion.expand:
            taps = pointwise_taps(first)
            inner["expand"] = rows_step(first, {"x": x}, source, taps, relu_in=relu_in)
        if fusion.project:
            if len(last.inputs) > 1:
                reads["residual"] = self._picture(last.inputs[1])
                self._link(reads["residual"], last.name)
            rest = {key: name for key, name in reads.items() if key != "x"}
            inner["project"] = rows_step(
                last, {"x": target, **rest}, last.name, pointwise_taps(last)
            )
        self.scratch.append((fusion, x, last.name))
        parts = inner.values()
        self.steps.append(
            Step(
                "fused", reads, last.name, {"strip": fusion.strip},
                " > ".join(self.nodes[name].source for name in fusion.members),
                macs=sum(part.macs for part in parts),
                nonzeros=sum(part.nonzeros for part in parts),
                inner=inner,
            )
        )  # fmt: skip

    def _place_scratch(self, places: dict[str, Place]) -> None:
        """Places between the layers of a fused step: the rows of one strip."""
        for fusion, x, y in self.scratch:
            node = self.nodes[fusion.depthwise]
            out_rows = min(fusion.strip, node.shape[1])
            rows = (
                (out_rows - 1) * node.stride[0] + (node.weight.shape[2] - 1) * node.dilation[0] + 1
            )
            before, after = places[x], places[y]
            _, height, width = self._shape(x)
            room = -(-(rows * before.pitch) // 16) * 16 + 16 * 12
            places[f"{node.name} in"] = Place(
                node.weight.shape[0], height, width, room, before.pitch, before.pad
            )
            room = -(-(out_rows * after.pitch + 32) // 16) * 16
            places[f"{node.name} out"] = Place(*node.shape, room, after.pitch)

    def _taps(self, node: g.Conv) -> tuple[str, Callable[[Place], np.ndarray]]:
        """The picture a convolution reads, and floats from its start, [I, kh, kw], of a place."""
        x = node.inputs[0]
        _, rows, columns = self._shape(x)
        kh, kw = node.weight.shape[2:]
        dy = np.arange(kh) * node.dilation[0] - node.padding[0]
        dx = np.arange(kw) * node.dilation[1] - node.padding[2]
        channels = np.arange(self.nodes[x].shape[0])
        same = node.shape[1:] == (rows, columns)
        if node.stride == (1, 1) and (same or self.pixel > 1) and self.pixel >= 1:
            x = self._picture(x)
            self.layout.need(x, reach(node, (0, rows, columns)))
            return x, lambda p: offsets_of(p, channels, dy, dx)
        sh, sw = node.stride
        x, plane = self._split(node, dy, dx)
        self.layout.need(x, int(max(0, -(dy // sh).min(), -(dx // sw).min())))
        over = max((dy // sh).max() + node.shape[1], 0), max((dx // sw).max() + node.shape[2], 0)
        self.layout.need(x, int(max(0, over[0] - self._shape(x)[1], over[1] - self._shape(x)[2])))

        def offsets(p: Place) -> np.ndarray:
            return plane * p.channel + ((dy // sh)[:, None] * p.pitch + dx // sw) * p.pixel

        return x, offsets

    def _split(self, node: g.Conv, dy: np.ndarray, dx: np.ndarray) -> tuple[str, np.ndarray]:
        """The phases of a strided input: pixel (sh y + a, sw x + b) at (y, x) of plane (c, a, b).

        Returns:
            (their picture, the plane that each weight reads [channels, kh, kw]).
        """
        sh, sw = node.stride
        relu = node.inputs[0] in self.relus
        name = self.relus.get(node.inputs[0], node.inputs[0])
        name = name if self.pixel == 1 else self._picture(name)
        channels, rows, columns = self._shape(name)
        channel, phase, plane = phases_read(node, channels, dy, dx)
        key = (name, relu, sh, sw, channel.tobytes(), phase.tobytes())
        if key in self.splits:
            return self.splits[key], plane
        split = self.splits[key] = f"{name} split {len(self.splits)}"
        self.layout.add(split, (len(channel), -(-rows // sh), -(-columns // sw)))
        fields = {
            "channels": channel, "shift_h": phase // sw, "shift_w": phase % sw,
            "stride_h": sh, "stride_w": sw, "activation": int(relu),
        }  # fmt: skip
        note = (
            "one plane for each phase of the stride" if sh * sw > 1 else "zeros around the planes"
        )
        self._map({"x": name}, split, node.source, note=note, **fields)
        return split, plane

    def _rows(
        self,
        node: g.Conv,
        reads: dict,
        taps: Callable[[Place], np.ndarray],
        relu_in: bool = False,
    ) -> None:
        self.steps.append(rows_step(node, reads, node.name, taps, relu_in=relu_in))
        if node.activation not in SIMPLE_ACTIVATIONS:
            code = ACTIVATION_CODES[node.activation]
            self._map({"x": node.name}, node.name, node.source, activation=code)

    def _linear(self, node: g.Linear) -> None:
        self._matrix(node, node.weight, node.bias, node.activation)

    def _matrix(self, node: g.Node, weight: Tensor, bias: Tensor, activation: str | None) -> None:
        x = self._picture(node.inputs[0])
        nonzeros = int((weight != 0).sum())
        how = {"macs": weight.numel(), "nonzeros": nonzeros}
        if self.pixel > 1:
            conv = g.Conv(
                node.name, node.inputs, (*node.shape, 1, 1), weight[:, :, None, None], bias,
                activation=activation, source=node.source,
            )  # fmt: skip
            channels = np.arange(weight.shape[1])
            zero = np.zeros(1, int)
            return self._rows(conv, {"x": x}, lambda p: offsets_of(p, channels, zero, zero))
        fields = {
            "weights": floats(weight), "bias": floats(bias),
            "activation": ACTIVATION_CODES[activation],
            "sparse": self.sparse_gemv
            and activation in SIMPLE_ACTIVATIONS
            and nonzeros < GEMV_MOST * weight.numel(),
        }  # fmt: skip
        self._step("gemv", {"x": x}, node.name, fields, node.source, **how)

    def _pool(self, node: g.Pool, end: g.Add | None = None, residual: str | None = None) -> None:
        """`end`: the sum that the pool does, too, with `residual`."""
        reads = {"x": self._picture(node.inputs[0])}
        if residual is not None:
            reads["residual"] = residual
        fields = {
            "relu_in": node.inputs[0] in self.relus, "maximum": node.kind == "max",
            "count_padding": node.count_padding,
            "kernel_h": node.kernel[0], "kernel_w": node.kernel[1],
            "stride_h": node.stride[0], "stride_w": node.stride[1],
            "top": node.padding[0], "bottom": node.padding[1],
            "left": node.padding[2], "right": node.padding[3],
            "dilation_h": node.dilation[0], "dilation_w": node.dilation[1],
            "scale": floats(node.scale), "bias": floats(node.bias),
            "activation": ACTIVATION_CODES[(end or node).activation],
        }  # fmt: skip
        macs = int(np.prod(node.shape) * np.prod(node.kernel))
        self._step("pool", reads, (end or node).name, fields, node.source, macs=macs)

    def _mean(self, node: g.Mean) -> None:
        self._step("mean", {"x": self._picture(node.inputs[0])}, node.name, {}, node.source)

    def _combine(self, node: g.Node, combine: str, **fields) -> None:
        a, b = (self._picture(name) for name in node.inputs)
        self._map({"x": a, "other": b}, node.name, node.source, combine, **fields)

    def _add(self, node: g.Add) -> None:
        if node.name in self.sums:
            pool = self.nodes[self.sums[node.name]]
            (other,) = (name for name in node.inputs if name != pool.name)
            return self._pool(pool, node, self._picture(other))
        self._combine(node, "add", activation=ACTIVATION_CODES[node.activation])

    def _mul(self, node: g.Mul) -> None:
        same = len(self.nodes[node.inputs[1]].shape) == len(node.shape)
        self._combine(node, "mul" if same else "mul_channel")

    def _affine(self, node: g.Affine) -> None:
        code = ACTIVATION_CODES[node.activation]
        scale, bias = floats(node.scale), floats(node.bias)
        x = self._picture(node.inputs[0])
        self._map({"x": x}, node.name, node.source, scale=scale, bias=bias, activation=code)

    def _act(self, node: g.Act) -> None:
        code = ACTIVATION_CODES[node.activation]
        self._map({"x": self._picture(node.inputs[0])}, node.name, node.source, activation=code)

    def _concat(self, node: g.Concat) -> None:
        channel = 0
        for name in node.inputs:
            if name in self.parts and self.parts[name][0] == node.name:
                self._link(node.name, name)
            else:
                part = f"{node.name} part {channel}"
                count = self.nodes[name].shape[0]
                if len(node.shape) == 1:
                    self.fixed[part] = vector(count, self.pixel)
                else:
                    self.layout.add(part, (count, *node.shape[1:]))
                    self._link(node.name, part)
                self.parts[part] = (node.name, channel)
                self._map({"x": self._picture(name)}, part, node.source)
            channel += self.nodes[name].shape[0]

    def _flatten(self, node: g.Flatten) -> None:
        x = self._picture(node.inputs[0])
        channels, rows, columns = self._shape(x)
        whole = f"{node.name} planes"
        area = rows * columns * self.pixel
        self.fixed[whole] = Place(channels, rows, columns, area, columns, pixel=self.pixel)
        self.parts[whole] = (node.name, 0)
        self._map({"x": x}, whole, node.source, note="planes without zeros between them")

    def _write_out(self, name: str, space: int) -> None:
        out = f"output {space}"
        self.fixed[out] = tensor(space, self.nodes[name].shape)
        x = self._picture(name)
        if len(self.nodes[name].shape) == 1:
            row = f"{x} row"
            self.fixed[row] = self._as_row(x)
            self.parts[row] = (x, 0)
            x = row
        if self.pixel > 1:
            self._step("scatter", {"x": x}, out, {}, name)
        else:
            self._map({"x": x}, out, name)

    # Memory

    def _finish(self, apart: list[int]) -> Plan:
        for part, (whole, _) in self.parts.items():
            if part in self.layout.shapes and whole in self.layout.shapes:
                self.layout.link(whole, part)
        places = {**self.fixed, **{name: self.layout.place(name) for name in self.layout.shapes}}
        lives: dict[str, list[int]] = {}
        for i, step in enumerate(self.steps):
            for name in (*step.reads.values(), step.writes):
                owner, _ = self._owner(name)
                if places[owner].space == 0:
                    lives.setdefault(owner, [i, i])[1] = i
        sizes = {n: (places[n].floats, first, last) for n, (first, last) in lives.items()}
        offsets, arena = assign_offsets(sizes)
        for name in list(places):
            owner, channel = self._owner(name)
            if owner in offsets:
                at = offsets[owner] + places[owner].front
                if owner == name:
                    places[name].offset = at
                else:
                    whole = places[owner]
                    places[name].offset = at + channel * whole.channel
                    if name in self.layout.shapes:
                        places[name].channel = whole.channel
        self._place_scratch(places)
        for step in self.steps:
            for part in step.parts():
                if "offsets" in part.fields:
                    found = part.fields["offsets"].resolve(places[part.reads["x"]])
                    part.fields["offsets"] = found
        return Plan(self.pixel, self.steps, places, apart, arena)

    def _owner(self, name: str) -> tuple[str, int]:
        channel = 0
        while name in self.parts:
            name, first = self.parts[name]
            channel += first
        return name, channel


def make_plan(
    graph: g.Graph,
    pixel: int,
    *,
    sparse_gemv: bool = False,
    emitted: bool = False,
    fusions: Iterable[Fusion] = (),
) -> Plan:
    """The steps of a graph without Torch nodes.

    pixel: images per pass: 1, or the lanes of a register, which then lie side by side. sparse_gemv:
    whether there is a kernel for vectors times matrices stored as bit masks. emitted: whether code
    may be emitted, which then does some ReLUs and sums on the way. fusions: groups that run depth
    first (planes of one image only).
    """
    return _Planner(graph, pixel, sparse_gemv, emitted, tuple(fusions)).plan()
