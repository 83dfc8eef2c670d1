"""A state dict as tensors that are as small as their nonzeros, and back.

The tensors are stored under their names. Where it is smaller, a tensor holds only its kept
elements, in order, and ``NAME#at`` (or the mask that is stored anyway) says where they go:

    bits      one bit per element, least significant first
    gaps8     zeros before each kept element; 255 stands for 255 zeros and no element
    gaps16    the same in 16 bits, 65535
    all       every element (nothing is stored)
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from dass.nn import SparseConv2d, SparseLinear

_SPARSE = (SparseConv2d, SparseLinear)
_HEADER_COST = 200  # bytes of header that one more tensor takes
_GAPS = {"gaps8": np.uint8, "gaps16": np.uint16}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
    )
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FileError(ValueError):
    """A file that cannot be loaded; the message says why."""


class CorruptFileError(FileError):
    """Truncated, altered, or no file of :func:`save`."""


def encode(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """(what to store, what each tensor of the state dict is)."""
    state = model.state_dict()
    masks = {
        f"{prefix}weight": f"{prefix}mask"
        for prefix, module in prefixes(model)
        if isinstance(module, _SPARSE) and module.scores is None
    }
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict] = {}
    seen: dict[tuple, list[str]] = {}
    supports: dict[str, Tensor] = {}
    for name in sorted(state, key=lambda name: name in masks):  # masks before what they mask
        tensor = state[name]
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is extra state of type {type(tensor).__name__}, not a tensor")
        word = str(tensor.dtype).removeprefix("torch.")
        if word not in DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; known: {', '.join(DTYPES)}")
        entry = {"shape": list(tensor.shape), "dtype": word}
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), word)
        tensor = tensor.detach().cpu()
        mask = supports.get(masks.get(name))
        if tensor.dtype == torch.bool:
            supports[name] = tensor
        twins = seen.setdefault(key, []) if tensor.numel() else []
        same = [twin for twin in twins if _same(mask, supports.get(masks.get(twin)))]
        if same:  # a shared module or a tied weight: stored once
            entries[name] = {**entry, "stored": "as", "of": same[0]}
            continue
        twins.append(name)
        entries[name] = {**entry, **store(tensors, name, tensor.contiguous(), mask)}
        if mask is not None:
            entries[name]["at"] = masks[name]
    return tensors, {name: entries[name] for name in state}


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def prefixes(model: nn.Module):
    for name, module in model.named_modules(remove_duplicate=False):
        yield (f"{name}." if name else ""), module


def store(
    tensors: dict[str, Tensor], name: str, tensor: Tensor, mask: Tensor | None = None
) -> dict:
    """Puts one contiguous tensor into `tensors` in its smallest form, and says which."""
    flat = tensor.reshape(-1)
    if mask is not None:
        tensors[name] = flat[mask.reshape(-1)]
        return {"stored": "kept"}
    # A negative zero is no zero: what counts is the bits.
    kept = flat if tensor.dtype == torch.bool else flat.view(_BITS[tensor.element_size()]) != 0
    form, places = encode_places(kept)
    if tensor.dtype == torch.bool:
        tensors[name] = places
        return {"stored": "places", "form": form}
    smaller = int(kept.sum()) * tensor.element_size() + places.nbytes + _HEADER_COST
    if smaller < 0.9 * tensor.nbytes:
        tensors[name], tensors[f"{name}#at"] = flat[kept], places
        return {"stored": "kept", "at": f"{name}#at", "form": form}
    # safetensors takes no tensors that share memory, as views of one flat buffer do.
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    tensors[name] = tensor if whole else tensor.clone()
    return {"stored": "dense"}


def encode_places(kept: Tensor) -> tuple[str, Tensor]:
    """The smallest form of a flat bool tensor."""
    if bool(kept.all()):
        return "all", torch.empty(0, dtype=torch.uint8)
    forms = place_forms(kept.numpy())
    form = min(forms, key=lambda word: forms[word].nbytes)
    return form, torch.from_numpy(forms[form])


def place_forms(kept: np.ndarray) -> dict[str, np.ndarray]:
    forms = {"bits": np.packbits(kept, bitorder="little")}
    gaps = np.diff(np.flatnonzero(kept), prepend=-1) - 1
    for form, dtype in _GAPS.items():
        escape = np.iinfo(dtype).max
        escapes = gaps // escape
        words = np.full(len(gaps) + int(escapes.sum()), escape, dtype)
        words[np.cumsum(escapes + 1) - 1] = gaps % escape
        forms[form] = words
    return forms


def decode_places(form: str, stored: Tensor, numel: int) -> Tensor:
    """The flat bool tensor; raises CorruptFileError for places outside it."""
    if form == "all":
        return torch.ones(numel, dtype=torch.bool)
    words = stored.numpy()
    if form == "bits":
        if words.dtype != np.uint8 or len(words) != -(-numel // 8):
            raise CorruptFileError("a bit mask of the wrong length")
        return torch.from_numpy(np.unpackbits(words, count=numel, bitorder="little").view(bool))
    if form not in _GAPS or words.dtype != _GAPS[form] or words.ndim != 1:
        raise CorruptFileError(f"unknown form {form!r} of places")
    escape = np.iinfo(words.dtype).max
    ends = words != escape
    places = (np.cumsum(words.astype(np.int64) + ends) - 1)[ends]
    kept = torch.zeros(numel, dtype=torch.bool)
    if len(places):
        if places[-1] >= numel:
            raise CorruptFileError("places outside the tensor")
        kept.numpy()[places] = True
    return kept


def decode(tensors: dict[str, Tensor], entries: dict[str, dict]) -> dict[str, Tensor]:
    """The state dict. Shapes were compared with the model's, so no size is taken on trust."""
    state: dict[str, Tensor] = {}
    rank = {"places": 0, "dense": 2, "kept": 2}  # masks, also shared ones, before what they mask
    for name in sorted(
        entries,
        key=lambda name: rank.get(
            entries[name]["stored"], 1 if entries[name]["dtype"] == "bool" else 3
        ),
    ):
        entry = entries[name]
        shape, stored = entry["shape"], entry["stored"]
        try:
            if stored == "as":
                state[name] = state[entry["of"]]
            elif stored == "dense":
                state[name] = tensors[name]
            elif stored == "places":
                places = decode_places(entry["form"], tensors[name], math.prod(shape))
                state[name] = places.view(shape)
            else:
                kept = state.get(entry["at"])
                if kept is None:
                    at = tensors[entry["at"]]
                    kept = decode_places(entry["form"], at, math.prod(shape))
                flat = torch.zeros(math.prod(shape), dtype=DTYPES[entry["dtype"]])
                flat[kept.reshape(-1)] = tensors[name]
                state[name] = flat.view(shape)
        except (KeyError, RuntimeError, IndexError) as error:
            raise CorruptFileError(f"{name}: its parts do not fit together ({error})") from None
        if list(state[name].shape) != shape or state[name].dtype != DTYPES[entry["dtype"]]:
            raise CorruptFileError(f"{name}: stored with another shape or dtype than stated")
    return {name: state[name] for name in entries}
