"""What ``dass search`` does: a run folder with the genotype, its drawing and a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from dass.display import Display, Tell
from dass.distributed import rank_and_world
from dass.drawing import draw_svg
from dass.genotype import Genotype
from dass.images import ImageDataset
from dass.logs import RunLog
from dass.report import Drawing, Plot, Report, Section, Table, machine_table, write_text
from dass.runs import RunFolder
from dass.search_cost import compare_finetuning, estimate
from dass.searching import SearchProgress, search
from dass.sources import load_data
from dass.strategies import SearchConfig, phases_of
from dass.tables import count_of, percent, times
from dass.timing import machine_facts

__all__ = ["history_section", "search_run", "searched"]

_MACHINE = ("cpu", "torch", "torch_capability", "dass", "dass_isa")


def search_run(
    config: SearchConfig, folder: Path, console: Console, *, fresh: bool = False
) -> Report:
    """Searches into a run folder, or goes on there.

    The folder ends with genotype.json, cells.svg and the report.

    Raises:
        UserError: another run's folder. DataError: no images. TrainingError: the loss is no number.
    """
    data = load_data(config.dataset, train=True, size=config.size, limit=config.limit)
    run = RunFolder(folder, {"command": "search", **asdict(config)}, fresh)
    facts = {key: value for key, value in machine_facts().items() if key in _MACHINE}
    found = run.stage("search")
    if found is None:
        found = run.finish("search", _search(config, data, run, console))
        run.drop_checkpoints()
    step = run.stage("finetuning", facts)
    if step is None and any(phase.frozen for phase in phases_of(config)):
        step = run.finish("finetuning", compare_finetuning(config, data), facts)
    genotype = Genotype.from_json(found["genotype"])
    write_text(run.path / "genotype.json", genotype.to_json())
    write_text(run.path / "cells.svg", draw_svg(genotype))
    return _report(run, config, genotype, found, step)


def _search(config: SearchConfig, data: ImageDataset, run: RunFolder, console: Console) -> dict:
    checkpoint = run.path / "checkpoint.pt"
    if checkpoint.exists():
        console.print(f"going on in {run.path} from its checkpoint")
    elif phases_of(config):
        guess = estimate(config, data)
        console.print(f"about {_duration(guess.seconds)} and {guess.bytes / 2**20:,.0f} MiB")

    with (
        Display({"search": 1}, console) as display,
        display.stage("search") as tell,
        RunLog(run.path, "search") as log,
    ):
        found = searched(config, data, checkpoint, tell, log)
        for row in found["history"]:
            for sign in row["signs"]:
                display.say(f"  epoch {row['epoch']}: {sign}")
    return found


def searched(
    config: SearchConfig,
    data: ImageDataset,
    checkpoint: Path,
    tell: Tell,
    log: Callable[[list[dict]], None] | None = None,
) -> dict:
    """Searches, and tells how far it is; -> the result as plain JSON types."""

    def on_step(p: SearchProgress) -> None:
        note = f"{p.phase} {p.epoch}/{p.epochs}, loss {p.loss:.3f}, {p.accuracy:.1%}"
        tell(p.step / p.steps, note)

    result = search(config, checkpoint=checkpoint, on_step=on_step, on_epoch=log, data=data)
    return {
        "data": data.name,
        "images": len(data),
        "genotype": result.genotype.to_json(),
        "history": result.history,
        "seconds": result.seconds,
        "stopped": result.stopped,
        "selection": result.selection,
        "processes": rank_and_world()[1],
    }


def _report(
    run: RunFolder, config: SearchConfig, genotype: Genotype, found: Mapping, step: Mapping | None
) -> Report:
    intro = [
        f"Strategy {config.strategy} at density {config.density:g} on {found['images']:,} images "
        f"of {found['data']}, half for the weights and half for the architecture; "
        f"{config.channels} channels, {count_of(config.layers, 'cell')}, "
        f"{_duration(found['seconds'])}."
    ]
    signs = [f"epoch {row['epoch']}: {sign}" for row in found["history"] for sign in row["signs"]]
    if found["stopped"]:
        intro.append(f"Stopped early. {found['stopped'].capitalize()}.")
    if found["selection"] == "perturbation":
        alphas = Genotype.from_json(found["history"][-1]["genotype"])
        intro.append(
            f"Selected by perturbation; {genotype.differences(alphas)} of 16 edges are not those "
            "of the largest alphas."
        )
    figures = []
    if step is not None:
        figures.append((times(step["speedup"]), "a fine-tuning step on sparse kernels"))
    skips = genotype.skips()
    figures.append((f"{skips['normal']} + {skips['reduce']}", "skips in the two cells"))
    sections = [Section("Cells", items=[Drawing("the cells found", draw_svg(genotype))])]
    if found["history"]:
        sections.append(history_section(found["history"], signs))
    if step is not None:
        sections.append(_step_section(step))
    sections.append(Section("Machine", items=[machine_table(machine_facts())], brief=False))
    data = {"settings": run.settings, "search": dict(found), "finetuning_step": step}
    return Report("dass search", intro, figures, sections, data)


def history_section(history: list[Mapping], signs: list[str], title: str = "History") -> Section:
    """Table and plots of a search, epoch by epoch."""
    columns = (
        *("epoch", "phase", "density", "loss", "accuracy"),
        *("val loss", "val accuracy", "entropy", "eigenvalue"),
    )
    rows = [
        (
            str(row["epoch"]),
            row["phase"],
            percent(row["density"]),
            f"{row['train_loss']:.3f}",
            percent(row["train_accuracy"]),
            _or_dash(row["val_loss"], "{:.3f}"),
            _or_dash(row["val_accuracy"], "{:.1%}"),
            f"{row['entropy']:.3f}",
            _or_dash(row["eigenvalue"], "{:.3g}"),
        )
        for row in history
    ]
    text = ["Signs of collapse: " + "; ".join(signs) + "."] if signs else []
    return Section(title, text, [Table(columns, rows), *_plots(history)])


def _plots(history: list[Mapping]) -> list[Plot]:
    def series(key: str, scale: float = 1.0) -> list[tuple[float, float]]:
        return [(row["epoch"], scale * row[key]) for row in history if row[key] is not None]

    accuracy = {"weights' half": series("train_accuracy", 100)}
    if series("val_accuracy"):
        accuracy["architecture's half"] = series("val_accuracy", 100)
    found = [Plot("lines", "Accuracy", accuracy, x_label="epoch", y_label="accuracy, %")]
    entropy = {"entropy of the alphas, nats": series("entropy")}
    found.append(Plot("lines", "How decided the architecture is", entropy, x_label="epoch"))
    if len(series("eigenvalue")) > 1:
        values = {"dominant eigenvalue": series("eigenvalue")}
        found.append(Plot("lines", "Sharpness of the architecture", values, x_label="epoch"))
    return found


def _step_section(step: Mapping) -> Section:
    columns = ("one fine-tuning step", "ms", "spread")
    names = {"packed": "sparse kernels", "masked": "masked dense"}
    rows = [
        (name, f"{step[key]['median_us'] / 1000:.1f}", percent(step[key]["spread"]))
        for key, name in names.items()
    ]
    text = [
        f"Weights' half, batch {step['batch']}, float32, {count_of(step['threads'], 'thread')}; "
        f"in turn, {count_of(step['packed']['rounds'], 'round')}. "
        f"{step['faster']} of {step['layers']} layers run on the sparse kernels."
    ]
    return Section("Fine-tuning on the sparse kernels", text, [Table(columns, rows)])


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
