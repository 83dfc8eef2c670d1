"""A plain training loop whose checkpoints let a broken-off run go on bit for bit.

    config = TrainConfig(epochs=10, lr=0.1)
    result = train(model, data, config, test=test, checkpoint=folder / "checkpoint.pt")

A model that has been pruned is trained on its sparse kernels, with its masks enforced.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dass.checkpoints import (
    CheckpointError,
    check_identity,
    deferred_interrupts,
    read_checkpoint,
    save_whole,
)
from dass.data import Augment, Batches, ImageDataset, ResizedCrop
from dass.distributed import (
    average,
    check_equal,
    follow_rank_zero,
    rank_and_world,
    share_model,
    total,
)
from dass.images import generator_for
from dass.nn import SparseConv2d, SparseLinear
from dass.schedule import attach_masks
from dass.train_config import TrainConfig

__all__ = [
    "CheckpointError",
    "Evaluation",
    "Progress",
    "Sparsifier",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "evaluate",
    "train",
]

_FORMAT = 1
_SAVE_EVERY_S = 15.0
MIRRORED_IS_ANOTHER = {"digits"}  # data sets in which a mirror image means something else


class TrainingError(Exception):
    """Training cannot go on: the loss is no longer a number."""


class Sparsifier(Protocol):
    """What changes masks while a model is trained: see :mod:`dass.schedule`, :mod:`dass.rigl`."""

    def forward(self) -> contextlib.AbstractContextManager:
        """Around a step's forward and backward pass."""

    def replaces_step(self) -> bool:
        """Whether this step changes the masks instead of the weights."""

    def step(self) -> object:
        """After the optimiser's step."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


@dataclass(frozen=True)
class Progress:
    """What `on_step` is told after each step. loss: mean over the epoch so far."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class TrainResult:
    """history: one dict per epoch with epoch (from 1), lr, train_loss, train_accuracy, nonzeros (of
    convolutions and linear layers, under their masks), seconds, and test_loss and test_accuracy
    where there was a test set. seconds: of training, over all sittings, without evaluation.
    resumed_at: the step that a checkpoint gave, 0 for a straight run."""

    history: list[dict[str, float]]
    seconds: float
    steps: int
    resumed_at: int


@dataclass(frozen=True)
class Evaluation:
    """Top-1 hits and the mean cross-entropy over all images."""

    correct: int
    images: int
    loss: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.images


def train(
    model: nn.Module,
    data: ImageDataset,
    config: TrainConfig,
    *,
    test: ImageDataset | None = None,
    checkpoint: str | os.PathLike | None = None,
    on_step: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[list[dict[str, float]]], None] | None = None,
    sparsifier: Callable[[nn.Module, torch.optim.Optimizer, int], Sparsifier] | None = None,
) -> TrainResult:
    """Trains `model` in place, on the device where it is.

    In a process group each process takes its share of every batch: gradients are averaged, rank 0's
    masks and statistics hold, and it alone writes the checkpoint, which all must be able to read.
    What is left of an epoch after its last whole batch is then passed over.

    Args:
        model: float32 [B, C, H, W] -> logits. Frozen sparse layers stay at their masks.
        data: training images.
        config: see :class:`TrainConfig`.
        test: evaluated after each epoch and never used for a choice.
        checkpoint: a file to go on from if it exists; written every 15 seconds, after each epoch,
            and on Ctrl-C or SIGTERM before KeyboardInterrupt is raised. A finished one makes the
            call return at once with the trained weights loaded. Written whole or not at all.
        on_step: called after each step.
        on_epoch: called with the history so far at the start and after each epoch.
        sparsifier: (model, optimiser, steps) -> what changes the masks as the training goes on; its
            state is in the checkpoint.

    Raises:
        CheckpointError: the file is damaged, or of another configuration, data set or network.
        TrainingError: the loss became infinite or NaN.
        ValueError: no images, or fewer than processes.
        RanksDiffer: processes drifted apart.
    """
    path = Path(checkpoint) if checkpoint is not None else None
    run = _Run(model, data, config, test, path, sparsifier)
    resumed_at = run.resume()
    with torch.random.fork_rng(devices=[]), deferred_interrupts() as asked:

        def interrupted() -> bool:
            return total([int(asked())])[0] > 0

        if run.random is None:
            torch.manual_seed(config.seed)
        else:
            torch.set_rng_state(run.random)
        if on_epoch:
            on_epoch(run.history)
        while len(run.history) < config.epochs:
            run.epoch(on_step, on_epoch, interrupted)
    model.eval()
    return TrainResult(run.history, run.seconds, run.steps, resumed_at)


