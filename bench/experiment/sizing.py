"""Widths and exact numbers of nonzeros: every network of a sparsity keeps the same number.

The number N is that of MobileNet-v2 at the protocol's width with ``ceil(k n)`` weights kept in each
layer of n, at density k. Of every other network the width is that with the number of weights
nearest to MobileNet-v2's; what each layer keeps then adds up to exactly N (`allot`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bench.experiment.protocol import Protocol
from bench.experiment.systems import BASELINE, SYSTEMS, System
from dass import zoo
from dass.genotype import Genotype
from dass.masks import keep_count, layer_counts

__all__ = ["Layer", "Sized", "allot", "nonzeros_of", "size_of"]

_MOST_CHANNELS = 512
_WIDTHS = tuple(round(0.05 * i, 2) for i in range(1, 21))
_RESNET_WIDTHS = tuple(i / 16 for i in range(1, 17))  # 4 channels more each


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer. own: density of its own in a genotype, or None."""

    name: str
    shape: tuple[int, ...]
    depthwise: bool
    own: float | None

    @property
    def weights(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Sized:
    """A network of `dass.zoo.create` and how many weights each of its layers keeps."""

    network: str
    overrides: dict
    kept: dict[str, int]
    weights: int

    def densities(self, layers: Sequence[Layer]) -> dict[str, float]:
        """Per layer, such that :func:`dass.masks.keep_count` gives `kept` back."""
        return {layer.name: self.kept[layer.name] / layer.weights for layer in layers}


def layers_of(network: str, overrides: Mapping) -> list[Layer]:
    """The layers of a network of the zoo, without making its weights."""
    with torch.device("meta"):
        model = zoo.create(network, **overrides)
    own = model.edge_densities() if hasattr(model, "edge_densities") else {}
    return [
        Layer(name, tuple(m.weight.shape), getattr(m, "groups", 1) > 1, own.get(name))
        for name, m in model.named_modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    ]


def nonzeros_of(protocol: Protocol, sparsity: float) -> int:
    """N."""
    density = round(1 - sparsity, 6)
    reference = layers_of(SYSTEMS[BASELINE].network, {"width": protocol.width})
    return sum(keep_count(layer.weights, density) for layer in reference)


def size_of(
    system: System, protocol: Protocol, sparsity: float, genotype: Genotype | None = None
) -> Sized:
    """The network of a system at a sparsity.

    Args:
        genotype: of a system that is searched.

    Raises:
        ValueError: no width leaves the network N nonzeros.
    """
    total = nonzeros_of(protocol, sparsity)
    overrides = _overrides(system, protocol, total, genotype or system.genotype())
    layers = layers_of(system.network, overrides)
    kept = allot(layers, total, system.densities, round(1 - sparsity, 6))
    return Sized(system.network, overrides, kept, sum(layer.weights for layer in layers))


def _overrides(
    system: System, protocol: Protocol, total: int, genotype: Genotype | None
) -> dict[str, object]:
    """The network's width, or its channels and cells."""
    if system.densities == "exempt":
        return {"width": _exempt_width(system.network, total)}
    if system.network == SYSTEMS[BASELINE].network:
        return {"width": protocol.width}
    target = _weights(SYSTEMS[BASELINE].network, {"width": protocol.width})

    def distance(overrides: Mapping) -> int:
        return abs(_weights(system.network, overrides) - target)

    if genotype is None:
        return min(({"width": w} for w in _RESNET_WIDTHS), key=distance)
    cells = {"genotype": genotype.to_json(), "layers": protocol.layers}
    low, high = 2, _MOST_CHANNELS
    while low < high:
        middle = (low + high) // 2
        over = _weights(system.network, {**cells, "channels": middle}) >= target
        low, high = (low, middle) if over else (middle + 1, high)
    return min(({**cells, "channels": c} for c in (low, max(low - 1, 2))), key=distance)


def _exempt_width(network: str, total: int) -> float:
    """The greatest width whose depthwise weights, all kept, are at most three quarters of N."""
    fitting = [
        width
        for width in _WIDTHS
        if sum(x.weights for x in layers_of(network, {"width": width}) if x.depthwise)
        <= 0.75 * total
    ]
    if not fitting:
        raise ValueError(f"{network}: the depthwise weights alone are more than {total} nonzeros")
    return fitting[-1]


def _weights(network: str, overrides: Mapping) -> int:
    return sum(layer.weights for layer in layers_of(network, overrides))


def allot(layers: Sequence[Layer], total: int, scope: str, density: float) -> dict[str, int]:
    """How many weights each layer keeps: exactly `total` in all, at least 1 each.

    uniform: ``f k n`` of a layer of n weights, with k the genotype's density of it or else
        `density`, and one factor f for all. exempt: all of a depthwise layer, the others uniform.
    erk: :func:`dass.masks.layer_counts`.

    Raises:
        ValueError: an unknown scope, or more layers than weights to keep.
    """
    fixed = {x.name: x.weights for x in layers if scope == "exempt" and x.depthwise}
    free = [layer for layer in layers if layer.name not in fixed]
    rest = total - sum(fixed.values())
    if not len(free) <= rest <= sum(layer.weights for layer in free):
        raise ValueError(f"{rest} nonzeros cannot be spread over {len(free)} layers")
    if scope == "erk":
        shapes = [layer.shape for layer in free]
        whole = sum(layer.weights for layer in free)
        counts = dict(
            zip((x.name for x in free), layer_counts(shapes, 1 - rest / whole, "erk"), strict=True)
        )
    elif scope in ("uniform", "exempt"):
        counts = _scaled(free, rest, lambda layer: layer.own or density)
    else:
        raise ValueError(f"unknown scope {scope!r}; known: uniform, exempt, erk")
    return fixed | _corrected(free, counts, rest)


def _scaled(free: Sequence[Layer], rest: int, own: Callable[[Layer], float]) -> dict[str, int]:
    """With the greatest factor, to one part in 2^40, that keeps at most `rest`."""

    def at(factor: float) -> dict[str, int]:
        return {x.name: keep_count(x.weights, min(1.0, factor * own(x))) for x in free}

    low, high = 0.0, 1 / min(own(layer) for layer in free)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(at(middle).values()) > rest else (middle, high)
    return at(low) if low else dict.fromkeys((layer.name for layer in free), 1)


def _corrected(free: Sequence[Layer], counts: dict[str, int], rest: int) -> dict[str, int]:
    """One weight more or less in the largest layers until the sum is `rest`."""
    order = sorted(free, key=lambda layer: -layer.weights)
    left = rest - sum(counts.values())
    while left:
        for layer in order:
            step = (left > 0) - (left < 0)
            if 1 <= counts[layer.name] + step <= layer.weights:
                counts[layer.name] += step
                left -= step
    return counts
