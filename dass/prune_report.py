"""What `dass.prune` and a step of `GradualPruner` tell: rows, totals, and a table of them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dass.permutation import PermuteReport


@dataclass(frozen=True)
class LayerReport:
    """One pruned layer. names: every name it goes by (shared module or tied weight). norm: that of
    its weight before, of which the mask keeps the share `norm_kept`."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    weights: int
    kept: int
    norm_kept: float
    pattern: str
    norm: float

    @property
    def density(self) -> float:
        return self.kept / self.weights


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did: one row per layer, the totals over them, and what was left alone and why.

    `sparsity` is the one reached, `requested` the one asked for. `print(report)` gives a table.
    """

    requested: float
    method: str
    scope: str
    pattern: str
    layers: tuple[LayerReport, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    permuted: PermuteReport | None = None

    @property
    def weights(self) -> int:
        return sum(row.weights for row in self.layers)

    @property
    def kept(self) -> int:
        return sum(row.kept for row in self.layers)

    @property
    def density(self) -> float:
        return self.kept / self.weights

    @property
    def sparsity(self) -> float:
        return 1 - self.density

    @property
    def norm_kept(self) -> float:
        """`||w m|| / ||w||` over all layers together."""
        total = sum(row.norm**2 for row in self.layers)
        kept = sum((row.norm * row.norm_kept) ** 2 for row in self.layers)
        return math.sqrt(kept / total) if total else 1.0

    def to_dict(self) -> dict:
        """Plain numbers, strings, lists and dicts, as JSON knows them."""
        layers = [
            {**asdict(row), "names": [*row.names], "shape": [*row.shape], "density": row.density}
            for row in self.layers
        ]
        skipped = [{"name": name, "reason": reason} for name, reason in self.skipped]
        keys = ("weights", "kept", "density", "sparsity", "norm_kept")
        totals = {key: getattr(self, key) for key in keys}
        permuted = self.permuted.to_dict() if self.permuted else None
        more = {"layers": layers, "skipped": skipped, "permuted": permuted}
        return {**asdict(self), **totals, **more}

    def __str__(self) -> str:
        table = [("layer", "shape", "weights", "kept", "density", "norm kept", "pattern")]
        for row in self.layers:
            name, shape = " = ".join(row.names), "x".join(map(str, row.shape))
            numbers = (f"{row.weights:,}", f"{row.kept:,}", f"{row.density:.2%}")
            table.append((name, shape, *numbers, f"{row.norm_kept:.2%}", row.pattern))
        totals = (f"{self.weights:,}", f"{self.kept:,}", f"{self.density:.2%}")
        table.append((f"all {len(self.layers)}", "", *totals, f"{self.norm_kept:.2%}", ""))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        justify = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.rjust, str.ljust)
        lines = [
            "  ".join(f(*cell) for f, *cell in zip(justify, row, widths, strict=True)).rstrip()
            for row in table
        ]
        lines.append(
            f"{self.method}, {self.scope}, {self.pattern}: "
            f"sparsity {self.sparsity:.4%}, asked for {self.requested:.4%}"
        )
        lines += [str(self.permuted)] if self.permuted else []
        lines += [f"left dense: {name} ({reason})" for name, reason in self.skipped]
        return "\n".join(lines)
