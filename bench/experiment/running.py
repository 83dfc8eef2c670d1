"""One row: its search if it has one, the three trainings, and its file of results.

runs/pretrain-NETWORK-HASH-SEED/    dense training, shared by all rows of that network and seed
runs/SYSTEM-SPARSITY-SEED/          masks and fine-tuning; final.safetensors is the network
runs/search-SYSTEM-SPARSITY/        a search

A run that is broken off, even killed, goes on from its last checkpoint, at most 15 seconds and one
epoch back, and ends with the same bits.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from bench.experiment.clock import Clock
from bench.experiment.counting import count
from bench.experiment.falling import falling
from bench.experiment.protocol import Protocol
from bench.experiment.rows import Row, read, write
from bench.experiment.sizing import Sized, layers_of, size_of
from dass.display import Display, Tell
from dass.files import load, save
from dass.genotype import Genotype
from dass.images import ImageDataset
from dass.methods import Stage, run_stage, stages_of
from dass.runs import RunFolder
from dass.search_run import searched
from dass.sources import build_network
from dass.timing import machine_facts
from dass.training import Progress, evaluate

__all__ = ["FACTS", "TABLE", "Blocked", "is_trained", "run_row", "trained"]

FACTS = (
    "cpu",
    "system",
    "python",
    "torch",
    "torch_threads",
    "torch_capability",
    "dass",
    "dass_isa",
)
TABLE = "latency-table.json"  # in the folder of runs: times for a search that prices them
_FINAL = "final.safetensors"


class Blocked(Exception):
    """A row that needs something that only another step gives."""


def run_row(row: Row, protocol: Protocol, runs: Path, results: Path, console) -> dict:
    """Runs what is missing of a row, and writes its file of results.

    Raises:
        Blocked: its search needs the table of times first. KeyboardInterrupt: everything is kept.
    """
    training, held_out = protocol.training()
    genotype = None
    if row.system.search:
        found = read(row.search_file(results)) or _search(
            row, protocol, training, runs, results, console
        )
        genotype = Genotype.from_json(found["genotype"])
    sized = size_of(row.system, protocol, row.sparsity, genotype)
    training_of = _Training(row, protocol, sized, runs, training, held_out)
    with Display({name: 1.0 for name in ("pretrain", "prune", "finetune")}, console) as display:
        result = training_of.run(display)
    return write(row.file(results), result)


def trained(row: Row, runs: Path) -> nn.Module:
    """The network of a finished row, in eval mode.

    Raises:
        FileNotFoundError: it was trained in another folder, or not at all.
    """
    return load(runs / row.label / _FINAL).eval()


def is_trained(row: Row, runs: Path) -> bool:
    """Whether the network of a row is in a folder of runs."""
    return (runs / row.label / _FINAL).exists()


class _Training:
    """HYDRA's stages for one row."""

    def __init__(self, row: Row, protocol: Protocol, sized: Sized, runs: Path, training, held_out):
        self.row, self.protocol, self.sized = row, protocol, sized
        self.training, self.held_out = training, held_out
        densities = sized.densities(layers_of(sized.network, sized.overrides))
        recipe = protocol.recipe(row.seed)
        self.stages = falling(stages_of("hydra", recipe, row.sparsity, densities=densities))
        settings = {"network": sized.network, **sized.overrides, "seed": row.seed}
        settings |= {key: asdict(protocol)[key] for key in _DENSE_SETTINGS}
        settings |= {"epochs": protocol.epochs[0], "lr": protocol.lr[0]}
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        name = f"pretrain-{sized.network}-{key}-{row.seed}"
        self.dense = RunFolder(runs / name, settings)
        kept = {"kept": sized.kept, "dense": name, **row.__dict__}
        self.sparse = RunFolder(runs / row.label, {**kept, "protocol": protocol.to_dict()})

    def run(self, display: Display) -> dict:
        row, sized = self.row, self.sized
        model, stages = self._untrained(), []
        for stage in self.stages:
            run = self.dense if stage.name == "pretrain" else self.sparse
            model, result = self._stage(model, stage, run, display)
            stages.append(result)
        save(model, self.sparse.path / _FINAL)
        counts = count(model, self.training.shape)
        if counts["nonzeros"] != sum(sized.kept.values()):
            raise RuntimeError(f"{row.label}: {counts['nonzeros']} nonzeros, not as allotted")
        facts = machine_facts()
        return {
            "system": row.name,
            "sparsity": row.sparsity,
            "seed": row.seed,
            "network": sized.network,
            "overrides": sized.overrides,
            "held_out_accuracy": stages[-1]["held_out_accuracy"],
            "held_out_images": len(self.held_out),
            **counts,
            "stages": stages,
            "cpu_seconds": sum(stage["cpu_seconds"] for stage in stages),
            "weights_sha256": fingerprint(model),
            "protocol": self.protocol.to_dict(),
            "machine": {key: facts[key] for key in FACTS},
            "date": today(),
        }

    def _untrained(self) -> nn.Module:
        images, sized = self.training, self.sized
        classes, channels = len(images.classes), images.shape[0]
        return build_network(sized.network, classes, channels, sized.overrides, self.row.seed)

    def _stage(
        self, model: nn.Module, stage: Stage, run: RunFolder, display: Display
    ) -> tuple[nn.Module, dict]:
        """The network after a stage, as its file gives it back, and what to tell of the stage."""
        file = run.path / f"{stage.name}.safetensors"
        result = run.stage(stage.name)
        if result is None:
            clock = Clock(run.path)
            done = [run.stage(other.name) for other in self.stages]
            before = sum(other["cpu_seconds"] for other in done if other is not None)
            with display.stage(stage.name) as tell:
                history = self._train(model, stage, run.path / f"{stage.name}.pt", tell, clock)
            model.to(memory_format=torch.contiguous_format)
            save(model, file)
            held_out = evaluate(model, self.held_out)
            result = {
                "stage": stage.name,
                "epochs": stage.config.epochs,
                "train_loss": [round(epoch["train_loss"], 4) for epoch in history],
                "train_accuracy": history[-1]["train_accuracy"],
                "held_out_accuracy": held_out.accuracy,
                "held_out_loss": held_out.loss,
                "cpu_seconds": clock.note() - before,
            }
            result = run.finish(stage.name, result)
            run.drop_checkpoints()
            display.say(
                f"  {self.row.label} {stage.name}: {result['held_out_accuracy']:.2%} held out, "
                f"{result['cpu_seconds']:.0f} s"
            )
        else:
            display.skip(stage.name)
        # Into a new network: one that was trained keeps strides of channels-last in its 1x1 layers,
        # and then rounds differently from one that comes from the file after a break.
        return load(file, self._untrained()), result

    def _train(self, model, stage: Stage, checkpoint: Path, tell: Tell, clock: Clock) -> list[dict]:
        def on_step(p: Progress) -> None:
            note = f"{self.row.label}, epoch {p.epoch}/{p.epochs}, loss {p.loss:.3f}"
            tell(p.step / p.steps, note)

        done = run_stage(
            model,
            stage,
            self.training,
            checkpoint=checkpoint,
            on_step=on_step,
            on_epoch=clock.on_epoch,
        )
        return done.history


