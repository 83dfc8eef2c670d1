"""Models on disk: one safetensors file, as small as its nonzeros, written whole or not at all.

    dass.save(model, "net.safetensors")
    model = dass.load("net.safetensors")

:mod:`dass.encoding` says how a tensor is stored. The header's metadata has the format version, what
each tensor is, which layers are sparse, the arguments of :func:`dass.zoo.create` if the model came
from there, and a SHA-256 over all the file. Nothing is pickled and nothing read is executed.
"""

from __future__ import annotations

import json
import os

import torch
from torch import Tensor, nn

from dass.encoding import DTYPES, CorruptFileError, FileError, decode, encode, prefixes
from dass.masks import parse_pattern
from dass.nn import SparseConv2d, SparseLinear
from dass.sealed import (
    MODEL,
    VersionError,
    read_header,
    read_tensors,
    write_sealed,
)
from dass.surgery import Slots, adopt_hooks, carry_over

__all__ = [
    "CorruptFileError",
    "FileError",
    "MismatchError",
    "VersionError",
    "load",
    "save",
]

_SPARSE = (SparseConv2d, SparseLinear)
_KINDS = {"SparseConv2d": (SparseConv2d, nn.Conv2d), "SparseLinear": (SparseLinear, nn.Linear)}
_KEYS = ("entries", "layers", "zoo", "training")
_STORED = ("dense", "kept", "places", "as")


class MismatchError(FileError):
    """A sound file, but of another model."""


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes a model's state dict, its sparse layers and where it came from to one file.

    The file is written under another name in the same folder, flushed to the disk and renamed: at
    every moment `path` is the old file or the new one, whole. A process that is killed may leave
    ``.NAME.*.tmp`` behind.

    The size is proportional to the nonzeros, of dense layers with many zeros too. Kept weights,
    BatchNorm statistics and all other tensors come back bit for bit; what the weight of a sparse
    layer holds outside its mask comes back as zero.

    Raises:
        ValueError: a tensor of a dtype that has no place in the format, or extra state that is no
            tensor. OSError: the disk is full or not writable; the old file is then untouched.
    """
    tensors, entries = encode(model)
    metadata = {
        "dass.entries": json.dumps(entries),
        "dass.layers": json.dumps(_describe_layers(model)),
        "dass.zoo": _origin(model),
        "dass.training": json.dumps(model.training),
    }
    write_sealed(path, MODEL, tensors, metadata)


def load(path: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """The model of a file of :func:`save`.

    Args:
        path: the file.
        model: a model of the same architecture, changed in place and returned; its layers become
            sparse where the saved ones were. By default the network is built anew, which needs one
            from :func:`dass.zoo.create` that was not changed since but by pruning.

    Raises:
        CorruptFileError, VersionError, MismatchError (all ValueError): before anything of the size
            that the file claims is allocated, and before `model` is changed. OSError: no such file.
    """
    header = _checked_header(path)
    entries, layers = header["entries"], header["layers"]
    rebuilt = model is None
    if rebuilt:
        model = _from_zoo(header["zoo"], entries, layers)
    _match(model, entries, layers, dtypes=not rebuilt)
    state = decode(read_tensors(path), entries)
    model = _with_sparse_layers(model, layers, state)
    if rebuilt:
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(DTYPES[entries[name]["dtype"]])
        model.train(header["training"])
    model.load_state_dict(state)
    for name, facts in layers.items():
        model.get_submodule(name).density = facts["density"]  # as it was, not as it is counted
    return model


def _origin(model: nn.Module) -> str:
    """The name and arguments that dass.zoo.create left on the model, or null."""
    try:
        return json.dumps(getattr(model, "_dass_zoo", None))
    except TypeError:  # an argument that is no JSON: loading will ask for the model
        return "null"


def _describe_layers(model: nn.Module) -> dict[str, dict]:
    return {
        name: {
            "kind": "SparseConv2d" if isinstance(module, SparseConv2d) else "SparseLinear",
            "pattern": module.pattern,
            "density": module.density,
            "learned": module.scores is not None,
        }
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _SPARSE)
    }


def _checked_header(path: str | os.PathLike) -> dict:
    """entries, layers, zoo and training of a file whose every byte is as it was written."""
    metadata = read_header(path, MODEL)
    try:
        found = {key: json.loads(metadata[f"dass.{key}"]) for key in _KEYS}
        _check_form(**found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError(f"{path}: not as dass.save writes it ({error!r})") from None
    return found


def _check_form(entries: dict, layers: dict, zoo: list | None, training: bool) -> None:
    """Raises one of many exceptions unless the header's parts are of the types they should be."""
    for entry in entries.values():
        shape = entry["shape"]
        if entry["stored"] not in _STORED or entry["dtype"] not in DTYPES:
            raise ValueError(f"unknown {entry}")
        if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"shape {shape}")
    for facts in layers.values():
        if facts["kind"] not in _KINDS or not 0 <= facts["density"] <= 1:
            raise ValueError(f"unknown {facts}")
        parse_pattern(facts["pattern"])
        if type(facts["learned"]) is not bool:
            raise ValueError(f"unknown {facts}")
    if zoo is not None:
        name, arguments = zoo
        if type(name) is not str or type(arguments) is not dict:
            raise ValueError(f"origin {zoo}")
    if type(training) is not bool:
        raise ValueError(f"training {training!r}")


