"""``dass.compile``: a whole network as one call into C++."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import dass_kernels
from dass.engine import graph as g
from dass.engine import tuning
from dass.engine.capture import capture
from dass.engine.depth_first import Fusion, groups
from dass.engine.passes import Report, simplify
from dass.engine.plan import make_plan
from dass.engine.segments import Segment, cut
from dass.engine.steps import Plan, suits_depthwise

PRECISIONS = ("fp32",)


def compile(
    model: nn.Module,
    example_inputs: Tensor,
    precision: str = "fp32",
    *,
    tune: bool = True,
    cache: Path | str | None = "default",
) -> Engine:
    """A pruned network as fast as this processor runs it: y = model(x), in inference.

    The model is captured, BatchNorms are folded, channels that are constant or that nobody reads
    are removed, activations and sums are done where products end, and each product gets the
    kernel that was fastest in this network on this machine. The model itself is left as it is.

    Args:
        model: in eval mode, one input and one output, float32 weights. Masked layers count as
            pruned; in others exact zeros do.
        example_inputs: [B, C, H, W], float32. The engine takes any batch of such pictures; B
            decides for what it is tuned.
        precision: "fp32".
        tune: False takes a default kernel for every product instead of measuring (seconds).
        cache: file that remembers measurements; "default" is ``$DASS_CACHE/kernels.json`` or
            ``~/.cache/dass/kernels.json``, None keeps none.

    Raises:
        ValueError: a model in training mode, other inputs or outputs, an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    graph, removed = simplify(capture(model, example_inputs))
    path = tuning.cache_file() if cache == "default" else cache and Path(cache)
    engine = Engine(graph, removed, tune=tune, cache=path or None)
    engine.prepare(example_inputs)
    return engine


@dataclass
class Built:
    """A segment's program for one layout."""

    plan: Plan
    program: dass_kernels.Program
    choices: dict[str, dict]  # what was measured, by signature


class Engine:
    """A compiled network; make one with :func:`dass.compile`.

    ``engine(x)`` may be called from several threads at a time. It uses torch's threads
    (``torch.set_num_threads``); with as many images as threads each does whole images.

    Attributes:
        graph: the simplified network. removed: what simplifying took out.
    """

    def __init__(self, graph: g.Graph, removed: Report, *, tune: bool, cache: Path | None):
        self.graph, self.removed = graph, removed
        self._tune, self._cache = tune, cache
        self._segments = cut(graph)
        self._built: dict[tuple[int, bool], Built] = {}
        self._side_by_side = False  # whether batches go with the images of a register side by side
        self.isa = dass_kernels.active_isa()

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, H, W] float32 -> the network's output, a tensor of its own."""
        return self._run(self._checked(x), self._side_by_side)

    @torch.inference_mode()
    def prepare(self, example: Tensor) -> None:
        """Builds what a call with such a batch needs, and measures which layout suits it."""
        x = self._checked(example)
        self._run(x, False)
        if len(x) >= dass_kernels.register_lanes():
            self._run(x, True)
            self._side_by_side = self._time(x, True) < self._time(x, False)

    def clone(self) -> Engine:
        """Another engine over the same weights and code, for another thread."""
        return copy.copy(self)

    def _time(self, x: Tensor, side_by_side: bool) -> float:
        from dass.timing import measure

        return measure({"": lambda: self._run(x, side_by_side)}, rounds=3)[""].median_us

    def _checked(self, x: Tensor) -> Tensor:
        shape = self.graph.nodes[0].shape
        if not isinstance(x, Tensor) or x.dim() != 4 or tuple(x.shape[1:]) != shape:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"input must be [B, {', '.join(map(str, shape))}], got {got}")
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(f"input must be float32 on the CPU, got {x.dtype} on {x.device}")
        if dass_kernels.active_isa() != self.isa:
            raise ValueError(
                f"compiled for {self.isa}; the active ISA is {dass_kernels.active_isa()}"
            )
        return x.contiguous()

    def _run(self, x: Tensor, side_by_side: bool) -> Tensor:
        values = {self.graph.nodes[0].name: x}
        wide = side_by_side and len(x) >= dass_kernels.register_lanes()
        for index, segment in enumerate(self._segments):
            inputs = [values[name] for name in segment.inputs]
            if segment.torch is not None:
                values[segment.outputs[0]] = segment.call(inputs).contiguous()
                continue
            outputs = [x.new_empty(len(x), *segment.graph[name].shape) for name in segment.outputs]
            if len(x):
                self._program(index, segment, wide, [*inputs, *outputs]).run([*inputs, *outputs])
            values |= dict(zip(segment.outputs, outputs, strict=True))
        return values[self.graph.outputs[0]]

    def _program(self, index: int, segment: Segment, wide: bool, sample: list[Tensor]):
        key = (index, wide)
        if key not in self._built:
            self._built[key] = self._build(segment, wide, sample)
        return self._built[key].program

    def _build(self, segment: Segment, wide: bool, sample: list[Tensor]) -> Built:
        pixel = dass_kernels.register_lanes() if wide else 1

        def make(fusions: Sequence[Fusion]) -> Plan:
            gemv = self.isa == "avx512"
            emitted = dass_kernels.emit_unavailable() is None
            return make_plan(
                segment.graph, pixel, sparse_gemv=gemv, emitted=emitted, fusions=fusions
            )

        if not self._tune:
            plan = make(())
            tuning.use(plan, {})
            return Built(plan, tuning.build(plan), {})
        fusible = groups(segment.graph, lambda node: suits_depthwise(node, 1)) if not wide else []
        one = [tensor[:pixel] for tensor in sample]
        plan, choices = tuning.choose(make, fusible, one, self._cache)
        return Built(plan, tuning.build(plan), choices)
