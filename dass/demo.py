"""``dass demo``: train, prune, fine-tune and time a small ResNet-18 on real images, with a report.

Each stage leaves its result in the run folder, so that a run that was broken off goes on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from dass.convert import densify, sparsify
from dass.data import Batches, ImageDataset
from dass.display import Display, Tell
from dass.files import load, save
from dass.genotype import Genotype
from dass.images import resize
from dass.latency import (
    TOLERANCE,
    compare_layers,
    compare_logits,
    compare_networks,
    compare_steps,
    fold_batchnorm,
)
from dass.pruning import prune
from dass.runs import RunFolder, UserError
from dass.search_run import searched
from dass.sources import build_network, count_weights, load_data, plain_bytes
from dass.strategies import preset
from dass.timing import machine_facts, threads
from dass.training import Progress, TrainConfig, evaluate, train

__all__ = ["QUICK", "DemoSettings", "run_demo"]

EXCLUDE = ("first", "last")
EXCLUDE_UNTRAINED = ("first", "depthwise")
_THREAD_ROUNDS = 3
_CURVE_IMAGES = 1000  # of the test set, after each epoch
_MACHINE = ("cpu", "torch", "torch_capability", "dass", "dass_isa")  # what times depend on


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does; a run folder belongs to one of these.

    Args:
        data: a data set's name or a path, as ``dass train --data`` takes it.
        images: of the training set, at most.
        width: of ResNet-18 (64, 128, 256, 512 channels at 1).
        epochs, finetune_epochs: of dense training, and after each pruning.
        lr, finetune_lr: highest learning rates.
        sparsities: ascending; each network is pruned further from the one before.
        batches: batch sizes of the latencies of the trained network.
        networks: untrained networks to time at ``size`` pixels, each with its batch sizes.
        seconds, layer_seconds: least time per function in whole networks and in layers.
        choose_seconds: that ``sparsify`` spends per layer.
        rounds: in which rivals are timed in turn.
        threads: of training; None: one or all, whichever is faster. Latencies are of one thread.
        search: changes to the preset "smoke" of the search (:mod:`dass.strategies`).
    """

    data: str = "auto"
    images: int = 20_000
    width: float = 0.25
    epochs: int = 5
    finetune_epochs: int = 2
    lr: float = 0.1
    finetune_lr: float = 0.05
    sparsities: tuple[float, ...] = (0.9, 0.95)
    batches: tuple[int, ...] = (1, 16)
    networks: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("mobilenet_v2_imagenet", (1, 16)),
        ("resnet18_imagenet", (1, 4)),  # 16 images take minutes
    )
    size: int = 224
    seconds: float = 0.3
    layer_seconds: float = 0.05
    choose_seconds: float = 0.02
    rounds: int = 7
    threads: int | None = None
    search: Mapping[str, object] = field(default_factory=dict)
    seed: int = 0


QUICK = DemoSettings(
    search={"layers": 1, "limit": 128, "epochs": (1, 1, 1)},
    images=600,
    width=0.125,
    epochs=8,
    finetune_epochs=4,
    batches=(1, 4),
    networks=(("resnet20", (1,)),),
    size=32,
    seconds=0.02,
    layer_seconds=0.004,
    choose_seconds=0.002,
    rounds=3,
)


def run_demo(
    settings: DemoSettings, folder: Path, console: Console, *, fresh: bool = False
) -> dict:
    """Runs what is not done yet; -> the results of all stages, for :mod:`dass.demo_report`.

    Raises:
        UserError: the folder is of another run. DataError: no images.
        KeyboardInterrupt: after what was done has been saved.
    """
    run = RunFolder(folder, asdict(settings), fresh)
    demo = _Demo(settings, run)
    stages = demo.stages()
    done = {name: run.stage(name, demo.facts) for name in stages}
    ready = [name for name, result in done.items() if result is not None]
    if ready:
        console.print(f"going on in {folder}: {len(ready)} of {len(stages)} stages are done")
    elif run.unfinished():
        console.print(f"going on in {folder} in the middle of a stage")
    with Display({name: stage.about_s for name, stage in stages.items()}, console) as display:
        for name, stage in stages.items():
            if done[name] is not None:
                display.skip(name)
                continue
            start = time.perf_counter()
            with display.stage(name) as tell, threads(demo.count):
                result = stage.run(tell)
            took = time.perf_counter() - start
            result["seconds"] = max(took, result.get("seconds", 0.0))  # training: of all sittings
            done[name] = run.finish(name, result, demo.facts if stage.measures else None)
            run.drop_checkpoints()
            display.say(f"  {name}: {stage.line(done[name])}")
    return {
        "settings": run.settings,
        "machine": demo.machine,
        "stages": done,
        "kinds": {name: stage.kind for name, stage in stages.items()},
    }


