"""Tensors between pages that cannot be touched, and memory of programs that is NaN before use."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import weakref

import numpy as np
import torch
from torch import Tensor

from dass_kernels import Program, active_isa

SENTINEL = -12345.678
SLACK = 4096  # floats that a program keeps on both sides of its arena (kSlack in program.cpp)
SCRATCH = 1 << 17  # floats
NONE = np.zeros(0, np.float32)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Fenced:
    """A float32 tensor that ends, or begins, where a page without access lies.

    A read or a write past that side crashes. On the other side there is a band of sentinels, which
    ``check`` looks at.
    """

    def __init__(self, shape: tuple[int, ...], at_end: bool = True):
        count, page = math.prod(shape), mmap.PAGESIZE
        length = -(-(count * 4 + 256) // page) * page
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        base = _libc.mmap(None, length + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        assert base and base != ctypes.c_void_p(-1).value, "mmap"
        for fence in (base, base + page + length):
            assert _libc.mprotect(fence, page, 0) == 0, "mprotect"
        weakref.finalize(self, _libc.munmap, base, length + 2 * page)
        memory = (ctypes.c_float * (length // 4)).from_address(base + page)
        whole = torch.frombuffer(memory, dtype=torch.float32).fill_(SENTINEL)
        split = len(whole) - count if at_end else 0
        self.tensor = whole[split : split + count].view(shape)
        self._around = (whole[:split], whole[split + count :])

    def check(self, what: str) -> None:
        sentinel = torch.tensor(SENTINEL)
        assert all(bool((band == sentinel).all()) for band in self._around), f"around the {what}"


def place(channels: int, rows: int, columns: int, **fields) -> dict:
    """A picture as a program's step names it, by default without zeros between its planes."""
    dense = {"channel": rows * columns, "pitch": columns, "pad": 0, "pixel": 1, "space": 0}
    shape = {"channels": channels, "rows": rows, "columns": columns}
    return {**shape, **dense, "offset": 0, **fields}


def nan_step(arena: int) -> dict:
    """A step that makes all of a program's arena NaN, what lies around it too.

    It is the sum of nothing, for its x has no columns, and of a bias that is NaN.
    """
    empty = np.zeros(0, np.int32)
    return {
        "kind": "map", "x": place(1, 1, 0, space=1),
        "y": place(1, 1, arena + 2 * SLACK, offset=-SLACK),
        "combine": 0, "channels": empty, "shift_h": empty, "shift_w": empty, "stride_h": 1,
        "stride_w": 1, "scale": NONE, "bias": np.full(1, np.nan, np.float32), "activation": 0,
    }  # fmt: skip


def poison_scratch() -> None:
    """Makes the calling thread's scratch memory of programs NaN.

    Depth-first steps, pools and products in stages keep it between runs. A pool leaves its sums in
    one part, a depthwise convolution that is followed by a product its outputs in another, and
    a product of many outputs the sums of its first stage in the third.
    """
    program, x = _poison(active_isa())
    program.run([x])


@functools.cache
def _poison(isa: str) -> tuple[Program, Tensor]:
    side = 1 << 7
    x = torch.full((1, 1, 1, SCRATCH), torch.nan)
    plane = place(1, side, SCRATCH // side)
    padded = {
        "pitch": SCRATCH // side + 1,
        "pad": 1,
        "channel": 2 * SCRATCH,
        "offset": SCRATCH // 8,
    }
    zero, nan = np.zeros(1, np.float32), np.full(1, np.nan, np.float32)
    pool = {
        "kind": "pool", "x": place(1, 1, SCRATCH, space=1), "y": place(1, 1, 1),
        "maximum": False, "count_padding": True, "kernel_h": 1, "kernel_w": 1, "stride_h": 1,
        "stride_w": 1, "top": 0, "bottom": 0, "left": 0, "right": 0, "dilation_h": 1,
        "dilation_w": 1, "scale": NONE, "bias": NONE, "activation": 0,
    }  # fmt: skip
    depthwise = {
        "x": {**plane, **padded}, "y": plane, "kernel": 3, "stride_h": 1, "stride_w": 1, "top": 1,
        "left": 1, "dilation_h": 1, "dilation_w": 1, "weights": np.zeros(9, np.float32),
        "bias": nan, "activation": 0, "emitted": False,
    }  # fmt: skip
    project = {
        "x": plane, "y": {**plane, "offset": 4 * SCRATCH}, "values": zero, "bias": zero,
        "indptr": np.array([0, 1], np.int32), "offsets": np.zeros(1, np.int32), "activation": 0,
        "emitted": False, "height": 1, "vectors": 4, "chunk": 0,
    }  # fmt: skip
    fused = {"kind": "fused", "strip": side, "depthwise": depthwise, "project": project}
    outputs = SCRATCH // 64
    staged = {
        "kind": "rows", "x": place(2, 1, 128), "y": place(outputs, 1, 128), "values": NONE,
        "bias": np.full(outputs, np.nan, np.float32), "indptr": np.zeros(outputs + 1, np.int32),
        "offsets": np.zeros(0, np.int32), "activation": 0, "emitted": False, "height": 1,
        "vectors": 8, "chunk": 0, "depth": 1,
    }  # fmt: skip
    return Program(1, 6 * SCRATCH, [SCRATCH], [pool, fused, staged]), x
