"""Small graphs of float32 weights, run as programs and compared with torch in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from error_bounds import bounded
from fences import Fenced, nan_step, poison_scratch
from graph_sketch import Sketch
from torch import Tensor

import dass_kernels as dk
from dass.engine import graph as g
from dass.engine import tuning
from dass.engine.depth_first import Fusion
from dass.engine.geometry import output_size
from dass.engine.plan import make_plan
from dass_kernels.testing import assert_within

ACTIVATIONS = (None, *g.ACTIVATIONS)
SIMPLE = (None, "relu", "relu6", "hardswish")


class Net(Sketch):
    """A sketch whose weights are float32, some of them pruned."""

    def normal(self, *shape: int) -> Tensor:
        return super().normal(*shape).float()

    def pruned(self, density: float, *shape: int) -> Tensor:
        kept = torch.rand(shape, generator=self.random) < density
        return self.normal(*shape) * kept

    def conv(self, x, out, kernel=1, padding=0, density=1.0, residual=None, **fields) -> str:
        channels, *size = self.shape(x)
        taps = (kernel, kernel) if isinstance(kernel, int) else kernel
        four = padding if isinstance(padding, tuple) else (padding,) * 4
        stride, dilation = fields.get("stride", (1, 1)), fields.get("dilation", (1, 1))
        weight = self.pruned(density, out, channels // fields.get("groups", 1), *taps)
        shape = (out, *output_size(size, taps, stride, four, dilation))
        inputs = [x] if residual is None else [x, residual]
        return self.add(g.Conv, inputs, shape, weight, self.normal(out), padding=four, **fields)

    def depthwise(self, x, kernel=3, padding=1, **fields) -> str:
        channels = self.shape(x)[0]
        return self.conv(x, channels, kernel, padding, groups=channels, **fields)

    def linear(self, x, out, density=1.0, **fields) -> str:
        weight = self.pruned(density, out, *self.shape(x))
        return self.add(g.Linear, [x], (out,), weight, self.normal(out), **fields)

    def window(self, x, kind, kernel, stride, padding=(0,) * 4, dilation=(1, 1), **fields) -> str:
        channels, *size = self.shape(x)
        shape = (channels, *output_size(size, kernel, stride, padding, dilation))
        return self.add(g.Pool, [x], shape, kind, kernel, stride, padding, dilation, **fields)


def layouts() -> list[tuple[int, int]]:
    """(images side by side, batch)."""
    lanes = dk.register_lanes()
    return [(1, 1), (1, 2), (lanes, 1), (lanes, lanes), (lanes, lanes + 1), (lanes, 2 * lanes + 3)]


def numbers(batch: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *shape, generator=generator)


def program_of(plan, choose=None) -> dk.Program:
    """The plan as it is run here: everything is NaN first. choose: sets the kernels of a plan."""
    if choose is None:
        tuning.use(plan, {})
    else:
        choose(plan)
    steps = [nan_step(plan.arena), *plan.described()]
    return dk.Program(plan.images, plan.arena, plan.apart, steps)


def run_fenced(program: dk.Program, xs: Sequence[Tensor], shapes, at_end: bool) -> list[Tensor]:
    """The outputs; neither they nor the inputs are passed over on one side, nor written beside."""
    ins = [Fenced(tuple(x.shape), at_end) for x in xs]
    outs = [Fenced(shape, at_end) for shape in shapes]
    for fenced, x in zip(ins, xs, strict=True):
        fenced.tensor.copy_(x)
    for out in outs:
        out.tensor.fill_(torch.nan)
    poison_scratch()
    program.run([fenced.tensor for fenced in (*ins, *outs)])
    for fenced, x in zip(ins, xs, strict=True):
        fenced.check("input")
        assert torch.equal(fenced.tensor.nan_to_num(7.0), x.nan_to_num(7.0)), "input was written"
    for out in outs:
        out.check("output")
    return [out.tensor.clone() for out in outs]


def check(
    graph: g.Graph,
    pixel: int = 1,
    batch: int = 1,
    *,
    fusions: Iterable[Fusion] = (),
    choose=None,
    seed: int = 1,
) -> list[str]:
    """Runs a graph with finite input and compares every output; the kernels that ran."""
    sparse = dk.active_isa() == "avx512"
    x = numbers(batch, graph.nodes[0].shape, seed)
    want = bounded(graph, x)
    shapes = [tuple(want[name][0].shape) for name in graph.outputs]
    for emitted in (True, False) if emits() else (False,):
        options = {"sparse_gemv": sparse, "emitted": emitted, "fusions": fusions}
        program = program_of(make_plan(graph, pixel, **options), choose)
        for at_end in (True, False):
            got = run_fenced(program, [x], shapes, at_end)
            for name, y in zip(graph.outputs, got, strict=True):
                value, error = want[name]
                assert_within(y, value, error, f"{name}, {pixel} side by side, batch {batch}")
    return program.kernels[1:]


def emits() -> bool:
    """Whether code can be emitted here."""
    return dk.emit_unavailable() is None


def check_layouts(graph: g.Graph, **options) -> None:
    for pixel, batch in layouts():
        check(graph, pixel, batch, **options)


def kernel(emitted: bool, height: int, vectors: int, chunk: int = 0, **more: int):
    """Sets one kernel for every product of a plan that it can do."""

    def choose(plan):
        tuning.use(plan, {})
        for step in tuning.products(plan):
            if emitted or not step.fields["relu_in"]:
                tuning.set_kernel(step, tuning.Kernel(emitted, height, vectors, chunk, **more))

    return choose
