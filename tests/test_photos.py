"""Folders of photographs: random parts of them, decoded in threads, and the recipe for ImageNet."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import dass
from dass import cli, data, methods
from dass.data import Batches, CorruptDataError, ImageFiles, ResizedCrop
from dass.images import cropped
from dass.methods import RECIPES, run_stage, stages_of

datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiles of two photographs, no two of one size: 2 classes, 2 x 8 to train, 2 x 2 to test."""
    root = tmp_path_factory.mktemp("photos")
    for name in datasets.load_sample_images().filenames:
        photo = Image.open(name)
        for i in range(10):
            place = root / ("train" if i < 8 else "val") / Path(name).stem
            place.mkdir(parents=True, exist_ok=True)
            x, y = 50 * i, 30 * i
            tile = photo.crop((x, y, x + 90 + 7 * i, y + 120 - 5 * i))
            tile.save(place / f"{i}.jpg", quality=90)
    return root


@pytest.fixture
def photos(folder):
    return data.load(root=folder, size=32, lazy=True)


def test_photographs_stay_on_the_disk(folder, photos):
    assert isinstance(photos.images, ImageFiles) and photos.shape == (3, 32, 32)
    assert photos.classes == ("china", "flower") and len(photos) == 16
    assert isinstance(data.load(root=folder, size=32).images, torch.Tensor)
    kept = data.load(root=folder, size=32)
    assert torch.equal(photos.images[torch.arange(16)], kept.images)
    some = data.load(root=folder, size=32, lazy=True, limit=6)
    assert len(some) == 6 and not isinstance(some.images, torch.Tensor)


def test_a_part_of_a_file_is_that_part_scaled(photos):
    index = torch.tensor([3, 11, 3])
    boxes = [(5, 7, 40, 30), (0, 0, 90, 60), (20, 10, 16, 64)]
    found = cropped(photos.images, index, lambda place, w, h: boxes[place])
    for x, n, (left, top, w, h) in zip(found, index.tolist(), boxes, strict=True):
        photo = Image.open(photos.images.paths[n])
        part = photo.crop((left, top, left + w, top + h)).resize((32, 32), Image.BILINEAR)
        expected = torch.tensor(list(part.tobytes())).view(32, 32, 3).permute(2, 0, 1)
        assert (x.int() - expected).abs().max() <= 1
    again = cropped(
        photos.take(torch.tensor([5, 3])).images, torch.tensor([1]), lambda *a: boxes[0]
    )
    assert torch.equal(again[0], found[0])


def test_a_part_of_a_tensor_is_what_pillow_makes_of_it(photos):
    images = photos.images[torch.arange(4)]
    box = (4, 6, 20, 13)
    found = cropped(images, torch.tensor([2]), lambda place, w, h: box)[0]
    photo = Image.fromarray(images[2].permute(1, 2, 0).numpy())
    part = photo.crop((4, 6, 24, 19)).resize((32, 32), Image.BILINEAR)
    expected = torch.tensor(list(part.tobytes())).view(32, 32, 3).permute(2, 0, 1)
    assert (found.int() - expected).abs().max() <= 1


@pytest.mark.parametrize(("width", "height"), [(500, 375), (32, 32), (91, 300)])
def test_boxes_lie_inside_and_have_the_area_and_shape_asked_for(width, height):
    crop = ResizedCrop()
    draws = torch.rand(400, 10, 4, generator=torch.Generator().manual_seed(1)).tolist()
    boxes = [crop.box(draw, width, height) for draw in draws]
    for x, y, w, h in boxes:
        assert 0 <= x <= x + w <= width and 0 <= y <= y + h <= height
    shares = [w * h / (width * height) for _, _, w, h in boxes]
    rounding = 2 / min(width, height)
    assert 0.08 - rounding <= min(shares) < 0.2 and max(shares) <= 1
    ratios = sorted(w / h for _, _, w, h in boxes)
    assert ratios[0] >= 0.75 * (1 - 4 * rounding) and ratios[-1] <= 4 / 3 * (1 + 4 * rounding)
    assert ratios[0] < 0.9 and ratios[-1] > 1.1
    assert len({(x, y) for x, y, _, _ in boxes}) > 100


def test_what_no_draw_fits_is_cut_in_the_middle():
    crop = ResizedCrop(area=(1.0, 1.0))
    draws = torch.rand(10, 4).tolist()
    assert crop.box(draws, 300, 30) == (130, 0, 40, 30)
    assert crop.box(draws, 30, 300) == (0, 130, 30, 40)


