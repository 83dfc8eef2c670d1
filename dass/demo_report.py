"""The report of ``dass demo``, from the results of its stages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from dass.demo import EXCLUDE, EXCLUDE_UNTRAINED
from dass.drawing import draw_svg
from dass.genotype import Genotype
from dass.report import Drawing, Plot, Report, Section, Table, machine_table
from dass.search_run import history_section
from dass.tables import (
    busy,
    count_of,
    curves,
    layer_plot,
    layer_table,
    megabytes,
    network_plot,
    network_table,
    number,
    percent,
    times,
    ways_table,
)

__all__ = ["demo_report"]

HOW_TIMED = (
    "Every time is a median over rounds in which all rivals ran in turn in one process, forwards "
    "and backwards; a ratio is the median of the ratios of one round. float32, one thread. The "
    "dense side is the fastest of four ways that torch has: NCHW, channels_last, traced and "
    "frozen with optimize_for_inference (oneDNN), and weights and activations prepacked by "
    "to_mkldnn; input conversions are not counted against it. The sparse side takes NCHW. "
    "Spread is the distance of the quartiles over the median, the largest of the row.",
    "In whole networks BatchNorm is folded into the convolutions on both sides. "
    "dass.sparsify(policy='auto') runs a layer sparse only where it measured that to be faster "
    "than the same layer dense in the model as it is, in eager mode and NCHW. A ratio below 1 in "
    "these tables means that another dense form, such as the frozen one, is the better choice.",
)


def demo_report(results: Mapping) -> Report:
    """Words, tables and plots of a finished demo (:func:`dass.demo.run_demo`)."""
    view = _View(results)
    sections = [
        _accuracy(view),
        *_search(view),
        _check(view),
        _steps(view),
        *_trained(view),
        *_untrained(view),
        Section("How it was measured", HOW_TIMED, brief=False),
        Section("This machine", items=[machine_table(view.machine)], brief=False),
        _durations(view),
    ]
    return Report(
        "dass demo: train, prune, run sparse", _intro(view), _figures(view), sections, dict(results)
    )


class _View:
    """The results by kind of stage."""

    def __init__(self, results: Mapping):
        self.settings, self.machine = results["settings"], results["machine"]
        self.stages, self._kinds = results["stages"], results["kinds"]
        self.train = next(result for _, result in self.of("train"))
        self.pruned = {name.removeprefix("prune to "): r for name, r in self.of("prune")}
        self.check = next(result for _, result in self.of("check"))["rows"]
        self.last = list(self.pruned)[-1]

    def of(self, kind: str) -> Iterator[tuple[str, Mapping]]:
        return ((n, self.stages[n]) for n, found in self._kinds.items() if found == kind)

    def networks(self, kind: str) -> list[tuple[str, Mapping]]:
        """(name without pixels and batch, result of `compare_networks`)."""
        return [(re.split(" at |,", name)[0], r["network"]) for name, r in self.of(kind)]


def _intro(view: _View) -> list[str]:
    train, width = view.train, view.settings["width"]
    tuning = count_of(view.pruned[view.last]["epochs"], "epoch")
    words = [
        f"ResNet-18 at {width:g} times its width, trained on {train['images']:,} images of "
        f"{train['data']} for {count_of(train['epochs'], 'epoch')}, pruned by magnitude, every "
        f"layer alike but for the {' and the '.join(EXCLUDE)}, and fine-tuned for {tuning} on the "
        f"sparse kernels after each pruning. All accuracies are on the {train['test_images']:,} "
        "test images; nothing was chosen by them."
    ]
    if train["data"] == "digits":
        asked = view.settings["data"] == "digits"
        words.append(
            f"{'These' if asked else 'CIFAR-10 was not at hand, so these'} are scikit-learn's 8x8 "
            "digits, scaled up: real images, but easy ones. The times do not depend on that."
        )
    machine = view.machine
    words.append(
        f"{machine['cpu']}, {count_of(machine['cores'] or machine['machine_cores'], 'core')}, "
        f"{machine['dass_isa']}; torch {machine['torch']}, dass {machine['dass']}; float32. "
        "Latencies are of one thread; the sparse side runs in NCHW, the dense side in whatever "
        "layout is its fastest."
    )
    networks = [result for kind in ("trained", "untrained") for _, result in view.networks(kind)]
    if warning := busy(networks):
        words.append(warning)
    return words


def _figures(view: _View) -> list[tuple[str, str]]:
    train, last = view.train, view.pruned[view.last]
    found = [
        (
            percent(last["accuracy"]),
            f"accuracy at {view.last} zeros; dense {percent(train['accuracy'])}",
        ),
        (
            times(train["dense_bytes"] / last["file_bytes"]),
            f"smaller file at {view.last}: {megabytes(last['file_bytes'])}",
        ),
    ]
    for kind in ("trained", "untrained"):
        networks = view.networks(kind)
        if not networks:
            continue
        ratios = [result["sparse"][view.last]["speedup"] for _, result in networks]
        low, high = times(min(ratios)), times(max(ratios))
        names = " and ".join(dict.fromkeys(name for name, _ in networks))
        batches = sorted({result["input"][0] for _, result in networks})
        words = (
            f"the speed of torch's fastest dense form: {names} ({kind}) at {view.last} zeros, "
            f"batch {', '.join(map(str, batches))}, one thread"
        )
        found.append((low if low == high else f"{low} to {high}", words))
    return found


def _accuracy(view: _View) -> Section:
    columns = ("network", "epochs", "accuracy", "before tuning", "nonzeros", "zeros", "file",
               "smaller")  # fmt: skip
    train = view.train
    rows = [
        (
            "dense",
            str(train["epochs"]),
            percent(train["accuracy"]),
            "-",
            f"{train['nonzeros']:,}",
            "-",
            megabytes(train["dense_bytes"]),
            times(1.0),
        )
    ]
    points = [(train["nonzeros"], 100 * train["accuracy"])]
    epochs = train["epochs"]
    for label, result in view.pruned.items():
        epochs += result["epochs"]
        rows.append(
            (
                f"pruned {label}",
                str(epochs),
                percent(result["accuracy"]),
                percent(result["before_finetuning"]),
                f"{result['nonzeros']:,}",
                percent(1 - result["nonzeros"] / result["weights"]),
                megabytes(result["file_bytes"]),
                times(result["dense_bytes"] / result["file_bytes"]),
            )
        )
        points.append((result["nonzeros"], 100 * result["accuracy"]))
    histories = {"dense": train["history"]}
    histories |= {label: result["history"] for label, result in view.pruned.items()}
    plot = Plot(
        "lines",
        "Accuracy by nonzero weights",
        {"accuracy": points},
        x_label="nonzero weights of convolutions and linear layers",
        y_label="accuracy, %",
        marks=["dense", *view.pruned],
        log_x=True,
        least_y=10.0,
    )
    text = (
        "Epochs are counted from the start: each pruned network goes on from the one above it and "
        "so has had more of them. Nonzeros are of all convolutions and linear layers, those left "
        "dense included. Files: dass.save for the pruned networks, the state dict in safetensors "
        "for the dense one.",
    )
    items = [Table(columns, rows), plot, curves(histories, "Training and fine-tuning")]
    return Section("Accuracy and size", text, items)


def _check(view: _View) -> Section:
    columns = ("network", "dense", "auto", "always", "error, auto", "error, always",
               "sparse layers, auto")  # fmt: skip
    rows = [
        (
            f"pruned {label}",
            *(percent(row["accuracy"][way], 2) for way in ("plain", "auto", "always")),
            *(f"{row['error'][way]:.1e}" for way in ("auto", "always")),
            f"{row['sparse_layers']}/{row['layers']}",
        )
        for label, row in view.check.items()
    ]
    text = (
        "Accuracy of each pruned network with plain dense layers, as dass.sparsify chose (auto), "
        "and with every pruned layer sparse (always), on all test images. The error, the largest "
        "difference of the logits over the largest logit, must be below 1e-4, or the demo fails.",
    )
    return Section("Same results sparse and dense", text, [Table(columns, rows)])


def _search(view: _View) -> Iterator[Section]:
    for _, found in view.of("search"):
        genotype = Genotype.from_json(found["genotype"])
        text = [
            f"DASS on {found['images']:,} images of {found['data']}, far too short for a good "
            "architecture: dass search --help has more."
        ]
        section = history_section(found["history"], [], "A small search")
        cells = Drawing("the cells found", draw_svg(genotype))
        yield replace(section, text=text, items=[cells, *section.items], brief=False)


def _steps(view: _View) -> Section:
    (_, result), *_ = view.of("steps")
    columns = ("network", "masked NCHW", "masked channels_last", "sparse", "speed-up")
    rows, any_row = [], None
    for label, row in result["rows"].items():
        taken = [row["dense"][way] for way in ("masked NCHW", "masked channels_last")]
        taken.append(row["sparse"]["sparse"])
        cells = [number(t["median_us"] / 1e3) for t in taken]
        rows.append((f"pruned {label}", *cells, times(row["sparse"]["sparse"]["speedup"])))
        any_row = row
    text = (
        f"Milliseconds for forward, backward, SGD and masks on {any_row['batch']} images, "
        f"{count_of(any_row['threads'], 'thread')} as in this run's fine-tuning. Masked: dense "
        "layers whose pruned weights are set to zero after each step; the ratio is to the faster "
        "of the two.",
    )
    return Section("One fine-tuning step", text, [Table(columns, rows, strong=("speed-up",))])


def _trained(view: _View) -> Iterator[Section]:
    networks = view.networks("trained")
    if not networks:
        return
    yield Section(
        "Latency of the trained network",
        ("Milliseconds, one thread.",),
        [network_table(networks), network_plot(networks, "Whole network, trained")],
    )
    yield _ways("Dense forms of the trained network", networks)
    for stage, result in view.of("trained"):
        batch = stage.rpartition(" ")[2]
        yield _layers(f"Layers of the trained network, batch {batch}", result["layers"])


def _untrained(view: _View) -> Iterator[Section]:
    networks = view.networks("untrained")
    if not networks:
        return
    yield Section(
        "Larger networks, untrained: shapes only",
        (
            "Random weights, so there is no accuracy here. Pruned by magnitude, every layer alike "
            f"but for the {' and the '.join(EXCLUDE_UNTRAINED)} ones. Milliseconds, one thread.",
        ),
        [network_table(networks), network_plot(networks, "Whole networks, untrained")],
    )
    yield _ways("Dense forms of the larger networks", networks)
    for stage, result in view.of("untrained"):
        if "layers" not in result:
            continue
        title = f"Layers of {stage}, untrained"
        yield _layers(title, result["layers"], brief=False)


def _ways(title: str, networks) -> Section:
    text = ("Milliseconds, one thread, BatchNorm folded. * is the fastest, to which ratios are.",)
    return Section(title, text, [ways_table(networks)], brief=False)


def _layers(title: str, rows, brief: bool = True) -> Section:
    text = ("Microseconds per call, one thread; each layer alone, in the shape it has there.",)
    return Section(title, text, [layer_table(rows), layer_plot(rows, title)], brief)


def _durations(view: _View) -> Section:
    rows = [(name, f"{result['seconds']:.1f} s") for name, result in view.stages.items()]
    total = sum(result["seconds"] for result in view.stages.values())
    rows.append(("all", f"{total:.1f} s"))
    return Section("Time taken", items=[Table(("stage", "seconds"), rows)])
