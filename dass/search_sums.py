"""What is counted in an epoch of the search, and what is told of the network at its end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from dass.supernet import Architecture

__all__ = ["EpochSums", "entropy", "kept_share"]


@dataclass
class EpochSums:
    """Of the epoch so far."""

    loss: float = 0.0
    correct: int = 0
    images: int = 0
    batches: int = 0
    val_loss: float = 0.0
    val_correct: int = 0
    val_images: int = 0
    seconds: float = 0.0

    def add(self, loss: float, correct: int, images: int) -> None:
        self.loss += loss * images
        self.correct += correct
        self.images += images
        self.batches += 1

    def add_val(self, loss: float, correct: int, images: int) -> None:
        self.val_loss += loss * images
        self.val_correct += correct
        self.val_images += images


def kept_share(layers: Iterable[nn.Module]) -> float:
    """Kept / all weights of sparse layers; 1 if there are none."""
    kept, weights = 0, 0
    for layer in layers:
        kept += int(layer.current_mask().sum())
        weights += layer.weight.numel()
    return kept / weights if weights else 1.0


@torch.no_grad()
def entropy(architecture: Architecture) -> float:
    """Mean over the edges of ``-sum p log p``, in nats; ln(choices) at the start."""
    p = torch.cat(list(architecture.weights().values()))
    return float(-(p * p.clamp_min(1e-12).log()).sum(-1).mean())