def test_training_pictures_are_moved_and_mirrored(photos):
    same = torch.zeros(64, dtype=torch.int64)
    x = ResizedCrop().draw(photos.images, same, torch.Generator().manual_seed(0))
    assert x.shape == (64, 3, 32, 32) and len({t.numpy().tobytes() for t in x}) == 64
    whole = ResizedCrop(area=(1, 1), ratio=(0.75, 0.75))  # of 90 x 120: all of it
    x = whole.draw(photos.images, same, torch.Generator().manual_seed(0))
    kinds = {t.numpy().tobytes() for t in x}
    assert kinds == {x[0].numpy().tobytes(), x[0].flip(2).numpy().tobytes()}
    plain = replace(whole, flip=False).draw(photos.images, same, torch.Generator())
    assert len({t.numpy().tobytes() for t in plain}) == 1


def test_batches_do_not_depend_on_threads_and_go_on_where_they_were(photos, monkeypatch):
    def batches():
        return Batches(photos, 5, augment=ResizedCrop(cutout=8), seed=3)

    straight = batches()
    epochs = [list(straight), list(straight)]
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])
    broken = batches()
    list(broken)
    for _, _ in zip(range(2), broken, strict=False):
        pass  # the third batch may have been read by now
    resumed = batches()
    resumed.load_state_dict(json.loads(json.dumps(broken.state_dict())))
    rest = list(resumed)
    assert len(rest) == 2
    for (x, y), (a, b) in zip(rest, epochs[1][2:], strict=True):
        assert torch.equal(x, a) and torch.equal(y, b)
    monkeypatch.setattr(ImageFiles, "ahead", False)
    monkeypatch.setattr("dass.images.os.cpu_count", lambda: 1)
    for (x, y), (a, b) in zip(list(batches()), epochs[0], strict=True):
        assert torch.equal(x, a) and torch.equal(y, b)


def test_a_damaged_photograph_is_named(folder, tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        source = next((folder / "train").rglob("0.jpg")).read_bytes()
        for i in range(5):
            (tmp_path / label / f"{i}.jpg").write_bytes(source[:500] if i == 3 else source)
    broken = data.load(root=tmp_path, size=16, lazy=True)
    with pytest.raises(CorruptDataError, match=r"3\.jpg"):
        list(Batches(broken, 4, augment=ResizedCrop()))


def short(recipe):
    def one(config):
        return replace(config, epochs=1, batch_size=8)

    changes = {stage: one(getattr(recipe, stage)) for stage in ("pretrain", "prune", "finetune")}
    return replace(recipe, **changes, size=24)


def test_the_recipe_is_the_papers():
    found = RECIPES["imagenet"].pretrain
    assert (found.epochs, found.batch_size, found.lr, found.clip) == (90, 128, 0.1, 5.0)
    assert (found.weight_decay, found.label_smoothing, found.auxiliary) == (3e-5, 0.1, 0.4)
    assert found.lr_at(5 * 100, 90 * 100) == 0.1 > found.lr_at(5 * 100 - 1, 90 * 100)
    assert RECIPES["imagenet"].size == 224 and found.resized_crop


def test_two_steps_of_the_recipe_and_the_same_when_resumed(photos, tmp_path, one_thread):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2),
        )  # fmt: skip

    class Stop(Exception):
        pass

    (stage,) = stages_of("random", short(RECIPES["imagenet"]), 0.5)
    stage = replace(stage, config=replace(stage.config, epochs=1))
    straight = net()
    result = run_stage(straight, stage, photos, test=photos)
    assert result.steps == 2 and math.isfinite(result.history[0]["train_loss"])
    path = tmp_path / "checkpoint.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dass.training._SAVE_EVERY_S", 0.0)
        broken = net()
        with pytest.raises(Stop):
            run_stage(broken, stage, photos, checkpoint=path, on_step=stop_at(2, Stop))
    resumed = net()
    assert run_stage(resumed, stage, photos, test=photos, checkpoint=path).resumed_at == 1
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def stop_at(step, error):
    def on_step(progress):
        if progress.step == step:
            raise error

    return on_step


def test_the_command_reads_a_folder_at_the_recipes_size(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(methods.RECIPES, "imagenet", short(RECIPES["imagenet"]))
    run = tmp_path / "run"
    words = ["sparse", "resnet20", "--width", "0.25", "--recipe", "imagenet", "--method", "snip"]
    words += ["--data", str(folder), "--sparsity", "0.8", "--threads", "1", "--run", str(run)]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert json.loads((run / "run.json").read_text())["size"] == 24
    assert dass.load(run / "model.safetensors").linear.out_features == 2
