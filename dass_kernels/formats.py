"""Sparse weights in the layout the kernels read.

A :class:`Packed` keeps the kept weights in ``values`` and everything about *where* they are in one
int32 tensor, ``pattern``: the compressed rows, the transpose with its permutation, and the place of
each value in the dense weight. One tensor, not six, because each further argument costs about
0.15 us per op call, and because a layer then has a single derived buffer.

See ``docs/formats.md`` for a worked example of each format.
"""

from __future__ import annotations

import dataclasses
import math
import re

import torch
from torch import Tensor

MAGIC = 0x0DA55001
HEADER = 16
# Header words; the same list as in csrc/ops/pattern.h.
(_MAGIC, _BLOCK, _OUTPUTS, _COLUMNS, _TAPS, _GROUPS, _ENTRIES, _ELEMENTS) = range(8)
(_INDPTR, _INDICES, _T_INDPTR, _T_INDICES, _PERM, _BITS, _LENGTH, _FLAT) = range(8, 16)

BLOCKS = (4, 8, 16)
# A matrix this dense also keeps its mask as bits, for the kernel that multiplies a single vector.
BITS_DENSITY = 0.15
_FORMATS = "auto, csr (unstructured), 4x1, 8x1, 16x1, n:m (for example 2:4)"
_INT32_MAX = 2**31 - 1


def parse_format(word: str) -> tuple[str, int, int]:
    """Splits a format word into (kind, a, b).

    ``("csr", 1, 1)``, ``("block", R, 1)`` or ``("nm", n, m)``. ``n:m`` alone is ``("nm", 0, 0)``:
    the numbers are taken from the mask.

    Raises:
        ValueError: the word is not one of the known formats.
    """
    if word in ("csr", "unstructured"):
        return "csr", 1, 1
    if word == "n:m":
        return "nm", 0, 0
    if match := re.fullmatch(r"(\d+)x1", word):
        if int(match[1]) in BLOCKS:
            return "block", int(match[1]), 1
    elif match := re.fullmatch(r"(\d+):(\d+)", word):
        n, m = int(match[1]), int(match[2])
        if 0 < n <= m:
            return "nm", n, m
    raise ValueError(f"unknown format {word!r}; known formats: {_FORMATS}")


