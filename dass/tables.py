"""Tables and plots of what `dass.latency` and `dass.training` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dass.plots import Plot
from dass.report import Table

__all__ = [
    "busy",
    "count_of",
    "curves",
    "layer_plot",
    "layer_table",
    "megabytes",
    "network_plot",
    "network_table",
    "percent",
    "times",
    "ways_table",
]

_WAYS = ("nchw", "channels_last", "frozen", "mkldnn")


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def megabytes(size: int) -> str:
    """Of 10^6 bytes."""
    return f"{size / 1e6:.2f} MB"


def number(value: float) -> str:
    """Three digits or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def network_table(results: Sequence[tuple[str, Mapping]], caption: str = "") -> Table:
    """One row per (name, result of `compare_networks`), in ms."""
    labels = _labels(result for _, result in results)
    columns = ["network", "input", "dense", "as"]
    for label in labels:
        columns += [f"{label} zeros", "speed-up"]
    columns += ["sparse layers"] * bool(labels) + ["spread"]
    rows = []
    for name, result in results:
        best = result["dense"][result["best"]]
        sparse = result["sparse"]
        row = [name, shape(result["input"]), number(best["median_us"] / 1e3), result["best"]]
        for label in labels:
            row += _time_and_ratio(sparse.get(label), 1e3)
        if labels:
            row.append(", ".join(f"{s['sparse_layers']}/{s['layers']}" for s in sparse.values()))
        row.append(percent(max(s["spread"] for s in (best, *sparse.values())), 0))
        rows.append(row)
    return Table(columns, rows, caption, strong=["speed-up"], aside=["sparse layers"])


def ways_table(results: Sequence[tuple[str, Mapping]], caption: str = "") -> Table:
    """Every dense way of each network, in ms; a star at the fastest."""
    ways = [way for way in _WAYS if any(way in result["dense"] for _, result in results)]
    rows = []
    for name, result in results:
        row = [name, shape(result["input"])]
        for way in ways:
            taken = result["dense"].get(way)
            star = "*" if way == result["best"] else ""
            row.append(f"{number(taken['median_us'] / 1e3)}{star}" if taken else "-")
        rows.append(row)
    return Table(["network", "input", *(f"dense {way}" for way in ways)], rows, caption)


def layer_table(rows: Sequence[Mapping], caption: str = "") -> Table:
    """One row per row of `compare_layers`, in us."""
    labels = _labels(rows)
    columns = ["layer", "kind", "weight", "input", "dense", "as"]
    for label in labels:
        columns += [f"{label} zeros", "speed-up"]
    out = []
    for row in rows:
        best = row["dense"][row["best"]]["median_us"]
        cells = [layer_name(row), row["kind"], shape(row["weight"]), shape(row["input"])]
        cells += [number(best), row["best"]]
        for label in labels:
            cells += _time_and_ratio(row["sparse"].get(label), 1.0)
        out.append(cells)
    return Table(columns, out, caption, strong=["speed-up"], aside=["weight", "input"])


def busy(results: Sequence[Mapping]) -> str | None:
    """What to say of `compare_networks` results that were taken while the machine was not quiet."""
    spreads = [
        taken["spread"]
        for result in results
        for taken in (result["dense"][result["best"]], *result["sparse"].values())
    ]
    if not spreads or max(spreads) < 0.25:
        return None
    return (
        f"The machine was busy while this was measured: times of one thing spread by up to "
        f"{percent(max(spreads), 0)}. Measure again when it is quiet before quoting a number."
    )


def count_of(n: int, what: str) -> str:
    """ "1 thread", "2 threads"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def layer_plot(rows: Sequence[Mapping], title: str) -> Plot:
    """Bars of time per layer: the fastest dense way and each sparse one."""
    series = {"dense, fastest way": [r["dense"][r["best"]]["median_us"] for r in rows]}
    for label in _labels(rows):
        series[f"{label} zeros"] = [
            r["sparse"][label]["median_us"] if label in r["sparse"] else 0.0 for r in rows
        ]
    names = [layer_name(row) for row in rows]
    return Plot("bars", title, series, x_label="us per call", categories=names)


def network_plot(results: Sequence[tuple[str, Mapping]], title: str) -> Plot:
    """Bars of time per image."""

    def per_image(taken: Mapping, result: Mapping) -> float:
        return taken["median_us"] / 1e3 / result["input"][0]

    series = {"dense, fastest way": [per_image(r["dense"][r["best"]], r) for _, r in results]}
    for label in _labels(result for _, result in results):
        series[f"{label} zeros"] = [
            per_image(r["sparse"][label], r) if label in r["sparse"] else 0.0 for _, r in results
        ]
    names = [f"{name}, batch {result['input'][0]}" for name, result in results]
    return Plot("bars", title, series, x_label="ms per image", categories=names)


def curves(histories: Mapping[str, Sequence[Mapping]], title: str) -> Plot:
    """Training and test accuracy by epoch; one history goes on where the one before it ended."""
    series: dict[str, list] = {}
    epoch = 0
    for name, history in histories.items():
        for what in ("train", "test"):
            points = [
                (epoch + row["epoch"], 100 * row[f"{what}_accuracy"])
                for row in history
                if f"{what}_accuracy" in row
            ]
            if points:
                series[f"{name}, {what}"] = points
        epoch += len(history)
    dashed = [name for name in series if name.endswith(", train")]
    return Plot("lines", title, series, x_label="epoch", y_label="accuracy, %", dashed=dashed)


def _time_and_ratio(sparse: Mapping | None, unit_us: float) -> list[str]:
    if sparse is None:
        return ["-", "-"]
    return [number(sparse["median_us"] / unit_us), times(sparse["speedup"])]


def layer_name(row: Mapping) -> str:
    """ "NAME" or "NAME and 3 alike"."""
    names = row["names"]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} alike"


def shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _labels(results) -> list[str]:
    """The sparse labels of all results, in the order of their first appearance."""
    return list(dict.fromkeys(label for result in results for label in result["sparse"]))


def deterministic_line(seed: int) -> str:
    """What a report says of a run with --deterministic."""
    return (
        f"Deterministic algorithms only, all generators from seed {seed}: the same command on this "
        "machine gives the same weights, bit for bit."
    )
