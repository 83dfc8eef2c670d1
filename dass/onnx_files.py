"""ONNX models of torch programs, with sparse initialisers and back, and what they compute.

Needs the extra "export" (onnx and onnxscript, which torch's exporter is built on).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "LEAST_OPSET",
    "dense_initializers",
    "initializers",
    "modules",
    "run",
    "sparse_initializers",
    "to_onnx",
]

LEAST_OPSET = 18  # torch's exporter writes none before it


def modules(*names: str) -> list:
    """The packages of the extra "export", imported.

    Raises:
        ImportError: one is missing; says what to install.
    """
    try:
        return [importlib.import_module(name) for name in names]
    except ModuleNotFoundError as error:
        raise ImportError(
            f"export to ONNX needs the package {error.name}: pip install dass[export]"
        ) from None


def to_onnx(program: torch.export.ExportedProgram, opset: int, inputs: Sequence[str] | None):
    """The onnx.ModelProto of a program of torch.export, as plain as its layers.

    BatchNorm stays as it is, constants are computed. What the exporter notes of the source (file
    names of this machine among it) is left out. The file format's version is the lowest that the
    opset allows, so that older runtimes read it too.

    Args:
        inputs: names of the inputs; None: those of the network's forward.

    Raises:
        RuntimeError: the exporter has no such opset, or not all operators of the program.
    """
    onnx, optimizer = modules("onnx", "onnxscript.optimizer")
    with _quiet():
        made = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,  # it would fold every BatchNorm
            verbose=False,
            opset_version=opset,
            input_names=inputs,
        )
        optimizer.fold_constants(made.model)
        optimizer.remove_unused_nodes(made.model)
    model = made.model_proto
    found = {entry.domain: entry.version for entry in model.opset_import}
    if found.get("") != opset:
        raise RuntimeError(f"the exporter gives opset {found.get('')}, not {opset}")
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    del graph.value_info[:]
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    onnx.checker.check_model(model, full_check=True)
    return model


def sparse_initializers(model) -> None:
    """Turns weights into entries of `sparse_initializer` where that makes the file smaller.

    Vectors stay dense: runtimes look into them (shapes, axes) when they load a graph.

    COO with one flat int64 index per nonzero, sorted, as the ONNX specification has it: 12 bytes
    per float32 that is kept, against 4 per float32 dense, so from two thirds of zeros on.
    """
    onnx, helper, arrays = modules("onnx", "onnx.helper", "onnx.numpy_helper")
    graph, dense = model.graph, []
    for tensor in graph.initializer:
        sparse = None
        if len(tensor.dims) > 1:
            flat = arrays.to_array(tensor).reshape(-1)
            kept = np.flatnonzero(flat)
            sparse = helper.make_sparse_tensor(
                arrays.from_array(flat[kept], tensor.name),
                arrays.from_array(kept.astype(np.int64)),
                list(tensor.dims),
            )
        if sparse is not None and sparse.ByteSize() < tensor.ByteSize():
            graph.sparse_initializer.append(sparse)
        else:
            dense.append(onnx.TensorProto.FromString(tensor.SerializeToString()))
    del graph.initializer[:]
    graph.initializer.extend(dense)
    onnx.checker.check_model(model)  # not in full: its shape inference knows no sparse weights


def dense_initializers(model):
    """A copy of an onnx.ModelProto without sparse initialisers: each is a dense one again."""
    onnx, arrays = modules("onnx", "onnx.numpy_helper")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for sparse in copy.graph.sparse_initializer:
        values = arrays.to_array(sparse.values)
        whole = np.zeros(tuple(sparse.dims), values.dtype)
        whole.reshape(-1)[arrays.to_array(sparse.indices)] = values
        copy.graph.initializer.append(arrays.from_array(whole, sparse.values.name))
    del copy.graph.sparse_initializer[:]
    return copy


def initializers(model) -> dict[str, tuple[str, int, np.ndarray]]:
    """name -> ("dense" or "sparse", bytes in the file, the dense array) of all initialisers."""
    (arrays,) = modules("onnx.numpy_helper")
    sizes = {tensor.name: ("dense", tensor.ByteSize()) for tensor in model.graph.initializer}
    for sparse in model.graph.sparse_initializer:
        sizes[sparse.values.name] = ("sparse", sparse.ByteSize())
    return {
        tensor.name: (*sizes[tensor.name], arrays.to_array(tensor))
        for tensor in dense_initializers(model).graph.initializer
    }


def run(data: bytes, batches: Sequence[Sequence[Tensor]]) -> tuple[str, list[list[Tensor]]]:
    """(by what, the outputs for each list of inputs) of a serialised ONNX model.

    By ONNX Runtime if it is there, else by the reference implementation of the package onnx, which
    knows no sparse initialisers: they are read back dense for it.
    """
    feeds = [[x.numpy(force=True) for x in inputs] for inputs in batches]
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
        names, call = [value.name for value in session.get_inputs()], session.run
        by = f"onnxruntime {onnxruntime.__version__}"
    else:
        onnx, reference = modules("onnx", "onnx.reference")
        model = onnx.ModelProto.FromString(data)
        session = reference.ReferenceEvaluator(dense_initializers(model))
        names, call = session.input_names, session.run
        by = f"onnx.reference {onnx.__version__}"
        if model.graph.sparse_initializer:
            by += " (sparse weights read back dense)"
    results = [call(None, _named(names, feed)) for feed in feeds]
    return by, [[torch.as_tensor(np.asarray(y)) for y in outputs] for outputs in results]


def _named(names: Sequence[str], feed: Sequence[np.ndarray]) -> Mapping[str, np.ndarray]:
    if len(names) != len(feed):
        raise RuntimeError(f"the file has inputs {', '.join(names)}, {len(feed)} were given")
    return dict(zip(names, feed, strict=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress on stdout and its remarks about packages it could use."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
