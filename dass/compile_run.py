"""What ``dass compile`` does: a saved network compiled for this machine, timed, and written."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dass.convert import densify
from dass.engine.compiler import Engine, compile
from dass.latency import relative_error
from dass.report import Report, Section, Table
from dass.runs import UserError, model_file
from dass.sources import image_shape, load_model, run_on
from dass.tables import megabytes, number, percent, times
from dass.timing import Sample, dense_variants, measure, speedup, threads

__all__ = ["compile_network"]


def compile_network(
    source: str,
    out: Path | None,
    *,
    batch: int = 1,
    shape: tuple[int, ...] | None = None,
    size: int | None = None,
    num_threads: int | None = 1,
    tune: bool = True,
    explain: bool = False,
    profile: bool = False,
    model: str | None = None,
) -> Report:
    """Compiles the network of a run folder or a file of ``dass.save``, and says what that gives.

    Args:
        out: the engine's file; None: beside the network's, as .engine.
        batch: images for which it is tuned; the engine takes any number.
        shape: of one input, (C, H, W). Default: the zoo network's, with `size` as height and width
            if given.
        num_threads: to measure with.
        tune: measure which kernels are fastest, seconds.
        explain, profile: put the table of all steps, or of their times, in the report.
        model: "package.module:function", for a network that is not of the zoo.

    Raises:
        UserError: what the user can put right.
    """
    file = model_file(source)
    out = out or file.with_suffix(".engine")
    for option, value in (("--batch", batch), ("--size", size)):
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, got {value}")
    if out.exists() and out.samefile(file):
        raise UserError(f"-o {out} is the network itself: name another file")
    network = densify(load_model(source, model)).eval()
    shape = shape or image_shape(network, size)
    x = torch.randn((batch, *shape), generator=torch.Generator().manual_seed(0))
    run_on(network, x, "an input of that shape")
    with threads(num_threads) as count:
        begin = time.perf_counter()
        with _users():
            engine = compile(network, x, tune=tune)
        took = time.perf_counter() - begin
        with _users():
            engine.save(out)
        samples, best, error = _compare(engine, network, x)
    data = {
        "compile_seconds": took,
        "threads": count,
        "batch": batch,
        "input": list(x.shape),
        "best": best,
        "error": error,
        "samples": {name: sample.to_dict() for name, sample in samples.items()},
        "file": str(out),
        "file_bytes": out.stat().st_size,
    }
    sections = [Section("Time of a call", items=[_table(samples, best)])]
    for name, wanted, make in (
        ("explain", explain, engine.explain),
        ("profile", profile, engine.profile),
    ):
        if wanted:
            found = make()
            sections.append(found.section())
            data[name] = found.to_dict()
    return _report(source, engine, data, samples, sections)


@contextlib.contextmanager
def _users():
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def _compare(
    engine: Engine, network: torch.nn.Module, x: Tensor
) -> tuple[dict[str, Sample], str, float]:
    """Times of the engine and of all ways torch has, the fastest of these, the engine's error."""
    functions: dict[str, Callable[[], object]] = dict(dense_variants(network, x))
    ways = list(functions)
    functions["engine"] = lambda: engine(x)
    samples = measure(functions, seconds=0.5)
    best = min(ways, key=lambda way: samples[way].median_us)
    with torch.inference_mode():
        error = relative_error(engine(x), network(x))
    return samples, best, error


def _table(samples: dict[str, Sample], best: str) -> Table:
    rows = []
    for name, sample in samples.items():
        what = "dass.compile" if name == "engine" else f"torch, {name}"
        what += " (the fastest in torch)" if name == best else ""
        ratio = times(speedup(sample, samples["engine"]))
        rows.append((what, number(sample.median_us / 1e3), percent(sample.spread), ratio))
    return Table(("way", "ms", "spread", "over the engine"), rows)


def _report(source: str, engine: Engine, data: dict, samples: dict, sections: list) -> Report:
    compiled = samples["engine"]
    eager, best = (speedup(samples[way], compiled) for way in ("nchw", data["best"]))
    who = "1 thread" if data["threads"] == 1 else f"{data['threads']} threads"
    figures = [
        (f"{number(compiled.median_us / 1e3)} ms", f"a batch of {data['batch']}, {who}"),
        (times(eager), f"as fast as the model in torch, {times(best)} over torch's fastest way"),
        (
            f"{data['error']:.1g}",
            "at most off the model in torch, in parts of its largest output",
        ),
        (megabytes(data["file_bytes"]), f"in {data['file']}"),
    ]
    intro = [
        f"Compiled in {data['compile_seconds']:.1f} s for {engine.isa}. "
        f'Run it with dass.load_engine("{data["file"]}").'
    ]
    return Report(f"dass compile: {Path(source).name}", intro, figures, sections, data)