@dataclass(frozen=True)
class _Stage:
    """run: tell -> result. measures: whether the result is of this machine only."""

    kind: str
    run: Callable[[Tell], dict]
    line: Callable[[Mapping], str]
    about_s: float
    measures: bool = False


class _Demo:
    """The stages, and what they share."""

    def __init__(self, settings: DemoSettings, run: RunFolder):
        self.settings, self.run = settings, run
        self.most = settings.threads or torch.get_num_threads()
        self.machine = machine_facts()
        self.facts = {key: self.machine[key] for key in _MACHINE}

    @property
    def count(self) -> int:
        """Threads to train with."""
        found = self.run.stage("threads", self.facts)
        return found["threads"] if found else self.most

    @cached_property
    def train_data(self) -> ImageDataset:
        data = load_data(self.settings.data, train=True, size=32, limit=self.settings.images)
        begun = self.run.stage("train")
        if begun and begun["data"] != data.name:
            raise UserError(
                f"{self.run.path} was begun on {begun['data']}, and now there is {data.name}: "
                f"--fresh starts over, --data {begun['data']} --run NAME takes the old images"
            )
        return data

    @cached_property
    def test_data(self) -> ImageDataset:
        return load_data(self.settings.data, train=False, size=32)

    def stages(self) -> dict[str, _Stage]:
        """In order; names are shown and are the names of the result files."""
        s = self.settings
        labels = [label_of(sparsity) for sparsity in s.sparsities]
        found = {}
        if s.threads is None and self.most > 1:
            found["threads"] = _Stage("threads", self.choose_threads, _threads_line, 2, True)
        found["train"] = _Stage("train", self.train_dense, _accuracy_line, 90)
        for sparsity, label in zip(s.sparsities, labels, strict=True):
            found[f"prune to {label}"] = _Stage(
                "prune", lambda tell, p=sparsity: self.prune(p, tell), _accuracy_line, 45
            )
        found["search"] = _Stage("search", self.search, _search_line, 60)
        found["compare results"] = _Stage("check", self.check, _check_line, 20, True)
        found["fine-tuning step"] = _Stage("steps", self.steps, _steps_line, 10, True)
        for batch in s.batches:
            found[f"ResNet-18, batch {batch}"] = _Stage(
                "trained", lambda tell, b=batch: self.trained(b, tell), _network_line, 12, True
            )
        for name, batches in s.networks:
            for batch in batches:
                found[f"{TITLES.get(name, name)} at {s.size}, batch {batch}"] = _Stage(
                    "untrained",
                    lambda tell, n=name, b=batch: self.untrained(n, b, tell),
                    _network_line,
                    15 + 2 * batch,
                    True,
                )
        return found

    def config(self, epochs: int, lr: float) -> TrainConfig:
        """More epochs where there are fewer images than asked for: up to four times as many."""
        more = min(4.0, max(1.0, self.settings.images / len(self.train_data)))
        return TrainConfig(epochs=round(more * epochs), lr=lr, seed=self.settings.seed)

    def file(self, sparsity: float) -> Path:
        name = f"sparse-{label_of(sparsity)}" if sparsity else "dense"
        return self.run.path / f"{name.replace(' %', '')}.safetensors"

    def network(self) -> nn.Module:
        data, width = self.train_data, {"width": self.settings.width}
        classes, channels = len(data.classes), data.shape[0]
        return build_network("resnet18", classes, channels, width, self.settings.seed)

    def choose_threads(self, tell: Tell) -> dict:
        """One or all of them: on a busy machine all are slower, since each waits for the last."""
        model = self.network().to(memory_format=torch.channels_last)
        x, y = next(iter(Batches(self.train_data, TrainConfig().batch_size)))
        x = x.contiguous(memory_format=torch.channels_last)
        taken: dict[int, list[float]] = {self.most: [], 1: []}
        for _ in range(_THREAD_ROUNDS):
            for count, seconds in taken.items():
                with threads(count):
                    start = time.perf_counter()
                    F.cross_entropy(model(x), y).backward()
                    seconds.append(time.perf_counter() - start)
        step_ms = {count: 1e3 * statistics.median(seconds) for count, seconds in taken.items()}
        return {"threads": min(step_ms, key=step_ms.get), "step_ms": step_ms}

    def search(self, tell: Tell) -> dict:
        """A small search: it shows the way, not a good architecture."""
        s = self.settings
        config = preset("smoke", dataset=s.data, seed=s.seed, **s.search)
        data = self.train_data.subset(min(config.limit, len(self.train_data)))
        data = replace(data, images=resize(data.images, config.size))
        return searched(config, data, self.run.path / "search.pt", tell)

    def train_dense(self, tell: Tell) -> dict:
        model = self.network()
        return self._train(model, self.config(self.settings.epochs, self.settings.lr), 0.0, tell)

    def prune(self, sparsity: float, tell: Tell) -> dict:
        below = [p for p in self.settings.sparsities if p < sparsity]
        model = load(self.file(below[-1] if below else 0.0))
        report = prune(model, sparsity, exclude=EXCLUDE)
        before = evaluate(model, self.test_data.subset(_CURVE_IMAGES)).accuracy
        s = self.settings
        config = self.config(s.finetune_epochs, s.finetune_lr)
        result = self._train(model, config, sparsity, tell)
        return {**result, "before_finetuning": before, "pruning": report.to_dict()}

    def _train(self, model: nn.Module, config: TrainConfig, sparsity: float, tell: Tell) -> dict:
        def on_step(p: Progress) -> None:
            words = f"epoch {p.epoch} of {p.epochs}, loss {p.loss:.3f}, {p.accuracy:.1%}"
            tell(p.step / p.steps * 0.95, words)

        path = self.file(sparsity)
        checkpoint = path.with_suffix(".pt")
        few = self.test_data.subset(_CURVE_IMAGES)
        done = train(
            model, self.train_data, config, test=few, checkpoint=checkpoint, on_step=on_step
        )
        tell(0.95, "accuracy on the whole test set")
        accuracy = evaluate(model, self.test_data).accuracy
        model.to(memory_format=torch.contiguous_format)
        save(model, path)
        return {
            "data": self.train_data.name,
            "images": len(self.train_data),
            "test_images": len(self.test_data),
            "threads": self.count,
            "epochs": config.epochs,
            "history": done.history,
            "seconds": done.seconds,
            "accuracy": accuracy,
            "file_bytes": path.stat().st_size,
            "dense_bytes": plain_bytes(model),
            **count_weights(model),
        }

    def check(self, tell: Tell) -> dict:
        """Pruned networks run dense by torch, and run sparse: logits on the whole test set."""
        rows = {}
        batch = self.settings.batches[-1]
        example = next(iter(Batches(self.test_data, batch, shuffle=False)))[0]
        for i, sparsity in enumerate(self.settings.sparsities):
            tell(i / len(self.settings.sparsities), f"{label_of(sparsity)}")
            plain = densify(load(self.file(sparsity))).eval()
            folded = fold_batchnorm(plain, example)
            seconds = self.settings.choose_seconds
            chosen, report = sparsify(folded, example, seconds=seconds, num_threads=self.count)
            always, _ = sparsify(folded, None, policy="always")
            rows[label_of(sparsity)] = {
                **compare_logits(plain, {"auto": chosen, "always": always}, self.test_data),
                "sparse_layers": sum(row.chosen == "sparse" for row in report.layers),
                "layers": len(report.layers),
            }
        return {"rows": rows, "tolerance": TOLERANCE}

    def steps(self, tell: Tell) -> dict:
        x, y = next(iter(Batches(self.train_data, TrainConfig().batch_size)))
        rows = {}
        for i, sparsity in enumerate(self.settings.sparsities):
            tell(i / len(self.settings.sparsities), label_of(sparsity))
            model = load(self.file(sparsity))
            s = self.settings
            rows[label_of(sparsity)] = compare_steps(
                model, x, y, seconds=3 * s.seconds, rounds=s.rounds, num_threads=self.count
            )
        return {"rows": rows}

    def trained(self, batch: int, tell: Tell) -> dict:
        dense = load(self.file(0.0)).eval()
        rivals = {label_of(p): load(self.file(p)).eval() for p in self.settings.sparsities}
        x = next(iter(Batches(self.test_data, batch, shuffle=False)))[0]
        return self._latencies(dense, rivals, x, tell)

    def untrained(self, name: str, batch: int, tell: Tell) -> dict:
        def create(sparsity: float) -> nn.Module:
            model = build_network(name, None, 3, {}, self.settings.seed).eval()
            if sparsity:
                prune(model, sparsity, exclude=EXCLUDE_UNTRAINED)
            return model

        generator = torch.Generator().manual_seed(self.settings.seed)
        size = self.settings.size
        x = torch.randn(batch, 3, size, size, generator=generator)
        rivals = {label_of(p): create(p) for p in self.settings.sparsities}
        # A large batch takes so long that few rounds must do, and its layers are left out.
        large = batch > 1 and size > 100
        return self._latencies(create(0.0), rivals, x, tell, large)

    def _latencies(
        self, dense: nn.Module, rivals: dict[str, nn.Module], x, tell: Tell, large: bool = False
    ) -> dict:
        s = self.settings
        tell(0.0, "whole network")
        rounds = min(3, s.rounds) if large else s.rounds
        network = compare_networks(
            dense, rivals, x, seconds=s.seconds, rounds=rounds, layer_seconds=s.choose_seconds
        )
        if large:
            return {"network": network}

        def on_row(i: int, count: int, name: str) -> None:
            tell(0.6 + 0.4 * i / count, f"layer {name}")

        rows = compare_layers(
            dense, rivals, x, seconds=s.layer_seconds, rounds=s.rounds, on_row=on_row
        )
        return {"network": network, "layers": rows}


