"""What the Triton kernels compile to, held to the budgets of ``triton_budgets.csv``.

Every kernel for every architecture, without a GPU: registers, shared memory, no spill, and in the
machine code the instructions meant. ``python -m dass_kernels.triton.resources`` prints the table.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from dass_kernels.triton import resources
from dass_kernels.triton.heuristics import ARCHS
from dass_kernels.triton.resources import Variant

BUDGETS = resources.read(Path(__file__).with_name("triton_budgets.csv"))
FAST = [
    Variant("forward", "column_vectors", True, "float16", "sm_80"),
    Variant("forward", "blocks", False, "float16", "sm_100"),
    Variant("input_gradient", "column_vectors", False, "float16", "sm_120"),
    Variant("weight_gradient", "blocks", True, "float16", "sm_90"),
    Variant("forward", "column_vectors", False, "float32", "sm_86"),
]
# The instruction that multiplies matrices, by architecture; one of them has to be there.
PRODUCTS = {"sm_90": "HGMMA|HMMA", "sm_100": "UTCHMMA|HMMA"}


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    """Compiled now, not last week."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def wide_loads_expected(variant):
    """Whether neighbouring pixels or channels are aligned for all that a step reads.

    Not where columns are gathered at the taps of a window: a shifted row of pixels is not aligned.
    """
    return variant.pointwise or variant.kernel == "blocks"


def check(variant: Variant) -> None:
    compiled = resources.compile_variant(variant)
    found, budget = resources.resources(compiled), BUDGETS[variant]
    assert found.spills == 0
    assert found.registers <= budget.registers
    assert found.shared <= budget.shared <= ARCHS[variant.arch].shared
    code = resources.machine_code(compiled)
    assert not re.search(r"\b(LDL|STL)\b", code), "local memory"
    if variant.dtype != "float32":
        assert re.search(rf"\b({PRODUCTS.get(variant.arch, 'HMMA')})\b", code), "no matrix product"
    if wide_loads_expected(variant):
        assert re.search(r"\bLD(GSTS|G)\.[\w.]*128\b", code), "no 128-bit load"


def test_the_budgets_cover_every_kernel_and_none_spills():
    assert list(BUDGETS) == resources.matrix()
    for variant, budget in BUDGETS.items():
        assert budget.spills == 0, variant
        assert budget.registers <= 255 and budget.shared <= ARCHS[variant.arch].shared, variant


@pytest.mark.parametrize("variant", FAST, ids=lambda v: f"{v.name} {v.dtype} {v.arch}")
def test_kernels_keep_to_their_budgets(variant):
    check(variant)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_all_kernels_keep_to_their_budgets(arch, dtype):
    for variant in resources.matrix([arch], [dtype]):
        check(variant)


def test_the_table_is_printed(capsys, monkeypatch):
    rows = [
        (FAST[0], resources.Resources(96, 10240, 0)),
        (FAST[2], resources.Resources(80, 512, 8)),
    ]
    monkeypatch.setattr(resources, "table", lambda variants: iter(rows))
    assert resources.main(["--arch", "sm_80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| forward column_vectors 1x1 | float16 | 80 | 96 | 10 | 0 |"
    assert lines[3] == "| input_gradient column_vectors 3x3 | float16 | 120 | 80 | 0.5 | 8 |"
