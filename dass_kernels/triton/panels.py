"""The pattern of a weight, laid out as the panels that the GPU kernels walk.

A *panel* is up to V outputs that keep the same columns, so that a product with the input is a small
dense product: the V x K kept weights times K gathered rows of the input. The outputs of a panel may
lie anywhere (rows are permuted by storing where they belong), and the weights are not copied:
``values`` is read where :func:`dass_kernels.pack` put it.

The input gradient walks the transpose in the same terms: a tile of channels, and for each panel and
tap that one of them meets, the place of its weights in ``values``.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch
from torch import Tensor

from ..formats import (
    _BLOCK,
    _COLUMNS,
    _ELEMENTS,
    _ENTRIES,
    _GROUPS,
    _INDICES,
    _INDPTR,
    _OUTPUTS,
    _TAPS,
    HEADER,
    MAGIC,
)

_DEPTHS = (64, 32, 16)  # channels of a block, widest first


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a pattern says of its rows, on the host.

    ``indptr`` and ``columns`` are the compressed (block) rows; a column is ``channel * taps + tap``
    with the channel counted over all groups.
    """

    block: int
    outputs: int
    channels: int
    taps: int
    groups: int
    elements: int
    indptr: np.ndarray
    columns: np.ndarray

    @property
    def density(self) -> float:
        total = self.outputs * self.channels // self.groups * self.taps
        return self.elements / total if total else 0.0


@dataclasses.dataclass(frozen=True)
class Panels:
    """The forward index; all tensors int32.

    Attributes:
        height: V, outputs of a panel. depth: columns of a step. block: R of the format.
        blocked: whether each step is ``depth`` neighbouring channels at one tap (K4).
        first: ``[panels * V / R]``, entry at which each block row of a panel starts.
        rows: the same length, its first output; past the last where it has no more.
        ptr: ``[panels + 1]``, start of each panel in ``columns``, a multiple of ``depth``.
        columns: ``channel * taps + tap``, -1 where a step is not full.
        entry: place of each column in its rows, counted from ``first``.
        owner: ``[steps]``, the panel of each step.
    """

    height: int
    depth: int
    block: int
    blocked: bool
    first: Tensor
    rows: Tensor
    ptr: Tensor
    columns: Tensor
    entry: Tensor
    owner: Tensor

    @property
    def count(self) -> int:
        return len(self.ptr) - 1


@dataclasses.dataclass(frozen=True)
class Transposed:
    """The index of the input gradient; all tensors int32.

    Attributes:
        width: channels of a tile.
        channels: ``[tiles * width]``, the channels of each tile; beyond the last where it has none.
        ptr: ``[tiles + 1]``, steps of each tile. panel, tap: ``[steps]``.
        entry: ``[steps * width]``, place of a channel's weights in the panel's rows, -1: pruned.
    """

    width: int
    channels: Tensor
    ptr: Tensor
    panel: Tensor
    tap: Tensor
    entry: Tensor

    @property
    def count(self) -> int:
        return len(self.ptr) - 1


