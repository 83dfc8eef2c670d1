"""Networks of genotypes: sizes, gradients, drop path, auxiliary head, pruning, files."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dass
from dass import Genotype, zoo
from dass.zoo import darts

# Parameters and multiply-adds at 32x32 with 10 classes, without auxiliary head. In millions these
# are the figures of the papers: 0.989 / 158, 1.714 / 275, 5.379 / 970, 10.569 / 1739, 3.962 / 612,
# 3.936 / 624, 2.118 / 340 and 3.349 / 528.
SIZES = {
    "darts_dass_baseline": (2_118_142, 339_661_440),
    "darts_v1": (3_169_414, 500_987_520),
    "darts_v2": (3_349_342, 528_359_040),
    "dass_large": (10_568_782, 1_739_297_664),
    "dass_medium": (5_379_052, 969_972_672),
    "dass_one_loop": (2_610_190, 414_338_688),
    "dass_small": (1_713_790, 275_103_360),
    "dass_small_90": (3_936_430, 623_772_288),
    "dass_small_95": (3_962_134, 611_800_704),
    "dass_tiny": (988_510, 158_036_160),
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """These networks are small: threads cost more than they bring."""


def count(size=32, **facts):
    """(parameters, multiply-adds of one image), without allocating or computing anything."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.inference_mode():
        net = zoo.create(**facts).eval()
        net(torch.zeros(1, 3, size, size))
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops() // 2


def tiny(genotype=None, **options):
    genotype = Genotype.random(0) if genotype is None else genotype
    return dass.build(genotype, channels=4, layers=3, classes=5, **options)


def test_the_sizes_of_every_found_network_are_tested():
    assert set(SIZES) == set(zoo.FOUND["networks"])


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_macs(name):
    assert count(name=name) == SIZES[name]


def test_sizes_in_imagenet_form_and_with_an_auxiliary_head():
    imagenet = {"num_classes": 1000, "channels": 48, "layers": 14, "stem": "imagenet"}
    # DARTS, table 2: 4.7 M parameters.
    assert count(224, name="darts_v2", **imagenet) == (4_718_752, 529_911_552)
    assert count(name="darts_v2", auxiliary=True) == (3_825_768, SIZES["darts_v2"][1])


