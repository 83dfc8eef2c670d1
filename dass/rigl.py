"""RigL: sparse from the first step, its masks redrawn as the training goes on.

Evci, Gale, Menick, Castro, Elsen: Rigging the Lottery, ICML 2020, arXiv 1911.11134.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dass.distributed import follow_rank_zero
from dass.nn import SparseConv2d, SparseLinear

__all__ = ["RigL", "dense_gradients", "drop_and_grow"]


class RigL:
    """Every `every` steps each layer gives up some weights and takes as many others (section 3).

    Of its kept weights a layer drops the share ``alpha / 2 (1 + cos(pi t / end))`` of smallest
    magnitude, and grows as many among the others, those of largest gradient. New weights begin at
    zero, with no momentum. A step that changes the masks does not change the weights. Between such
    steps the layers run on the sparse kernels; on them, masked dense, for the dense gradient.

    Args:
        model: pruned already (the paper: ERK densities, a random mask).
        optimizer: of the model's weights.
        end: the step after which masks stay; the paper: three quarters of all.
        every, alpha: the paper's dT and alpha.

    Raises:
        ValueError: numbers out of range, or a model without pruned layers.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        end: int,
        *,
        every: int = 100,
        alpha: float = 0.3,
    ):
        if every < 1 or end < 0 or not 0 < alpha <= 1:
            raise ValueError(f"need every >= 1, end >= 0, alpha in (0, 1]: {every}, {end}, {alpha}")
        kinds = (SparseConv2d, SparseLinear)
        self.layers = [m for m in model.modules() if isinstance(m, kinds) and m.scores is None]
        if not self.layers:
            raise ValueError("the model has no pruned layers: dass.prune it first")
        self.optimizer, self.end, self.every, self.alpha = optimizer, end, every, alpha
        self.steps = 0

    def share(self) -> float:
        """The share of kept weights that an update at this step exchanges (equation 1)."""
        return self.alpha / 2 * (1 + math.cos(math.pi * self.steps / max(self.end, 1)))

    def replaces_step(self) -> bool:
        """Whether this step changes the masks instead of the weights."""
        return 0 < self.steps < self.end and self.steps % self.every == 0

    def forward(self) -> contextlib.AbstractContextManager:
        """Around the forward and backward pass: dense gradients where the masks will change."""
        if self.replaces_step():
            return dense_gradients(self.layers)
        return contextlib.nullcontext()

    @torch.no_grad()
    def step(self) -> None:
        """After the backward pass."""
        if self.replaces_step():
            for layer in self.layers:
                self._exchange(layer)
        self.steps += 1

    def _exchange(self, layer: nn.Module) -> None:
        kept = int(layer.mask.sum())
        count = min(int(self.share() * kept), layer.mask.numel() - kept)
        if count == 0 or layer.weight.grad is None:
            return
        mask, grown = drop_and_grow(layer.weight, layer.weight.grad, layer.mask, count)
        follow_rank_zero([mask, grown])
        layer.set_mask(mask)
        layer.weight[grown] = 0
        for slot in self.optimizer.state.get(layer.weight, {}).values():
            if isinstance(slot, Tensor) and slot.shape == mask.shape:
                slot.masked_fill_(~mask | grown, 0)
        layer.refresh()

    def state_dict(self) -> dict:
        """The step, and what it belongs to."""
        return {key: getattr(self, key) for key in ("steps", "end", "every", "alpha")}

    def load_state_dict(self, state: dict) -> None:
        """Takes the step; raises ValueError where the saved schedule is another one."""
        mine = {**self.state_dict(), "steps": state.get("steps")}
        if state != mine:
            raise ValueError(f"saved schedule {state} is not {mine}")
        self.steps = state["steps"]


def drop_and_grow(
    weight: Tensor, gradient: Tensor, mask: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """(new mask, what is new in it): `count` fewer of smallest |w|, as many of largest |g|.

    What was just dropped may come back (it then starts at zero). Ties go to the lower index.
    """
    flat = mask.reshape(-1)
    kept = flat.nonzero().squeeze(1)
    order = weight.reshape(-1)[kept].abs().argsort(stable=True)
    left = flat.clone()
    left[kept[order[:count]]] = False
    free = (~left).nonzero().squeeze(1)
    order = gradient.reshape(-1)[free].abs().argsort(stable=True, descending=True)
    grown = torch.zeros_like(flat)
    grown[free[order[:count]]] = True
    return (left | grown).view_as(mask), grown.view_as(mask)


@contextlib.contextmanager
def dense_gradients(layers: list[nn.Module]) -> Iterator[None]:
    """Within, the layers compute the same, and their weights get gradients where pruned too."""
    before = [(layer._buffers["mask"], layer.is_packed) for layer in layers]
    for layer in layers:
        layer._buffers["mask"] = torch.ones_like(layer.mask)  # pruned weights are zeros already
        layer.is_packed = False
    try:
        yield
    finally:
        for layer, (mask, packed) in zip(layers, before, strict=True):
            layer._buffers["mask"] = mask
            layer.is_packed = packed
