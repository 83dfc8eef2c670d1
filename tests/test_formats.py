"""Packing: exact round trips, the layout against its definition, and every malformed pattern."""

from __future__ import annotations

import copy
import functools
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dass_kernels as dk
from dass_kernels import formats, testing
from dass_kernels.testing import FORMATS, randn, random_mask, random_weight

SHAPES = [
    ((8, 6), 1),
    ((1, 1), 1),
    ((7, 5), 1),
    ((16, 12, 1, 1), 1),
    ((16, 4, 3, 3), 1),
    ((19, 4, 2, 3), 1),
    ((32, 4, 3, 1), 2),
    ((16, 1, 3, 3), 16),
    ((48, 2, 3, 3), 3),
]


def fits(shape, groups, format):
    return groups == 1 or format == "csr" or shape[0] // groups % int(format.split("x")[0]) == 0


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("density", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_round_trip_is_exact(format, density, dtype):
    for shape, groups in SHAPES:
        if not fits(shape, groups, format):
            continue
        for mask_format in {"csr", format}:
            weight, mask = random_weight(shape, density, mask_format, dtype)
            packed = dk.pack(weight, mask, format, groups)
            dense = packed.to_dense()
            assert dense.dtype == dtype and dense.shape == weight.shape
            assert torch.equal(dense, weight.masked_fill(~mask, 0))
            if mask_format == format:
                assert packed.nnz == int(mask.sum())
                assert packed.density == pytest.approx(int(mask.sum()) / mask.numel())
            packed.validate()


@pytest.mark.parametrize("format", ["2:4", "1:4", "4:8", "1:16", "3:5", "n:m"])
def test_round_trip_of_n_of_m(format):
    n, m = (2, 4) if format == "n:m" else map(int, format.split(":"))
    for shape in ((6, 2 * m), (6, m, 3, 3)):
        weight, mask = random_weight(shape, 0, f"{n}:{m}")
        packed = dk.pack(weight, mask, format)
        assert packed.format == f"{n}:{m}" and packed.nnz == mask.numel() * n // m
        assert torch.equal(packed.to_dense(), weight * mask)
        mask[0, 0] = ~mask[0, 0]
        with pytest.raises(ValueError, match=f"not {format}"):
            dk.pack(weight, mask, format)


def test_the_layout_is_what_its_description_says():
    """indptr, indices and the transpose, rebuilt with Python lists from the mask."""
    for shape, groups in SHAPES:
        for format in FORMATS:
            if not fits(shape, groups, format):
                continue
            weight, mask = random_weight(shape, 0.5, format)
            packed = dk.pack(weight, mask, format, groups)
            outputs, columns = shape[0], math.prod(shape[1:])
            taps = math.prod(shape[2:])
            flat = mask.view(outputs, columns)
            dense = weight.view(outputs, columns)
            block = packed.block
            indptr, indices, values, places = [0], [], [], {}
            for row in range(0, outputs, block):
                for col in range(columns):
                    if bool(flat[row : row + block, col].any()):
                        indices.append(col)
                        for o in range(row, row + block):
                            places[o, col] = len(values)
                            values.append(float(dense[o, col]) if o < outputs else None)
                indptr.append(len(indices))
            assert packed.indptr.tolist() == indptr
            assert packed.indices.tolist() == indices
            for got, want in zip(packed.values.tolist(), values, strict=True):
                assert want is None or got == want
            # Transposed: (input channel) -> (output in its group, mirrored tap, place in values).
            rows = [[] for _ in range(shape[1] * groups)]
            for (o, col), place in places.items():
                if o < outputs:
                    group, inside = divmod(o, outputs // groups)
                    channel, tap = divmod(col, taps)
                    mirrored = inside * taps + taps - 1 - tap
                    rows[group * shape[1] + channel].append((mirrored, place))
            rows = [sorted(r) for r in rows]
            assert packed.t_indptr.tolist() == [
                sum(map(len, rows[:i])) for i in range(len(rows) + 1)
            ]
            assert packed.t_indices.tolist() == [index for r in rows for index, _ in r]
            assert packed.perm.tolist() == [place for r in rows for _, place in r]


def test_a_kept_zero_stays_and_the_default_mask_drops_zeros():
    weight = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert dk.pack(weight).nnz == 2
    assert dk.pack(weight, torch.ones(2, 2, dtype=torch.bool)).nnz == 4
    packed = dk.pack(weight, torch.tensor([[1, 0], [0, 1]]))  # any dtype that converts to bool
    assert packed.nnz == 2 and packed.values.tolist() == [0, 0]


def test_weights_under_the_mask_do_not_survive():
    weight, mask = random_weight((8, 6), 0.5)
    for format in ("csr", "4x1"):
        packed = dk.pack(weight.masked_fill(~mask, math.nan), mask, format)
        assert torch.equal(packed.to_dense(), weight.masked_fill(~mask, 0))
        assert bool(packed.values.isfinite().all())


def test_gradients_flow_from_values_to_the_kept_weights():
    for format in FORMATS:
        weight, mask = random_weight((19, 6), 0.4)
        weight.requires_grad_()
        packed = dk.pack(weight, mask, format)
        scale = randn(len(packed.values))
        (packed.values * scale).sum().backward()
        perm = packed.perm.long()
        want = torch.zeros(weight.numel()).index_copy(0, packed.flat.long()[perm], scale[perm])
        # A short block's padding reads the block's first output, whose gradient it must not touch.
        padding = torch.ones(len(scale), dtype=torch.bool)
        padding[perm] = False
        scale[padding] = 0
        weight.grad = None
        (dk.pack(weight, mask, format).values * scale).sum().backward()
        assert torch.equal(weight.grad, want.view_as(weight) * mask)


@pytest.mark.parametrize(
    ("make", "format"),
    [
        (lambda: random_mask((32, 8), 0.5, "16x1"), "16x1"),
        (lambda: random_mask((24, 8), 0.5, "8x1"), "8x1"),
        (lambda: random_mask((12, 8), 0.5, "4x1"), "4x1"),
        (lambda: random_mask((32, 8, 3, 3), 0.2, "16x1"), "16x1"),
        (lambda: random_mask((32, 8), 0.5), "csr"),
        (lambda: random_mask((6, 8), 0, "2:4"), "2:4"),
        (lambda: random_mask((6, 8, 3, 3), 0, "1:4"), "1:4"),
        (lambda: random_mask((6, 16), 0, "3:8"), "3:8"),
        (lambda: torch.ones(32, 8, dtype=torch.bool), "csr"),
        (lambda: torch.zeros(32, 8, dtype=torch.bool), "csr"),
        (lambda: torch.zeros(0, 8, dtype=torch.bool), "csr"),
        (lambda: torch.zeros(8, 0, dtype=torch.bool), "csr"),
        # 20 outputs are five blocks of 4, but blocks of 8 or 16 would be short.
        (lambda: random_mask((20, 8), 0.5, "4x1"), "4x1"),
    ],
)
def test_auto_takes_the_tallest_blocks_without_padding(make, format):
    mask = make()
    packed = dk.pack(randn(*mask.shape), mask)
    assert packed.format == format == dk.choose_format(mask)
    assert int(packed.pattern[formats._ENTRIES]) * packed.block == int(mask.sum())


def test_auto_keeps_blocks_inside_a_group():
    mask = random_mask((16, 5, 1, 1), 0.5, "16x1")
    assert dk.choose_format(mask, 1) == "16x1"
    assert dk.choose_format(mask, 2) == "8x1"
    assert dk.choose_format(mask, 4) == "4x1"
    assert dk.choose_format(mask, 8) == "csr"


@given(
    st.integers(0, 9), st.integers(0, 9), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3),
    st.floats(0, 1), st.integers(0, 10**6), st.sampled_from(FORMATS),
)  # fmt: skip
def test_round_trip_of_any_shape(outputs, inputs, kh, kw, groups, density, seed, format):
    shape = (outputs * groups, inputs, kh, kw)
    weight, mask = random_weight(shape, density, seed=seed)
    if not fits(shape, groups, format):
        with pytest.raises(ValueError, match="outputs per group divisible by"):
            dk.pack(weight, mask, format, groups)
        return
    packed = dk.pack(weight, mask, format, groups)
    packed._checked.version = None
    packed.validate()
    assert torch.equal(packed.to_dense(), weight.masked_fill(~mask, 0))
    for other in range(1, 4):
        if shape[0] % other == 0 and fits(shape, other, format):
            moved = packed.with_groups(other)
            moved.validate()
            assert torch.equal(moved.to_dense(), packed.to_dense())


def test_to_with_values_and_with_groups():
    weight, mask = random_weight((16, 4, 3, 3), 0.5, "8x1")
    packed = dk.pack(weight, mask)
    double = packed.to(torch.float64)
    assert double.dtype == torch.float64 and double.pattern.dtype == torch.int32
    assert torch.equal(double.to_dense(), packed.to_dense().double())
    assert packed.to("cpu").device == torch.device("cpu")
    twice = packed.with_values(packed.values * 2)
    assert torch.equal(twice.to_dense(), 2 * packed.to_dense())
    with pytest.raises(ValueError, match="values must have shape"):
        packed.with_values(packed.values[1:])
    assert packed.with_groups(1) is packed
    grouped = packed.with_groups(2)
    assert grouped.groups == 2 and torch.equal(grouped.to_dense(), packed.to_dense())
    assert len(grouped.t_indptr) == 2 * 4 + 1
    with pytest.raises(ValueError, match="groups must divide the 16 outputs, got 3"):
        packed.with_groups(3)
    # Blocks that two groups would share: silently wrong outputs once.
    with pytest.raises(ValueError, match="8x1 blocks need outputs per group divisible by 8, got 4"):
        packed.with_groups(4)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))]
)
def test_copies_and_pickles(duplicate):
    weight, mask = random_weight((9, 4, 3, 3), 0.5)
    for format in ("csr", "4x1"):
        packed = dk.pack(weight, mask, format)
        other = duplicate(packed)
        assert (other.shape, other.format, other.groups) == (packed.shape, format, 1)
        assert torch.equal(other.to_dense(), packed.to_dense())
        x = randn(2, 4, 5, 5)
        assert torch.equal(dk.conv2d(x, other), dk.conv2d(x, packed))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_of_a_spoilt_pattern_is_not_taken_for_valid(duplicate):
    first = duplicate(dk.pack(randn(4, 8)))
    first.validate()  # a copied tensor starts again at version 0
    first.indices[0] = 10**6
    with pytest.raises(ValueError, match="indices out of"):
        duplicate(first).validate()


