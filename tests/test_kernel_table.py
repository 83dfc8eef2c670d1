"""Every kernel of every instruction set is right, and is known to have run.

A shape is chosen for each row of the table so that the dispatch picks that kernel. Dispatch rules
change, so this is not taken on trust: the shapes also run in a child process with a breakpoint on
the first byte of each kernel of the library as it was built, and each one must be hit. Run as a
script, this file is that child.
"""

from __future__ import annotations

import collections
import ctypes
import os
import re
import signal
import struct
import subprocess
import sys

import pytest
import torch
from program_checks import Net, check, kernel

import dass_kernels as dk
from dass_kernels import _C, testing
from dass_kernels.testing import check_conv2d, check_linear, lanes, randn, random_weight

# Twice what a tile may read of a channel block (kL1Budget in csrc/ops/conv_forward.h).
CHANNEL_BLOCK_BYTES = 72 << 10


def conv_1x3(info, images, channels=3, outputs=None, height=1, width=None, residual=False):
    """One row of output pixels, read through the three taps of a 1x3 kernel."""
    rows = 1 if info.format == "csr" else int(info.format.split("x")[0])
    outputs = outputs or 2 * rows + 1
    weight, mask = random_weight((outputs, channels, 1, 3), 0.75, info.format, info.dtype)
    width = width or info.pixels
    x = randn(images, channels, height, width, dtype=info.dtype)
    extra = randn(images, outputs, height, width, dtype=info.dtype) if residual else None
    check_conv2d(x, weight, mask, None, extra, format=info.format, padding=(0, 1))


def conv_1x1(info, channels=3, outputs=None):
    """One tile of pixels of a single image."""
    rows = 1 if info.format == "csr" else int(info.format.split("x")[0])
    weight, mask = random_weight(
        (outputs or 2 * rows + 1, channels, 1, 1), 0.75, info.format, info.dtype
    )
    check_conv2d(
        randn(1, channels, 1, info.pixels, dtype=info.dtype), weight, mask, format=info.format
    )


def matrix(info, batch):
    weight, mask = random_weight((11, 40), 0.5, dtype=info.dtype)
    check_linear(randn(batch, 40, dtype=info.dtype), weight, mask, randn(11, dtype=info.dtype))


