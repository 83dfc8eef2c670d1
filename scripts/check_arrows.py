"""Checks which way the parts of the repository depend on each other.

    bench, tests -> dass -> dass_kernels -> _C (csrc/ops | csrc/program -> csrc/cpu)

- ``dass`` takes from ``dass_kernels`` only names in its ``__all__``.
- ``dass_kernels`` imports neither ``dass`` nor anything above it.
- A CPU kernel file includes only what is on a short list. It is compiled once per instruction
  set, and an inline function of a library, compiled for AVX-512, can be the copy that the linker
  keeps for all of the program: a machine without AVX-512 then dies with SIGILL.
- No flag that ties a binary to the machine it was built on, or that changes arithmetic.

Usage: python scripts/check_arrows.py [repository]; prints each violation, exits 1 if there is one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

# What each package may not import; tests and bench may import anything.
FORBIDDEN = {"dass": {"bench", "tests"}, "dass_kernels": {"dass", "bench", "tests"}}

KERNEL_FILES = ("*.inl.h", "kernels.*", "vec.h", "dense.h")
# Headers of types, C functions and intrinsics: none emits code of its own.
KERNEL_HEADERS = {"cstddef", "cstdint", "cstring", "type_traits", "immintrin.h", "arm_neon.h"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')

FLAGS = re.compile(r"-m(?:arch|tune|cpu)=native|fast[-]math|-O[f]ast|-funsafe[-]math")
FLAG_PLACES = ("CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile", ".ci/run")
FLAG_FOLDERS = ("csrc", "dass", "dass_kernels", "bench", "tests")
FLAG_SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cuh", ".cmake", ".txt", ".toml"}


def violations(root: Path) -> list[str]:
    """Every violation below ``root``, as ``path:line: what is wrong``."""
    found = []
    exported = _exported(root / "dass_kernels" / "__init__.py")
    for package in FORBIDDEN:
        for path in sorted((root / package).rglob("*.py")):
            for line, what in _python(path.relative_to(root), path.read_text(), exported):
                found.append(f"{path.relative_to(root)}:{line}: {what}")
    for path in sorted((root / "csrc" / "cpu").glob("*")):
        for line, what in _includes(path):
            found.append(f"{path.relative_to(root)}:{line}: {what}")
    for path in _flag_files(root):
        for line, text in enumerate(path.read_text().splitlines(), 1):
            if match := FLAGS.search(text):
                found.append(f"{path.relative_to(root)}:{line}: {match[0]} is not allowed")
    return found


def _exported(init: Path) -> set[str]:
    """The names in ``__all__`` of dass_kernels and its version, read without importing it."""
    for node in ast.parse(init.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return {*ast.literal_eval(node.value), "__version__"}
    raise SystemExit(f"{init}: no __all__")


def _python(path: Path, text: str, exported: set[str]) -> Iterator[tuple[int, str]]:
    package = path.parts[0]
    kernels = set()  # what this file calls dass_kernels
    tree = ast.parse(text)
    for line, module, names in _imports(tree, path):
        top = module.split(".")[0]
        if top in FORBIDDEN[package]:
            yield line, f"{package} must not import {top}"
        elif package == "dass" and top == "dass_kernels":
            if module != "dass_kernels":
                yield line, f"{module} is private: import what dass_kernels itself exports"
                continue
            for name, _ in names:
                if name and name not in exported:
                    yield line, f"dass_kernels does not export {name}"
            kernels.update(alias for name, alias in names if not name)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr in exported:
            continue
        if getattr(node.value, "id", None) in kernels:
            yield node.lineno, f"dass_kernels does not export {node.attr}"


def _imports(tree: ast.AST, path: Path) -> Iterator[tuple[int, str, list[tuple[str, str]]]]:
    """(line, absolute module, [(name taken from it or "", what it is called here)])."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, [("", alias.asname or alias.name.split(".")[0])]
        elif isinstance(node, ast.ImportFrom):
            parts = list(path.parent.parts)[: len(path.parent.parts) + 1 - node.level]
            module = ".".join([*(parts if node.level else []), *filter(None, [node.module])])
            yield node.lineno, module, [(a.name, a.asname or a.name) for a in node.names]
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            module = getattr(node.args[0], "value", None)
            if name in ("import_module", "__import__") and isinstance(module, str):
                yield node.lineno, module, []


def _includes(path: Path) -> Iterator[tuple[int, str]]:
    kernel = any(path.match(pattern) for pattern in KERNEL_FILES)
    for line, text in enumerate(path.read_text().splitlines(), 1):
        if not (match := INCLUDE.match(text)):
            continue
        kind, name = match.groups()
        if name.startswith(("torch/", "ATen/", "c10/", "../")):
            yield line, f"csrc/cpu must not include {name}"
        elif kernel and kind == "<" and name not in KERNEL_HEADERS:
            yield line, f"a kernel file must not include <{name}>"
        elif kernel and kind == '"' and not any(Path(name).match(p) for p in KERNEL_FILES):
            yield line, f'a kernel file must not include "{name}", which is not one'


def _flag_files(root: Path) -> Iterator[Path]:
    for name in FLAG_PLACES:
        if (root / name).is_file():
            yield root / name
    for folder in FLAG_FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in FLAG_SUFFIXES and path.is_file():
                yield path


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    found = violations(root)
    print("\n".join(found) or "arrows: ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
