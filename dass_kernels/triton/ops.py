"""``torch.ops.dass`` on CUDA tensors: checks, a plan, and one launch each.

Under ``TRITON_INTERPRET=1`` the same functions run on CPU tensors. Where the plan says dense, the
op is torch's on the dense weight.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import _NAMES, _TORCH_ACTIVATIONS, _out_size
from . import kernels
from .plan import Plan, plan_for

_INT32_MAX = 2**31 - 1
UPCAST = False  # products in float32; the interpreter's product of bfloat16 is wrong


def _check(condition: bool, op: str, what: str) -> None:
    if not condition:
        raise RuntimeError(f"dass::{op}: {what}")


def _check_operands(op: str, pattern: Tensor, plan: Plan, values: Tensor | None, **tensors) -> None:
    floats = {"values": values, **tensors}
    floats = {name: t for name, t in floats.items() if t is not None}
    dtypes = {t.dtype for t in floats.values()}
    _check(len(dtypes) == 1, op, f"{', '.join(floats)} must have one dtype, got {dtypes}")
    places = {t.device for t in (pattern, *floats.values())}
    _check(len(places) == 1, op, f"all tensors must be on one device, got {places}")
    if values is not None:
        stored = int(plan.rows.indptr[-1]) * plan.rows.block
        good = values.dim() == 1 and values.size(0) == stored
        _check(good, op, f"values must be a vector of {stored} elements, as the pattern stores")
    if (bias := tensors.get("bias")) is not None:
        good = bias.dim() == 1 and bias.size(0) == plan.rows.outputs
        _check(good, op, f"bias must have {plan.rows.outputs} elements, one per output")


def _out_shape(op: str, spec: list[int], plan: Plan, shape: tuple) -> tuple[int, int, int, int]:
    """The output's shape for an input of ``shape``; checks both against the pattern."""
    _check(len(spec) == 12, op, f"spec must have 12 integers, got {len(spec)}")
    out, kh, kw, sh, sw, pt, pb, pl, pr, dh, dw, code = spec
    rows = plan.rows
    _check(min(sh, sw, dh, dw) > 0, op, "stride and dilation must be positive")
    _check(code in (0, *_NAMES), op, f"unknown activation code {code}")
    _check(
        out == rows.outputs and kh * kw == rows.taps,
        op,
        f"the pattern is of {rows.outputs} outputs and {rows.taps} taps, the spec of {out} outputs "
        f"and {kh} x {kw} taps",
    )
    _check(shape[1] == rows.channels, op, f"input has {shape[1]} channels, not {rows.channels}")
    oh, ow = _out_size(shape[2], kh, sh, pt, pb, dh), _out_size(shape[3], kw, sw, pl, pr, dw)
    _check(min(oh, ow) > 0, op, "the dilated kernel is larger than the padded input")
    return shape[0], out, oh, ow


def _device(t: Tensor):
    """Triton launches on the current device and its current stream."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def _precision(t: Tensor) -> str:
    """float32 in full, but where torch's own products may use TF32."""
    return "tf32" if t.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _small(*tensors: Tensor) -> bool:
    """Whether every place in every tensor is an int32."""
    spans = [
        sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 for t in tensors
    ]
    return max(spans) <= _INT32_MAX


def _image(x: Tensor, plan: Plan) -> Tensor:
    """The input as the kernel reads it best: blocks channel by channel, else pixel by pixel."""
    if plan.choice.kernel == "blocks":
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def _geometry(spec: list[int]) -> dict[str, int]:
    _, _, kw, sh, sw, pt, _, pl, _, dh, dw, _ = spec
    return {"KW": kw, "SH": sh, "SW": sw, "PT": pt, "PL": pl, "DH": dh, "DW": dw}


def _pointwise(spec: list[int]) -> bool:
    """1 x 1, stride 1, no padding: pixel p reads pixel p, however many rows there are."""
    return spec[1:9] == [1, 1, 1, 1, 0, 0, 0, 0]


