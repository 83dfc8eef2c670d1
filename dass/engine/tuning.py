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
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

import dass_kernels
from dass.engine.depth_first import Fusion
from dass.engine.steps import Plan, Step
from dass.timing import machine_facts

VERSION = 4  # of the kernels' behaviour: what an older one measured is not read
ROUNDS = 3  # passes over all kinds, each of up to RUNS runs
RUNS = 9
TURN_SECONDS = 0.25
MOST_SECONDS = 8.0  # after which no further pass begins
STRIPS = (16, 32)  # output rows at a time, depth first
# Code of wide tiles is large; past this nobody has seen it win.
MOST_CODE = 6 << 20
L1_BYTES = 24 << 10  # of pixels that one pass over the rows should stay within


@dataclass(frozen=True)
class Kernel:
    """How a product is run; see ``RowsKernel`` in C++.

    chunk: blocks per pass over the rows. deep: rows of pixels per block. depth: channels per stage.
    0 for all.
    """

    emitted: bool
    height: int
    vectors: int
    chunk: int = 0
    depth: int = 0
    deep: int = 1

    def __str__(self) -> str:
        name = f"emitted {self.height}x{self.vectors}" if self.emitted else f"spmm {self.vectors}"
        name += f"/{self.chunk}" if self.chunk else ""
        name += f" in {self.deep} rows" if self.deep > 1 else ""
        return name + (f", {self.depth} channels" if self.depth else "")


TEMPLATES = (
    *(Kernel(False, 1, vectors) for vectors in (4, 8, 14)),
    Kernel(False, 1, 14, depth=32),
)
EMITTED = tuple(
    Kernel(True, height, vectors) for height, vectors in ((28, 1), (13, 2), (8, 3), (6, 4), (4, 7))
)
# In stages of channels, for products that read more than fits into L1.
STAGED = (
    Kernel(True, 28, 1, chunk=4, depth=32),
    Kernel(True, 28, 1, chunk=16, depth=32),
    Kernel(True, 28, 1, chunk=64, depth=32),
    Kernel(True, 13, 2, chunk=8, depth=32),
    Kernel(True, 6, 4, chunk=2, depth=32),
)
LEAST_STAGED = 64  # channels
# With the batch innermost: blocks of several rows.
DEEP = tuple(
    Kernel(False, 1, 16, depth=depth, deep=deep) for deep in (2, 4) for depth in (0, 16, 32)
)


def default_kernel() -> Kernel:
    """For a product that was never measured."""
    return TEMPLATES[1] if dass_kernels.emit_unavailable() else EMITTED[0]


