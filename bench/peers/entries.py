"""What runs in the present environment: a row per way to run a pruned network.

An entry is a function ``(model, example) -> call``. model: pruned, in eval mode, its layers as
:func:`dass.prune` left them; example: float32 [B, C, H, W], contiguous. ``call()`` runs the model
on the example and returns its output; it is called in torch.inference_mode, with the threads set.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import dass
from dass.latency import fold_batchnorm

Call = Callable[[], Tensor]


def _eager(model: nn.Module, example: Tensor) -> Call:
    dense = dass.densify(model)
    return lambda: dense(example)


def _channels_last(model: nn.Module, example: Tensor) -> Call:
    dense = dass.densify(model).to(memory_format=torch.channels_last)
    example = example.contiguous(memory_format=torch.channels_last)
    return lambda: dense(example)


def _frozen(model: nn.Module, example: Tensor) -> Call:
    """BatchNorm folded and weights packed for oneDNN."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit announces its end at every call
        traced = torch.jit.freeze(torch.jit.trace(dass.densify(model), example))
        traced = torch.jit.optimize_for_inference(traced)
    return lambda: traced(example)


def _compiled(model: nn.Module, example: Tensor) -> Call:
    """With its weights frozen, so that it, too, folds and packs."""
    compiled = torch.compile(dass.densify(model), options={"freezing": True})
    return lambda: compiled(example)


def _sparsify(model: nn.Module, example: Tensor) -> Call:
    fast, _ = dass.sparsify(model, example, "auto")
    return lambda: fast(example)


def _sparsify_folded(model: nn.Module, example: Tensor) -> Call:
    return _sparsify(fold_batchnorm(dass.densify(model), example), example)


def _engine(model: nn.Module, example: Tensor) -> Call:
    compiled = dass.compile(model, example)
    return lambda: compiled(example)


ENTRIES: dict[str, Callable[[nn.Module, Tensor], Call]] = {
    "torch-eager": _eager,
    "torch-channels-last": _channels_last,
    "torch-frozen": _frozen,
    "torch-compile": _compiled,
    "sparsify": _sparsify,
    "sparsify-folded": _sparsify_folded,
    "dass-compile": _engine,
}
LAYOUTS = {"torch-channels-last": "NHWC"}  # the others: NCHW


def load(name: str, path: str, example: Tensor) -> Call:
    """The call of an entry, for a network of the zoo in a file of :func:`dass.save`."""
    return ENTRIES[name](dass.load(path).eval().requires_grad_(False), example)


def version(name: str) -> str:
    """Of what computes: torch, or this library."""
    return torch.__version__ if name.startswith("torch") else dass.__version__
