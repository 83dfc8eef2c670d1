"""Checks what the command line was given; what is wrong is named by its option."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from dass.runs import UserError
from dass.strategies import SearchConfig, preset
from dass.training import TrainConfig

T = TypeVar("T")


def config(**values) -> TrainConfig:
    """A TrainConfig."""
    try:
        return TrainConfig(**values)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from None


def search(name: str = "affordable", **changes) -> SearchConfig:
    """A preset's SearchConfig with some changed."""
    try:
        return preset(name, **changes)
    except ValueError as error:
        raise UserError(str(error)) from None


def densities(text: str | None) -> tuple[float, ...] | None:
    """ "1,0.1" -> (1.0, 0.1)."""
    if text is None:
        return None
    return _parse(text, "--densities", float, lambda d: 0 < d <= 1, "numbers in (0, 1]")


def epochs(text: str | None) -> tuple[int, ...] | None:
    """ "50,20,50" -> (50, 20, 50)."""
    if text is None:
        return None
    return _parse(text, "--epochs", int, lambda n: n >= 0, "whole numbers, such as 50,20,50")


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Joins the processes that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def at_least_one(count: int | None) -> int | None:
    """Of threads."""
    if count is not None and count < 1:
        raise UserError(f"--threads must be at least 1, got {count}")
    return count


def numbers(text: str, option: str) -> tuple[int, ...]:
    """ "1,16" -> (1, 16)."""
    return _parse(text, option, int, lambda n: n >= 1, "whole numbers of at least 1, such as 1,16")


def shares(text: str, option: str) -> tuple[float, ...]:
    """ "0.9,0.95" -> (0.9, 0.95)."""
    return _parse(text, option, float, lambda s: 0 < s < 1, "numbers in (0, 1), such as 0.9,0.95")


def shape(text: str | None) -> tuple[int, ...] | None:
    """ "3x224x224" -> (3, 224, 224)."""
    if text is None:
        return None
    commas = text.lower().replace("x", ",")
    return _parse(commas, "--input", int, lambda n: n >= 1, "sizes such as 3x224x224")


def _parse(
    text: str, option: str, kind: Callable[[str], T], good: Callable[[T], bool], needs: str
) -> tuple[T, ...]:
    try:
        values = tuple(kind(part) for part in text.split(","))
        if all(good(value) for value in values):
            return values
    except ValueError:
        pass
    raise UserError(f"{option} must be {needs}, got {text!r}")
