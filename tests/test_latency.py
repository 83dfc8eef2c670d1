"""Comparisons of dense and sparse: what is timed is checked to be the same computation."""

import copy

import pytest
import torch
from torch import nn

import dass
from dass import latency
from dass.latency import (
    ResultsDifferError,
    compare_layers,
    compare_networks,
    compare_steps,
    fold_batchnorm,
)

FAST = {"seconds": 0.0, "rounds": 2}


class Net(nn.Module):
    """Two alike layers, one strided, a depthwise one that stays dense, a linear one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.wise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.out = nn.Linear(16, 10)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = self.b(self.a(x).relu()).relu()
        x = self.wise(self.norm2(self.down(x))).relu()
        return self.out(x.mean((2, 3)))


@pytest.fixture
def nets():
    torch.manual_seed(0)
    dense = Net()
    for norm in (dense.norm, dense.norm2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
    rivals = {}
    for sparsity in (0.7, 0.9):
        rivals[f"{sparsity:.0%}"] = pruned = copy.deepcopy(dense)
        dass.prune(pruned, sparsity, exclude=("first", "depthwise"))
    return dense, rivals, torch.randn(2, 3, 9, 9)


def test_layers_have_a_row_per_shape_in_the_order_of_execution(nets):
    dense, rivals, x = nets
    seen = []
    rows = compare_layers(dense, rivals, x, on_row=lambda *row: seen.append(row), **FAST)
    assert [row["names"] for row in rows] == [["a", "b"], ["down"], ["out"]]
    assert [row["kind"] for row in rows] == ["3x3", "3x3 /2", "linear"]
    assert [row["input"] for row in rows] == [[2, 8, 9, 9], [2, 8, 9, 9], [2, 16]]
    assert seen == [(0, 3, "a"), (1, 3, "down"), (2, 3, "out")]
    for row in rows:
        assert row["best"] in row["dense"]
        assert list(row["sparse"]) == ["70%", "90%"]
        assert row["sparse"]["90%"]["density"] == pytest.approx(0.1, abs=0.01)
        best = row["dense"][row["best"]]["median_us"]
        assert best == min(way["median_us"] for way in row["dense"].values())
    assert dense.training


def test_a_layer_that_only_one_rival_has_sparse_is_timed_for_that_one(nets):
    dense, rivals, x = nets
    rivals["70%"] = dass.densify(rivals["70%"])
    rows = compare_layers(dense, rivals, x, **FAST)
    assert {tuple(row["sparse"]) for row in rows} == {("90%",)}


def test_whole_networks_agree_and_say_what_was_chosen(nets):
    dense, rivals, x = nets
    found = compare_networks(dense, rivals, x, layer_seconds=0.0, **FAST)
    assert found["input"] == [2, 3, 9, 9]
    assert {"nchw", "channels_last", "frozen"} <= set(found["dense"])
    for row in found["sparse"].values():
        assert row["error"] <= latency.TOLERANCE
        assert 0 <= row["sparse_layers"] <= row["layers"] == 6


def test_different_results_are_not_timed(nets, monkeypatch):
    dense, rivals, x = nets
    monkeypatch.setattr(latency, "relative_error", lambda got, want: 0.5)
    with pytest.raises(ResultsDifferError, match="a: sparse and dense results differ"):
        compare_layers(dense, rivals, x, **FAST)


def test_nan_is_a_difference():
    x = torch.ones(3)
    assert latency.relative_error(x, x) == 0
    assert latency.relative_error(x / 0 * 0, x) == float("inf")


def test_folding_keeps_results_and_zeros(nets):
    _, rivals, x = nets
    plain = dass.densify(rivals["90%"]).eval()
    folded = fold_batchnorm(plain, x)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not ((plain.down.weight == 0) & (folded.down.weight != 0)).any()
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), plain(x), rtol=1e-4, atol=1e-5)
    assert isinstance(plain.norm, nn.BatchNorm2d)


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + x


class TwoRuns(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.conv(self.norm(self.conv(x)))


@pytest.mark.parametrize("kind", [TwoReaders, TwoRuns])
def test_what_cannot_be_folded_is_left(kind):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 3, 5, 5)
    model.norm.running_mean.normal_()
    folded = fold_batchnorm(model, x)
    assert isinstance(folded.norm, nn.BatchNorm2d)
    with torch.inference_mode():
        assert torch.equal(folded(x), model(x))


def test_training_steps_are_timed_on_copies(nets):
    _, rivals, x = nets
    before = copy.deepcopy(rivals["90%"].state_dict())
    found = compare_steps(
        rivals["90%"], x, torch.tensor([1, 2]), seconds=0.0, rounds=2, num_threads=1
    )
    assert set(found["dense"]) == {"masked NCHW", "masked channels_last"}
    assert found["threads"] == 1
    assert found["batch"] == 2
    assert found["sparse"]["sparse"]["speedup"] > 0
    for name, value in rivals["90%"].state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_the_masked_step_keeps_pruned_weights_at_zero(nets, form, monkeypatch):
    _, rivals, x = nets
    made = []
    real = latency.densify
    monkeypatch.setattr(latency, "densify", lambda m: made.append(real(m)) or made[-1])
    step = latency._masked_step(rivals["90%"], x, torch.tensor([1, 2]), form)
    start = made[0].down.weight.clone()
    step()
    step()
    mask = rivals["90%"].down.mask
    assert not made[0].down.weight[~mask].any()
    assert not torch.equal(made[0].down.weight, start)
