"""The command line: ``dass demo | train | prune | evaluate | bench``.

Exit codes: 0 done, 1 the program's fault, 2 the user's, with one line that says what to change, 130
after Ctrl-C, with everything kept.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    name="dass",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_RUN_HELP = "The run's folder."
_DATA_HELP = (
    "auto, cifar10, fashion_mnist, digits, synthetic, or a path: a folder of class folders with "
    "images, or a file of CIFAR-10. auto is CIFAR-10, or scikit-learn's digits where that cannot "
    "be had."
)
Data = Annotated[str, typer.Option(help=_DATA_HELP)]
OptionalData = Annotated[
    str | None, typer.Option(help=_DATA_HELP + " Default: what the network was trained on.")
]
Size = Annotated[int | None, typer.Option(help="Scale the images to this height and width.")]
Limit = Annotated[int | None, typer.Option(help="Use at most so many training images.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: drop what the run has so far.")]
Threads = Annotated[int | None, typer.Option(help="Threads to train with. Default: torch's.")]
BenchThreads = Annotated[int, typer.Option(help="Threads to measure with.")]
Seed = Annotated[int, typer.Option(help="Of weights, order and augmentation.")]
Source = Annotated[str, typer.Argument(help="A run folder or a file of dass.save.")]
Batches = Annotated[str, typer.Option(help="Batch sizes to measure, with commas between them.")]
Model = Annotated[
    str | None,
    typer.Option(help="package.module:function that builds the network, if it is not of the zoo."),
]
Input = Annotated[
    str | None, typer.Option("--input", help="Shape of one input, such as 3x224x224.")
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(help="Leave dense: a glob of layer names, or depthwise, first, last. Repeatable."),
]
Scope = Annotated[str, typer.Option(help="uniform, erk, global or lamp.")]
Pattern = Annotated[str, typer.Option(help="unstructured, 4x1, 8x1, 16x1, 16x2, 32x2, 2:4, n:m.")]


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
    run: Annotated[Path, typer.Option(help=_RUN_HELP)] = Path("runs/demo"),
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
    with _session() as console:
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
        _publish(demo_report(results), run, console)


@app.command()
def train(
    network: Annotated[str, typer.Argument(help="A network of the zoo, such as resnet20.")],
    data: Data = "auto",
    run: Annotated[Path | None, typer.Option(help=_RUN_HELP + " Default: runs/NETWORK.")] = None,
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
    fresh: Fresh = False,
) -> None:
    """Train a network of the zoo on images; SGD with a cosine schedule, dense.

    Ends in a folder with model.safetensors and report.html. Broken off, the same command goes on.

    Example: **dass train resnet20 --data cifar10 --epochs 30 --run runs/r20**
    """
    with _session() as console:
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
        with _threads(threads):
            report = train_run(
                network,
                folder,
                config,
                console,
                data=data,
                size=size,
                limit=limit,
                overrides=overrides,
                fresh=fresh,
            )
        _publish(report, folder, console)


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
        Path | None, typer.Option(help=_RUN_HELP + " Default: runs/SOURCE-SPARSITY.")
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
    with _session() as console:
        from dass import arguments
        from dass.commands import prune_run
        from dass.runs import UserError, model_file

        file = model_file(source)
        data, size, limit = _inherit(source, data, size, limit)
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
        with _threads(threads):
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
        _publish(report, folder, console)


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
    with _session() as console:
        from dass import arguments
        from dass.measurements import evaluate_model
        from dass.runs import model_file

        model_file(source)
        data, size, _ = _inherit(source, data, size, None)
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
        _publish(report, out, console)


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
    with _session() as console:
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
        _publish(report, folder, console)


@contextlib.contextmanager
def _session() -> Iterator[Console]:
    """A console, the package's messages on it, and errors as one line and an exit code."""
    from rich.logging import RichHandler

    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    log = logging.getLogger("dass")
    handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False)
    said: set[str] = set()  # both parts of a data set may say the same
    handler.addFilter(lambda r: r.getMessage() not in said and not said.add(r.getMessage()))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with _errors():
            yield console
    finally:
        log.removeHandler(handler)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    from dass.data import DataError
    from dass.files import FileError
    from dass.runs import UserError
    from dass.training import CheckpointError, TrainingError

    err = Console(stderr=True, soft_wrap=True)
    try:
        yield
    except (UserError, DataError, FileError, CheckpointError, TrainingError, OSError) as error:
        words = " ".join(str(error).split())
        err.print(f"[red]error:[/] {escape(words)}", highlight=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        err.print("stopped; what was done is kept, and the same command goes on from there")
        raise typer.Exit(130) from None


def _publish(report, folder: Path | None, console: Console) -> None:
    from dass.report import print_report, save_report

    print_report(report, console)
    if folder is not None:
        paths = save_report(report, folder)
        console.print(f"\nreport: {paths['html']} (also .md and .json)", soft_wrap=True)


def _inherit(source: str, data: str | None, size: int | None, limit: int | None):
    """What the run of the source was on, where the command says nothing."""
    from dass.runs import run_settings

    found = run_settings(source)
    if data is None and found.get("data") is not None:
        data, size = found["data"], size or found.get("size")
        limit = limit or found.get("limit")
    return data, size, limit


def _threads(count: int | None):
    from dass import arguments
    from dass.timing import threads

    return threads(arguments.at_least_one(count))
