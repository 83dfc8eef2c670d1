"""What every sparse layer has: a mask, learned or frozen, and what is derived from it.

A layer is in one of two states. **Frozen** (``scores is None``): the mask is fixed and the layer
runs packed, that is, the kernels see only the kept weights; a mask that keeps all runs dense, but
where the kernels are faster at that too (:func:`dass.nn.depthwise_suits_kernels`). **Learned**
(after ``learn_mask()``): the mask is the top-k of ``scores`` and moves with every step, so the
layer runs masked-dense, because a straight-through gradient needs the dense gradient. Both give the
same outputs and gradients.

``weight`` is an ordinary dense Parameter in both. What a frozen layer adds is its indices, built
from the mask by ``set_mask``, ``freeze_mask``, ``load_state_dict``, ``train`` and ``refresh``. They
are a plain attribute and no buffer, so that DistributedDataParallel does not broadcast them, an
average of models does not average them, and no state dict holds them.

In training and under torch.compile the kept values are gathered from the weight by an op in the
graph. Eager inference gathers once and keeps them. They are dropped by ``train()``, ``eval()``,
``to()``, loading, setting any attribute and, as far as torch counts it, by a write to the weight. A
write that torch does not count (``weight.data``, a fused optimiser that steps in eval mode) needs
``refresh()``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from dass.masks import parse_pattern, pattern_mask
from dass_kernels import Packed, build_pattern, choose_format, dense_reason, flat_index

__all__ = ["SparseLayer", "like"]

_KERNEL_DTYPES = (torch.float32, torch.float64)  # the others are converted around the op


class _StraightThrough(torch.autograd.Function):
    """``w m`` with ``m = m(s)``: ``dL/dw = g m`` and ``dL/ds = g w sign(s)`` (DASS, section 3)."""

    @staticmethod
    def forward(weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        return weight.masked_fill(~mask, 0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight, scores, mask = ctx.saved_tensors
        dw = ds = None
        if ctx.needs_input_grad[0]:
            dw = grad.masked_fill(~mask, 0)
        if ctx.needs_input_grad[1]:
            ds = (grad * weight * scores.sign()).to(scores.dtype)
        return dw, ds, None


def _has_kernels(device: torch.device) -> bool:
    """Whether the sparse ops exist for a device; elsewhere a layer runs masked-dense."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("dass::conv2d", key)


