"""The command line: ``dass demo | search | sparse | train | prune | finetune | ...``.

Exit codes: 0 done, 1 the program's fault, 2 the user's, with one line that says what to change, 130
after Ctrl-C, with everything kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dass.cli_search import latency_table, search
from dass.cli_training import finetune, prune, sparse, train
from dass.options import (
    RUN_HELP,
    Batches,
    BenchThreads,
    Data,
    Exclude,
    Fresh,
    Input,
    Model,
    OptionalData,
    Pattern,
    Scope,
    Seed,
    Size,
    Source,
    Threads,
)
from dass.session import inherit, publish, session

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


for command in (search, latency_table, train, sparse, prune, finetune):
    app.command()(command)


@app.command()
def evaluate(
    source: Annotated[
        str, typer.Argument(help="A run folder, or a file of dass.save or of dass compile.")
    ],
    data: OptionalData = None,
    batches: Batches = "1,16",
    threads: BenchThreads = 1,
    latency: Annotated[bool, typer.Option(help="Measure the latency too.")] = True,
    shape: Input = None,
    model: Model = None,
    size: Size = None,
    out: Annotated[Path | None, typer.Option(help="A folder for the report.")] = None,
) -> None:
    """Accuracy, nonzeros, size on disk and latency of a saved network, or of an engine's file.

    A network is compared with the same one dense; an engine, which holds no other, stands alone.

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
def export(
    source: Source,
    to: Annotated[str, typer.Option("--to", help="onnx, onnx-sparse or torch.")] = "onnx",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The file. Default: beside the network's, as .onnx, .pt2."
        ),
    ] = None,
    fold: Annotated[
        bool, typer.Option("--fold", help="Merge each BatchNorm into the convolution before it.")
    ] = False,
    opset: Annotated[int, typer.Option(help="Of ONNX, 18 or later.")] = 18,
    batch: Annotated[
        int | None, typer.Option(help="Fix the batch size. Default: any.", show_default=False)
    ] = None,
    shape: Input = None,
    size: Annotated[
        int | None, typer.Option(help="Height and width of the images. Default: as trained.")
    ] = None,
    model: Model = None,
) -> None:
    """Write a saved network to a file for another runtime, and say what that does with the zeros.

    **onnx**: dense weights with exact zeros, which every ONNX runtime reads. ONNX Runtime and
    OpenVINO multiply the zeros: pruning makes nothing faster there. MNN's converter looks for them.
    **onnx-sparse**: the kept weights and where they are, a smaller file from two thirds of zeros
    on. ONNX Runtime reads it and makes it dense; OpenVINO and MNN refuse it. **torch**: a program
    for torch.export.load and what builds on it, dense.

    The file is run and compared with the network before it is put in place. ONNX needs
    **pip install dass\\[export]**. To run the zeros fast stay in PyTorch: **dass bench** shows what
    that gives.

    Example: **dass export runs/r20-90 --to onnx-sparse -o r20-90.onnx**
    """
    with session() as console:
        from dass import arguments
        from dass.export_run import export_network

        report = export_network(
            source,
            out,
            format=to,
            fold=fold,
            opset=opset,
            batch=batch,
            shape=arguments.shape(shape),
            size=inherit(source, None, size, None)[1],
            model=model,
        )
        publish(report, None, console)


@app.command()
def compile(
    source: Source,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The engine's file. Default: beside the network's."),
    ] = None,
    shape: Input = None,
    size: Annotated[
        int | None, typer.Option(help="Height and width of the images. Default: as trained.")
    ] = None,
    batch: Annotated[
        int, typer.Option(help="Images per call to tune for; any number can be run.")
    ] = 1,
    threads: BenchThreads = 1,
    tune: Annotated[
        bool, typer.Option(help="Measure which kernels are fastest here (seconds).")
    ] = True,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show every step: its kernel, and why that one.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show the time of every step.")
    ] = False,
    model: Model = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="A folder for the report.")
    ] = None,
) -> None:
    """Compile a saved network for this machine, and compare it with the model in torch.

    BatchNorms are folded, channels that nothing depends on are removed, and each layer gets the
    kernel that is fastest in this network here, at float32. The file holds the network and what was
    measured, no code: **dass.load_engine(FILE)** runs it, without the model's class, and on another
    machine it is tuned anew. What was measured is remembered in ~/.cache/dass/kernels.json
    (**DASS_CACHE**), so a second time is quick.

    Example: **dass compile runs/r20-90 -o r20-90.engine --batch 1 --explain**
    """
    with session() as console:
        from dass import arguments
        from dass.compile_run import compile_network

        found = compile_network(
            source,
            out,
            batch=batch,
            shape=arguments.shape(shape),
            size=inherit(source, None, size, None)[1],
            num_threads=arguments.at_least_one(threads),
            tune=tune,
            explain=explain,
            profile=profile,
            model=model,
        )
        publish(found, report, console)


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
