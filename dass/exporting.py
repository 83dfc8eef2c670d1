"""Networks as files of other runtimes: ONNX, and programs of torch.export.

    report = dass.export(model, "net.onnx", torch.randn(1, 3, 32, 32))
    print(report)  # per layer: how it is stored, and what the target does with its zeros

A file holds the plain dense layers with exact zeros. It is run and compared with the model before
it is put in place. docs/export.md says which runtimes were tried, and what they did.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from dass import onnx_files
from dass.convert import call_arguments, densify
from dass.latency import fold_batchnorm, relative_error
from dass.sealed import write_whole
from dass.surgery import evaluating

__all__ = ["FORMATS", "ExportError", "ExportReport", "ExportedLayer", "export"]

FORMATS = ("onnx", "onnx-sparse", "torch")
TOLERANCE = 1e-4  # float32 sums in another order
HALF_TOLERANCE = 5e-2
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MULTIPLIED = {
    "onnx": "ONNX Runtime, OpenVINO: zeros multiplied",
    "torch": "torch: zeros multiplied",
}
_MADE_DENSE = "ONNX Runtime: made dense; OpenVINO, MNN: refused"


class ExportError(Exception):
    """The network cannot be exported so, or the file would compute something else."""


@dataclass(frozen=True)
class ExportedLayer:
    """A convolution or linear layer of the file.

    shape: of its weight. zeros: share of its weight, in [0, 1]. stored: "dense", "sparse", or
    "computed" if the file has no tensor with this weight. bytes: of the weight in the file.
    note: what the target does with the zeros.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    zeros: float
    stored: str
    bytes: int
    note: str


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote. `print(report)` gives a table.

    opset: None for torch. norms, folded: BatchNorms of the model, and how many of them are now part
    of the convolution before. verified_by: what ran the file. verified_batches: on how many
    examples at once. error: the largest difference to the model over its largest output.
    """

    path: str
    format: str
    opset: int | None
    file_bytes: int
    dynamic_batch: bool
    norms: int
    folded: int
    verified_by: str
    verified_batches: tuple[int, ...]
    error: float
    layers: tuple[ExportedLayer, ...]

    def to_dict(self) -> dict:
        """Plain numbers, strings, lists and dicts, as JSON knows them."""
        rows = [
            {**asdict(row), "names": list(row.names), "shape": list(row.shape)}
            for row in self.layers
        ]
        return {**asdict(self), "verified_batches": list(self.verified_batches), "layers": rows}

    def rows(self) -> list[tuple[str, ...]]:
        """layer, weight, zeros, stored, bytes, note: the table's cells as text."""
        return [
            (
                " = ".join(row.names) or "(model)",
                "x".join(map(str, row.shape)),
                f"{row.zeros:.1%}",
                row.stored,
                f"{row.bytes:,}",
                row.note,
            )
            for row in self.layers
        ]

    def summary(self) -> list[str]:
        """Lines on the file as a whole."""
        what = f"{self.format}, opset {self.opset}" if self.opset else self.format
        batch = "any batch size" if self.dynamic_batch else f"batches of {self.verified_batches[0]}"
        batches = " and ".join(map(str, self.verified_batches))
        lines = [
            f"{self.path}: {what}, {self.file_bytes:,} bytes, for {batch}",
            f"same output as the model to {self.error:.1g}, on batches of {batches}, run by "
            f"{self.verified_by}",
        ]
        if self.norms:
            lines.append(f"{self.folded} of {self.norms} BatchNorms folded into convolutions")
        return lines

    def __str__(self) -> str:
        table = [("layer", "weight", "zeros", "stored", "bytes", "zeros there"), *self.rows()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        justify = (str.ljust, str.ljust, str.rjust, str.ljust, str.rjust, str.ljust)
        lines = [
            "  ".join(f(*cell) for f, *cell in zip(justify, row, widths, strict=True)).rstrip()
            for row in table
        ]
        return "\n".join([*lines, *self.summary()])


def export(
    model: nn.Module,
    path: str | os.PathLike,
    example_inputs,
    format: str = "onnx",
    *,
    fold: bool = False,
    dynamic_batch: bool = True,
    opset: int = onnx_files.LEAST_OPSET,
) -> ExportReport:
    """Writes a network to a file that other runtimes read, in eval mode, as dense layers.

    The file is run on the example inputs, and with `dynamic_batch` on other batch sizes too, and
    must give the model's outputs, before it takes the place of `path`, whole or not at all.

    Args:
        model: left as it is. Masks, also one being learned, become exact zeros.
        example_inputs: a tensor, a tuple or list of tensors, or a dict of keyword arguments.
        format: "onnx"; "onnx-sparse": ONNX whose weights are sparse initialisers where that is
            smaller, which few runtimes read; "torch": torch.export.save.
        fold: merge each BatchNorm into the convolution before it.
        dynamic_batch: the first size of every input that agrees with that of the first input may
            vary; else all shapes are those of the example.
        opset: of ONNX, 18 or later.

    Raises:
        ValueError: an unknown format or opset, or inputs that are not tensors or have no batch.
        ImportError: onnx or onnxscript is missing. ExportError: torch.export or the exporter cannot
            follow the network, or the file computes something else. OSError: from writing.
    """
    inputs = _Inputs(example_inputs)
    _check(format, opset, inputs, dynamic_batch)
    if format != "torch":
        onnx_files.modules("onnx", "onnxscript")
    wanted = inputs.batches() if dynamic_batch else {inputs.size: inputs.values}
    with evaluating(model), torch.no_grad():
        wants = [tree_leaves(inputs.call(model, values)) for values in wanted.values()]
    plain, norms, folded = _plain(model, inputs, fold)
    program = _program(plain, inputs, dynamic_batch)
    if format == "torch":
        data, stored = _torch_file(program), None
        by, gots = _run_torch(data, inputs, list(wanted.values()))
    else:
        names = ["input"] if len(inputs.values) == 1 else None
        data, stored = _onnx_file(program, opset, names, sparse=format == "onnx-sparse")
        by, gots = onnx_files.run(data, [list(values) for values in wanted.values()])
    error = max(map(_difference, gots, wants))
    write_whole(path, (data,))
    return ExportReport(
        path=str(path),
        format=format,
        opset=None if format == "torch" else opset,
        file_bytes=len(data),
        dynamic_batch=dynamic_batch,
        norms=norms,
        folded=folded,
        verified_by=by,
        verified_batches=tuple(wanted),
        error=error,
        layers=tuple(_layers(plain, format, stored)),
    )


class _Inputs:
    """The example: its tensors on the CPU in the order of the call, and how to call with others."""

    def __init__(self, example):
        args, kwargs = call_arguments(example)
        self.names = list(kwargs)
        self.values = [*args, *kwargs.values()]
        if not self.values or not all(isinstance(value, Tensor) for value in self.values):
            raise ValueError("example_inputs must be tensors, one or several")
        self.size = self.values[0].size(0) if self.values[0].dim() else 0

    def call(self, model: nn.Module, values: Sequence[Tensor]):
        """The model's output, on its own device."""
        place = next(iter(model.parameters()), torch.empty(0)).device
        args, kwargs = self.pack([value.to(place) for value in values])
        return model(*args, **kwargs)

    def pack(self, values: Sequence) -> tuple[tuple, dict]:
        """(args, kwargs) with one thing per input."""
        if self.names:
            return (), dict(zip(self.names, values, strict=True))
        return tuple(values), {}

    def batched(self, value: Tensor) -> bool:
        return value.dim() > 0 and value.size(0) == self.size

    def of_size(self, size: int) -> list[Tensor]:
        """The example, repeated or cut to a batch of this size."""
        rows = torch.arange(size) % self.size
        return [v[rows.to(v.device)] if self.batched(v) else v for v in self.values]

    def batches(self) -> dict[int, list[Tensor]]:
        """size -> inputs: the example, a single one, and more than torch.export saw."""
        return {size: self.of_size(size) for size in (self.size, 1, max(self.size, 2) + 1)}


def _check(format: str, opset: int, inputs: _Inputs, dynamic_batch: bool) -> None:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if opset < onnx_files.LEAST_OPSET:
        raise ValueError(f"opset must be {onnx_files.LEAST_OPSET} or later, got {opset}")
    if dynamic_batch and inputs.size < 1:
        raise ValueError("example_inputs have no batch: give one, or pass dynamic_batch=False")
    if format != "torch" and any(value.dtype == torch.bfloat16 for value in inputs.values):
        raise ValueError("example_inputs are bfloat16, which numpy lacks: convert to float32")


def _plain(model: nn.Module, inputs: _Inputs, fold: bool) -> tuple[nn.Module, int, int]:
    """(a dense copy on the CPU in eval mode, its BatchNorms, those of them folded)."""
    plain = densify(model).cpu().eval().requires_grad_(False)
    norms = _count_norms(plain)
    if fold:
        if len(inputs.values) > 1 or inputs.names:
            raise ValueError("fold needs a network with one input, given as a tensor")
        plain = fold_batchnorm(plain, inputs.values[0].cpu())
    return plain, norms, norms - _count_norms(plain)


def _count_norms(model: nn.Module) -> int:
    return sum(isinstance(module, _NORMS) for module in model.modules())


def _program(plain: nn.Module, inputs: _Inputs, dynamic_batch: bool):
    """The network as torch.export sees it, without the example and the names of source files."""
    values, shapes = inputs.values, None
    if dynamic_batch:
        values = inputs.of_size(max(inputs.size, 2))  # a size of 1 would be taken as fixed
        batch = torch.export.Dim("batch")
        shapes = [{0: batch} if inputs.batched(value) else {} for value in inputs.values]
        args, kwargs = inputs.pack(shapes)
        shapes = kwargs or args
    args, kwargs = inputs.pack([value.cpu() for value in values])
    try:
        program = torch.export.export(plain, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        hint = "; if it only takes one batch size: dynamic_batch=False" if dynamic_batch else ""
        raise ExportError(f"torch.export cannot follow this network: {_brief(error)}{hint}") from (
            error
        )
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def _torch_file(program: torch.export.ExportedProgram) -> bytes:
    program.example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _run_torch(data: bytes, inputs: _Inputs, batches: Sequence[Sequence[Tensor]]):
    module = torch.export.load(io.BytesIO(data)).module()
    with torch.no_grad():
        gots = [tree_leaves(inputs.call(module, values)) for values in batches]
    return f"torch {torch.__version__}", gots


def _onnx_file(program, opset: int, names: Sequence[str] | None, sparse: bool):
    """(the file's bytes, its initialisers by name)."""
    try:
        model = onnx_files.to_onnx(program, opset, names)
    except Exception as error:
        raise ExportError(f"torch.onnx cannot write this network: {_brief(error)}") from error
    if sparse:
        onnx_files.sparse_initializers(model)
    return model.SerializeToString(), onnx_files.initializers(model)


def _difference(got: Sequence, want: Sequence) -> float:
    """The largest relative difference of outputs.

    Raises:
        ExportError: another number of outputs, other shapes, or a difference beyond rounding.
    """
    got, want = ([y.cpu() for y in ys if isinstance(y, Tensor)] for ys in (got, want))
    shapes = [[tuple(y.shape) for y in ys] for ys in (got, want)]
    if shapes[0] != shapes[1]:
        raise ExportError(f"the file would give outputs {shapes[0]}, the model gives {shapes[1]}")
    worst = 0.0
    for ours, theirs in zip(want, got, strict=True):
        if ours.numel() == 0:
            continue
        half = ours.dtype in (torch.float16, torch.bfloat16)
        error = relative_error(theirs.double(), ours.double())
        if error > (HALF_TOLERANCE if half else TOLERANCE):
            raise ExportError(
                f"the file would compute something else: its output differs by {error:.2g} of the "
                "largest one; nothing was written"
            )
        worst = max(worst, error)
    return worst


def _layers(plain: nn.Module, format: str, stored: Mapping | None) -> list[ExportedLayer]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in plain.named_modules(remove_duplicate=False):
        if isinstance(module, (_ConvNd, nn.Linear)):
            names.setdefault(module, []).append(name)
    return [_layer(module, found, format, stored) for module, found in names.items()]


def _layer(module: nn.Module, names: list[str], format: str, stored) -> ExportedLayer:
    weight = module.weight.detach()
    zeros = 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)
    how, size = "dense", weight.numel() * weight.element_size()
    if stored is not None:
        how, size = _find(weight, names, stored)
    if not zeros:
        note = "no zeros"
    elif how == "sparse":
        note = _MADE_DENSE
    else:
        note = _MULTIPLIED["torch" if format == "torch" else "onnx"]
    return ExportedLayer(tuple(names), tuple(weight.shape), zeros, how, size, note)


def _find(weight: Tensor, names: list[str], stored: Mapping) -> tuple[str, int]:
    """How a layer's weight lies in the file, as it is or transposed, and its bytes."""
    array = weight.numpy()
    for name in names:
        how, size, _ = stored.get(f"{name}.weight" if name else "weight", (None, 0, None))
        if how:
            return how, size
    for how, size, found in stored.values():
        same = found.shape == array.shape and (found == array).all()
        if same or (found.shape == array.T.shape and (found == array.T).all()):
            return how, size
    return "computed", 0


def _brief(error: Exception) -> str:
    """The first line of a message that tells something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
