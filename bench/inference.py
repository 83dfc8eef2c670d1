"""Contests of single layers in inference, one function per group of figures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

import dass_kernels
from bench import cases
from bench.cases import Conv, Linear, Matrix
from bench.contest import Contest, Entry, NotAvailable, entries
from bench.layers import masked_layer, packed_constant, random_input, seed, sparse_layer
from dass.timing import dense_variants


def layer_contest(
    group: str,
    case: Conv | Linear,
    sparsity: float,
    batch: int | None = None,
    *,
    rows: int = 1,
    lanes: bool = False,
) -> Contest:
    """A sparse module in eager mode against every way torch has to run the dense layer.

    Args:
        batch: default: the case's own (Linear).
        rows: the mask is made of blocks of so many outputs.
        lanes: also the kernel on its own batch-innermost layout, where there is one.
    """
    batch = batch or case.batch
    layer, mask = masked_layer(case, sparsity, rows=rows)
    x = random_input(case, batch)
    sparse = sparse_layer(layer, mask)
    dense = dense_variants(layer, x)
    both, missing = {"module": Entry(lambda: sparse(x)), **entries(dense)}, ()
    try:
        if lanes:
            both["lanes"] = lanes_entry(sparse, x)
    except NotAvailable as reason:
        missing = (str(reason),)
    return Contest(
        group=group,
        kind=f"{rows}x1 {case.kind}" if rows > 1 else case.kind,
        label=case.label if batch == 1 else f"{case.label} b{batch}",
        sparsity=sparsity,
        entries=both,
        baselines={"dense": tuple(dense)},
        layout="NCHW" if isinstance(case, Conv) else "rows",
        missing=missing,
    )


def lanes_entry(sparse: nn.Module, x: Tensor) -> Entry:
    """The kernel on input and output in its own layout, conversions not counted."""
    lanes = dass_kernels.register_lanes()
    if x.size(0) % lanes:
        raise NotAvailable(f"own layout: batches must be multiples of {lanes}")
    packed, bias = packed_constant(sparse), sparse.bias.detach()
    inside = dass_kernels.to_lanes(x, sparse.padding)
    return Entry(lambda: dass_kernels.conv2d_lanes(inside, packed, bias), dass_kernels.from_lanes)


def conv1x1(sparsities: Iterable[float]) -> Iterator[Contest]:
    for case in cases.CONV1X1:
        for sparsity in sparsities:
            yield layer_contest("conv1x1", case, sparsity, 1)


def conv3x3(sparsities: Iterable[float]) -> Iterator[Contest]:
    for case in cases.CONV3X3:
        for sparsity in sparsities:
            yield layer_contest("conv3x3", case, sparsity, 1)


def conv3x3_b16(sparsities: Iterable[float]) -> Iterator[Contest]:
    for case in cases.CONV3X3_IMAGENET:
        for sparsity in sparsities:
            yield layer_contest("conv3x3_b16", case, sparsity, 16, lanes=True)


def linear(sparsities: Iterable[float]) -> Iterator[Contest]:
    for sparsity in sparsities:
        for case in cases.CONV1X1_SMALL:
            yield layer_contest("linear", case, sparsity, cases.CONV1X1_BATCH)
        for case in cases.LINEAR:
            yield layer_contest("linear", case, sparsity)


def blocks(sparsities: Iterable[float]) -> Iterator[Contest]:
    for rows in cases.BLOCK_ROWS:
        for sparsity in sparsities:
            for case in cases.BLOCK_CONV1X1:
                yield layer_contest("blocks", case, sparsity, cases.CONV1X1_BATCH, rows=rows)
            for case in cases.LINEAR:
                if case.outputs % rows == 0:
                    yield layer_contest("blocks", case, sparsity, rows=rows)


def dlmc(sparsities: Iterable[float], path=None) -> Iterator[Contest]:
    """Real masks: Y = W X with X dense [K, N], against torch.mm and torch's CSR (MKL)."""
    place = cases.dlmc_path(path)
    if place is None:
        raise NotAvailable("no DLMC matrices: give --dlmc PATH or set DASS_DLMC")
    for sparsity in sparsities:
        for matrix in cases.dlmc_matrices(place, sparsity):
            yield matrix_contest(matrix, sparsity)


def matrix_contest(matrix: Matrix, sparsity: float) -> Contest:
    """Also against the same product as a 1x1 convolution, for which oneDNN packs weights."""
    generator = seed(matrix.name, sparsity)
    mask = matrix.mask()
    weight = torch.randn(matrix.shape, generator=generator).masked_fill_(~mask, 0)
    x = torch.randn(matrix.shape[1], matrix.columns, generator=generator)
    packed = dass_kernels.pack(weight, mask, "csr")
    indptr, indices = torch.from_numpy(matrix.indptr), torch.from_numpy(matrix.indices)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state"
        csr = torch.sparse_csr_tensor(indptr, indices, weight[mask], matrix.shape)
    conv = nn.Conv2d(matrix.shape[1], matrix.shape[0], 1, bias=False)
    conv.weight = nn.Parameter(weight[:, :, None, None])
    convs = {f"conv {k}": f for k, f in dense_variants(conv, x[None, :, None]).items()}
    return Contest(
        group="dlmc",
        kind="spmm",
        label=matrix.label,
        sparsity=sparsity,
        entries={
            "spmm": Entry(lambda: dass_kernels.spmm(packed, x)),
            "mm": Entry(lambda: torch.mm(weight, x)),
            "csr": Entry(lambda: torch.mm(csr, x)),
            **entries(convs, lambda y: y[0, :, 0]),
        },
        baselines={"mm": ("mm",), "csr": ("csr",), "dense": ("mm", *convs)},
        layout="row-major",
    )


def threads(sparsities: Iterable[float]) -> Iterator[Contest]:
    """The same sparse layer with two threads and with one; short layers do not count."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores < 2:
        raise NotAvailable("this process may use one core only")
    rows = [(case, 1) for case in cases.CONV1X1 + cases.CONV3X3]
    rows += [(case, 16) for case in cases.CONV3X3_IMAGENET]
    for case, batch in rows:
        for sparsity in sparsities:
            yield thread_contest(case, sparsity, batch)


def thread_contest(case: Conv | Linear, sparsity: float, batch: int) -> Contest:
    layer, mask = masked_layer(case, sparsity)
    sparse, x = sparse_layer(layer, mask), random_input(case, batch)
    kind = case.kind if batch == 1 else f"{case.kind} b{batch}"
    return two_threads(lambda: sparse(x), kind, f"{case.label} b{batch}", sparsity)


def two_threads(call: Callable[[], Tensor], kind: str, label: str, sparsity: float) -> Contest:
    """One call on two threads and on one, which must give the same bits."""

    def with_threads(count: int) -> Entry:
        return Entry(call, setup=lambda: torch.set_num_threads(count))

    return Contest(
        group="threads",
        kind=kind,
        label=label,
        sparsity=sparsity,
        entries={"two": with_threads(2), "one": with_threads(1)},
        baselines={"one thread": ("one",)},
        threads=2,
        tolerance=0.0,
    )
