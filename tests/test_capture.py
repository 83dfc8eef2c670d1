"""Capturing: every network of the zoo, operation by operation, and what is refused."""

import json

import pytest
import torch
import torch.nn.functional as F
from graph_sketch import check, ops
from torch import nn

import dass
from dass.engine.capture import capture
from dass.engine.graph import Torch
from dass.engine.interpret import run
from dass.engine.passes import simplify


def same(graphs, model, shape, tolerance=1e-10):
    """The graphs compute in float64 what the model does; the model is float64 afterwards."""
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(5)).double()
    with torch.no_grad():
        want = model.double()(x)
    for graph in graphs:
        got = run(graph, x)
        assert got.shape == want.shape
        assert (got - want).abs().max() <= tolerance * want.abs().max()


def lively(model):
    """BatchNorms as after training, biases that are not 0; in eval mode."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=draw)
                module.running_var.uniform_(0.5, 2, generator=draw)
                module.weight.normal_(generator=draw)
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(generator=draw)
    return model.eval()


def small(name):
    """A network of the zoo, thin and with few cells, and an input's shape."""
    darts = dass.zoo.NETWORKS[name].module == "darts"
    options = {"layers": 3, "channels": 4} if darts else {"width": 0.125}
    torch.manual_seed(0)
    side = 16 if darts or dass.zoo.input_shape(name)[1] == 32 else 40
    return lively(dass.zoo.create(name, num_classes=10, **options)), (3, side, side)


@pytest.mark.parametrize("sparsity", [0.9, 0.99])
@pytest.mark.parametrize("name", dass.zoo.list())
def test_a_pruned_network_means_the_same_captured_and_simplified(name, sparsity):
    model, shape = small(name)
    dass.prune(model, sparsity)
    graph = capture(model, torch.randn(1, *shape))
    assert "torch" not in ops(graph) and graph.batch is None
    simple, report = simplify(graph, torch.float64)
    assert sum(report.channels.values()) or sparsity == 0.9
    same((graph, simple), dass.densify(model), shape)


def test_an_imagenet_stem_of_cells_and_tensorflow_padding():
    for name, options in (
        ("dass_tiny", {"layers": 3, "channels": 6, "stem": "imagenet"}),
        ("mobilenet_v2_imagenet", {"width": 0.25, "padding": "same"}),
    ):
        model = lively(dass.zoo.create(name, num_classes=10, **options))
        graph = capture(model, torch.randn(1, 3, 48, 48))
        assert "torch" not in ops(graph)
        same((graph, simplify(graph, torch.float64)[0]), model, (3, 48, 48))


class Calls(nn.Module):
    """A convolution and then a function of its result."""

    def __init__(self, function, channels=4):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.function = function

    def forward(self, x):
        return self.function(self.conv(x))


def captured(function, shape=(3, 9, 9), channels=4):
    """The graph of a function, checked against it; its nodes after the first convolution."""
    model = Calls(function, channels).eval()
    graph = capture(model, torch.randn(2, *shape))
    simple, _ = simplify(graph, torch.float64)
    check(graph)
    check(simple)
    same((graph, simple), model, shape)
    return [node for node in graph if node.op != "input"][1:]


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (F.relu, "relu"),
        (F.relu_, "relu"),
        (lambda x: x.clamp(min=0), "relu"),
        (F.relu6, "relu6"),
        (lambda x: F.hardtanh(x, 0, 6), "relu6"),
        (lambda x: x.clamp(0, 6), "relu6"),
        (F.hardswish, "hardswish"),
        (lambda x: F.silu(x, inplace=True), "silu"),
        (torch.sigmoid, "sigmoid"),
        (F.hardsigmoid, "hardsigmoid"),
    ],
)
def test_activations(function, word):
    (node,) = captured(function)
    assert node.op == "act" and node.activation == word


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True),
        lambda x: F.max_pool2d(x, 3, 2, 1, dilation=2, ceil_mode=True),
        lambda x: F.max_pool2d(x, (3, 2), (2, 3), (1, 0)),
        lambda x: F.avg_pool2d(x, 3, 2, 1),
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True),
        lambda x: F.avg_pool2d(x, 2, 2, 1, ceil_mode=True, count_include_pad=False),
        lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=5),
        lambda x: F.avg_pool2d(x, 2, 2, 1, ceil_mode=True, divisor_override=3),
        lambda x: F.adaptive_avg_pool2d(x, 3),
        lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 2),
    ],
)
def test_pools(function):
    assert captured(function)[-1].op == "pool"


