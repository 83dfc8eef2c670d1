"""Where a command's network and images come from: a name, a file, a run folder, the user's code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from dass import data, zoo
from dass.convert import densify
from dass.files import load
from dass.genotype import Genotype
from dass.images import ImageDataset
from dass.readers import READERS
from dass.runs import UserError, model_file
from dass.surgery import evaluating

__all__ = [
    "build_network",
    "check_fit",
    "count_weights",
    "first_line",
    "image_shape",
    "input_shape",
    "is_folder",
    "load_data",
    "load_model",
    "plain_bytes",
    "searched_cells",
    "user_model",
]


def load_data(
    where: str,
    *,
    train: bool,
    size: int | None = None,
    limit: int | None = None,
    lazy: bool = False,
) -> ImageDataset:
    """Images by the name of a data set ("auto", "cifar10", "digits", ...) or by a path.

    size, limit, lazy: see :func:`dass.data.load`.

    Raises:
        UserError: neither, or a number out of range. DataError: the images cannot be read.
    """
    if where != "auto" and where not in READERS and not Path(where).expanduser().exists():
        known = ", ".join(("auto", *READERS))
        raise UserError(f"--data {where}: no such path, and no data set; known: {known}")
    named = where == "auto" or where in READERS
    name, root = (where, None) if named else ("auto", where)
    try:
        return data.load(name, root, train=train, size=size, limit=limit, lazy=lazy)
    except data.DataError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None


def is_folder(where: str) -> bool:
    """Whether `load_data` reads this as a folder of pictures by class."""
    if where == "auto" or where in READERS:
        return False
    root = Path(where).expanduser()
    return root.is_dir() and data.detect(root) == "folder"


def build_network(
    name: str, classes: int | None, channels: int, overrides: Mapping, seed: int, device="cpu"
) -> nn.Module:
    """A zoo network from a seed; a wrong name or override is the user's error."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        try:
            return zoo.create(name, classes, in_channels=channels, **overrides)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from None


def searched_cells(network: str) -> tuple[str, dict[str, str]]:
    """("cells", its override) for a folder or file with a genotype; a name of the zoo as it is.

    Raises:
        UserError: a path with no genotype.
    """
    path = Path(network)
    if network in zoo.NETWORKS or not path.exists():
        return network, {}
    file = path / "genotype.json" if path.is_dir() else path
    try:
        return "cells", {"genotype": Genotype.from_json(file).to_json()}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no genotype: {error}") from None


def user_model(name: str) -> nn.Module:
    """What "package.module:function" gives, the current folder being on the path.

    Raises:
        UserError: it cannot be imported or is no module. What the user's code raises comes through.
    """
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{name}: {first_line(error)}") from None
    finally:
        sys.path.remove(here)
    model = found if isinstance(found, nn.Module) else found() if callable(found) else found
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} gives {type(model).__name__}, not a torch.nn.Module")
    return model


def load_model(source: str | os.PathLike, model: str | None = None) -> nn.Module:
    """The network of a run folder or a file of ``dass.save``.

    Args:
        model: "package.module:function" that builds it, for a network that is not of the zoo.
    """
    return load(model_file(source), user_model(model) if model else None)


def input_shape(model: nn.Module) -> tuple[int, ...] | None:
    """(channels, height, width) that a zoo network was designed for; None for others."""
    origin = getattr(model, "_dass_zoo", None)
    if origin is None:
        return None
    channels, *sizes = zoo.input_shape(origin[0])
    return (origin[1].get("in_channels", channels), *sizes)


def image_shape(model: nn.Module, size: int | None = None) -> tuple[int, ...]:
    """`input_shape`, with `size` as height and width if given.

    Raises:
        UserError: no network of the zoo.
    """
    known = input_shape(model)
    if known is None:
        raise UserError("--input is needed, such as --input 3x224x224: no network of the zoo")
    return known if size is None else (known[0], size, size)


def check_fit(model: nn.Module, images: ImageDataset) -> None:
    """Raises UserError unless the network takes the images and has their number of classes."""
    x = images.normalise(images.images[torch.arange(1)])
    logits = run_on(model, x, f"{images.name}'s images")
    if logits.dim() != 2 or logits.size(1) != len(images.classes):
        raise UserError(
            f"the network gives {tuple(logits.shape)[1:]} numbers, {images.name} has "
            f"{len(images.classes)} classes"
        )


def run_on(model: nn.Module, x: Tensor, what: str) -> Tensor:
    """One forward pass in eval mode; an input that does not fit is the user's error."""
    try:
        with evaluating(model), torch.inference_mode():
            return model(x)
    except RuntimeError as error:
        shape, why = "x".join(map(str, x.shape)), first_line(error)
        raise UserError(f"the network does not take {what} ({shape}): {why}") from None


def first_line(error: Exception) -> str:
    """Of its message, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def count_weights(model: nn.Module) -> dict[str, int]:
    """weights and nonzeros of all convolutions and linear layers, biases not counted."""
    tensors = {
        module.weight for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    return {
        "weights": sum(weight.numel() for weight in tensors),
        "nonzeros": sum(int(weight.count_nonzero()) for weight in tensors),
    }


def plain_bytes(model: nn.Module) -> int:
    """Size of the dense twin's state dict as one safetensors file, without dass."""
    state = densify(model).state_dict()
    return len(to_bytes({name: tensor.contiguous().clone() for name, tensor in state.items()}))
