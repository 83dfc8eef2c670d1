"""Where each tensor of a network lies: pitch of rows, zeros around planes, offsets in one arena.

A picture of one image is a set of planes with zeros around them, which serve as the padding of
convolutions. With ``pixel`` images side by side, the batch is innermost: an element is a register.
Convolutions of stride 1 run over a plane as over one long row, so their input, output and residual
need one pitch; elsewhere pitches are free.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LINE = 16  # floats of a cache line


@dataclass
class Place:
    """Element (c, y, x) is at offset + c * channel + (y * pitch + x) * pixel floats of a space.

    space: 0 is the arena; s the s-th tensor of the call. The fields of C++'s ``Place``.
    """

    channels: int
    rows: int
    columns: int
    channel: int = 0
    pitch: int = 0
    pad: int = 0
    pixel: int = 1
    space: int = 0
    offset: int = 0

    @property
    def front(self) -> int:
        """Floats of zeros before element (0, 0, 0), in whole lines."""
        return _up((self.pad * self.pitch + self.pad) * self.pixel)

    @property
    def floats(self) -> int:
        return self.front + _up(self.channels * self.channel)

    def slice(self, first: int, channels: int) -> Place:
        """Some of its channels."""
        return Place(
            channels, self.rows, self.columns, self.channel, self.pitch, self.pad, self.pixel,
            self.space, self.offset + first * self.channel,
        )  # fmt: skip


def tensor(space: int, shape: tuple[int, ...]) -> Place:
    """One image of a contiguous tensor of the call, [batch, C, H, W] or [batch, K]."""
    if len(shape) == 1:
        return Place(1, 1, shape[0], shape[0], shape[0], space=space)
    channels, rows, columns = shape
    return Place(channels, rows, columns, rows * columns, columns, space=space)


def vector(length: int, pixel: int) -> Place:
    """A vector in the arena, its elements one after the other."""
    return Place(length, 1, 1, pixel, 1, pixel=pixel)


@dataclass
class Layout:
    """Geometry of the pictures of a program, settled by what is asked of them.

    ``add`` names a picture, ``need`` asks for zeros around it, ``link`` for a common pitch; then
    ``place`` tells how it lies. Lanes of a register are ``pixel`` images, or 1.
    """

    pixel: int
    shapes: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    _parent: dict[str, str] = field(default_factory=dict)
    _pads: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, shape: tuple[int, int, int]) -> None:
        self.shapes[name] = shape
        self._parent[name] = name
        self._pads[name] = 0

    def need(self, name: str, pad: int) -> None:
        root = self._root(name)
        self._pads[root] = max(self._pads[root], pad)

    def link(self, a: str, b: str) -> None:
        a, b = self._root(a), self._root(b)
        if a != b:
            self._parent[b] = a
            self._pads[a] = max(self._pads[a], self._pads[b])

    def pad(self, name: str) -> int:
        return self._pads[self._root(name)]

    def place(self, name: str) -> Place:
        """Without its offset."""
        channels, rows, columns = self.shapes[name]
        root = self._root(name)
        pad = self._pads[root]
        widest = max(self.shapes[n][2] for n in self._parent if self._root(n) == root)
        pitch = widest + pad
        # Some kernels store whole registers: the last row's must not reach the next plane.
        last = (rows - 1) * pitch * self.pixel + _up(columns * self.pixel)
        floats = _up(max(last, (rows + pad) * pitch * self.pixel))
        return Place(channels, rows, columns, _spread(floats), pitch, pad, self.pixel)

    def _root(self, name: str) -> str:
        while self._parent[name] != name:
            name = self._parent[name]
        return name


def _up(floats: int) -> int:
    return -(-floats // LINE) * LINE


def _spread(floats: int) -> int:
    """Planes an even number of KiB apart would all fall into the same few sets of the L1 cache."""
    return floats + LINE if floats % (32 * LINE) == 0 else floats


def assign_offsets(sizes: dict[str, tuple[int, int, int]]) -> tuple[dict[str, int], int]:
    """Offsets of buffers in one arena, such that none that live together overlap.

    Args:
        sizes: name -> (floats, first step, last step), steps inclusive.

    Returns:
        (name -> offset, floats of the arena). Large ones are placed first, each at the lowest
        offset that is free while it lives.
    """
    placed: list[tuple[int, int, int, int]] = []
    offsets = {}
    for name in sorted(sizes, key=lambda n: -sizes[n][0]):
        floats, first, last = sizes[name]
        offset = 0
        for start, end, born, dies in sorted(placed):
            if born <= last and first <= dies and start < offset + floats and offset < end:
                offset = end
        placed.append((offset, offset + floats, first, last))
        offsets[name] = offset
    return offsets, max((end for _, end, _, _ in placed), default=0)
