"""Threads, fork, flat memory and guard pages."""

from __future__ import annotations

import concurrent.futures
import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dass_kernels as dk
from dass_kernels import testing
from dass_kernels.testing import lanes, randn, random_weight

ops = torch.ops.dass
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code that can import this module in a process of its own."""
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        env={**os.environ, **environment},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )


# --- Threads ------------------------------------------------------------------------------------

# kernel, groups, format, images, channels, outputs, size, padding, stride
WORK = [
    ((1, 1), 1, "csr", 1, 30, 50, 20, 0, 1),
    ((1, 1), 1, "csr", 40, 30, 50, 5, 0, 1),
    ((3, 3), 1, "csr", 3, 20, 33, 13, 1, 1),
    ((3, 3), 1, "csr", 37, 20, 33, 9, 1, 2),
    ((3, 3), 1, "csr", 1, 128, 9, 40, 1, 1),
    ((1, 1), 1, "csr", 1, 1500, 12, 12, 0, 1),
    ((3, 3), 4, "csr", 5, 20, 32, 9, 1, 1),
    ((3, 3), 24, "csr", 18, 24, 24, 9, 1, 1),
    ((3, 3), 1, "4x1", 3, 20, 34, 9, 1, 1),
    ((1, 1), 1, "16x1", 18, 20, 70, 9, 0, 1),
    ((3, 3), 1, "8x1", 2, 20, 3, 9, 1, 1),
    ((3, 3), 1, "csr", 2, 3, 1, 9, 1, 1),
]


def conv_results(work, dtype=torch.float32) -> list[torch.Tensor]:
    """Output, input gradient and weight gradient."""
    kernel, groups, format, n, c, o, size, padding, stride = work
    weight, mask = random_weight((o, c // groups, *kernel), 0.4, format, dtype)
    weight.requires_grad_()
    x = randn(n, c, size, size, dtype=dtype).requires_grad_()
    packed = dk.pack(weight, mask, format, groups)
    y = dk.conv2d(x, packed, randn(o, dtype=dtype), stride, padding, groups=groups)
    y.backward(randn(*y.shape, dtype=dtype, seed=9))
    return [y.detach(), x.grad, weight.grad]


def linear_results(rows: int, format: str) -> list[torch.Tensor]:
    weight, mask = random_weight((301, 77), 0.4, format)
    weight.requires_grad_()
    x = randn(rows, 77).requires_grad_()
    y = dk.linear(x, dk.pack(weight, mask, format), randn(301))
    y.backward(randn(*y.shape, seed=9))
    return [y.detach(), x.grad, weight.grad]


def all_results() -> list[torch.Tensor]:
    results = [t for work in WORK for t in conv_results(work)]
    results += conv_results(WORK[3], torch.float64)
    for rows, format in ((1, "csr"), (2, "csr"), (40, "csr"), (300, "8x1")):
        results += linear_results(rows, format)
    return results


def assert_bitwise(got, want):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"result {i} differs by {(a - b).abs().max()}"


def thread_sweep(isa: str) -> None:
    """Right, and the same to the last bit, with one thread and with several."""
    dk.set_isa(isa)
    torch.use_deterministic_algorithms(True)  # uninitialised outputs are NaN
    torch.set_num_threads(1)
    want = all_results()
    for count in (2, 5):
        torch.set_num_threads(count)
        testing.poison_scratch()
        assert_bitwise(all_results(), want)
    for kernel, groups, format, n, c, o, size, padding, stride in WORK:
        weight, mask = random_weight((o, c // groups, *kernel), 0.4, format)
        testing.check_conv2d(
            randn(n, c, size, size),
            weight,
            mask,
            randn(o),
            format=format,
            groups=groups,
            padding=padding,
            stride=stride,
        )


def test_bitwise_equal_for_any_number_of_threads(isa):
    """Output, dx and dw: the division of work never changes the order of a sum.

    In a process of its own, where waiting threads sleep: spinning ones are slow if cores are few.
    """
    code = f"import test_robustness; test_robustness.thread_sweep({isa!r}); print('swept')"
    done = run_python(code, OMP_WAIT_POLICY="passive")
    assert done.returncode == 0 and "swept" in done.stdout, done.stderr


def test_eight_python_threads_at_once(isa, one_thread):
    """Each has scratch of its own; all share the packed weights and torch's pool."""
    want = all_results()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: all_results(), range(8)):
            assert_bitwise(got, want)