def read_rows(pattern: Tensor) -> Rows:
    """The rows of a pattern vector; raises ValueError if ``pack`` did not make it."""
    words = pattern.cpu().numpy()
    if words.dtype != np.int32 or words.ndim != 1 or len(words) < HEADER or words[0] != MAGIC:
        raise ValueError("pattern must be an int32 vector made by dass_kernels.pack")
    block, outputs, taps, groups = (int(words[w]) for w in (_BLOCK, _OUTPUTS, _TAPS, _GROUPS))
    count, at = -(-outputs // block), int(words[_INDPTR])
    indptr = words[at : at + count + 1].astype(np.int64)
    at = int(words[_INDICES])
    columns = words[at : at + int(words[_ENTRIES])].astype(np.int64)
    per_group = int(words[_COLUMNS])
    group = np.arange(count) * block // max(outputs // groups, 1)
    columns = columns + np.repeat(group, np.diff(indptr)) * per_group
    channels = per_group // taps * groups
    elements = int(words[_ELEMENTS])
    return Rows(block, outputs, channels, taps, groups, elements, indptr, columns)


def shared_rows(rows: Rows) -> list[list[int]]:
    """Block rows in lists of equal columns, in order of their first row."""
    alike: dict[bytes, list[int]] = {}
    for i in range(len(rows.indptr) - 1):
        key = rows.columns[rows.indptr[i] : rows.indptr[i + 1]].tobytes()
        alike.setdefault(key, []).append(i)
    return list(alike.values())


def filled(lists: list[list[int]], block: int, height: int) -> float:
    """Share of the panels' rows that hold outputs if panels are ``height`` tall."""
    most = height // block
    panels = sum(-(-len(rows) // most) for rows in lists)
    return sum(map(len, lists)) / (panels * most) if panels else 1.0


def block_depth(rows: Rows) -> int:
    """Widest run of aligned channels that every kept column is part of at its tap; 0 if none."""
    lists = shared_rows(rows)
    for depth in _DEPTHS:
        if all(_in_blocks(_columns(rows, alike[0]), rows, depth) for alike in lists):
            return depth
    return 0


def _columns(rows: Rows, row: int) -> np.ndarray:
    return rows.columns[rows.indptr[row] : rows.indptr[row + 1]]


def _in_blocks(columns: np.ndarray, rows: Rows, depth: int) -> bool:
    if rows.channels // rows.groups % depth:
        return False
    channel, tap = np.divmod(columns, rows.taps)
    _, counts = np.unique(channel // depth * rows.taps + tap, return_counts=True)
    return bool((counts == depth).all())


def build_panels(rows: Rows, height: int, depth: int, blocked: bool) -> Panels:
    """Lays out the forward index.

    Args:
        rows: from :func:`read_rows`.
        height: V, a multiple of the format's R. depth: columns of a step, a power of two.
        blocked: the steps are whole blocks (:func:`block_depth`) in order of tap and channel.
    """
    per_panel = height // rows.block
    beyond = -(-rows.outputs // rows.block) * rows.block  # a multiple of R, as every row is
    first, row_of, ptr, columns, entries, owner = [], [], [0], [], [], []
    for alike in shared_rows(rows):
        cols = _columns(rows, alike[0])
        entry = np.arange(len(cols))
        if blocked:
            channel, tap = np.divmod(cols, rows.taps)
            entry = np.lexsort((channel, tap, channel // depth))
        steps = -(-len(cols) // depth)
        pad = steps * depth - len(cols)
        cols = np.concatenate([cols[entry], np.full(pad, -1)])
        entry = np.concatenate([entry, np.zeros(pad, np.int64)])
        for at in range(0, len(alike), per_panel):
            part = alike[at : at + per_panel]
            spare = per_panel - len(part)
            first += [*rows.indptr[part], *[0] * spare]
            row_of += [*(i * rows.block for i in part), *[beyond] * spare]
            owner += [len(ptr) - 1] * steps
            ptr.append(ptr[-1] + len(cols))
            columns.append(cols)
            entries.append(entry)
    join = lambda parts: np.concatenate(parts) if parts else np.zeros(0)  # noqa: E731
    arrays = [first, row_of, ptr, join(columns), join(entries), owner]
    return Panels(height, depth, rows.block, blocked, *map(_int32, arrays))


def build_transposed(rows: Rows, panels: Panels, width: int) -> Transposed:
    """Lays out the index of the input gradient over the same panels.

    Channels that meet the same panels at the same taps are put into one tile.
    """
    cols, entry = panels.columns.long().numpy(), panels.entry.long().numpy()
    owner = np.repeat(panels.owner.long().numpy(), panels.depth)
    kept = cols >= 0
    cols, entry, owner = cols[kept], entry[kept], owner[kept]
    channel, tap = np.divmod(cols, rows.taps)
    place = owner * rows.taps + tap
    order = np.lexsort((place, channel))
    starts = np.searchsorted(channel[order], np.arange(rows.channels + 1))
    met = [place[order[a:b]].tobytes() for a, b in itertools.pairwise(starts)]
    by_likeness = sorted(range(rows.channels), key=lambda c: met[c])
    rank = np.empty(rows.channels, np.int64)
    rank[by_likeness] = np.arange(rows.channels)
    tiles = -(-rows.channels // width)
    places = panels.count * rows.taps
    steps, step = np.unique(rank[channel] // width * places + place, return_inverse=True)
    at = np.full((len(steps), width), -1)
    at[step.reshape(-1), rank[channel] % width] = entry
    listed = np.full(tiles * width, rows.channels)
    listed[: rows.channels] = by_likeness
    places = max(places, 1)
    ptr = np.searchsorted(steps, np.arange(tiles + 1) * places)
    panel, tap = np.divmod(steps % places, rows.taps)
    arrays = [listed, ptr, panel, tap, at.reshape(-1)]
    return Transposed(width, *map(_int32, arrays))


def _int32(array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))


def on_device(index, device: torch.device):
    """The same index with its tensors on a device."""
    fields = {f.name: getattr(index, f.name) for f in dataclasses.fields(index)}
    moved = {k: v.to(device) for k, v in fields.items() if isinstance(v, Tensor)}
    return dataclasses.replace(index, **moved)
