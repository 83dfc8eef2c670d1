"""What ``dass evaluate`` says of an engine's file: accuracy, weights, size, latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from dass.display import Display
from dass.engine.compiler import Engine, load_engine
from dass.engine.graph import Conv, Linear
from dass.report import Report, Section, Table, machine_table
from dass.runs import UserError
from dass.sources import check_fit, load_data
from dass.tables import count_of, megabytes, number, percent
from dass.timing import Sample, machine_facts, measure
from dass.training import evaluate

__all__ = ["evaluate_engine"]


class _Module(nn.Module):
    """An engine where a module is asked for; inputs that it does not take are the user's error."""

    def __init__(self, engine: Engine):
        super().__init__()
        self.engine = engine

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.engine(x)
        except ValueError as error:
            raise UserError(f"the engine does not take these images: {error}") from None


def evaluate_engine(
    source: str,
    console: Console,
    *,
    data: str | None = None,
    size: int | None = None,
    batches: Sequence[int] = (1,),
    num_threads: int = 1,
    seconds: float = 0.3,
) -> Report:
    """Accuracy, nonzeros, size on disk and latency of what ``engine.save`` wrote.

    Args:
        data, size: see :func:`dass.data.load`; None: no accuracy.
        batches: batch sizes to time; none: no latency.

    Raises:
        UserError: images or batches that the engine does not take. FileError, DataError.
    """
    engine = load_engine(source)
    network, counts = _Module(engine), _counts(engine)
    zeros = 1 - counts["nonzeros"] / max(counts["weights"], 1)
    found = {"source": str(source), **counts, "file_bytes": Path(source).stat().st_size}
    figures = [
        (f"{counts['nonzeros']:,}", f"nonzeros of {counts['weights']:,} ({percent(zeros)} zeros)"),
        (f"{counts['dead_channels']:,}", "channels were taken out when it was compiled"),
        (megabytes(found["file_bytes"]), "on disk"),
    ]
    stages = {"accuracy": 5} if data is not None else {}
    samples: dict[int, Sample] = {}
    with Display({**stages, **({"latency": 5} if batches else {})}, console) as display:
        if data is not None:
            with display.stage("accuracy"):
                test = load_data(data, train=False, size=size)
                check_fit(network, test)
                result = evaluate(network, test)
            found |= {"accuracy": result.accuracy, "data": test.name, "images": len(test)}
            figures.insert(0, (percent(result.accuracy), f"of {len(test):,} test images right"))
        if batches:
            with display.stage("latency"):
                samples = _latency(network, batches, num_threads, seconds)
    found["latency"] = {str(batch): sample.to_dict() for batch, sample in samples.items()}
    found["threads"] = num_threads
    sections = []
    if samples:
        sections = [_section(samples, num_threads)]
        sections.append(Section("This machine", items=[machine_table(machine_facts())]))
    shape = "x".join(map(str, engine.graph.nodes[0].shape))
    intro = [f"An engine for inputs of {shape}, {engine.precision}, {engine.isa}."]
    return Report(f"dass evaluate: {source}", intro, figures, sections, found)


def _counts(engine: Engine) -> dict[str, int]:
    """Of the layers and channels that are left."""
    weights = [node.weight for node in engine.graph if isinstance(node, (Conv, Linear))]
    return {
        "weights": sum(weight.numel() for weight in weights),
        "nonzeros": sum(int(weight.count_nonzero()) for weight in weights),
        "dead_channels": sum(engine.removed.channels.values()),
    }


def _latency(
    network: _Module, batches: Sequence[int], num_threads: int, seconds: float
) -> dict[int, Sample]:
    shape = network.engine.graph.nodes[0].shape
    images = {
        batch: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
        for batch in batches
    }
    calls = {str(batch): lambda x=x: network(x) for batch, x in images.items()}
    samples = measure(calls, seconds=seconds, num_threads=num_threads)
    return {int(batch): sample for batch, sample in samples.items()}


def _section(samples: dict[int, Sample], num_threads: int) -> Section:
    rows = [
        (
            str(batch),
            number(sample.median_us / 1e3),
            number(1e6 * batch / sample.median_us),
            percent(sample.spread),
        )
        for batch, sample in samples.items()
    ]
    table = Table(("batch", "ms", "images per s", "spread"), rows)
    return Section("Time of a call", [f"Milliseconds, {count_of(num_threads, 'thread')}."], [table])
