"""What a pattern costs in accuracy: one network, pruned by each, fine-tuned by the same steps.

    python -m bench.bench_patterns --run runs/patterns --finetune-images 10000 --finetune-seeds 2
    python -m bench.bench_patterns --run runs/quick --data digits --images 600 --width 0.125
    python -m bench.bench_patterns --table runs/patterns/patterns.json

The first is that of docs/patterns.md, on CIFAR-10; the last only prints what a run has found.

A seed trains the network once. Each pattern then starts from those weights, at each sparsity, with
the channels as they are and permuted (`dass.permute`); a fine-tuning seed shows all of them the
same images in the same order. Accuracy is that of the test part after the last step; nothing is
chosen by it. A row that the folder holds is kept: a run that was broken off, or is asked for more
seeds, goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from bench.table import markdown
from dass import zoo
from dass.data import ImageDataset, load
from dass.pruning import prune
from dass.report import write_text
from dass.runs import RunFolder
from dass.timing import machine_facts
from dass.training import TrainConfig, TrainResult, evaluate, train

PATTERNS = ("unstructured", "4x1", "8x1", "16x1", "16x2", "32x2")
EXCLUDE = ("first", "last")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = found.add_argument
    add("--run", type=Path, default=Path("runs/patterns"), help="folder of rows and table")
    add("--table", type=Path, metavar="JSON", help="no run: print the table of a finished one")
    add("--network", default="resnet18", help="of the zoo")
    add("--width", type=float, default=0.25, help="multiplies its channels")
    add("--data", default="cifar10", help="a name of dass.data.load")
    add("--images", type=int, default=20_000, help="of the training part, stratified")
    add("--epochs", type=int, default=6, help="of dense training")
    add("--lr", type=float, default=0.1, help="highest rate of it")
    add("--finetune-images", type=int, default=20_000, help="of those images, stratified")
    add("--finetune-epochs", type=int, default=1, help="after pruning")
    add("--finetune-lr", type=float, default=0.05, help="highest rate of it")
    add("--patterns", default=",".join(PATTERNS))
    add("--sparsities", default="0.9,0.95")
    add("--seeds", type=int, default=1, help="dense networks: of weights, order, augmentation")
    add("--finetune-seeds", type=int, default=1, help="fine-tunings of each pruned network")
    return found


def rows_of(options: argparse.Namespace) -> Iterator[tuple[int, int, float, str, bool]]:
    """(seed, seed of the fine-tuning, sparsity, pattern, permuted), the seeds outermost."""
    sparsities, patterns = options.sparsities.split(","), options.patterns.split(",")
    for seed, again in itertools.product(range(options.seeds), range(options.finetune_seeds)):
        for sparsity, pattern in itertools.product(map(float, sparsities), patterns):
            for permuted in (False, True)[: 1 if pattern == "unstructured" else 2]:
                yield seed, again, sparsity, pattern, permuted


class Experiment:
    """A run folder, its data and the dense network of the seed at hand."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        several = ("run", "table", "patterns", "sparsities", "seeds", "finetune_seeds")
        settings = {key: value for key, value in vars(options).items() if key not in several}
        self.run = RunFolder(options.run, {"bench": "patterns", **settings})
        self.data = load(options.data, limit=options.images)
        self.test = load(options.data, train=False)
        self.seed, self.weights = None, {}

    def network(self) -> nn.Module:
        options = self.options
        classes, channels = len(self.data.classes), self.data.shape[0]
        return zoo.create(options.network, classes, width=options.width, in_channels=channels)

    def dense(self, seed: int) -> dict:
        """The weights after dense training, which is done at most once."""
        if seed != self.seed:
            torch.manual_seed(seed)
            model, path = self.network(), self.run.path / f"dense-{seed}.pt"
            config = TrainConfig(epochs=self.options.epochs, lr=self.options.lr, seed=seed)
            train(model, self.data, config, test=self.test, checkpoint=path)
            self.seed, self.weights = seed, model.state_dict()
            row = {"seed": seed, "accuracy": evaluate(model, self.test).accuracy}
            print(f"dense {seed}: {row['accuracy']:.2%}", flush=True)
            self.run.finish(f"dense {seed}", row)
        return self.weights

    def row(self, seed: int, again: int, sparsity: float, pattern: str, permuted: bool) -> dict:
        """One pruned and fine-tuned network, or what an earlier run found for it."""
        order = "permuted" if permuted else "as it is"
        name = f"{seed} {again} {sparsity} {pattern} {order}"
        if (found := self.run.stage(name)) is not None:
            return found
        model = self.network()
        model.load_state_dict(self.dense(seed))
        start = time.perf_counter()
        report = prune(
            model,
            sparsity,
            pattern=pattern,
            exclude=EXCLUDE,
            permute=permuted,
            example_inputs=torch.zeros(1, *self.data.shape),
        )
        seconds = time.perf_counter() - start
        before = evaluate(model, self.test).accuracy
        done = self.finetune(model, seed + 1000 * again)
        row = {
            "seed": seed,
            "finetune_seed": again,
            "sparsity": sparsity,
            "pattern": pattern,
            "permuted": permuted,
            "density": report.density,
            "kept": report.kept,
            "weights": report.weights,
            "norm_kept": report.norm_kept,
            "accuracy_before": before,
            "accuracy": evaluate(model, self.test).accuracy,
            "test_images": len(self.test),
            "prune_seconds": seconds,
            "finetune_seconds": done.seconds,
        }
        print(
            f"{name}: norm {row['norm_kept']:.2%}, density {row['density']:.4%}, "
            f"accuracy {before:.2%} -> {row['accuracy']:.2%}",
            flush=True,
        )
        return self.run.finish(name, row)

    def finetune(self, model: nn.Module, seed: int) -> TrainResult:
        options = self.options
        config = TrainConfig(epochs=options.finetune_epochs, lr=options.finetune_lr, seed=seed)
        return train(model, self.data.subset(options.finetune_images), config)


