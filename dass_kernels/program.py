"""Compiled networks: steps that run in one call; csrc/program/step.h says which there are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C


class Program:
    """Steps over pictures in one arena.

    Args:
        images: per pass: 1, or the lanes of a register.
        arena: floats.
        apart: for each tensor of a call (inputs, then outputs) the floats from image to image.
        steps: dicts with "kind" and what csrc/program/bind.cpp reads for it.

    Raises:
        ValueError, KeyError: a step that no kernel can run, or that lacks something.
    """

    def __init__(self, images: int, arena: int, apart: Sequence[int], steps: Sequence[dict]):
        self._program = _C.Program(images, arena, list(apart), list(steps))
        self._apart = list(apart)

    def run(self, tensors: Sequence[Tensor]) -> None:
        """Reads the inputs, writes the outputs; float32 [batch, ...], contiguous, on the CPU."""
        self._program.run(*self._checked(tensors))

    def profile(self, tensors: Sequence[Tensor]) -> list[float]:
        """The same on one thread; nanoseconds of each step."""
        return self._program.profile(*self._checked(tensors))

    def _checked(self, tensors: Sequence[Tensor]) -> tuple[list[int], int]:
        batch = tensors[0].shape[0]
        for t, apart in zip(tensors, self._apart, strict=True):
            if t.dtype != torch.float32 or not t.is_cpu or not t.is_contiguous():
                raise ValueError("tensors must be contiguous float32 on the CPU")
            if t.shape[0] != batch or t.numel() != batch * apart:
                raise ValueError(f"{batch} images of {apart} floats expected, got {list(t.shape)}")
        return [t.data_ptr() for t in tensors], batch

    @property
    def kernels(self) -> list[str]:
        """What each step runs on."""
        return self._program.kernels

    @property
    def arena_bytes(self) -> int:
        """Memory of one pass, beside the weights."""
        return self._program.arena_bytes


def emit_unavailable() -> str | None:
    """Why machine code cannot be made at run time here; None if it can."""
    return _C.emit_unavailable()
