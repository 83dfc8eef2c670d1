"""The CUDA library: what nvcc says of its kernels, how it is loaded, and refused without a GPU."""

from __future__ import annotations

import pytest
from cuda_shim import build, matrix

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
