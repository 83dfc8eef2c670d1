"""What the engine made of a network, step by step, and where its time goes; for people."""

from __future__ import annotations

import re
import statistics
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import dass_kernels
from dass.engine import graph as g
from dass.engine import tuning
from dass.engine.layout import Place
from dass.engine.programs import Built
from dass.engine.roofline import Limits, limits
from dass.engine.segments import Segment
from dass.engine.steps import Plan, Step
from dass.report import Section, Table
from dass.tables import number, percent
from dass.timing import machine_facts, threads

WIDEST_WHY = 56  # characters of a table's last column; `to_dict` has all that was measured

if TYPE_CHECKING:
    from dass.engine.compiler import Engine

_NAMED = re.compile(r"(\S+) \((\w+)\)")


@dataclass(frozen=True)
class StepFacts:
    """One step of the engine.

    source: what it was in the model. inputs, output: shapes without the batch. weights: zeros
    counted; nonzeros: those that are multiplied. macs, bytes: of one image: multiply-adds done,
    weights and pictures read and written. measured: way -> microseconds per pass, where a choice
    was measured. bound_us: no step can take less, for one pass; bound_by: what sets it. note: what
    else there is to say.
    """

    source: str
    kind: str
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    weights: int
    nonzeros: int
    kernel: str
    macs: int
    bytes: int
    measured: Mapping[str, float]
    bound_us: float
    bound_by: str
    note: str

    @property
    def why(self) -> str:
        """ "emitted 28x1: 9.4 us; spmm 8: 12.1 us": what was measured, the fastest ways first.

        Of a depthwise layer that runs alone: of the group it could be run depth first with.
        """
        best = sorted(self.measured.items(), key=lambda way: way[1])[:2]
        words = "; ".join(f"{name}: {us:.1f} us" for name, us in best)
        return f"with its neighbours {words}" if words and self.kind == "depthwise" else words


@dataclass(frozen=True)
class Explanation:
    """What :meth:`Engine.explain` gives: ``print`` shows it as a table, `to_dict` is JSON.

    facts: of the whole: layout, images per pass, memory, precision, instruction set, what was
    removed. limits: of the machine.
    """

    steps: tuple[StepFacts, ...]
    facts: Mapping[str, object]
    limits: Limits

    def to_dict(self) -> dict:
        """Plain JSON types."""
        steps = [{**asdict(step), "measured": dict(step.measured)} for step in self.steps]
        return {"steps": steps, "facts": dict(self.facts), "limits": asdict(self.limits)}

    def table(self) -> Table:
        columns = ("step", "kind", "in", "out", "nonzeros", "kernel", "us", "least", "by", "why")
        rows = []
        for step in self.steps:
            weights = f"{step.nonzeros:,} of {step.weights:,}" if step.weights else ""
            timed = step.measured and step.kind != "depthwise"  # there it is a group's time
            us = f"{min(step.measured.values()):.1f}" if timed else ""
            least = f"{step.bound_us:.2f}" if step.bound_us else ""
            words = textwrap.shorten("; ".join(filter(None, (step.why, step.note))), WIDEST_WHY)
            shapes = (", ".join(map(_sizes, step.inputs)), _sizes(step.output))
            row = (short(step.source), step.kind, *shapes, weights, step.kernel)
            rows.append((*row, us, least, step.bound_by, words))
        return Table(columns, rows, aside=("kind", "in", "out", "by"))

    def summary(self) -> list[str]:
        """Lines about the whole."""
        facts, torch_steps = self.facts, self.facts["torch_steps"]
        lines = [
            f"{facts['precision']}, {facts['isa']}, {facts['layout']}; activations take "
            f"{facts['arena_mib']:.2f} MiB; {facts['nonzeros']:,} weights of {facts['weights']:,}",
            f"removed: {facts['dead_channels']:,} channels that are constant or unread in "
            f"{facts['shrunk']} nodes, {facts['dead_nodes']} nodes altogether",
            f"this machine, on one thread, per ns: {self.limits.macs:.0f} multiply-adds, bytes "
            f"{self.limits.l1:.0f} from L1, {self.limits.l2:.0f} from L2, {self.limits.memory:.0f} "
            f"from memory; with these a pass takes {facts['bound_us']:.0f} us or more",
        ]
        if torch_steps:
            lines.append(f"{torch_steps} operations run in torch, where the engine has no step")
        if facts["no_code"]:
            lines.append(f"no code is made at run time: {facts['no_code']}")
        return lines

    def section(self) -> Section:
        return Section("Steps", self.summary(), [self.table()])

    def __str__(self) -> str:
        return "\n".join([*_lines(self.table()), *self.summary()])


