"""Masks against slow references written from the definitions: Python sorts, loops and fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dass import masks
from dass.masks import (
    SCOPES,
    keep_count,
    layer_counts,
    layer_densities,
    norm_kept,
    parse_pattern,
    pattern_capacity,
    pattern_mask,
    project,
    topk_mask,
)

quick = settings(max_examples=80, deadline=None)

BLOCKS = ("4x1", "8x1", "16x1", "16x2", "32x2")
RESNET20 = [(16, 3, 3, 3), *[(16, 16, 3, 3)] * 6, (32, 16, 3, 3), *[(32, 32, 3, 3)] * 5]
RESNET20 += [(64, 32, 3, 3), *[(64, 64, 3, 3)] * 5, (10, 64)]


def slow_topk(values: list[float], count: int) -> list[bool]:
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:count]
    return [i in set(order) for i in range(len(values))]


def slow_blocks(scores: torch.Tensor, rows: int, cols: int, groups: int) -> list[list[tuple]]:
    """The index tuples of each block, in the order that settles ties."""
    outputs, inputs = scores.shape[0] // groups, scores.shape[1]
    taps = list(np.ndindex(*scores.shape[2:])) or [()]
    return [
        [
            (g * outputs + o, i, *tap)
            for o in range(o0, min(o0 + rows, outputs))
            for i in range(i0, min(i0 + cols, inputs))
        ]
        for g in range(groups)
        for o0 in range(0, outputs, rows)
        for i0 in range(0, inputs, cols)
        for tap in taps
    ]


def test_keep_count_is_the_rule_of_the_method_in_decimal_arithmetic():
    for percent in range(1, 101):
        for n in (*range(1, 130), 1000, 4097, 2_359_296):
            exact = max(1, n - int((1 - Fraction(percent, 100)) * n))
            assert keep_count(n, percent / 100) == exact
            assert keep_count(n, 1 - (100 - percent) / 100) == exact  # as computed from a sparsity
            assert keep_count(n, Fraction(percent, 100)) == exact


@pytest.mark.parametrize(
    ("n", "density", "count"),
    [
        (10, 1 - 0.9, 1),
        (10, 1 - 0.7, 3),
        (100, 0.29, 29),
        (9, 0.01, 1),
        (576, 0.01, 6),
        (0, 0.5, 0),
    ],
)
def test_keep_count_where_floats_go_wrong(n, density, count):
    assert keep_count(n, density) == count


@quick
@given(st.integers(1, 2**40), st.data())
def test_keep_count_gives_back_a_count(n, data):
    count = data.draw(st.integers(1, n))
    assert keep_count(n, count / n) == count


@quick
@given(st.integers(1, 10**6), st.floats(1e-6, 1.0), st.floats(1e-6, 1.0))
def test_keep_count_grows_with_density(n, a, b):
    assert keep_count(n, min(a, b)) <= keep_count(n, max(a, b)) <= n


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, math.nan, math.inf])
def test_keep_count_rejects_densities(density):
    with pytest.raises(ValueError, match="density must be in"):
        keep_count(10, density)


def test_keep_count_rejects_a_negative_size():
    with pytest.raises(ValueError, match="n must not be negative"):
        keep_count(-1, 0.5)


@quick
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=60), st.floats(0.001, 1.0))
def test_topk_against_a_python_sort_with_many_ties(values, density):
    want = slow_topk(values, keep_count(len(values), density))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32):
        assert topk_mask(torch.tensor(values, dtype=dtype), density).tolist() == want
    magnitude = torch.tensor(values, dtype=torch.float32).abs()
    assert masks._largest_torch(magnitude, 1).sum() == 1
    count = keep_count(len(values), density)
    assert masks._largest_torch(magnitude, count).tolist() == want


@pytest.mark.parametrize(
    "kind", ["random", "mostly zero", "constant", "rising", "falling", "signed zero"]
)
@pytest.mark.parametrize("density", [1.0, 0.9, 0.5, 0.1, 0.01, 1e-9])
def test_topk_large_inputs(kind, density):
    n = 100_003
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    x = {
        "random": x,
        "mostly zero": x * (x > 1.5),
        "constant": torch.ones(n),
        "rising": torch.arange(n, dtype=torch.float32),
        "falling": torch.arange(n, 0, -1, dtype=torch.float32),  # torch.kthvalue takes minutes here
        "signed zero": torch.zeros(n) * torch.sign(x),
    }[kind]
    count = max(1, math.ceil(Fraction(str(density)) * n))
    want = torch.zeros(n, dtype=torch.bool)
    want[torch.from_numpy(np.argsort(-x.abs().numpy(), kind="stable")[:count].copy())] = True
    assert torch.equal(topk_mask(x, density), want)
    assert torch.equal(masks._largest_torch(x.abs(), count), want)


def test_topk_shape_strides_grad_and_nan():
    x = torch.randn(8, 4, 3, 3, requires_grad=True)
    mask = topk_mask(x, 0.25)
    assert mask.dtype == torch.bool and mask.shape == x.shape and not mask.requires_grad
    strided = x.detach().to(memory_format=torch.channels_last)
    assert torch.equal(topk_mask(strided, 0.25), mask)
    assert torch.equal(topk_mask(x.detach().transpose(0, 1), 1.0), torch.ones(4, 8, 3, 3).bool())
    assert topk_mask(torch.tensor([1.0, math.nan, 9.0, -math.inf]), 0.5).tolist() == [0, 1, 0, 1]
    assert topk_mask(torch.empty(0, 3), 0.5).shape == (0, 3)
    assert topk_mask(torch.tensor(2.0), 0.1).item() is True


def test_masks_trace_without_a_graph_break():
    x = torch.randn(16, 8, 3, 3)
    for word in ("unstructured", "4x1", "2:4"):
        traced = torch.compile(
            lambda s, word=word: pattern_mask(s, 0.1, word), fullgraph=True, backend="eager"
        )
        assert torch.equal(traced(x), pattern_mask(x, 0.1, word))


@quick
@given(st.sampled_from(BLOCKS), st.integers(1, 70), st.integers(1, 5), st.integers(1, 3),
       st.floats(0.01, 1.0), st.integers(0, 2**31))  # fmt: skip
def test_blocks_against_loops(word, outputs, inputs, taps, density, seed):
    generator = torch.Generator().manual_seed(seed)
    # Small integers: energies are exact, and ties are common.
    scores = torch.randint(-2, 3, (outputs, inputs, 1, taps), generator=generator).float()
    spec = parse_pattern(word)
    blocks = slow_blocks(scores, spec.rows, spec.cols, groups=1)
    energy = [Fraction(int(sum(scores[i] ** 2 for i in block)), len(block)) for block in blocks]
    keep = slow_topk([float(e) for e in energy], keep_count(len(blocks), density))
    want = torch.zeros_like(scores, dtype=torch.bool)
    for block, kept in zip(blocks, keep, strict=True):
        for i in block:
            want[i] = kept
    assert torch.equal(pattern_mask(scores, density, word), want)


@pytest.mark.parametrize("word", BLOCKS)
@pytest.mark.parametrize(
    ("shape", "groups"), [((64, 8, 3, 3), 2), ((48, 6), 1), ((12, 1, 3, 3), 12)]
)
def test_blocks_are_whole_and_stay_inside_a_group(word, shape, groups):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    spec = parse_pattern(word)
    mask = pattern_mask(scores, 0.3, word, groups=groups)
    blocks = slow_blocks(scores, spec.rows, spec.cols, groups)
    states = [{bool(mask[i]) for i in block} for block in blocks]
    assert all(len(state) == 1 for state in states)
    assert sum(True in state for state in states) == keep_count(len(blocks), 0.3)
    if groups == shape[0]:  # depthwise: a block is a weight
        assert torch.equal(mask, topk_mask(scores, 0.3))


def test_a_short_block_competes_per_weight():
    scores = torch.ones(5, 1)
    scores[4] = 1.5  # norm 1.5 < 2, but 1.5 per weight > 1
    assert pattern_mask(scores, 0.5, "4x1").flatten().tolist() == [0, 0, 0, 0, 1]


def test_blocks_of_tiny_and_huge_weights_are_still_ordered():
    for scale in (1e-30, 1e30):  # squares leave the float32 range
        scores = torch.tensor([1.0, 2.0] * 4).view(4, 2) * scale
        assert pattern_mask(scores, 0.5, "4x1").tolist() == [[False, True]] * 4


@quick
@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 19),
    st.sampled_from([(), (3,), (2, 2)]),
    st.floats(0.01, 1.0),
    st.integers(0, 2**31),
)
def test_nm_against_loops(n, extra, outputs, inputs, taps, density, seed):
    m = n + extra - 1
    word = f"{n}:{m}"
    shape = (outputs, inputs, *taps)
    scores = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()
    want = torch.zeros(shape, dtype=torch.bool)
    for o in range(outputs):
        for tap in np.ndindex(*taps):
            for start in range(0, inputs, m):
                group = [(o, i, *tap) for i in range(start, min(start + m, inputs))]
                for i in sorted(group, key=lambda i: -abs(scores[i]))[:n]:
                    want[i] = True
    assert torch.equal(pattern_mask(scores, 1.0, word), want)
    assert int(want.sum()) == pattern_capacity(shape, word)
    sparse, flat = pattern_mask(scores, density, word), scores.flatten().tolist()
    count = min(keep_count(scores.numel(), density), int(want.sum()))
    order = sorted(want.flatten().nonzero().flatten().tolist(), key=lambda i: -abs(flat[i]))
    assert sorted(order[:count]) == sparse.flatten().nonzero().flatten().tolist()


def test_two_of_four_is_exactly_half():
    mask = pattern_mask(torch.randn(32, 64, 3, 3), 0.5, "2:4")
    assert (mask.unflatten(1, (16, 4)).sum(2) == 2).all()


@quick
@given(st.sampled_from(["unstructured", *BLOCKS, "2:4"]), st.integers(0, 2**31), st.booleans())
def test_masks_within_masks(word, seed, zeroed):
    scores = torch.randn(64, 8, 3, generator=torch.Generator().manual_seed(seed))
    old = pattern_mask(scores, 0.4, word)
    scores = torch.randn(64, 8, 3, generator=torch.Generator().manual_seed(seed + 1))
    scores = torch.zeros_like(scores) if zeroed else scores  # a kept 0 still beats a pruned 0
    new = pattern_mask(scores, 0.2, word, within=old)
    assert not (new & ~old).any()
    assert new.sum() == pattern_mask(scores, 0.2, word).sum()


def test_within_wins_over_the_count():
    for word in ("unstructured", "4x1", "2:4"):
        old = torch.zeros(8, 8, dtype=torch.bool)
        old[:3, 0] = True
        new = pattern_mask(torch.zeros(8, 8), 0.5, word, within=old)
        assert torch.equal(new, old)


@pytest.mark.parametrize(
    "word", ["", "4", "4x4", "x1", "0:4", "4:2", "2:4 ", "n:m", "auto", None, 3]
)
def test_unknown_patterns_list_the_known_ones(word):
    with pytest.raises(ValueError, match=r"unknown pattern .*unstructured, 4x1, 8x1, .*2:4"):
        parse_pattern(word)


def test_patterns_parse():
    assert parse_pattern("csr").word == "unstructured"
    spec = parse_pattern("16x2")
    assert (spec.kind, spec.rows, spec.cols) == ("block", 16, 2)
    assert parse_pattern("1:16").m == 16
    assert parse_pattern(spec) is spec


def test_pattern_mask_rejections():
    x = torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"needs scores \[O, I"):
        pattern_mask(torch.randn(6), 0.5, "4x1")
    with pytest.raises(ValueError, match="groups must divide the 6 output channels, got 4"):
        pattern_mask(x, 0.5, "4x1", groups=4)
    for within in (torch.ones(6, 4), torch.ones(4, 6, dtype=torch.bool)):
        with pytest.raises(ValueError, match="within must be bool"):
            pattern_mask(x, 0.5, within=within)


def test_norm_kept():
    weight = torch.tensor([3.0, 4.0])
    assert norm_kept(weight, torch.tensor([True, False])) == pytest.approx(0.6)
    assert norm_kept(torch.zeros(2), torch.tensor([True, False])) == 1.0


def test_project_is_the_best_mask_of_its_density():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 3, generator=generator)
    mask = topk_mask(weight, 0.5)
    new, report = project(mask, "4x1", weight)
    blocks = slow_blocks(weight, 4, 1, 1)
    energy = sorted((sum(float(weight[i] * mask[i]) ** 2 for i in b) for b in blocks), reverse=True)
    best = math.sqrt(sum(energy[:3]) / sum(energy))
    assert report.norm_kept == pytest.approx(best)
    assert (report.density_before, report.density_after, report.pattern) == (0.5, 0.5, "4x1")
    assert report.lost == report.gained == int((mask & ~new).sum())
    assert report.to_dict()["lost"] == report.lost
    again, report = project(new, "4x1", weight)
    assert torch.equal(again, new) and report.norm_kept == 1.0 and report.lost == 0
    denser, _ = project(mask, "4x1", weight, density=1.0)
    assert denser.all()
    empty, report = project(torch.zeros(8, 3, dtype=torch.bool), "4x1")
    assert report.density_before == 0 and int(empty.sum()) == 4
    with pytest.raises(ValueError, match="mask must be bool"):
        project(weight, "4x1")
    with pytest.raises(ValueError, match="weight must be"):
        project(mask, "4x1", weight.T)


def slow_erk(shapes, density):
    """RigL's loop: solve for eps, cap the densest layer, solve again."""
    dense = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in dense]
        raw = [sum(s) / math.prod(s) for s in shapes]
        wanted = density * sum(map(math.prod, shapes)) - sum(math.prod(shapes[i]) for i in dense)
        eps = wanted / sum(raw[i] * math.prod(shapes[i]) for i in free)
        worst = max(free, key=lambda i: raw[i])
        if eps * raw[worst] <= 1:
            return [1.0 if i in dense else eps * raw[i] for i in range(len(shapes))]
        dense.add(worst)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 0.9, 0.95, 0.98])
