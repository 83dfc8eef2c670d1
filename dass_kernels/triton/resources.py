"""What the kernels compile to: registers, shared memory and spills on every architecture.

    python -m dass_kernels.triton.resources                       # the table
    python -m dass_kernels.triton.resources --arch sm_90 --dtype float16
    python -m dass_kernels.triton.resources --write tests/triton_budgets.csv

Compiles ahead of time with the ptxas that triton brings: no GPU and no driver. Arguments carry the
divisibility that they have at run time, without which loads would be of single elements. Nothing is
run and nothing is timed.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import kernels
from .heuristics import ARCHS, DTYPES, Tiles, tiles_for

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_WORDS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_FLOATS = ("values", "x", "y", "bias", "residual", "grad", "dx", "dv")
_INDICES = (
    "first",
    "rows",
    "ptr",
    "columns",
    "entry",
    "owner",
    "channels",
    "panel_of",
    "tap_of",
)
# A 3 x 3 convolution of stride 1, and what a product with a matrix is.
_WINDOW = {"TAPS": 9, "KW": 3, "SH": 1, "SW": 1, "PT": 1, "PL": 1, "DH": 1, "DW": 1}
_POINT = {"TAPS": 1, "KW": 1, "SH": 1, "SW": 1, "PT": 0, "PL": 0, "DH": 1, "DW": 1}


class Variant(NamedTuple):
    """One compiled kernel of the matrix."""

    op: str
    kernel: str
    pointwise: bool
    dtype: str
    arch: str

    @property
    def name(self) -> str:
        """As the table calls it: op, kernel and window."""
        return f"{self.op} {self.kernel} {'1x1' if self.pointwise else '3x3'}"


class Resources(NamedTuple):
    """What one takes: registers a thread, bytes of shared memory, bytes spilled a thread."""

    registers: int
    shared: int
    spills: int


def matrix(
    archs: Iterable[str] = tuple(ARCHS), dtypes: Iterable[str] = ("float16", "float32")
) -> list[Variant]:
    """Every op x kernel x window for some architectures and dtypes.

    bfloat16 is float16's code with other instructions of the same width: on request.
    """
    return [
        Variant(op, kernel, pointwise, dtype, arch)
        for op in ("forward", "input_gradient", "weight_gradient")
        for kernel in ("column_vectors", "blocks")
        for pointwise in (True, False)
        for dtype in dtypes
        for arch in archs
    ]


def tiles_of(variant: Variant) -> Tiles:
    """The shipped tiles for the tallest panel of the architecture."""
    dtype = getattr(torch, variant.dtype)
    depth = 64 if variant.kernel == "blocks" else 32
    return tiles_for(ARCHS[variant.arch].height, dtype, depth)


def _constants(variant: Variant, tiles: Tiles) -> dict:
    geometry = _POINT if variant.pointwise else _WINDOW
    constants = {
        **geometry, "R": 16, "V": tiles.height, "POINTWISE": variant.pointwise,
        "BLOCKED": variant.kernel == "blocks", "ACTIVATION": 1, "BIAS": True, "RESIDUAL": False,
        "BK": tiles.depth, "BN": tiles.pixels, "BM": tiles.width, "BP": tiles.chunk,
        "STAGES": tiles.stages, "PRECISION": "ieee", "UPCAST": False,
    }  # fmt: skip
    # A stride of 1 is compiled in, as at run time: in the tensor that is gathered the channel's
    # with blocks, else the pixel's; in the other one the pixel's.
    gathered, other = {
        "forward": ("sx", "syp"),
        "input_gradient": ("sg", "sxp"),
        "weight_gradient": ("sx", "sgp"),
    }[variant.op]
    channel = {"sx": "sxc", "sg": "sgo"}[gathered]
    ones = (channel if variant.kernel == "blocks" else f"{gathered}w", other)
    return {**constants, **dict.fromkeys(ones, 1)}


def source(variant: Variant) -> ASTSource:
    """The kernel with its types and constants, as a call at run time would specialise it."""
    kernel = getattr(kernels, variant.op)
    given = _constants(variant, tiles_of(variant))
    word = "*" + _WORDS[getattr(torch, variant.dtype)]
    signature, constants, attributes = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in given:
            signature[name], constants[name] = "constexpr", given[name]
            continue
        signature[name] = word if name in _FLOATS else "*i32" if name in _INDICES else "i32"
        # Pointers come from an allocator; sizes and strides are multiples of 16 in real layers.
        if name not in ("x_h", "x_w", "g_h", "g_w", "width"):
            attributes[(at,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_variant(variant: Variant):
    """Compiles one kernel for its architecture; triton's compiled kernel, with ``asm``."""
    tiles = tiles_of(variant)
    target = GPUTarget("cuda", int(variant.arch.removeprefix("sm_")), 32)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return triton.compile(source(variant), target=target, options=options)


