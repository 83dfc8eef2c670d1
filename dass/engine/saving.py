"""A compiled network on disk: the simplified graph, and what was decided on this machine.

Nothing is pickled and nothing read is executed, but for operations of torch by their name in
``torch.ops.aten`` that take tensors and numbers. The graph is checked before memory is laid out by
it: shapes are worked out again, since kernels take theirs on trust.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable

import torch
from torch import Tensor

from dass.encoding import DTYPES, CorruptFileError, decode, store
from dass.engine import graph as g
from dass.engine.channels import Report
from dass.engine.depth_first import Fusion
from dass.engine.programs import Decisions
from dass.engine.shapes import output_shape
from dass.engine.tuning import Kernel
from dass.sealed import ENGINE, read_header, read_tensors, write_sealed

MOST_ELEMENTS = 2**31  # of one picture: offsets are int32
MOST_WEIGHTS = 2**30  # of all: what a file may have allocated before its graph is known to fit
KINDS = {
    kind.__name__: kind
    for kind in (
        *(g.Input, g.Conv, g.Linear, g.Pool, g.Mean, g.Add, g.Mul, g.Affine, g.Act),
        *(g.Concat, g.Flatten, g.Torch),
    )
}
# Arguments of torch's operations that are strings and choose how something is computed.
WORDS = {"approximate", "mode", "padding_side", "reduce", "rounding_mode", "side"}
_WRONG = (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, RecursionError)


@dataclasses.dataclass
class Saved:
    """What a file holds.

    machine: where `programs` were decided. programs: (segment, whether images lie side by side) ->
    decisions. batch: of the example. side_by_side: whether batches run so.
    """

    graph: g.Graph
    removed: Report
    precision: str
    machine: str
    batch: int
    side_by_side: bool
    programs: dict[tuple[int, bool], Decisions]


def write_engine(path: str | os.PathLike, saved: Saved) -> None:
    """Writes one safetensors file, whole or not at all, as small as the nonzeros.

    Raises:
        ValueError: a node that :func:`read_engine` would refuse. OSError: not writable.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict] = {}

    def keep(key: str, value: Tensor) -> dict:
        value = value.detach().contiguous()
        word = str(value.dtype).removeprefix("torch.")
        if word not in DTYPES:
            raise ValueError(f"{key} has dtype {value.dtype}; known: {', '.join(DTYPES)}")
        entries[key] = {"shape": list(value.shape), "dtype": word, **store(tensors, key, value)}
        return {"tensor": key}

    graph = {
        "nodes": [_describe(node, keep) for node in saved.graph],
        "outputs": saved.graph.outputs,
        "batch": saved.graph.batch,
    }
    _check_entries(entries)
    check_graph(saved.graph)
    programs = [
        {"segment": index, "side_by_side": wide, **dataclasses.asdict(decisions)}
        for (index, wide), decisions in saved.programs.items()
    ]
    facts = {
        "machine": saved.machine,
        "batch": saved.batch,
        "side_by_side": saved.side_by_side,
        "programs": programs,
    }
    parts = {"entries": entries, "graph": graph, "removed": vars(saved.removed), "decided": facts}
    metadata = {f"dass.{key}": json.dumps(part) for key, part in parts.items()}
    write_sealed(path, ENGINE, tensors, {**metadata, "dass.precision": saved.precision})


def _describe(node: g.Node, keep: Callable[[str, Tensor], dict]) -> dict:
    """A node's fields as JSON; `keep` puts a tensor away and says where."""

    def plain(key: str, value):
        if isinstance(value, Tensor):
            return keep(f"{node.name}.{key}", value)
        if key == "constants":
            return {name: keep(f"{node.name}.constants.{name}", t) for name, t in value.items()}
        return value

    fields = {f.name: plain(f.name, getattr(node, f.name)) for f in dataclasses.fields(node)}
    return {"node": type(node).__name__, **fields}