def test_changing_the_isa_while_others_compute():
    """A call uses one table from its beginning to its end: results are those of some ISA."""
    work = WORK[2]
    isas = dk.available_isas()
    want = {}
    for name in isas:
        with testing.isa(name):
            want[name] = conv_results(work)[0]
    before = dk.active_isa()
    weight, mask = random_weight((33, 20, 3, 3), 0.4)
    packed, x, bias = dk.pack(weight, mask), randn(3, 20, 13, 13), randn(33)

    def compute(_):
        return dk.conv2d(x, packed, bias, padding=1)

    try:
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(compute, i) for i in range(200)]
            for i in range(1000):
                dk.set_isa(isas[i % len(isas)])
            for future in futures:
                assert any(torch.equal(future.result(), w) for w in want.values())
    finally:
        dk.set_isa(before)


def fork_after_use():
    """In a child: the parent has used two threads, the child uses one, as a DataLoader worker."""
    torch.set_num_threads(2)
    want = all_results()
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            assert_bitwise(all_results(), want)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert_bitwise(all_results(), want)  # the parent's pool still works


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_use():
    done = run_python(
        "import test_robustness; test_robustness.fork_after_use()", OMP_WAIT_POLICY="passive"
    )
    assert done.returncode == 0, done.stderr


# --- Memory -------------------------------------------------------------------------------------


def resident_bytes() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer keeps freed memory")
def test_memory_stays_flat_over_a_thousand_iterations(one_thread):
    """Forward, backward, packing and the error path. One leaked result a step would be 64 MiB."""
    weight, mask = random_weight((32, 16, 3, 3), 0.3)
    matrix = dk.pack(*random_weight((64, 64), 0.5))

    def step(i):
        leaf = weight.clone().requires_grad_()
        x = randn(2, 16, 16, 16).requires_grad_()
        y = dk.conv2d(x, dk.pack(leaf, mask), padding=1, activation="relu")  # 64 KiB
        y.sum().backward()
        dk.linear(randn(256, 64), matrix)  # 64 KiB
        with pytest.raises(RuntimeError):
            dk.conv2d(randn(2, 3, 16, 16), dk.pack(weight, mask))

    for i in range(100):
        step(i)
    before = resident_bytes()
    for i in range(1000):
        step(i)
    grown = resident_bytes() - before
    assert grown < 8 << 20, f"{grown / 2**20:.1f} MiB more after 1,000 iterations"


def test_outputs_of_huge_pages(isa):
    """Outputs from 32 MiB on are given huge pages: whole, and right at both ends."""
    weight, mask = random_weight((3, 2, 1, 1), 0.7)
    x = randn(1, 2, 1700, 1701)
    y = dk.conv2d(x, dk.pack(weight, mask))
    assert y.numel() * 4 > 32 << 20
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight * mask))


class Guarded:
    """Memory between two inaccessible pages; reading one byte too far is a segmentation fault."""

    def __init__(self, nbytes: int):
        page = mmap.PAGESIZE
        self.room = -(-max(nbytes, 1) // page) * page
        self.map = mmap.mmap(-1, self.room + 2 * page)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.map)) + page
        libc = ctypes.CDLL(None, use_errno=True)
        for at in (self.start - page, self.start + self.room):
            if libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(page), 0):
                raise OSError(ctypes.get_errno(), "mprotect")

    def tensor(self, like: torch.Tensor, at_end: bool) -> torch.Tensor:
        nbytes = like.numel() * like.element_size()
        start = self.start + (self.room - nbytes if at_end else 0)
        buffer = (ctypes.c_char * nbytes).from_address(start)
        buffer._owner = self
        return torch.frombuffer(buffer, dtype=like.dtype).view(like.shape).copy_(like)


