"""Which kernel and which tiles a weight gets on a GPU, and why a weight stays dense.

Nothing here was timed on hardware. The rules are those of the published kernels that ours follow
(column vectors win from half the weights pruned, unstructured weights lose to tensor cores until
about 95 %); the tiles are those that compile without spilling a register
(``python -m dass_kernels.triton.resources``). :mod:`dass_kernels.triton.autotune` measures instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from .panels import Rows, block_depth, filled, shared_rows

KERNELS = ("column_vectors", "blocks", "dense")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_KEPT = 0.5  # above this share of kept weights a dense product on tensor cores is faster
LEAST_FILLED = 0.9  # share of a panel's rows that must hold outputs
LEAST_CHANNELS = 16  # the least side of a tile of tl.dot


@dataclasses.dataclass(frozen=True)
class Arch:
    """What a GPU architecture allows: shared memory of a block in bytes, and the tallest panel."""

    shared: int
    height: int


# By exact architecture: code for sm_90 does not run on sm_100, nor what is fast there here.
ARCHS = {
    "sm_80": Arch(166_912, 32),
    "sm_86": Arch(101_376, 32),
    "sm_89": Arch(101_376, 32),
    "sm_90": Arch(232_448, 64),
    "sm_100": Arch(232_448, 64),
    "sm_120": Arch(101_376, 32),
}
ANY = Arch(101_376, 32)  # no GPU to ask: tracing, or the interpreter


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes, all powers of two of at least 16, and how a program is run.

    height: outputs of a panel. depth: columns of a step. pixels: of a forward or input gradient
    tile. width: channels of an input gradient tile. chunk: pixels of a weight gradient step.
    """

    height: int
    depth: int = 32
    pixels: int = 128
    width: int = 32
    chunk: int = 64
    warps: int = 4
    stages: int = 3


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel, its tiles (None for dense) and the reason."""

    kernel: str
    tiles: Tiles | None
    reason: str


_forced: ContextVar[Choice | None] = ContextVar("forced", default=None)


@contextlib.contextmanager
def forced(kernel: str, tiles: Tiles | None = None) -> Iterator[None]:
    """Runs the body with one kernel and its tiles, whatever the heuristic says.

    Raises:
        ValueError: an unknown kernel, or one without tiles.
    """
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; known: {', '.join(KERNELS)}")
    if tiles is None and kernel != "dense":
        raise ValueError(f"{kernel} needs tiles")
    token = _forced.set(Choice(kernel, tiles, "forced"))
    try:
        yield
    finally:
        _forced.reset(token)


def forced_choice() -> Choice | None:
    """What :func:`forced` asks for, if anything."""
    return _forced.get()


def arch_of(device: torch.device) -> str | None:
    """The architecture of a device, as ``"sm_90"``; None where there is no GPU to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def choose(rows: Rows, dtype: torch.dtype, arch: str | None = None) -> Choice:
    """The kernel for a pattern: column vectors (K3), blocks (K4), or dense with the reason.

    Args:
        rows: the pattern. dtype: of weight and input.
        arch: exact architecture (:func:`arch_of`); None: the rules that hold on all of them.
    """
    if (choice := forced_choice()) is not None:
        return choice
    if reason := _why_dense(rows, dtype, arch):
        return Choice("dense", None, reason)
    tallest = (ARCHS[arch] if arch else ANY).height
    lists = shared_rows(rows)
    heights = [h for h in (64, 32, 16) if h <= tallest and h % rows.block == 0]
    fits = [h for h in heights if filled(lists, rows.block, h) >= LEAST_FILLED]
    if not fits:
        share = filled(lists, rows.block, 16)
        return Choice(
            "dense",
            None,
            f"too few outputs share their inputs: panels of 16 would be {share:.0%} full "
            "(project the mask onto 16x1 or taller)",
        )
    depth = block_depth(rows)
    if depth >= 32 and fits[0] >= 32:
        return Choice("blocks", tiles_for(fits[0], dtype, depth), f"blocks of {fits[0]} x {depth}")
    return Choice("column_vectors", tiles_for(fits[0], dtype), f"column vectors of {fits[0]} x 1")


def _why_dense(rows: Rows, dtype: torch.dtype, arch: str | None) -> str | None:
    if arch is not None and arch not in ARCHS:
        return f"{arch} is not one of {', '.join(ARCHS)}"
    if dtype not in DTYPES:
        return f"no GPU kernel for {str(dtype).removeprefix('torch.')}"
    if rows.density > MOST_KEPT:
        return f"keeps {rows.density:.0%} of its weights: kernels are for at most {MOST_KEPT:.0%}"
    sides = (rows.channels // rows.groups, rows.outputs // rows.groups)
    if min(sides) < LEAST_CHANNELS:
        return f"only {sides[0]} inputs and {sides[1]} outputs a group: at least 16 each are needed"
    return None


def tiles_for(height: int, dtype: torch.dtype, depth: int = 32) -> Tiles:
    """The tiles shipped for a panel height; float32 takes less memory and more warps."""
    if dtype == torch.float32:
        return Tiles(height, min(depth, 32), pixels=64, chunk=32, warps=8, stages=2)
    return Tiles(height, depth, width=max(depth, 32))


def transposed_pays(steps: int, tiles: Tiles, rows: Rows) -> bool:
    """Whether the input gradient over the transpose multiplies at most half as often as dense.

    A step multiplies for all channels of its tile, also for those that do not meet the panel.
    """
    dense = rows.channels // rows.groups * rows.outputs * rows.taps
    return steps * tiles.width * tiles.height <= MOST_KEPT * dense
