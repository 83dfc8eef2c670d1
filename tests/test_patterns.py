"""Channels in another order: which may move, that nothing changes, and that patterns keep more."""

import copy
import json

import pytest
import torch
from torch import nn

import dass
import dass_kernels
from bench import bench_patterns
from dass import zoo
from dass.channels import channel_groups
from dass.masks import keep_count, norm_kept, parse_pattern, pattern_mask
from dass.nn import SparseConv2d
from dass.permutation import _Layer, permute
from dass.pruning import prune

SMALL = {
    "resnet20": {},
    "resnet18": {"width": 0.125},
    "mobilenet_v2": {"width": 0.25},
    "dass_small": {"channels": 4, "layers": 3},
    "random_cell": {"channels": 3, "layers": 2},
}
LARGE = {
    "resnet50": {"width": 0.125},
    "mobilenet_v2_imagenet": {"width": 0.25},
    "efficientnet_lite0": {"width": 0.25},
    "efficientnet_v2_s": {"width": 0.25},
}
ZOO = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]


def network(name):
    """A network in float64 whose channels all differ, BatchNorm statistics included."""
    torch.manual_seed(0)
    net = zoo.create(name, 10, **{**SMALL, **LARGE}[name]).double()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.2, 1.2)
        for _ in range(3):
            net(x)
    return net.eval(), x


def shuffle(model, groups):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for group in groups:
            order = torch.randperm(group.size)
            for name, dim, first in group.places:
                part = tensors[name].narrow(dim, first, group.size)
                part.copy_(part.index_select(dim, order))


