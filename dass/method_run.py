"""``dass sparse``: a sparse network from nothing, stage by stage, in one run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from dass.display import Display
from dass.distributed import on_rank_zero
from dass.files import load, save
from dass.images import ImageDataset
from dass.logs import RunLog
from dass.methods import METHODS, RECIPES, Stage, run_stage, stages_of
from dass.report import Report, Section, Table
from dass.runs import RunFolder, UserError
from dass.sources import build_network, check_fit, count_weights, is_folder, load_data, plain_bytes
from dass.tables import count_of, curves, deterministic_line, megabytes, percent, times
from dass.training import Progress

__all__ = ["method_run"]


def method_run(
    network: str,
    folder: Path,
    console: Console,
    *,
    method: str,
    sparsity: float,
    recipe: str,
    data: str,
    rule: Mapping[str, object],
    overrides: Mapping[str, object],
    size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    deterministic: bool = False,
    fresh: bool = False,
) -> Report:
    """Trains a network of the zoo by a method of :mod:`dass.methods`; a rerun goes on.

    The accuracy reported is the last epoch's, at a number of nonzeros that was counted.
    deterministic: noted in settings and report; :func:`dass.session.deterministic` does it.

    Raises:
        UserError: an unknown word, or another run's folder. DataError: no images.
    """
    _stages(method, recipe, sparsity, rule, seed)  # before any reading
    lazy = RECIPES[recipe].pretrain.resized_crop
    if size is None and is_folder(data):
        size = RECIPES[recipe].size
    settings = {"command": "train", "network": network, **overrides, "method": method}
    settings |= {"sparsity": sparsity, "recipe": recipe, **rule, "seed": seed}
    settings |= {"data": data, "size": size, "limit": limit, "deterministic": deterministic}
    images = load_data(data, train=True, size=size, limit=limit, lazy=lazy)
    test = load_data(data, train=False, size=size, lazy=lazy)
    model = build_network(network, len(images.classes), images.shape[0], overrides, seed)
    own = model.edge_densities() if hasattr(model, "edge_densities") else {}
    stages = _stages(method, recipe, sparsity, {**rule, "densities": own} if own else rule, seed)
    check_fit(model, images)
    run = RunFolder(folder, settings, fresh)
    results = {stage.name: run.stage(stage.name) for stage in stages}
    done = [name for name, result in results.items() if result is not None]
    if done:
        console.print(f"going on in {folder}: {', '.join(done)} done")
        model = load(run.path / f"{done[-1]}.safetensors", model)
    epochs = {stage.name: float(stage.config.epochs) for stage in stages}
    with Display(epochs, console) as display:
        for stage in stages:
            if results[stage.name] is not None:
                display.skip(stage.name)
                continue
            results[stage.name] = _one_stage(model, stage, images, test, run, display)
    file = run.path / f"{stages[-1].name}.safetensors"
    model = load(file, model)
    on_rank_zero(lambda: save(model, run.path / "model.safetensors"))
    facts = {
        "file_bytes": file.stat().st_size,
        "dense_bytes": plain_bytes(model),
        **count_weights(model),
    }
    return _report(network, run, method, images, results, facts)


def _stages(method: str, recipe: str, sparsity: float, rule: Mapping, seed: int) -> list[Stage]:
    if recipe not in RECIPES:
        raise UserError(f"--recipe {recipe}: unknown; known: {', '.join(RECIPES)}")
    if method not in METHODS:
        raise UserError(f"--method {method}: unknown; known: {', '.join(METHODS)}")
    try:
        return stages_of(method, RECIPES[recipe], sparsity, seed=seed, **rule)
    except ValueError as error:
        raise UserError(str(error)) from None


def _one_stage(
    model: nn.Module,
    stage: Stage,
    images: ImageDataset,
    test: ImageDataset,
    run: RunFolder,
    display: Display,
) -> dict:
    def on_step(p: Progress) -> None:
        tell(p.step / p.steps, f"epoch {p.epoch}/{p.epochs}, loss {p.loss:.3f}, {p.accuracy:.1%}")

    with display.stage(stage.name) as tell, RunLog(run.path, stage.name) as log:
        try:
            done = run_stage(
                model,
                stage,
                images,
                test=test,
                checkpoint=run.path / f"{stage.name}.pt",
                on_step=on_step,
                on_epoch=log,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
    model.to(memory_format=torch.contiguous_format)
    on_rank_zero(lambda: save(model, run.path / f"{stage.name}.safetensors"))
    result = {"history": done.history, "seconds": done.seconds, **count_weights(model)}
    result = run.finish(stage.name, result)
    run.drop_checkpoints()
    accuracy = done.history[-1]["test_accuracy"]
    display.say(f"  {stage.name}: {percent(accuracy)}, {result['nonzeros']:,} nonzeros")
    return result


def _report(
    network: str,
    run: RunFolder,
    method: str,
    images: ImageDataset,
    results: Mapping[str, dict],
    facts: Mapping,
) -> Report:
    last = list(results.values())[-1]
    accuracy = last["history"][-1]["test_accuracy"]
    ratio = facts["dense_bytes"] / facts["file_bytes"]
    figures = [
        (percent(accuracy), "of the test images right after the last epoch"),
        (f"{facts['nonzeros']:,}", f"of {facts['weights']:,} weights are left"),
        (times(ratio), f"smaller on disk: {megabytes(facts['file_bytes'])}"),
    ]
    columns = ("stage", "epochs", "nonzeros", "loss", "test accuracy", "seconds")
    rows = [
        (
            name,
            str(len(result["history"])),
            f"{result['nonzeros']:,}",
            f"{result['history'][-1]['train_loss']:.3f}",
            percent(result["history"][-1]["test_accuracy"]),
            f"{result['seconds']:.0f}",
        )
        for name, result in results.items()
    ]
    plot = curves(
        {name: result["history"] for name, result in results.items()}, "Accuracy by epoch"
    )
    seconds = sum(result["seconds"] for result in results.values())
    intro = [
        f"{method} on {images.name}, {len(images):,} images; {count_of(len(results), 'stage')}, "
        f"{seconds:.0f} s of training.",
        *([deterministic_line(run.settings["seed"])] if run.settings["deterministic"] else []),
    ]
    section = Section("Stages", items=[Table(columns, rows), plot])
    data = {"settings": run.settings, "stages": dict(results), **facts}
    return Report(f"dass train: {network} by {method}", intro, figures, [section], data)
