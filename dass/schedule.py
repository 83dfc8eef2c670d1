"""Pruning along a schedule, and keeping pruned weights at zero while an optimiser steps."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dass.distributed import follow_rank_zero
from dass.nn import SparseConv2d, SparseLinear
from dass.prune_report import PruneReport
from dass.pruning import Rule, apply_masks, find_units, mask_of


def cubic_sparsity(step: int, begin: int, end: int, initial: float, final: float) -> float:
    """`s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3`, t clipped to [t_0, t_1].

    Zhu & Gupta 2017, arXiv 1710.01878, equation 1, with t_1 = t_0 + n dt.
    """
    left = 1 - (min(max(step, begin), end) - begin) / (end - begin)
    return final + (initial - final) * left**3


class GradualPruner:
    """Prunes while training, along the cubic schedule: call `step()` after `optimizer.step()`.

        pruner = GradualPruner(model, optimizer, 0.9, begin=1000, end=9000, every=100)
        for x, y in loader:
            ...; optimizer.step(); report = pruner.step()

    The first call of `step()` is t = 0. At t = begin, begin + every, ... and at t = end the masks
    are chosen anew for `cubic_sparsity(t)`; `step()` then returns the PruneReport, else None. The
    constructor swaps the layers (mask all True where they were dense) and attaches the masks to the
    optimiser (`attach_masks`), whose slots of newly pruned weights are zeroed at once.

    monotone: once pruned, never back. If False a weight comes back where its score has grown, which
        takes a score function that ranks pruned weights, or a weight that something else rewrote.
    rule: method, scope, pattern, floor, seed, densities, as in `prune`. A layer with a density of
        its own falls to it along the same curve, from `1 - initial_sparsity` or, if that is less,
        from the start.

    To resume: build the model, the optimiser and the pruner as before, then load the three state
    dicts; the masks travel in the model's. The run is then bit for bit the unbroken one.
    An average of the model (AveragedModel) follows with `copy_masks(model, average.module)` after
    each report. Raises ValueError as `prune` does, and unless 0 <= begin < end and every >= 1 and
    initial_sparsity <= final_sparsity.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        final_sparsity: float,
        begin: int,
        end: int,
        every: int = 1,
        *,
        initial_sparsity: float = 0.0,
        exclude: str | Iterable[str] = (),
        monotone: bool = True,
        **rule,
    ):
        self._rule = Rule(**rule)
        self._rule.check_sparsity(final_sparsity, "final_sparsity")
        self._rule.check_sparsity(initial_sparsity, "initial_sparsity")
        if not 0 <= begin < end or every < 1 or initial_sparsity > final_sparsity:
            raise ValueError(
                "need 0 <= begin < end, every >= 1 and initial_sparsity <= final_sparsity, got "
                f"begin={begin}, end={end}, every={every}, {initial_sparsity}, {final_sparsity}"
            )
        self.model, self.optimizer, self.monotone = model, optimizer, monotone
        self.initial_sparsity, self.final_sparsity = initial_sparsity, final_sparsity
        self.begin, self.end, self.every = begin, end, every
        self.steps = 0
        self._units, self._skipped = find_units(model, exclude)
        self._rule.named(self._units)
        masks = [mask_of(unit.modules[0]) for unit in self._units]
        apply_masks(model, self._units, masks, self._rule)
        self._handle = attach_masks(optimizer, model)

    @property
    def sparsity(self) -> float:
        """The schedule's target at the next `step()`."""
        return cubic_sparsity(
            self.steps, self.begin, self.end, self.initial_sparsity, self.final_sparsity
        )

    def forward(self) -> contextlib.AbstractContextManager:
        """Nothing: the forward pass is the model's own (see `dass.training.Sparsifier`)."""
        return contextlib.nullcontext()

    def replaces_step(self) -> bool:
        """False: weights are updated in every step."""
        return False

    def step(self) -> PruneReport | None:
        t, target = self.steps, self.sparsity
        self.steps += 1
        if not self.begin <= t <= self.end or ((t - self.begin) % self.every and t != self.end):
            return None
        masks = self._rule_at(t).masks(self._units, target, self.monotone)
        follow_rank_zero(masks)
        report = self._rule.report(self._units, masks, target, self._skipped)
        apply_masks(self.model, self._units, masks, self._rule)
        enforce_masks(self.optimizer, self.model)
        return report

    def _rule_at(self, step: int) -> Rule:
        start = 1 - self.initial_sparsity
        densities = {
            name: cubic_sparsity(step, self.begin, self.end, max(start, final), final)
            for name, final in self._rule.densities.items()
        }
        return replace(self._rule, densities=densities)

    def state_dict(self) -> dict:
        keys = ("steps", "final_sparsity", "begin", "end", "every", "initial_sparsity", "monotone")
        rule = {key: value for key, value in vars(self._rule).items() if key != "method"}
        rule["densities"] = dict(self._rule.densities)
        return {**{key: getattr(self, key) for key in keys}, **rule}

    def load_state_dict(self, state: dict) -> None:
        """Takes the step count; raises ValueError where the saved schedule is another one."""
        mine, state = self.state_dict(), {"densities": {}, **state}
        wrong = [k for k in mine if k != "steps" and state.get(k) != mine[k]]
        if wrong or "steps" not in state:
            raise ValueError(f"saved schedule {state} differs from {mine} in {wrong or ['steps']}")
        self.steps = state["steps"]


