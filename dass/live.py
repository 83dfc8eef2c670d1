"""Operations of the relaxed network with a frozen mask, on the channels that live.

At 99 % most depthwise filters keep no weight, so most channels between the convolutions of an
operation are zero, and often so is all that it gives. The search's BatchNorms have no weights and
make zero of zero, and a ReLU passes nothing back at zero, so a channel

- that no kept weight feeds from a living channel is exactly zero, and
- that no kept weight of what follows reads cannot matter.

Neither is computed. Loss and gradients are those of the whole operation; a weight that cannot
matter gets no gradient, and so no weight decay either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dass.nn import SparseConv2d, depthwise_suits_kernels
from dass.space import FactorizedReduce, ReLUFirst
from dass_kernels import build_pattern, choose_format, conv2d_values, conv_spec, flat_index

__all__ = ["LiveOp", "live_op"]


@dataclass(frozen=True)
class _Step:
    """A convolution between the living channels alone.

    conv: whose weights. gather: where its kept values lie in the weight. index, spec: of the small
    convolution for :func:`dass_kernels.conv2d_values`; without an index it is dense, its weight of
    the shape dense. inputs: channels to take from what comes in, None: all. rectified: a ReLU comes
    before. eps: of the BatchNorm after it, None: none.
    """

    conv: SparseConv2d
    gather: Tensor
    index: Tensor | None
    spec: list[int]
    dense: torch.Size
    groups: int
    inputs: Tensor | None
    rectified: bool
    eps: float | None

    def __call__(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            x = x.index_select(1, self.inputs)
        if self.rectified:
            x = F.relu(x)
        values = self.conv.weight.view(-1).index_select(0, self.gather)
        if self.index is not None:
            x = conv2d_values(x, values, self.index, self.spec)
        else:
            how = self.conv.stride, self.conv.padding, self.conv.dilation, self.groups
            x = F.conv2d(x, values.view(self.dense), None, *how)
        if self.eps is None:
            return x
        return F.batch_norm(x, None, None, training=True, eps=self.eps)


@dataclass(frozen=True)
class LiveOp:
    """What is left of an operation.

    branches: chains side by side, each with whether it reads the input one pixel down and right
    (the second half of a FactorizedReduce). live: the output's channels that are not zero, int64,
    in the order in which the branches give them.
    """

    branches: tuple[tuple[tuple[_Step, ...], bool], ...]
    live: Tensor

    def after_relu(self, x: Tensor) -> Tensor | None:
        """[B, C, H, W], past the ReLU, -> [B, len(live), H', W'], or None if all is zero."""
        found = []
        for steps, shifted in self.branches:
            y = F.pad(x, (-1, 1, -1, 1)) if shifted else x
            for step in steps:
                y = step(y)
            found.append(y)
        if not found:
            return None
        return found[0] if len(found) == 1 else torch.cat(found, 1)


@torch.inference_mode(False)  # what it makes is kept for training
def live_op(op: nn.Module) -> LiveOp | None:
    """The living part of an operation of :data:`dass.space.OPS` with frozen masks.

    None if there is nothing to gain: no weight is pruned, or a mask is still being learned.
    """
    if isinstance(op, ReLUFirst):
        chains = [(list(op)[1:], False, 0)]
    elif isinstance(op, FactorizedReduce):
        half = op.conv1.out_channels
        chains = [([op.conv1, op.bn1], False, 0), ([op.conv2, op.bn2], True, half)]
    else:
        return None
    convs = [m for modules, _, _ in chains for m in modules if isinstance(m, nn.Conv2d)]
    if not all(isinstance(m, SparseConv2d) and m.scores is None and m.weight.is_cpu for m in convs):
        return None
    if all(bool(m.mask.all()) for m in convs):
        return None
    branches, live = [], []
    for modules, shifted, start in chains:
        steps, outputs = _chain(modules)
        if steps:
            branches.append((steps, shifted))
            live.append(outputs + start)
    return LiveOp(tuple(branches), torch.cat(live) if live else torch.empty(0, dtype=torch.int64))


def _chain(modules: Sequence[nn.Module]) -> tuple[tuple[_Step, ...], Tensor]:
    """The steps of a chain of convolutions, and the numbers of the channels that come out."""
    convs = [m for m in modules if isinstance(m, SparseConv2d)]
    reach = [_reads(conv) for conv in convs]
    alive, fed = torch.ones(reach[0].size(1), dtype=torch.bool), []
    for reads in reach:
        alive = reads[:, alive].any(1)
        fed.append(alive)
    needed = [fed[-1]]  # from the last convolution's outputs back to the first one's inputs
    for reads, before in zip(reversed(reach), [*reversed(fed[:-1]), None], strict=True):
        inputs = reads[needed[0]].any(0)
        needed.insert(0, inputs if before is None else inputs & before)
    if not bool(needed[-1].any()):
        return (), torch.empty(0, dtype=torch.int64)
    steps = []
    for i, conv in enumerate(convs):
        place = modules.index(conv)
        follows = modules[place + 1] if place + 1 < len(modules) else None
        rectified = place > 0 and isinstance(modules[place - 1], nn.ReLU)
        eps = follows.eps if isinstance(follows, nn.BatchNorm2d) else None
        steps.append(_step(conv, needed[i], needed[i + 1], i == 0, rectified, eps))
    return tuple(steps), needed[-1].nonzero().squeeze(1)


def _reads(conv: SparseConv2d) -> Tensor:
    """Which output channel has a kept weight on which input channel: bool [O, I]."""
    outputs, width = conv.weight.shape[:2]
    kept = conv.mask.flatten(2).any(2)
    reads = torch.zeros(outputs, conv.in_channels, dtype=torch.bool)
    for group, rows in enumerate(kept.split(outputs // conv.groups)):
        start = group * (outputs // conv.groups)
        reads[start : start + len(rows), group * width : (group + 1) * width] = rows
    return reads


def _step(
    conv: SparseConv2d,
    inputs: Tensor,
    outputs: Tensor,
    first: bool,
    rectified: bool,
    eps: float | None,
) -> _Step:
    columns, rows = inputs.nonzero().squeeze(1), outputs.nonzero().squeeze(1)
    places = torch.arange(conv.weight.numel()).view(conv.weight.shape)
    depthwise = conv.groups > 1
    if depthwise:
        rows = columns  # a channel that is read is one that was made
        mask, places, groups = conv.mask[rows], places[rows], len(rows)
    else:
        mask, places, groups = conv.mask[rows][:, columns], places[rows][:, columns], 1
    mask, places = mask.contiguous(), places.reshape(-1)
    index, suits = None, depthwise and depthwise_suits_kernels(groups, conv.dilation)
    if suits or not bool(mask.all()):
        index = build_pattern(mask, choose_format(mask, groups), groups)
        places = places.index_select(0, flat_index(index))
    select = columns if first and not bool(inputs.all()) else None
    spec = conv_spec(mask.shape, conv.stride, conv.padding, conv.dilation)
    return _Step(conv, places, index, spec, mask.shape, groups, select, rectified, eps)
