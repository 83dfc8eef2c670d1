"""Options that several commands of the command line have."""

from __future__ import annotations

from typing import Annotated

import typer

RUN_HELP = "The run's folder."
DATA_HELP = (
    "auto, cifar10, fashion_mnist, digits, synthetic, or a path: a folder of class folders with "
    "images, or a file of CIFAR-10. auto is CIFAR-10, or scikit-learn's digits where that cannot "
    "be had."
)
Data = Annotated[str, typer.Option(help=DATA_HELP)]
OptionalData = Annotated[
    str | None, typer.Option(help=DATA_HELP + " Default: what the network was trained on.")
]
Size = Annotated[int | None, typer.Option(help="Scale the images to this height and width.")]
Limit = Annotated[int | None, typer.Option(help="Use at most so many training images.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: drop what the run has so far.")]
Threads = Annotated[int | None, typer.Option(help="Threads to train with. Default: torch's.")]
BenchThreads = Annotated[int, typer.Option(help="Threads to measure with.")]
Seed = Annotated[int, typer.Option(help="Of weights, order and augmentation.")]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic", help="The same bits in every run; refuse ops that have others."
    ),
]
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