def guarded(t: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy of a tensor that ends (or begins) where memory becomes inaccessible."""
    return Guarded(t.numel() * t.element_size()).tensor(t, at_end)


def guarded_sweep(isa: str) -> None:
    """Every op with every operand next to an inaccessible page; results as without."""
    torch.set_num_threads(1)
    dk.set_isa(isa)
    for dtype in (torch.float32, torch.float64):
        count = lanes(dtype)
        shapes = [((1, 1), n, w) for n in (1, count) for w in (1, count - 1, count, count + 1)]
        shapes += [((1, 1), 1, w) for w in (2 * count, 8 * count, 8 * count + 1, 9 * count)]
        shapes += [((3, 3), n, w) for n in (1, count + 1) for w in (1, 3, count, count + 1)]
        for kernel, n, width in shapes:
            # Few outputs read a 1x1 input in place, many copy it first.
            for outputs, density, format in ((3, 0.3, "csr"), (17, 0.9, "csr"), (9, 0.5, "4x1")):
                for height in (1, 3):
                    guard_conv(kernel, n, height, width, outputs, density, format, dtype)
        for rows in (1, 2, count, count + 1, 8 * count + 1):
            for inputs in (1, 15, 16, 17, 33):
                for format in ("csr", "8x1"):
                    guard_linear(rows, inputs, format, dtype)


def same_when_guarded(op, operands, rest):
    want = op(*operands, *rest)
    for at_end in (True, False):
        near = [t if t is None or not t.numel() else guarded(t, at_end) for t in operands]
        assert torch.equal(op(*near, *rest), want)


def guard_conv(kernel, n, height, width, outputs, density, format, dtype):
    weight, mask = random_weight((outputs, 5, *kernel), density, format, dtype)
    p = dk.pack(weight, mask, format)
    spec = dk.conv_spec(weight.shape, 1, kernel[0] // 2, 1, "relu")
    x, bias = randn(n, 5, height, width, dtype=dtype), randn(outputs, dtype=dtype)
    grad = randn(n, outputs, height, width, dtype=dtype)
    same_when_guarded(ops.conv2d, (x, p.values, p.pattern, bias, None), (spec,))
    same_when_guarded(ops.conv2d, (x, p.values, p.pattern, None, grad), (spec,))
    same_when_guarded(ops.conv2d_dx, (grad, p.values, p.pattern), (spec, 5, height, width))
    same_when_guarded(ops.conv2d_dw, (grad, x, p.pattern), (spec, len(p.values)))


def guard_linear(rows, inputs, format, dtype):
    weight, mask = random_weight((21, inputs), 0.5, format, dtype)
    p = dk.pack(weight, mask, format)
    x, grad, bias = (randn(*s, dtype=dtype) for s in ((rows, inputs), (rows, 21), (21,)))
    same_when_guarded(ops.linear, (x, p.values, p.pattern, bias), (21, 1))
    same_when_guarded(ops.linear_dx, (grad, p.values, p.pattern), (inputs,))
    same_when_guarded(ops.linear_dw, (grad, x, p.pattern), (len(p.values),))


def test_nothing_is_read_past_the_end_of_an_operand(isa):
    code = f"import test_robustness; test_robustness.guarded_sweep({isa!r}); print('swept')"
    done = run_python(code, OMP_NUM_THREADS="1")
    assert done.returncode == 0 and "swept" in done.stdout, done.stderr


def test_the_guard_page_works():
    code = (
        "import test_robustness as t, torch, ctypes\n"
        "g = t.guarded(torch.zeros(5), True)\n"
        "ctypes.string_at(g.data_ptr(), 20); print('inside', flush=True)\n"
        "ctypes.string_at(g.data_ptr(), 21)"
    )
    done = run_python(code)
    assert "inside" in done.stdout and done.returncode != 0
