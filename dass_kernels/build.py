"""What was built, and which instruction set is in use."""

from __future__ import annotations

from . import _C, cuda_library


def available_isas() -> list[str]:
    """Instruction sets this machine can run, best first, e.g. ``["avx512", "avx2", "scalar"]``."""
    return _C.available_isas()


def active_isa() -> str:
    """The instruction set in use: the best available, or the environment's ``DASS_ISA``."""
    return _C.active_isa()


def set_isa(name: str) -> None:
    """Uses the kernels of one instruction set from now on, in every thread.

    Raises:
        ValueError: the name is unknown or this machine cannot run it.
    """
    _C.set_isa(name)


def build_info() -> dict:
    """Version, instruction sets, CUDA architectures and the torch the library was built against."""
    return {
        "version": _C.__version__,
        "isas": available_isas(),
        "active_isa": active_isa(),
        "cuda_archs": cuda_library.architectures(),
        "torch_built": _C.built_torch,
        "kernels": {isa: len(_C.kernel_table(isa)) for isa in available_isas()},
    }
