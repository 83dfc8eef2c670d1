"""The CUDA kernels: a library apart from ``_C``, loaded when the first CUDA tensor comes.

    cuda_library.load()      # then torch.ops.dass.* takes CUDA tensors; says why where it cannot

A machine without a GPU never opens it, and a package built without CUDA does not have it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from pathlib import Path

import torch

OLDEST = (8, 0)  # compute capability


def path() -> Path | None:
    """The library's file, or None in a package that was built without CUDA."""
    folder = Path(__file__).resolve().parent
    names = (f"_cuda{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((folder / name for name in names if (folder / name).exists()), None)


def unavailable() -> str | None:
    """Why the CUDA kernels cannot run here, or None if they can."""
    if path() is None:
        return (
            "this dass was built without CUDA: install it from source with DASS_CUDA=1 where nvcc "
            "is found"
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA: install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device: no NVIDIA driver, or no GPU"
    if torch.cuda.get_device_capability() < OLDEST:
        return (
            f"{torch.cuda.get_device_name()} has compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability()))}; 8.0 or newer is needed"
        )
    return None


@functools.cache
def register() -> ctypes.CDLL:
    """Opens the library, which registers its kernels with torch. Needs neither driver nor GPU."""
    file = path()
    if file is None:
        raise RuntimeError(f"dass_kernels: {unavailable()}")
    torch.ops.load_library(str(file))
    library = ctypes.CDLL(str(file))
    library.dass_cuda_archs.restype = ctypes.c_char_p
    return library


@functools.cache
def load() -> None:
    """Makes ``torch.ops.dass.*`` take CUDA tensors; costs nothing from the second call on.

    Raises:
        RuntimeError: the kernels cannot run here; the message says what is missing.
    """
    why = unavailable()
    if why is not None:
        raise RuntimeError(f"dass_kernels cannot run on CUDA: {why}")
    register()


def architectures() -> list[str]:
    """Compute capabilities there is machine code for, as ``["80", "86"]``; [] without CUDA."""
    return register().dass_cuda_archs().decode().split() if path() else []
