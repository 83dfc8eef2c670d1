"""The peers' own virtual environments; they disagree on numpy, and no two share one."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.contest import NotAvailable

SETUP = "python -m bench.peers setup"


@dataclass(frozen=True)
class Environment:
    """What pip installs, and the module that must then import.

    shared: also imported into the present Python, so made from no other.
    licence: what one should know of it before it is installed.
    """

    requirements: tuple[str, ...]
    module: str
    shared: bool = False
    licence: str = ""


ENVIRONMENTS = {
    "onnx": Environment(("onnx==1.23.2",), "onnx", shared=True),  # torch.onnx.export asks for it
    "onnxruntime": Environment(("onnxruntime==1.32.0",), "onnxruntime"),
    "openvino": Environment(("openvino==2026.4.1",), "openvino"),
    # 1.9.0 is an empty package; 1.8.0 was built for numpy 1 and for Python up to 3.11.
    "deepsparse": Environment(
        ("deepsparse==1.8.0", "numpy==1.26.4"),
        "deepsparse.engine",
        licence="closed; its licence allows evaluation only",
    ),
    "mnn": Environment(("MNN==3.6.1",), "MNN"),
}
# Usage reports of the peers' packages.
QUIET = {"NM_DISABLE_ANALYTICS": "1", "NM_VERSION_CHECK": "false"}


def root() -> Path:
    """Where peers are installed: DASS_PEERS, else the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DASS_PEERS") or Path(cache) / "dass" / "peers")


def python(name: str) -> Path:
    """The interpreter of an environment.

    Raises:
        NotAvailable: it is not set up, or not with the versions that are asked for now.
    """
    found = root() / name / "bin" / "python"
    if not found.exists() or _installed(name) is None:
        raise NotAvailable(f"{name} is not set up: {SETUP} {name}")
    return found


def versions(name: str) -> dict[str, str]:
    """Package -> version of all that is in an environment, as it was installed; {} if it is not."""
    return (_installed(name) or {}).get("packages", {})


def setup(name: str, interpreter: str = sys.executable) -> str:
    """Makes an environment, or goes on where that was broken off; returns a line about it.

    What pip says goes to NAME.log in :func:`root`.

    Raises:
        subprocess.CalledProcessError: a step failed. OSError: the folder or the interpreter.
    """
    if name == "torch":
        import torch

        return f"{torch.__version__}, in the present environment"
    wanted = ENVIRONMENTS[name]
    found, what = root() / name / "bin" / "python", ", ".join(wanted.requirements)
    what += f" ({wanted.licence})" if wanted.licence else ""
    if found.exists() and _installed(name) is not None:
        return f"{what}: already there"
    found.parent.parent.mkdir(parents=True, exist_ok=True)
    clear = [] if found.exists() else ["--clear"]
    made_from = sys.executable if wanted.shared else interpreter
    with _log(name).open("w") as log:
        _call([made_from, "-m", "venv", *clear, str(root() / name)], log)
        _call([str(found), "-m", "pip", "install", *wanted.requirements], log)
        _call([str(found), "-c", f"import {wanted.module}"], log)
    listed = [str(found), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    packages = json.loads(subprocess.run(listed, **_options(), stdout=subprocess.PIPE).stdout)
    facts = {
        "requirements": wanted.requirements,
        "packages": {row["name"]: row["version"] for row in packages},
    }
    part = _record(name).with_suffix(".part")
    part.write_text(json.dumps(facts, indent=1) + "\n")
    os.replace(part, _record(name))
    return f"{what}: installed in {root() / name}"


def setup_all(names: Iterable[str], interpreter: str = sys.executable) -> list[str]:
    """Sets up environments, a line for each; returns those that failed."""
    failed = []
    for name in names:
        try:
            print(f"{name}: {setup(name, interpreter)}", flush=True)
        except (subprocess.CalledProcessError, OSError) as error:
            failed.append(name)
            print(f"{name}: FAILED: {_reason(name, error)}", flush=True)
    return failed


def import_onnx() -> None:
    """Makes `import onnx` work here, where need be from its environment, after all that is here.

    Raises:
        NotAvailable: there is none.
    """
    try:
        importlib.import_module("onnx")
    except ImportError:
        folder = str(python("onnx").parent.parent)
        place = {"base": folder, "platbase": folder}
        sys.path.append(sysconfig.get_path("purelib", "posix_prefix", place))
        try:
            importlib.import_module("onnx")
        except ImportError as error:
            sys.path.pop()
            raise NotAvailable(f"onnx does not import ({error}): remove {folder}") from None


def environ() -> dict[str, str]:
    """The process's environment without what would lead a peer's Python to other packages."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, **QUIET}


def _installed(name: str) -> dict | None:
    """What was recorded at the end of an installation of the present requirements."""
    try:
        facts = json.loads(_record(name).read_text())
    except (OSError, ValueError):
        return None
    return facts if facts["requirements"] == list(ENVIRONMENTS[name].requirements) else None


def _record(name: str) -> Path:
    return root() / name / "dass-peer.json"


def _log(name: str) -> Path:
    return root() / f"{name}.log"


def _options() -> dict:
    return {"check": True, "env": environ(), "stdin": subprocess.DEVNULL}


def _call(command: list[str], log) -> None:
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"no Python at {command[0]}")
    subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, **_options())


def _reason(name: str, error: Exception) -> str:
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    said = [line.strip() for line in _log(name).read_text().splitlines() if line.strip()]
    errors = [line for line in said if "error" in line.lower()] or said or [str(error)]
    return f"{errors[-1]} (all of it: {_log(name)})"
