"""The commands ``dass train | sparse | prune | finetune``; :mod:`dass.cli` has the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dass.options import (
    RUN_HELP,
    Data,
    Deterministic,
    Exclude,
    Fresh,
    Limit,
    Model,
    OptionalData,
    Pattern,
    Scope,
    Seed,
    Size,
    Source,
    Threads,
)
from dass.session import deterministic as determined
from dass.session import inherit, on_threads, publish, session


def train(
    network: Annotated[str, typer.Argument(help="A network of the zoo, such as resnet20.")],
    data: Data = "auto",
    run: Annotated[Path | None, typer.Option(help=RUN_HELP + " Default: runs/NETWORK.")] = None,
    width: Annotated[float, typer.Option(help="Multiplies the channel counts.")] = 1.0,
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = 30,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 64,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Of weights, not of biases.")] = 5e-4,
    label_smoothing: Annotated[float, typer.Option(help="In [0, 1).")] = 0.0,
    augment: Annotated[bool, typer.Option(help="Random crops and mirroring.")] = True,
    size: Size = None,
    limit: Limit = None,
    threads: Threads = None,
    seed: Seed = 0,
    deterministic: Deterministic = False,
    fresh: Fresh = False,
) -> None:
    """Train a network of the zoo on images; SGD with a cosine schedule, dense.

    Ends in a folder with model.safetensors and report.html. Broken off, the same command goes on.
    With torchrun it uses all processes, each for its share of every batch.

    Example: **dass train resnet20 --data cifar10 --epochs 30 --run runs/r20**
    """
    with session() as console:
        from dass import arguments
        from dass.commands import train_run

        folder = run or Path("runs") / network
        config = arguments.config(
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            weight_decay=weight_decay,
            label_smoothing=label_smoothing,
            augment=augment,
            seed=seed,
        )
        overrides = {} if width == 1.0 else {"width": width}
        with on_threads(threads), arguments.processes(), determined(deterministic, seed):
            report = train_run(
                network,
                folder,
                config,
                console,
                data=data,
                size=size,
                limit=limit,
                overrides=overrides,
                deterministic=deterministic,
                fresh=fresh,
            )
        publish(report, folder, console)


def sparse(
    network: Annotated[
        str,
        typer.Argument(help="A network of the zoo, such as dass_small, or a run of dass search."),
    ],
    method: Annotated[
        str, typer.Option(help="magnitude, gradual, hydra, snip, rigl or random.")
    ] = "hydra",
    sparsity: Annotated[float, typer.Option(help="Share of zeros, in [0, 1).")] = 0.95,
    recipe: Annotated[
        str, typer.Option(help="paper, affordable, imagenet, small (hours on two cores) or smoke.")
    ] = "small",
    data: Data = "auto",
    run: Annotated[
        Path | None, typer.Option(help=RUN_HELP + " Default: runs/NETWORK-METHOD-SPARSITY.")
    ] = None,
    scope: Annotated[
        str | None, typer.Option(help="uniform, erk, global or lamp. Default: the method's.")
    ] = None,
    pattern: Pattern = "unstructured",
    exclude: Exclude = None,
    width: Annotated[float, typer.Option(help="Multiplies the channel counts.")] = 1.0,
    channels: Annotated[
        int | None, typer.Option(help="Of the first cells, where the network is made of cells.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Number of cells, likewise.")] = None,
    size: Size = None,
    limit: Limit = None,
    threads: Threads = None,
    seed: Seed = 0,
    deterministic: Deterministic = False,
    fresh: Fresh = False,
) -> None:
    """Train a sparse network from nothing, by a method's stages, on the sparse kernels.

    Ends in a folder with model.safetensors and report.html. Broken off, the same command goes on.
    With torchrun it uses all processes, each for its share of every batch.

    Example: **dass sparse resnet20 --method rigl --sparsity 0.9 --recipe smoke**
    """
    with session() as console:
        from dass import arguments
        from dass.method_run import method_run
        from dass.sources import searched_cells

        folder = run or Path("runs") / f"{Path(network).name}-{method}-{100 * sparsity:.4g}"
        given = {"channels": channels, "layers": layers, "width": None if width == 1.0 else width}
        network, cells = searched_cells(network)
        overrides = {**cells, **{key: value for key, value in given.items() if value is not None}}
        rule = {"pattern": pattern, "exclude": exclude or []}
        with on_threads(threads), arguments.processes(), determined(deterministic, seed):
            report = method_run(
                network,
                folder,
                console,
                method=method,
                sparsity=sparsity,
                recipe=recipe,
                data=data,
                rule=rule if scope is None else {**rule, "scope": scope},
                overrides=overrides,
                size=size,
                limit=limit,
                seed=seed,
                deterministic=deterministic,
                fresh=fresh,
            )
        publish(report, folder, console)


def prune(
    source: Source,
    sparsity: Annotated[float, typer.Option(help="Share of zeros, in [0, 1).")] = 0.9,
    method: Annotated[str, typer.Option(help="magnitude or random.")] = "magnitude",
    scope: Scope = "uniform",
    pattern: Pattern = "unstructured",
    permute: Annotated[
        bool, typer.Option("--permute", help="Reorder channels so that the pattern keeps more.")
    ] = False,
    exclude: Exclude = None,
    finetune: Annotated[int, typer.Option(help="Epochs of fine-tuning; 0 for none.")] = 0,
    lr: Annotated[float, typer.Option(help="The highest learning rate of it.")] = 0.05,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 64,
    data: OptionalData = None,
    run: Annotated[
        Path | None, typer.Option(help=RUN_HELP + " Default: runs/SOURCE-SPARSITY.")
    ] = None,
    model: Model = None,
    size: Size = None,
    limit: Limit = None,
    threads: Threads = None,
    seed: Seed = 0,
    fresh: Fresh = False,
) -> None:
    """Prune a saved network, fine-tune it on its sparse kernels, and save it small.

    Example: **dass prune runs/r20 --sparsity 0.9 --exclude first --exclude last --finetune 5**
    """
    with session() as console:
        from dass import arguments
        from dass.commands import prune_run
        from dass.runs import UserError, model_file

        file = model_file(source)
        data, size, limit = inherit(source, data, size, limit)
        if finetune and data is None:
            raise UserError("--finetune needs --data: the network does not say what it learned on")
        stem = file.parent.name if file.name == "model.safetensors" else file.stem
        folder = run or Path("runs") / f"{stem}-{100 * sparsity:.4g}"
        config = (
            arguments.config(epochs=finetune, batch_size=batch_size, lr=lr, seed=seed)
            if finetune
            else None
        )
        rule = {
            "method": method,
            "scope": scope,
            "pattern": pattern,
            "permute": permute,
            "exclude": exclude or [],
            "seed": seed,
        }
        with on_threads(threads), arguments.processes():
            report = prune_run(
                source,
                folder,
                sparsity,
                console,
                rule=rule,
                config=config,
                data=data,
                size=size,
                limit=limit,
                model=model,
                fresh=fresh,
            )
        publish(report, folder, console)


def finetune(
    source: Source,
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = 5,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 0.05,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 64,
    data: OptionalData = None,
    run: Annotated[
        Path | None, typer.Option(help=RUN_HELP + " Default: runs/SOURCE-tuned.")
    ] = None,
    model: Model = None,
    size: Size = None,
    limit: Limit = None,
    threads: Threads = None,
    seed: Seed = 0,
    fresh: Fresh = False,
) -> None:
    """Train a pruned network on, its masks as they are, on the sparse kernels.

    Example: **dass finetune runs/r20-90 --epochs 10 --run runs/r20-90-tuned**
    """
    with session() as console:
        from dass import arguments
        from dass.commands import finetune_run
        from dass.runs import UserError, model_file

        file = model_file(source)
        data, size, limit = inherit(source, data, size, limit)
        if data is None:
            raise UserError("--data is needed: the network does not say what it learned on")
        stem = file.parent.name if file.name == "model.safetensors" else file.stem
        folder = run or Path("runs") / f"{stem}-tuned"
        config = arguments.config(epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
        with on_threads(threads), arguments.processes():
            report = finetune_run(
                source,
                folder,
                config,
                console,
                data=data,
                size=size,
                limit=limit,
                model=model,
                fresh=fresh,
            )
        publish(report, folder, console)
