"""Gates of the Triton kernels on a machine without a GPU.

What they compute: ``triton_checks.py``, in a process of its own, because triton reads
``TRITON_INTERPRET`` when a kernel is defined. What they compile to: ``test_triton_compiled.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
CHECKS = Path(__file__).with_name("triton_checks.py")


def test_kernels_compute_what_float64_does(report):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    report(f"Triton kernels, interpreted: {run.stdout.strip().splitlines()[-1]}")
