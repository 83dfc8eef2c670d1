"""What ``dass export`` does: a saved network into a file for another runtime, and a report."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from dass.exporting import ExportError, ExportReport, export
from dass.report import Report, Section, Table
from dass.runs import UserError, model_file
from dass.sources import image_shape, load_model, run_on
from dass.tables import megabytes, percent

__all__ = ["export_network"]


def export_network(
    source: str,
    out: Path | None,
    *,
    format: str,
    fold: bool = False,
    opset: int = 18,
    batch: int | None = None,
    shape: tuple[int, ...] | None = None,
    size: int | None = None,
    model: str | None = None,
) -> Report:
    """Exports the network of a run folder or a file of ``dass.save``.

    Args:
        out: the file; None: beside the network's.
        format, fold, opset: see :func:`dass.export`.
        batch: the only batch size; None: any.
        shape: of one input, without the batch. Default: the zoo network's, with `size` as height
            and width if given.
        model: "package.module:function", for a network that is not of the zoo.

    Raises:
        UserError: what the user can put right, a missing package among it.
    """
    file = model_file(source)
    out = out or file.with_suffix(".pt2" if format == "torch" else ".onnx")
    for option, value in (("--batch", batch), ("--size", size)):
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, got {value}")
    if out.exists() and out.samefile(file):
        raise UserError(f"-o {out} is the network itself: name another file")
    network = load_model(source, model).eval()
    shape = shape or image_shape(network, size)
    x = torch.randn((batch or 1, *shape), generator=torch.Generator().manual_seed(0))
    run_on(network, x, "an input of that shape")
    try:
        found = export(network, out, x, format, fold=fold, dynamic_batch=batch is None, opset=opset)
    except (ExportError, ImportError, ValueError) as error:
        raise UserError(str(error)) from None
    return _report(source, file.stat().st_size, found)


def _report(source: str, saved: int, found: ExportReport) -> Report:
    sizes = [math.prod(row.shape) for row in found.layers]
    zeros = sum(row.zeros * size for row, size in zip(found.layers, sizes, strict=True))
    columns = ("layer", "weight", "zeros", "stored", "bytes", "what the target does")
    figures = [
        (megabytes(found.file_bytes), f"on disk; as a file of dass {megabytes(saved)}"),
        (percent(zeros / max(sum(sizes), 1)), f"zeros of {sum(sizes):,} weights"),
    ]
    return Report(
        f"dass export: {Path(source).name} to {found.format}",
        found.summary(),
        figures,
        [Section("Layers", items=[Table(columns, found.rows(), aside=["weight"])])],
        found.to_dict(),
    )
