"""Choosing tiles by measurement, once for each GPU, shape and pattern.

    choice = tuner.choose(rows, dtype, arch, gpu, x.shape, seconds)

No GPU was at hand to run this on: what the tuner keeps and when it measures is tested, the times
are whatever ``seconds`` returns.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator

import torch

from .heuristics import ARCHS, Choice, choose
from .panels import Rows

Key = tuple[str, tuple[int, ...], str, str]


def pattern_key(rows: Rows) -> str:
    """A digest of all that a kernel's time depends on in a pattern."""
    digest = hashlib.sha256(rows.indptr.tobytes() + rows.columns.tobytes())
    digest.update(repr((rows.block, rows.outputs, rows.channels, rows.taps, rows.groups)).encode())
    return digest.hexdigest()


def candidates(choice: Choice, arch: str | None) -> Iterator[Choice]:
    """The shipped choice, then its tiles with other sizes that fit the architecture."""
    yield choice
    tiles = choice.tiles
    limit = ARCHS[arch].shared if arch else 0
    for pixels in (32, 64, 128, 256):
        for stages in (2, 3, 4):
            for warps in (4, 8):
                other = dataclasses.replace(tiles, pixels=pixels, stages=stages, warps=warps)
                # Both operands of every stage, in halves at least.
                needed = 2 * stages * tiles.depth * (tiles.height + pixels)
                if other != tiles and (not limit or needed <= limit):
                    yield dataclasses.replace(choice, tiles=other, reason="measured")


class Tuner:
    """Remembers the fastest tiles by (GPU, input shape, pattern, dtype)."""

    def __init__(self) -> None:
        self._best: dict[Key, Choice] = {}

    def choose(
        self,
        rows: Rows,
        dtype: torch.dtype,
        arch: str | None,
        gpu: str,
        shape: tuple[int, ...],
        seconds: Callable[[Choice], float],
    ) -> Choice:
        """The fastest choice for a weight and an input shape; measured at the first call only.

        Args:
            rows, dtype, arch: as for :func:`dass_kernels.triton.heuristics.choose`.
            gpu: the device's full name: one architecture has cards of many speeds.
            shape: of the input. seconds: runs a choice and says how long it took.
        """
        key = (gpu, tuple(shape), pattern_key(rows), str(dtype))
        if key not in self._best:
            choice = choose(rows, dtype, arch)
            if choice.kernel != "dense":
                choice = min(candidates(choice, arch), key=seconds)
            self._best[key] = choice
        return self._best[key]
