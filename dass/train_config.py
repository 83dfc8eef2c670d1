"""The settings of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["TrainConfig"]


@dataclass(frozen=True)
class TrainConfig:
    """SGD with momentum; the rate rises linearly, then falls along a cosine to 0.

    Args:
        epochs: passes over the training images.
        batch_size: images per step, of all processes together.
        lr: the highest learning rate.
        momentum: of Nesterov's form.
        weight_decay: on weights with two or more dimensions, so not on biases and BatchNorm.
        warmup: share of all steps in which the rate rises, in [0, 1).
        label_smoothing: in [0, 1).
        augment: random crops of padded images, and mirroring where the data allow it.
        resized_crop: the crops are parts of 8 to 100 % of the image, scaled to the data's size.
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
    resized_crop: bool = False
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