def test_erk_against_the_published_loop(sparsity):
    counts = layer_counts(RESNET20, sparsity, "erk")
    sizes = [math.prod(s) for s in RESNET20]
    assert sum(counts) == math.ceil(Fraction(str(round(1 - sparsity, 2))) * sum(sizes))
    for count, n, density in zip(counts, sizes, slow_erk(RESNET20, 1 - sparsity), strict=True):
        assert abs(count - density * n) <= 1
        assert 1 <= count <= n


@pytest.mark.parametrize("scope", ["global", "lamp"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.97])
def test_ranked_scopes_against_a_python_sort(scope, sparsity):
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 3, 3, 3), (8, 4), (5, 8)]
    weights = [torch.randn(s, generator=generator) * 3**i for i, s in enumerate(shapes)]
    ranked = []
    for layer, weight in enumerate(weights):
        values = sorted((abs(v) for v in weight.double().flatten().tolist()), reverse=True)
        for u, value in enumerate(values):
            lamp = value**2 / sum(v**2 for v in values[: u + 1])
            ranked.append((-(lamp if scope == "lamp" else value), layer, u))
    total = keep_count(len(ranked), 1 - sparsity)
    # The rule keeps one weight per layer first; LAMP's best score of a layer is 1, so it would.
    ranked = [r for r in ranked if r[2] == 0] + sorted(r for r in ranked if r[2] > 0)
    want = [sum(r[1] == layer for r in ranked[:total]) for layer in range(3)]
    counts = layer_counts(shapes, sparsity, scope, weights)
    assert counts == want and sum(counts) == total


