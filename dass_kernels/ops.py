"""The differentiable ops: ``conv2d``, ``linear`` and ``spmm`` with a sparse weight.

Gradients flow to the input, the kept values and the bias. With ``W`` the sparse weight,

    Y = W X            dX = W^T dY            dW = (dY X^T) on the mask

so dX is the same kernel on the stored transpose and dW a sampled dense-dense product. Every
backward is made of these ops again, which gives second derivatives in eager mode.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import Packed

ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2, "hardswish": 3}
_TORCH_ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish}
_NAMES = {code: name for name, code in ACTIVATIONS.items()}
_HALVES = (torch.float16, torch.bfloat16)

_ops = torch.ops.dass


def _out_size(size, kernel, stride, before, after, dilation):
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


@torch.library.register_fake("dass::conv2d")
def _(x, values, pattern, bias, residual, spec):
    out, kh, kw, sh, sw, pt, pb, pl, pr, dh, dw, _ = spec
    oh = _out_size(x.size(2), kh, sh, pt, pb, dh)
    ow = _out_size(x.size(3), kw, sw, pl, pr, dw)
    return x.new_empty((x.size(0), out, oh, ow))


@torch.library.register_fake("dass::conv2d_lanes")
def _(x, values, pattern, bias, spec):
    out, kh, kw, _, _, _, _, _, _, dh, dw, _ = spec
    oh = _out_size(x.size(2), kh, 1, 0, 0, dh)
    ow = _out_size(x.size(3), kw, 1, 0, 0, dw)
    return x.new_empty((x.size(0), out, oh, ow, x.size(4)))


@torch.library.register_fake("dass::conv2d_dx")
def _(grad, values, pattern, spec, c, h, w):
    return grad.new_empty((grad.size(0), c, h, w))


@torch.library.register_fake("dass::conv2d_dw")
def _(grad, x, pattern, spec, count):
    return x.new_empty((count,))


@torch.library.register_fake("dass::linear")
def _(x, values, pattern, bias, outputs, activation):
    return x.new_empty((x.size(0), outputs))


@torch.library.register_fake("dass::linear_dx")
def _(grad, values, pattern, inputs):
    return grad.new_empty((grad.size(0), inputs))


@torch.library.register_fake("dass::linear_dw")
def _(grad, x, pattern, count):
    return x.new_empty((count,))


def _activation_grad(grad: Tensor, pre: Tensor, code: int) -> Tensor:
    """grad times the derivative of the activation at ``pre``."""
    if code == 1:
        return grad * (pre > 0)
    if code == 2:
        return grad * ((pre > 0) & (pre < 6))
    slope = torch.where(pre.abs() < 3, (2 * pre + 3) / 6, (pre >= 3).to(pre.dtype))
    return grad * slope


def _save_first(count):
    def setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:count])
        ctx.rest = inputs[count:]

    return setup


def _conv2d_setup(ctx, inputs, output):
    x, values, pattern, bias, residual, spec = inputs
    ctx.save_for_backward(x, values, pattern, bias, residual)
    ctx.spec = list(spec)


def _conv2d_backward(ctx, grad):
    x, values, pattern, bias, residual = ctx.saved_tensors
    spec, code = ctx.spec, ctx.spec[-1]
    if code:
        # The wrapper never fuses where a gradient is asked for; a direct call pays a forward more.
        spec = [*spec[:-1], 0]
        grad = _activation_grad(grad, _ops.conv2d(x, values, pattern, bias, residual, spec), code)
    dx = dv = db = dr = None
    if ctx.needs_input_grad[0]:
        dx = _ops.conv2d_dx(grad, values, pattern, spec, x.size(1), x.size(2), x.size(3))
    if ctx.needs_input_grad[1]:
        dv = _ops.conv2d_dw(grad, x, pattern, spec, values.size(0))
    if bias is not None and ctx.needs_input_grad[3]:
        db = grad.sum((0, 2, 3))
    if residual is not None and ctx.needs_input_grad[4]:
        dr = grad
    return dx, dv, None, db, dr, None


def _conv2d_dx_backward(ctx, gg):
    grad, values, pattern = ctx.saved_tensors
    spec = list(ctx.rest[0])
    dg = dv = None
    if ctx.needs_input_grad[0]:
        dg = _ops.conv2d(gg, values, pattern, None, None, spec)
    if ctx.needs_input_grad[1]:
        dv = _ops.conv2d_dw(grad, gg, pattern, spec, values.size(0))
    return dg, dv, None, None, None, None, None


def _conv2d_dw_backward(ctx, gv):
    grad, x, pattern = ctx.saved_tensors
    spec = list(ctx.rest[0])
    dg = dx = None
    if ctx.needs_input_grad[0]:
        dg = _ops.conv2d(x, gv, pattern, None, None, spec)
    if ctx.needs_input_grad[1]:
        dx = _ops.conv2d_dx(grad, gv, pattern, spec, x.size(1), x.size(2), x.size(3))
    return dg, dx, None, None, None


def _linear_setup(ctx, inputs, output):
    x, values, pattern, bias, outputs, activation = inputs
    ctx.save_for_backward(x, values, pattern, bias)
    ctx.outputs, ctx.activation = outputs, activation


def _linear_backward(ctx, grad):
    x, values, pattern, bias = ctx.saved_tensors
    if ctx.activation:
        pre = _ops.linear(x, values, pattern, bias, ctx.outputs, 0)
        grad = _activation_grad(grad, pre, ctx.activation)
    dx = dv = db = None
    if ctx.needs_input_grad[0]:
        dx = _ops.linear_dx(grad, values, pattern, x.size(1))
    if ctx.needs_input_grad[1]:
        dv = _ops.linear_dw(grad, x, pattern, values.size(0))
    if bias is not None and ctx.needs_input_grad[3]:
        db = grad.sum(0)
    return dx, dv, None, db, None, None


def _linear_dx_backward(ctx, gg):
    grad, values, pattern = ctx.saved_tensors
    dg = dv = None
    if ctx.needs_input_grad[0]:
        dg = _ops.linear(gg, values, pattern, None, grad.size(1), 0)
    if ctx.needs_input_grad[1]:
        dv = _ops.linear_dw(grad, gg, pattern, values.size(0))
    return dg, dv, None, None


def _linear_dw_backward(ctx, gv):
    grad, x, pattern = ctx.saved_tensors
    dg = dx = None
    if ctx.needs_input_grad[0]:
        dg = _ops.linear(x, gv, pattern, None, grad.size(1), 0)
    if ctx.needs_input_grad[1]:
        dx = _ops.linear_dx(grad, gv, pattern, x.size(1))
    return dg, dx, None, None


for _name, _backward, _setup in (
    ("conv2d", _conv2d_backward, _conv2d_setup),
    ("conv2d_dx", _conv2d_dx_backward, _save_first(3)),
    ("conv2d_dw", _conv2d_dw_backward, _save_first(3)),
    ("linear", _linear_backward, _linear_setup),
    ("linear_dx", _linear_dx_backward, _save_first(3)),
    ("linear_dw", _linear_dw_backward, _save_first(3)),
):
    torch.library.register_autograd(f"dass::{_name}", _backward, setup_context=_setup)


def activation_code(activation: str | None) -> int:
    """The number the ops know an activation by; raises ValueError for an unknown name."""
    try:
        return ACTIVATIONS[activation]
    except (KeyError, TypeError):
        raise ValueError(
            f"activation must be None, 'relu', 'relu6' or 'hardswish', got {activation!r}"
        ) from None


def _pair(value, name: str) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) == 1:
        pair *= 2
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise ValueError(f"{name} must be an int or a pair of ints, got {value!r}")
    return pair


def conv_spec(weight_shape, stride, padding, dilation, activation=None) -> list[int]:
    """The integers the conv ops take: outputs, kernel, stride, four paddings, dilation, activation.

    ``padding`` is an int, a pair, ``"same"`` or ``"valid"``. Raises ValueError as F.conv2d does.
    """
    out, _, kh, kw = weight_shape
    (sh, sw), (dh, dw) = _pair(stride, "stride"), _pair(dilation, "dilation")
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be ints, 'same' or 'valid', got {padding!r}")
        total = (dh * (kh - 1), dw * (kw - 1)) if padding == "same" else (0, 0)
        if padding == "same" and (sh, sw) != (1, 1):
            raise ValueError("padding='same' is not supported for strided convolutions")
        pt, pl = total[0] // 2, total[1] // 2
        pb, pr = total[0] - pt, total[1] - pl
    else:
        pt, pl = _pair(padding, "padding")
        pb, pr = pt, pl
    if min(sh, sw, dh, dw) < 1:
        raise ValueError(f"stride and dilation must be positive, got {stride!r} and {dilation!r}")
    if min(pt, pl) < 0:
        raise ValueError(f"padding must not be negative, got {padding!r}")
    if max(sh, sw, dh, dw, pt, pl) >= 2**31:  # products of two must not overflow
        raise ValueError(
            f"stride, padding and dilation must be below 2^31, got {stride!r}, {padding!r} and "
            f"{dilation!r}"
        )
    return [out, kh, kw, sh, sw, pt, pb, pl, pr, dh, dw, activation_code(activation)]


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _with_float(call, x: Tensor, values: Tensor, bias: Tensor | None, residual=None):
    """Runs ``call`` in a dtype the kernels have, and returns what torch's dense op would.

    Halves are computed in float32 and rounded once: on a CPU from copies, on a GPU inside the
    kernels. Under autocast every operand may come in its own dtype and the result has autocast's.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        out = torch.get_autocast_dtype(x.device.type)
        inside = out if x.is_cuda else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            args = [t if t is None else t.to(inside) for t in (x, values, bias, residual)]
            return call(*args).to(out)
    if x.dtype != values.dtype:
        raise ValueError(f"input and weight must have one dtype, got {x.dtype} and {values.dtype}")
    if x.dtype in _HALVES and not x.is_cuda:
        args = [t if t is None else t.float() for t in (x, values, bias, residual)]
        return call(*args).to(x.dtype)
    if x.dtype not in (torch.float32, torch.float64, *_HALVES):
        raise ValueError(f"input must be float32, float64, float16 or bfloat16, got {x.dtype}")
    return call(x, values, bias, residual)