def attach_masks(optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
    """After every `optimizer.step()`, and now, zero the pruned weights of `model` and their slots.

    Momentum, weight decay and Adam's moments move a weight whose gradient is zero, so a masked
    gradient alone lets pruned weights come back. The hook looks the layers up at each step: it
    holds for layers pruned later. A layer whose mask is still being learned is left alone. The
    hook does not travel with a pickled or copied optimiser: attach again. Returns a handle; its
    `remove()` ends the guard. ValueError if `optimizer` has none of the model's pruned weights.
    """
    pruned = {layer.weight for layer in _frozen_layers(model)}
    if pruned and not any(p in pruned for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("the optimizer holds none of the model's pruned weights")
    enforce_masks(optimizer, model)
    return optimizer.register_step_post_hook(lambda opt, args, kwargs: enforce_masks(opt, model))


@torch.no_grad()
def enforce_masks(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Zero, once, the pruned weights of `model` and what `optimizer` remembers of them.

    Slots are the state tensors of the weight's shape (momentum_buffer, exp_avg, max_exp_avg_sq,
    ax, ...), but for Rprop's step_size, which is a length and no memory. Filled, not multiplied by
    the mask: 0 * NaN is NaN, and an eps of 0 divides 0 by 0 there. Adafactor's row and column
    sums stay. LBFGS drops its history when it reaches into pruned weights: curvature pairs of
    another subspace cannot be repaired by zeroing.
    """
    pruned = {layer.weight: ~layer.mask for layer in _frozen_layers(model)}
    for weight, gone in pruned.items():
        weight.masked_fill_(gone, 0)
        for key, slot in optimizer.state.get(weight, {}).items():
            if isinstance(slot, Tensor) and slot.shape == gone.shape and key != "step_size":
                slot.masked_fill_(gone.to(slot.device), 0)
    if isinstance(optimizer, torch.optim.LBFGS):
        _check_lbfgs(optimizer, pruned)


def _check_lbfgs(optimizer: torch.optim.LBFGS, pruned: dict[nn.Parameter, Tensor]) -> None:
    parameters = optimizer.param_groups[0]["params"]
    state = optimizer.state.get(parameters[0], {})
    offset = 0
    for parameter in parameters:
        part = slice(offset, offset := offset + parameter.numel())
        if parameter in pruned and "d" in state:
            gone = pruned[parameter].flatten()
            if any(state[key][part][gone].any() for key in ("d", "prev_flat_grad")):
                state["n_iter"] = 0  # the next step starts from the gradient, as the first one did
                return


def copy_masks(source: nn.Module, target: nn.Module) -> None:
    """Give each sparse layer of `target` the mask of the layer of that name in `source`.

    For averaged or teacher copies after a mask change. ValueError names a layer that is missing.
    """
    twins = dict(target.named_modules())
    for name, layer in source.named_modules():
        if isinstance(layer, (SparseConv2d, SparseLinear)):
            if not isinstance(twin := twins.get(name), (SparseConv2d, SparseLinear)):
                raise ValueError(f"the target has no sparse layer {name!r}")
            if not torch.equal(mask := layer.mask.to(twin.mask.device), twin.mask):
                twin.set_mask(mask)


def _frozen_layers(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, (SparseConv2d, SparseLinear)) and module.scores is None:
            yield module
