"""SparseProp (Nikdan et al., ICML 2023), the sparse training library for x86.

    python -m bench.peers.sparseprop        installs it for the benchmarks, beside the environment

Its package compiles a module for the Python that runs pip, and needs only numpy, scipy and torch.
So it goes into a folder of its own, without dependencies, and is imported from there into the
process that measures, where it can be timed in turn with its rivals.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from bench.contest import Entry, NotAvailable
from bench.peers.install import root

REQUIREMENT = "sparseprop==0.1.14"


def folder() -> Path:
    """Where it is installed: beside the other peers, one for each Python."""
    return root() / f"{sys.implementation.cache_tag}-{REQUIREMENT.replace('==', '-')}"


def install() -> Path:
    """Builds it with pip (a C++ compiler, pybind11 and setuptools are needed); returns the folder.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    # Its setup.py calls `pip` and `python3` by name.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    command += ["--upgrade", "--target", str(folder()), REQUIREMENT]
    subprocess.run(command, check=True, env={**os.environ, "PATH": path})
    return folder()


def load() -> ModuleType:
    """The package's modules; raises NotAvailable if it is not installed or does not import."""
    if not folder().is_dir():
        raise NotAvailable("SparseProp is not installed: python -m bench.peers.sparseprop")
    if str(folder()) not in sys.path:
        sys.path.append(str(folder()))
    try:
        return importlib.import_module("sparseprop.modules")
    except ImportError as error:
        raise NotAvailable(f"SparseProp does not import: {error}") from None


def training_entries(conv: nn.Conv2d, x: Tensor, grad: Tensor) -> dict[str, Entry]:
    """Its two ways to run one training step of a convolution: forward, dX and dW on the mask.

    It vectorises over the batch or over the width; it has no dilation and no groups.
    """
    modules = load()
    found = {}
    for name, over_width in (("sparseprop batch", False), ("sparseprop width", True)):
        layer = modules.SparseConv2d.from_dense(conv, vectorizing_over_on=over_width)
        found[name] = Entry(lambda layer=layer: _step(layer, x, grad))
    return found


def _step(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    with torch.inference_mode(False), torch.enable_grad():
        y = layer(x)
        return (y.detach(), *torch.autograd.grad(y, (x, layer.W_val), grad))


if __name__ == "__main__":
    print(install())