def test_global_scope_is_one_threshold():
    weights = [torch.randn(20, 30), torch.randn(10, 20) * 2]
    densities = layer_densities([w.shape for w in weights], 0.8, "global", weights)
    kept = [w[topk_mask(w, d)].abs() for w, d in zip(weights, densities, strict=True)]
    gone = [w[~topk_mask(w, d)].abs() for w, d in zip(weights, densities, strict=True)]
    assert min(k.min() for k in kept) >= max(g.max() for g in gone)


@quick
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=6),
       st.floats(0, 0.999), st.sampled_from(SCOPES), st.integers(1, 4), st.data())  # fmt: skip
def test_totals_floors_and_caps(shapes, sparsity, scope, floor, data):
    sizes = [math.prod(s) for s in shapes]
    caps = [data.draw(st.integers(1, n)) for n in sizes]
    scores = [torch.randn(s) for s in shapes]
    least = [min(cap, floor, n) for cap, n in zip(caps, sizes, strict=True)]
    total = keep_count(sum(sizes), 1 - sparsity)
    if scope != "uniform" and floor > 1 and sum(least) > total:
        with pytest.raises(ValueError, match="floor="):
            layer_counts(shapes, sparsity, scope, scores, floor, caps)
        return
    counts = layer_counts(shapes, sparsity, scope, scores, floor, caps)
    assert all(lo <= c <= cap for lo, c, cap in zip(least, counts, caps, strict=True))
    if scope != "uniform":
        assert sum(counts) == min(max(total, sum(least)), sum(caps))
    densities = layer_densities(shapes, sparsity, scope, scores, floor, caps)
    assert [keep_count(n, d) for n, d in zip(sizes, densities, strict=True)] == counts


