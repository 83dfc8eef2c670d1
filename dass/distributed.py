"""What several processes of one run agree on (torchrun); without them, nothing happens here.

Gradients are averaged, rank 0's word holds for masks, weights and alphas, and hashes are compared:
ranks that drift apart stop rather than average two different networks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dass.sparse_layer import SparseLayer

__all__ = [
    "RanksDiffer",
    "average",
    "check_equal",
    "follow_rank_zero",
    "on_rank_zero",
    "rank_and_world",
    "share_model",
    "total",
]

T = TypeVar("T")

if dist.is_available():
    # It has functions whose default argument is the group that there is when it is imported. Were
    # that later (an optimiser imports it), the group's threads would outlive destroy_process_group,
    # and one that lets go of a tensor while Python ends aborts the process.
    import torch.distributed.nn


class RanksDiffer(RuntimeError):
    """Processes that should hold the same tensors do not."""


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) outside of torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def average(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its mean over the processes, in one message per dtype."""
    _, world = rank_and_world()
    if world == 1:
        return
    for group in _by_dtype(tensors):
        flat = torch.cat([t.reshape(-1) for t in group])
        dist.all_reduce(flat)
        _scatter(flat / world, group)


@torch.no_grad()
def follow_rank_zero(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by rank 0's."""
    if rank_and_world()[1] == 1:
        return
    for group in _by_dtype(list(tensors)):
        boolean = group[0].dtype == torch.bool
        flat = torch.cat([t.reshape(-1) for t in group])
        flat = flat.to(torch.uint8) if boolean else flat
        dist.broadcast(flat, 0)
        _scatter(flat.bool() if boolean else flat, group)


def share_model(model: nn.Module) -> None:
    """Gives every process rank 0's weights, buffers and masks; RanksDiffer if one then has others.

    The model must have the same layers everywhere.
    """
    if rank_and_world()[1] == 1:
        return
    tensors = [*model.parameters(), *model.buffers()]
    follow_rank_zero(tensors)
    check_equal(tensors, "weights and masks")
    for layer in model.modules():
        if isinstance(layer, SparseLayer) and layer.scores is None:
            layer.set_mask(layer.mask)


def total(numbers: Sequence[float]) -> list[float]:
    """Each number's sum over the processes."""
    if rank_and_world()[1] == 1:
        return list(numbers)
    found = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(found)
    return found.tolist()


def on_rank_zero(action: Callable[[], T]) -> T:
    """What `action` gives on rank 0, on every process, and when it is done; so with what it raises.

    For what may be done once only, such as writing a file. The result has to be picklable.
    """
    rank, world = rank_and_world()
    if world == 1:
        return action()
    found: list = [None, None]
    if rank == 0:
        try:
            found[0] = action()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found, 0)
    if found[1] is not None:
        raise found[1]
    return found[0]


def check_equal(tensors: Iterable[Tensor], what: str) -> None:
    """Raises RanksDiffer, on every process, unless all hold the same bits."""
    rank, world = rank_and_world()
    if world == 1:
        return
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    found: list[str | None] = [None] * world
    dist.all_gather_object(found, digest.hexdigest())
    wrong = [i for i, other in enumerate(found) if other != found[0]]
    if wrong:
        raise RanksDiffer(f"{what} of rank {wrong[0]} are not those of rank 0 (seen by {rank})")


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


@torch.no_grad()
def _scatter(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = flat.split([t.numel() for t in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
