"""The relaxed network with sparse layers: masks learned, frozen, and at a density of their own."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from dass.masks import pattern_fits
from dass.nn import SparseConv2d, SparseLinear
from dass.pruning import prune
from dass.schedule import cubic_sparsity
from dass.strategies import SearchConfig

__all__ = ["densities_of", "dress", "freeze_masks", "set_density", "sparse_layers"]

Sparse = (SparseConv2d, SparseLinear)


def sparse_layers(network: nn.Module) -> Iterator[nn.Module]:
    """The sparse layers of a network, in the order of registration."""
    return (module for module in network.modules() if isinstance(module, Sparse))


def densities_of(network: nn.Module, default: float) -> dict[nn.Module, float]:
    """Each sparse layer's density: that of the choice it belongs to, else the network's."""
    found = {layer: default for layer in sparse_layers(network)}
    for module in network.modules():
        own = getattr(module, "choice_density", None)
        if own is not None:
            found.update((layer, own) for layer in sparse_layers(module))
    return found


def dress(network: nn.Module, config: SearchConfig) -> None:
    """Makes convolutions and linear layers sparse, their masks learned from scaled scores.

    ``s = sqrt(6 / fan_in) w / max|w|``, so the first mask is each layer's magnitude mask. A network
    that has been dressed stays as it is.
    """
    if any(True for _ in sparse_layers(network)):
        return
    prune(network, 0.0, pattern="unstructured", exclude=config.exclude)
    for layer, density in densities_of(network, config.density).items():
        layer.pattern = _fitting(layer, config.pattern)
        layer.learn_mask(density)


def set_density(network: nn.Module, config: SearchConfig, share: float) -> None:
    """Brings learned masks to the cubic schedule's density after `share` in [0, 1] of it."""
    for layer, target in densities_of(network, config.density).items():
        if layer.scores is not None:
            layer.density = 1 - cubic_sparsity(share, 0, 1, 0.0, 1 - target)


def freeze_masks(network: nn.Module) -> None:
    """Fixes every learned mask; the network then runs on the sparse kernels."""
    for layer in sparse_layers(network):
        if layer.scores is not None:
            layer.freeze_mask()


def _fitting(layer: nn.Module, pattern: str) -> str:
    fits = pattern_fits(layer.weight.shape, pattern, getattr(layer, "groups", 1))
    return pattern if fits else "unstructured"