# What of the protocol decides the dense training, beside its epochs and its learning rate.
_DENSE_SETTINGS = (
    "data",
    "size",
    "images",
    "held_out",
    "split_seed",
    "batch_size",
    "weight_decay",
    "clip",
    "warmup",
)


def _search(
    row: Row, protocol: Protocol, training: ImageDataset, runs: Path, results: Path, console
) -> dict:
    kind, table = row.system.search, runs / TABLE
    if kind == "time" and not table.exists():
        raise Blocked("first `python -m bench.experiment latency --table`, on a quiet machine")
    config = protocol.search(kind, row.sparsity, str(table) if kind == "time" else None)
    settings = {**asdict(config), "latency_table": kind == "time", "images": len(training)}
    run = RunFolder(runs / f"search-{row.search_label}", settings)
    clock = Clock(run.path)
    with Display({"search": 1.0}, console) as display, display.stage("search") as tell:
        found = searched(config, training, run.path / "search.pt", tell, clock.on_epoch)
        last = found["history"][-1]
        display.say(f"  {row.search_label} searched: {last['entropy']:.3f} nats of the alphas")
    facts = machine_facts()
    result = {
        "system": row.name,
        "sparsity": row.sparsity,
        "genotype": found["genotype"],
        "history": [_told(epoch) for epoch in found["history"]],
        "cpu_seconds": clock.note(),
        "config": settings,
        "machine": {key: facts[key] for key in FACTS},
        "date": today(),
    }
    return write(row.search_file(results), result)


def _told(epoch: dict) -> dict:
    keys = ("phase", "train_loss", "val_loss", "entropy", "eigenvalue", "expected_cost", "signs")
    return {key: epoch[key] for key in keys}


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