def test_a_mean_whose_padding_counts_but_not_its_overhang_runs_in_torch():
    for function in (
        lambda x: F.avg_pool2d(x, 4, 3, 1, ceil_mode=True),
        lambda x: F.adaptive_avg_pool2d(x, 4),
    ):
        (node,) = captured(function)
        assert isinstance(node, Torch) and node.reason


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: x.mean((2, 3)),
        lambda x: x.mean((-1, -2), keepdim=True),
        lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1),
        lambda x: F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1),
        lambda x: x.mean((2, 3)).unsqueeze(-1).unsqueeze(-1) * x,
        lambda x: x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1)),
        lambda x: F.adaptive_avg_pool2d(x, 1) + x.mean((2, 3), keepdim=True),
    ],
)
def test_means_are_vectors(function):
    nodes = captured(function)
    assert nodes[0].op == "mean"
    reshaped = [node for node in nodes if node.op == "torch"]
    assert all(node.target == "aten.reshape.default" for node in reshaped)
    assert len(reshaped) == (nodes[-1].op == "torch"), "only an output has to be a picture again"


@pytest.mark.parametrize(
    ("function", "want"),
    [
        (lambda x: x.flatten(1), ["flatten"]),
        (lambda x: x.view(x.size(0), -1), ["flatten"]),
        (lambda x: x.reshape(-1, 4 * 9 * 9), ["flatten"]),
        (lambda x: F.dropout(x, 0.5, training=False), []),
        (lambda x: F.dropout2d(x, 0.5, training=False), []),
        (lambda x: x.contiguous().clone().detach(), []),
        (lambda x: nn.Identity()(x), []),
        (lambda x: x + x, ["add"]),
        (lambda x: x * x, ["mul"]),
        (lambda x: (2 - x) / 4 + 1, ["affine", "affine", "affine"]),
        (lambda x: x * F.relu6(x + 3) / 6, ["affine", "act", "mul", "affine"]),
        (lambda x: x - torch.arange(4.0).view(1, 4, 1, 1), ["affine"]),
        (lambda x: torch.cat([x, F.relu(x)], 1), ["act", "concat"]),
        (lambda x: torch.zeros_like(x) + x, ["affine", "add"]),
    ],
)
def test_other_operations(function, want):
    assert [node.op for node in captured(function)] == want


@pytest.mark.parametrize(
    ("function", "convs"),
    [
        (lambda x: x[:, :, 1:, 1:], 1),
        (lambda x: x[:, :, ::2, 1::3], 1),
        (lambda x: x[:, :, 1:-1][:, :, ::2], 1),
        (lambda x: x[:, :, ::2][:, :, ::2, ::2], 1),
        (lambda x: x[:, :, ::2][:, :, 1:], 2),
        (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)), 1),
        (lambda x: F.pad(x, (1, -2, 0, 3)), 1),
        (lambda x: F.pad(x[:, :, 1:], (0, 0, 1, 0)), 2),
        (lambda x: x[:, 1:3], 1),
        (lambda x: torch.cat(list(x.chunk(2, 1))[::-1], 1), 2),
        (lambda x: x.split([1, 3], 1)[1], 1),
    ],
)
def test_slices_and_padding_are_convolutions_by_one(function, convs):
    nodes = captured(function)
    assert [node.op for node in nodes if node.op != "concat"] == ["conv"] * convs


class Shifted(nn.Module):
    """Slices and padding in front of a convolution."""

    def __init__(self, shift, **options):
        super().__init__()
        self.conv, self.shift = nn.Conv2d(3, 4, **options), shift

    def forward(self, x):
        return self.conv(self.shift(x))


@pytest.mark.parametrize(
    ("shift", "options", "padding", "convs"),
    [
        (lambda x: F.pad(x, (-1, 1, -1, 1)), {"kernel_size": 1, "stride": 2}, (-1, 1, -1, 1), 1),
        (lambda x: x[:, :, 1:, 1:], {"kernel_size": 1, "stride": 2}, (-1, 0, -1, 0), 1),
        (lambda x: F.pad(x, (0, 1, 0, 1)), {"kernel_size": 3, "padding": 1}, (1, 2, 1, 2), 1),
        # What is cropped and then padded is 0, not the pixel that was there.
        (lambda x: x[:, :, 1:], {"kernel_size": 3, "padding": 1}, (1, 1, 1, 1), 2),
        (lambda x: x[:, :, ::2], {"kernel_size": 3}, (0, 0, 0, 0), 2),
        (lambda x: x, {"kernel_size": 3, "padding": "same", "dilation": 2}, (2, 2, 2, 2), 1),
        (lambda x: x, {"kernel_size": 3, "padding": "valid"}, (0, 0, 0, 0), 1),
    ],
)
def test_the_next_convolution_takes_a_crop_or_zeros(shift, options, padding, convs):
    model = Shifted(shift, **options).eval()
    graph = capture(model, torch.randn(2, 3, 9, 9))
    same((graph,), model, (3, 9, 9))
    assert ops(graph) == ["input"] + ["conv"] * convs
    assert graph.nodes[-1].padding == padding


