"""What ``dass train`` and ``dass prune`` do: a run folder with a network and a report in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from dass.data import ImageDataset
from dass.display import Display
from dass.distributed import on_rank_zero
from dass.files import save
from dass.logs import RunLog
from dass.nn import SparseConv2d, SparseLinear
from dass.prune_report import PruneReport
from dass.pruning import prune
from dass.report import Report, Section, Table
from dass.runs import RunFolder, UserError
from dass.sources import (
    build_network,
    check_fit,
    count_weights,
    load_data,
    load_model,
    plain_bytes,
)
from dass.tables import count_of, curves, deterministic_line, megabytes, percent, times
from dass.training import Progress, TrainConfig, evaluate, train

__all__ = ["finetune_run", "prune_run", "train_run"]


def train_run(
    network: str,
    folder: Path,
    config: TrainConfig,
    console: Console,
    *,
    data: str,
    size: int | None = None,
    limit: int | None = None,
    overrides: Mapping[str, object] | None = None,
    deterministic: bool = False,
    fresh: bool = False,
) -> Report:
    """Trains a network of the zoo into a run folder, or goes on there.

    Args:
        data, size, limit: see :func:`dass.data.load`.
        overrides: for :func:`dass.zoo.create`, such as width.
        deterministic: noted in settings and report; :func:`dass.session.deterministic` does it.
        fresh: drop what the folder holds of an earlier run.

    Raises:
        UserError: an unknown network, or another run's folder. DataError: no images.
    """
    overrides = dict(overrides or {})
    settings = {"command": "train", "network": network, **overrides, **vars(config)}
    settings |= {"data": data, "size": size, "limit": limit, "deterministic": deterministic}
    build_network(network, None, 3, overrides, config.seed, device="meta")  # before any reading
    images, test = _both_parts(data, size, limit)
    model = build_network(network, len(images.classes), images.shape[0], overrides, config.seed)
    check_fit(model, images)
    run = RunFolder(folder, settings, fresh)
    result = run.stage("train")
    if result is None:
        result = _train(model, images, test, config, run, console)
        on_rank_zero(lambda: save(model, run.path / "model.safetensors"))
        result |= {"file_bytes": _size(run), **count_weights(model)}
        result = run.finish("train", result)
        run.drop_checkpoints()
    return Report(
        f"dass train: {network} on {result['data']}",
        [
            f"{result['images']:,} images, {count_of(config.epochs, 'epoch')} in "
            f"{result['seconds']:.0f} s; "
            f"{result['weights']:,} weights, {megabytes(result['file_bytes'])} on disk.",
            *([deterministic_line(config.seed)] if deterministic else []),
        ],
        [(percent(result["accuracy"]), f"of {result['test_images']:,} test images right")],
        [_training_section(result)],
        {"settings": run.settings, "train": result},
    )


def prune_run(
    source: str,
    folder: Path,
    sparsity: float,
    console: Console,
    *,
    rule: Mapping[str, object],
    config: TrainConfig | None = None,
    data: str | None = None,
    size: int | None = None,
    limit: int | None = None,
    model: str | None = None,
    fresh: bool = False,
) -> Report:
    """Prunes a saved network, fine-tunes it on its sparse kernels if `config` is given, saves it.

    Args:
        source: a run folder or a file of ``dass.save``.
        rule: keywords of ``dass.prune``.
        config: of the fine-tuning, which needs `data`; None: none.
        data, size, limit: for accuracy and fine-tuning; None: neither.
        model: "package.module:function", for a network that is not of the zoo.

    Raises:
        UserError, FileError, DataError: what the user can put right.
    """
    settings = {"command": "prune", "source": str(source), "sparsity": sparsity, **rule}
    settings |= {"data": data, "size": size, "limit": limit}
    settings["finetune"] = vars(config) if config else None
    network = load_model(source, model)
    images = test = None
    if data is not None:
        images, test = _both_parts(data, size, limit)
        check_fit(network, test)
    try:
        example = None if test is None else torch.zeros(1, *test.shape)
        pruning = prune(network, sparsity, **rule, example_inputs=example)
    except ValueError as error:
        raise UserError(str(error)) from None
    run = RunFolder(folder, settings, fresh)
    result = run.stage("prune")
    if result is None:
        result = {"pruning": pruning.to_dict()}
        if test is not None:
            result["before_finetuning"] = evaluate(network, test).accuracy
            if config is not None:
                result |= _train(network, images, test, config, run, console)
        on_rank_zero(lambda: save(network, run.path / "model.safetensors"))
        result |= {"file_bytes": _size(run), "dense_bytes": plain_bytes(network)}
        result = run.finish("prune", {**result, **count_weights(network)})
        run.drop_checkpoints()
    return _prune_report(source, run, pruning, result)


def finetune_run(
    source: str,
    folder: Path,
    config: TrainConfig,
    console: Console,
    *,
    data: str,
    size: int | None = None,
    limit: int | None = None,
    model: str | None = None,
    fresh: bool = False,
) -> Report:
    """Trains a saved sparse network on, its masks as they are, on the sparse kernels.

    Args:
        source: a run folder or a file of ``dass.save``.
        data, size, limit: see :func:`dass.data.load`.
        model: "package.module:function", for a network that is not of the zoo.

    Raises:
        UserError: no sparse layers, another run's folder. FileError, DataError: the file, the data.
    """
    settings = {"command": "finetune", "source": str(source), **vars(config)}
    settings |= {"data": data, "size": size, "limit": limit}
    network = load_model(source, model)
    if not any(isinstance(m, (SparseConv2d, SparseLinear)) for m in network.modules()):
        raise UserError(f"{source} has no sparse layers: dass prune makes them")
    images, test = _both_parts(data, size, limit)
    check_fit(network, images)
    run = RunFolder(folder, settings, fresh)
    result = run.stage("finetune")
    if result is None:
        before = evaluate(network, test).accuracy
        result = {"before": before, **_train(network, images, test, config, run, console)}
        on_rank_zero(lambda: save(network, run.path / "model.safetensors"))
        result |= {"file_bytes": _size(run), **count_weights(network)}
        result = run.finish("finetune", result)
        run.drop_checkpoints()
    figures = [
        (percent(result["before"]), "accuracy before"),
        (percent(result["accuracy"]), "accuracy after the last epoch"),
        (f"{result['nonzeros']:,}", f"of {result['weights']:,} weights, as before"),
    ]
    intro = [f"{count_of(config.epochs, 'epoch')} on {result['data']}, {result['seconds']:.0f} s."]
    title = f"dass finetune: {Path(source).name}"
    data = {"settings": run.settings, "finetune": result}
    return Report(title, intro, figures, [_training_section(result)], data)


def _prune_report(source: str, run: RunFolder, pruning: PruneReport, result: Mapping) -> Report:
    ratio = result["dense_bytes"] / result["file_bytes"]
    figures = [
        (f"{result['nonzeros']:,}", f"of {result['weights']:,} weights are left"),
        (times(ratio), f"smaller on disk: {megabytes(result['file_bytes'])}"),
    ]
    if "before_finetuning" in result:
        figures.append((percent(result["before_finetuning"]), "accuracy just after pruning"))
    if "accuracy" in result:
        figures.append((percent(result["accuracy"]), "accuracy after fine-tuning"))
    columns = ("layer", "shape", "weights", "kept", "density", "norm kept", "pattern")
    rows = [
        (
            " = ".join(row.names),
            "x".join(map(str, row.shape)),
            f"{row.weights:,}",
            f"{row.kept:,}",
            percent(row.density, 2),
            percent(row.norm_kept),
            row.pattern,
        )
        for row in pruning.layers
    ]
    left = "; ".join(f"{name} ({reason})" for name, reason in pruning.skipped)
    text = [f"Left dense: {left}."] if left else []
    sections = [Section("Layers", text, [Table(columns, rows)])]
    if "history" in result:
        sections.append(_training_section(result))
    title = f"dass prune: {Path(source).name} to {percent(pruning.sparsity)} zeros"
    kept = f"{percent(pruning.norm_kept)} of the norm is kept"
    intro = [f"{pruning.method}, {pruning.scope}, {pruning.pattern}: {kept}."]
    if pruning.permuted:
        intro.append(f"Channels {pruning.permuted}.")
    return Report(title, intro, figures, sections, {"settings": run.settings, "prune": result})


def _training_section(result: Mapping) -> Section:
    columns = ("epoch", "learning rate", "loss", "accuracy", "test loss", "test accuracy")
    rows = [
        (
            str(row["epoch"]),
            f"{row['lr']:.3g}",
            f"{row['train_loss']:.3f}",
            percent(row["train_accuracy"]),
            f"{row['test_loss']:.3f}",
            percent(row["test_accuracy"]),
        )
        for row in result["history"]
    ]
    plot = curves({"accuracy": result["history"]}, "Accuracy by epoch")
    return Section("Training", items=[Table(columns, rows), plot])


def _train(
    model: nn.Module,
    images: ImageDataset,
    test: ImageDataset,
    config: TrainConfig,
    run: RunFolder,
    console: Console,
) -> dict:
    if run.unfinished():
        console.print(f"going on in {run.path} from its checkpoint")

    def on_step(p: Progress) -> None:
        tell(p.step / p.steps, f"epoch {p.epoch}/{p.epochs}, loss {p.loss:.3f}, {p.accuracy:.1%}")

    stage = run.settings["command"]
    with (
        RunLog(run.path, stage) as log,
        Display({stage: 1}, console) as display,
        display.stage(stage) as tell,
    ):
        done = train(
            model,
            images,
            config,
            test=test,
            checkpoint=run.path / "checkpoint.pt",
            on_step=on_step,
            on_epoch=log,
        )
    model.to(memory_format=torch.contiguous_format)
    return {
        "data": images.name,
        "images": len(images),
        "test_images": len(test),
        "history": done.history,
        "seconds": done.seconds,
        "accuracy": done.history[-1]["test_accuracy"],
    }


def _size(run: RunFolder) -> int:
    return (run.path / "model.safetensors").stat().st_size


def _both_parts(
    data: str, size: int | None, limit: int | None
) -> tuple[ImageDataset, ImageDataset]:
    images = load_data(data, train=True, size=size, limit=limit)
    return images, load_data(data, train=False, size=size)
