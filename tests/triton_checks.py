"""The Triton kernels against float64, on the CPU: run by test_triton.py under TRITON_INTERPRET=1.

The interpreter hides reads and writes outside of a tensor, so every tensor a kernel sees lies
between bands: of NaN, or of a place far away where it holds indices.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dass
import dass_kernels as dk
from dass_kernels import testing
from dass_kernels.testing import randn, random_mask
from dass_kernels.triton import ops
from dass_kernels.triton.heuristics import Tiles, forced
from dass_kernels.triton.plan import build_plan, plan_for

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/test_triton.py"

BAND = 4096
FAR = 1 << 28  # as an index: far outside of every tensor here
SMALL = Tiles(16, depth=16, pixels=16, width=16, chunk=16)
TALL = Tiles(32, depth=16, pixels=32, width=16, chunk=32)
DLMC = Path(__file__).resolve().parents[2] / "shared" / "data" / "dlmc" / "dlmc_rn50_magnitude.npz"


class Banded:
    """A copy of a tensor, its strides too, with a band before and one behind."""

    def __init__(self, source: Tensor):
        self.band = torch.nan if source.is_floating_point() else FAR
        self.whole = torch.full((source.numel() + 2 * BAND,), self.band, dtype=source.dtype)
        self.tensor = self.whole[BAND:].as_strided(source.shape, source.stride(), BAND)
        self.tensor.copy_(source)
        self.count = source.numel()

    def check(self, what: str) -> None:
        for part in (self.whole[:BAND], self.whole[BAND + self.count :]):
            good = part.isnan() if part.is_floating_point() else part == FAR
            assert bool(good.all()), f"written outside of {what}"


class Case(NamedTuple):
    """A convolution: shapes, geometry and what the kernel is given."""

    kernel: str
    tiles: Tiles
    weight: tuple
    x: tuple
    format: str = "16x1"
    density: float = 0.4
    geometry: dict = {}  # noqa: RUF012
    groups: int = 1
    activation: str | None = None
    bias: bool = True
    residual: bool = False


def block_mask(shape, height, depth, density, seed=0):
    outputs, channels, *kernel = shape
    coarse = random_mask((outputs // height, channels // depth, *kernel), density, seed=seed)
    return coarse.repeat_interleave(height, 0).repeat_interleave(depth, 1)


def mask_of(case: Case) -> Tensor:
    """The case's mask; with blocks of 16 x 16, and with an empty row and column elsewhere."""
    if case.kernel == "blocks":
        return block_mask(case.weight, 16, 16, case.density)
    mask = random_mask(case.weight, case.density, case.format, seed=1)
    mask[:, 0] = False
    if case.format == "csr":
        mask[1] = False
    return mask


CASES = {
    "strided": Case(
        "column_vectors", SMALL, (37, 5, 3, 3), (2, 5, 7, 6), geometry={"stride": 2, "padding": 1}
    ),
    "grouped, dilated, padded unevenly": Case(
        "column_vectors", SMALL, (16, 3, 2, 3), (1, 6, 6, 9), "4x1", groups=2, residual=True,
        geometry={"padding": (1, 0), "dilation": (2, 1), "stride": (1, 3)}, activation="relu6",
    ),
    "tall panels, K no multiple of a step": Case(
        "column_vectors", TALL, (48, 9, 1, 3), (1, 9, 3, 7), activation="relu", residual=True
    ),
    "unstructured": Case("column_vectors", SMALL, (5, 4, 2, 2), (1, 4, 4, 5), "csr"),
    "pointwise": Case(
        "column_vectors", SMALL, (20, 19, 1, 1), (3, 19, 5, 1), "4x1", activation="hardswish"
    ),
    "one pixel": Case("column_vectors", SMALL, (16, 21, 1, 1), (1, 21, 1, 1), bias=False),
    "all pruned": Case("column_vectors", SMALL, (16, 3, 3, 3), (1, 3, 4, 4), density=0),
    "blocks": Case(
        "blocks", SMALL, (32, 32, 3, 3), (1, 32, 4, 3), density=0.3, geometry={"padding": 1}
    ),
    "strided blocks": Case(
        "blocks", SMALL, (16, 32, 1, 2), (2, 32, 3, 5), residual=True, activation="relu",
        geometry={"stride": (2, 1)},
    ),
    "pointwise blocks": Case("blocks", SMALL, (32, 48, 1, 1), (1, 48, 3, 7), density=0.5),
}  # fmt: skip