def _launch(plan: Plan, pixels: int, across: int, size: int) -> tuple[tuple, dict]:
    tiles = plan.choice.tiles
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return (-(-pixels // size), across), {"STAGES": tiles.stages, "UPCAST": UPCAST, **options}


def _forward(plan, values, x, y, bias, residual, spec) -> None:
    """``y = act(W x + bias + residual)`` for images x and y; y and residual have equal strides."""
    panels, tiles = plan.panels, plan.choice.tiles
    n, _, oh, ow = y.shape
    grid, options = _launch(plan, n * oh * ow, panels.count, tiles.pixels)
    with _device(x):
        kernels.forward[grid](
            values, panels.first, panels.rows, panels.ptr, panels.columns, panels.entry,
            x, y, values if bias is None else bias, y if residual is None else residual,
            plan.rows.outputs, n * oh * ow, oh * ow, ow, x.size(2), x.size(3),
            *x.stride(), y.stride(0), y.stride(1), y.stride(3),
            R=panels.block, V=panels.height, TAPS=plan.rows.taps, **_geometry(spec),
            POINTWISE=_pointwise(spec), BLOCKED=panels.blocked, ACTIVATION=spec[-1],
            BIAS=bias is not None, RESIDUAL=residual is not None, BK=panels.depth,
            BN=tiles.pixels, PRECISION=_precision(x), **options,
        )  # fmt: skip


def _input_gradient(plan, values, grad, dx, spec) -> None:
    panels, tiles, t = plan.panels, plan.choice.tiles, plan.transposed
    n, _, h, w = dx.shape
    grid, options = _launch(plan, n * h * w, t.count, tiles.pixels)
    with _device(grad):
        kernels.input_gradient[grid](
            values, panels.first, panels.rows, t.channels, t.ptr, t.panel, t.tap, t.entry,
            grad, dx, plan.rows.outputs, plan.rows.channels, n * h * w, h * w, w,
            grad.size(2), grad.size(3), *grad.stride(), dx.stride(0), dx.stride(1), dx.stride(3),
            R=panels.block, V=panels.height, **_geometry(spec), POINTWISE=_pointwise(spec),
            BM=t.width, BN=tiles.pixels, PRECISION=_precision(grad), **options,
        )  # fmt: skip


def _weight_gradient(plan, grad, x, dv, spec) -> None:
    panels, tiles = plan.panels, plan.choice.tiles
    n, _, oh, ow = grad.shape
    _, options = _launch(plan, n * oh * ow, 1, tiles.chunk)
    with _device(grad):
        kernels.weight_gradient[(len(panels.owner),)](
            panels.first, panels.rows, panels.columns, panels.entry, panels.owner, grad, x, dv,
            plan.rows.outputs, n * oh * ow, oh * ow, ow, x.size(2), x.size(3),
            grad.stride(0), grad.stride(1), grad.stride(3), *x.stride(),
            R=panels.block, V=panels.height, TAPS=plan.rows.taps, **_geometry(spec),
            POINTWISE=_pointwise(spec), BLOCKED=panels.blocked, BK=panels.depth,
            BP=tiles.chunk, PRECISION=_precision(x), **options,
        )  # fmt: skip


def _scatter(values: Tensor, pattern: Tensor, shape: tuple) -> Tensor:
    """The dense weight; rows of a short last block that do not exist are left out."""
    place = _places(pattern)
    dense = values.new_zeros(math.prod(shape))
    return dense.index_copy(0, place[0], values[place[1]]).view(shape)


def _places(pattern: Tensor) -> tuple[Tensor, Tensor]:
    head = pattern[:16].tolist()
    flat = pattern[head[15] : head[15] + head[6] * head[1]].long()
    perm = pattern[head[12] : head[12] + head[7]].long()
    return flat[perm], perm


def _dense_shape(plan: Plan, spec: list[int]) -> tuple[int, int, int, int]:
    rows = plan.rows
    return rows.outputs, rows.channels // rows.groups, spec[1], spec[2]


def _padded(x: Tensor, spec: list[int]) -> Tensor:
    _, _, _, _, _, pt, pb, pl, pr, *_ = spec
    return F.pad(x, (pl, pr, pt, pb))


def _activate(y: Tensor, code: int) -> Tensor:
    return _TORCH_ACTIVATIONS[_NAMES[code]](y) if code else y


def conv2d(x, values, pattern, bias, residual, spec):
    plan = plan_for(pattern, x.dtype)
    _check(x.dim() == 4, "conv2d", f"input must be (N, C, H, W), got {x.dim()} dimensions")
    _check_operands("conv2d", pattern, plan, values, input=x, bias=bias, residual=residual)
    shape = _out_shape("conv2d", spec, plan, x.shape)
    same = residual is None or tuple(residual.shape) == shape
    _check(same, "conv2d", f"residual must have the shape of the output, {shape}")
    y = x.new_empty(shape)
    if plan.panels is None or not _small(x, y):
        weight = _scatter(values, pattern, _dense_shape(plan, spec))
        y = F.conv2d(
            _padded(x, spec), weight, bias, spec[3:5], 0, spec[9:11], groups=plan.rows.groups
        )
        return _activate(y if residual is None else y + residual, spec[-1]).contiguous()
    if y.numel():
        residual = None if residual is None else residual.contiguous()
        bias = None if bias is None else bias.contiguous()
        _forward(plan, values.contiguous(), _image(x, plan), y, bias, residual, spec)
    return y


def conv2d_dx(grad, values, pattern, spec, c, h, w):
    plan = plan_for(pattern, grad.dtype)
    _check_operands("conv2d_dx", pattern, plan, values, grad=grad)
    shape = _out_shape("conv2d_dx", spec, plan, (grad.size(0), c, h, w))
    _check(tuple(grad.shape) == shape, "conv2d_dx", f"grad must have the shape {shape}")
    dx = grad.new_empty((shape[0], c, h, w))
    if plan.transposed is None or not _small(grad, dx):
        _, _, _, _, _, pt, pb, pl, pr, *_ = spec
        weight = _scatter(values, pattern, _dense_shape(plan, spec))
        padded = (shape[0], c, h + pt + pb, w + pl + pr)
        full = torch.nn.grad.conv2d_input(
            padded, weight, grad, spec[3:5], 0, spec[9:11], plan.rows.groups
        )
        return full[:, :, pt : pt + h, pl : pl + w].contiguous()
    if dx.numel():
        _input_gradient(plan, values.contiguous(), _image(grad, plan), dx, spec)
    return dx


def conv2d_dw(grad, x, pattern, spec, count):
    plan = plan_for(pattern, x.dtype)
    _check(x.dim() == 4, "conv2d_dw", f"input must be (N, C, H, W), got {x.dim()} dimensions")
    _check_operands("conv2d_dw", pattern, plan, None, grad=grad, input=x)
    stored = int(plan.rows.indptr[-1]) * plan.rows.block
    _check(count == stored, "conv2d_dw", f"count must be {stored}, got {count}")
    shape = _out_shape("conv2d_dw", spec, plan, x.shape)
    _check(tuple(grad.shape) == shape, "conv2d_dw", f"grad must have the shape {shape}")
    dv = x.new_zeros(count)
    if plan.panels is None or not _small(grad, x):
        weight = _dense_shape(plan, spec)
        dense = torch.nn.grad.conv2d_weight(
            _padded(x, spec), weight, grad, spec[3:5], 0, spec[9:11], plan.rows.groups
        )
        place = _places(pattern)
        return dv.index_copy(0, place[1], dense.reshape(-1)[place[0]])
    if count and grad.numel():
        _weight_gradient(plan, grad.contiguous(), _image(x, plan), dv, spec)
    return dv


def _matrix_spec(outputs: int, activation: int = 0) -> list[int]:
    return [outputs, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, activation]


def _as_image(x: Tensor) -> Tensor:
    """``[B, I]`` as one image of I channels and B pixels, sharing memory."""
    return x.t()[None, :, None]


def _features(x: Tensor, plan: Plan) -> Tensor:
    """``[B, I]`` as an image laid out for the kernel; gathered columns want pixels innermost."""
    x = x.contiguous()
    if plan.choice.kernel == "column_vectors" and x.size(0) > 1:
        return x.t().contiguous()[None, :, None]
    return _as_image(x)


def linear(x, values, pattern, bias, outputs, activation):
    plan = plan_for(pattern, x.dtype)
    _check(x.dim() == 2, "linear", f"input must be (B, I), got {x.dim()} dimensions")
    _check_operands("linear", pattern, plan, values, input=x, bias=bias)
    spec = _matrix_spec(outputs, activation)
    _out_shape("linear", spec, plan, (1, x.size(1), 1, max(x.size(0), 1)))
    y = x.new_empty((x.size(0), outputs))
    if plan.panels is None or not _small(x, y):
        weight = _scatter(values, pattern, (outputs, x.size(1)))
        return _activate(F.linear(x, weight, bias), activation)
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        _forward(plan, values.contiguous(), _features(x, plan), _as_image(y), bias, None, spec)
    return y


def linear_dx(grad, values, pattern, inputs):
    plan = plan_for(pattern, grad.dtype)
    _check(grad.dim() == 2, "linear_dx", f"grad must be (B, O), got {grad.dim()} dimensions")
    _check_operands("linear_dx", pattern, plan, values, grad=grad)
    rows = plan.rows
    good = (grad.size(1), inputs) == (rows.outputs, rows.channels)
    _check(good, "linear_dx", f"the pattern is of {rows.outputs} x {rows.channels}")
    dx = grad.new_empty((grad.size(0), inputs))
    if plan.transposed is None or not _small(grad, dx):
        return grad @ _scatter(values, pattern, (grad.size(1), inputs))
    if dx.numel():
        spec = _matrix_spec(grad.size(1))
        _input_gradient(plan, values.contiguous(), _features(grad, plan), _as_image(dx), spec)
    return dx


def linear_dw(grad, x, pattern, count):
    plan = plan_for(pattern, x.dtype)
    _check(grad.dim() == 2 and x.dim() == 2, "linear_dw", "grad and input must be matrices")
    _check_operands("linear_dw", pattern, plan, None, grad=grad, input=x)
    rows = plan.rows
    stored = int(rows.indptr[-1]) * rows.block
    _check(count == stored, "linear_dw", f"count must be {stored}, got {count}")
    good = (grad.size(1), x.size(1)) == (rows.outputs, rows.channels)
    good = good and grad.size(0) == x.size(0)
    _check(good, "linear_dw", f"the pattern is of {rows.outputs} x {rows.channels}")
    dv = x.new_zeros(count)
    if plan.panels is None or not _small(grad, x):
        place = _places(pattern)
        return dv.index_copy(0, place[1], (grad.t() @ x).reshape(-1)[place[0]])
    if count and x.size(0):
        spec = _matrix_spec(grad.size(1))
        _weight_gradient(plan, _as_image(grad.contiguous()), _features(x, plan), dv, spec)
    return dv
