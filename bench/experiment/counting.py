"""What a network costs by counting: weights, nonzeros, multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dass.sources import count_weights
from dass.surgery import evaluating

__all__ = ["count"]


def count(model: nn.Module, image: Sequence[int]) -> dict[str, int]:
    """weights and nonzeros of convolutions and linear layers, and multiply-adds for one image.

    macs: of the network as if dense, ``sum n H W`` over layers of n weights and H x W outputs.
    nonzero_macs: the same with the nonzeros of each layer.
    image: (channels, height, width).
    """
    pixels: dict[nn.Module, int] = {}

    def note(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        pixels[module] = output[0, 0].numel() if output.dim() == 4 else 1

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        with evaluating(model), torch.inference_mode():
            model(torch.zeros(1, *image))
    finally:
        for handle in handles:
            handle.remove()
    return {
        **count_weights(model),
        "macs": sum(m.weight.numel() * pixels[m] for m in layers),
        "nonzero_macs": sum(int(m.weight.count_nonzero()) * pixels[m] for m in layers),
    }
