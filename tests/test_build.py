"""What was built: instruction sets, how one is chosen, and what importing the library does."""

from __future__ import annotations

import concurrent.futures
import os
import re
import subprocess
import sys

import pytest
import torch

import dass_kernels as dk
from dass_kernels import cuda_library, testing

ISAS = ("avx512", "avx2", "neon", "scalar")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "DASS_ISA"}
    return subprocess.run(
        [sys.executable, "-c", code], env={**env, **environment}, capture_output=True, text=True
    )


def test_available_isas_are_known_best_first_and_end_with_scalar():
    isas = dk.available_isas()
    assert isas and isas[-1] == "scalar"
    assert isas == [name for name in ISAS if name in isas]


def test_the_best_isa_that_the_processor_has_is_available():
    """As Linux reports the processor; the library asks the processor itself."""
    if not os.path.exists("/proc/cpuinfo") or os.uname().machine != "x86_64":
        pytest.skip("reads the flags of an x86-64 Linux")
    with open("/proc/cpuinfo") as f:
        flags = set(re.search(r"^flags\s*:(.*)$", f.read(), re.M)[1].split())
    assert ("avx2" in dk.available_isas()) == ({"avx2", "fma", "popcnt"} <= flags)
    wide = {"avx512f", "avx512dq", "avx512vl", "avx512bw", "avx2", "fma"}
    assert ("avx512" in dk.available_isas()) == (wide <= flags)


@pytest.mark.parametrize("name", ["", "sse", "AVX2", "avx512 ", "best"])
def test_set_isa_refuses_unknown_names(name):
    before = dk.active_isa()
    with pytest.raises(ValueError, match=r"unknown or unsupported ISA.*this machine has: .*scalar"):
        dk.set_isa(name)
    assert dk.active_isa() == before
    with pytest.raises(ValueError, match="unknown or unsupported ISA"):
        testing.kernel_table(name or "none")


def test_set_isa_holds_for_every_thread():
    before = dk.active_isa()
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            assert pool.submit(dk.active_isa).result() == before
            for name in dk.available_isas():
                dk.set_isa(name)
                assert pool.submit(dk.active_isa).result() == dk.active_isa() == name
    finally:
        dk.set_isa(before)


def test_the_isa_context_goes_back_even_after_an_error():
    before = dk.active_isa()
    with pytest.raises(KeyError), testing.isa("scalar"):
        assert dk.active_isa() == "scalar"
        raise KeyError
    assert dk.active_isa() == before
    with pytest.raises(ValueError, match="unknown"), testing.isa("mmx"):
        pass
    assert dk.active_isa() == before


def test_every_isa_gives_the_same_result_within_rounding():
    """And not the same bits: another vector width sums in another order, so the choice is real."""
    weight, mask = testing.random_weight((40, 64), 0.7)
    packed, x = dk.pack(weight, mask), testing.randn(40, 64)
    want = testing.reference.linear(x, weight * mask)
    size = testing.reference.linear(x.abs(), weight.abs() * mask)
    grads = {}
    for name in dk.available_isas():
        with testing.isa(name):
            bound = testing.forward_bound(torch.float32, testing.row_length(mask), size)
            testing.assert_within(dk.linear(x, packed), want, bound, name)
            grad = torch.ops.dass.linear_dw(want.float(), x, packed.pattern, len(packed.values))
            grads[name] = tuple(grad.tolist())
    assert len(set(grads.values())) == len(grads)


def test_the_environment_chooses_the_isa():
    for name in dk.available_isas():
        done = run_python("import dass_kernels as d; print(d.active_isa())", DASS_ISA=name)
        assert done.stdout.strip() == name, done.stderr
    done = run_python("import dass_kernels as d; print(d.active_isa())", DASS_ISA="")
    assert done.stdout.strip() == dk.available_isas()[0], done.stderr


def test_an_unknown_isa_in_the_environment_is_an_error_at_import():
    done = run_python("import dass_kernels; print('imported')", DASS_ISA="sse9")
    assert done.returncode == 1 and "imported" not in done.stdout
    assert "ValueError: unknown or unsupported ISA 'sse9'; this machine has:" in done.stderr


def test_build_info():
    info = dk.build_info()
    assert info["isas"] == dk.available_isas() and info["active_isa"] == dk.active_isa()
    assert info["version"] == dk.__version__ and re.fullmatch(r"\d+\.\d+\.\d+.*", info["version"])
    assert re.match(r"\d+\.\d+", info["torch_built"])
    assert bool(info["cuda_archs"]) == (cuda_library.path() is not None)
    assert all(count > 0 for count in info["kernels"].values())


def test_exports():
    assert len(set(dk.__all__)) == len(dk.__all__)
    for name in dk.__all__:
        assert getattr(dk, name).__doc__, f"{name} has no docstring"


def test_importing_the_kernels_does_not_import_dass():
    code = "import dass_kernels.testing, dass_kernels.reference, sys; print('dass' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"


def test_the_library_works_without_a_thread_pool_or_gradients_first():
    """The very first thing a process does may be an inference."""
    code = (
        "import torch, dass_kernels as d\n"
        "with torch.inference_mode():\n"
        "    p = d.pack(torch.eye(5)); print(bool((d.linear(torch.ones(2, 5), p) == 1).all()))"
    )
    assert run_python(code).stdout.strip() == "True"