def _from_zoo(origin, entries: dict, layers: dict) -> nn.Module:
    if not origin:
        raise MismatchError(
            "the file does not say how to build its model (only for networks of dass.zoo.create): "
            "pass model="
        )
    name, arguments = origin
    from dass import zoo

    try:
        with torch.device("meta"):  # a width from a file is not to be allocated before it is known
            blank = zoo.create(name, **arguments)
        _match(blank, entries, layers, dtypes=False)
        with torch.random.fork_rng(devices=[]):
            return zoo.create(name, **arguments)
    except (ValueError, TypeError) as error:
        raise MismatchError(
            f"not the {name} of this dass.zoo ({error}); if the model was changed after "
            "dass.zoo.create, pass model="
        ) from None


def _match(model: nn.Module, entries: dict, layers: dict, dtypes: bool) -> None:
    """Raises MismatchError unless the file's state dict is one of `model`, its masks aside."""
    state = dict(model.state_dict())
    for prefix, module in prefixes(model):
        for key in ("mask", "scores") if isinstance(module, _SPARSE) else ():
            state.pop(prefix + key, None)
    for name, facts in layers.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise MismatchError(f"the model has no layer {name!r}") from None
        if type(module) not in _KINDS[facts["kind"]]:
            got = type(module).__name__
            raise MismatchError(f"layer {name!r} is a {got}, in the file a {facts['kind']}")
        prefix = f"{name}." if name else ""
        state[prefix + "mask"] = torch.empty_like(module.weight, dtype=torch.bool, device="meta")
        if facts["learned"]:
            state[prefix + "scores"] = module.weight
    if missing := state.keys() - entries.keys():
        raise MismatchError(f"the file lacks {_some(missing)}")
    if extra := entries.keys() - state.keys():
        raise MismatchError(f"the model lacks {_some(extra)}")
    for name, entry in entries.items():
        got, want = tuple(state[name].shape), tuple(entry["shape"])
        if got != want:
            raise MismatchError(f"{name} is {got}, in the file {want}")
        if dtypes and state[name].dtype != DTYPES[entry["dtype"]]:
            raise MismatchError(
                f"{name} is {state[name].dtype}, in the file {entry['dtype']}: convert the model"
            )


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _with_sparse_layers(model: nn.Module, layers: dict, state: dict[str, Tensor]) -> nn.Module:
    """The model with sparse layers where the file has them; others keep their kind.

    Their masks are set at once, so that indices are built once.
    """
    new: dict[nn.Module, nn.Module] = {}
    for name, facts in layers.items():
        module = model.get_submodule(name)
        if not isinstance(module, _SPARSE) and module not in new:
            mask = state[f"{name}.mask" if name else "mask"]
            twin = _KINDS[facts["kind"]][0].from_dense(module, mask)
            new[module] = adopt_hooks(carry_over(module, twin))
    model = Slots(model, list(new)).put(list(new.values()))
    for name, module in model.named_modules():
        if isinstance(module, _SPARSE):
            if name in layers:
                module.pattern = layers[name]["pattern"]
            elif module.scores is not None:
                module.freeze_mask()  # the file has no scores for it
    return model
