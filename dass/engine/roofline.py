"""What this machine can do at most, measured with the engine's own kernels on one thread."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dass.engine import graph as g
from dass.engine import tuning
from dass.engine.plan import make_plan
from dass.report import write_text
from dass.timing import threads

# Of a step's pictures and weights: up to so many bytes they may lie in L1, in L2. More than most
# machines have, so that what is called the least time is that.
L1_MOST = 1 << 16
L2_MOST = 1 << 22
# (channels, pixels of a plane) that are copied to see how fast each of the three is.
PICTURES = {"l1": (8, 256), "l2": (16, 4096), "memory": (32, 1 << 18)}


@dataclass(frozen=True)
class Limits:
    """macs: multiply-adds per ns. l1, l2, memory: bytes per ns, read and written, from there."""

    macs: float
    l1: float
    l2: float
    memory: float

    def bound(self, macs: float, bytes_: float) -> tuple[float, str]:
        """(least microseconds, what sets them) of a step."""
        where = "l1" if bytes_ <= L1_MOST else "l2" if bytes_ <= L2_MOST else "memory"
        products, traffic = macs / self.macs, bytes_ / getattr(self, where)
        if products >= traffic:
            return products / 1e3, "products"
        return traffic / 1e3, f"bytes, {where}"


def limits(cache: Path | None) -> Limits:
    """This machine's, from the cache file if they are there; else measured in about a second."""
    key = f"limits of {tuning.machine_key()}"
    try:
        return Limits(**json.loads(cache.read_text())[key]) if cache else measure()
    except (OSError, ValueError, KeyError, TypeError):
        found = measure()
        _remember(cache, key, found)
        return found


def measure() -> Limits:
    with threads(1):
        return Limits(_macs(), *(_traffic(*picture) for picture in PICTURES.values()))


def _macs() -> float:
    """Of a product without zeros whose pixels and code lie in L1."""
    pixels = 256
    return 28 * 32 * pixels / _fastest(torch.ones(28, 32), pixels)


def _traffic(channels: int, pixels: int) -> float:
    """The best of copying, of reading much and writing little, and of the opposite."""
    weights = (torch.eye(channels), torch.ones(1, channels), torch.ones(channels, 1))
    return max(4 * pixels * sum(w.shape) / _fastest(w, pixels) for w in weights)


def _fastest(weight: Tensor, pixels: int) -> float:
    """Nanoseconds of weight [O, I] times I planes, on the kernel that is fastest."""
    outputs, inputs = weight.shape
    size = (pixels // 32, 32)
    nodes = [
        g.Input("input", [], (inputs, *size)),
        g.Conv("product", ["input"], (outputs, *size), weight[..., None, None], weight.sum(1)),
    ]
    plan = make_plan(g.Graph(nodes, ["product"]), 1)
    (step,) = tuning.products(plan)
    index = plan.steps.index(step)
    tensors = [torch.rand(1, inputs * pixels), torch.empty(1, outputs * pixels)]
    times = []
    for kernel in tuning.candidates(plan, step):
        if not kernel.chunk:
            tuning.set_kernel(step, kernel)
            program = tuning.build(plan)
            runs = [program.profile(tensors)[index] for _ in range(3)]
            count = min(100, int(1e7 / runs[-1]))
            runs += [program.profile(tensors)[index] for _ in range(count)]
            times.append(statistics.median(runs))
    return min(times)


def _remember(cache: Path | None, key: str, found: Limits) -> None:
    if cache is None:
        return
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            everything = json.loads(cache.read_text())
        except (OSError, ValueError):
            everything = {}
        write_text(cache, json.dumps({**everything, key: asdict(found)}, indent=0))
    except OSError:
        return
