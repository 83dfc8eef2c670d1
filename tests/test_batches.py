"""Batches: every image once, augmentation, the same bits whatever broke an epoch off."""

import itertools
import json

import pytest
import torch

from dass import data
from dass.data import Augment, Batches, ImageDataset


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("DASS_OFFLINE", "1")
    monkeypatch.setenv("DASS_DATA", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def numbered(n: int) -> ImageDataset:
    """Image i is filled with i and has label i."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 4, 4).contiguous()
    return ImageDataset(images, torch.arange(n), tuple(map(str, range(n))), (0.0,), (1 / 255,))


def test_an_epoch_has_every_image_once():
    batches = Batches(numbered(23), 5, seed=1)
    orders = []
    for _ in range(2):
        pairs = list(batches)
        assert [len(y) for _, y in pairs] == [5, 5, 5, 5, 3] and len(batches) == 5
        x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        assert torch.equal(x[:, 0, 0, 0].round().long(), y)
        assert torch.equal(y.sort().values, torch.arange(23))
        orders.append(y)
    assert not torch.equal(*orders)
    assert [y.tolist() for _, y in Batches(numbered(5), 2, shuffle=False)] == [[0, 1], [2, 3], [4]]
    assert len(list(Batches(numbered(23), 5, drop_last=True))) == 4


def test_normalisation(digits):
    x, _ = next(iter(Batches(digits, len(digits), shuffle=False)))
    assert x.dtype == torch.float32
    mean, std = torch.tensor(digits.mean).view(3, 1, 1), torch.tensor(digits.std).view(3, 1, 1)
    torch.testing.assert_close(x, (digits.images / 255 - mean) / std, atol=2e-6, rtol=0)


def test_crop_and_flip_move_whole_images():
    """Every result is one of the 9 * 9 * 2 crops of the padded image, and all shifts occur."""
    x = torch.randint(1, 256, (1, 3, 8, 6), dtype=torch.uint8).expand(4000, -1, -1, -1)
    out = Augment(pad=4).crop_flip(x, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x[0], (4,) * 4)
    crops = {}
    for dy in range(9):
        for dx in range(9):
            crop = padded[:, dy : dy + 8, dx : dx + 6]
            crops[crop.numpy().tobytes()] = (dy, dx, False)
            crops[crop.flip(2).numpy().tobytes()] = (dy, dx, True)
    seen = [crops[image.numpy().tobytes()] for image in out]
    assert len(set(seen)) == 162
    assert 1850 < sum(flipped for *_, flipped in seen) < 2150  # 2000 +- 4.7 sigma
    same = Augment(pad=0, flip=False).crop_flip(x, torch.Generator())
    assert torch.equal(same, x)


def test_cutout_clears_one_clipped_square():
    x = torch.ones(500, 2, 8, 10)
    out = Augment(cutout=4).cut(x, torch.Generator().manual_seed(0))
    areas = set()
    for image in out:
        hole = image[0] == 0
        assert torch.equal(image[0], image[1])
        rows, columns = hole.any(1).nonzero()[:, 0], hole.any(0).nonzero()[:, 0]
        assert hole.sum() == len(rows) * len(columns)
        assert rows[-1] - rows[0] + 1 == len(rows) <= 4
        assert columns[-1] - columns[0] + 1 == len(columns) <= 4
        areas.add(int(hole.sum()))
    assert {4, 16} <= areas and max(areas) == 16


def test_seeds_decide_everything(digits):
    def epoch(seed: int, global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        batches = Batches(digits.subset(64), 16, augment=Augment(cutout=8), seed=seed)
        return torch.cat([x for x, _ in batches])

    assert torch.equal(epoch(0, 0), epoch(0, 1))
    assert not torch.equal(epoch(0, 0), epoch(1, 0))


def test_every_batch_epoch_and_rank_draws_its_own_augmentation(digits):
    same = digits.take(torch.zeros(64, dtype=torch.int64))
    draws = []
    for rank in (0, 1):
        batches = Batches(same, 16, augment=Augment(), rank=rank, world=2)
        draws += [x.numpy().tobytes() for _ in range(2) for x, _ in batches]
    assert len(draws) == len(set(draws)) == 8


@pytest.mark.parametrize("stop", [1, 4, 6])  # an epoch has 4 batches
def test_resume_equals_the_straight_run(digits, stop):
    small = digits.subset(60)

    def batches() -> Batches:
        return Batches(small, 16, augment=Augment(cutout=8), seed=7)

    straight = batches()
    expected = [x for _ in range(3) for x, _ in straight]
    first = batches()
    for done, (x, _) in enumerate(itertools.chain(first, first), 1):
        assert torch.equal(x, expected[done - 1])
        if done == stop:
            break
    resumed = batches()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    while resumed.epoch < 3:
        for x, _ in resumed:
            assert torch.equal(x, expected[done])
            done += 1
    assert done == len(expected) == 12
    with pytest.raises(ValueError, match="batch_size 16, not 8"):
        Batches(small, 8, seed=7).load_state_dict(first.state_dict())


def test_a_broken_off_epoch_is_over():
    batches, straight = Batches(numbered(20), 5), Batches(numbered(20), 5)
    next(iter(batches))
    expected = [[y.tolist() for _, y in straight] for _ in range(2)]
    assert [y.tolist() for _, y in batches] == expected[1]


def test_ranks_share_an_epoch():
    ranks = [Batches(numbered(23), 4, rank=r, world=3, drop_last=True) for r in range(3)]
    parts = [torch.cat([y for _, y in batches]) for batches in ranks]
    assert [len(p) for p in parts] == [4, 4, 4]
    assert len(torch.cat(parts).unique()) == 12
    ranks = [Batches(numbered(23), 4, rank=r, world=3, shuffle=False) for r in range(3)]
    y = torch.cat([y for batches in ranks for _, y in batches])
    assert torch.equal(y.sort().values, torch.arange(23))
    assert [len(b) for b in ranks] == [len(list(b)) for b in ranks] == [2, 2, 2]
    for bad in ({"rank": 3, "world": 3}, {"rank": -1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="batch_size"):
            Batches(numbered(3), **{"batch_size": 1, **bad})


def test_a_users_own_source():
    class Mine:
        shape = (12, 3, 6, 6)

        def __getitem__(self, index):
            return (index % 256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 6, 6)

    mine = ImageDataset(Mine(), torch.arange(12) % 2, ("a", "b"), (0.0,) * 3, (1 / 255,) * 3)
    rest, held_out = mine.split(0.5)
    chosen = rest.subset(4)
    for part in (mine, rest, held_out, chosen):
        for x, y in Batches(part, 4):
            assert torch.equal(x[:, 0, 0, 0].round().long() % 2, y)
    assert chosen.shape == (3, 6, 6) and len(chosen) == 4
    for x, _ in Batches(mine, 5, augment=Augment(pad=1, cutout=2)):
        assert x.shape[1:] == (3, 6, 6)