def _run(tool: str, cubin: bytes, *arguments: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / tool), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def machine_code(compiled) -> str:
    """The instructions of a compiled kernel."""
    return _run("nvdisasm", compiled.asm["cubin"])


def resources(compiled) -> Resources:
    """Reads what a compiled kernel takes from its binary."""
    text = _run("cuobjdump", compiled.asm["cubin"], "-res-usage")
    found = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    return Resources(found["REG"], compiled.metadata.shared, found["STACK"] + found["LOCAL"])


def table(variants: Iterable[Variant]) -> Iterator[tuple[Variant, Resources]]:
    """Compiles each variant and yields it with what it takes."""
    for variant in variants:
        yield variant, resources(compile_variant(variant))


def write(path: str | Path, rows: Iterable[tuple[Variant, Resources]]) -> None:
    """Writes the table as the budgets that the tests hold every kernel to."""
    with open(path, "w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow([*Variant._fields, *Resources._fields])
        for variant, found in rows:
            out.writerow([*variant, *found])
            file.flush()


def read(path: str | Path) -> dict[Variant, Resources]:
    """Reads what :func:`write` wrote."""
    with open(path, newline="") as file:
        return {
            Variant(
                r["op"], r["kernel"], r["pointwise"] == "True", r["dtype"], r["arch"]
            ): Resources(*(int(r[f]) for f in Resources._fields))
            for r in csv.DictReader(file)
        }


def _print(rows: Iterable[tuple[Variant, Resources]]) -> None:
    """One line a kernel and dtype: what each architecture takes."""
    lines: dict[tuple[str, str], list] = {}
    for variant, found in rows:
        lines.setdefault((variant.name, variant.dtype), []).append((variant.arch, found))
    print("| kernel | dtype | compiled for | registers | shared memory, KiB | spilled, bytes |")
    print("|---|---|---|---|---|---|")
    for (name, dtype), cells in lines.items():
        archs = ", ".join(arch.removeprefix("sm_") for arch, _ in cells)
        columns = [
            ", ".join(str(found.registers) for _, found in cells),
            ", ".join(f"{found.shared / 1024:.4g}" for _, found in cells),
            ", ".join(str(found.spills) for _, found in cells),
        ]
        print(f"| {name} | {dtype} | {archs} | {' | '.join(columns)} |")


def main(argv: list[str] | None = None) -> int:
    words = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser = argparse.ArgumentParser(prog="python -m dass_kernels.triton.resources")
    parser.add_argument("--arch", action="append", choices=list(ARCHS))
    parser.add_argument("--dtype", action="append", choices=words)
    parser.add_argument("--write", metavar="FILE", help="write the budgets instead of printing")
    args = parser.parse_args(argv)
    rows = table(matrix(args.arch or tuple(ARCHS), args.dtype or ("float16", "float32")))
    if args.write:
        write(args.write, rows)
    else:
        _print(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