def _share(mask: Tensor) -> float:
    return int(mask.count_nonzero()) / max(mask.numel(), 1)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _counter(tensor: Tensor) -> Tensor:
    """The tensor, or if it has no write counter, as inference tensors do not, one that stands."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return torch.empty(0)


def like(module: nn.Conv2d | nn.Linear, kind: type) -> nn.Module:
    """A layer of another kind with the same arguments and the very same weight and bias.

    Its hooks and its mask are not ``module``'s; nothing is drawn from a random generator.
    """
    if isinstance(module, nn.Linear):
        names = ["in_features", "out_features"]
    else:
        names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
        names += ["groups", "padding_mode"]
    arguments = {name: getattr(module, name) for name in names}
    bias = module._parameters.get("bias")
    twin = kind(**arguments, bias=bias is not None, device="meta")
    twin._parameters["weight"] = module._parameters["weight"]
    twin._parameters["bias"] = bias
    return twin


class SparseLayer(nn.Module):
    """What SparseConv2d and SparseLinear share; a mixin before nn.Conv2d or nn.Linear.

    Attributes:
        weight: Parameter ``[O, I]`` or ``[O, I / groups, kh, kw]``, dense. Where the mask is False
            it is ignored; ``set_mask``, ``freeze_mask``, ``refresh`` and loading put zeros there.
        mask: bool buffer of the weight's shape, True where a weight is kept. While a mask is
            learned it is the last frozen one; ``current_mask()`` gives the one in use.
        scores: Parameter of the weight's shape while the mask is learned, else None.
        density: kept / all weights of a frozen mask; the target while the mask is learned.
        pattern: the word a learned mask obeys, as in :func:`dass.masks.pattern_mask`.
    """

    _hot: tuple | None = None  # eager inference: see _heat
    _index: Tensor | None = None  # int32, dass_kernels' pattern; None: not built (meta tensors)
    _format = "csr"
    _flat: tuple[int, int] = (0, 0)  # start and length of the gather order in _index
    is_packed = False  # runs the sparse ops while frozen; else (full masks, mostly) dense
    why_dense: str | None = None  # why its device would rather run it dense, if it would
    _mask_version: int | None = None

    def _start(self, density: float, pattern: str) -> None:
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], got {density}")
        self.pattern = parse_pattern(pattern).word
        self.register_parameter("scores", None)
        weight = self.weight
        with torch.inference_mode(False), torch.no_grad():
            if weight.is_meta or density == 1:
                mask = torch.ones_like(weight, dtype=torch.bool)
            else:
                mask = self._top(weight, density)
            self.register_buffer("mask", mask.contiguous())
        self.density = float(density)
        self._build()

    @classmethod
    def from_dense(cls, module: nn.Module, mask: Tensor | None = None) -> SparseLayer:
        """The sparse twin of a dense layer. It holds the very same Parameters.

        Args:
            module: an nn.Conv2d for SparseConv2d, an nn.Linear for SparseLinear, or a sparse layer.
            mask: as in :meth:`set_mask`, which zeroes the pruned weights of the shared Parameter.
                Default: ``weight != 0``, or the mask of a sparse layer.

        Raises:
            ValueError: another kind of module, a weight that is computed or not yet initialised, or
                a mask of another shape.
        """
        kind = next(base for base in cls.__mro__ if base.__module__.startswith("torch.nn"))
        if not isinstance(module, kind):
            got = type(module).__name__
            raise ValueError(f"{cls.__name__} stands for nn.{kind.__name__}, got {got}")
        weight = module._parameters.get("weight")
        if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
            raise ValueError(
                "the layer's weight is not an ordinary Parameter (computed by a parametrization or "
                "a pruning hook, or lazy): make it permanent first"
            )
        if mask is None:
            mask = module.current_mask() if isinstance(module, SparseLayer) else weight != 0
        twin = like(module, cls)
        twin.pattern = getattr(module, "pattern", twin.pattern)
        twin.set_mask(mask)
        vars(twin)["training"] = module.training
        return twin

    def _top(self, scores: Tensor, density: float) -> Tensor:
        return pattern_mask(scores, density, self.pattern, groups=getattr(self, "groups", 1))

    def _build(self) -> None:
        """Lays out the indices of ``mask``; the only place that does."""
        self._hot = None
        mask = self.mask
        self._mask_version = _version(mask)
        if mask.is_meta:
            self._index, self.is_packed = None, False
            return
        with torch.inference_mode(False), torch.no_grad():
            host, groups = mask.cpu(), getattr(self, "groups", 1)
            self._format = choose_format(host, groups)
            self._index = build_pattern(host, self._format, groups).to(mask.device)
            flat = flat_index(self._index)
        self._flat = (flat.storage_offset(), flat.numel())
        self.is_packed = self._runs_packed(mask.device)

    def _runs_packed(self, device: torch.device) -> bool:
        full = self._flat[1] == self.weight.numel()
        reason = dense_reason(self._index, self.weight.dtype, device)
        if reason is None and not _has_kernels(device):
            reason = "no sparse kernels there"
        self.why_dense = reason
        return reason is None and (not full or self._suits_kernels())

    def _suits_kernels(self) -> bool:
        """Whether the kernels are the faster ones for a dense weight too."""
        return False

    def _sync(self) -> None:
        """Builds the indices again if ``mask`` no longer is what they were built from.

        A buffer may be written in place: DDP's broadcast, an average's copy, a user. Compared by
        content, since DDP's broadcast does not count as a write.
        """
        self._hot = None
        mask = self.mask
        if mask.is_meta:
            return
        if self._index is not None and self._index.device == mask.device:
            flat = self._index.narrow(0, *self._flat)
            kept = mask.reshape(-1).index_select(0, flat)
            if int(mask.count_nonzero()) == flat.numel() and bool(kept.all()):
                self._mask_version = _version(mask)
                return
        self._build()

    @torch.no_grad()
    def _zero_pruned(self) -> None:
        weight = self._parameters.get("weight")
        if weight is None or weight.is_meta:
            return
        # Written only if need be: a loaded weight may be shared, or mapped from a read-only file.
        pruned = ~self.mask
        if bool(((weight != 0) & pruned).any()):
            with torch.inference_mode(weight.is_inference()), torch.no_grad():
                weight.masked_fill_(pruned, 0)

    def set_mask(self, mask: Tensor) -> SparseLayer:
        """Fixes the mask (ending any learning) and zeroes the pruned weights in place.

        Args:
            mask: the weight's shape, bool or numbers (nonzero is kept); may keep all or nothing.

        Raises:
            ValueError: no tensor, or another shape.
        """
        if not isinstance(mask, Tensor):
            raise ValueError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
        weight = self.weight
        if mask.shape != weight.shape:
            raise ValueError(
                f"mask must have the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}"
            )
        with torch.inference_mode(False), torch.no_grad():
            if mask.is_inference():
                mask = mask.clone()
            mask = (mask != 0).to(weight.device).contiguous()
        self._buffers["mask"] = mask
        self._parameters["scores"] = None
        if not mask.is_meta:
            self.density = _share(mask)
        self._build()
        self._zero_pruned()
        return self

    def learn_mask(self, density: float | None = None, scores: Tensor | None = None) -> SparseLayer:
        """Lets the mask be learned: ``scores`` becomes a Parameter, the mask its top-k.

        The forward pass uses ``weight * m(scores)``, m the largest ``|scores|`` of this layer at
        ``density`` under ``pattern``; gradients are straight-through,
        ``dL/dscores = dL/dw_eff * weight * sign(scores)`` and ``dL/dweight = dL/dw_eff * m``.

        A pruned weight that is zero has no score gradient and so cannot return: start from dense
        weights (``prune`` and ``set_mask`` zero them, the constructor's ``density`` does not).

        Args:
            density: kept / all weights, in (0, 1]; default: the layer's.
            scores: initial scores, the weight's shape. Default ``sqrt(6 / fan_in) w / max|w|``,
                whose first mask is the magnitude mask (HYDRA, arXiv 2002.10509), or the scores as
                they are if the mask is being learned already.

        Raises:
            ValueError: a density out of range, scores of another shape.
        """
        density = self.density if density is None else density
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], got {density}")
        weight = self.weight
        if scores is not None and scores.shape != weight.shape:
            raise ValueError(
                f"scores must have the weight's shape {tuple(weight.shape)}, "
                f"got {tuple(scores.shape)}"
            )
        with torch.inference_mode(False), torch.no_grad():
            if scores is not None:
                scores = scores.to(weight, copy=True)
            elif self.scores is None:
                fan_in = max(math.prod(weight.shape[1:]), 1)
                largest = weight.abs().max() if weight.numel() else weight.new_ones(())
                scores = weight * (math.sqrt(6 / fan_in) / torch.where(largest > 0, largest, 1))
        if scores is not None:
            self.scores = nn.Parameter(scores)
        self.density = float(density)
        return self

    def freeze_mask(self) -> SparseLayer:
        """Fixes the mask as it is (the learned one if it is being learned) and builds its indices.

        Pruned weights are zeroed in place. The optimiser's memory of them is not:
        :func:`dass.schedule.attach_masks` does that.
        """
        return self.set_mask(self.current_mask())

    def current_mask(self) -> Tensor:
        """The mask in use, bool: ``m(scores)`` while it is learned, else ``mask``."""
        if self.scores is None:
            return self.mask
        return self._top(self.scores.detach(), self.density)

    def masked_weight(self) -> Tensor:
        """The dense weight with exact zeros where pruned; differentiable, in both states."""
        if self.scores is None:
            return self.weight.masked_fill(~self.mask, 0)
        return _StraightThrough.apply(self.weight, self.scores, self.current_mask())

    def packed(self) -> Packed:
        """The kept weights and their indices, for dass_kernels; gradients flow to ``weight``.

        Raises:
            ValueError: the mask is being learned, or is on the meta device.
        """
        if self.scores is not None or self._index is None:
            raise ValueError("freeze_mask() first: there are no indices while a mask is learned")
        groups = getattr(self, "groups", 1)
        return Packed(self._gather(), self._index, self.weight.shape, self._format, groups)

    def refresh(self) -> SparseLayer:
        """Makes a frozen layer see writes to ``weight`` and ``mask`` that torch did not count."""
        self._sync()
        if self.scores is None:
            self._zero_pruned()
        return self

    def _gather(self) -> Tensor:
        index = self._index.narrow(0, *self._flat)
        return self.weight.reshape(-1).index_select(0, index)

    def _values(self) -> Tensor:
        """The kept weights, from the cache in eager inference."""
        if is_compiling():
            return self._gather()
        if _version(self.mask) != self._mask_version:
            self._sync()
        weight = self._parameters.get("weight")  # None: parametrized, so never cached
        if self.training or torch.is_grad_enabled() or weight is None or torch.jit.is_tracing():
            return self._gather()
        hot = self._hot
        if hot is None or hot[0] is not weight or hot[1]._version + hot[2]._version != hot[3]:
            self._heat(weight, self._gather())
            hot = self._hot
        return hot[4]

    def _heat(self, weight: Tensor, values: Tensor) -> None:
        """Keeps what forward's first branch needs, in one tuple: each attribute of a Module costs.

        (weight, a tensor with its write counter, one with the mask's, the sum of both counts,
        values, index, dtype the branch serves or None, device type, the op's constant argument)
        """
        served = values.dtype in _KERNEL_DTYPES and self._is_plain()
        counters = _counter(weight), _counter(self.mask)
        vars(self)["_hot"] = (
            weight,
            *counters,
            sum(counter._version for counter in counters),
            values.detach(),
            self._index,
            values.dtype if served else None,
            values.device.type,
            self._constant(),
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mask" and "mask" in vars(self).get("_buffers", ()):
            self.set_mask(value)
            return
        super().__setattr__(name, value)
        vars(self)["_hot"] = None  # a stride, a weight, training: whatever it was

    def train(self, mode: bool = True):
        super().train(mode)
        self._sync()
        return self

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, as the dense layer does; the mask stays."""
        super().reset_parameters()
        if "mask" in self._buffers:
            self.refresh()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._hot = None
        mask = self.mask
        if mask.is_meta:
            self._index, self.is_packed = None, False
        elif self._index is not None and (self._index.device != mask.device or mask.is_cuda):
            self.is_packed = self._runs_packed(mask.device)
            self._index = self._index.to(mask.device)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Loads so that the layer computes what the one that was saved computed.

        - with ``scores``: the mask is learned from here on, at the density of ``mask``;
        - with ``mask`` alone: it is frozen to that mask;
        - with neither, as nn.Conv2d and nn.Linear save: frozen to ``weight != 0``; not an error,
          strict or not. A layer whose mask is being learned keeps its scores, which are missing.
        """
        weight_key, mask_key, scores_key = (prefix + k for k in ("weight", "mask", "scores"))
        if scores_key in state_dict and self.scores is None:
            self.scores = nn.Parameter(torch.empty_like(self.weight))
        elif mask_key in state_dict and scores_key not in state_dict:
            self.scores = None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        with torch.inference_mode(False), torch.no_grad():
            if mask_key not in state_dict and weight_key in state_dict:
                if mask_key in missing_keys:
                    missing_keys.remove(mask_key)
                if self.scores is None:
                    self._buffers["mask"] = (self.weight != 0).contiguous()
            elif self.mask.dtype != torch.bool:  # assign=True takes the tensor as it is
                self._buffers["mask"] = self.mask != 0
        self._sync()
        if self.mask.is_meta:
            return
        if self.scores is None:
            self.density = _share(self.mask)
            self._zero_pruned()
        elif mask_key in state_dict and not torch.equal(self.current_mask(), self.mask):
            self.density = _share(self.mask)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.scores is not None:
            destination[prefix + "mask"] = self.current_mask()

    def __getstate__(self) -> dict:
        return {**vars(self), "_hot": None}

    def extra_repr(self) -> str:
        state = "learned" if self.scores is not None else "frozen"
        return (
            f"{super().extra_repr()}, density={self.density:.4g}, pattern={self.pattern!r}, {state}"
        )
