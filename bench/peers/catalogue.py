"""The peers: one row for each way to run a network that the comparison knows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.contest import NotAvailable
from bench.peers import install
from bench.peers.entries import ENTRIES, LAYOUTS
from bench.session import DENSE_LIMITS

# Largest difference from torch eager in float32, over its largest output. bf16 has 8 bits of
# mantissa and some 50 layers to lose them in: MobileNet-v2 was measured at 0.055.
TOLERANCES = {"fp32": 1e-4, "bf16": 0.1}

# What keeps a runtime to an instruction set. MNN and onnxruntime have no such switch.
LIMITS = {
    None: {},
    "avx2": {**DENSE_LIMITS["avx2"], "DASS_ISA": "avx2", "NM_ARCH": "avx2"},
}


@dataclass(frozen=True)
class Peer:
    """One rival.

    runtime, entry: see :mod:`bench.peers.worker`.
    environment: a key of ``install.ENVIRONMENTS``; None is the present one.
    form: of the model's file, a key of ``models.FORMS``.
    precision: a key of :data:`TOLERANCES`.
    cpu_flags: it needs one of them, by their names in /proc/cpuinfo; () needs none.
    """

    name: str
    runtime: str
    environment: str | None
    form: str
    entry: str = ""
    precision: str = "fp32"
    layout: str = "NCHW"
    cpu_flags: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises NotAvailable unless this peer can run here."""
        if self.cpu_flags and not set(self.cpu_flags) & cpu_flags():
            raise NotAvailable(f"{self.name}: this processor has no {' or '.join(self.cpu_flags)}")
        if self.environment is not None:
            install.python(self.environment)


REFERENCE = "openvino"
_RUNTIMES = (
    Peer("onnxruntime", "onnxruntime", "onnxruntime", "onnx"),
    Peer("openvino", "openvino", "openvino", "onnx", "f32"),
    Peer(
        "openvino-bf16", "openvino", "openvino", "onnx", "bf16", "bf16",
        cpu_flags=("amx_bf16", "avx512_bf16"),
    ),
    Peer("deepsparse", "deepsparse", "deepsparse", "onnx"),
    Peer("mnn", "mnn", "mnn", "mnn"),
    Peer("dass-engine", "engine", None, "engine"),
)  # fmt: skip
PEERS = {
    **{peer.name: peer for peer in _RUNTIMES},
    **{
        name: Peer(name, "torch", None, "dass", name, layout=LAYOUTS.get(name, "NCHW"))
        for name in ENTRIES
    },
}


def available(names: Iterable[str] | None = None) -> tuple[list[Peer], list[str]]:
    """The peers to compare, and why others are left out.

    Args:
        names: all of these must be there. None: whatever is there.

    Raises:
        NotAvailable: one that was named is not set up, or not for this processor.
        ValueError: an unknown name; the message lists the known ones.
    """
    found, reasons = [], []
    for name in PEERS if names is None else dict.fromkeys(names):
        if name not in PEERS:
            raise ValueError(f"unknown peer {name!r}; known: {', '.join(PEERS)}")
        try:
            PEERS[name].check()
            found.append(PEERS[name])
        except NotAvailable as reason:
            if names is not None:
                raise
            reasons.append(str(reason))
    return found, list(dict.fromkeys(reasons))


def cpu_flags() -> set[str]:
    """The features of the processor, as Linux names them; empty where they are not known."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    flags = re.search(r"^flags\s*:(.*)$", text, re.M)
    return set(flags[1].split()) if flags else set()
