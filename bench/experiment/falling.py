"""Masks that are learned while their density falls.

With 1 % of each layer kept at once, no pixel of the image reaches MobileNet-v2's classifier, so no
score has a gradient and nothing is learned. Along a schedule the scores see every cut coming.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch
from torch import nn

from dass.methods import Stage
from dass.schedule import cubic_sparsity
from dass.sparse_supernet import sparse_layers

__all__ = ["FallingDensity", "falling"]

_SHARE = 0.75  # of the stage's steps in which the density falls


class FallingDensity:
    """A sparsifier of :func:`dass.training.train`: cubic from 1 to each layer's density.

    The schedule is that of Zhu & Gupta 2017, arXiv 1710.01878.

    Args:
        model: its masks are being learned, at their final densities.
        steps: of the training.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        self.layers = [layer for layer in sparse_layers(model) if layer.scores is not None]
        self.targets = [layer.density for layer in self.layers]
        self.end = max(1, int(_SHARE * steps))
        self._move_to(0)

    def _move_to(self, done: int) -> None:
        self.done = done
        for layer, target in zip(self.layers, self.targets, strict=True):
            if done >= self.end:
                layer.density = target
            else:
                layer.density = 1 - cubic_sparsity(done, 0, self.end, 0.0, 1 - target)

    def forward(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def replaces_step(self) -> bool:
        return False

    def step(self) -> None:
        self._move_to(self.done + 1)

    def state_dict(self) -> dict:
        return {"done": self.done}

    def load_state_dict(self, state: dict) -> None:
        self._move_to(state["done"])


def falling(stages: list[Stage]) -> list[Stage]:
    """HYDRA's stages, the density of "prune" falling along the schedule."""
    return [
        replace(stage, sparsifier=FallingDensity) if stage.name == "prune" else stage
        for stage in stages
    ]