def read_engine(path: str | os.PathLike) -> Saved:
    """What :func:`write_engine` wrote.

    Raises:
        CorruptFileError, VersionError (ValueError): not such a file, or not whole. OSError.
    """
    metadata = read_header(path, ENGINE)
    try:
        parts = {
            key: json.loads(metadata[f"dass.{key}"])
            for key in ("entries", "graph", "removed", "decided")
        }
        _check_entries(parts["entries"])
        tensors = decode(read_tensors(path), parts["entries"])
        nodes = [_node(row, tensors) for row in parts["graph"]["nodes"]]
        outputs = _list(_string)(parts["graph"]["outputs"])
        graph = g.Graph(nodes, outputs, _optional(_positive)(parts["graph"]["batch"]))
        check_graph(graph)
        facts = parts["decided"]
        return Saved(
            graph,
            Report(
                {_string(k): _integer(v) for k, v in parts["removed"]["channels"].items()},
                _list(_string)(parts["removed"]["nodes"]),
            ),
            metadata["dass.precision"],
            _string(facts["machine"]),
            _positive(facts["batch"]),
            _boolean(facts["side_by_side"]),
            {
                (_integer(row["segment"]), _boolean(row["side_by_side"])): _decisions(row)
                for row in facts["programs"]
            },
        )
    except CorruptFileError as error:
        raise CorruptFileError(f"{path}: {error}") from None
    except _WRONG as error:
        raise CorruptFileError(f"{path}: not as engine.save writes it ({error})") from None


def _check_entries(entries: dict) -> None:
    total = 0
    for entry in entries.values():
        shape = _list(_integer)(entry["shape"])
        if entry["dtype"] not in DTYPES or min(shape, default=0) < 0:
            raise ValueError(f"unknown {entry}")
        total += math.prod(shape)
    if total > MOST_WEIGHTS:
        raise ValueError(f"{total:,} weights, at most {MOST_WEIGHTS:,} are allowed")


# Fields, by their types' names in `dass.engine.graph`.


def _exactly(kind: type) -> Callable:
    def read(value):
        if type(value) is not kind:
            raise ValueError(f"{value!r} is no {kind.__name__}")
        return value

    return read


_string, _integer, _boolean = _exactly(str), _exactly(int), _exactly(bool)


def _positive(value) -> int:
    if _integer(value) < 1:
        raise ValueError(f"{value} where at least 1 is needed")
    return value


def _optional(read: Callable) -> Callable:
    return lambda value: None if value is None else read(value)


def _list(read: Callable) -> Callable:
    return lambda values: [read(value) for value in _exactly(list)(values)]


def _tuple(read: Callable, length: int | None = None) -> Callable:
    def found(values):
        items = tuple(_list(read)(values))
        if length is not None and len(items) != length:
            raise ValueError(f"{values} where {length} are needed")
        return items

    return found


_READ = {
    "str": _string,
    "str | None": _optional(_string),
    "bool": _boolean,
    "int": _positive,
    "list": _exactly(list),
    "dict": _exactly(dict),
    "list[str]": _list(_string),
    "tuple[int, ...]": _tuple(_positive),
    "tuple[int, int]": _tuple(_positive, 2),
    "tuple[int, int, int, int]": _tuple(_integer, 4),
}


def _node(row: dict, tensors: dict[str, Tensor]) -> g.Node:
    kind = KINDS[row["node"]]

    def read(field: dataclasses.Field):
        value = row[field.name]
        if field.type == "dict[str, Tensor]":
            return {_string(name): tensors[at["tensor"]] for name, at in value.items()}
        if field.type in ("Tensor", "Tensor | None"):
            return None if value is None and "None" in field.type else tensors[value["tensor"]]
        return _READ[field.type](value)

    return kind(**{field.name: read(field) for field in dataclasses.fields(kind)})


def _decisions(row: dict) -> Decisions:
    fusions = []
    for each in row["fusions"]:
        names = (_optional(_string)(each[key]) for key in ("depthwise", "expand", "project"))
        fusions.append(Fusion(*names, strip=_positive(each["strip"])))
    kernels = [
        Kernel(
            _boolean(each["emitted"]),
            *(_integer(each[key]) for key in ("height", "vectors", "chunk", "depth", "deep")),
        )
        for each in row["kernels"]
    ]
    return Decisions(fusions, kernels, _exactly(dict)(row["measured"]))


# Checks


