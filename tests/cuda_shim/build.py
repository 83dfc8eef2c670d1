"""Builds the emulation with g++: the ops as a library, and the programs of ``programs/``."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "cuda_shim"
TORCH = Path(torch.__file__).resolve().parent

FLAGS = ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-psabi", f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc'}"]
TORCH_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(TORCH / "include")]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZERS += ["-fno-omit-frame-pointer"]
KERNELS = ["spmm.cu", "sddmm.cu", "pack.cu"]


def missing() -> str | None:
    """Why nothing can be built here, or None."""
    if not (ROOT / "csrc" / "cuda").is_dir():
        return "the sources are not part of this tree"
    if not shutil.which("g++"):
        return "g++ is not installed"
    return None


def _stamp(flags: list[str]) -> str:
    """Of all that a build depends on: sources, flags, compiler and torch."""
    digest = hashlib.sha256(repr((flags, torch.__version__)).encode())
    digest.update(subprocess.check_output(["g++", "--version"]))
    for folder in (ROOT / "csrc" / "cuda", ROOT / "csrc" / "ops", ROOT / "csrc" / "cpu", HERE):
        for path in sorted(folder.rglob("*")):
            if path.suffix in {".cu", ".cuh", ".h", ".cpp"}:
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _link(name: str, sources: list[Path], flags: list[str], link: list[str]) -> Path:
    """Compiles and links, unless the same was built before; the name carries the stamp."""
    target = BUILD / f"{name}-{_stamp([*flags, *link])}"
    if target.exists():
        return target
    objects = BUILD / f"{target.name}-{os.getpid()}"
    objects.mkdir(parents=True)
    try:
        made = []
        for source in sources:
            made.append(objects / (source.name + ".o"))
            _call(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(made[-1])])
        _call(["g++", *flags, *map(str, made), *link, "-o", str(objects / "linked")])
        for old in BUILD.glob(f"{name}-*"):
            if old.is_file():
                old.unlink()
        os.replace(objects / "linked", target)
    finally:
        shutil.rmtree(objects)
    return target


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def ops_library(sanitize: bool = False) -> Path:
    """The CUDA ops for CPU tensors, ``torch.ops.dass_emulated.*``, as a shared library."""
    sources = [ROOT / "csrc" / "cuda" / name for name in [*KERNELS, "ops.cpp"]]
    sources += [HERE / "device.cpp", HERE / "library.cpp"]
    flags = [*FLAGS, *TORCH_FLAGS, *(["-O1", *SANITIZERS] if sanitize else ["-O1"])]
    link = [
        "-shared",
        f"-L{TORCH / 'lib'}",
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    return _link("ops-asan" if sanitize else "ops", sources, flags, link)


def program(name: str, sanitize: bool, *more: str) -> Path:
    """``programs/NAME.cu`` as an executable."""
    flags = [*FLAGS, "-O1", *more, *(SANITIZERS if sanitize else [])]
    return _link(
        name + ("-asan" if sanitize else ""), [HERE / "programs" / f"{name}.cu"], flags, []
    )


class Emulator:
    """The loaded library: its ops, and the order its fibers run in."""

    def __init__(self, path: Path):
        torch.ops.load_library(str(path))
        self._library = ctypes.CDLL(str(path))
        self._library.shim_seed.argtypes = [ctypes.c_uint64]
        self._library.shim_launches.restype = ctypes.c_int64
        self.ops = torch.ops.dass_emulated

    def seed(self, seed: int) -> None:
        """Order of fibers and blocks: 0 is ascending, every other seed another random order."""
        self._library.shim_seed(seed)

    @property
    def launches(self) -> int:
        """Kernels run so far."""
        return self._library.shim_launches()


def sanitizer_environment() -> dict[str, str]:
    """What a Python needs to load a sanitized library; torch's leaks are not ours."""
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
