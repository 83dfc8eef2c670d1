"""The compile matrix: every kernel for every architecture, and what ptxas says it needs.

``budgets.json`` holds, per kernel and dtype, the most registers and shared memory any architecture
may need; nothing may be spilled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from . import build

ARCHS = ("80", "86", "87", "89", "90", "100", "120")
BUDGETS = Path(__file__).with_name("budgets.json")
_DTYPES = {"f": "f32", "6__half": "f16"}


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one kernel needs on one architecture."""

    kernel: str
    dtype: str
    arch: str
    registers: int
    shared: int
    spilled: int  # bytes stored and loaded


def find_nvcc() -> str | None:
    """nvcc of DASS_NVCC, CUDA_HOME, the PATH, or the wheel nvidia-cuda-nvcc."""
    home = os.environ.get("CUDA_HOME")
    places = [os.environ.get("DASS_NVCC"), f"{home}/bin/nvcc" if home else None, "nvcc"]
    site = Path(build.TORCH).parent / "nvidia"
    places += sorted(map(str, site.glob("cu*/bin/nvcc")))
    return next((found for p in places if p and (found := shutil.which(p))), None)


def compile_all(nvcc: str, archs=ARCHS) -> list[Usage]:
    """Compiles every kernel for each architecture and returns what it needs."""
    found = []
    for source in build.KERNELS:
        for arch in archs:
            found += _compile(nvcc, build.ROOT / "csrc" / "cuda" / source, arch)
    return found


def _compile(nvcc: str, source: Path, arch: str) -> list[Usage]:
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "-Xptxas=-v", "-cubin", f"-arch=sm_{arch}"]
        command += ["-Werror=all-warnings", str(source), "-o", f"{folder}/out.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return _usages(done.stdout + done.stderr, arch)


def _usages(report: str, arch: str) -> list[Usage]:
    """Reads ptxas's report: for each entry function spills, then registers and shared memory."""
    found = []
    for part in report.split("Compiling entry function '")[1:]:
        kernel, dtype = _name(part.split("'")[0])
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Usage(
                kernel,
                dtype,
                arch,
                int(re.search(r"Used (\d+) registers", part)[1]),
                int(shared[1]) if shared else 0,
                int(spills[1]) + int(spills[2]),
            )
        )
    return found


def _name(mangled: str) -> tuple[str, str]:
    """(``spmm_csr_planes``, ``f32``) of a mangled kernel; packing has no dtype."""
    kernel = re.search(r"\d+([a-z_]+)_kernel", mangled)[1]
    template = re.search(r"_kernelI(f|6__half)", mangled)
    layout = re.search(r"LayoutE(\d)", mangled)
    if layout:
        kernel += "_" + ("planes", "window", "rows")[int(layout[1])]
    return kernel, _DTYPES[template[1]] if template else "-"


def budgets() -> dict[str, dict[str, int]]:
    return json.loads(BUDGETS.read_text())


def over_budget(usages: list[Usage]) -> list[str]:
    """What is spilled, or needs more than its budget, or has none; and budgets of no kernel."""
    allowed, wrong = budgets(), []
    for u in usages:
        key = f"{u.kernel} {u.dtype}"
        limit = allowed.get(key)
        if limit is None:
            wrong.append(f"{key}: no budget")
        elif u.registers > limit["registers"] or u.shared > limit["shared"] or u.spilled:
            wrong.append(f"{key} on sm_{u.arch}: {u} against {limit}, and no spills")
    unused = set(allowed) - {f"{u.kernel} {u.dtype}" for u in usages}
    return wrong + [f"{key}: a budget without a kernel" for key in sorted(unused)]
