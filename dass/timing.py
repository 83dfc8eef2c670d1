"""How this project times things: rivals in one process, in turn, compared round by round.

    samples = measure({"dense": lambda: conv(x), "sparse": lambda: sparse(x)})
    samples["sparse"].median_us, speedup(samples["dense"], samples["sparse"])

A machine drifts (frequency, neighbours), so a time is only compared with one taken a moment before
or after, and what is reported is a median with its spread.
"""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import dass_kernels

MOST_CALLS = 100_000  # per round: an empty function must not make a round of millions


@dataclass(frozen=True)
class Sample:
    """The times of one function: microseconds per call, one number per round, in order."""

    times_us: tuple[float, ...]
    calls: int  # per round

    @property
    def median_us(self) -> float:
        return statistics.median(self.times_us)

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median; 0.02 is a quiet machine."""
        if len(self.times_us) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.times_us, n=4, method="inclusive")
        return (high - low) / self.median_us

    def to_dict(self) -> dict:
        return {"median_us": self.median_us, "spread": self.spread, "rounds": len(self.times_us)}

    def __str__(self) -> str:
        return f"{self.median_us:.1f} us +- {self.spread:.0%}"


def speedup(before: Sample, after: Sample) -> float:
    """``before / after``: the median of the ratios of times taken in the same round."""
    pairs = zip(before.times_us, after.times_us, strict=True)
    return statistics.median(b / a for b, a in pairs)


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Sets torch's number of threads for a block, and yields it; None leaves it as it is."""
    if count is not None and count < 1:
        raise ValueError(f"threads must be at least 1, got {count}")
    before = torch.get_num_threads()
    try:
        if count is not None and count != before:
            torch.set_num_threads(count)
        yield torch.get_num_threads()
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def measure(
    functions: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 0.2,
    rounds: int = 9,
    num_threads: int | None = None,
    setup: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Sample]:
    """Times functions against each other in ``torch.inference_mode``.

    Each round calls every function in turn, the next round in the opposite order, so that none
    always follows the same rival.

    Args:
        functions: name -> function without arguments.
        seconds: least total time per function, over all rounds. A round is at least one call.
        rounds: at least 1.
        num_threads: torch threads, restored afterwards. Default: as they are.
        setup: name -> what to call, untimed, before that function's turn.

    Raises:
        ValueError: nothing to time, or a number out of range. What a function raises comes through.
    """
    if not functions or rounds < 1 or seconds < 0:
        raise ValueError(
            f"need functions, rounds >= 1 and seconds >= 0, got {len(functions)} functions, "
            f"rounds={rounds}, seconds={seconds}"
        )
    before = {name: (setup or {}).get(name, lambda: None) for name in functions}
    times: dict[str, list[float]] = {name: [] for name in functions}
    with torch.inference_mode(), threads(num_threads):
        calls = {}
        for name, function in functions.items():
            before[name]()
            calls[name] = _calls_per_round(function, seconds / rounds)
        order = list(functions)
        for _ in range(rounds):
            for name in order:
                before[name]()
                times[name].append(_time(functions[name], calls[name]) / calls[name])
            order.reverse()
    return {name: Sample(tuple(1e6 * t for t in times[name]), calls[name]) for name in functions}


def _time(function: Callable[[], object], calls: int) -> float:
    function()  # what ran before has left the caches with its own data
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return time.perf_counter() - start


def _calls_per_round(function: Callable[[], object], seconds: float) -> int:
    """How often to call it so that a round lasts; also the warm-up."""
    calls = 1
    while True:
        took = _time(function, calls)
        if took >= seconds / 2 or calls >= MOST_CALLS:
            return max(1, min(MOST_CALLS, round(calls * seconds / max(took, 1e-9))))
        calls = min(MOST_CALLS, max(2 * calls, int(calls * seconds / max(took, 1e-9) / 2)))


def dense_variants(module: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """The ways torch has to run one dense layer: the honest baseline is the fastest of them.

    - ``nchw``: the module on a contiguous input;
    - ``channels_last``: module and input in that format (4-d inputs);
    - ``frozen``: traced, frozen, ``torch.jit.optimize_for_inference``;
    - ``mkldnn``: weights packed by ``torch.utils.mkldnn.to_mkldnn``, input and output blocked.

    Inputs are converted here, not in the functions. A way that the layer, dtype or build does not
    have is left out.

    Args:
        module: an nn.Conv2d or nn.Linear; copied, in eval mode.
        x: an input of it.

    Returns:
        name -> function without arguments, for :func:`measure`; it returns the layer's output.
    """
    module = copy.deepcopy(module).eval().requires_grad_(False)
    x = x.detach().contiguous()
    functions = {"nchw": lambda: module(x)}
    makers = {"frozen": _frozen, "mkldnn": _mkldnn}
    if x.dim() == 4:
        makers = {"channels_last": _channels_last, **makers}
    for name, make in makers.items():
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch.jit announces its end at every call
            try:
                function = make(module, x)
                function()
            except (RuntimeError, NotImplementedError, AssertionError):
                continue
        functions[name] = function
    return functions


def _channels_last(module: nn.Module, x: Tensor) -> Callable[[], object]:
    module = copy.deepcopy(module).to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    return lambda: module(x)


def _frozen(module: nn.Module, x: Tensor) -> Callable[[], object]:
    traced = torch.jit.freeze(torch.jit.trace(module, x))
    traced = torch.jit.optimize_for_inference(traced)
    for _ in range(3):  # the profiling executor specialises on its second call
        traced(x)
    return lambda: traced(x)


def _mkldnn(module: nn.Module, x: Tensor) -> Callable[[], object]:
    from torch.utils.mkldnn import to_mkldnn

    packed, blocked = to_mkldnn(copy.deepcopy(module)), x.to_mkldnn()
    return lambda: packed(blocked)


def machine_facts() -> dict[str, object]:
    """What a time depends on and a reader needs: processor, caches, threads, builds, switches."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "machine_cores": os.cpu_count(),
        "caches": _caches(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "mkl": torch.backends.mkl.is_available(),
        "dass": dass_kernels.__version__,
        "dass_isa": dass_kernels.active_isa(),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """Of the first core, e.g. ``{"L1 Data": "48K", "L2 Unified": "1024K"}``; {} if not known."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with contextlib.suppress(OSError):
            level, kind, size = (
                (folder / part).read_text().strip() for part in ("level", "type", "size")
            )
            found[f"L{level} {kind}"] = size
    return found