def test_sources_name_the_modules():
    model, shape = small("resnet20")
    graph, _ = simplify(capture(model, torch.randn(2, *shape)))
    assert graph.nodes[1].source == "conv1 (Conv2d) + bn1 (BatchNorm2d) + relu (ReLU)"


def test_a_change_in_place_is_seen_by_every_later_reader():
    def function(x):
        y = F.relu_(x)
        return x + y

    nodes = captured(function)
    assert [node.op for node in nodes] == ["act", "add"]
    with pytest.raises(ValueError, match="in place"):
        capture(Calls(lambda x: (x[:, :, 1:].mul_(2), x)[1]).eval(), torch.randn(2, 3, 9, 9))


def shuffle(x):
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


@pytest.mark.parametrize(
    ("function", "targets"),
    [
        (lambda x: torch.roll(x, 1, 2), ["aten.roll.default"]),
        (shuffle, ["aten.view.default", "aten.transpose.int", "aten.reshape.default"]),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), ["aten.pad.default"]),
        (lambda x: x - F.relu(x), ["aten.sub.Tensor"]),
        (lambda x: x + x.mean((2, 3), keepdim=True), ["aten.reshape.default", "aten.add.Tensor"]),
        (lambda x: torch.softmax(x.flatten(1), 1), ["aten.softmax.int"]),
        (lambda x: x + torch.arange(9.0), ["aten.add.Tensor"]),
        (lambda x: x / (1 + x.abs()), ["aten.abs.default", "aten.div.Tensor"]),
    ],
)
def test_what_has_no_node_runs_in_torch(function, targets):
    found = [node for node in captured(function) if isinstance(node, Torch)]
    assert [node.target for node in found] == targets
    assert all(node.reason for node in found)


def test_a_torch_node_is_plain_data():
    graph = capture(Calls(shuffle).eval(), torch.randn(2, 3, 4, 4))
    view = next(node for node in graph if isinstance(node, Torch))
    assert json.loads(json.dumps(view.arguments)) == [{"input": 0}, [{"batch": True}, 2, 2, 4, 4]]


def test_a_model_that_fixes_its_batch_is_captured_for_it():
    graph = capture(Calls(lambda x: x.reshape(2, 4 * 81)).eval(), torch.randn(2, 3, 9, 9))
    assert graph.batch == 2
    assert ops(graph) == ["input", "conv", "flatten"]


def test_a_weight_that_is_computed_is_taken_as_it_is():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))).eval()
    graph = capture(model, torch.randn(2, 3, 6, 6))
    assert ops(graph) == ["input", "conv"]
    same((graph,), model, (3, 6, 6), tolerance=1e-6)


def test_the_model_is_left_as_it_is():
    model, shape = small("resnet20")
    dass.prune(model, 0.9)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    graph = capture(model, torch.randn(2, *shape))
    simplify(graph)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Two(nn.Module):
    def forward(self, x):
        return x, x + 1


class Takes(nn.Module):
    def forward(self, x, y):
        return x + y


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "example", "says"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1)), None, "training mode: call model.eval"),
        (nn.Conv2d(3, 4, 1).double().eval(), None, "must be float32"),
        (nn.Conv2d(3, 4, 1, device="meta").eval(), None, "must be on the CPU"),
        (nn.Identity().eval(), torch.zeros(3, 4, 4), r"example must be float32 \[B, C, H, W\]"),
        (nn.Identity().eval(), torch.zeros(1, 3, 4, 4).double(), "example must be float32"),
        (nn.Identity().eval(), (torch.zeros(1, 3, 4, 4),) * 2, "several inputs"),
        (Takes().eval(), None, "torch.export cannot capture"),
        (Branches().eval(), None, "torch.export cannot capture"),
        (Two().eval(), None, "2 outputs"),
        (Calls(lambda x: torch.ones(2)).eval(), None, "does not depend on its input"),
        (Calls(lambda x: x.argmax(1)).eval(), None, "float32 throughout"),
        (Calls(lambda x: x.transpose(0, 1)).eval(), None, "not the batch"),
        (Calls(lambda x: x.max(1)[0]).eval(), None, "several tensors"),
        (Calls(lambda x: F.dropout(x, 0.5, training=True)).eval(), None, "drops at random"),
    ],
)
def test_what_is_refused(model, example, says):
    with pytest.raises(ValueError, match=says):
        capture(model, torch.randn(2, 3, 4, 4) if example is None else example)


def test_the_interpreter_refuses_another_shape():
    graph = capture(nn.Conv2d(3, 4, 1).eval(), torch.randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"x must be \[B, 3, 4, 4\]"):
        run(graph, torch.randn(2, 3, 5, 4))
