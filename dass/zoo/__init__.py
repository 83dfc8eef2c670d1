"""The networks, by name.

    net = dass.zoo.create("resnet18", num_classes=10, width=0.25)

A network is one row of ``NETWORKS`` and one builder in a file of this folder; the file is imported
when it is first asked for. A builder is a function ``build(num_classes, *, in_channels=3,
width=1.0, ...) -> nn.Module``. It uses plain ``nn.Conv2d``, ``nn.Linear``, ``nn.BatchNorm2d`` and
``nn.ReLU`` / ``nn.ReLU6``, with each BatchNorm called directly on its convolution's output, so that
folding, pruning and layer swapping need to know nothing about the network.
"""

import builtins
import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

__all__ = ["create", "input_shape", "list"]

_CIFAR = (3, 32, 32)
_IMAGENET = (3, 224, 224)


@dataclass(frozen=True)
class Network:
    """One row: which function builds the network, and for what data it was designed."""

    module: str  # file of this folder
    builder: str  # function in that file
    num_classes: int  # used when the caller names no number of classes
    input_shape: tuple[int, int, int]  # (channels, height, width)
    fixed: Mapping[str, object] = field(default_factory=dict)  # what makes it this network


# Cells that a search has found, and the networks of them: {"cells": {name: the fields of a genotype
# and its source}, "networks": {name: {"cell", "channels", "layers"}}}.
FOUND = json.loads(Path(__file__).with_name("found.json").read_text(encoding="utf-8"))

NETWORKS: dict[str, Network] = {
    "mobilenet_v2": Network("mobilenet_v2", "cifar", 10, _CIFAR),
    "mobilenet_v2_imagenet": Network("mobilenet_v2", "imagenet", 1000, _IMAGENET),
    "resnet18": Network("resnet", "resnet18", 10, _CIFAR, {"stem": "cifar"}),
    "resnet18_imagenet": Network("resnet", "resnet18", 1000, _IMAGENET, {"stem": "imagenet"}),
    "resnet20": Network("resnet", "option_a", 10, _CIFAR, {"blocks": 3}),
    "resnet32": Network("resnet", "option_a", 10, _CIFAR, {"blocks": 5}),
    "resnet44": Network("resnet", "option_a", 10, _CIFAR, {"blocks": 7}),
    "resnet56": Network("resnet", "option_a", 10, _CIFAR, {"blocks": 9}),
    "resnet50": Network("resnet", "resnet50", 1000, _IMAGENET),
    "efficientnet_lite0": Network("efficientnet_lite", "lite0", 1000, _IMAGENET),
    "efficientnet_v2_s": Network("efficientnet_v2", "small", 1000, _IMAGENET),
    "random_cell": Network("darts", "random_cell", 10, _CIFAR),
    "cells": Network("darts", "cells", 10, _CIFAR),
    **{name: Network("darts", "found", 10, _CIFAR, {"name": name}) for name in FOUND["networks"]},
}


def list() -> builtins.list[str]:
    """The names that `create` takes, sorted."""
    return sorted(NETWORKS)


def input_shape(name: str) -> tuple[int, int, int]:
    """The input ``(channels, height, width)`` that a network was designed for.

    Other heights and widths work too: every network here ends in a global average pool.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    return _row(name).input_shape


def create(name: str, num_classes: int | None = None, **overrides) -> nn.Module:
    """Builds a network, freshly initialised from torch's global random generator.

    Args:
        name: one of `list()`.
        num_classes: outputs of the classifier. By default 10 for the CIFAR networks and 1000 for
            the ImageNet ones.
        **overrides: for every network ``width`` (float > 0, multiplies the channel counts) and
            ``in_channels`` (int); further ones are documented at the network's builder.

    Returns:
        A module in training mode: float32 [B, C, H, W] -> float32 logits [B, num_classes].

    Raises:
        ValueError: an unknown name (the message lists the known ones) or a value out of range.
        TypeError: an override that this network does not take (the message lists those it does).
    """
    row = _row(name)
    build = getattr(importlib.import_module(f"{__name__}.{row.module}"), row.builder)
    allowed = sorted(set(inspect.signature(build).parameters) - {"num_classes"} - set(row.fixed))
    unknown = sorted(set(overrides) - set(allowed))
    if unknown:
        raise TypeError(
            f"{name} takes no override {', '.join(unknown)}; it takes {', '.join(allowed)}"
        )
    classes = row.num_classes if num_classes is None else num_classes
    for what, value in (("num_classes", classes), ("in_channels", overrides.get("in_channels", 1))):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{what} must be an integer of at least 1, got {value!r}")
    if not overrides.get("width", 1.0) > 0:
        raise ValueError(f"width must be greater than 0, got {overrides['width']!r}")
    model = build(classes, **row.fixed, **overrides)
    model._dass_zoo = (name, {"num_classes": classes, **overrides})  # dass.save records it
    return model


def scaled_channels(channels: int, width: float, divisor: int = 8) -> int:
    """``channels * width`` rounded to a multiple of ``divisor``, never below 90 % of the product.

    The rule of the MobileNet and EfficientNet papers' code; ``width=1`` changes nothing as long as
    ``channels`` is a multiple of ``divisor``.
    """
    exact = channels * width
    rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * exact else rounded + divisor


def init_weights(module: nn.Module) -> None:
    """He initialisation by fan-out for convolutions, N(0, 0.01) for linear layers, in place."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, 0, 0.01)
            nn.init.zeros_(m.bias)


def _row(name: str) -> Network:
    try:
        return NETWORKS[name]
    except KeyError:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(list())}") from None