def conv2d_values(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    spec: list[int],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """:func:`conv2d` on the parts of a packed weight: what layers and traced graphs call."""
    if x.dim() == 3:
        y = conv2d_values(
            x[None], values, pattern, spec, bias, None if residual is None else residual[None]
        )
        return y.squeeze(0)
    if x.dim() != 4:
        raise ValueError(f"input must be (N, C, H, W) or (C, H, W), got {x.dim()} dimensions")
    code = spec[-1]
    fuse = code == 0 or not _wants_grad(x, values, bias, residual)
    plain = spec if fuse else [*spec[:-1], 0]

    def call(x, values, bias, residual):
        y = _ops.conv2d(x, values, pattern, bias, residual, plain)
        return y if fuse else _TORCH_ACTIVATIONS[_NAMES[code]](y)

    return _with_float(call, x, values, bias, residual)


def linear_values(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    outputs: int,
    bias: Tensor | None = None,
    code: int = 0,
) -> Tensor:
    """:func:`linear` on the parts of a packed weight: what layers and traced graphs call."""
    fuse = code == 0 or not _wants_grad(x, values, bias)
    lead = x.shape[:-1]

    def call(x, values, bias, _):
        flat = x if x.dim() == 2 else x.reshape(math.prod(lead), x.size(-1))
        y = _ops.linear(flat, values, pattern, bias, outputs, code if fuse else 0)
        y = y if fuse else _TORCH_ACTIVATIONS[_NAMES[code]](y)
        return y if x.dim() == 2 else y.reshape(*lead, outputs)

    return _with_float(call, x, values, bias)


def conv2d(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Sparse 2-d convolution: ``act(conv(x, W) + bias + residual)``.

    Args:
        x: ``(N, C, H, W)`` or ``(C, H, W)``, any strides; float32, float64, or a half (computed in
            float32, rounded once).
        packed: weight ``[O, C / groups, kh, kw]`` from :func:`dass_kernels.pack`, of x's dtype.
        bias: ``[O]`` or None.
        stride, dilation: int or pair.
        padding: int, pair, ``"same"`` (stride 1) or ``"valid"``; zeros.
        groups: groups of channels.
        activation: None, ``"relu"``, ``"relu6"`` or ``"hardswish"``, applied last.
        residual: tensor of the output's shape, added before the activation.

    Returns:
        ``(N, O, H', W')`` (or unbatched) contiguous tensor of x's dtype.

    Raises:
        ValueError: an argument of the wrong kind, named. RuntimeError: shapes that do not fit.
    """
    _check_packed(packed, 4)
    if groups != packed.groups:
        packed = packed.with_groups(groups)
    packed.validate()
    spec = conv_spec(packed.shape, stride, padding, dilation, activation)
    return conv2d_values(x, packed.values, packed.pattern, spec, bias, residual)


def linear(
    x: Tensor, packed: Packed, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Sparse linear map: ``act(x W^T + bias)``.

    Args:
        x: ``(..., I)``, float32, float64 or a half (computed in float32, rounded once).
        packed: weight ``[O, I]`` from :func:`dass_kernels.pack`, of x's dtype.
        bias: ``[O]`` or None.
        activation: None, ``"relu"``, ``"relu6"`` or ``"hardswish"``.

    Returns:
        ``(..., O)`` tensor of x's dtype.
    """
    _check_packed(packed, 2)
    packed.validate()
    if x.dim() < 1 or x.size(-1) != packed.shape[1]:
        raise ValueError(
            f"input must end in {packed.shape[1]} features, got shape {tuple(x.shape)}"
        )
    code = activation_code(activation)
    return linear_values(x, packed.values, packed.pattern, packed.shape[0], bias, code)


def spmm(packed: Packed, x: Tensor) -> Tensor:
    """Sparse matrix times dense matrix: ``Y = W X``.

    Args:
        packed: ``[O, I]``.
        x: ``[I, N]`` or ``[B, I, N]``, of the weight's dtype.

    Returns:
        ``[O, N]`` or ``[B, O, N]``.
    """
    _check_packed(packed, 2)
    packed.validate()
    if x.dim() not in (2, 3) or x.size(-2) != packed.shape[1]:
        raise ValueError(
            f"x must be [{packed.shape[1]}, N] or [B, {packed.shape[1]}, N], got {tuple(x.shape)}"
        )
    if x.dim() == 2 and x.size(1) == 1:  # one column is a vector, and linear has a kernel for it
        return linear_values(x.t(), packed.values, packed.pattern, packed.shape[0]).t()
    spec = [packed.shape[0], 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0]
    image = x[None, :, None] if x.dim() == 2 else x[:, :, None]
    if x.size(-1) == 0:  # an image without pixels is an error, a matrix without columns is not
        image = F.pad(image, (0, 1))
    y = conv2d_values(image, packed.values, packed.pattern, spec)
    y = y[..., :0] if x.size(-1) == 0 else y
    return y[0, :, 0] if x.dim() == 2 else y[:, :, 0]


def _check_packed(packed: Packed, dims: int) -> None:
    if not isinstance(packed, Packed):
        raise ValueError(f"packed must come from dass_kernels.pack, got {type(packed).__name__}")
    if len(packed.shape) != dims:
        kind = "[O, I / groups, kh, kw]" if dims == 4 else "[O, I]"
        raise ValueError(f"packed must be {kind}, got shape {tuple(packed.shape)}")