@torch.inference_mode()
def evaluate(model: nn.Module, data: ImageDataset, batch_size: int = 250) -> Evaluation:
    """Accuracy and loss of `model` in eval mode; its mode is restored."""
    was_training, device = model.training, _device(model)
    model.eval()
    correct, loss = 0, 0.0
    for x, y in Batches(data, batch_size, shuffle=False):
        logits = model(x.to(device))
        y = y.to(device)
        correct += int((logits.argmax(1) == y).sum())
        loss += F.cross_entropy(logits, y, reduction="sum").item()
    model.train(was_training)
    return Evaluation(correct, len(data), loss / max(len(data), 1))


class _Run:
    """One training run: everything that a checkpoint holds, and how it advances."""

    def __init__(self, model, data, config: TrainConfig, test, checkpoint: Path | None, sparsifier):
        self.rank, self.world = rank_and_world()
        if len(data) < self.world:
            few = f"{len(data)} training images for {self.world} processes"
            raise ValueError(f"{data.name}: {few if len(data) else 'no training images'}")
        share_model(model)
        self.model, self.test, self.config, self.path = model, test, config, checkpoint
        self.device = _device(model)
        sparse = any(isinstance(m, (SparseConv2d, SparseLinear)) for m in model.modules())
        self.format = torch.contiguous_format
        if config.channels_last and not sparse and sparsifier is None:
            self.format = torch.channels_last
        model.to(memory_format=self.format)
        self.optimizer = _optimizer(model, config)
        if sparse:
            attach_masks(self.optimizer, model)
        self.batches = Batches(
            data,
            min(max(config.batch_size // self.world, 1), len(data) // self.world),
            augment=_augment(data, config),
            seed=config.seed,
            drop_last=self.world > 1,
            rank=self.rank,
            world=self.world,
        )
        self.steps = len(self.batches) * config.epochs
        self.sparsifier = sparsifier(model, self.optimizer, self.steps) if sparsifier else None
        self.step, self.seconds, self.random = 0, 0.0, None
        self.history: list[dict[str, float]] = []
        self.sums = {"loss": 0.0, "correct": 0, "images": 0, "seconds": 0.0}  # of this epoch
        self.saved_at = time.monotonic()

    def epoch(self, on_step, on_epoch, interrupted: Callable[[], bool]) -> None:
        """The rest of the epoch that the run is in, then its row of the history."""
        self.model.train()
        if hasattr(self.model, "drop_path_prob"):
            self.model.drop_path_prob = (
                self.config.drop_path * len(self.history) / self.config.epochs
            )
        for x, y in self.batches:
            start = time.perf_counter()
            self._step(x, y)
            self.sums["seconds"] += time.perf_counter() - start
            if on_step:
                on_step(self._progress())
            if interrupted():
                self.save()
                raise KeyboardInterrupt
            if time.monotonic() - self.saved_at > _SAVE_EVERY_S:
                self.save()
        self._close_epoch()
        self.save()
        if on_epoch:
            on_epoch(self.history)
        if interrupted():
            raise KeyboardInterrupt

    def _step(self, x: Tensor, y: Tensor) -> None:
        if self.world > 1:  # dropout differs by rank, and rank 0's checkpoint is enough for all
            torch.manual_seed(
                generator_for("step", self.config.seed, self.step, self.rank).initial_seed()
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.step, self.steps)
        x = x.to(self.device).contiguous(memory_format=self.format)
        y = y.to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with self.sparsifier.forward() if self.sparsifier else contextlib.nullcontext():
            logits, loss = self._loss(x, y)
            hits = int((logits.argmax(1) == y).sum())
            lost, hits, images = total([loss.item() * len(y), hits, len(y)])
            if not math.isfinite(lost):
                raise TrainingError(
                    f"the loss is {lost} at step {self.step + 1} of {self.steps}: "
                    f"try a learning rate below {self.config.lr}"
                )
            loss.backward()
        average([p.grad for p in self.model.parameters() if p.grad is not None])
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        if not (self.sparsifier and self.sparsifier.replaces_step()):
            self.optimizer.step()
        if self.sparsifier:
            self.sparsifier.step()
        self.step += 1
        self.sums["loss"] += lost
        self.sums["correct"] += hits
        self.sums["images"] += images

    def _loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, loss); an auxiliary head's loss counts ``config.auxiliary`` of the main one."""
        smoothing = self.config.label_smoothing
        logits = self.model(x)
        extra = 0.0
        if isinstance(logits, tuple):
            logits, auxiliary = logits
            extra = self.config.auxiliary * F.cross_entropy(auxiliary, y, label_smoothing=smoothing)
        return logits, F.cross_entropy(logits, y, label_smoothing=smoothing) + extra

    def _progress(self) -> Progress:
        images, epochs = self.sums["images"], self.config.epochs
        epoch = min((self.step - 1) // len(self.batches) + 1, epochs)
        loss, accuracy = self.sums["loss"] / images, self.sums["correct"] / images
        return Progress(self.step, self.steps, epoch, epochs, loss, accuracy)

    def _close_epoch(self) -> None:
        sums = self.sums
        masks = [b for b in self.model.buffers() if b.dtype == torch.bool]
        check_equal([*self.model.parameters(), *masks], "weights and masks")
        follow_rank_zero(self.model.buffers())
        row = {
            "epoch": len(self.history) + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": sums["loss"] / sums["images"],
            "train_accuracy": sums["correct"] / sums["images"],
            "nonzeros": _nonzeros(self.model),
            "seconds": sums["seconds"],
        }
        if self.test is not None:
            row |= self._test()
        self.history.append(row)
        self.seconds += sums["seconds"]
        self.sums = {"loss": 0.0, "correct": 0, "images": 0, "seconds": 0.0}

    def _test(self) -> dict[str, float]:
        if self.world == 1:
            found = evaluate(self.model, self.test)
            return {"test_loss": found.loss, "test_accuracy": found.accuracy}
        share = torch.arange(self.rank, len(self.test), self.world)
        found = evaluate(self.model, self.test.take(share))
        loss, hits = total([found.loss * found.images, found.correct])
        return {"test_loss": loss / len(self.test), "test_accuracy": hits / len(self.test)}

    def identity(self) -> dict:
        """What must agree for a checkpoint to be of this run."""
        data = self.batches.data
        return {**asdict(self.config), "data": data.name, "images": len(data)}

    def save(self) -> None:
        if self.path is None or self.rank != 0:
            return
        state = {
            "format": _FORMAT,
            "identity": self.identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
            "history": self.history,
            "sparsifier": self.sparsifier.state_dict() if self.sparsifier else None,
        }
        save_whole(state, self.path)
        self.saved_at = time.monotonic()

    def resume(self) -> int:
        """Takes over the checkpoint if there is one; -> the step it was written at."""
        if self.path is None or not self.path.exists():
            return 0
        state = read_checkpoint(self.path, _FORMAT)
        known = {**asdict(TrainConfig()), **state["identity"]}  # an older file lacks newer settings
        check_identity(self.path, known, self.identity(), "run")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.batches.load_state_dict(state["batches"])
            if self.sparsifier:
                self.sparsifier.load_state_dict(state["sparsifier"])
        except (KeyError, RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise CheckpointError(f"{self.path} is of another network: {first}") from error
        self.step, self.seconds, self.sums = state["step"], state["seconds"], state["sums"]
        self.history, self.random = state["history"], state["random"]
        return self.step


def _augment(data: ImageDataset, config: TrainConfig) -> Augment | None:
    kind = ResizedCrop if config.resized_crop else Augment
    flip = data.name not in MIRRORED_IS_ANOTHER
    return kind(flip=flip, cutout=config.cutout) if config.augment else None


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    nesterov = config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)


@torch.no_grad()
def _nonzeros(model: nn.Module) -> int:
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    sparse = (SparseConv2d, SparseLinear)
    used = {
        layer.weight: layer.masked_weight() if isinstance(layer, sparse) else layer.weight
        for layer in layers
    }
    return sum(int(weight.count_nonzero()) for weight in used.values())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters(), torch.empty(0)).device
