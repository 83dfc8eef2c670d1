"""Which weights a layer keeps, and how many: pure functions of tensors and shapes, no modules.

A weight is `[O, I]` (linear) or `[O, I, *kernel]` (convolution; `I` is per group). A mask is a bool
tensor of the same shape, True where the weight is kept. Every rule here is deterministic and keeps
an exact count: equal scores are settled by the lowest index.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_PATTERNS = {"4x1": (4, 1), "8x1": (8, 1), "16x1": (16, 1), "16x2": (16, 2), "32x2": (32, 2)}
KNOWN_PATTERNS = ("unstructured", *BLOCK_PATTERNS, "2:4", "n:m")
SCOPES = ("uniform", "erk", "global", "lamp")


def keep_count(n: int, density: float | Fraction) -> int:
    """Weights kept out of `n`: `n - int((1 - k) n)`, which is `ceil(k n)`, and at least 1 if n > 0.

    The product is formed in integers, from the exact value of `density`. A float such as 0.1, or
    the result of `1 - 0.7`, is only known to one part in 2^52, so a product within `n 2^-52` of an
    integer is that integer: `keep_count(10, 0.1)` and `keep_count(10, 1 - 0.9)` are both 1, where
    float arithmetic gives 1 and 2. For integer c, `keep_count(n, c / n)` is c.

    Raises ValueError unless 0 < density <= 1 and n >= 0. Source: DASS, arXiv 2207.06968, section 3.
    """
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if n == 0:
        return 0
    exact = density if isinstance(density, Fraction) else float(density)
    numerator, denominator = exact.as_integer_ratio()
    whole, rest = divmod(numerator * n, denominator)
    return max(1, whole + ((rest << 52) > n * denominator))


def topk_mask(scores: Tensor, density: float) -> Tensor:
    """`m_i = 1` if `|s_i|` is among the `keep_count(numel, density)` largest, else 0.

    scores: any shape and real dtype. Returns bool, same shape and device. Ties go to the lowest
    flat index. A NaN score counts as infinite, so that it is kept and shows, not pruned and hidden.
    Linear time, no sort; no host synchronisation off the CPU. Source: DASS, arXiv 2207.06968.
    """
    return pattern_mask(scores, density)


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern word. kind: "unstructured"; "block" (`rows` outputs x `cols` inputs at one
    kernel tap); "n:m" (at most `n` of `m` consecutive input channels, per output and tap)."""

    word: str
    kind: str
    rows: int = 1
    cols: int = 1
    n: int = 1
    m: int = 1


def parse_pattern(word: "str | Pattern") -> Pattern:
    """The `Pattern` that a word names ("csr" is "unstructured"). ValueError lists the known words.

    "n:m" stands for any two positive integers with n <= m, such as "2:4" or "1:16".
    """
    if isinstance(word, Pattern):
        return word
    if word in ("unstructured", "csr"):
        return Pattern("unstructured", "unstructured")
    if word in BLOCK_PATTERNS:
        rows, cols = BLOCK_PATTERNS[word]
        return Pattern(word, "block", rows=rows, cols=cols)
    match = re.fullmatch(r"([1-9][0-9]*):([1-9][0-9]*)", word) if isinstance(word, str) else None
    if match and int(match[1]) <= int(match[2]):
        return Pattern(word, "n:m", n=int(match[1]), m=int(match[2]))
    raise ValueError(f"unknown pattern {word!r}; known: {', '.join(KNOWN_PATTERNS)} (n <= m)")


def pattern_capacity(shape: Sequence[int], pattern: str | Pattern) -> int:
    """The most weights that a weight of this shape can keep under the pattern (below numel for n:m
    only: `n` per full group of m input channels, `min(n, rest)` in a short last group)."""
    spec = parse_pattern(pattern)
    if spec.kind != "n:m":
        return math.prod(shape)
    full, rest = divmod(shape[1], spec.m)
    return shape[0] * math.prod(shape[2:]) * (full * spec.n + min(spec.n, rest))


def pattern_fits(shape: Sequence[int], pattern: str | Pattern, groups: int = 1) -> bool:
    """Whether the kernels can use the pattern's structure for a weight of this shape: n:m needs
    input channels divisible by m, blocks in a grouped convolution whole blocks per group."""
    spec = parse_pattern(pattern)
    if spec.kind == "n:m":
        return shape[1] % spec.m == 0
    return groups == 1 or shape[0] // groups % spec.rows == 0


