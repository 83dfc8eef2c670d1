"""Every kernel of the table on real layer shapes, in pytest-benchmark's tables.

    pytest bench/bench_ops.py                                    a subset, about a minute
    pytest bench/bench_ops.py --full --benchmark-json=ops.json   the zoo's shapes, every ISA
    pytest bench/bench_ops.py --dlmc PATH -k matrix              the DLMC matrices

A benchmark's group is one result, so that its table ranks the kernels and torch's dense op that
give it. pytest-benchmark times one function after the other: for ratios take `bench.figures`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dass_kernels
from bench import cases
from bench.cases import Conv, Linear
from bench.contest import check, difference
from bench.inference import matrix_contest
from bench.layers import random_input, random_mask, seed
from dass.timing import threads

OPS = ("forward", "dx", "dw")
DTYPES = {"f32": torch.float32, "f64": torch.float64}
TOLERANCE = {"f32": 5e-4, "f64": 1e-10}  # of dW, which has the longest sums
# The ops that run a kernel family, which is the first word of its name in the table. The dense ones
# run in compiled networks only.
FAMILIES = {"spmm": ("forward", "dx"), "sddmm": ("dw",), "gemv": ("forward",)}

QUICK = (
    (cases.CONV1X1[4], 1),
    (cases.CONV1X1[13], 1),
    (cases.CONV3X3[1], 1),
    (cases.CONV3X3[2], 16),
    (cases.LINEAR[3], 64),
    (Linear(1, 2048, 1000), 1),
)
NETWORKS = ("mobilenet_v2_imagenet", "resnet18_imagenet", "resnet50", "resnet18")


@dataclass(frozen=True)
class Row:
    """One benchmark: a kernel format on an instruction set (None: torch's dense op), on one result.

    rows: outputs per block of the mask, 1 for an unstructured one.
    """

    case: Conv | Linear
    batch: int
    sparsity: float
    op: str
    dtype: str
    rows: int = 1
    format: str | None = None
    isa: str | None = None

    @property
    def group(self) -> str:
        mask = f" {self.rows}x1-blocks" if self.rows > 1 else ""
        shape = f"{self.case.label} b{self.batch}{mask}"
        return f"{shape} {self.sparsity:.0%} {self.dtype} {self.op}"

    def __str__(self) -> str:
        kernel = f"{self.format} {self.isa}" if self.format else "dense"
        return f"{self.group} {kernel}".replace(" ", "_")


def kernels(isa: str) -> set[tuple[str, str, str]]:
    """(op, format, dtype) of what an instruction set has kernels for."""
    return {
        (op, "csr" if format == "bits" else format, dtype)
        for _, family, format, dtype, _ in dass_kernels._C.kernel_table(isa)
        if format != "dense"
        for op in FAMILIES.get(family.split("_")[0], ())
    }


def table(full: bool) -> Iterator[Row]:
    """What is measured, the rows of one result together."""
    isas = [dass_kernels.active_isa()]
    if full:
        isas = [isa for isa in dass_kernels.available_isas() if isa != "scalar"]
    for case, batch in _zoo() if full else QUICK:
        for sparsity in cases.SPARSITIES if full else (0.9,):
            for op in OPS if batch > 1 else ("forward",):
                yield from _rivals(case, batch, sparsity, op, "f32", isas)
    for op in OPS:
        yield from _rivals(*QUICK[0], 0.9, op, "f64", isas)


def _zoo() -> Iterator[tuple[Conv | Linear, int]]:
    for case in dict.fromkeys(case for name in NETWORKS for case in cases.zoo_layers(name)):
        yield case, 1
        yield case, 16


def _rivals(case, batch, sparsity, op, dtype, isas) -> Iterator[Row]:
    for rows in (1, *cases.BLOCK_ROWS):
        format = "csr" if rows == 1 else f"{rows}x1"
        able = [isa for isa in isas if (op, format, dtype) in kernels(isa)]
        whole = case.outputs // getattr(case, "groups", 1) % rows == 0
        if not able or not whole or (op == "dx" and rows > 1):
            continue  # the transpose, which dX runs on, is stored by single rows
        yield Row(case, batch, sparsity, op, dtype, rows)
        for isa in able:
            yield Row(case, batch, sparsity, op, dtype, rows, format, isa)


class Problem:
    """The tensors of one result, and the functions that compute it, dense and sparse."""

    def __init__(self, row: Row):
        self.row, self.dtype = row, DTYPES[row.dtype]
        layer, generator = row.case.module(bias=False), seed(row.case, row.sparsity, row.rows)
        shape = tuple(layer.weight.shape)
        self.mask = random_mask(shape, row.sparsity, generator, row.rows)
        weight = torch.randn(shape, generator=generator).masked_fill_(~self.mask, 0)
        self.weight = weight.to(self.dtype)
        self.x = random_input(row.case, row.batch).to(self.dtype)
        self.is_conv, self.options = isinstance(row.case, Conv), {}
        if self.is_conv:
            names = ("stride", "padding", "dilation", "groups")
            self.options = {name: getattr(layer, name) for name in names}
        y = self._forward()
        self.grad = torch.randn(y.shape, generator=generator).to(self.dtype)

    def _forward(self) -> Tensor:
        if self.is_conv:
            return F.conv2d(self.x, self.weight, None, **self.options)
        return F.linear(self.x, self.weight)

    def dense(self) -> Callable[[], Tensor]:
        x, weight, grad, options = self.x, self.weight, self.grad, self.options
        if self.is_conv:
            return {
                "forward": self._forward,
                "dx": lambda: torch.nn.grad.conv2d_input(x.shape, weight, grad, **options),
                "dw": lambda: torch.nn.grad.conv2d_weight(x, weight.shape, grad, **options),
            }[self.row.op]
        return {"forward": self._forward, "dx": lambda: grad @ weight, "dw": lambda: grad.T @ x}[
            self.row.op
        ]

    def sparse(self) -> Callable[[], Tensor]:
        format = self.row.format or "csr"
        packed = dass_kernels.pack(self.weight, self.mask, format, self.options.get("groups", 1))
        self.packed = packed
        ops, x, grad = torch.ops.dass, self.x, self.grad
        values, pattern, count = packed.values, packed.pattern, len(packed.values)
        if self.is_conv:
            names = ("stride", "padding", "dilation")
            spec = dass_kernels.conv_spec(packed.shape, *(self.options[name] for name in names))
            return {
                "forward": lambda: ops.conv2d(x, values, pattern, None, None, spec),
                "dx": lambda: ops.conv2d_dx(grad, values, pattern, spec, *x.shape[1:]),
                "dw": lambda: ops.conv2d_dw(grad, x, pattern, spec, count),
            }[self.row.op]
        outputs, inputs = self.weight.shape
        return {
            "forward": lambda: ops.linear(x, values, pattern, None, outputs, 0),
            "dx": lambda: ops.linear_dx(grad, values, pattern, inputs),
            "dw": lambda: ops.linear_dw(grad, x, pattern, count),
        }[self.row.op]

    def error(self, result: Tensor) -> float:
        """Of a sparse result, against the dense one; a weight gradient counts where kept."""
        want = self.dense()()
        if self.row.op == "dw":
            result = self.packed.with_values(result).to_dense()
            want = want.masked_fill(~self.mask, 0)
        return difference([result], [want])


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    if "row" in metafunc.fixturenames:
        metafunc.parametrize("row", list(table(option("full"))), ids=str)
    if "matrix" in metafunc.fixturenames:
        place = cases.dlmc_path(option("dlmc"))
        sparsities = cases.SPARSITIES if option("full") else (0.9,)
        found = [
            (matrix, sparsity)
            for sparsity in (sparsities if place else ())
            for matrix in cases.dlmc_matrices(place, sparsity)
        ]
        names = [f"{sparsity}-{matrix.name}" for matrix, sparsity in found]
        metafunc.parametrize("matrix, sparsity", found, ids=names)


@pytest.fixture(autouse=True)
def _settings():
    isa = dass_kernels.active_isa()
    with torch.inference_mode(), threads(1):
        yield
    dass_kernels.set_isa(isa)


@pytest.mark.benchmark(max_time=0.2, min_rounds=5)
def test_kernel(benchmark, row):
    benchmark.group = row.group
    with torch.inference_mode(False):
        problem = Problem(row)
    if row.format is None:
        benchmark(problem.dense())
        return
    dass_kernels.set_isa(row.isa)
    run = problem.sparse()
    assert problem.error(run()) <= TOLERANCE[row.dtype]
    benchmark.extra_info.update(nnz=problem.packed.nnz, flops=row.batch * row.case.flops)
    benchmark(run)


@pytest.mark.benchmark(max_time=0.2, min_rounds=5)
@pytest.mark.parametrize("entry", ["spmm", "mm", "csr"])
def test_matrix(benchmark, matrix, sparsity, entry):
    benchmark.group = f"{matrix.label} {sparsity:.0%} spmm"
    with torch.inference_mode(False):
        contest = matrix_contest(matrix, sparsity)
        check(contest)
    benchmark(contest.entries[entry].run)