def explain(engine: Engine, batch: int | None = None) -> Explanation:
    """See :meth:`Engine.explain`; batch: for which the layout is told, the example's by default."""
    wide = engine.wide(batch or engine.batch)
    machine = limits(engine.cache)
    steps: list[StepFacts] = []
    built = []
    for index, segment in enumerate(engine.segments):
        if segment.torch is not None:
            steps.append(_torch_facts(engine, segment.torch))
            continue
        made = engine.built(index, wide)
        built.append(made)
        groups = _group_times(engine, index, wide, made)
        for step, kernel in zip(made.plan.steps, made.program.kernels, strict=True):
            steps.append(_facts(made, step, kernel, groups, machine))
    return Explanation(tuple(steps), _whole(engine, built, steps, wide), machine)


def _whole(engine: Engine, built: list[Built], steps: list[StepFacts], wide: bool) -> dict:
    lanes = dass_kernels.register_lanes()
    return {
        "precision": engine.precision,
        "isa": engine.isa,
        "no_code": dass_kernels.emit_unavailable() or "",
        "images_per_pass": lanes if wide else 1,
        "layout": f"{lanes} images side by side" if wide else "planes of one image",
        "arena_mib": max((b.program.arena_bytes for b in built), default=0) / 2**20,
        "weights": sum(step.weights for step in steps),
        "nonzeros": sum(step.nonzeros for step in steps),
        "bound_us": sum(step.bound_us for step in steps),
        "dead_channels": sum(engine.removed.channels.values()),
        "shrunk": len(engine.removed.channels),
        "dead_nodes": len(engine.removed.nodes),
        "torch_steps": sum(step.kind == "torch" for step in steps),
    }


def _torch_facts(engine: Engine, node: g.Torch) -> StepFacts:
    inputs = tuple(engine.graph[name].shape for name in node.inputs)
    return StepFacts(
        node.source, "torch", inputs, node.shape, 0, 0, node.target, 0, 0, {}, 0.0, "",
        f"in torch: {node.reason}",
    )  # fmt: skip