TITLES = {
    "mobilenet_v2_imagenet": "MobileNet-v2",
    "resnet18_imagenet": "ResNet-18",
}


def label_of(sparsity: float) -> str:
    """0.9 -> "90 %"."""
    return f"{100 * sparsity:.4g} %"


def _threads_line(result: Mapping) -> str:
    taken = ", ".join(f"{ms:.0f} ms with {count}" for count, ms in result["step_ms"].items())
    return f"a training step takes {taken}: training with {result['threads']}"


def _accuracy_line(result: Mapping) -> str:
    return f"{result['accuracy']:.1%} of {result['test_images']:,} test images right"


def _check_line(result: Mapping) -> str:
    worst = max(error for row in result["rows"].values() for error in row["error"].values())
    return f"logits run sparse and run dense differ by {worst:.1e} at most"


def _steps_line(result: Mapping) -> str:
    rows = result["rows"].items()
    return ", ".join(f"{label} {row['sparse']['sparse']['speedup']:.2f}x" for label, row in rows)


def _search_line(result: Mapping) -> str:
    skips = Genotype.from_json(result["genotype"]).skips()
    return f"two cells in {result['seconds']:.0f} s, {sum(skips.values())} of 16 edges are skips"


def _network_line(result: Mapping) -> str:
    sparse = result["network"]["sparse"].items()
    return ", ".join(f"{label} {row['speedup']:.2f}x" for label, row in sparse)