def check_graph(graph: g.Graph) -> None:
    """That every node follows from its inputs: names, order, sizes of weights, shapes.

    Raises:
        ValueError and others: it does not.
    """
    if not isinstance(graph.nodes[0], g.Input) or len(graph.outputs) != 1:
        raise ValueError("a network has one input, its first node, and one output")
    shapes: dict[str, tuple[int, ...]] = {}
    for node in graph:
        if node.name in shapes or not re.fullmatch(r"[\w.]+", node.name):
            raise ValueError(f"the name {node.name!r} is taken or none")
        if math.prod(node.shape) > MOST_ELEMENTS or len(node.shape) > 6:
            raise ValueError(f"{node.name} is {node.shape}")
        inputs = [shapes[name] for name in node.inputs]
        if isinstance(node, g.Input):
            if node is not graph.nodes[0] or len(node.shape) != 3:
                raise ValueError(f"{node.name} is no input of a network")
        elif isinstance(node, g.Torch):
            check_operation(node)
        else:
            _check_parameters(node, inputs)
            if (found := output_shape(node, inputs)) != tuple(node.shape):
                raise ValueError(f"{node.name} is {node.shape}, its inputs give {found}")
        shapes[node.name] = node.shape
    _ = shapes[graph.outputs[0]]


def _check_parameters(node: g.Node, inputs: list[tuple[int, ...]]) -> None:
    """What its shape does not depend on."""
    if not inputs or any(len(shape) not in (1, 3) for shape in inputs):
        raise ValueError(f"{node.name} with the inputs {inputs}")
    if getattr(node, "activation", None) not in (None, *g.ACTIVATIONS):
        raise ValueError(f"{node.name} with the activation {node.activation!r}")
    for key in ("weight", "bias", "scale"):
        value = getattr(node, key, None)
        if value is not None and value.dtype != torch.float32:
            raise ValueError(f"{node.name} with {key} in {value.dtype}")
        if value is not None and key != "weight" and tuple(value.shape) != node.shape[:1]:
            raise ValueError(f"{node.name} with {key} {tuple(value.shape)}")
    if isinstance(node, g.Pool) and node.kind not in ("max", "avg"):
        raise ValueError(f"{node.name} is a pool of kind {node.kind!r}")
    if isinstance(node, (g.Conv, g.Pool)) and _padded(inputs[0], node.padding) > MOST_ELEMENTS:
        raise ValueError(f"{node.name} with padding {node.padding}")


def _padded(shape: tuple[int, ...], padding: tuple[int, int, int, int]) -> int:
    """Elements with what is put around each plane."""
    top, bottom, left, right = (max(pad, 0) for pad in padding)
    return shape[0] * (shape[-2] + top + bottom) * (shape[-1] + left + right)


def check_operation(node: g.Torch) -> None:
    """Refuses what is no function of tensors and numbers alone: it may reach files, or write.

    Raises:
        ValueError: an operation that no engine's file may name.
    """
    space, _, rest = node.target.partition(".")
    name, _, overload = rest.partition(".")
    packet = getattr(torch.ops.aten, name, None) if space == "aten" else None
    if packet is None or overload not in packet.overloads():
        raise ValueError(f"{node.target} is no operation of torch.ops.aten")
    schema = getattr(packet, overload)._schema
    types = {argument.name: str(argument.type) for argument in schema.arguments}
    strange = [key for key, kind in types.items() if "str" in kind and key not in WORDS]
    returns = [str(each.type) for each in schema.returns]
    if strange or schema.is_mutable or returns != ["Tensor"]:
        raise ValueError(f"{node.target} may not stand in a file: {schema}")
    _check_arguments(node, [node.arguments, list(node.options.values())])


def _check_arguments(node: g.Torch, value) -> None:
    if isinstance(value, list):
        for item in value:
            _check_arguments(node, item)
    elif isinstance(value, dict):
        ((kind, what),) = value.items()
        good = {
            "input": lambda: type(what) is int and 0 <= what < len(node.inputs),
            "constant": lambda: what in node.constants,
            "batch": lambda: what is True,
            "torch": lambda: isinstance(
                getattr(torch, what), torch.dtype | torch.layout | torch.memory_format
            ),
        }
        if not good[kind]():
            raise ValueError(f"{node.target} with the argument {value}")