def _facts(
    built: Built, step: Step, kernel: str, groups: Mapping[str, dict], machine: Limits
) -> StepFacts:
    plan = built.plan
    reads = [plan.places[name] for name in step.reads.values()]
    out = plan.places[step.writes]
    parts = step.parts()
    macs = sum(_macs(part, plan) for part in parts)
    weights = sum(_weights(part, plan) for part in parts)
    nonzeros = sum(_stored(part) for part in parts)
    # A weight that is 0 is neither read nor multiplied; where the others are takes 4 bytes more.
    known = sum(8 * _stored(p) if p.kind == "rows" else 4 * _stored(p) for p in parts)
    pixels = plan.images * (sum(map(_count, reads)) + _count(out))
    if step.kind == "map" and step.fields["shift_h"].size:
        pixels = 2 * plan.images * _count(out)  # every phase of x goes to one plane
    bound, by = machine.bound(macs * plan.images, 4 * pixels + known)
    return StepFacts(
        step.source, step.kind, tuple(map(_shape, reads)), _shape(out), weights, nonzeros, kernel,
        macs, 4 * (pixels // plan.images) + known, _measured(built, step, groups), bound, by,
        step.note or ("into the result" if out.space else ""),
    )  # fmt: skip


def _measured(built: Built, step: Step, groups: Mapping[str, dict]) -> dict[str, float]:
    if step.kind in ("fused", "depthwise") and step.writes in groups:
        return groups[step.writes]["us"]
    if step.kind != "rows":
        return {}
    found = built.decisions.measured.get(tuning.signature(built.plan, step))
    return found["us"] if found else {}


def _group_times(engine: Engine, index: int, wide: bool, built: Built) -> dict[str, dict]:
    """What was measured for groups of layers, by what the step with the depthwise layer writes."""
    maker = engine.maker(index, wide)
    groups = maker.groups()
    if not groups or not built.decisions.measured:
        return {}
    apart = maker.plan()
    found = {}
    run = {fusion.depthwise: fusion.last for fusion in built.decisions.fusions}
    for group in groups:
        row = built.decisions.measured.get(tuning.group_signature(apart, group))
        if row:
            found[run.get(group.depthwise, group.depthwise)] = row
    return found


def _macs(step: Step, plan: Plan) -> int:
    """Multiply-adds that the step does for one image."""
    out = plan.places[step.writes]
    if step.kind == "rows":
        return step.nonzeros * out.rows * out.columns
    if step.kind == "gemv":
        return step.nonzeros if step.fields["sparse"] else step.macs
    return step.macs


def _weights(step: Step, plan: Plan) -> int:
    out = plan.places[step.writes]
    if step.kind in ("rows", "depthwise"):
        return step.macs // max(1, out.rows * out.columns)
    return step.fields["weights"].size if step.kind == "gemv" else 0


def _stored(step: Step) -> int:
    if step.kind == "depthwise" or (step.kind == "gemv" and not step.fields["sparse"]):
        return step.fields["weights"].size
    return step.nonzeros


def _shape(place: Place) -> tuple[int, ...]:
    return (place.channels, place.rows, place.columns)


def _count(place: Place) -> int:
    return int(np.prod(_shape(place)))


# Profile


@dataclass(frozen=True)
class StepTime:
    """A step and the median of its microseconds for one call."""

    source: str
    kind: str
    kernel: str
    us: float


@dataclass(frozen=True)
class Profile:
    """What :meth:`Engine.profile` gives: ``print`` shows it, `to_dict` is JSON.

    total_us: the median of whole calls, timed without looking at their steps, on one thread.
    """

    steps: tuple[StepTime, ...]
    total_us: float
    batch: int
    runs: int
    machine: Mapping[str, object]

    @property
    def sum_us(self) -> float:
        return sum(step.us for step in self.steps)

    def sorted(self) -> Profile:
        """The slowest steps first."""
        steps = sorted(self.steps, key=lambda step: -step.us)
        return Profile(tuple(steps), self.total_us, self.batch, self.runs, self.machine)

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return {**asdict(self), "steps": [asdict(step) for step in self.steps]}

    def table(self) -> Table:
        whole = max(self.sum_us, 1e-9)
        rows = [
            (short(s.source), s.kind, s.kernel, f"{s.us:,.1f}", percent(s.us / whole))
            for s in self.steps
        ]
        return Table(("step", "kind", "kernel", "us", "share"), rows)

    def summary(self) -> list[str]:
        return [
            f"a call: {number(self.total_us)} us, its steps {number(self.sum_us)} us; batch "
            f"{self.batch}, one thread, medians of {self.runs} runs, {self.machine['cpu']}, "
            f"{self.machine['dass_isa']}"
        ]

    def section(self) -> Section:
        return Section("Time of each step", self.summary(), [self.table()])

    def __str__(self) -> str:
        return "\n".join([*_lines(self.table()), *self.summary()])


def profile(engine: Engine, x: Tensor, seconds: float) -> Profile:
    """See :meth:`Engine.profile`; x is a batch of at least one image."""
    if not len(x) or seconds < 0:
        raise ValueError(f"a batch and seconds >= 0 are needed, got {len(x)} images, {seconds} s")
    wide = engine.wide(len(x))
    steps: list[tuple[str, str, str]] = []
    runs: list[list[float]] = []
    calls: list[float] = []

    def watch(segment: Segment, built: Built | None, tensors: list[Tensor]) -> Tensor | None:
        if built is not None:
            runs[-1] += [ns / 1e3 for ns in built.program.profile(tensors)]
            return None
        begin = time.perf_counter()
        result = segment.call(tensors).contiguous()
        runs[-1].append(1e6 * (time.perf_counter() - begin))
        return result

    with torch.inference_mode(), threads(1):
        engine.run(x, wide)
        end = time.perf_counter() + seconds
        while len(calls) < 3 or time.perf_counter() < end:
            begin = time.perf_counter()
            engine.run(x, wide)
            calls.append(1e6 * (time.perf_counter() - begin))
            runs.append([])
            engine.run(x, wide, watch)
    for index, segment in enumerate(engine.segments):
        if segment.torch is not None:
            steps.append((segment.torch.source, "torch", segment.torch.target))
            continue
        built = engine.built(index, wide)
        for step, kernel in zip(built.plan.steps, built.program.kernels, strict=True):
            steps.append((step.source, step.kind, kernel))
    medians = [statistics.median(column) for column in zip(*runs, strict=True)]
    times = [StepTime(*step, us) for step, us in zip(steps, medians, strict=True)]
    return Profile(tuple(times), statistics.median(calls), len(x), len(runs), machine_facts())


# Words


def short(source: str) -> str:
    """ "a.0 (Conv2d) + a.1 (ReLU)" -> "a.0 Conv2d + ReLU"; of several layers their names."""
    layers = [_NAMED.findall(layer) for layer in source.split(" > ")]
    if not all(layers):
        return source
    if len(layers) == 1:
        return f"{layers[0][0][0]} {' + '.join(kind for _, kind in layers[0])}"
    return " > ".join(found[0][0] for found in layers)


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _lines(table: Table) -> list[str]:
    """The table as text, its columns one below the other."""
    cells = [tuple(table.columns), *table.rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    sides = [str.rjust if table.right(i) else str.ljust for i in range(len(widths))]
    return [
        "  ".join(f(*cell) for f, *cell in zip(sides, row, widths, strict=True)).rstrip()
        for row in cells
    ]