@pytest.mark.parametrize("name", ZOO)
def test_any_order_of_the_free_channels_leaves_the_network_as_it_was(name):
    net, x = network(name)
    before = copy.deepcopy(net)
    groups = channel_groups(net, (x,))
    shuffle(net, groups)
    moved = sum(
        not torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters(), strict=True)
    )
    assert moved > 0.9 * len(list(net.parameters())) - 3
    want = before(x)
    assert want.std() > 1e-3
    torch.testing.assert_close(net(x), want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


@pytest.mark.parametrize(("pattern", "sparsity"), [("8x1", 0.9), ("16x2", 0.9), ("2:4", 0.5)])
def test_permute_keeps_the_function_and_more_of_the_norm(pattern, sparsity):
    net, x = network("resnet20")
    want, parameters = net(x), dict(net.named_parameters())
    report = permute(net, x, pattern, sparsity, exclude="first")
    torch.testing.assert_close(net(x), want, rtol=1e-9, atol=1e-9)
    assert all(net.get_parameter(name) is p for name, p in parameters.items())
    assert report.norm_after > report.norm_before
    pruning = prune(net, sparsity, pattern=pattern, exclude="first")
    assert pruning.norm_kept == pytest.approx(report.norm_after, abs=1e-12)
    after = {row.names[0]: row.norm_kept for row in pruning.layers}
    assert after == pytest.approx({name: pair[1] for name, pair in report.layers.items()})
    assert "conv1" not in report.layers
    assert json.loads(json.dumps(report.to_dict()))["layers"]["linear"][1] == after["linear"]
    assert str(report).startswith(f"permuted for {pattern}")


def planted(blocks=4):
    """conv - relu - conv - pool - linear, whose 16 middle channels are `blocks` of alike ones."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    keep = torch.rand(blocks, 8) < 0.25
    keep[:, 0] = True
    shuffled = torch.randperm(16)
    with torch.no_grad():
        net[0].weight.normal_().mul_(
            keep.repeat_interleave(16 // blocks, 0)[shuffled][..., None, None]
        )
    return net, 1 - keep.float().mean().item()


def test_a_planted_pattern_is_found_again():
    net, sparsity = planted()
    report = permute(net, torch.randn(1, 8, 5, 5), "4x1", sparsity, exclude=["2", "last"])
    assert report.norm_before < 0.95
    assert report.norm_after == pytest.approx(1)


def test_prune_permutes_first_and_says_so():
    net, sparsity = planted()
    plain = prune(copy.deepcopy(net), sparsity, pattern="4x1", exclude=["2", "last"])
    x = torch.randn(1, 8, 5, 5)
    dense = net(x)
    report = prune(
        net, sparsity, pattern="4x1", exclude=["2", "last"], permute=True, example_inputs=x
    )
    assert plain.permuted is None and plain.to_dict()["permuted"] is None
    assert report.norm_kept > plain.norm_kept == report.permuted.norm_before
    assert str(report.permuted) in str(report).splitlines()
    assert json.loads(json.dumps(report.to_dict()))["permuted"]["pattern"] == "4x1"
    assert net[0].pattern == "4x1"
    torch.testing.assert_close(net(x), dense)  # nothing was lost but the zeros


def test_a_network_of_the_zoo_needs_no_example():
    net = zoo.create("resnet20", 10, in_channels=1, width=0.5)
    report = prune(net, 0.9, pattern="4x1", permute=True)
    assert report.permuted.norm_after > report.permuted.norm_before


def _value(layer, threshold):
    """What the terms are differences of, straight from the definition."""
    energy, spec = layer.energy, layer.spec
    total = 0.0
    for taps in energy.unbind(2):
        if spec.kind == "n:m":
            total += sum(
                group.topk(spec.n).values.sum().item()
                for row in taps
                for group in row.split(spec.m)
            )
            continue
        for rows in taps.split(spec.rows, 0):
            for block in rows.split(spec.cols, 1):
                total += max(0.0, block.sum().item() - threshold * block.numel())
    return total


@pytest.mark.parametrize(
    ("pattern", "shape", "dim"),
    [
        ("4x1", (10, 3, 2), 0), ("16x2", (21, 5, 1), 0), ("16x2", (21, 5, 1), 1),
        ("2:4", (3, 8, 2), 1), ("1:3", (2, 9, 1), 1),
    ],
)  # fmt: skip
def test_the_gain_of_an_exchange_is_what_the_exchange_adds(pattern, shape, dim):
    torch.manual_seed(0)
    layer = _Layer(torch.rand(shape, dtype=torch.float64).square(), parse_pattern(pattern), 0.4)
    threshold = layer.threshold() if layer.spec.kind == "block" else 0.0
    now = _value(layer, threshold)
    gains = layer.terms(dim).gains(range(shape[dim]))
    for p in range(shape[dim]):
        for q in range(shape[dim]):
            order = list(range(shape[dim]))
            order[p], order[q] = q, p
            other = _Layer(layer.energy.index_select(dim, torch.tensor(order)), layer.spec, 0.4)
            assert gains[p, q].item() == pytest.approx(_value(other, threshold) - now, abs=1e-6)


@pytest.mark.parametrize("pattern", ["4x1", "16x2", "32x2", "2:4"])
def test_the_search_counts_what_the_mask_keeps(pattern):
    torch.manual_seed(0)
    weight = torch.randn(64, 16, 3, 3)
    density = 0.5 if pattern == "2:4" else 0.1
    mask = pattern_mask(weight, density, pattern)
    energy = weight.square().flatten(2) / weight.square().sum()
    layer = _Layer(energy, parse_pattern(pattern), int(mask.sum()) / mask.numel())
    assert layer.kept() == pytest.approx(norm_kept(weight, mask) ** 2, rel=1e-5)


def free(*modules, shape=(2, 3, 8, 8)):
    """Sizes of the free groups of a chain."""
    net = nn.Sequential(*modules)
    return sorted(group.size for group in channel_groups(net, (torch.randn(shape),)))


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_channels_whose_order_shows_are_fixed():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    assert free(conv) == []  # the output
    assert free(conv, nn.Conv2d(4, 2, 1)) == [4]
    assert free(conv, nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1)) == []
    assert free(conv, nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)) == [4]
    assert free(conv, nn.Flatten(), nn.Linear(256, 2)) == []
    assert free(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)) == [4]
    assert free(conv, nn.PReLU(4), nn.Conv2d(4, 2, 1)) == []
    assert free(conv, nn.ChannelShuffle(2), nn.Conv2d(4, 2, 1)) == []
    assert free(conv, nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)) == []
    assert free(conv, Lambda(lambda x: x * torch.ones(1, 4, 1, 1)), nn.Conv2d(4, 2, 1)) == []
    assert free(conv, Lambda(lambda x: x[:, :2]), nn.Conv2d(2, 2, 1)) == []
    assert free(conv, Lambda(lambda x: x.mean((1, 2, 3), keepdim=True)), nn.Conv2d(1, 2, 1)) == []
    assert free(conv, Lambda(lambda x: x.mean((2, 3))), nn.Linear(4, 2)) == [4]


def test_joined_and_padded_channels_move_in_parts():
    pad = Lambda(lambda x: nn.functional.pad(x, (0, 0, 0, 0, 1, 2)))
    assert free(nn.Conv2d(3, 4, 1), pad, nn.Conv2d(7, 2, 1)) == [2, 4]
    join = Lambda(lambda x: torch.cat([x, x.relu()], 1))
    assert free(nn.Conv2d(3, 4, 1), join, nn.Conv2d(8, 2, 1)) == [4]
    ones = Lambda(lambda x: nn.functional.pad(x, (0, 0, 0, 0, 1, 2), value=1.0))
    assert free(nn.Conv2d(3, 4, 1), ones, nn.Conv2d(7, 2, 1)) == [2, 4]


class Residual(nn.Module):
    """Sums of streams that are cut in other places: 6 channels against 2 and 4."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(3, n, 1) for n in (6, 2, 4))
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.head(self.one(x) + torch.cat([self.two(x), self.three(x)], 1))


def test_sums_cut_their_channels_to_the_shortest_pieces():
    net, x = Residual().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    groups = channel_groups(net, (x,))
    assert sorted(group.size for group in groups) == [2, 4]
    want = net(x)
    shuffle(net, groups)
    torch.testing.assert_close(net(x), want)


def test_masks_and_tied_weights_go_along():
    torch.manual_seed(0)
    tied = nn.Conv2d(16, 16, 1)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), tied, nn.ReLU(), tied, nn.ReLU(), nn.Conv2d(16, 2, 1)
    ).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    prune(net, 0.7)
    net[0].learn_mask(0.5)
    net.eval()
    want, masks = net(x), [net[i].current_mask().clone() for i in (0, 2)]
    report = permute(net, x, "4x1", 0.8)
    assert report.norm_after > report.norm_before
    assert isinstance(net[2], SparseConv2d)
    assert net[2] is net[4]
    torch.testing.assert_close(net(x), want)
    assert not torch.equal(masks[1], net[2].mask)
    assert [int(m.sum()) for m in masks] == [int(net[i].current_mask().sum()) for i in (0, 2)]


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.extra = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Linear(8, 2)

    def forward(self, x):
        x = self.body(x)
        return (self.head(x), self.extra(x.mean((2, 3)))) if self.training else self.head(x)


