"""Sparse convolutional networks that are really faster: find them, train them, run them.

Names are imported when they are first used, so that ``import dass`` costs nothing.
"""

import importlib
import importlib.util

_HOME = {
    "SparseConv2d": "nn",
    "SparseLinear": "nn",
    "project": "masks",
    "prune": "pruning",
    "GradualPruner": "schedule",
    "attach_masks": "schedule",
    "copy_masks": "schedule",
    "sparsify": "convert",
    "densify": "convert",
    "compile": "engine.compiler",
    "load_engine": "engine.compiler",
    "Genotype": "genotype",
    "build": "zoo.darts",
    "SearchConfig": "strategies",
    "search": "searching",
    "SearchResult": "searching",
    "save": "files",
    "load": "files",
    "export": "exporting",
}
__all__ = [*_HOME, "zoo"]


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(importlib.import_module(f"dass.{_HOME[name]}"), name)
    elif name == "__version__":
        from dass_kernels import __version__ as value
    elif not name.startswith("_") and importlib.util.find_spec(f"dass.{name}"):
        value = importlib.import_module(f"dass.{name}")
    else:
        raise AttributeError(f"module 'dass' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