def program(info):
    """One layer of a compiled network, by the kernels of the table: no code is made for it."""
    net, pixel, options = Net(5, 11, 20), 1, {}
    if "squares" in info.op:
        pixel, options = lanes(), {"deep": 4, "depth": 2 if "blocked" in info.op else 0}
        y = net.conv("x", 9, 3, 1, density=0.4)
    elif info.op == "depthwise":
        taps = int(info.format)
        y = net.depthwise("x", taps, taps // 2, activation="relu6")
    elif info.op == "pool":
        y = net.window("x", "max", (3, 3), (2, 2), (1, 1, 1, 1))
    elif info.op == "map":
        y = net.act("x", "hardswish")
    elif info.op == "mean":
        y = net.mean("x")
    else:
        y = net.linear(net.mean("x"), 9)

    def choose(plan):
        kernel(False, 1, 16 if options else 4, **options)(plan)
        for step in plan.steps:
            if step.kind == "depthwise":
                step.fields["emitted"] = False

    check(net.graph(y), pixel, choose=choose)


def planes_with_gaps(info):
    """(rows, row length) whose pixels fill fewer vectors than their flat tile, gaps included."""
    count, vectors = lanes(info.dtype), info.pixels // lanes(info.dtype)
    for height in range(1, 40):
        for width in range(1, info.pixels + 1):
            flat = -(-(height * (width + 1) - 1) // count)
            if flat == vectors and -(-height * width // count) < 17:
                return height, width
    raise AssertionError(f"no plane for {info.name}")


def exercise(info: testing.KernelInfo) -> None:
    """Checks a shape whose dispatch, forward or backward, reaches this kernel of the active ISA."""
    wide = CHANNEL_BLOCK_BYTES // (info.pixels * info.dtype.itemsize) + 5 if info.pixels else 0
    vectors = info.pixels // lanes(info.dtype)
    many = 17 + 17 // vectors if vectors else 0  # enough vectors to resolve every entry first
    if info.op == "spmm":
        conv_1x1(info)
    elif info.op == "spmm_table":
        conv_1x3(info, images=1)
    elif info.op == "spmm_direct":
        conv_1x3(info, images=many, residual=True)  # a residual keeps images apart
    elif info.op == "spmm_blocked":
        conv_1x1(info, wide, outputs=9)
    elif info.op == "spmm_blocked_table":
        conv_1x3(info, 1, wide, outputs=9)
    elif info.op == "spmm_blocked_direct":
        conv_1x3(info, many, wide, outputs=9, residual=True)
    elif info.op == "sddmm":
        matrix(info, info.pixels)
    elif info.op == "sddmm_table":
        height, width = planes_with_gaps(info)
        conv_1x3(info, 1, height=height, width=width)
    elif info.op == "sddmm_direct":
        conv_1x3(info, lanes(info.dtype), height=17, width=vectors)
    elif info.op == "gemv" and info.format == "bits":
        matrix(info, 1)
    elif info.op in ("depthwise", "pool", "map", "mean", "gemv") or "squares" in info.op:
        program(info)
    else:
        raise AssertionError(f"no shape is known to reach {info.name}: add one here")


def exercise_all(isa: str) -> int:
    with testing.isa(isa):
        table = testing.kernel_table()
        for info in table:
            try:
                exercise(info)
            except AssertionError as error:
                raise AssertionError(f"{info.name}: {error}") from None
    return len(table)


@pytest.mark.usefixtures("poisoned", "one_thread")
def test_every_kernel_of_the_table_is_right(isa):
    assert exercise_all(isa) == dk.build_info()["kernels"][isa] > 0


def test_the_table_describes_itself(isa):
    table = testing.kernel_table(isa)
    assert len({info.name for info in table}) == len(table)
    assert len(table) == dk.build_info()["kernels"][isa]
    for info in table:
        words = [info.op, info.format] if info.format else [info.op]
        assert info.name.endswith(f"__{isa}") and info.name.startswith("_".join([*words, ""]))
        count = lanes(info.dtype, isa)
        assert info.pixels % count == 0 and info.pixels <= 16 * count
    assert {info.dtype for info in table} == {torch.float32, torch.float64}
    assert {info.format for info in table if info.op == "depthwise"} == {"3", "5", "7"}
    assert {info.op for info in table} >= {"pool", "map", "mean", "gemv"}
    for op in ("spmm", "spmm_table", "spmm_direct"):
        assert {info.format for info in table if info.op == op} == set(testing.FORMATS)


# --- Which kernels were entered ---------------------------------------------------------------


def kernel_symbols() -> dict[int, tuple[str, str]]:
    """Address in the library -> (ISA, mangled name) of each kernel, from its ELF symbol table."""
    with open(_C.__file__, "rb") as f:
        data = f.read()
    assert data[:6] == b"\x7fELF\x02\x01", "not a little-endian 64-bit ELF file"
    sections_at, size, count = (
        *struct.unpack_from("<Q", data, 40),
        *struct.unpack_from("<HH", data, 58),
    )
    headers = [
        struct.unpack_from("<IIQQQQIIQQ", data, sections_at + i * size) for i in range(count)
    ]
    found = {}
    families = "spmm|sddmm|gemv|transpose|depthwise|pool|map|mean"
    pattern = re.compile(rf"_ZN4dass\d+(avx512|avx2|scalar|neon)\d+({families})\w*")
    for _, kind, _, _, offset, length, link, *_ in headers:
        if kind != 2:  # SHT_SYMTAB
            continue
        names = headers[link][4]
        for at in range(offset, offset + length, 24):
            name, info, _, _, value, _ = struct.unpack_from("<IBBHQQ", data, at)
            end = data.index(b"\0", names + name)
            match = pattern.fullmatch(data[names + name : end].decode())
            if info & 15 == 2 and match:  # STT_FUNC
                found[value] = (match[1], match[0])
    return found


class Registers(ctypes.Structure):
    """user_regs_struct of x86-64; rip is the 17th word."""

    _fields_ = [("words", ctypes.c_ulonglong * 27)]
    RIP = 16


TRACEME, CONTINUE, GETREGS, SETREGS = 0, 7, 12, 13


def ptrace(request: int, pid: int, data=0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if libc.ptrace(request, pid, None, data) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def base_address(pid: int) -> int:
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            words = line.split()
            if words[-1] == os.path.realpath(_C.__file__) and int(words[2], 16) == 0:
                return int(words[0].split("-")[0], 16)
    raise AssertionError("the library is not loaded in the child")


def run_with_breakpoints(addresses) -> tuple[set[int], int]:
    """(addresses entered, exit status) of this file run as a script."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, __file__], env=env, preexec_fn=lambda: ptrace(TRACEME, 0)
    )
    hit, original, memory = set(), {}, None
    try:
        while True:
            _, status = os.waitpid(child.pid, 0)
            if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                child.returncode = os.waitstatus_to_exitcode(status)
                return hit, child.returncode
            stop, pass_on = os.WSTOPSIG(status), 0
            if stop == signal.SIGSTOP and memory is None:
                base = base_address(child.pid)
                memory = os.open(f"/proc/{child.pid}/mem", os.O_RDWR)
                for address in addresses:
                    original[base + address] = os.pread(memory, 1, base + address)
                    os.pwrite(memory, b"\xcc", base + address)
            elif stop == signal.SIGTRAP and memory is not None:
                registers = Registers()
                ptrace(GETREGS, child.pid, ctypes.addressof(registers))
                at = registers.words[Registers.RIP] - 1
                os.pwrite(memory, original[at], at)
                registers.words[Registers.RIP] = at
                ptrace(SETREGS, child.pid, ctypes.addressof(registers))
                hit.add(at - base)
            elif stop != signal.SIGTRAP:
                pass_on = stop
            ptrace(CONTINUE, child.pid, pass_on)
    finally:
        if memory is not None:
            os.close(memory)
        if child.returncode is None:
            child.kill()
            child.wait()


def can_trace() -> str | None:
    """Why a child cannot be traced here, or None."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "breakpoints are written for Linux on x86-64"
    if not kernel_symbols():
        return "the library was stripped of its symbol table"
    try:
        child = subprocess.Popen(["true"], preexec_fn=lambda: ptrace(TRACEME, 0))
    except (OSError, subprocess.SubprocessError) as error:
        return f"ptrace is not permitted: {error}"
    child.kill()  # it has stopped at exec, as a traced child does
    child.wait()
    return None


def test_every_kernel_of_the_library_was_entered(report):
    if reason := can_trace():
        pytest.skip(reason)
    isas = dk.available_isas()
    symbols = {at: name for at, name in kernel_symbols().items() if name[0] in isas}
    hit, status = run_with_breakpoints(symbols)
    assert status == 0, f"the traced child failed: {status}"
    total = collections.Counter(isa for isa, _ in symbols.values())
    entered = collections.Counter(symbols[at][0] for at in hit)
    for isa in isas:
        report(f"kernels entered, {isa}: {entered[isa]}/{total[isa]}")
        # The table, and a transposition per dtype where it is not inlined.
        rows = len(testing.kernel_table(isa))
        assert rows <= total[isa] <= rows + 2, "the table does not list every kernel"
    missed = sorted(name for at, (_, name) in symbols.items() if at not in hit)
    assert not missed, f"{len(missed)} kernels were never entered: {missed}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    dk.active_isa()
    os.kill(os.getpid(), signal.SIGSTOP)  # the parent sets its breakpoints now
    for name in dk.available_isas():
        exercise_all(name)
