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
from dass.data import Augment, Batches, ImageDataset
from dass.nn import SparseConv2d, SparseLinear
from dass.schedule import attach_masks

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


@dataclass(frozen=True)
class TrainConfig:
    """SGD with momentum; the rate rises linearly, then falls along a cosine to 0.

    Args:
        epochs: passes over the training images.
        batch_size: images per step.
        lr: the highest learning rate.
        momentum: of Nesterov's form.
        weight_decay: on weights with two or more dimensions, so not on biases and BatchNorm.
        warmup: share of all steps in which the rate rises, in [0, 1).
        label_smoothing: in [0, 1).
        augment: random crops of padded images, and mirroring where the data allow it.
        cutout: side in pixels of the square that is blanked in each augmented image; 0: none.
        clip: largest norm of all gradients; 0: no limit.
        auxiliary: weight of the loss of an auxiliary head (a model that returns two logits).
        drop_path: what ``model.drop_path_prob`` rises to, linearly by epoch, where there is one.
        channels_last: the memory format of a dense model; a pruned model runs in NCHW.
        seed: of order, augmentation and dropout.

    Raises:
        ValueError: a number out of range.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.2
    label_smoothing: float = 0.0
    augment: bool = True
    cutout: int = 0
    clip: float = 0.0
    auxiliary: float = 0.4
    drop_path: float = 0.0
    channels_last: bool = True
    seed: int = 0

    def __post_init__(self):
        for name, good, needs in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", self.lr > 0, "greater than 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("warmup", 0 <= self.warmup < 1, "in [0, 1)"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("cutout", self.cutout >= 0, "at least 0"),
            ("clip", self.clip >= 0, "at least 0"),
            ("auxiliary", self.auxiliary >= 0, "at least 0"),
            ("drop_path", 0 <= self.drop_path < 1, "in [0, 1)"),
        ):
            if not good:
                raise ValueError(f"{name} must be {needs}, got {getattr(self, name)}")

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of step 0 .. steps - 1."""
        rise = self.warmup * steps
        if step < rise:
            return self.lr * (step + 1) / (rise + 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


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
    """history: one dict per epoch with epoch (from 1), lr, train_loss, train_accuracy, seconds, and
    test_loss and test_accuracy where there was a test set. seconds: of training, over all sittings,
    without evaluation. resumed_at: the step that a checkpoint gave, 0 for a straight run."""

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
    sparsifier: Callable[[nn.Module, torch.optim.Optimizer, int], Sparsifier] | None = None,
) -> TrainResult:
    """Trains `model` in place, on the device where it is.

    Args:
        model: float32 [B, C, H, W] -> logits. Frozen sparse layers stay at their masks.
        data: training images.
        config: see :class:`TrainConfig`.
        test: evaluated after each epoch and never used for a choice.
        checkpoint: a file to go on from if it exists; written every 15 seconds, after each epoch,
            and on Ctrl-C or SIGTERM before KeyboardInterrupt is raised. A finished one makes the
            call return at once with the trained weights loaded. Written whole or not at all.
        on_step: called after each step.
        sparsifier: (model, optimiser, steps) -> what changes the masks as the training goes on; its
            state is in the checkpoint.

    Raises:
        CheckpointError: the file is damaged, or of another configuration, data set or network.
        TrainingError: the loss became infinite or NaN.
        ValueError: fewer images than classes of the model, or no images.
    """
    path = Path(checkpoint) if checkpoint is not None else None
    run = _Run(model, data, config, test, path, sparsifier)
    resumed_at = run.resume()
    with torch.random.fork_rng(devices=[]), deferred_interrupts() as interrupted:
        if run.random is None:
            torch.manual_seed(config.seed)
        else:
            torch.set_rng_state(run.random)
        while len(run.history) < config.epochs:
            run.epoch(on_step, interrupted)
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
        if len(data) == 0:
            raise ValueError(f"{data.name}: no training images")
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
        flip = data.name not in MIRRORED_IS_ANOTHER
        augment = Augment(flip=flip, cutout=config.cutout) if config.augment else None
        self.batches = Batches(data, config.batch_size, augment=augment, seed=config.seed)
        self.steps = len(self.batches) * config.epochs
        self.sparsifier = sparsifier(model, self.optimizer, self.steps) if sparsifier else None
        self.step, self.seconds, self.random = 0, 0.0, None
        self.history: list[dict[str, float]] = []
        self.sums = {"loss": 0.0, "correct": 0, "images": 0, "seconds": 0.0}  # of this epoch
        self.saved_at = time.monotonic()

    def epoch(self, on_step, interrupted: Callable[[], bool]) -> None:
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
        if interrupted():
            raise KeyboardInterrupt

    def _step(self, x: Tensor, y: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.step, self.steps)
        x = x.to(self.device).contiguous(memory_format=self.format)
        y = y.to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with self.sparsifier.forward() if self.sparsifier else contextlib.nullcontext():
            logits, loss = self._loss(x, y)
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss is {value} at step {self.step + 1} of {self.steps}: "
                    f"try a learning rate below {self.config.lr}"
                )
            loss.backward()
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        if not (self.sparsifier and self.sparsifier.replaces_step()):
            self.optimizer.step()
        if self.sparsifier:
            self.sparsifier.step()
        self.step += 1
        self.sums["loss"] += value * len(y)
        self.sums["correct"] += int((logits.argmax(1) == y).sum())
        self.sums["images"] += len(y)

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
        row = {
            "epoch": len(self.history) + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": sums["loss"] / sums["images"],
            "train_accuracy": sums["correct"] / sums["images"],
            "seconds": sums["seconds"],
        }
        if self.test is not None:
            found = evaluate(self.model, self.test)
            row |= {"test_loss": found.loss, "test_accuracy": found.accuracy}
        self.history.append(row)
        self.seconds += sums["seconds"]
        self.sums = {"loss": 0.0, "correct": 0, "images": 0, "seconds": 0.0}

    def identity(self) -> dict:
        """What must agree for a checkpoint to be of this run."""
        data = self.batches.data
        return {**asdict(self.config), "data": data.name, "images": len(data)}

    def save(self) -> None:
        if self.path is None:
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
        check_identity(self.path, state["identity"], self.identity(), "run")
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


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    nesterov = config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters(), torch.empty(0)).device
