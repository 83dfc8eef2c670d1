"""The ops on CUDA tensors: registered here, in Triton, and loaded at the first call.

Triton comes with the CUDA builds of torch and is no requirement of this package. Without it the ops
do not exist for CUDA, and what is built on them runs dense there.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

_NAMES = ("conv2d", "conv2d_dx", "conv2d_dw", "linear", "linear_dx", "linear_dw")
_libraries: list[torch.library.Library] = []  # ops live as long as the object they came with


def _lazy(name: str):
    def op(*args):
        from .triton import ops

        return getattr(ops, name)(*args)

    return op


def register(key: str = "CUDA") -> bool:
    """Puts the Triton kernels behind ``torch.ops.dass`` for a dispatch key.

    Returns:
        Whether they are there: not without triton, and not where a library brought its own.
    """
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if find_spec("triton") is None or has("dass::conv2d", key):
        return False
    library = torch.library.Library("dass", "IMPL")
    for name in _NAMES:
        library.impl(name, _lazy(name), key)
    _libraries.append(library)
    return True


def dense_reason(pattern: Tensor, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a weight is better run dense on a device; None if the sparse kernels are the choice.

    Args:
        pattern: of a packed weight, on any device. dtype: the weight's.
        device: where it is to run. On a CPU the answer is always None: there it is measured.
    """
    if device.type != "cuda":
        return None
    if not torch._C._dispatch_has_kernel_for_dispatch_key("dass::conv2d", "CUDA"):
        return "no sparse kernels for CUDA: triton is not installed"
    if pattern.is_meta or isinstance(pattern, FakeTensor):
        return None  # nothing to look at; the op itself falls back when it runs
    from .triton.heuristics import arch_of, choose
    from .triton.panels import read_rows

    with unset_fake_temporarily():  # a real layer on its way to a fake device
        choice = choose(read_rows(pattern), dtype, arch_of(device))
    return choice.reason if choice.kernel == "dense" else None