@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_any_genotype_trains(seed):
    net = tiny(Genotype.random(seed))
    x = torch.randn(3, 3, 16, 16)
    logits = net(x)
    assert logits.shape == (3, 5)
    nn.functional.cross_entropy(logits, torch.arange(3)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert net.eval()(x).shape == (3, 5)


def test_a_cell_may_have_edges_of_none():
    nodes = [[("none", 0), ("skip_connect", 1)]] * 4
    net = tiny(Genotype(nodes, nodes)).eval()
    assert net(torch.randn(2, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize("layers", [1, 2, 3, 6, 20])
def test_reductions_lie_at_thirds_and_double_the_channels(layers):
    with torch.device("meta"):
        net = dass.build(Genotype.random(0), 4, layers, 10)
    at = [i for i in range(layers) if i in (layers // 3, 2 * layers // 3)]
    assert net.classifier.in_features == 16 * 2 ** len(at)
    sizes = []
    for cell in net.cells:
        cell.register_forward_hook(lambda m, args, y: sizes.append(y.shape[-1]))
    net(torch.zeros(2, 3, 32, 32, device="meta"))
    assert sizes == [32 // 2 ** sum(r <= i for r in at) for i in range(layers)]


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("size", [(33, 47), (64, 64)])
def test_other_sizes_of_images(stem, size):
    net = tiny(in_channels=1, stem=stem).eval()
    assert net(torch.randn(2, 1, *size)).shape == (2, 5)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_auxiliary_head_is_there_in_training_only(stem):
    torch.manual_seed(0)
    plain = tiny(stem=stem)
    net = tiny(stem=stem, auxiliary=True)
    net.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(4, 3, 32, 32) if stem == "cifar" else torch.randn(4, 3, 224, 224)
    logits, auxiliary = net(x)
    assert logits.shape == auxiliary.shape == (4, 5)
    (logits.sum() + 0.4 * auxiliary.sum()).backward()
    assert all(p.grad is not None for p in net.parameters())
    plain(x)  # moves the same running statistics
    assert torch.equal(net.eval()(x), plain.eval()(x))


def test_drop_path_keeps_the_expectation_and_whole_images():
    torch.manual_seed(0)
    y = darts.drop_path(torch.ones(20_000, 1, 1, 2), 0.3)
    assert torch.equal(y[..., 0], y[..., 1])
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.7)}
    # The mean of n images has standard deviation sqrt(p / (1 - p) / n).
    assert abs(y.mean() - 1) < 4 * (0.3 / 0.7 / 20_000) ** 0.5


def test_drop_path_spares_the_identity_and_evaluation():
    torch.manual_seed(0)
    skips = [[("skip_connect", 0), ("skip_connect", 1)]] * 4
    x = torch.randn(4, 3, 8, 8)
    net = tiny()
    plain = net(x)
    net.drop_path_prob = 0.5
    assert not torch.equal(net(x), plain)
    evaluated = net.eval()(x)
    net.drop_path_prob = 0.0
    assert torch.equal(net(x), evaluated)
    cell = darts.Cell(Genotype(skips, skips).normal, 3, 3, 4)
    assert torch.equal(cell(x, x, 0.9), cell(x, x))


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_every_batchnorm_follows_a_convolution_that_nothing_else_reads(stem):
    net = tiny(zoo.darts.found_genotype("dass_95"), stem=stem)
    modules = dict(net.named_modules())
    norms = 0
    for node in torch.fx.symbolic_trace(net).graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d):
            (source,) = node.all_input_nodes
            assert isinstance(modules[source.target], nn.Conv2d)
            assert len(source.users) == 1
            norms += 1
    assert norms == sum(isinstance(m, nn.BatchNorm2d) for m in modules.values())
    leaves = {type(m) for m in modules.values() if not [*m.children()] and [*m.parameters()]}
    assert leaves == {nn.Conv2d, nn.BatchNorm2d, nn.Linear}


@pytest.mark.parametrize("name", ["dass_tiny", "darts_v1", "random_cell"])
def test_pruned_and_sparse_give_the_same_logits(name):
    torch.manual_seed(0)
    net = zoo.create(name, channels=6, layers=3).eval()
    report = dass.prune(net, 0.99)
    assert report.density < 0.1
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        expected = dass.densify(net)(x)
        sparse, _ = dass.sparsify(net, x, policy="always")
        torch.testing.assert_close(sparse(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("dass_small", {"channels": 6, "layers": 4, "auxiliary": True}),
        ("cells", {"genotype": Genotype.random(4).to_json(), "channels": 4, "layers": 3}),
        ("random_cell", {"seed": 5, "channels": 6, "layers": 4, "stem": "imagenet"}),
    ],
)
def test_saved_and_loaded_by_name(name, overrides, tmp_path):
    net = zoo.create(name, 7, **overrides)
    dass.prune(net, 0.9)
    net.eval()
    dass.save(net, tmp_path / "net.safetensors")
    loaded = dass.load(tmp_path / "net.safetensors")
    assert loaded.genotype == net.genotype
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(x), net(x))


def test_seed_chooses_the_cells_and_width_the_channels():
    with torch.device("meta"):
        assert zoo.create("random_cell").genotype == Genotype.random(0)
        assert zoo.create("random_cell", seed=9).genotype == Genotype.random(9)
        net = zoo.create("dass_tiny", width=0.5, layers=3)
        assert net.cells[0].preprocess0[1].out_channels == 15
        net = zoo.create("dass_tiny", width=0.001, layers=3)
        assert net.cells[0].preprocess0[1].out_channels == 2


def test_densities_of_edges_are_named_by_convolution():
    nodes = [[("skip_connect", 0), ("sep_conv_3x3", 1, 0.05)]] + [
        [("dil_conv_3x3", 0), ("max_pool_3x3", 1)]
    ] * 3
    net = tiny(Genotype(nodes, [[("skip_connect", 0, 0.1), ("none", 1)]] * 4))
    densities = net.edge_densities()
    convs = {n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    assert set(densities) < convs
    assert densities["cells.0.ops.1.1"] == densities["cells.0.ops.1.6"] == 0.05
    assert densities["cells.1.ops.0.conv1"] == 0.1
    assert tiny().edge_densities() == {}


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"genotype": {}}, TypeError, "genotype must be a dass.Genotype, got dict"),
        ({"channels": 1}, ValueError, "channels must be an integer of at least 2, got 1"),
        ({"channels": 4.0}, ValueError, "channels must be an integer"),
        ({"layers": 0}, ValueError, "layers must be an integer of at least 1, got 0"),
        ({"layers": True}, ValueError, "layers must be an integer"),
        ({"classes": 0}, ValueError, "classes must be"),
        ({"in_channels": 0}, ValueError, "in_channels must be"),
        ({"auxiliary": 1}, ValueError, "auxiliary must be True or False, got 1"),
        ({"stem": "mnist"}, ValueError, "stem must be one of cifar, imagenet, got 'mnist'"),
    ],
)
def test_arguments_out_of_range(arguments, error, says):
    valid = {"genotype": Genotype.random(0), "channels": 4, "layers": 3, "classes": 5}
    with pytest.raises(error, match=says):
        dass.build(**{**valid, **arguments})
