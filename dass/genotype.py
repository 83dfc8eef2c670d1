"""Cells as data: which operation reads which node. Parsed from JSON, never evaluated."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from dass.space import CONCAT, INPUTS, NODES, OPS, has_weights

CELLS = ("normal", "reduce")


class Edge(NamedTuple):
    """An operation and the node that it reads (numbered as in `dass.space`).

    density: the share of its weights to keep, in (0, 1]; None: the network's.
    """

    op: str
    input: int
    density: float | None = None


Cell = tuple[tuple[Edge, Edge], ...]


@dataclass(frozen=True)
class Genotype:
    """The normal and the reduction cell, each with two edges into each of its four nodes.

    The cell's output is the concatenation of all four nodes. Equal genotypes hash alike. Lists and
    plain tuples are taken in place of tuples of `Edge`.

    Args:
        normal: per node 2..5, in order, two ``(op, input)`` or ``(op, input, density)``.
        reduce: likewise, of the cell that halves height and width.

    Raises:
        ValueError: anything else; the message says which cell, node and edge.
    """

    normal: Cell
    reduce: Cell

    concat: ClassVar[tuple[int, ...]] = CONCAT

    def __post_init__(self):
        for cell in CELLS:
            object.__setattr__(self, cell, _checked_cell(cell, getattr(self, cell)))

    @classmethod
    def from_json(cls, source: str | os.PathLike) -> Genotype:
        """Reads what `to_json` writes.

        Args:
            source: JSON text (its first character that is no space is ``{``), else the path of a
                file with it.

        Raises:
            ValueError: no JSON, or no genotype. OSError: no such file.
        """
        if isinstance(source, os.PathLike) or not str(source).lstrip().startswith("{"):
            text = Path(source).read_text(encoding="utf-8")
        else:
            text = source
        try:
            fields = json.loads(text, object_pairs_hook=_without_duplicates)
        except RecursionError:
            raise ValueError("no genotype: nested too deeply") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"no JSON: {error}") from None
        return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, fields: dict) -> Genotype:
        """The genotype of parsed JSON: keys normal, reduce and, if it is there, concat.

        Raises:
            ValueError: other keys, another concat than 2..5, or a cell that is none.
        """
        if not isinstance(fields, dict):
            raise ValueError(f"a genotype is an object with normal and reduce, got {fields!r:.80}")
        if missing := [cell for cell in CELLS if cell not in fields]:
            raise ValueError(f"the genotype lacks {' and '.join(missing)}")
        if unknown := sorted(set(fields) - {*CELLS, "concat"}):
            raise ValueError(f"unknown in a genotype: {', '.join(unknown)}")
        concat = fields.get("concat", list(CONCAT))
        if concat != list(CONCAT) or any(type(n) is not int for n in concat):
            raise ValueError(f"concat must be {list(CONCAT)}, got {concat!r:.80}")
        return cls(fields["normal"], fields["reduce"])

    def to_json(self) -> str:
        """An object of three keys, a line per node: ``[["skip_connect", 0], ["none", 1, 0.1]]``."""
        lines = []
        for cell in CELLS:
            nodes = (json.dumps([_plain(edge) for edge in node]) for node in getattr(self, cell))
            lines.append(f'  "{cell}": [\n    ' + ",\n    ".join(nodes) + "\n  ]")
        lines.append(f'  "concat": {json.dumps(list(CONCAT))}')
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def random(cls, seed: int = 0) -> Genotype:
        """A uniform draw: per node two distinct earlier nodes, each through any operation but none.

        It depends on ``seed`` alone, not on torch's generator: only ``random.Random(seed).random``
        is used, whose numbers Python promises not to change. An operation that is added to `OPS`
        changes what a seed draws. The neutral baseline of a search.

        Raises:
            ValueError: ``seed`` is no integer of at least 0.
        """
        if type(seed) is not int or seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
        generator = random.Random(seed)
        return cls(_random_cell(generator), _random_cell(generator))

    def skips(self) -> dict[str, int]:
        """Per cell, how many of the 8 edges are skip_connect: many tell of a failed search."""
        return {cell: [e.op for e in self._edges(cell)].count("skip_connect") for cell in CELLS}

    def parameter_free(self) -> dict[str, float]:
        """Per cell, the share of the 8 edges whose operation has no parameters.

        A skip_connect from node 0 or 1 of the reduction cell has stride 2 and so has some.
        """
        shares = {}
        for cell in CELLS:
            edges = self._edges(cell)
            strides = (2 if cell == "reduce" and edge.input < INPUTS else 1 for edge in edges)
            free = [not has_weights(edge.op, s) for edge, s in zip(edges, strides, strict=True)]
            shares[cell] = sum(free) / len(free)
        return shares

    def differences(self, other: Genotype) -> int:
        """How many of the 16 edges are not, at the same node, among those of the other."""
        mine, theirs = (g.normal + g.reduce for g in (self, other))
        return sum(edge not in at for node, at in zip(mine, theirs, strict=True) for edge in node)

    def _edges(self, cell: str) -> list[Edge]:
        return [edge for node in getattr(self, cell) for edge in node]


def _random_cell(generator: random.Random) -> list:
    ops = [op for op in OPS if op != "none"]

    def draw(choices):
        return choices[int(generator.random() * len(choices))]

    nodes = []
    for node in CONCAT:
        first, second = draw([(a, b) for b in range(node) for a in range(b)])
        nodes.append([(draw(ops), first), (draw(ops), second)])
    return nodes


def _checked_cell(name: str, nodes) -> Cell:
    if not isinstance(nodes, (list, tuple)) or len(nodes) != NODES:
        raise ValueError(f"{name} must be a list of {NODES} nodes, got {nodes!r:.80}")
    return tuple(
        _checked_node(f"{name}, node {n}", n, edges) for n, edges in zip(CONCAT, nodes, strict=True)
    )


def _checked_node(where: str, node: int, edges) -> tuple[Edge, Edge]:
    if not isinstance(edges, (list, tuple)) or len(edges) != 2:
        raise ValueError(f"{where} must be a list of 2 edges, got {edges!r:.80}")
    first, second = (
        _checked_edge(f"{where}, edge {i}", node, edge) for i, edge in enumerate(edges)
    )
    if first.input == second.input:
        raise ValueError(f"{where}: both edges read node {first.input}")
    return first, second


def _checked_edge(where: str, node: int, edge) -> Edge:
    if not isinstance(edge, (list, tuple)) or not 2 <= len(edge) <= 3:
        raise ValueError(f"{where} must be [op, input] or [op, input, density], got {edge!r:.80}")
    op, source, density = *edge, *[None] * (3 - len(edge))
    if not isinstance(op, str) or op not in OPS:
        raise ValueError(f"{where}: unknown op {op!r:.80}; known: {', '.join(OPS)}")
    if type(source) is not int or not 0 <= source < node:
        raise ValueError(f"{where} ({op}): input must be 0..{node - 1}, got {source!r:.80}")
    if density is None:
        return Edge(op, source)
    if type(density) not in (int, float) or not 0 < density <= 1:
        raise ValueError(f"{where} ({op}): density must be in (0, 1], got {density!r:.80}")
    return Edge(op, source, float(density))


def _plain(edge: Edge) -> list:
    return list(edge if edge.density is not None else edge[:2])


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("no genotype: a key is there twice")
    return fields