def pattern_mask(
    scores: Tensor,
    density: float,
    pattern: str | Pattern = "unstructured",
    *,
    groups: int = 1,
    within: Tensor | None = None,
) -> Tensor:
    """The mask of the largest scores that obeys `pattern`; bool, shape and device of `scores`.

    unstructured: see `topk_mask`.
    RxC blocks: R consecutive output channels x C consecutive input channels, at one tap, are kept
        or pruned as one. A block's score is its L2 norm per weight, `sqrt(sum s^2 / size)`, and
        `keep_count(number of blocks, density)` blocks are kept. Where the channels do not divide,
        the last block is short; blocks restart at each of the convolution's `groups`, since outputs
        of different groups read different inputs (so depthwise blocks hold one output).
    n:m: of each m consecutive input channels (per output and tap; the channels run as in
        `weight.movedim(1, -1)`, NVIDIA's layout for 2:4) the n largest are kept; a short last group
        keeps at most n too. A density below n/m then keeps the largest of those; one above is
        capped by the pattern (`pattern_capacity`).
    within: bool mask; nothing outside it is kept (once pruned, never back). The count stays exact
        as long as `within` obeys the pattern and holds enough weights.

    Raises ValueError for an unknown pattern, a density outside (0, 1], shapes that do not fit.
    Sources: N:M, Mishra et al. arXiv 2104.08378; R x 1 vectors, Elsen et al. arXiv 1911.09723.
    """
    spec = parse_pattern(pattern)
    size = _magnitude(scores)
    if within is not None:
        if within.shape != scores.shape or within.dtype != torch.bool:
            raise ValueError(
                f"within must be bool {tuple(scores.shape)}, "
                f"got {within.dtype} {tuple(within.shape)}"
            )
        size = torch.where(within, size, -1.0)  # ranks after every true magnitude, zero included
    if spec.kind != "unstructured" and scores.dim() < 2:
        raise ValueError(
            f"pattern {spec.word!r} needs scores [O, I, ...], got {tuple(scores.shape)}"
        )
    if size.numel() == 0 or spec.kind == "unstructured":
        mask = _largest(size.reshape(-1), keep_count(size.numel(), density)).view(size.shape)
    elif spec.kind == "block":
        mask = _block_mask(size, density, spec, groups)
    else:
        mask = _nm_mask(size, density, spec)
    return mask if within is None else mask & within


def _magnitude(scores: Tensor) -> Tensor:
    scores = scores.detach()
    if not scores.is_floating_point():
        scores = scores.double()
    elif scores.dtype.itemsize < 4:
        scores = scores.float()
    return scores.abs().nan_to_num_(nan=math.inf, posinf=math.inf)


def _largest(values: Tensor, k: int) -> Tensor:
    """Mask of the k largest of a 1-D tensor without NaN, lowest index first among equals.

    Not torch.kthvalue: on a descending input its CPU quickselect is quadratic (135 s for 4 million
    values), and it is refused on CUDA in deterministic mode. NumPy's partition is introselect, and
    3 ms there against 48 ms for torch.topk.
    """
    n = values.numel()
    if k >= n or k <= 0:
        return torch.full_like(values, k > 0, dtype=torch.bool)
    if not torch.compiler.is_compiling() and _has_memory(values):
        return _largest_numpy(values, k)
    return _largest_torch(values, k)