def word(index, value):
    def spoil(p):
        p.pattern[index] = value

    return spoil


def section(name, at, value):
    def spoil(p):
        getattr(p, name)[at] = value

    return spoil


def swap(name, a, b):
    def spoil(p):
        view = getattr(p, name)
        view[[a, b]] = view[[b, a]]

    return spoil


def drop_transposed(p):
    """One kept weight fewer in the transpose, consistently."""
    p.pattern[formats._ELEMENTS] -= 1
    p.t_indptr[-1] -= 1


def wrapping(name):
    """Differences that are positive in 32 bits only."""

    def spoil(p):
        view = getattr(p, name)
        view[1], view[2], view[3] = 2**31 - 1, -(2**31), -1

    return spoil


def name_padding(p):
    """The transpose reads the padding of the short last block instead of a weight."""
    block = 4 * (int(p.pattern[formats._ENTRIES]) - 1)
    at = int((p.perm == block).nonzero()[0])
    p.perm[at] = block + 3


CORRUPTIONS = {
    "magic": word(formats._MAGIC, 1),
    "block": word(formats._BLOCK, 8),
    "outputs": word(formats._OUTPUTS, 8),
    "columns": word(formats._COLUMNS, 99),
    "taps": word(formats._TAPS, 3),
    "groups": word(formats._GROUPS, 7),
    "entries up": word(formats._ENTRIES, 10**6),
    "entries negative": word(formats._ENTRIES, -1),
    "entries huge": word(formats._ENTRIES, 2**31 - 1),
    "elements up": word(formats._ELEMENTS, 10**6),
    "elements down": word(formats._ELEMENTS, 1),
    "elements negative": word(formats._ELEMENTS, -1),
    "length": word(formats._LENGTH, 5),
    "bits": word(formats._BITS, 10**9),
    "indptr first": section("indptr", 0, 1),
    "indptr last": section("indptr", -1, 3),
    "indptr falls": section("indptr", 1, 10**6),
    "indptr negative": section("indptr", 1, -5),
    "indptr wraps": wrapping("indptr"),
    "index negative": section("indices", 0, -1),
    "index too large": section("indices", -1, 10**6),
    "index just too large": section("indices", -1, 36),
    "index repeated": lambda p: p.indices.copy_(p.indices[:1].expand_as(p.indices).clone()),
    "index order": swap("indices", 0, 1),
    "t_indptr first": section("t_indptr", 0, 2),
    "t_indptr last": section("t_indptr", -1, 3),
    "t_indptr falls": section("t_indptr", 1, 10**6),
    "t_indptr wraps": wrapping("t_indptr"),
    "t_index negative": section("t_indices", 0, -1),
    "t_index too large": section("t_indices", -1, 10**6),
    "t_index order": swap("t_indices", 0, 1),
    "perm negative": section("perm", 0, -1),
    "perm too large": section("perm", 0, 10**6),
    "perm swapped": swap("perm", 0, 1),
    "flat": section("flat", 0, 7),
    "flat out of range": section("flat", 3, 10**6),
    "transpose lacks a weight": drop_transposed,
    "transpose names padding": name_padding,
    "resized": lambda p: p.pattern.resize_(p.pattern.numel() - 1),
    "emptied": lambda p: p.pattern.resize_(0),
    "zeroed": lambda p: p.pattern.zero_(),
    **{
        f"section {w} {name}": word(w, value)
        for w in (*range(formats._INDPTR, formats._PERM + 1), formats._FLAT)
        for name, value in (("in the header", 3), ("negative", -4), ("past the end", 2**31 - 1))
    },
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_pattern_spoilt_in_place_is_refused_by_every_op(name):
    """The change bumps the version torch keeps, so the next call checks again."""
    for format, shape in (("csr", (9, 4, 3, 3)), ("4x1", (9, 4, 3, 3))):
        if name == "transpose names padding" and format == "csr":
            continue
        weight, mask = random_weight(shape, 0.7, format)
        packed = dk.pack(weight, mask, format)
        x = randn(2, 4, 5, 5)
        dk.conv2d(x, packed)
        CORRUPTIONS[name](packed)
        for call in (packed.validate, packed.to_dense, functools.partial(dk.conv2d, x, packed)):
            with pytest.raises(ValueError, match="malformed pattern"):
                call()


@pytest.mark.parametrize("name", ["indptr wraps", "t_indptr wraps"])
def test_row_pointers_that_wrap_are_refused_without_entries_too(name):
    packed = dk.pack(torch.zeros(4, 4))
    CORRUPTIONS[name](packed)
    for op in (lambda: dk.linear(randn(2, 4), packed), lambda: dk.spmm(packed, randn(4, 2))):
        with pytest.raises(ValueError, match="row pointers must not decrease"):
            op()


@pytest.mark.parametrize("shape", [(5, 16), (4, 33), (3, 1), (7, 48)])
def test_the_bit_mask_of_a_matrix(shape):
    """Bit j of half-word w of a row is column 16 w + j; any other bit is refused."""
    mask = random_mask(shape, 0.5)
    packed = dk.pack(randn(*shape), mask, "csr")
    at = int(packed.pattern[formats._BITS])
    halves = packed.pattern[at:].view(torch.uint16).tolist()
    words = -(-shape[1] // 16)
    got = [
        [bool(halves[row * words + col // 16] >> col % 16 & 1) for col in range(shape[1])]
        for row in range(shape[0])
    ]
    assert got == mask.tolist()
    for spoilt, value in (
        (at, int(packed.pattern[at]) ^ 1),
        (formats._BITS, at + 1),
        (formats._BITS, 3),
    ):
        bad = copy.deepcopy(packed)
        bad.pattern[spoilt] = value
        with pytest.raises(ValueError, match="malformed pattern: bit mask"):
            dk.linear(randn(2, shape[1]), bad)


def test_an_undone_change_is_accepted_again():
    packed = dk.pack(randn(4, 8))
    packed.indices[0] = 99
    with pytest.raises(ValueError, match="indices out of"):
        packed.validate()
    packed.indices[0] = 0
    packed.validate()


def test_wrong_number_of_values():
    packed = dk.pack(randn(4, 8))
    other = dk.Packed(packed.values[:-1], packed.pattern, packed.shape, "csr")
    with pytest.raises(ValueError, match="wrong number of values"):
        other.validate()
    with pytest.raises(ValueError, match="wrong number of values"):
        dk.linear(randn(2, 8), other)


def test_sizes_past_int32_are_refused_before_anything_is_allocated():
    huge = torch.ones(1, 1).expand(2**16, 2**15 + 1)
    with pytest.raises(ValueError, match="at most 2147483647"):
        dk.pack(huge)
    with pytest.raises(ValueError, match="at most 2147483647"):
        dk.pack(torch.ones(1, 1, 1, 1).expand(2**20, 2**8, 3, 3))
    with pytest.raises(ValueError, match="at most 2147483647"):
        dk.build_pattern(torch.ones(1, 1, dtype=torch.bool).expand(2**31, 1), "csr")


def test_patterns_past_int32_are_refused(monkeypatch):
    """A weight may fit where its pattern, about four times as many words, does not."""
    mask = torch.ones(10, 10, dtype=torch.bool)
    monkeypatch.setattr(formats, "_INT32_MAX", 300)
    with pytest.raises(ValueError, match=r"pattern needs \d+ words; offsets are int32"):
        dk.build_pattern(mask, "csr")
    monkeypatch.setattr(formats, "_INT32_MAX", 99)
    with pytest.raises(ValueError, match="weight has 100 elements"):
        dk.build_pattern(mask, "csr")


def test_random_masks_are_of_their_format():
    for format in FORMATS:
        for shape in ((32, 10), (20, 4, 3, 3)):
            for density in (0, 0.3, 1):
                mask = random_mask(shape, density, format, seed=3)
                packed = dk.pack(randn(*shape), mask, format)
                assert packed.nnz == int(mask.sum())
    mask = testing.random_mask((4, 8, 3, 3), 0, "2:4")
    assert bool((mask.view(4, 2, 4, 3, 3).sum(2) == 2).all())