def candidates(plan: Plan, step: Step) -> list[Kernel]:
    """What is worth trying for one product."""
    place = plan.places[step.reads["x"]]
    staged = place.channels >= LEAST_STAGED
    found = [] if step.fields["relu_in"] else [k for k in TEMPLATES if staged or not k.depth]
    if place.pixel > 1 and not step.fields["relu_in"]:
        found += [k for k in DEEP if staged or not k.depth]
    if dass_kernels.emit_unavailable():
        return found
    found += [Kernel(True, 28, 1), Kernel(True, 28, 1, chunk=4)]
    for kernel in EMITTED:
        if kernel.vectors > 1 and step.nonzeros * (11 * kernel.vectors + 10) > MOST_CODE:
            continue
        chunk = max(1, L1_BYTES // (place.channels * kernel.vectors * 64))
        whole = chunk * kernel.vectors * 16 >= place.rows * place.pitch * place.pixel
        found += [kernel] if whole else [kernel, replace(kernel, chunk=chunk)]
    return list(dict.fromkeys(found + [k for k in STAGED if staged]))


def products(plan: Plan) -> list[Step]:
    """The steps, and parts of fused ones, that there is something to choose for."""
    return [part for step in plan.steps for part in step.parts() if part.kind == "rows"]


def set_kernel(step: Step, kernel: Kernel) -> None:
    step.fields.update(vars(kernel))


def kernel_of(step: Step) -> Kernel:
    """The one that `set_kernel` set."""
    return Kernel(**{each.name: step.fields[each.name] for each in fields(Kernel)})


def exists(kernel: Kernel) -> bool:
    """Whether it is one of those that are tried, with any chunk or depth."""
    known = (*TEMPLATES, *EMITTED, *STAGED, *DEEP)
    plain = replace(kernel, chunk=0, depth=0)
    sizes = kernel.chunk >= 0 and kernel.depth >= 0
    return sizes and plain in [replace(each, chunk=0, depth=0) for each in known]


def signature(plan: Plan, step: Step) -> str:
    """Steps with one signature take one time."""
    x, y = plan.places[step.reads["x"]], plan.places[step.writes]
    shapes = (f"{p.channels}x{p.rows}x{p.columns}" for p in (x, y))
    kind = "relu, rows" if step.fields["relu_in"] else "rows"
    rest = step.nonzeros, step.fields["activation"], "residual" in step.reads, x.pixel
    return " ".join(map(str, (kind, *shapes, *rest)))


def choose(
    make: Callable[[Sequence[Fusion]], Plan],
    groups: Sequence[Fusion],
    sample: Sequence[torch.Tensor],
    cache: Path | None,
) -> tuple[Plan, dict[str, dict]]:
    """The plan with the kernels, and the groups run depth first, that are fastest here.

    Args:
        make: fusions -> a plan.
        groups: that may run depth first.
        sample: the tensors of a call, inputs and outputs.
        cache: a file of earlier measurements; None keeps none.

    Returns:
        The plan, its kernels set, and what was measured: signature -> {"kernel": ..., "us":
        {kernel: microseconds}}, and for a group {"strip": ..., "us": {how: microseconds}}.
    """
    known = _read(cache)
    apart = make(())
    steps = products(apart)
    fresh: dict[str, dict] = {}
    if any(signature(apart, step) not in known for step in steps):
        fresh |= _measure(apart, steps, sample)
    chosen = {key: (known | fresh)[key] for key in (signature(apart, step) for step in steps)}
    use(apart, chosen)
    names = {group: group_signature(apart, group) for group in groups}
    if any(name not in known for name in names.values()):
        fresh |= _measure_groups(make, groups, names, chosen, sample)
    chosen |= {name: (known | fresh)[name] for name in names.values()}
    if fresh:
        _write(cache, fresh)
    picked = [replace(group, **chosen[names[group]]["how"]) for group in groups]
    plan = make([group for group in picked if group.strip and len(group.members) > 1])
    use(plan, chosen)
    return plan, chosen


def use(plan: Plan, chosen: dict[str, dict]) -> None:
    """Sets the kernels of a plan, the default where none was chosen; strips are chunks enough."""
    for step in plan.steps:
        for part in step.parts():
            if part.kind != "rows":
                continue
            row = chosen.get(signature(plan, part))
            kernel = Kernel(**row["kernel"]) if row else default_kernel()
            if part is not step:
                kernel = replace(kernel, chunk=0)
            set_kernel(part, kernel)


def _measure(plan: Plan, steps: list[Step], sample: Sequence[torch.Tensor]) -> dict[str, dict]:
    """Times every candidate of every step, all steps at once, kind by kind."""
    options = {id(step): candidates(plan, step) for step in steps}
    places = {id(step): i for i, step in enumerate(plan.steps)}
    most = max((len(found) for found in options.values()), default=0)
    programs = []
    for turn in range(most):
        for step in steps:
            set_kernel(step, options[id(step)][turn % len(options[id(step)])])
        programs.append(build(plan))
    times: dict[tuple[int, int], list[float]] = {}
    for turn, runs in _profiles(programs, sample):
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


def _measure_groups(
    make: Callable[[Sequence[Fusion]], Plan],
    groups: Sequence[Fusion],
    names: dict[Fusion, str],
    chosen: dict[str, dict],
    sample: Sequence[torch.Tensor],
) -> dict[str, dict]:
    """Times each group layer by layer and depth first: all of it, or up to the depthwise layer."""
    ways: list[dict] = [{"strip": 0}]
    for strip in STRIPS:
        ways.append({"strip": strip})
        ways.append({"strip": strip, "project": None})
    plans = []
    for way in ways:
        fusions = [replace(group, **way) for group in groups] if way["strip"] else []
        plans.append(make([fusion for fusion in fusions if len(fusion.members) > 1]))
        use(plans[-1], chosen)
    totals: dict[tuple[Fusion, int], list[float]] = {}
    for turn, runs in _profiles([build(plan) for plan in plans], sample):
        where = {step.writes: i for i, step in enumerate(plans[turn].steps)}
        for group in groups:
            at = [where[name] for name in group.members if name in where]
            for run in runs:
                totals.setdefault((group, turn), []).append(sum(run[i] for i in at))
    found = {}
    for group in groups:
        medians = [statistics.median(totals[group, i]) / 1e3 for i in range(len(ways))]
        best = ways[min(range(len(ways)), key=medians.__getitem__)]
        labels = [_way_name(way) for way in ways]
        found[names[group]] = {
            "how": best,
            "us": {label: round(us, 2) for label, us in zip(labels, medians, strict=True)},
        }
    return found


def _way_name(way: dict) -> str:
    if not way["strip"]:
        return "layer by layer"
    return f"strips of {way['strip']}" + (", without the last" if "project" in way else "")


def group_signature(plan: Plan, group: Fusion) -> str:
    """As `signature`, of a group whose layers are apart in this plan."""
    steps = [step for step in plan.steps if step.writes in group.members]
    return "group: " + ", ".join(signature(plan, step) for step in steps)


def _profiles(
    programs: Sequence[dass_kernels.Program], sample: Sequence[torch.Tensor]
) -> Iterator[tuple[int, list[list[float]]]]:
    """(program, nanoseconds of its steps in some runs), the programs in turn, on one thread."""
    with _one_thread():
        begin = time.perf_counter()
        for done in range(ROUNDS):
            if done and time.perf_counter() - begin > MOST_SECONDS:
                return
            for turn, program in enumerate(programs):
                first = time.perf_counter()
                program.run(sample)
                runs = [program.profile(sample)]
                while len(runs) < RUNS and time.perf_counter() - first < TURN_SECONDS:
                    runs.append(program.profile(sample))
                yield turn, runs


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
        return {key: row for key, row in found.items() if _is_choice(row)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_choice(row: dict) -> bool:
    """Of a product ("kernel") or a group ("how"); KeyError or TypeError for anything else."""
    if "kernel" in row:
        return exists(Kernel(**row["kernel"]))
    return isinstance(row["how"]["strip"], int)


def _write(path: Path | None, measured: dict[str, dict]) -> None:
    """Adds to the file, whole or not at all. A folder that cannot be written is no failure."""
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
