"""Sparse layers that stand where nn.Conv2d and nn.Linear stood.

    conv = SparseConv2d.from_dense(conv, mask)      # the same Parameters, pruned to the mask

:mod:`dass.sparse_layer` has what they share: masks, gradients, what is cached.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.utils import _pair

from dass.sparse_layer import SparseLayer
from dass_kernels import build_pattern, choose_format, conv2d_values, conv_spec, linear_values

__all__ = ["SparseConv2d", "SparseLinear", "depthwise_suits_kernels"]

_FULL: dict[torch.Size, Tensor] = {}  # by shape of depthwise weights: a few, of few weights
_conv2d = torch.ops.dass.conv2d.default
_linear = torch.ops.dass.linear.default
# Under no_grad the op would still pass through its Python autograd kernel: 3 us for nothing.
_below_autograd = torch._C._AutoDispatchBelowAutograd


def depthwise_suits_kernels(channels: int, dilation: tuple[int, int]) -> bool:
    """Whether a dense depthwise convolution is faster on the kernels than in oneDNN, on a CPU.

    Dilated, or of fewer channels than a register holds: oneDNN has no fast backward pass for these.
    Forward and backward are 2 to 15 times as fast here (``python -m bench.bench_search``).
    """
    return 1 < channels < 16 or (channels > 1 and max(dilation) > 1)


class SparseConv2d(SparseLayer, nn.Conv2d):
    """nn.Conv2d whose pruned weights cost nothing: ``y = conv2d(x, w * mask) + bias``.

    The arguments, attributes and state dict keys of nn.Conv2d, and besides ``mask`` (and ``scores``
    while it is learned) two keyword arguments:

    Args:
        density: in (0, 1]. Below 1 the layer starts with the mask of its largest random weights.
        pattern: ``"unstructured"``, blocks (outputs x inputs) ``"4x1"``, ``"8x1"``, ``"16x1"``,
            ``"16x2"``, ``"32x2"``, or ``"2:4"`` and other n:m; what ``density`` and ``learn_mask``
            obey.

    x is ``(N, C, H, W)`` or ``(C, H, W)`` in any memory format; the result is contiguous (NCHW).
    Computed in float32 or float64; halves and autocast in float32, rounded once at the end.
    See :mod:`dass.sparse_layer` for what is cached and for the attributes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        density: float = 1.0,
        pattern: str = "unstructured",
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._start(density, pattern)

    def forward(self, input: Tensor) -> Tensor:
        if not is_compiling() and (hot := self._hot) is not None and not torch.is_grad_enabled():
            weight, counter, other, count, values, index, dtype, device, spec = hot
            parameters = self._parameters
            if (
                input.dtype is dtype
                and parameters.get("weight") is weight
                and counter._version + other._version == count
                and input.dim() == 4
                and not torch.is_autocast_enabled(device)
            ):
                if torch.is_inference_mode_enabled():
                    return _conv2d(input, values, index, parameters["bias"], None, spec)
                with _below_autograd():
                    return _conv2d(input, values, index, parameters["bias"], None, spec)
        return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        if self.scores is not None and self._suits_kernels() and not is_compiling():
            values, index = self.masked_weight().reshape(-1), self._full_index()
        elif not self.is_packed or self.scores is not None:
            return self._conv_forward(input, self.masked_weight(), self.bias)
        else:
            values, index = self._values(), self._index
        if self.padding_mode != "zeros":
            pads = self._reversed_padding_repeated_twice
            input = F.pad(input, pads, mode=self.padding_mode)
        return conv2d_values(input, values, index, self._constant(), self.bias)

    def _suits_kernels(self) -> bool:
        if not self.groups == self.in_channels == self.out_channels:
            return False
        return self.weight.is_cpu and depthwise_suits_kernels(self.groups, _pair(self.dilation))

    def _full_index(self) -> Tensor:
        """The indices of a mask that keeps all; the values are then the weight as it lies."""
        shape = self.weight.shape
        if shape not in _FULL:
            with torch.inference_mode(False), torch.no_grad():
                full = torch.ones(shape, dtype=torch.bool)
                _FULL[shape] = build_pattern(full, choose_format(full, self.groups), self.groups)
        return _FULL[shape]

    def _is_plain(self) -> bool:
        return self.padding_mode == "zeros"

    def _constant(self) -> list[int]:
        padding = self.padding if self.padding_mode == "zeros" else 0
        shape = self.weight.shape
        return conv_spec(shape, _pair(self.stride), padding, _pair(self.dilation))


class SparseLinear(SparseLayer, nn.Linear):
    """nn.Linear whose pruned weights cost nothing: ``y = x (w * mask)^T + bias``.

    As :class:`SparseConv2d`; ``x`` is ``(..., in_features)``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        density: float = 1.0,
        pattern: str = "unstructured",
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._start(density, pattern)

    def forward(self, input: Tensor) -> Tensor:
        if not is_compiling() and (hot := self._hot) is not None and not torch.is_grad_enabled():
            weight, counter, other, count, values, index, dtype, device, outputs = hot
            parameters = self._parameters
            if (
                input.dtype is dtype
                and parameters.get("weight") is weight
                and counter._version + other._version == count
                and input.dim() == 2
                and not torch.is_autocast_enabled(device)
            ):
                if torch.is_inference_mode_enabled():
                    return _linear(input, values, index, parameters["bias"], outputs, 0)
                with _below_autograd():
                    return _linear(input, values, index, parameters["bias"], outputs, 0)
        return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        if not self.is_packed or self.scores is not None:
            return F.linear(input, self.masked_weight(), self.bias)
        return linear_values(input, self._values(), self._index, self.weight.size(0), self.bias)

    def _is_plain(self) -> bool:
        return True

    def _constant(self) -> int:
        return self.weight.size(0)
