"""What ``dass evaluate`` and ``dass bench`` do: measure a network on this machine, and report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from rich.console import Console
from torch import nn

from dass.convert import LEAST_ZEROS, densify, sparsify
from dass.display import Display
from dass.engine_report import evaluate_engine
from dass.latency import compare_layers, compare_networks
from dass.pruning import prune
from dass.report import Report, Section, machine_table
from dass.runs import UserError, model_file
from dass.sealed import ENGINE, kind_of
from dass.sources import (
    build_network,
    check_fit,
    count_weights,
    input_shape,
    load_data,
    load_model,
    plain_bytes,
    run_on,
    user_model,
)
from dass.surgery import copy_model
from dass.tables import (
    busy,
    count_of,
    layer_plot,
    layer_table,
    megabytes,
    network_plot,
    network_table,
    percent,
    ways_table,
)
from dass.timing import machine_facts
from dass.training import evaluate

__all__ = ["bench_model", "evaluate_model"]


def evaluate_model(
    source: str,
    console: Console,
    *,
    data: str | None = None,
    size: int | None = None,
    model: str | None = None,
    shape: tuple[int, ...] | None = None,
    batches: Sequence[int] = (1,),
    num_threads: int = 1,
    seconds: float = 0.3,
) -> Report:
    """Accuracy, nonzeros, size on disk and latency of a saved network.

    Args:
        source: a run folder or a file of ``dass.save``; or of ``engine.save``, for which see
            :func:`dass.engine_report.evaluate_engine`.
        data, size: None: no accuracy.
        model: "package.module:function", for a network that is not of the zoo.
        shape: of one input to time, without the batch. Default: the images', or the zoo network's.
        batches: batch sizes to time; none: no latency.
    """
    if kind_of(model_file(source)) is ENGINE:
        if model or shape:
            raise UserError(f"{source} is an engine's file: it needs neither --model nor --input")
        timing = {"batches": batches, "num_threads": num_threads, "seconds": seconds}
        return evaluate_engine(source, console, data=data, size=size, **timing)
    network = load_model(source, model).eval()
    counts = count_weights(network)
    zeros = 1 - counts["nonzeros"] / max(counts["weights"], 1)
    found = {"source": str(source), **counts, "file_bytes": model_file(source).stat().st_size}
    found["dense_bytes"] = plain_bytes(network)
    figures = [
        (f"{counts['nonzeros']:,}", f"nonzeros of {counts['weights']:,} ({percent(zeros)} zeros)"),
        (megabytes(found["file_bytes"]), f"on disk; dense {megabytes(found['dense_bytes'])}"),
    ]
    stages = {"accuracy": 5} if data is not None else {}
    stages |= {f"latency, batch {batch}": 10 for batch in batches}
    networks = []
    with Display(stages, console) as display:
        if data is not None:
            with display.stage("accuracy"):
                test = load_data(data, train=False, size=size)
                check_fit(network, test)
                result = evaluate(network, test)
            shape = shape or test.shape
            found |= {"accuracy": result.accuracy, "data": test.name, "images": len(test)}
            figures.insert(0, (percent(result.accuracy), f"of {len(test):,} test images right"))
        shape = shape or input_shape(network)
        if batches and shape is None:
            raise UserError("--input is needed for the latency, such as --input 3x224x224")
        for batch in batches:
            with display.stage(f"latency, batch {batch}"):
                x = _random_input(batch, shape)
                run_on(network, x, "an input of that shape")
                rivals = {percent(zeros, 0): network} if zeros >= LEAST_ZEROS else {}
                taken = compare_networks(
                    densify(network), rivals, x, seconds=seconds, num_threads=num_threads
                )
            networks.append((f"batch {batch}", taken))
    found |= {"latency": [taken for _, taken in networks], "threads": num_threads}
    sections = []
    if networks:
        sections = [_whole_network(networks, num_threads), _machine_section()]
    return Report(f"dass evaluate: {source}", (), figures, sections, found)


def bench_model(
    name: str,
    console: Console,
    *,
    sparsities: Sequence[float],
    batches: Sequence[int],
    shape: tuple[int, ...] | None = None,
    rule: Mapping[str, object] | None = None,
    num_threads: int = 1,
    seconds: float = 0.1,
) -> Report:
    """Times every layer of a network and the whole of it, dense and at some sparsities.

    Args:
        name: a zoo network or "package.module:function" that returns an nn.Module. One that comes
            with zeros is also timed as it is.
        shape: of one input, without the batch; None: the zoo network's.
        rule: keywords of ``dass.prune``.
    """
    dense, shape = _named_model(name, shape)
    for batch in batches:
        run_on(dense, _random_input(batch, shape), "an input of that shape")
    rivals = _rivals(dense, sparsities, rule or {})
    dense = densify(dense)
    results, networks, sections = {}, [], []
    timing = {"num_threads": num_threads, "seconds": seconds}
    with Display({f"batch {batch}": 1.0 for batch in batches}, console) as display:
        for batch in batches:
            with display.stage(f"batch {batch}") as tell:
                x = _random_input(batch, shape)
                tell(0.0, "whole network")
                network = compare_networks(dense, rivals, x, **timing)
                rows = compare_layers(dense, rivals, x, on_row=_on_row(tell), **timing)
            networks.append((f"batch {batch}", network))
            results[str(batch)] = {"network": network, "layers": rows}
            title = f"Layers, batch {batch}"
            text = ["Microseconds per call, each layer alone."]
            sections.append(Section(title, text, [layer_table(rows), layer_plot(rows, title)]))
    sections = [_whole_network(networks, num_threads), *sections, _machine_section()]
    data = {"model": name, "threads": num_threads, "batches": results, "machine": machine_facts()}
    threads = count_of(num_threads, "thread")
    return Report(f"dass bench: {name}", [f"float32, {threads}."], (), sections, data)


def _on_row(tell: Callable[[float, str], None]) -> Callable[[int, int, str], None]:
    return lambda i, count, layer: tell(0.4 + 0.6 * i / count, layer)


def _rivals(
    dense: nn.Module, sparsities: Sequence[float], rule: Mapping[str, object]
) -> dict[str, nn.Module]:
    counts, rivals = count_weights(dense), {}
    zeros = 1 - counts["nonzeros"] / max(counts["weights"], 1)
    if zeros >= LEAST_ZEROS:
        rivals["as it is"], _ = sparsify(dense, None, policy="always")
    for sparsity in sparsities:
        rivals[f"{100 * sparsity:.4g} %"] = pruned = copy_model(dense)
        try:
            prune(pruned, sparsity, **rule)
        except ValueError as error:
            raise UserError(str(error)) from None
    return rivals


def _named_model(name: str, shape: tuple[int, ...] | None) -> tuple[nn.Module, tuple[int, ...]]:
    if ":" in name:
        model = user_model(name).eval()
        shape = shape or input_shape(model)
        if shape is None:
            raise UserError(f"{name} needs --input, such as --input 3x224x224")
        return model, shape
    model = build_network(name, None, shape[0] if shape else 3, {}, seed=0).eval()
    return model, shape or input_shape(model)


def _random_input(batch: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


def _whole_network(networks, num_threads: int) -> Section:
    threads = count_of(num_threads, "thread")
    text = [
        f"Milliseconds, {threads}, BatchNorm folded on both sides. Dense is torch's fastest form "
        "(* below), to which the ratios are. Sparse is dass.sparsify(policy='auto').",
    ]
    if warning := busy([result for _, result in networks]):
        text.append(warning)
    items = [network_table(networks), ways_table(networks), network_plot(networks, "Whole network")]
    return Section("Whole network", text, items)


def _machine_section() -> Section:
    return Section("This machine", items=[machine_table(machine_facts())])
