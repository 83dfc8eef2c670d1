"""One pruned network of the zoo and its files, the same weights in every peer's form."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import dass
from bench.layers import seed
from bench.peers import install
from bench.peers.client import WorkerError
from dass import zoo
from dass.zoo.darts import FOUND

IMAGENET = "_imagenet"  # how the zoo ends the names of forms for large images
LARGE = 64
EXCLUDE = ("first", "depthwise", "last")
OPSET = 13
LEAST_VARIANCE = 1e-2


@dataclass
class Case:
    """A network to compare peers on.

    folder: for its files. want: the output that torch eager gives, float32 [B, classes].
    facts: which network, batch, sparsity and counts of weights, for tables and JSON.
    """

    folder: Path
    model: nn.Module
    example: Tensor
    want: Tensor
    facts: dict
    paths: dict[str, Path] = field(default_factory=dict)

    def path(self, form: str) -> Path:
        """The model's file in a form of :data:`FORMS`, written when first asked for.

        Raises:
            NotAvailable: what writes it is not set up. WorkerError: a converter failed.
        """
        if form not in self.paths:
            self.paths[form] = FORMS[form](self)
        return self.paths[form]


def zoo_name(network: str, size: int | None) -> str:
    """The zoo's form of a network for images of `size` pixels (None: as the zoo has it)."""
    large = (size or 0) >= LARGE and network + IMAGENET in zoo.list()
    return network + IMAGENET if large else network


def input_shape(network: str, size: int | None) -> tuple[int, int, int]:
    """(channels, height, width). ValueError: the zoo has no such network, or the size is none."""
    channels, height, width = zoo.input_shape(zoo_name(network, size))
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    return channels, size or height, size or width


def make(
    network: str,
    sparsity: float,
    folder: Path,
    *,
    size: int | None = None,
    batch: int = 1,
    exclude: Sequence[str] = EXCLUDE,
    width: float = 1.0,
    genotype: Path | None = None,
) -> Case:
    """Builds and prunes a network, in eval mode; uniform magnitude masks of random weights.

    Args:
        network: of the zoo, without "_imagenet", which `size` implies.
        size: height and width of the images; default the network's own.
        exclude: layers that stay dense, see :func:`dass.prune`.
        width: see :func:`dass.zoo.create`.
        genotype: of the cells of "cells", JSON; as many cells and channels as ``dass_tiny`` has.
    """
    name = zoo_name(network, size)
    options = {} if genotype is None else _cells(genotype)
    shape = (batch, *input_shape(network, size))
    generator = seed("peers", name, shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = zoo.create(name, width=width, **options).eval().requires_grad_(False)
    dass.prune(model, sparsity, exclude=exclude)
    randomize_norms(model, torch.randn((2, *shape[1:]), generator=generator), generator)
    example = torch.randn(shape, generator=generator)
    dense = dass.densify(model)
    with torch.inference_mode():
        want = dense(example)
    weights = [m.weight for m in dense.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    facts = {
        "network": name if genotype is None else f"{name} ({genotype.stem})",
        "size": shape[2],
        "batch": batch,
        "sparsity": sparsity,
        "dense_layers": list(exclude),
        "weights": sum(w.numel() for w in weights),
        "nonzeros": sum(int(w.count_nonzero()) for w in weights),
    }
    np.save(folder / "input.npy", example.numpy())
    return Case(folder, model, example, want.clone(), facts)


def _cells(genotype: Path) -> dict:
    like = FOUND["networks"]["dass_tiny"]
    size = {"channels": like["channels"], "layers": like["layers"]}
    return {"genotype": genotype.read_text(), **size}


def randomize_norms(model: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """Gives every BatchNorm statistics and parameters of its own, fit for what it reads.

    Per channel, with k uniform in [0.5, 1]: running mean k times the true one over `images`, and as
    variance the mean square about that; scale uniform in [0.5, 1.5], shift from N(0.5, 0.3). The
    signal keeps its size through all layers, and an error of 1e-3 in the input stays of that order:
    with true means and shifts about 0 a deep network of random weights magnifies it 20 times, and
    so does one that blows up channels which hardly vary: theirs counts LEAST_VARIANCE of the most.
    """

    def set_one(norm: nn.BatchNorm2d, args: tuple) -> None:
        x = args[0]
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        variance = variance.clamp_min(LEAST_VARIANCE * float(variance.max()))
        part = torch.empty_like(mean).uniform_(0.5, 1, generator=generator)
        norm.running_mean.copy_(part * mean)
        norm.running_var.copy_(variance + ((1 - part) * mean).square())
        if norm.affine:
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(0.5, 0.3, generator=generator)

    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(set_one) for norm in norms]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()


def _to_dass(case: Case) -> Path:
    path = case.folder / "model.safetensors"
    dass.save(case.model, path)
    return path


def _to_engine(case: Case) -> Path:
    """Compiled for the example's batch and torch's present threads, and saved."""
    path = case.folder / "model.engine"
    dass.compile(case.model, case.example).save(path)
    return path


def _to_onnx(case: Case) -> Path:
    install.import_onnx()
    path = case.folder / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter's end is announced at every call
        torch.onnx.export(
            dass.densify(case.model),
            (case.example,),
            path,
            input_names=["input"],
            output_names=["output"],
            opset_version=OPSET,
            dynamo=False,
        )
    return path


def _to_mnn(case: Case) -> Path:
    """Zeros are looked for in conversion. MNN's own command reports its use; this does not."""
    path = case.folder / "model.mnn"
    code = "import sys, _tools; _tools.mnnconvert(sys.argv)"
    command = [str(install.python("mnn")), "-c", code, "-f", "ONNX", "--bizCode", "dass"]
    command += ["--modelFile", str(case.path("onnx")), "--MNNModel", str(path)]
    ran = subprocess.run(
        [*command, "--detectSparseSpeedUp"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=install.environ(),
    )
    if ran.returncode or not path.exists():
        said = ran.stdout.strip().splitlines() or ["nothing said"]
        raise WorkerError(f"MNN's converter failed: {said[-1]}")
    return path


FORMS: dict[str, Callable[[Case], Path]] = {
    "dass": _to_dass,
    "engine": _to_engine,
    "onnx": _to_onnx,
    "mnn": _to_mnn,
}