def table(rows: list[dict]) -> str:
    """Patterns by sparsity, in percent: norm kept, and accuracy as a mean with its range."""
    sparsities = sorted({row["sparsity"] for row in rows})
    keys = dict.fromkeys((row["pattern"], row["permuted"]) for row in rows)
    header = ["pattern", "channels"]
    for sparsity in sparsities:
        header += [f"{100 * sparsity:g} %: norm kept", "weights kept", "accuracy"]
    lines = []
    for pattern, permuted in keys:
        line = [pattern, "permuted" if permuted else "as they are"]
        for sparsity in sparsities:
            own = [row for row in rows if _key(row) == (pattern, permuted, sparsity)]
            line += [_spread(own, "norm_kept"), _spread(own, "density", 2)]
            line.append(_spread(own, "accuracy"))
        lines.append(line)
    return markdown(header, lines)


def _key(row: dict) -> tuple[str, bool, float]:
    return row["pattern"], row["permuted"], row["sparsity"]


def _spread(rows: list[dict], key: str, digits: int = 1) -> str:
    values = [100 * row[key] for row in rows]
    if not values:
        return ""
    low, mean, high = (
        f"{value:.{digits}f}" for value in (min(values), statistics.mean(values), max(values))
    )
    return f"{mean} ({low}-{high})" if max(values) > min(values) else mean


def differences(rows: list[dict]) -> list[str]:
    """Lines: what permuting adds, same seeds against same seeds, beside what a seed changes."""
    found = {(row["seed"], row["finetune_seed"], *_key(row)): row["accuracy"] for row in rows}
    gains: dict[str, list[float]] = {}
    for key, accuracy in found.items():
        plain = (*key[:3], False, key[4])
        if key[3] and plain in found:
            gains.setdefault(key[2], []).append(100 * (accuracy - found[plain]))
    lines = [
        f"permuted {name}: better in {sum(gain > 0 for gain in own)} of {len(own)} pairs of the "
        f"same seeds, {statistics.mean(own):+.1f} points on average"
        for name, own in [*gains.items(), ("all", [gain for own in gains.values() for gain in own])]
        if own
    ]
    again: dict[tuple, list[float]] = {}
    for (seed, _, *key), accuracy in found.items():
        again.setdefault((seed, *key), []).append(100 * accuracy)
    apart = [max(own) - min(own) for own in again.values() if len(own) > 1]
    if apart:
        lines.append(
            f"fine-tunings of one pruned network: {statistics.median(apart):.1f} points apart "
            f"(median), at most {max(apart):.1f}"
        )
    return lines


def text_of(document: dict) -> str:
    dense = ", ".join(f"{row['accuracy']:.2%}" for row in document["dense"])
    rows = document["rows"]
    return "\n".join([f"dense: {dense}", "", table(rows), "", *differences(rows)])


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.table:
        print(text_of(json.loads(options.table.read_text())))
        return
    experiment = Experiment(options)
    rows = [experiment.row(*key) for key in rows_of(options)]
    document = {
        "facts": machine_facts(),
        "settings": experiment.run.settings,
        "data": describe(experiment.data, experiment.test),
        "dense": [experiment.run.stage(f"dense {seed}") for seed in range(options.seeds)],
        "rows": rows,
    }
    text, file = text_of(document), options.run / "patterns.json"
    write_text(file, json.dumps(document, indent=1) + "\n")
    write_text(file.with_suffix(".md"), text + "\n")
    print(f"\n{text}\n\nwritten: {file}, .md")


def describe(data: ImageDataset, test: ImageDataset) -> dict:
    return {"name": data.name, "train": len(data), "test": len(test), "shape": [*data.shape]}


if __name__ == "__main__":
    main()