class _Checked:
    """The version of the pattern that was last found valid; a copied pattern is checked anew."""

    version: int | None = None

    def __reduce__(self):
        return _Checked, ()


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A sparse weight ready for the kernels.

    Attributes:
        values: kept weights, float, ``[stored]``; with R x 1 blocks ``[blocks * R]``, a short last
            block padded with values that are never used.
        pattern: int32 vector holding the indices of every format (see ``docs/formats.md``).
        shape: shape of the dense weight, ``(O, I)`` or ``(O, I / groups, kh, kw)``.
        format: ``"csr"``, ``"4x1"``, ``"8x1"``, ``"16x1"`` or ``"n:m"`` with numbers, as ``"2:4"``.
        groups: groups of the convolution the weight belongs to.
    """

    values: Tensor
    pattern: Tensor
    shape: torch.Size
    format: str
    groups: int = 1
    _checked: _Checked = dataclasses.field(default_factory=_Checked, repr=False)

    @property
    def nnz(self) -> int:
        """Number of kept weights."""
        return int(self.pattern[_ELEMENTS])

    @property
    def density(self) -> float:
        """Kept weights / all weights."""
        total = math.prod(self.shape)
        return self.nnz / total if total else 0.0

    @property
    def block(self) -> int:
        """Outputs that share a pattern (1 but for the R x 1 formats)."""
        return parse_format(self.format)[1] if self.format.endswith("x1") else 1

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def _section(self, word: int, length: int) -> Tensor:
        at = int(self.pattern[word])
        return self.pattern[at : at + length]

    @property
    def indptr(self) -> Tensor:
        """Start of each row (or block row) in ``indices``, int32 ``[rows + 1]``; a view."""
        return self._section(_INDPTR, -(-self.shape[0] // self.block) + 1)

    @property
    def indices(self) -> Tensor:
        """Column of each entry, ``channel * kh * kw + tap``, int32; a view."""
        return self._section(_INDICES, int(self.pattern[_ENTRIES]))

    @property
    def t_indptr(self) -> Tensor:
        """Start of each input channel in ``t_indices``, int32; a view."""
        return self._section(_T_INDPTR, self.shape[1] * self.groups + 1)

    @property
    def t_indices(self) -> Tensor:
        """Transposed columns, ``output in its group * taps + mirrored tap``, int32; a view."""
        return self._section(_T_INDICES, int(self.pattern[_ELEMENTS]))

    @property
    def perm(self) -> Tensor:
        """Position in ``values`` of each transposed element, int32; a view."""
        return self._section(_PERM, int(self.pattern[_ELEMENTS]))

    @property
    def flat(self) -> Tensor:
        """Place of each value in the flattened dense weight, int32 ``[len(values)]``; a view."""
        return flat_index(self.pattern)

    def to_dense(self) -> Tensor:
        """The dense weight, zeros where pruned; exact."""
        self.validate()
        dense = self.values.new_zeros(math.prod(self.shape))
        # perm visits every true element once and skips the padding of a short block.
        perm = self.perm.long()
        dense = dense.index_copy(0, self.flat.long()[perm], self.values[perm])
        return dense.view(self.shape)

    def to(self, *args, **kwargs) -> Packed:
        """Moves the weight as ``Tensor.to``; a dtype applies to the values only."""
        values = self.values.to(*args, **kwargs)
        return dataclasses.replace(
            self, values=values, pattern=self.pattern.to(values.device), _checked=_Checked()
        )

    def with_values(self, values: Tensor) -> Packed:
        """The same pattern with other values (``[len(values)]``, any float dtype)."""
        if values.shape != self.values.shape:
            raise ValueError(
                f"values must have shape {tuple(self.values.shape)}, got {tuple(values.shape)}"
            )
        return dataclasses.replace(self, values=values)

    def with_groups(self, groups: int) -> Packed:
        """The same weight for a convolution with ``groups`` groups (they shape its transpose)."""
        if groups == self.groups:
            return self
        self.validate()
        mask = torch.zeros(math.prod(self.shape), dtype=torch.bool)
        mask[self.flat.long()[self.perm.long()].cpu()] = True
        pattern = build_pattern(mask.view(self.shape), self.format, groups)
        return dataclasses.replace(
            self, pattern=pattern.to(self.device), groups=groups, _checked=_Checked()
        )

    def validate(self) -> None:
        """Raises ValueError if the pattern is not one the kernels may read.

        Cheap when nothing changed: a change in place bumps the version torch keeps for the tensor,
        and only then are bounds, order and the transpose checked again. Code under torch.compile
        goes without: versions cannot be traced, and what is traced was checked by ``pack``.
        """
        if torch.compiler.is_compiling():
            return
        version = None if self.pattern.is_inference() else self.pattern._version
        if version is None or self._checked.version != version:
            validate_pattern(self.pattern, self.shape, self.format, self.groups, self.values)
            self._checked.version = version


def flat_index(pattern: Tensor) -> Tensor:
    """Place of each value in the flattened dense weight: int32 ``[stored]``, a view."""
    at = int(pattern[_FLAT])
    return pattern[at : at + int(pattern[_ENTRIES]) * int(pattern[_BLOCK])]


def _check_mask(shape: torch.Size, groups: int) -> None:
    if len(shape) not in (2, 4):
        raise ValueError(
            f"weight must be [O, I] or [O, I / groups, kh, kw], got shape {tuple(shape)}"
        )
    if len(shape) == 4 and 0 in shape[2:]:
        raise ValueError(f"weight must have a kernel of at least 1 x 1, got shape {tuple(shape)}")
    if groups < 1 or shape[0] % groups:
        raise ValueError(f"groups must divide the {shape[0]} outputs, got {groups}")
    if math.prod(shape) > _INT32_MAX:
        raise ValueError(
            f"weight has {math.prod(shape)} elements; indices are int32, so at most {_INT32_MAX}"
        )


def _nm_of(mask2d: Tensor, n: int, m: int) -> tuple[int, int] | None:
    """(n, m) if every group of m consecutive inputs keeps exactly n weights, else None."""
    if m == 0:
        for m in (4, 8, 16, 32, 2):
            if mask2d.shape[1] % m == 0 and mask2d.shape[1]:
                found = _nm_of(mask2d, int(mask2d[0, :m].sum()), m) if len(mask2d) else None
                if found and 0 < found[0] < m:
                    return found
        return None
    if mask2d.shape[1] % m:
        return None
    counts = mask2d.reshape(len(mask2d), -1, m).sum(-1)
    return (n, m) if bool((counts == n).all()) else None


def _input_major(mask: Tensor) -> Tensor:
    """[O, taps * I]: N:M groups run along the input channels of one tap."""
    return mask.flatten(2).transpose(1, 2).flatten(1) if mask.dim() == 4 else mask


def choose_format(mask: Tensor, groups: int = 1) -> str:
    """The format ``pack(..., format="auto")`` takes for a mask.

    The tallest R x 1 blocks that hold the mask without one padded zero, else N:M when the mask is
    one, else csr. A mask that keeps everything or nothing is csr.
    """
    kept = int(mask.sum())
    if 0 < kept < mask.numel():
        for rows in sorted(BLOCKS, reverse=True):
            if mask.shape[0] >= rows and mask.shape[0] // groups % rows == 0:
                blocks = mask.reshape(mask.shape[0] // rows, rows, -1)
                if bool((blocks.any(1) == blocks.all(1)).all()):
                    return f"{rows}x1"
        if found := _nm_of(_input_major(mask), 0, 0):
            return f"{found[0]}:{found[1]}"
    return "csr"


def resolve_format(mask: Tensor, format: str, groups: int = 1) -> str:
    """The stored format word for a mask; raises ValueError if the mask is not of that format."""
    if format == "auto":
        return choose_format(mask, groups)
    kind, a, b = parse_format(format)
    if kind == "csr":
        return "csr"
    if kind == "nm":
        if found := _nm_of(_input_major(mask), a, b):
            return f"{found[0]}:{found[1]}"
        raise ValueError(
            f"mask is not {format}: some group of inputs keeps another number of weights"
        )
    _check_blocks(mask.shape[0], groups, a)
    return f"{a}x1"


def _check_blocks(outputs: int, groups: int, block: int) -> None:
    if groups > 1 and outputs // groups % block:
        raise ValueError(
            f"{block}x1 blocks need outputs per group divisible by {block}, "
            f"got {outputs // groups} ({outputs} outputs in {groups} groups)"
        )


def _bit_words(mask: Tensor) -> Tensor:
    """The mask [O, I] as int32 words: a row is ceil(I / 16) half-words, bit j of w is 16 w + j."""
    rows, columns = mask.shape
    padded = torch.zeros(rows, -(-columns // 16) * 16, dtype=torch.int64)
    padded[:, :columns] = mask
    halves = (padded.view(-1, 16) << torch.arange(16)).sum(-1)
    if len(halves) % 2:
        halves = torch.cat([halves, halves.new_zeros(1)])
    words = halves.view(-1, 2)
    words = words[:, 0] | words[:, 1] << 16
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def build_pattern(mask: Tensor, format: str, groups: int = 1) -> Tensor:
    """Lays out the indices of a boolean mask ``[O, I]`` or ``[O, I / groups, kh, kw]``.

    A block format stores every weight of a block that holds a kept one, so a mask that is not made
    of whole blocks gains explicit zeros; nothing is lost.

    Returns:
        int32 vector; ``docs/formats.md`` gives the layout.
    """
    _check_mask(mask.shape, groups)
    mask = mask.detach().cpu()
    outputs, columns = mask.shape[0], math.prod(mask.shape[1:])
    taps = mask.shape[2] * mask.shape[3] if mask.dim() == 4 else 1
    kind, rows, _ = parse_format(format)
    block = rows if kind == "block" else 1
    _check_blocks(outputs, groups, block)
    flat_mask = mask.reshape(outputs, columns)
    padded = -(-outputs // block) * block
    if block > 1:
        grown = torch.zeros(padded, columns, dtype=torch.bool)
        grown[:outputs] = flat_mask
        any_kept = grown.view(padded // block, block, columns).any(1)
    else:
        any_kept = flat_mask
    row, column = any_kept.nonzero(as_tuple=True)
    indptr = torch.zeros(any_kept.shape[0] + 1, dtype=torch.int64)
    indptr[1:] = any_kept.sum(1).cumsum(0)

    # Every stored element, blocks opened up: output, column and place in values.
    output = (row[:, None] * block + torch.arange(block)).reshape(-1)
    col = column.repeat_interleave(block)
    valid = output < outputs
    flat = torch.where(valid, output, row.repeat_interleave(block) * block) * columns + col

    # Transpose: sorted by input channel, then output, then mirrored tap.
    place = valid.nonzero().squeeze(1)
    per_group = outputs // groups
    out_v, col_v = output[place], col[place]
    channel = out_v // max(per_group, 1) * (columns // max(taps, 1)) + col_v // max(taps, 1)
    t_index = out_v % max(per_group, 1) * taps + (taps - 1 - col_v % max(taps, 1))
    order = torch.argsort(channel * max(per_group * taps, 1) + t_index)
    channels = columns // max(taps, 1) * groups
    t_indptr = torch.zeros(channels + 1, dtype=torch.int64)
    t_indptr[1:] = torch.bincount(channel, minlength=channels).cumsum(0)

    sections = [indptr, column, t_indptr, t_index[order], place[order], flat]
    words = [_INDPTR, _INDICES, _T_INDPTR, _T_INDICES, _PERM, _FLAT]
    if mask.dim() == 2 and block == 1 and column.numel() >= BITS_DENSITY * flat_mask.numel():
        sections.append(_bit_words(flat_mask))
        words.append(_BITS)
    length = HEADER + sum(len(s) for s in sections)
    if length > _INT32_MAX:
        raise ValueError(f"pattern needs {length} words; offsets are int32")
    pattern = torch.zeros(length, dtype=torch.int32)
    header = dict(
        zip(
            (_MAGIC, _BLOCK, _OUTPUTS, _COLUMNS, _TAPS, _GROUPS, _ENTRIES, _ELEMENTS, _LENGTH),
            (MAGIC, block, outputs, columns, taps, groups, len(column), len(place), length),
            strict=True,
        )
    )
    at = HEADER
    for word, section in zip(words, sections, strict=True):
        header[word] = at
        pattern[at : at + len(section)] = section.to(torch.int32)
        at += len(section)
    for word, value in header.items():
        pattern[word] = value
    return pattern


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"malformed pattern: {what}")


def validate_pattern(
    pattern: Tensor, shape: torch.Size, format: str, groups: int, values: Tensor | None = None
) -> None:
    """Raises ValueError unless ``pattern`` describes a weight of ``shape`` safely and in order."""
    _require(pattern.dtype == torch.int32 and pattern.dim() == 1, "not an int32 vector")
    _require(pattern.numel() >= HEADER and int(pattern[_MAGIC]) == MAGIC, "bad magic word")
    head = [int(v) for v in pattern[:HEADER].tolist()]
    outputs, columns = shape[0], math.prod(shape[1:])
    taps = shape[2] * shape[3] if len(shape) == 4 else 1
    kind, rows, _ = parse_format(format)
    block = rows if kind == "block" else 1
    expected = {_OUTPUTS: outputs, _COLUMNS: columns, _TAPS: taps, _GROUPS: groups, _BLOCK: block}
    for word, value in expected.items():
        _require(head[word] == value, f"header word {word} is {head[word]}, expected {value}")
    _require(head[_LENGTH] == pattern.numel(), "length differs from its header")
    entries, elements = head[_ENTRIES], head[_ELEMENTS]
    block_rows, channels = -(-outputs // block), columns // max(taps, 1) * groups
    lengths = {
        _INDPTR: block_rows + 1,
        _INDICES: entries,
        _T_INDPTR: channels + 1,
        _T_INDICES: elements,
        _PERM: elements,
        _FLAT: entries * block,
    }
    _require(0 <= elements <= entries * block <= _INT32_MAX, "negative or overflowing counts")
    section = {}
    for word, length in lengths.items():
        at = head[word]
        _require(at >= HEADER and at + length <= pattern.numel(), f"section {word} out of bounds")
        section[word] = pattern[at : at + length]
    _check_rows(section[_INDPTR], section[_INDICES], columns, "indices", strict=True)
    _check_rows(
        section[_T_INDPTR],
        section[_T_INDICES],
        outputs // groups * taps,
        "transposed indices",
        strict=True,
    )
    if head[_BITS]:
        _check_bits(pattern, head[_BITS], section[_INDPTR], section[_INDICES], columns)
    flat, perm = section[_FLAT].long(), section[_PERM].long()
    # Padding of a short last block: it has a place in values, but is no element of the weight.
    short = int(section[_INDPTR][-2:].long().diff()) if outputs % block else 0
    padding = block - outputs % block
    _require(elements == entries * block - short * padding, "wrong number of kept weights")
    if entries:
        row = torch.repeat_interleave(section[_INDPTR].long().diff())
        output = (row[:, None] * block + torch.arange(block, device=row.device)).reshape(-1)
        output = torch.where(output < outputs, output, row.repeat_interleave(block) * block)
        want = output * columns + section[_INDICES].long().repeat_interleave(block)
        _require(bool((flat == want).all()), "flat index disagrees with the rows")
    if elements:
        _require(bool(((perm >= 0) & (perm < entries * block)).all()), "permutation out of bounds")
        channel = torch.repeat_interleave(section[_T_INDPTR].long().diff())
        t_index, per_channel = section[_T_INDICES].long(), columns // taps
        output = channel // per_channel * (outputs // groups) + t_index // taps
        col = channel % per_channel * taps + (taps - 1 - t_index % taps)
        _require(bool((flat[perm] == output * columns + col).all()), "transpose disagrees")
        if short:
            last = perm[perm >= (entries - short) * block]
            _require(bool((last % block < block - padding).all()), "permutation names padding")
    if values is not None:
        _require(values.dim() == 1 and len(values) == entries * block, "wrong number of values")


def _check_bits(pattern: Tensor, at: int, indptr: Tensor, indices: Tensor, columns: int) -> None:
    rows = len(indptr) - 1
    length = (rows * -(-columns // 16) + 1) // 2
    _require(at >= HEADER and at + length <= pattern.numel(), "bit mask out of bounds")
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[torch.repeat_interleave(indptr.cpu().long().diff()), indices.cpu().long()] = True
    same = torch.equal(pattern[at : at + length].cpu(), _bit_words(mask))
    _require(same, "bit mask disagrees with the rows")


def _check_rows(indptr: Tensor, indices: Tensor, limit: int, name: str, strict: bool) -> None:
    _require(int(indptr[0]) == 0 and int(indptr[-1]) == len(indices), f"{name}: bad row pointers")
    _require(bool((indptr.long().diff() >= 0).all()), f"{name}: row pointers must not decrease")
    if len(indices):
        _require(bool(((indices >= 0) & (indices < limit)).all()), f"{name} out of [0, {limit})")
        step = indices.diff()
        starts = torch.zeros(len(indices) + 1, dtype=torch.bool, device=indices.device)
        starts[indptr.long()] = True
        inside = ~starts[1:-1]
        _require(bool((step[inside] > 0).all()), f"{name} must rise within a row")


def pack(
    weight: Tensor, mask: Tensor | None = None, format: str = "auto", groups: int = 1
) -> Packed:
    """Packs the kept weights of a dense weight.

    Args:
        weight: ``[O, I]`` or ``[O, I / groups, kh, kw]``, float32, float64, float16 or bfloat16.
        mask: bool, shape of ``weight``: True is kept, even a weight of 0. Default: ``weight != 0``.
        format: ``"auto"``, ``"csr"`` (or ``"unstructured"``), ``"4x1"``, ``"8x1"``, ``"16x1"``
            (outputs x inputs), ``"2:4"`` or any n:m.
        groups: groups of the convolution the weight is for.

    Returns:
        The packed weight. Gradients flow from ``values`` back to ``weight``.

    Raises:
        ValueError: wrong shape, dtype, unknown format, or a mask that is not n:m.

    A pruned weight is absent: NaN or infinity under the mask does not reach the result.
    """
    if not isinstance(weight, Tensor):
        raise ValueError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
    if not weight.dtype.is_floating_point:
        raise ValueError(f"weight must be floating point, got {weight.dtype}")
    _check_mask(weight.shape, groups)
    if mask is None:
        mask = weight.detach() != 0
    if mask.shape != weight.shape:
        raise ValueError(
            f"mask must have the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}"
        )
    mask = mask.detach().to(torch.bool)
    word = resolve_format(mask.cpu(), format, groups)
    pattern = build_pattern(mask, word, groups).to(weight.device)
    source = weight if bool(mask.all()) else weight.masked_fill(~mask, 0)
    values = source.reshape(-1).index_select(0, flat_index(pattern))
    packed = Packed(values, pattern, weight.shape, word, groups)
    packed._checked.version = None if pattern.is_inference() else pattern._version
    return packed
