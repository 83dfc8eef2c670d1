"""What is measured, as data: layer shapes, networks, and the DLMC matrices.

A shape is named ``inputs->outputs@size``: channels in, channels out, height = width of the output;
``b16`` after it is the batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dass import zoo

SPARSITIES = (0.9, 0.95, 0.98)


@dataclass(frozen=True)
class Conv:
    """A square convolution with "same"-style padding; size is that of the output."""

    inputs: int
    outputs: int
    size: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1

    @property
    def kind(self) -> str:
        return f"{self.kernel}x{self.kernel}"

    @property
    def label(self) -> str:
        extra = f" /{self.stride}" if self.stride > 1 else ""
        extra += f" g{self.groups}" if self.groups > 1 else ""
        return f"{self.kind} {self.inputs}->{self.outputs}@{self.size}{extra}"

    @property
    def flops(self) -> int:
        """Of one image, dense, a multiply and an add counted as two."""
        taps = self.kernel**2 * self.inputs // self.groups
        return 2 * self.outputs * taps * self.size**2

    def module(self, bias: bool = True) -> nn.Conv2d:
        return nn.Conv2d(
            self.inputs,
            self.outputs,
            self.kernel,
            self.stride,
            self.kernel // 2,
            groups=self.groups,
            bias=bias,
        )

    def input_shape(self, batch: int) -> tuple[int, ...]:
        side = self.size * self.stride
        return (batch, self.inputs, side, side)


@dataclass(frozen=True)
class Linear:
    """A fully connected layer with the batch it is measured at."""

    batch: int
    inputs: int
    outputs: int

    kind = "linear"

    @property
    def label(self) -> str:
        return f"linear {self.inputs}->{self.outputs}"

    @property
    def flops(self) -> int:
        """Of one row of the batch, dense."""
        return 2 * self.inputs * self.outputs

    def module(self, bias: bool = True) -> nn.Linear:
        return nn.Linear(self.inputs, self.outputs, bias)

    def input_shape(self, batch: int | None = None) -> tuple[int, ...]:
        return (batch or self.batch, self.inputs)


def _square(*rows: tuple[int, int]) -> tuple[Conv, ...]:
    return tuple(Conv(channels, channels, size, 3) for channels, size in rows)


# Bottlenecks of ResNet-50 at 224, then expand and project layers of MobileNet-v2 at 224.
CONV1X1 = tuple(
    Conv(*row)
    for row in (
        (64, 256, 56),
        (256, 64, 56),
        (128, 512, 28),
        (512, 128, 28),
        (256, 1024, 14),
        (1024, 256, 14),
        (512, 2048, 7),
        (2048, 512, 7),
        (24, 144, 56),
        (144, 24, 56),
        (32, 192, 28),
        (64, 384, 14),
        (384, 64, 14),
        (96, 576, 14),
        (160, 960, 7),
        (960, 160, 7),
        (320, 1280, 7),
    )
)
# ResNets at 224, then at 32.
CONV3X3_IMAGENET = _square((64, 56), (128, 28), (256, 14), (512, 7))
CONV3X3 = CONV3X3_IMAGENET + _square((64, 32), (128, 16), (256, 8), (512, 4))

# Batches of at least 8: small planes need the batch to fill the vectors.
CONV1X1_BATCH = 8
CONV1X1_SMALL = tuple(case for case in CONV1X1 if case.size in (14, 7))
LINEAR = tuple(
    Linear(*row)
    for row in (
        (8, 512, 512),
        (16, 2048, 1000),
        (64, 2048, 1000),
        (64, 512, 512),
        (128, 1024, 4096),
        (32, 2048, 512),
    )
)

BLOCK_ROWS = (4, 8, 16)
BLOCK_CONV1X1 = tuple(
    Conv(*row) for row in ((256, 1024, 14), (1024, 256, 14), (512, 2048, 7), (2048, 512, 7))
)

TRAINING_BATCH = 16
TRAINING = (
    *CONV3X3_IMAGENET,
    *(Conv(*row) for row in ((256, 64, 56), (128, 512, 28), (1024, 256, 14), (64, 384, 14))),
)

SPARSIFY_NETWORKS = ("mobilenet_v2_imagenet", "resnet18_imagenet", "resnet50")
SPARSIFY_SPARSITIES = (0.5, 0.7, 0.8)


def zoo_layers(name: str) -> tuple[Conv | Linear, ...]:
    """The distinct convolution and linear shapes of a network of the zoo at its own input size."""
    found: dict[Conv | Linear, None] = {}

    def hook(module, args, output):
        if isinstance(module, nn.Linear):
            found[Linear(1, module.in_features, module.out_features)] = None
            return
        kernel, stride, groups = module.kernel_size[0], module.stride[0], module.groups
        case = Conv(args[0].size(1), output.size(1), output.size(2), kernel, stride, groups)
        found[case] = None

    with torch.device("meta"):
        network = zoo.create(name).eval()
        x = torch.empty(1, *zoo.input_shape(name))
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(hook)
    with torch.no_grad():
        network(x)
    return tuple(found)


@dataclass(frozen=True)
class Matrix:
    """A pruned weight matrix of DLMC: compressed rows, and the columns of the dense operand."""

    name: str
    indptr: np.ndarray  # int32 [rows + 1]
    indices: np.ndarray  # int32, ascending within a row
    shape: tuple[int, int]
    columns: int

    @property
    def label(self) -> str:
        name = self.name.replace("bottleneck_", "").replace("block_group", "g")
        return f"{name} {self.shape[0]}x{self.shape[1]} n{self.columns}"

    def mask(self) -> torch.Tensor:
        """bool [rows, columns], True where a weight is kept."""
        mask = np.zeros(self.shape, dtype=bool)
        mask[np.repeat(np.arange(self.shape[0]), np.diff(self.indptr)), self.indices] = True
        return torch.from_numpy(mask)


def dlmc_path(given: str | os.PathLike | None = None) -> Path | None:
    """Where the DLMC matrices lie: the path given, else the environment's DASS_DLMC, else None.

    Raises:
        FileNotFoundError: the place named does not exist.
    """
    named = given or os.environ.get("DASS_DLMC")
    if not named:
        return None
    path = Path(named).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no DLMC matrices at {path}")
    return path


def dlmc_matrices(path: str | os.PathLike, sparsity: float) -> Iterator[Matrix]:
    """The 54 matrices of the magnitude-pruned ResNet-50 at one sparsity (0.8, 0.9, 0.95, 0.98).

    Args:
        path: an .npz of ``layers``, ``shapes``, ``n`` and ``SPARSITY/LAYER/indptr`` and
            ``/indices``, or a folder with one; or the collection as published, a folder with
            ``rn50/magnitude_pruning/SPARSITY/*.smtx`` and ``rn50_batchsizes.txt`` (at batch 1).

    Raises:
        FileNotFoundError: neither is there. KeyError: the file has not this sparsity.
    """
    path = Path(path)
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if files:
        yield from _from_npz(files[0], sparsity)
        return
    folder = path / "rn50" / "magnitude_pruning" / str(sparsity)
    if not folder.is_dir():
        raise FileNotFoundError(f"neither an .npz nor {folder.relative_to(path)} in {path}")
    lines = (path / "rn50_batchsizes.txt").read_text().split()
    for name, columns in (line.rsplit(",", 1) for line in lines):
        yield _from_smtx(folder / f"{name}.smtx", int(columns))


def _from_npz(file: Path, sparsity: float) -> Iterator[Matrix]:
    with np.load(file) as data:
        columns = data["n"]
        for i, (name, shape) in enumerate(zip(data["layers"], data["shapes"], strict=True)):
            key = f"{sparsity}/{name}"
            indices = data[f"{key}/indices"].astype(np.int32)
            rows, cols = map(int, shape)
            yield Matrix(str(name), data[f"{key}/indptr"], indices, (rows, cols), int(columns[i]))


def _from_smtx(file: Path, columns: int) -> Matrix:
    """Three lines: "rows, columns, nonzeros", the row pointers, the column numbers."""
    head, *lines = [*file.read_text().splitlines(), ""]  # without a nonzero the last may be missing
    rows, cols, _ = (int(word) for word in head.split(","))
    indptr, indices = (np.array(line.split(), dtype=np.int32) for line in lines[:2])
    return Matrix(file.stem, indptr, indices, (rows, cols), columns)
