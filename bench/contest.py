"""A contest: functions with one result, checked to be equal and then timed against each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dass.timing import measure, speedup

TOLERANCE = 1e-4  # largest difference over the largest value: float32 sums in another order


class NotAvailable(Exception):
    """What a contest needs is not here (a data set, a peer, an op): skip it and say so."""


class ResultsDiffer(Exception):
    """A contestant computes something else: its time would mean nothing."""


@dataclass(frozen=True)
class Entry:
    """One contestant.

    run: what is timed; called in torch.inference_mode.
    view: makes of run's result, once it is strided, what is compared: a tensor or a tuple of them.
    probe: what is compared in place of run's result, for a run that changes its own state.
    setup: called, untimed, before each of the entry's turns.
    """

    run: Callable[[], object]
    view: Callable[[object], object] = lambda result: result
    probe: Callable[[], object] | None = None
    setup: Callable[[], object] | None = None

    def result(self) -> list[Tensor]:
        if self.setup:
            self.setup()
        result = (self.probe or self.run)()
        result = self.view(
            tuple(map(_plain, result)) if isinstance(result, tuple) else _plain(result)
        )
        return list(result) if isinstance(result, tuple) else [result]


@dataclass(frozen=True)
class Contest:
    """Entries to time in turn, and which of them form a baseline.

    baselines: name -> the entries of which the fastest is the baseline. The other entries are ours.
    group, kind, label, sparsity: where the row stands in tables; a figure selects by them.
    facts: more for the row. missing: why entries that should be here are not.
    """

    group: str
    kind: str
    label: str
    sparsity: float
    entries: Mapping[str, Entry]
    baselines: Mapping[str, tuple[str, ...]]
    layout: str = "NCHW"
    dtype: str = "float32"
    threads: int = 1
    tolerance: float = TOLERANCE
    facts: Mapping[str, object] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def ours(self) -> tuple[str, ...]:
        rivals = {name for names in self.baselines.values() for name in names}
        return tuple(name for name in self.entries if name not in rivals)


def entries(functions: Mapping[str, Callable], view: Callable | None = None) -> dict[str, Entry]:
    """Plain functions as entries."""
    return {name: Entry(f, view) if view else Entry(f) for name, f in functions.items()}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.layout is not torch.strided else tensor


def difference(got: Iterable[Tensor], want: Iterable[Tensor]) -> float:
    """Largest difference over the largest value, the worst of all tensors.

    Infinite where shapes differ or something is NaN.
    """
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            return math.inf
        if b.numel():
            error = ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
            worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def check(contest: Contest) -> None:
    """Raises ResultsDiffer unless every entry gives the result of the first baseline's first."""
    reference = next(iter(contest.baselines.values()))[0]
    with torch.inference_mode():
        want = contest.entries[reference].result()
        for name, entry in contest.entries.items():
            error = difference(entry.result(), want)
            if not error <= contest.tolerance:
                raise ResultsDiffer(
                    f"{contest.group} {contest.label} {contest.sparsity}: {name} differs from "
                    f"{reference} by {error:.2g} of the largest value"
                )


def hold(contest: Contest, *, rounds: int, seconds: float) -> dict:
    """Checks a contest and times it.

    Args:
        rounds, seconds: as in :func:`dass.timing.measure`, per entry.

    Returns:
        A row for tables and JSON: where it belongs, ``times`` (entry -> median_us, spread, rounds),
        ``fastest`` (baseline -> entry) and ``ratios`` ("ours/baseline" -> times faster).
    """
    check(contest)
    samples = measure(
        {name: entry.run for name, entry in contest.entries.items()},
        seconds=seconds,
        rounds=rounds,
        num_threads=contest.threads,
        setup={name: entry.setup for name, entry in contest.entries.items() if entry.setup},
    )
    fastest = {
        baseline: min(names, key=lambda name: samples[name].median_us)
        for baseline, names in contest.baselines.items()
    }
    return {
        "group": contest.group,
        "kind": contest.kind,
        "label": contest.label,
        "sparsity": contest.sparsity,
        "dtype": contest.dtype,
        "layout": contest.layout,
        "threads": contest.threads,
        "times": {name: sample.to_dict() for name, sample in samples.items()},
        "fastest": fastest,
        "ratios": {
            f"{name}/{baseline}": speedup(samples[rival], samples[name])
            for name in contest.ours
            for baseline, rival in fastest.items()
        },
        **contest.facts,
    }
