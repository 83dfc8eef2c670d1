"""One function per operation of torch: what it is in the graph.

Each takes the builder, the exported node and the operation's own arguments, in which tensors of the
graph are `Value` and constants Tensor, and returns a `Value` (or several, for what returns
several). It raises `NoStep` where the graph has no node for these arguments.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from dass.engine.builder import Builder, NoStep, Value
from dass.engine.geometry import output_size
from dass.engine.graph import Act, Add, Affine, Concat, Conv, Flatten, Linear, Mean, Mul
from dass.engine.windows import adaptive_avg_pool2d, avg_pool2d, max_pool2d, pair


def _conv2d(
    b: Builder, node: fx.Node, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1
) -> Value:
    if not isinstance(x, Value) or isinstance(weight, Value) or isinstance(bias, Value):
        raise NoStep("its weight is computed from the input")
    stride, dilation, kernel = pair(stride), pair(dilation), tuple(weight.shape[2:])
    if isinstance(padding, str):
        sides = _named_padding(padding, kernel, dilation)
    else:
        sides = tuple(side for side in pair(padding) for _ in range(2))
    weight = weight.double()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.double()
    if len(x.shape) == 1 and kernel == (1, 1) and groups == 1 and not any(sides):
        return b.add(Linear, node, [x], (len(weight),), weight.flatten(1), bias)
    x = b.pad(node, x, sides)
    if x.step != (1, 1) or x.channels is not None:
        x = b.pad(node, b.plain(node, replace(x, padding=_less(x.padding, sides))), sides)
    shape = (len(weight), *output_size(x.shape[1:], kernel, stride, x.padding, dilation))
    return b.add(
        Conv, node, [x], shape, weight, bias,
        stride=stride, padding=x.padding, dilation=dilation, groups=groups,
    )  # fmt: skip


def _less(a, b):
    return tuple(x - y for x, y in zip(a, b, strict=True))


def _named_padding(word: str, kernel, dilation) -> tuple[int, ...]:
    """ "same" pads the odd one after, "valid" nothing."""
    total = [d * (k - 1) if word == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    return tuple(side for t in total for side in (t // 2, t - t // 2))


def _linear(b, node, x, weight, bias=None) -> Value:
    if isinstance(weight, Value) or isinstance(bias, Value):
        raise NoStep("its weight is computed from the input")
    if len(b.logical(node)) != 1:
        raise NoStep("it takes vectors [B, K] alone")
    weight = weight.double()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.double()
    return b.add(Linear, node, [b.vector(node, x)], (len(weight),), weight, bias)


def _batch_norm(b, node, x, weight, bias, mean, var, training, momentum, eps, cudnn) -> Value:
    if training or mean is None:
        raise NoStep("it normalises by its batch")
    scale = (var.double() + eps).rsqrt()
    scale = scale if weight is None else scale * weight.double()
    offset = -mean.double() * scale
    return _affine(b, node, x, scale, offset if bias is None else offset + bias.double())


def _affine(b, node, x, scale: Tensor, bias: Tensor) -> Value:
    x = b.plain(node, x)
    return b.add(Affine, node, [x], x.shape, scale, bias)


def _act(word: str):
    def translate(b, node, x) -> Value:
        x = b.plain(node, x)
        return b.add(Act, node, [x], x.shape, word)

    return translate


def _clamp(b, node, x, low=None, high=None) -> Value:
    words = {(0, 6): "relu6", (0, None): "relu"}
    if (low, high) not in words:
        raise NoStep(f"it clamps to {low}..{high}")
    return _act(words[low, high])(b, node, x)


def _hardtanh(b, node, x, low=-1, high=1) -> Value:
    return _clamp(b, node, x, low, high)


def _factor(b, node, x: Value, other) -> Tensor:
    """A number or constant as one factor per channel."""
    dims, channels = len(b.logical(node)), x.shape[0]
    if not isinstance(other, Tensor):
        return torch.full((channels,), float(other), dtype=torch.float64)
    shape = [*other.shape]
    if other.numel() == 1 and len(shape) <= dims + 1:
        return other.double().reshape(1).expand(channels).clone()
    shape = shape[1:] if len(shape) == dims + 1 and shape[0] == 1 else shape
    if shape != [channels, *[1] * (dims - 1)]:
        raise NoStep(f"a constant of shape {list(other.shape)} that is not one value per channel")
    return other.double().reshape(channels)


def _shifted(b, node, x, other, sign: float, own: float) -> Value:
    """own * x + sign * other, other being constant."""
    x = b.plain(node, x)
    other = _factor(b, node, x, other) * sign
    return _affine(b, node, x, torch.full_like(other, own), other)


def _add(b, node, a, other, alpha=1) -> Value:
    if isinstance(a, Value) and isinstance(other, Value):
        if alpha != 1:
            raise NoStep(f"alpha is {alpha}")
        a, other = _alike(b, node, a, other)
        if a.shape != other.shape:
            raise NoStep(f"it adds shapes {a.shape} and {other.shape}")
        return b.add(Add, node, [a, other], a.shape)
    if isinstance(a, Value):
        return _shifted(b, node, a, other, alpha, 1)
    return _shifted(b, node, other, a, 1, alpha)


def _sub(b, node, a, other, alpha=1) -> Value:
    if isinstance(a, Value) and isinstance(other, Value):
        raise NoStep("it subtracts one computed tensor from another")
    if isinstance(a, Value):
        return _shifted(b, node, a, other, -alpha, 1)
    return _shifted(b, node, other, a, 1, -alpha)


def _rsub(b, node, a, other, alpha=1) -> Value:
    return _sub(b, node, other, a, alpha)


def _mul(b, node, a, other) -> Value:
    if isinstance(a, Value) and isinstance(other, Value):
        a, other = _alike(b, node, a, other)
        if len(a.shape) < len(other.shape):
            a, other = other, a
        if len(a.shape) == 3 and other.shape == (a.shape[0], 1, 1):
            other = b.vector(node, other)
        if other.shape not in (a.shape, a.shape[:1]):
            raise NoStep(f"it multiplies shapes {a.shape} and {other.shape}")
        return b.add(Mul, node, [a, other], a.shape)
    a, other = (a, other) if isinstance(a, Value) else (other, a)
    a = b.plain(node, a)
    scale = _factor(b, node, a, other)
    return _affine(b, node, a, scale, torch.zeros_like(scale))


def _div(b, node, a, other) -> Value:
    if isinstance(other, Value):
        raise NoStep("it divides by a computed tensor")
    a = b.plain(node, a)
    scale = 1 / _factor(b, node, a, other)
    return _affine(b, node, a, scale, torch.zeros_like(scale))


def _alike(b, node, *values: Value) -> list[Value]:
    """Plain values, vectors if one is a vector and all have one pixel."""
    ranks = {len(b.logical(arg)) for arg in node.all_input_nodes}
    if len(ranks) > 1:
        raise NoStep("its tensors have different numbers of dimensions")
    values = [b.plain(node, value) for value in values]
    shapes = [value.shape for value in values]
    if any(len(s) == 1 for s in shapes) and all(len(s) == 1 or s[1:] == (1, 1) for s in shapes):
        return [b.vector(node, value) for value in values]
    return values


def _cat(b, node, values, dim=0) -> Value:
    logical = b.logical(node)
    if dim % (len(logical) + 1) != 1 or not all(isinstance(value, Value) for value in values):
        raise NoStep("it joins other things than the channels of computed tensors")
    values = _alike(b, node, *values)
    channels = sum(value.shape[0] for value in values)
    return b.add(Concat, node, values, (channels, *values[0].shape[1:]))


def _mean(b, node, x, dims=None, keepdim=False, dtype=None) -> Value:
    if len(x.shape) != 3 or dims is None or sorted(dim % 4 for dim in dims) != [2, 3]:
        raise NoStep("it is not the mean over the pixels")
    x = b.plain(node, x)
    return b.add(Mean, node, [x], x.shape[:1])


def _reshape(b, node, x, *args) -> Value:
    """Views of the same shape, of vectors as pictures of one pixel and back, and flattening."""
    shape, source = b.logical(node), b.logical(node.args[0])
    if shape == source:
        return x
    if len(x.shape) == 1 and shape[:1] == x.shape and all(size == 1 for size in shape[1:]):
        return x
    if len(shape) == 1 and source[0] * source[1] * source[2] == shape[0]:
        x = b.plain(node, x)
        return x if x.shape == shape else b.add(Flatten, node, [x], shape)
    raise NoStep(f"it makes {shape} of {source}")


def _same(b, node, x, *args, **kwargs) -> Value:
    """What changes nothing in eval mode, on one device and in one dtype."""
    b.logical(node)
    return x


def _copy(b, node, x, *args, **kwargs) -> Value:
    """The same numbers in memory of their own."""
    return replace(_same(b, node, x))


def _dropout(b, node, x, p, train) -> Value:
    if train:
        raise ValueError(f"{node.name} drops at random: call model.eval() first")
    return x


def _slice(b, node, x, dim=0, start=None, end=None, step=1) -> Value:
    logical = b.logical(node.args[0])
    dim %= len(logical) + 1
    if b.logical(node) == logical:
        return x
    if len(logical) != 3 or len(x.shape) != 3 or dim == 0:
        raise NoStep("it slices something else than a picture")
    start, end, step = (*slice(start, end).indices(logical[dim - 1])[:2], step)
    if dim == 1:
        channels = x.channels or tuple(range(x.shape[0]))
        return replace(x, channels=channels[start:end:step])
    sides = (-start, end - logical[dim - 1])
    x = b.pad(node, x, (*sides, 0, 0) if dim == 2 else (0, 0, *sides))
    high, wide = x.step
    return replace(x, step=(high * step, wide) if dim == 2 else (high, wide * step))


def _pad(b, node, x, pad, mode="constant", value=None) -> Value:
    if mode != "constant" or value or len(b.logical(node)) != 3 or len(pad) > 6:
        raise NoStep(f"it pads by {mode}, value {value}")
    left, right, top, bottom, first, last = (*pad, *[0] * (6 - len(pad)))
    if any((left, right, top, bottom)):
        x = b.pad(node, x, (top, bottom, left, right))
    if first or last:
        x = x if len(x.shape) == 3 else b.picture(node, x)
        channels = x.channels or tuple(range(x.shape[0]))
        channels = channels[max(0, -first) : len(channels) - max(0, -last)]
        x = replace(x, channels=(-1,) * max(0, first) + channels + (-1,) * max(0, last))
    return x


def _split(b, node, x, sizes, dim=0) -> list[Value]:
    total = b.logical(node.args[0])[0]
    if dim % 4 != 1 or len(x.shape) != 3:
        raise ValueError(f"{node.target} of other things than channels: not supported")
    if isinstance(sizes, int):
        sizes = [min(sizes, total - at) for at in range(0, total, sizes)]
    channels, at, parts = x.channels or tuple(range(x.shape[0])), 0, []
    for size in sizes:
        parts.append(replace(x, channels=channels[at : at + size]))
        at += size
    return parts


def _chunk(b, node, x, chunks, dim=0) -> list[Value]:
    return _split(b, node, x, -(-b.logical(node.args[0])[0] // chunks), dim)


def _zeros_like(b, node, x, **kwargs) -> Value:
    x = b.plain(node, x)
    zeros = torch.zeros(x.shape[0], dtype=torch.float64)
    return _affine(b, node, x, zeros, zeros.clone())


# Operations whose result may be their input itself although the schema does not say so.
ALIASES = {
    "aten.dropout.default", "aten.feature_dropout.default", "aten.contiguous.default",
    "aten.flatten.using_ints", "aten.reshape.default", "aten.to.dtype",
}  # fmt: skip

_ACTS = ("relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid")
_SAMES = ("contiguous.default", "detach.default", "detach_.default", "alias.default", "to.dtype")
_VIEWS = (
    "view.default", "reshape.default", "flatten.using_ints", "squeeze.dim", "squeeze.dims",
    "squeeze.default", "unsqueeze.default", "_unsafe_view.default",
)  # fmt: skip

STEPS = {
    "aten.conv2d.default": _conv2d,
    "aten.conv2d.padding": _conv2d,
    "aten.linear.default": _linear,
    "aten.batch_norm.default": _batch_norm,
    **{f"aten.{word}{tail}.default": _act(word) for word in _ACTS for tail in ("", "_")},
    **{f"aten.hardtanh{tail}.default": _hardtanh for tail in ("", "_")},
    **{f"aten.clamp{tail}.default": _clamp for tail in ("", "_")},
    **{f"aten.clamp_min{tail}.default": _clamp for tail in ("", "_")},
    **{f"aten.add{tail}.Tensor": _add for tail in ("", "_")},
    **{f"aten.sub{tail}.Tensor": _sub for tail in ("", "_")},
    "aten.rsub.Scalar": _rsub,
    **{f"aten.mul{tail}.Tensor": _mul for tail in ("", "_")},
    **{f"aten.div{tail}.Tensor": _div for tail in ("", "_")},
    "aten.max_pool2d.default": max_pool2d,
    "aten.avg_pool2d.default": avg_pool2d,
    "aten.adaptive_avg_pool2d.default": adaptive_avg_pool2d,
    "aten.mean.dim": _mean,
    "aten.cat.default": _cat,
    "aten.slice.Tensor": _slice,
    "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": lambda b, node, x, pad, value=0: _pad(
        b, node, x, pad, value=value
    ),
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    "aten.chunk.default": _chunk,
    "aten.zeros_like.default": _zeros_like,
    **{f"aten.{name}": _reshape for name in _VIEWS},
    **{f"aten.{name}": _same for name in _SAMES},
    "aten.clone.default": _copy,
    **{f"aten.{name}.default": _dropout for name in ("dropout", "dropout_", "feature_dropout")},
}
