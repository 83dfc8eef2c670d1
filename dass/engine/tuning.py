"""Which kernel each product runs on: measured inside the network, remembered for this machine.

A layer that is timed alone finds its code and its pixels in the cache; in a network it does not. So
the network is run with every product on the same kind of kernel, once for each kind, and each step
keeps the kind it was fastest with.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import dass_kernels
from dass.engine.plan import Plan, Step
from dass.timing import machine_facts

VERSION = 1  # of the kernels' behaviour: what an older one measured is not read
ROUNDS = 3  # passes over all kinds, each of RUNS runs
RUNS = 9
# Code of wide tiles is large; past this nobody has seen it win.
MOST_CODE = 6 << 20
L1_BYTES = 24 << 10  # of pixels that one pass over the rows should stay within


@dataclass(frozen=True)
class Kernel:
    """How a product is run; `chunk` is in blocks, 0 for all. See ``RowsKernel`` in C++."""

    emitted: bool
    height: int
    vectors: int
    chunk: int = 0

    def __str__(self) -> str:
        if not self.emitted:
            return f"spmm {self.vectors}"
        return f"emitted {self.height}x{self.vectors}" + (f"/{self.chunk}" if self.chunk else "")


TEMPLATES = tuple(Kernel(False, 1, vectors) for vectors in (4, 8, 14))
EMITTED = tuple(
    Kernel(True, height, vectors) for height, vectors in ((28, 1), (13, 2), (8, 3), (6, 4), (4, 7))
)
DEFAULT_TEMPLATE = TEMPLATES[1]
DEFAULT_EMITTED = EMITTED[0]


def default_kernel() -> Kernel:
    """For a product that was never measured."""
    return DEFAULT_TEMPLATE if dass_kernels.emit_unavailable() else DEFAULT_EMITTED


def candidates(plan: Plan, step: Step) -> list[Kernel]:
    """What is worth trying for one product."""
    found = list(TEMPLATES)
    if dass_kernels.emit_unavailable():
        return found
    place = plan.places[step.reads["x"]]
    for kernel in EMITTED:
        if kernel.vectors > 1 and step.nonzeros * (11 * kernel.vectors + 10) > MOST_CODE:
            continue
        found.append(kernel)
        chunk = max(1, L1_BYTES // (place.channels * kernel.vectors * 64))
        if chunk * kernel.vectors * 16 < place.rows * place.pitch * place.pixel:
            found.append(Kernel(True, kernel.height, kernel.vectors, chunk))
    return found


def products(plan: Plan) -> list[Step]:
    """The steps that there is something to choose for."""
    return [step for step in plan.steps if step.kind == "rows"]


def set_kernel(step: Step, kernel: Kernel) -> None:
    step.fields.update(
        emitted=kernel.emitted, height=kernel.height, vectors=kernel.vectors, chunk=kernel.chunk
    )


def signature(plan: Plan, step: Step) -> str:
    """Steps with one signature take one time."""
    x, y = plan.places[step.reads["x"]], plan.places[step.writes]
    parts = (
        f"{x.channels}x{x.rows}x{x.columns}/{x.pitch}", f"{y.channels}x{y.rows}x{y.columns}/{y.pitch}",
        step.nonzeros, step.fields["activation"], "residual" in step.reads, x.pixel,
    )  # fmt: skip
    return " ".join(map(str, parts))


def choose(plan: Plan, sample: Sequence[torch.Tensor], cache: Path | None) -> dict[str, dict]:
    """Settles the kernel of every product of a plan, by measurement where the cache knows nothing.

    Args:
        plan: its steps' kernels are set.
        sample: the tensors of a call, inputs and outputs.
        cache: a file of earlier choices; None keeps none.

    Returns:
        signature -> {"kernel": ..., "us": {kernel: microseconds}} for the products of this plan.
    """
    steps = products(plan)
    known = _read(cache)
    missing = [step for step in steps if signature(plan, step) not in known]
    if missing:
        measured = _measure(plan, steps, sample)
        known |= measured
        _write(cache, measured)
    chosen = {signature(plan, step): known[signature(plan, step)] for step in steps}
    for step in steps:
        set_kernel(step, Kernel(**chosen[signature(plan, step)]["kernel"]))
    return chosen


def _measure(plan: Plan, steps: list[Step], sample: Sequence[torch.Tensor]) -> dict[str, dict]:
    """Times every candidate of every step, all steps at once, kind by kind."""
    options = {id(step): candidates(plan, step) for step in steps}
    places = {id(step): i for i, step in enumerate(plan.steps)}
    most = max(len(found) for found in options.values())
    times: dict[tuple[int, int], list[float]] = {}
    programs = []
    for turn in range(most):
        for step in steps:
            set_kernel(step, options[id(step)][turn % len(options[id(step)])])
        programs.append(build(plan))
    with _one_thread():
        for _ in range(ROUNDS):
            for turn, program in enumerate(programs):
                program.run(sample)
                runs = [program.profile(sample) for _ in range(RUNS)]
                for step in steps:
                    key = (id(step), turn % len(options[id(step)]))
                    times.setdefault(key, []).extend(run[places[id(step)]] for run in runs)
    found: dict[str, dict] = {}
    for step in steps:
        medians = {
            kernel: statistics.median(times[id(step), i]) / 1e3
            for i, kernel in enumerate(options[id(step)])
        }
        best = min(medians, key=medians.get)
        found[signature(plan, step)] = {
            "kernel": vars(best),
            "us": {str(kernel): round(us, 2) for kernel, us in medians.items()},
        }
    return found


def build(plan: Plan) -> dass_kernels.Program:
    """The program of a plan as it stands."""
    return dass_kernels.Program(plan.images, plan.arena, plan.apart, plan.described())


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cache_file() -> Path:
    """Where choices are kept: $DASS_CACHE/kernels.json, by default ~/.cache/dass/kernels.json."""
    folder = os.environ.get("DASS_CACHE")
    base = Path(folder) if folder else Path.home() / ".cache" / "dass"
    return base / "kernels.json"


def machine_key() -> str:
    """Choices hold for one processor, instruction set and way of making code."""
    facts = machine_facts()
    emit = "templates" if dass_kernels.emit_unavailable() else "emitted"
    return f"{facts['cpu']}, {dass_kernels.active_isa()}, {emit}, {VERSION}"


def _read(path: Path | None) -> dict[str, dict]:
    """The choices for this machine; a file that cannot be read is as good as none."""
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text())[machine_key()]
        return {key: row for key, row in found.items() if Kernel(**row["kernel"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write(path: Path | None, measured: dict[str, dict]) -> None:
    """Adds to the file, whole or not at all; a folder that cannot be written is no reason to fail."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            everything = json.loads(path.read_text())
        except (OSError, ValueError):
            everything = {}
        everything.setdefault(machine_key(), {}).update(measured)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(everything, indent=0))
        partial.replace(path)
    except OSError:
        return
