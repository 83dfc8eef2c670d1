"""Images with labels in memory or on demand, their errors, and what readers share."""

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

# Channel mean and standard deviation of x / 255.
NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "efficientnet_lite": ((127 / 255,) * 3, (128 / 255,) * 3),
    "fashion_mnist": ((0.28604,), (0.35302,)),
    "digits": ((0.3051,) * 3, (0.3235,) * 3),
    "synthetic": ((0.53,) * 3, (0.27,) * 3),
}


class DataError(Exception):
    """Base of this module's errors about data."""


class DataNotFoundError(DataError, FileNotFoundError):
    """A path that does not exist, or holds nothing that can be read as the data asked for."""


class CorruptDataError(DataError, ValueError):
    """Data that is there but is damaged, incomplete or inconsistent."""


class ImageSource(Protocol):
    """Where images come from; a uint8 tensor [N, C, H, W] is one, and so may be a user's class.

    With an attribute ``ahead = True`` it is read by a thread, one batch before that is used.
    """

    shape: Sequence[int]  # N, C, H, W

    def __getitem__(self, index: Tensor) -> Tensor:
        """int64 [B] -> uint8 [B, C, H, W]."""


@dataclass(frozen=True)
class ImageDataset:
    """Images with labels.

    Args:
        images: uint8 [N, C, H, W] tensor, or any `ImageSource`.
        labels: int64 [N], each in 0 .. len(classes) - 1.
        classes: class names.
        mean, std: C numbers each, of x / 255.
        name: what the images really are, e.g. "digits" where CIFAR-10 could not be had.

    Raises:
        CorruptDataError: sizes, types or labels that do not fit together.
    """

    images: Tensor | ImageSource
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str = "custom"

    def __post_init__(self):
        shape, labels = tuple(self.images.shape), self.labels
        if len(shape) != 4 or getattr(self.images, "dtype", torch.uint8) != torch.uint8:
            raise CorruptDataError(f"{self.name}: images must be uint8 [N, C, H, W], got {shape}")
        if labels.dtype != torch.int64 or tuple(labels.shape) != shape[:1]:
            raise CorruptDataError(
                f"{self.name}: labels must be int64 [{shape[0]}], got {labels.dtype} "
                f"{list(labels.shape)}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise CorruptDataError(
                f"{self.name}: labels must be in 0 .. {len(self.classes) - 1}, got "
                f"{int(labels.min())} .. {int(labels.max())}"
            )
        if not len(self.mean) == len(self.std) == shape[1]:
            raise CorruptDataError(f"{self.name}: mean and std need {shape[1]} numbers each")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return tuple(self.images.shape[1:])

    def normalise(self, x: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float32, (x / 255 - mean) / std per channel."""
        mean = torch.tensor(self.mean, device=x.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=x.device).view(-1, 1, 1)
        return x.to(torch.float32, copy=True).sub_(mean * 255).div_(std * 255)

    def take(self, index: Tensor) -> "ImageDataset":
        """The images at ``index`` (int64 [M]), in that order."""
        images = self.images
        images = images[index] if isinstance(images, Tensor) else _Chosen(images, index)
        return replace(self, images=images, labels=self.labels[index])

    def subset(self, count: int, seed: int = 0) -> "ImageDataset":
        """At most ``count`` images, the classes in their proportions; same seed, same images."""
        return self if count >= len(self) else self.take(stratified(self.labels, count, seed))

    def split(self, fraction: float, seed: int = 0) -> tuple["ImageDataset", "ImageDataset"]:
        """(rest, held out): ``fraction`` of the images is held out, stratified by class.

        Choices (a checkpoint, an architecture, a hyper-parameter) belong on the held-out part,
        never on the test set.

        Raises:
            ValueError: one of the two parts would be empty.
        """
        count = round(fraction * len(self))
        if not 0 < count < len(self):
            raise ValueError(f"fraction {fraction} of {len(self)} images leaves an empty part")
        held_out = torch.zeros(len(self), dtype=torch.bool)
        held_out[stratified(self.labels, count, seed)] = True
        return self.take((~held_out).nonzero()[:, 0]), self.take(held_out.nonzero()[:, 0])


class _Chosen:
    """Some images of a source that is not a tensor."""

    def __init__(self, source: ImageSource, index: Tensor):
        self.source, self.index = source, index
        self.ahead = getattr(source, "ahead", False)
        self.shape = (len(index), *source.shape[1:])

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.source[self.index[index]]


BoxOf = Callable[[int, int, int], tuple[int, int, int, int]]


class ImageFiles:
    """Image files decoded on demand to RGB, by as many threads as there are cores.

    An `ImageSource`: nothing is kept, so that a folder may be larger than memory.

    Args:
        paths: N files.
        size: (H, W). An image of another size is scaled until it covers 8/7 of that, and the
            middle is cut out: 256 and 224 pixels, the usual ImageNet evaluation.
        scale: False makes another size an error.
    """

    ahead = True

    def __init__(self, paths: Sequence[Path], size: tuple[int, int], scale: bool = True):
        self.paths, self.scale, self.shape = paths, scale, (len(paths), 3, *size)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self._decode(index, lambda place, image, path: self._middle(image, path))

    def cropped(self, index: Tensor, box_of: BoxOf) -> Tensor:
        """As :func:`cropped`, from the whole image."""
        size = self.shape[:1:-1]

        def crop(place: int, image: Image.Image, path: Path) -> Image.Image:
            x, y, w, h = box_of(place, image.width, image.height)
            part = image.crop((x, y, x + w, y + h))  # resize(box=) would blend in what is around it
            return part.resize(size, Image.Resampling.BILINEAR)

        return self._decode(index, crop)

    def _decode(
        self, index: Tensor, form: Callable[[int, Image.Image, Path], Image.Image]
    ) -> Tensor:
        out = torch.empty(len(index), *self.shape[1:], dtype=torch.uint8)

        def decode(place: int, n: int) -> None:
            path = self.paths[n]
            image = form(place, open_image(path, path), path)
            out[place] = torch.from_numpy(np.array(image)).permute(2, 0, 1)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(decode, range(len(index)), index.tolist()))
        return out

    def _middle(self, image: Image.Image, path: Path) -> Image.Image:
        height, width = self.shape[2:]
        if image.size == (width, height):
            return image
        if not self.scale:
            raise CorruptDataError(
                f"{path} is {image.width}x{image.height} where the first image is "
                f"{width}x{height}: pass size= to scale them"
            )
        r = 8 / 7 * max(width / image.width, height / image.height)
        image = image.resize(
            (round(image.width * r), round(image.height * r)), Image.Resampling.BICUBIC
        )
        x, y = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((x, y, x + width, y + height))


def cropped(source: Tensor | ImageSource, index: Tensor, box_of: BoxOf) -> Tensor:
    """A part of each image, scaled bilinearly to the source's size; uint8 [B, C, H, W].

    box_of: (place in `index`, width, height of the image) -> (x, y, width, height) of the part.
        Files are cropped before they are scaled, other sources from the images as they give them.
    """
    if isinstance(source, _Chosen):
        return cropped(source.source, source.index[index], box_of)
    if isinstance(source, ImageFiles):
        return source.cropped(index, box_of)
    images = source[index]
    out = torch.empty_like(images)
    for i, image in enumerate(images):
        x, y, w, h = box_of(i, *image.shape[:0:-1])
        part = image[None, :, y : y + h, x : x + w].float()
        part = F.interpolate(part, size=image.shape[1:], mode="bilinear", antialias=True)
        out[i] = part[0].round_().clamp_(0, 255)
    return out


def stratified(labels: Tensor, count: int, seed: int = 0) -> Tensor:
    """Ascending int64 [count] indices into ``labels`` (int64 [N]), chosen at random by class.

    Each class gets its share of ``count`` rounded down; the largest remainders get one more.

    Raises:
        ValueError: count is not in 0 .. N.
    """
    n = len(labels)
    if not 0 <= count <= n:
        raise ValueError(f"count must be in 0 .. {n}, got {count}")
    order = torch.randperm(n, generator=generator_for("stratified", seed))
    members = [order[labels[order] == c] for c in labels.unique()]
    quotas = [len(m) * count // n for m in members]
    by_remainder = sorted(range(len(members)), key=lambda i: -(len(members[i]) * count % n))
    for i in by_remainder[: count - sum(quotas)]:
        quotas[i] += 1
    chosen = [m[:q] for m, q in zip(members, quotas, strict=True)]
    return torch.cat(chosen).sort().values if chosen else order


def generator_for(*what: object) -> Generator:
    """A generator for one purpose: its seed is a hash, so that near seeds are unrelated."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=4).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little"))


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 [N, C, H, W] -> uint8 [N, C, size, size], bilinear; float copies of 1,024 at a time."""
    resized = [
        F.interpolate(x.float(), size=(size, size), mode="bilinear", antialias=True).round_()
        for x in images.split(1024)
    ]
    return torch.cat([x.clamp_(0, 255).byte() for x in resized])


def open_image(file: Path | io.BytesIO, where: object) -> Image.Image:
    """A decoded RGB image; PIL's many exceptions become one."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as e:
        raise CorruptDataError(f"{where}: {e}") from e
