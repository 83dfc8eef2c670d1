"""What a search will take, before it starts, and what the sparse kernels spare it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from dass.images import ImageDataset
from dass.searching import Searcher
from dass.sparse_supernet import sparse_layers
from dass.strategies import SearchConfig, phases_of
from dass.timing import measure, speedup

__all__ = ["Estimate", "compare_finetuning", "estimate"]


@dataclass(frozen=True)
class Estimate:
    """seconds: of all steps, at the speed of one; bytes: weights, optimisers, activations."""

    seconds: float
    bytes: int


def estimate(config: SearchConfig, data: ImageDataset) -> Estimate:
    """Runs two steps of a copy of the search's first phase; other phases count as the first."""
    run = Searcher(config, data, None)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run.one_step()
    start = time.perf_counter()
    run.one_step()
    took = time.perf_counter() - start
    weights = sum(p.numel() * p.element_size() for p in run.network.parameters())
    return Estimate(took * run.steps, 3 * weights + sum(saved.values()))


def compare_finetuning(config: SearchConfig, data: ImageDataset, rounds: int = 5) -> dict:
    """Times a step of the phase with frozen masks on the sparse kernels against masked dense.

    Both take the same batch through the same network; the masks are those of a fresh network, which
    has the same number of nonzeros in every layer.
    """
    run = Searcher(config, data, None)
    run.skip_to(next(i for i, phase in enumerate(phases_of(config)) if phase.frozen))
    layers = list(sparse_layers(run.network))
    packed = [layer.is_packed for layer in layers]

    def use(sparse: bool):
        def switch() -> None:
            for layer, was in zip(layers, packed, strict=True):
                layer.is_packed = was and sparse
            run.network.skip_dead(sparse)

        return switch

    def step() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            run.one_step()

    took = measure(
        {"packed": step, "masked": step},
        seconds=0.0,
        rounds=rounds,
        setup={"packed": use(True), "masked": use(False)},
    )
    return {
        "packed": took["packed"].to_dict(),
        "masked": took["masked"].to_dict(),
        "speedup": speedup(took["masked"], took["packed"]),
        "batch": run.train.batch_size,
        "threads": torch.get_num_threads(),
        "layers": len(layers),
        "faster": sum(packed),
    }
