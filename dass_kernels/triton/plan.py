"""Plans of GPU kernels: analysed once for a pattern, then only looked up."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .heuristics import Choice, arch_of, choose, forced_choice, transposed_pays
from .panels import Panels, Rows, Transposed, build_panels, build_transposed, on_device, read_rows


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one pattern runs with.

    ``panels`` is None when dense. ``transposed`` is None when the input gradient is dense, and
    ``gradient_reason`` says why it is one or the other.
    """

    choice: Choice
    rows: Rows
    panels: Panels | None = None
    transposed: Transposed | None = None
    gradient_reason: str = ""


def build_plan(pattern: Tensor, dtype: torch.dtype, arch: str | None = None) -> Plan:
    """Analyses a pattern; the indices end up on its device. Copies the pattern to the host."""
    return _plan(read_rows(pattern), pattern.device, dtype, arch)


def _plan(rows: Rows, device: torch.device, dtype: torch.dtype, arch: str | None) -> Plan:
    choice = choose(rows, dtype, arch)
    if choice.kernel == "dense":
        return Plan(choice, rows, gradient_reason=choice.reason)
    tiles = choice.tiles
    panels = build_panels(rows, tiles.height, tiles.depth, choice.kernel == "blocks")
    transposed = build_transposed(rows, panels, tiles.width)
    if choice.reason != "forced" and not transposed_pays(len(transposed.panel), tiles, rows):
        return Plan(
            choice, rows, on_device(panels, device), None, "channels share too few outputs: dense"
        )
    return Plan(
        choice, rows, on_device(panels, device), on_device(transposed, device), choice.reason
    )


# Keyed by the memory of the pattern, which layers never write. A weak reference keeps the address
# of a storage from being used again, so a dead one is found dead and never taken for another.
_plans: dict[tuple, tuple[StorageWeakRef, int | None, dict]] = {}


def plan_for(pattern: Tensor, dtype: torch.dtype) -> Plan:
    """The plan of a pattern, built at its first use.

    A write to the pattern that torch counts drops the plan.
    """
    storage = pattern.untyped_storage()
    key = (storage._cdata, pattern.storage_offset(), pattern.numel())
    version = None if pattern.is_inference() else pattern._version
    held = _plans.get(key)
    if held is None or held[0].expired() or held[1] != version:
        for dead in [k for k, (ref, *_) in _plans.items() if ref.expired()]:
            del _plans[dead]
        held = _plans[key] = (StorageWeakRef(storage), version, {})
    arch = arch_of(pattern.device)
    # The choice is part of the key: it can be forced.
    plans = held[2]
    if "rows" not in plans:
        plans["rows"] = read_rows(pattern)
    request = (dtype, arch, forced_choice())
    if request not in plans:
        plans[request] = _plan(plans["rows"], pattern.device, dtype, arch)
    return plans[request]
