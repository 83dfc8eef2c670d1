"""The CUDA library: what nvcc says of its kernels, how it is loaded, and refused without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from cuda_shim import build, matrix

from dass_kernels import cuda_library

NVCC = matrix.find_nvcc()
needs_nvcc = pytest.mark.skipif(
    NVCC is None or build.missing() is not None,
    reason="no nvcc (DASS_NVCC, CUDA_HOME, PATH or the wheel nvidia-cuda-nvcc)",
)


@needs_nvcc
def test_one_architecture_keeps_to_its_budgets():
    assert matrix.over_budget(matrix.compile_all(NVCC, ("80",))) == []


@pytest.mark.slow
@needs_nvcc
def test_every_architecture_keeps_to_its_budgets():
    usages = matrix.compile_all(NVCC)
    assert {u.arch for u in usages} == set(matrix.ARCHS)
    assert matrix.over_budget(usages) == []


def test_two_blocks_of_a_product_fit_on_a_multiprocessor():
    """65,536 registers, and the 100 KiB of shared memory that the smallest (sm_86) has, with 1 KiB
    of it taken by the system per block."""
    for kernel, budget in matrix.budgets().items():
        assert 2 * 256 * budget["registers"] <= 65536, kernel
        assert 2 * (budget["shared"] + 1024) <= 100 << 10, kernel


def test_spills_and_missing_budgets_are_told():
    good = [
        matrix.Usage(*key.split(" "), "80", limit["registers"], limit["shared"], 0)
        for key, limit in matrix.budgets().items()
    ]
    assert matrix.over_budget(good) == []
    first = good[0]
    for change in ({"spilled": 8}, {"registers": first.registers + 1}, {"shared": 10**5}):
        changed = matrix.Usage(**{**vars(first), **change})
        assert len(matrix.over_budget([changed, *good[1:]])) == 1
    assert "a budget without a kernel" in matrix.over_budget(good[1:])[0]
    unknown = matrix.Usage("new", "f32", "80", 1, 1, 0)
    assert "no budget" in matrix.over_budget([*good, unknown])[0]


def test_the_report_of_ptxas_is_read():
    report = (
        "ptxas info    : Compiling entry function '_ZN4dass4cuda12_GLOBAL__N_115spmm_csr_kernel"
        "I6__halfLNS0_6LayoutE1EEEvNS1_14SpmmParametersIT_EE' for 'sm_80'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 24 bytes spill loads\n"
        "ptxas info    : Used 90 registers, used 1 barriers, 19968 bytes smem, 504 bytes cmem[0]\n"
        "ptxas info    : Compiling entry function '_ZN4dass4cuda12_GLOBAL__N_111scan_kernelEPii'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 14 registers, used 1 barriers\n"
    )
    assert matrix._usages(report, "80") == [
        matrix.Usage("spmm_csr_window", "f16", "80", 90, 19968, 28),
        matrix.Usage("scan", "-", "80", 14, 0, 0),
    ]


LIBRARY = cuda_library.path()
needs_library = pytest.mark.skipif(LIBRARY is None, reason="this dass was built without CUDA")


def test_a_missing_gpu_is_said_in_words():
    """One message for each thing that may be missing, and no library opened to find out."""
    if cuda_library.unavailable() is None:
        pytest.skip("nothing is missing here")
    with pytest.raises(RuntimeError, match=r"dass_kernels cannot run on CUDA: .{20,}"):
        cuda_library.load()


@pytest.mark.parametrize(
    ("built", "version", "present", "capability", "message"),
    [
        (False, "13.0", True, (9, 0), "built without CUDA: install it from source with DASS_CUDA"),
        (True, None, True, (9, 0), "torch .* was built without CUDA"),
        (True, "13.0", False, (9, 0), "no NVIDIA driver, or no GPU"),
        (True, "13.0", True, (7, 5), "compute capability 7.5; 8.0 or newer is needed"),
        (True, "13.0", True, (8, 0), None),
        (True, "13.0", True, (12, 1), None),
    ],
)
def test_what_is_missing(monkeypatch, tmp_path, built, version, present, capability, message):
    monkeypatch.setattr(cuda_library, "path", lambda: tmp_path if built else None)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    said = cuda_library.unavailable()
    assert said is None if message is None else re.search(message, said)


def test_importing_does_not_open_the_library():
    code = "import dass_kernels, sys; print('/_cuda.' in open('/proc/self/maps').read())"
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("reads the maps of a Linux process")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@needs_library
def test_the_library_opens_without_a_driver_and_registers_its_kernels():
    cuda_library.register()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in ("conv2d", "conv2d_dx", "conv2d_dw", "linear", "linear_dx", "linear_dw"):
        assert has(f"dass::{op}", "CUDA"), op
    assert has("dass::build_pattern", "CUDA")
    assert cuda_library.architectures() == list(matrix.ARCHS)


def undefined_symbols(path) -> set[str]:
    """Names the loader must find elsewhere, without their versions."""
    listed = subprocess.check_output(["nm", "-D", "--undefined-only", str(path)], text=True)
    return {line.split()[-1].split("@")[0] for line in listed.splitlines()}


@needs_library
def test_only_the_stable_interface_of_torch_is_used():
    """C functions alone, which torch keeps: no C++ name of at::, c10:: or torch::."""
    names = undefined_symbols(LIBRARY)
    of_torch = {n for n in names if "torch" in n or "c10" in n or re.match(r"_ZNK?2at", n)}
    assert of_torch
    assert {n for n in of_torch if not re.fullmatch(r"(aoti_torch|torch)_[a-z0-9_]+", n)} == set()
    assert not {n for n in names if n.startswith("cuda")}, "the CUDA runtime is linked in"