def test_uniform_is_the_papers_rule_and_floors_lift_small_layers():
    shapes = [(32, 1, 3, 3), (64, 32)]
    assert layer_counts(shapes, 0.99) == [3, 21]
    assert layer_counts(shapes, 0.99, floor=0.25) == [72, 512]
    assert layer_counts(shapes, 0.99, floor=100) == [100, 100]


def test_degenerate_scores_do_not_poison_the_ranking():
    weights = [torch.zeros(4, 4), torch.full((4, 4), math.inf), torch.full((4, 4), math.nan)]
    for scope in ("global", "lamp"):
        counts = layer_counts([(4, 4)] * 3, 0.5, scope, weights)
        assert sum(counts) == 24 and counts[0] == 1


def test_layer_counts_rejections():
    shapes = [(4, 4)]
    for sparsity in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
            layer_counts(shapes, sparsity)
    with pytest.raises(
        ValueError, match="unknown scope 'erdos'; known: uniform, erk, global, lamp"
    ):
        layer_counts(shapes, 0.5, "erdos")
    with pytest.raises(ValueError, match="needs one scores tensor per layer"):
        layer_counts(shapes, 0.5, "lamp")
    for floor in (0, 1.0, -1, 0.0):
        with pytest.raises(ValueError, match="floor must be"):
            layer_counts(shapes, 0.5, floor=floor)
    for bad in ([], [(0, 4)]):
        with pytest.raises(ValueError, match="no empty weight"):
            layer_counts(bad, 0.5)