def test_what_cannot_be_permuted_is_refused_and_left_alone():
    x = torch.randn(1, 3, 8, 8)
    net = Auxiliary()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"extra.* is not used in eval mode"):
        permute(net, x, "4x1")
    with pytest.raises(ValueError, match="cannot trace"):
        branching = Lambda(lambda x: x if x.sum() > 0 else -x)
        permute(nn.Sequential(nn.Conv2d(3, 4, 1), branching), x, "4x1")
    with pytest.raises(ValueError, match="unknown pattern"):
        permute(net, x, "5x5")
    with pytest.raises(ValueError, match="example_inputs"):
        prune(net, 0.5, pattern="4x1", permute=True)
    with pytest.raises(ValueError, match="not for 'random'"):
        prune(net, 0.5, "random", pattern="4x1", permute=True, example_inputs=x)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    assert type(net.body) is nn.Conv2d


def test_an_order_has_nothing_to_give_to_single_weights():
    net, x = network("resnet20")
    before = copy.deepcopy(net.state_dict())
    report = permute(net, x, "unstructured")
    assert report.norm_before == report.norm_after
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("pattern", ["16x2", "32x2"])
def test_wide_blocks_run_on_16x1_with_equal_values(pattern):
    torch.manual_seed(0)
    weight = torch.randn(64, 32, 3, 3)
    mask = pattern_mask(weight, 0.1, pattern)
    packed = dass_kernels.pack(weight, mask)
    assert packed.format == "16x1"
    assert packed.nnz == int(mask.sum())
    assert torch.equal(packed.to_dense(), weight * mask)
    blocks = 64 // parse_pattern(pattern).rows * 16 * 9
    assert int(mask.sum()) == keep_count(blocks, 0.1) * weight.numel() // blocks


def test_project_reports_what_the_fast_pattern_costs():
    torch.manual_seed(0)
    weight = torch.randn(32, 8, 3, 3)
    mask = pattern_mask(weight, 0.2)
    new, report = dass.project(mask, "16x2", weight)
    assert torch.equal(new, pattern_mask(weight * mask, mask.float().mean().item(), "16x2"))
    assert report.norm_kept == pytest.approx(norm_kept(weight * mask, new))
    assert report.lost == int((mask & ~new).sum())


def test_the_experiment_goes_on_where_it_stopped(tmp_path, capsys):
    base = ["--run", tmp_path / "run", "--data", "synthetic", "--images", 40, "--epochs", 1]
    base += ["--network", "resnet20", "--width", 0.25, "--sparsities", "0.9"]
    run = lambda *more: bench_patterns.main([*map(str, [*base, *more])])  # noqa: E731
    run("--patterns", "unstructured")
    first = json.loads((tmp_path / "run" / "patterns.json").read_text())
    capsys.readouterr()
    run("--patterns", "unstructured,4x1")
    said = capsys.readouterr().out
    second = json.loads((tmp_path / "run" / "patterns.json").read_text())
    assert second["rows"][0] == first["rows"][0]
    assert "0 0.9 unstructured as it is: norm" not in said and "0 0.9 4x1 permuted: norm" in said
    plain, permuted = second["rows"][1:]
    assert permuted["norm_kept"] > plain["norm_kept"]
    assert permuted["kept"] == plain["kept"]
    assert "| 4x1          |    permuted |" in said
    run("--table", tmp_path / "run" / "patterns.json")
    assert capsys.readouterr().out in said


def test_the_experiment_compares_equal_seeds_with_each_other():
    found = {(0, False): 0.50, (0, True): 0.53, (1, False): 0.60, (1, True): 0.59}
    rows = [
        {"seed": 0, "finetune_seed": again, "sparsity": 0.9, "pattern": "4x1"}
        | {"permuted": permuted, "accuracy": accuracy, "norm_kept": 0.5, "density": 0.10004}
        for (again, permuted), accuracy in found.items()
    ]
    one, all_, apart = bench_patterns.differences(rows)
    assert one == ("permuted 4x1: better in 1 of 2 pairs of the same seeds, +1.0 points on average")
    assert all_ == one.replace("4x1", "all")
    assert apart == "fine-tunings of one pruned network: 8.0 points apart (median), at most 10.0"
    assert bench_patterns.differences(rows[:1]) == []
    line = bench_patterns.table(rows).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["4x1", "as they are", "50.0", "10.00", "55.0 (50.0-60.0)"]