def _has_memory(values: Tensor) -> bool:
    """Whether NumPy can read it: no FakeTensor, no other subclass, no wrapper of torch.func."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(values)
    return values.is_cpu and type(values) is Tensor and not wrapped


def _largest_numpy(values: Tensor, k: int) -> Tensor:
    array = values.numpy()
    threshold = np.partition(array, array.size - k)[array.size - k]
    mask = array > threshold
    missing = k - np.count_nonzero(mask)
    mask[np.flatnonzero(array == threshold)[:missing]] = True
    return torch.from_numpy(mask)


def _largest_torch(values: Tensor, k: int) -> Tensor:
    n = values.numel()
    if 2 * k <= n:
        threshold = values.topk(k, sorted=False).values.amin()
    else:
        threshold = values.topk(n - k + 1, largest=False, sorted=False).values.amax()
    above, tied = values > threshold, values == threshold
    return above | (tied & (tied.cumsum(0) <= k - above.sum()))


def _block_mask(size: Tensor, density: float, spec: Pattern, groups: int) -> Tensor:
    outputs, inputs = size.shape[:2]
    if groups < 1 or outputs % groups:
        raise ValueError(f"groups must divide the {outputs} output channels, got {groups}")
    outputs //= groups
    cells = size.double().reshape(groups, outputs, inputs, -1)  # double: s^2 must not underflow
    cells = F.pad(cells, (0, 0, 0, -inputs % spec.cols, 0, -outputs % spec.rows), value=-1.0)
    # [groups, row blocks, rows, column blocks, cols, taps]
    cells = cells.unflatten(2, (-1, spec.cols)).unflatten(1, (-1, spec.rows))
    heights = _block_lengths(outputs, spec.rows).to(size.device)
    widths = _block_lengths(inputs, spec.cols).to(size.device)
    energy = cells.clamp(min=0).square().sum((2, 4)) / (heights[:, None] * widths)[..., None]
    energy = torch.where(cells.amax((2, 4)) >= 0, energy, -1.0)  # wholly outside `within`
    kept = _largest(energy.reshape(-1), keep_count(energy.numel(), density)).view(energy.shape)
    kept = kept[:, :, None, :, None].expand(cells.shape).flatten(3, 4).flatten(1, 2)
    return kept[:, :outputs, :inputs].reshape(size.shape)


def _block_lengths(n: int, length: int) -> Tensor:
    return torch.tensor([min(length, n - start) for start in range(0, n, length)])


def _nm_mask(size: Tensor, density: float, spec: Pattern) -> Tensor:
    inputs = size.shape[1]
    rows = F.pad(size.movedim(1, -1), (0, -inputs % spec.m), value=-2.0)  # padding ranks last
    rows = rows.unflatten(-1, (-1, spec.m))
    order = rows.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, order[..., : spec.n], True)
    mask = kept.flatten(-2)[..., :inputs].movedim(-1, 1).contiguous()
    target = keep_count(size.numel(), density)
    if target >= pattern_capacity(size.shape, spec):
        return mask
    survivors = torch.where(mask, size, -1.0).reshape(-1)
    return _largest(survivors, target).view(size.shape) & mask


def norm_kept(weight: Tensor, mask: Tensor) -> float:
    """`||w * m||_2 / ||w||_2`, in [0, 1], summed in float64; 1.0 where the norm is 0."""
    energy = weight.detach().double().square()
    total = energy.sum().item()
    return math.sqrt(torch.where(mask, energy, 0.0).sum().item() / total) if total else 1.0


@dataclass(frozen=True)
class ProjectReport:
    """What a projection did: densities, `norm_kept` = `||w m m'|| / ||w m||` (from the counts of
    the masks where no weight was given), and the numbers of positions lost and gained."""

    pattern: str
    density_before: float
    density_after: float
    norm_kept: float
    lost: int
    gained: int

    def to_dict(self) -> dict:
        return asdict(self)


def project(
    mask: Tensor,
    pattern: str | Pattern,
    weight: Tensor | None = None,
    *,
    density: float | None = None,
    groups: int = 1,
) -> tuple[Tensor, ProjectReport]:
    """The mask of a fast pattern nearest to `mask`: of all masks of the pattern with this density
    (default: that of `mask`) the one keeping the most of `||w * mask||`. See `pattern_mask`.

    mask: bool `[O, I, ...]`; weight: same shape, default all ones (each kept position counts 1).
    The new mask may hold positions outside the old one, where a kept block covers them.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")
    if weight is not None and weight.shape != mask.shape:
        raise ValueError(f"weight must be {tuple(mask.shape)}, got {tuple(weight.shape)}")
    spec = parse_pattern(pattern)
    n, before = mask.numel(), int(mask.sum())
    wanted = max(before, 1) / max(n, 1) if density is None else density
    kept_weight = mask.double() if weight is None else torch.where(mask, weight.detach(), 0.0)
    new = pattern_mask(kept_weight, wanted, spec, groups=groups)
    report = ProjectReport(
        pattern=spec.word,
        density_before=before / max(n, 1),
        density_after=int(new.sum()) / max(n, 1),
        norm_kept=norm_kept(kept_weight, new),
        lost=int((mask & ~new).sum()),
        gained=int((new & ~mask).sum()),
    )
    return new, report


def layer_densities(
    shapes: Sequence[Sequence[int]],
    sparsity: float,
    scope: str = "uniform",
    scores: Sequence[Tensor] | None = None,
    floor: int | float = 1,
    caps: Sequence[int] | None = None,
) -> list[float]:
    """`layer_counts` as densities: `keep_count(n, density)` gives the counts back exactly."""
    counts = layer_counts(shapes, sparsity, scope, scores, floor, caps)
    return [count / math.prod(shape) for count, shape in zip(counts, shapes, strict=True)]