class Run:
    """A case's operands, its kernels' results in ``dtype`` and the same in float64."""

    def __init__(self, case: Case, dtype: torch.dtype):
        self.case, self.mask = case, mask_of(case)
        # The interpreter cuts bfloat16 off where a GPU rounds: its results are kept in float32.
        self.out = torch.float32 if dtype == torch.bfloat16 else dtype
        self.weight = randn(*case.weight, dtype=dtype)
        self.x = randn(*case.x, dtype=dtype, seed=2)
        self.packed = dk.pack(self.weight, self.mask, case.format, case.groups)
        g = {"stride": 1, "padding": 0, "dilation": 1, **case.geometry}
        self.spec = dk.conv_spec(case.weight, **g, activation=case.activation)
        self.conv = {**g, "groups": case.groups}
        shape = self.dense(self.weight.double(), self.x.double()).shape
        self.bias = randn(case.weight[0], dtype=dtype, seed=3) if case.bias else None
        self.residual = randn(*shape, dtype=dtype, seed=4) if case.residual else None
        self.grad = randn(*shape, dtype=dtype, seed=5)
        with forced(case.kernel, case.tiles):
            self.plan = build_plan(self.packed.pattern, dtype)
        index = {}
        for part in ("panels", "transposed"):
            old = getattr(self.plan, part)
            fields = {f.name: getattr(old, f.name) for f in dataclasses.fields(old)}
            new = {k: Banded(v).tensor for k, v in fields.items() if isinstance(v, Tensor)}
            index[part] = dataclasses.replace(old, **new)
        self.plan = dataclasses.replace(self.plan, **index)

    def dense(self, weight: Tensor, x: Tensor) -> Tensor:
        return F.conv2d(x, weight * self.mask, None, **self.conv)

    def image(self, t: Tensor) -> Tensor:
        return Banded(ops._image(t, self.plan)).tensor

    def forward(self) -> Tensor:
        y = Banded(torch.full_like(self.grad, torch.nan, dtype=self.out))
        bias, residual, values = (
            None if t is None else Banded(t).tensor
            for t in (self.bias, self.residual, self.packed.values)
        )
        ops._forward(self.plan, values, self.image(self.x), y.tensor, bias, residual, self.spec)
        y.check("y")
        return y.tensor

    def input_gradient(self) -> Tensor:
        dx = Banded(torch.full_like(self.x, torch.nan, dtype=self.out))
        values = Banded(self.packed.values).tensor
        ops._input_gradient(self.plan, values, self.image(self.grad), dx.tensor, self.spec)
        dx.check("dx")
        return dx.tensor

    def weight_gradient(self) -> Tensor:
        dv = Banded(torch.zeros_like(self.packed.values, dtype=self.out))
        grad = Banded(self.grad).tensor
        ops._weight_gradient(self.plan, grad, self.image(self.x), dv.tensor, self.spec)
        dv.check("dv")
        return dv.tensor

    def exact(self, absolute: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(y before bias and activation, dx, dw) in float64, or of absolute values."""
        w, x, g = (
            t.double().abs() if absolute else t.double() for t in (self.weight, self.x, self.grad)
        )
        w, x = w.requires_grad_(), x.requires_grad_()
        y = self.dense(w, x)
        dx, dw = torch.autograd.grad(y, (x, w), g)
        return y.detach(), dx, dw


def assert_close(got: Tensor, want: Tensor, size: Tensor, length: int, what: str) -> None:
    """Sums of ``length`` products in float32, then one rounding to the dtype of ``got``."""
    info = torch.finfo(got.dtype)
    slack = info.smallest_normal * info.eps if got.dtype == torch.float16 else 0
    bound = testing.tolerance(torch.float32, length) * size + info.eps / 2 * want.abs() + slack
    testing.assert_within(got, want, bound * (1 + 2**-10), what)


def check(case: Case, dtype: torch.dtype) -> None:
    run = Run(case, dtype)
    y, dx, dw = run.exact()
    size, dx_size, dw_size = run.exact(absolute=True)
    for extra, shape in ((run.bias, (-1, 1, 1)), (run.residual, run.grad.shape)):
        if extra is not None:
            y, size = y + extra.double().view(shape), size + extra.double().abs().view(shape)
    bound = testing.forward_bound(torch.float32, 9 * 48, size, case.activation)
    if case.activation:
        y = {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish}[case.activation](y)
    bound = bound + torch.finfo(run.out).eps / 2 * (y.abs() + bound) + 2**-25
    testing.assert_within(run.forward(), y, bound, "y")
    assert_close(run.input_gradient(), dx, dx_size, 9 * 48, "dx")
    dv, perm = run.weight_gradient(), run.packed.perm.long()
    place = run.packed.flat.long()[perm]
    assert_close(dv[perm], dw.reshape(-1)[place], dw_size.reshape(-1)[place], y.numel(), "dw")
    unused = torch.ones(len(dv), dtype=torch.bool).index_fill(0, perm, False)
    assert bool((dv[unused] == 0).all()), "a place that holds no weight has a gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name, dtype):
    check(CASES[name], dtype)


@pytest.mark.parametrize("name", ["strided", "blocks"])
def test_bfloat16_multiplied_in_float32(name, monkeypatch):
    monkeypatch.setattr(ops, "UPCAST", True)
    check(CASES[name], torch.bfloat16)


def test_the_check_finds_a_wrong_entry(monkeypatch):
    run = Run(CASES["strided"], torch.float32)
    run.plan.panels.columns[0] += 1
    y, *_ = run.exact()
    size, *_ = run.exact(absolute=True)
    with pytest.raises(AssertionError, match="elements wrong"):
        bias = run.bias.double().view(-1, 1, 1)
        assert_close(run.forward(), y + bias, size + bias.abs(), 432, "y")


def test_bands_find_a_read_and_a_write_outside():
    run = Run(CASES["one pixel"], torch.float32)
    run.plan = dataclasses.replace(run.plan, rows=dataclasses.replace(run.plan.rows, outputs=17))
    run.plan.panels.rows[0] = 1  # outputs 1 to 16 of 16
    with pytest.raises(AssertionError, match="written outside of y"):
        run.forward()
    run = Run(CASES["one pixel"], torch.float32)
    run.plan.panels.columns[0] = 21  # the channel behind the last
    assert bool(run.forward().isnan().any())


def test_pruned_inputs_may_be_nan():
    run = Run(CASES["strided"], torch.float32)
    run.x[:, 0] = torch.nan  # no kept weight reads channel 0
    assert not bool(run.forward().isnan().any())
    run.x[:, 1] = torch.nan
    assert bool(run.forward().isnan().any())


@pytest.fixture
def interpreted():
    """torch.ops.dass on CPU tensors runs the functions that are registered for CUDA."""
    library = torch.library.Library("dass", "IMPL")
    for name in ("conv2d", "conv2d_dx", "conv2d_dw", "linear", "linear_dx", "linear_dw"):
        library.impl(name, getattr(ops, name), "CPU", allow_override=True)
    with forced("column_vectors", SMALL):
        yield
    library._destroy()


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.usefixtures("interpreted")
class TestThroughTheOps:
    def test_linear(self):
        weight, mask = testing.random_weight((20, 19), 0.4, "16x1")
        for rows in (1, 7):
            x, bias = randn(rows, 19, seed=4), randn(20, seed=5)
            testing.check_linear(x, weight, mask, bias, format="16x1", activation="relu")

    def test_linear_in_blocks(self):
        mask = block_mask((32, 32), 16, 16, 0.5)
        with forced("blocks", SMALL):
            testing.check_linear(randn(3, 32), randn(32, 32), mask, format="16x1")

    def test_conv2d(self):
        weight, mask = testing.random_weight((18, 3, 3, 3), 0.4, "4x1")
        x = randn(1, 3, 5, 4).contiguous(memory_format=torch.channels_last)
        testing.check_conv2d(x, weight, mask, randn(18), format="4x1", padding="same")

    def test_spmm(self):
        weight, mask = testing.random_weight((17, 18), 0.4, "16x1")
        packed = dk.pack(weight, mask, "16x1")
        for shape in ((18, 1), (18, 5), (2, 18, 3), (18, 0)):
            x = randn(*shape)
            want = (weight * mask).double() @ x.double()
            size = (weight * mask).double().abs() @ x.double().abs()
            assert_close(dk.spmm(packed, x), want, size, 18, f"spmm of {shape}")

    def test_empty_batches(self):
        packed = dk.pack(*testing.random_weight((17, 18), 0.4, "16x1"), "16x1")
        x = torch.empty(0, 18, requires_grad=True)
        y = dk.linear(x, packed)
        assert y.shape == (0, 17)
        y.sum().backward()
        assert x.grad.shape == (0, 18)

    def test_opcheck(self):
        weight, mask = testing.random_weight((16, 3, 1, 3), 0.4, "16x1")
        packed = dk.pack(weight, mask, "16x1")
        values = packed.values.detach().requires_grad_()
        x, grad = randn(1, 3, 2, 5).requires_grad_(), randn(1, 16, 2, 3).requires_grad_()
        spec = dk.conv_spec(packed.shape, 1, 0, 1)
        o, pattern = torch.ops.dass, packed.pattern
        args = (x, values, pattern, randn(16).requires_grad_(), None, spec)
        torch.library.opcheck(o.conv2d.default, args)
        torch.library.opcheck(o.conv2d_dx.default, (grad, values, pattern, spec, 3, 2, 5))
        torch.library.opcheck(o.conv2d_dw.default, (grad, x, pattern, spec, len(values)))

    def test_a_compiled_layer_trains(self):
        conv = dass.SparseConv2d(4, 16, 3, padding=1, density=0.4, pattern="16x1")
        run = torch.compile(conv, fullgraph=True, backend="aot_eager")
        x = randn(1, 4, 3, 5).requires_grad_()
        run(x).square().sum().backward()
        got = [t.grad.clone() for t in (x, conv.weight, conv.bias)]
        for t in (x, conv.weight, conv.bias):
            t.grad = None
        F.conv2d(x, conv.masked_weight(), conv.bias, padding=1).square().sum().backward()
        for ours, t in zip(got, (x, conv.weight, conv.bias), strict=True):
            torch.testing.assert_close(ours, t.grad)

    def test_second_derivatives(self):
        packed = dk.pack(*testing.random_weight((16, 5), 0.4, "16x1"), "16x1")
        values = packed.values.detach().requires_grad_()
        x = randn(2, 5).requires_grad_()
        y = dk.linear(x, packed.with_values(values)).square().sum()
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        got = torch.autograd.grad(dx.square().sum(), (x, values))
        dense = packed.to_dense().detach().requires_grad_()
        (dx,) = torch.autograd.grad(F.linear(x, dense).square().sum(), x, create_graph=True)
        want = torch.autograd.grad(dx.square().sum(), (x, dense))
        torch.testing.assert_close(got[0], want[0])
        perm = packed.perm.long()
        torch.testing.assert_close(got[1][perm], want[1].reshape(-1)[packed.flat.long()[perm]])

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"x": randn(1, 4, 5, 5)}, "input has 4 channels, not 3"),
            ({"x": randn(3, 5, 5)}, "3 dimensions"),
            ({"x": randn(1, 3, 2, 2)}, "larger than the padded input"),
            ({"bias": randn(15)}, "bias must have 16 elements"),
            ({"bias": randn(16).double()}, "must have one dtype"),
            ({"residual": randn(1, 16, 3, 4)}, "residual must have the shape"),
            ({"values": randn(3)}, "values must be a vector of"),
            ({"spec": [16, 3, 3, 1, 1, 0, 0, 0, 0, 1, 1]}, "spec must have 12 integers"),
            ({"spec": [16, 3, 3, 0, 1, 0, 0, 0, 0, 1, 1, 0]}, "must be positive"),
            ({"spec": [16, 3, 3, 1, 1, 0, 0, 0, 0, 1, 1, 9]}, "unknown activation code 9"),
            ({"spec": [16, 5, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0]}, "16 outputs and 9 taps"),
        ],
    )
    def test_what_does_not_fit_is_named(self, change, says):
        weight, mask = testing.random_weight((16, 3, 3, 3), 0.4, "16x1")
        packed = dk.pack(weight, mask, "16x1")
        args = {"x": randn(1, 3, 5, 5), "values": packed.values, "pattern": packed.pattern}
        args |= {"bias": None, "residual": None, "spec": dk.conv_spec(packed.shape, 1, 0, 1)}
        with pytest.raises(RuntimeError, match=says):
            torch.ops.dass.conv2d(*(args | change).values())


def test_dense_fallback():
    """Unstructured and narrow, so the plan is dense: the ops are torch's, with our contract."""
    weight, mask = testing.random_weight((6, 2, 3, 2), 0.3)
    packed = dk.pack(weight, mask, "csr", groups=2)
    assert plan_for(packed.pattern, torch.float32).choice.kernel == "dense"
    spec = dk.conv_spec(weight.shape, (2, 1), "valid", (1, 2))
    spec[5:9] = [1, 0, 2, 1]  # paddings top, bottom, left, right
    x, bias = randn(2, 4, 6, 7).double().requires_grad_(), randn(6).double()
    w = weight.double().requires_grad_()
    padded = F.pad(x, (2, 1, 1, 0))
    want = F.conv2d(padded, w * mask, bias, (2, 1), 0, (1, 2), groups=2)
    residual, grad = randn(*want.shape).double(), randn(*want.shape).double()
    dx, dw = torch.autograd.grad(want, (x, w), grad)
    values, pattern = packed.values.double(), packed.pattern
    x = x.detach()
    got = ops.conv2d(x, values, pattern, bias, residual, [*spec[:-1], 1])
    torch.testing.assert_close(got, (want + residual).relu())
    torch.testing.assert_close(ops.conv2d_dx(grad, values, pattern, spec, 4, 6, 7), dx)
    dv = ops.conv2d_dw(grad, x, pattern, spec, len(values))
    torch.testing.assert_close(dv, dw.reshape(-1)[packed.flat.long()])


def test_dense_fallback_of_linear():
    weight, mask = testing.random_weight((6, 5), 0.3)
    packed = dk.pack(weight, mask)
    x, grad, dense = randn(3, 5), randn(3, 6), weight * mask
    torch.testing.assert_close(
        ops.linear(x, packed.values, packed.pattern, None, 6, 1), (x @ dense.t()).relu()
    )
    torch.testing.assert_close(ops.linear_dx(grad, packed.values, packed.pattern, 5), grad @ dense)
    dv = ops.linear_dw(grad, x, packed.pattern, len(packed.values))
    torch.testing.assert_close(dv, (grad.t() @ x).reshape(-1)[packed.flat.long()])


def test_a_changed_pattern_gets_a_new_plan():
    first, second = (random_mask((32, 16), 0.3, "16x1", seed=s) for s in (1, 2))
    packed = dk.pack(torch.ones(32, 16), first, "16x1")
    other = dk.pack(torch.ones(32, 16), second, "16x1").pattern
    plan = plan_for(packed.pattern, torch.float32)
    assert plan_for(packed.pattern, torch.float32) is plan
    assert plan_for(packed.pattern[:], torch.float32) is plan  # the same memory
    assert packed.pattern.shape == other.shape
    packed.pattern.copy_(other)
    changed = plan_for(packed.pattern, torch.float32)
    assert changed is not plan and changed.rows.columns.tolist() != plan.rows.columns.tolist()


def test_patterns_of_freed_memory_are_not_confused():
    for seed in range(50):
        mask = random_mask((32, 16), 0.3, "16x1", seed=seed)
        packed = dk.pack(torch.ones(32, 16), mask, "16x1")
        rows = plan_for(packed.pattern, torch.float32).rows
        assert rows.columns.tolist() == packed.indices.tolist()
        del packed


@pytest.mark.parametrize("sparsity", ["0.8", "0.95"])
def test_a_corner_of_a_pruned_resnet(sparsity):
    """Rows of a 3 x 3 layer of ResNet-50, pruned by magnitude (DLMC), else random ones."""
    if DLMC.exists():
        z = np.load(DLMC)
        at = next(i for i, n in enumerate(z["layers"]) if n.startswith("bottleneck_2"))
        layer = z["layers"][at]
        indptr, indices = (z[f"{sparsity}/{layer}/{k}"] for k in ("indptr", "indices"))
        full = torch.zeros(tuple(map(int, z["shapes"][at])), dtype=torch.bool)
        for row in range(len(indptr) - 1):
            full[row, torch.from_numpy(indices[indptr[row] : indptr[row + 1]].astype(np.int64))] = (
                True
            )
        mask = full.view(len(full), 3, 3, -1).permute(0, 3, 1, 2)[:8, :16]
    else:
        mask = random_mask((8, 16, 3, 3), 1 - float(sparsity), seed=6)
    case = Case("column_vectors", SMALL, tuple(mask.shape), (1, 16, 4, 4), "csr")
    weight, x = randn(*mask.shape), randn(*case.x, seed=1)
    packed = dk.pack(weight, mask.contiguous(), "csr")
    spec = dk.conv_spec(packed.shape, 1, 1, 1)
    with forced(case.kernel, case.tiles):
        y = ops.conv2d(x, packed.values, packed.pattern, None, None, spec)
    dense = (weight * mask).double()
    want = F.conv2d(x.double(), dense, padding=1)
    size = F.conv2d(x.double().abs(), dense.abs(), padding=1)
    assert_close(y, want, size, 144, "y")
