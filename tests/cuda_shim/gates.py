"""Prints what each CUDA kernel has been through: the emulation, sanitizers, the compile matrix.

    python -m cuda_shim.gates [--orders 20] [--archs 80,90]       (from tests/)

Nothing here is a time, and nothing ran on a GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch

import dass_kernels as dk
from dass_kernels import formats

from . import build, cases, matrix

ORDERS = 20  # random orders of fibers per case, behind the slow marker
# What the emulation says of each bug of programs/planted.cu: the exit status, or a message.
BUGS = {
    "tail": "heap-buffer-overflow",
    "uninitialised": "2 wrong at",
    "barrier": "3 divergent barrier",
    "two_barriers": "3 divergent barrier",
    "race": "2 wrong at",
    "warp": "3 divergent",
    "misaligned": "misaligned address",
    "shared_bounds": "heap-buffer-overflow",
    "unordered_blocks": "2 wrong at",
}
_DTYPES = {"f32": torch.float32, "f16": torch.float16}


def run_cases(emulator: build.Emulator, orders: int) -> dict[str, tuple[int, int]]:
    """dtype -> (cases passed, cases); a case is passed under all orders or not at all."""
    result = {}
    for name, dtype in _DTYPES.items():
        passed = 0
        for case in cases.CASES:
            try:
                for seed in range(orders + 1):
                    emulator.seed(seed)
                    cases.check(emulator.ops, case, dtype)
                passed += 1
            except (AssertionError, RuntimeError) as error:
                print(f"{name} {case.name}: {error}", file=sys.stderr)
        result[name] = (passed, len(cases.CASES))
    return result


def run_packing(emulator: build.Emulator, orders: int) -> tuple[int, int]:
    """(masks packed right, masks)."""
    passed = 0
    for case in cases.CASES:
        mask = cases.mask_of(case)
        want = formats.build_pattern(mask, "csr", case.groups)
        right = True
        for seed in range(orders + 1):
            emulator.seed(seed)
            got = emulator.ops.build_pattern(mask, case.groups)
            right = right and torch.equal(got[16:], want[16 : len(got)])
        passed += right
    return passed, len(cases.CASES)


def overrun(emulator: build.Emulator) -> None:
    """Reads past the end of values: a permutation that names an element which is not there."""
    packed = dk.pack(torch.ones(4, 6))
    pattern = packed.pattern.clone()
    pattern[int(pattern[formats._PERM])] = len(packed.values)
    emulator.ops.linear_dx(torch.ones(2, 4), packed.values, pattern, 6)


def run_sanitized(orders: int, *more: str) -> subprocess.CompletedProcess:
    """This file's cases in a Python with AddressSanitizer, on a library built with it."""
    build.ops_library(sanitize=True)
    environment = {**os.environ, **build.sanitizer_environment()}
    environment["PYTHONPATH"] = os.pathsep.join([str(build.ROOT), str(build.HERE.parent)])
    command = [
        sys.executable,
        "-m",
        "cuda_shim.gates",
        "--only-cases",
        "--orders",
        str(orders),
        *more,
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def planted_found() -> int:
    """How many of the planted bugs the sanitized emulation finds, under three orders each."""
    program, found = build.program("planted", sanitize=True), 0
    for bug, sign in BUGS.items():
        said = []
        for seed in (1, 2, 3):
            done = subprocess.run([program, bug, str(seed)], capture_output=True, text=True)
            said.append(f"{done.returncode} {done.stdout} {done.stderr}")
        found += all(sign in text for text in said)
    return found


def _rows(usages: list[matrix.Usage]) -> dict[tuple[str, str], list[matrix.Usage]]:
    rows: dict[tuple[str, str], list[matrix.Usage]] = {}
    for u in usages:
        rows.setdefault((u.kernel, u.dtype), []).append(u)
    return rows


def table(orders: int, archs: tuple[str, ...]) -> str:
    """One line per kernel and dtype, as Markdown."""
    emulator = build.Emulator(build.ops_library())
    ran, packed = run_cases(emulator, orders), run_packing(emulator, orders)
    clean = "clean" if run_sanitized(orders=2).returncode == 0 else "FAILED"
    bugs = f"{planted_found()} of {len(BUGS)}"
    nvcc = matrix.find_nvcc()
    usages = matrix.compile_all(nvcc, archs) if nvcc else []
    lines = [
        "| kernel | dtype | emulated cases | fiber orders | ASan, UBSan | planted bugs found "
        "| archs compiled | registers | shared memory, bytes | spilled, bytes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = _rows(usages) or {tuple(key.split(" ")): [] for key in matrix.budgets()}
    for (kernel, dtype), found in sorted(keys.items()):
        good, total = ran.get(dtype, packed)
        compiled = [
            ", ".join(u.arch for u in found) or "no nvcc",
            str(max((u.registers for u in found), default="-")),
            str(max((u.shared for u in found), default="-")),
            str(max((u.spilled for u in found), default="-")),
        ]
        cells = [kernel, dtype, f"{good} of {total}", f"1 + {orders}", clean, bugs, *compiled]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--orders", type=int, default=ORDERS, help="random orders per case")
    parser.add_argument("--archs", default=",".join(matrix.ARCHS), help="for nvcc")
    parser.add_argument("--only-cases", action="store_true", help="sanitized cases, no table")
    parser.add_argument("--overrun", action="store_true", help="first read out of bounds")
    options = parser.parse_args()
    if options.only_cases:
        emulator = build.Emulator(build.ops_library(sanitize=True))
        if options.overrun:
            overrun(emulator)
        ran = [*run_cases(emulator, options.orders).values(), run_packing(emulator, options.orders)]
        print(ran)
        return int(any(good != total for good, total in ran))
    print(table(options.orders, tuple(options.archs.split(","))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
