"""Drawings of cells: valid XML, one edge per pair, every operation named, none on another."""

import io
import itertools
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dass import Genotype
from dass.drawing import draw_png, draw_svg
from dass.genotype import CELLS
from dass.space import CONCAT, OPS
from dass.zoo import FOUND, darts

SVG = "{http://www.w3.org/2000/svg}"


def groups(svg):
    return [g for g in ET.fromstring(svg).iter(SVG + "g") if "data-op" in g.attrib]


def expected(genotype):
    return [
        (cell, node, edge.input, edge.op)
        for cell in CELLS
        for node, edges in zip(CONCAT, getattr(genotype, cell), strict=True)
        for edge in edges
    ]


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_one_edge_per_pair_named_in_its_own_row(seed):
    genotype = Genotype.random(seed)
    drawn = groups(draw_svg(genotype))
    keys = ("data-cell", "data-node", "data-input", "data-op")
    facts = [(c, int(n), int(i), op) for c, n, i, op in ([g.get(k) for k in keys] for g in drawn)]
    assert facts == expected(genotype)
    for g in drawn:
        words = g.find(SVG + "text").text
        assert words.replace("\u00d7", "x").replace(" ", "_") == g.get("data-op")
        assert len([p for p in g.iter(SVG + "path") if p.get("class") == "edge"]) == 1
    boxes = [g.find(SVG + "rect").attrib for g in drawn]
    spans = sorted((float(b["y"]), float(b["y"]) + float(b["height"])) for b in boxes)
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(spans))


def test_everything_lies_inside_and_nothing_comes_from_outside():
    svg = draw_svg(Genotype.random(0))
    root = ET.fromstring(svg)
    width, height = float(root.get("width")), float(root.get("height"))
    for part in root.iter():
        if part.tag in (SVG + "rect", SVG + "text"):
            x, y = float(part.get("x", 0)), float(part.get("y", 0))
            assert 0 <= x <= x + float(part.get("width", 0)) <= width
            assert 0 <= y <= y + float(part.get("height", 0)) <= height
    assert "href" not in svg and "url(" not in svg and "@import" not in svg


@pytest.mark.parametrize("name", FOUND["cells"])
def test_found_cells_are_drawn_and_always_alike(name):
    genotype = darts.found_genotype(name)
    assert draw_svg(genotype) == draw_svg(Genotype.from_json(genotype.to_json()))
    for cell in CELLS:
        assert f"{genotype.skips()[cell]} skip" in draw_svg(genotype)


def test_every_operation_has_a_colour_and_shows_its_density():
    for op in OPS:
        nodes = [[(op, 0, 0.05), (op, 1, 1.0)]] * 4
        texts = [g.find(SVG + "text").text for g in groups(draw_svg(Genotype(nodes, nodes)))]
        assert all(t.endswith(("· 5 %", "· 100 %")) and len(t) < 22 for t in texts)


def test_png_is_the_same_picture():
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    genotype = Genotype.random(0)
    root = ET.fromstring(draw_svg(genotype))
    picture = image.open(io.BytesIO(draw_png(genotype, scale=1.0))).convert("RGB")
    assert picture.size == (int(root.get("width")), int(root.get("height")))
    for g in groups(draw_svg(genotype)):
        box = g.find(SVG + "rect").attrib
        at = (round(float(box["x"]) + 6), round(float(box["y"]) + float(box["height"]) / 2))
        assert "#{:02x}{:02x}{:02x}".format(*picture.getpixel(at)) == box["fill"]
    assert draw_png(genotype, scale=1.0) == draw_png(genotype, scale=1.0)


@pytest.mark.parametrize("scale", [0, -1, 11, float("nan")])
def test_scales_out_of_range(scale):
    with pytest.raises(ValueError, match=r"scale must be in \(0, 10\], got"):
        draw_png(Genotype.random(0), scale)


def test_what_is_no_genotype():
    with pytest.raises(TypeError, match=r"genotype must be a dass\.Genotype, got str"):
        draw_svg("darts_v2")