def layer_counts(
    shapes: Sequence[Sequence[int]],
    sparsity: float,
    scope: str = "uniform",
    scores: Sequence[Tensor] | None = None,
    floor: int | float = 1,
    caps: Sequence[int] | None = None,
) -> list[int]:
    """How many weights each layer keeps, for one sparsity in [0, 1) over all layers together.

    uniform: `keep_count(n_l, 1 - sparsity)` in every layer.
    erk: density of layer l proportional to `(n_out + n_in + kh + kw) / (n_out n_in kh kw)`; layers
        that would pass their cap (density 1) are set to it and the rest goes to the others. RigL,
        Evci et al. arXiv 1911.11134, section 3.
    global: the largest `|s|` over all layers.
    lamp: the largest `s_u^2 / sum_{v >= u} s_v^2`, v over the scores of the same layer that are
        not smaller. Lee et al. arXiv 2010.07611, equation 5.

    For the last three the counts add up to exactly `keep_count(N, 1 - sparsity)`, N the total, as
    far as floor and caps allow. Equal scores: earlier layer first.
    shapes: weight shapes, none empty. scores: one tensor per layer (global and lamp only).
    floor: the least that a layer keeps, as a count (int) or a density (float in (0, 1)).
    caps: the most that each layer keeps (default: all of it; a pattern's capacity; an older mask).
    Raises ValueError for an unknown scope, a sparsity outside [0, 1), missing scores, and a floor
    above 1 weight that alone exceeds the total.
    """
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}; known: {', '.join(SCOPES)}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    sizes = [math.prod(shape) for shape in shapes]
    if not sizes or min(sizes) == 0:
        raise ValueError("shapes must hold at least one layer, and no empty weight")
    high = [min(n, cap) for n, cap in zip(sizes, caps or sizes, strict=True)]
    low = [min(cap, _floor_count(n, floor)) for n, cap in zip(sizes, high, strict=True)]
    if scope == "uniform":
        counts = [keep_count(n, 1 - sparsity) for n in sizes]
        return [min(max(c, lo), hi) for c, lo, hi in zip(counts, low, high, strict=True)]
    total = keep_count(sum(sizes), 1 - sparsity)
    if sum(low) > total and floor != 1:
        raise ValueError(
            f"floor={floor} keeps {sum(low)} weights, more than the {total} that "
            f"sparsity {sparsity} leaves of {sum(sizes)}"
        )
    total = min(max(total, sum(low)), sum(high))
    if scope == "erk":
        return _share_out(np.array([sum(shape) for shape in shapes]), low, high, total)
    if scores is None or len(scores) != len(sizes):
        raise ValueError(f"scope {scope!r} needs one scores tensor per layer")
    return _rank_all(scores, scope, low, high, total)


def _floor_count(n: int, floor: int | float) -> int:
    if isinstance(floor, int) and floor >= 1:
        return min(n, floor)
    if isinstance(floor, float) and 0 < floor < 1:
        return keep_count(n, floor)
    raise ValueError(f"floor must be an int >= 1 or a float in (0, 1), got {floor!r}")


def _share_out(shares: np.ndarray, low: list[int], high: list[int], total: int) -> list[int]:
    """Integers `clip(e * shares, low, high)` that add up to `total`, by the largest remainder.

    The sum grows with e, so bisection finds it: with only upper caps this is the fixed point of
    RigL's "cap the largest, solve again" loop, and it also holds with floors.
    """
    bottom, top = 0.0, float(np.max(np.array(high) / shares))
    for _ in range(100):
        middle = (bottom + top) / 2
        enough = np.clip(middle * shares, low, high).sum() >= total
        bottom, top = (bottom, middle) if enough else (middle, top)
    exact = np.clip(top * shares, low, high)
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")  # largest remainder first
    while (missing := total - int(counts.sum())) != 0:
        step = 1 if missing > 0 else -1
        free = counts < high if step > 0 else counts > low
        counts[order[free[order]][::step][: abs(missing)]] += step
    return counts.tolist()


def _rank_all(
    scores: Sequence[Tensor], scope: str, low: list[int], high: list[int], total: int
) -> list[int]:
    """Counts of a ranking over all layers: each layer's scores descend, its first `low` are kept
    anyway and none after `high` is."""
    open_scores = []
    for score, lo, hi in zip(scores, low, high, strict=True):
        falling = np.sort(_magnitude(score).reshape(-1).cpu().numpy())[::-1]
        if scope == "lamp":
            squares = np.square(np.minimum(falling, 1e150, dtype=np.float64))  # inf / inf is NaN
            sums = np.cumsum(squares)
            falling = np.divide(squares, sums, out=np.zeros_like(squares), where=sums > 0)
        open_scores.append(torch.from_numpy(falling[lo:hi].copy()))
    kept = _largest(torch.cat(open_scores), total - sum(low))
    parts = kept.split([len(part) for part in open_scores])
    return [lo + int(part.sum()) for lo, part in zip(low, parts, strict=True)]
