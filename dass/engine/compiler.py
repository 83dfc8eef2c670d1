"""``dass.compile``: a whole network as one call into C++."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import dass_kernels
from dass.engine import graph as g
from dass.engine import tuning
from dass.engine.capture import capture
from dass.engine.explain import Explanation, Profile, explain, profile
from dass.engine.memory import release
from dass.engine.passes import Report, simplify
from dass.engine.programs import Built, Maker
from dass.engine.saving import Saved, read_engine, write_engine
from dass.engine.segments import Segment, cut

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
    release()
    engine = Engine(graph, removed, tune=tune, cache=_cache_file(cache), precision=precision)
    engine.prepare(example_inputs)
    release()
    return engine


def load_engine(
    path: str | os.PathLike, *, tune: bool = True, cache: Path | str | None = "default"
) -> Engine:
    """The engine of a file of ``engine.save``; the model's class is not needed.

    On the machine that saved it, it gives the same bits: its kernels are those of the file. On
    another one they are chosen anew.

    Args:
        path: the file.
        tune, cache: as in :func:`compile`, for what the file does not settle on this machine.

    Raises:
        CorruptFileError, VersionError (ValueError): truncated, altered, of a newer version, or no
            such file. OSError: it cannot be read.
    """
    saved = read_engine(path)
    engine = Engine(
        saved.graph, saved.removed, tune=tune, cache=_cache_file(cache), precision=saved.precision
    )
    engine.restore(saved)
    del saved
    release()
    return engine


def _cache_file(cache: Path | str | None) -> Path | None:
    return tuning.cache_file() if cache == "default" else Path(cache) if cache else None


def call_segment(segment: Segment, built: Built | None, tensors: list[Tensor]) -> Tensor | None:
    if built is None:
        return segment.call(tensors)
    return built.program.run(tensors)


Caller = Callable[[Segment, Built | None, list[Tensor]], Tensor | None]


class Engine:
    """A compiled network; make one with :func:`dass.compile`.

    ``engine(x)`` may be called from several threads at a time. It uses torch's threads
    (``torch.set_num_threads``); with as many images as threads each does whole images.

    Attributes:
        graph: the simplified network. removed: what simplifying took out. batch: of the example.
        precision: "fp32". isa: the instruction set that it is for.
    """

    def __init__(
        self,
        graph: g.Graph,
        removed: Report,
        *,
        tune: bool,
        cache: Path | None,
        precision: str = "fp32",
    ):
        self.graph, self.removed, self.precision = graph, removed, precision
        self._tune, self.cache = tune, cache
        self.segments = cut(graph)
        # Nothing is left to torch, which then need not be told to keep no gradients.
        self._alone = all(segment.torch is None for segment in self.segments)
        self._built: dict[tuple[int, bool], Built] = {}
        self._building = threading.Lock()  # of several threads one measures, the others wait
        self._side_by_side = False  # whether batches go with the images of a register side by side
        self.batch = 1
        self.isa = dass_kernels.active_isa()

    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, H, W] float32 -> the network's output, a tensor of its own, without a gradient."""
        x = self._checked(x)
        if self._alone:
            return self.run(x, self.wide(len(x)))
        with torch.no_grad():
            return self.run(x, self.wide(len(x)))

    @torch.inference_mode()
    def prepare(self, example: Tensor) -> None:
        """Builds what a call with such a batch needs, and measures which layout suits it."""
        x = self._checked(example)
        self.batch = max(1, len(x))
        self.run(x, False)
        if len(x) >= dass_kernels.register_lanes():
            self.run(x, True)
            self._side_by_side = self._time(x, True) < self._time(x, False)

    def clone(self) -> Engine:
        """Another engine over the same weights and code, for another thread."""
        return copy.copy(self)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the network and what was measured to one safetensors file; no pickle.

        :func:`dass.load_engine` reads it. The size goes by the weights that are not 0.

        Raises:
            ValueError: a node that runs in torch and may not stand in a file.
            OSError: the disk is full or not writable; an old file is then untouched.
        """
        decided = {key: built.decisions for key, built in self._built.items()}
        facts = (tuning.machine_key(), self.batch, self._side_by_side, decided)
        write_engine(path, Saved(self.graph, self.removed, self.precision, *facts))

    def restore(self, saved: Saved) -> None:
        """Builds what was decided on this machine, or else what a call with the example needs."""
        self.batch = self.graph.batch or saved.batch
        if saved.machine == tuning.machine_key():
            try:
                self._built = {
                    key: self.maker(*key).as_decided(d) for key, d in saved.programs.items()
                }
                self._side_by_side = saved.side_by_side
                return
            except ValueError:  # of a version that decided other things
                self._built = {}
        self.prepare(torch.zeros(self.batch, *self.graph.nodes[0].shape))

    def explain(self) -> Explanation:
        """What the engine made of the network, step by step, and why; print it.

        The limits are measured on the first call (a second) and remembered in the cache.
        """
        return explain(self)

    def profile(self, x: Tensor | None = None, seconds: float = 0.5) -> Profile:
        """Microseconds of every step on one thread, operations of torch among them; print it.

        Args:
            x: [B, C, H, W]; by default random images, as many as in the example.
            seconds: how long to measure.
        """
        shape = (self.batch, *self.graph.nodes[0].shape)
        return profile(self, self._checked(torch.randn(shape) if x is None else x), seconds)

    def _time(self, x: Tensor, side_by_side: bool) -> float:
        from dass.timing import measure

        return measure({"": lambda: self.run(x, side_by_side)}, rounds=3)[""].median_us

    def _checked(self, x: Tensor) -> Tensor:
        shape = self.graph.nodes[0].shape
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1:] != shape:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"input must be [B, {', '.join(map(str, shape))}], got {got}")
        if x.dtype != torch.float32 or not x.is_cpu:
            raise ValueError(f"input must be float32 on the CPU, got {x.dtype} on {x.device}")
        if dass_kernels.active_isa() != self.isa:
            raise ValueError(
                f"compiled for {self.isa}; the active ISA is {dass_kernels.active_isa()}"
            )
        if self.graph.batch not in (None, len(x)):
            raise ValueError(f"the model is bound to batches of {self.graph.batch}, got {len(x)}")
        return x.contiguous()

    def wide(self, batch: int) -> bool:
        """Whether a batch runs with the images of a register side by side."""
        return self._side_by_side and batch >= dass_kernels.register_lanes()

    def run(self, x: Tensor, side_by_side: bool, call: Caller = call_segment) -> Tensor:
        """The output for a checked batch; `call` runs each segment in turn.

        call: (segment, its program, its tensors) -> the output of a segment for torch, whose
        program is None; else it writes to the last of the tensors.
        """
        values = {self.graph.nodes[0].name: x}
        for index, segment in enumerate(self.segments):
            inputs = [values[name] for name in segment.inputs]
            if segment.torch is not None:
                values[segment.outputs[0]] = call(segment, None, inputs).contiguous()
                continue
            outputs = [x.new_empty((len(x), *shape)) for shape in segment.shapes]
            if len(x):
                tensors = [*inputs, *outputs]
                call(segment, self.built(index, side_by_side, tensors), tensors)
            values.update(zip(segment.outputs, outputs, strict=True))
        result = values[self.graph.outputs[0]]
        return result.detach().clone() if result.data_ptr() == x.data_ptr() else result

    def built(self, index: int, side_by_side: bool, sample: list[Tensor] | None = None) -> Built:
        """A segment's program; made first, and measured on `sample`, if there is none yet."""
        key = (index, side_by_side)
        if key not in self._built:
            with self._building:
                if key not in self._built:
                    maker = self.maker(index, side_by_side)
                    tuned = self._tune and sample is not None
                    self._built[key] = (
                        maker.measured(sample, self.cache) if tuned else maker.default()
                    )
        return self._built[key]

    def maker(self, index: int, side_by_side: bool) -> Maker:
        pixel = dass_kernels.register_lanes() if side_by_side else 1
        return Maker(self.segments[index].graph, pixel)
