"""The command line: ``dass demo | search | sparse | train | prune | finetune | ...``.

Exit codes: 0 done, 1 the program's fault, 2 the user's, with one line that says what to change, 130
after Ctrl-C, with everything kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dass.options import (
    RUN_HELP,
    Batches,
    BenchThreads,
    Data,
    Deterministic,
    Exclude,
    Fresh,
    Input,
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

app = typer.Typer(
    name="dass",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The console script."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        import dass

        typer.echo(f"dass {dass.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    """Sparse convolutional networks that are really faster: train, prune, measure."""


@app.command()
def demo(
    data: Data = "auto",
    run: Annotated[Path, typer.Option(help=RUN_HELP)] = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A tenth of everything, to see that it works.")
    ] = False,
    threads: Threads = None,
    seed: Seed = 0,
    fresh: Fresh = False,
) -> None:
    """Train, prune and fine-tune a small ResNet-18 on real images, and time it run sparse.

    Takes some minutes on two cores. Broken off, the same command goes on where it stopped.

    Example: **dass demo --data cifar10 --run runs/mine**
    """
    with session() as console:
        from dataclasses import replace

        from dass import arguments
        from dass.demo import QUICK, DemoSettings, run_demo
        from dass.demo_report import demo_report

        settings = replace(
            QUICK if quick else DemoSettings(),
            data=data,
            threads=arguments.at_least_one(threads),
            seed=seed,
        )
        results = run_demo(settings, run, console, fresh=fresh)
        publish(demo_report(results), run, console)


@app.command()
def search(
    preset: Annotated[
        str, typer.Option(help="paper, affordable, small (hours on two cores) or smoke (minutes).")
    ] = "small",
    data: Data = "auto",
    strategy: Annotated[str | None, typer.Option(help="dass, one_loop, darts or random.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the weights to keep, in (0, 1].")
    ] = None,
    densities: Annotated[
        str | None, typer.Option(help="Densities for the search to choose from, with commas.")
    ] = None,
    epochs: Annotated[
        str | None, typer.Option(help="Of pre-training, pruning and fine-tuning, such as 50,20,50.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    second_order: Annotated[
        bool | None, typer.Option(help="Differentiate through a step of the weights.")
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="As dass prune --pattern.")] = None,
    exclude: Exclude = None,
    latency_weight: Annotated[
        float, typer.Option(help="Price of the expected time against the loss.")
    ] = 0.0,
    latency_table: Annotated[
        Path | None, typer.Option(help="A file of dass latency-table, for the price of time.")
    ] = None,
    latency_limit: Annotated[
        float | None,
        typer.Option(help="Most time that the operations found may take, in microseconds."),
    ] = None,
    nonzero_limit: Annotated[
        int | None, typer.Option(help="Most weights that the operations found may have.")
    ] = None,
    guard: Annotated[
        str | None, typer.Option(help="At a sign of collapse: warn, stop, off.")
    ] = None,
    selection: Annotated[
        str | None,
        typer.Option(
            help="What picks operations at the end: alpha, perturbation (the loss without each), "
            "guarded (perturbation at a sign of collapse)."
        ),
    ] = None,
    size: Size = None,
    limit: Limit = None,
    run: Annotated[Path | None, typer.Option(help=RUN_HELP + " Default: runs/search.")] = None,
    threads: Threads = None,
    seed: Seed = 0,
    fresh: Fresh = False,
) -> None:
    """Search an architecture that lives well with few weights (DASS).

    Ends in a folder with genotype.json, cells.svg and report.html. Broken off, even killed, the
    same command goes on and ends as if nothing had happened. With torchrun it uses all processes.

    Example: **dass search --preset smoke --data digits --run runs/first-search**
    """
    with session() as console:
        from dass import arguments
        from dass.search_run import search_run

        given = {
            "strategy": strategy,
            "density": density,
            "densities": arguments.densities(densities),
            "epochs": arguments.epochs(epochs),
            "batch_size": batch_size,
            "second_order": second_order,
            "pattern": pattern,
            "exclude": tuple(exclude) if exclude else None,
            "guard": guard,
            "selection": selection,
            "size": size,
            "limit": limit,
            "latency_table": str(latency_table) if latency_table else None,
            "latency_limit_us": latency_limit,
            "nonzero_limit": nonzero_limit,
        }
        changes = {key: value for key, value in given.items() if value is not None}
        config = arguments.search(
            preset, dataset=data, seed=seed, latency_weight=latency_weight, **changes
        )
        folder = run or Path("runs/search")
        with on_threads(threads), arguments.processes():
            report = search_run(config, folder, console, fresh=fresh)
        publish(report, folder, console)


@app.command()
def latency_table(
    out: Annotated[Path, typer.Option(help="The table's file.")] = Path("runs/latency.json"),
    preset: Annotated[str, typer.Option(help="Of the search that the table is for.")] = "small",
    shape: Input = "3x32x32",
    threads: BenchThreads = 1,
) -> None:
    """Time the search space's operations on this machine, dense and sparse, for dass search.

    Holds for this machine, build and number of threads; what is there already is not timed again.

    Example: **dass latency-table --preset small --out runs/latency.json**
    """
    with session() as console:
        from dass import arguments
        from dass.latency_table import fill_table

        config = arguments.search(preset)
        count = arguments.at_least_one(threads)
        table = fill_table(config, arguments.shape(shape), out, count, console)
        console.print(f"{len(table.rows)} blocks in {out}")


@app.command()
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


@app.command()
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


@app.command()
def prune(
    source: Source,
    sparsity: Annotated[float, typer.Option(help="Share of zeros, in [0, 1).")] = 0.9,
    method: Annotated[str, typer.Option(help="magnitude or random.")] = "magnitude",
    scope: Scope = "uniform",
    pattern: Pattern = "unstructured",
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


@app.command()
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


@app.command()
def evaluate(
    source: Source,
    data: OptionalData = None,
    batches: Batches = "1,16",
    threads: BenchThreads = 1,
    latency: Annotated[bool, typer.Option(help="Measure the latency too.")] = True,
    shape: Input = None,
    model: Model = None,
    size: Size = None,
    out: Annotated[Path | None, typer.Option(help="A folder for the report.")] = None,
) -> None:
    """Accuracy, nonzeros, size on disk and latency of a saved network.

    Example: **dass evaluate runs/r20-90 --batches 1,16**
    """
    with session() as console:
        from dass import arguments
        from dass.measurements import evaluate_model
        from dass.runs import model_file

        model_file(source)
        data, size, _ = inherit(source, data, size, None)
        report = evaluate_model(
            source,
            console,
            data=data,
            size=size,
            model=model,
            shape=arguments.shape(shape),
            batches=arguments.numbers(batches, "--batches") if latency else (),
            num_threads=arguments.at_least_one(threads),
        )
        publish(report, out, console)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("runs/plot"),
) -> None:
    """Plot accuracy against nonzeros of several runs.

    Example: **dass plot runs/r20 runs/r20-90 runs/r20-95**
    """
    with session() as console:
        from dass.pareto import pareto_report

        publish(pareto_report(runs), out, console)


@app.command()
def bench(
    network: Annotated[
        str, typer.Argument(help="A network of the zoo, or your own as package.module:function.")
    ],
    sparsities: Annotated[
        str, typer.Option(help="Shares of zeros to try, with commas.")
    ] = "0.8,0.9,0.95",
    batches: Batches = "1",
    shape: Input = None,
    threads: BenchThreads = 1,
    scope: Scope = "uniform",
    pattern: Pattern = "unstructured",
    exclude: Exclude = None,
    seconds: Annotated[float, typer.Option(help="Least time per measured function.")] = 0.1,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report. Default: runs/bench-NETWORK.")
    ] = None,
) -> None:
    """Time your own network on this machine: each layer dense, in torch's fastest form, and sparse.

    A network that has zeros already is timed as it is too.

    Example: **dass bench mynets.vision:build --input 3x224x224 --sparsities 0.9,0.95**
    """
    with session() as console:
        from dass import arguments
        from dass.measurements import bench_model

        report = bench_model(
            network,
            console,
            sparsities=arguments.shares(sparsities, "--sparsities"),
            batches=arguments.numbers(batches, "--batches"),
            shape=arguments.shape(shape),
            rule={"scope": scope, "pattern": pattern, "exclude": exclude or []},
            num_threads=arguments.at_least_one(threads),
            seconds=seconds,
        )
        folder = out or Path("runs") / f"bench-{network.replace(':', '.')}"
        publish(report, folder, console)
