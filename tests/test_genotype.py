"""Genotypes: JSON there and back, every rejection, random draws, what is counted."""

import copy
import json
import pickle
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dass
from dass.genotype import Edge, Genotype
from dass.space import CONCAT, OPS
from dass.zoo import FOUND, darts


def fields():
    return json.loads(Genotype.random(3).to_json())


@st.composite
def cells(draw):
    nodes = []
    for node in CONCAT:
        inputs = draw(st.permutations(range(node)))[:2]
        density = st.none() | st.floats(0, 1, exclude_min=True)
        nodes.append([(draw(st.sampled_from(list(OPS))), i, draw(density)) for i in inputs])
    return nodes


@given(cells(), cells())
def test_json_there_and_back(normal, reduce):
    genotype = Genotype(normal, reduce)
    again = Genotype.from_json(genotype.to_json())
    assert again == genotype
    assert hash(again) == hash(genotype)
    assert json.loads(genotype.to_json())["concat"] == [2, 3, 4, 5]


@pytest.mark.parametrize("name", FOUND["cells"])
def test_found_cells_are_genotypes_with_a_source(name, tmp_path):
    genotype = darts.found_genotype(name)
    assert FOUND["cells"][name]["source"]
    path = tmp_path / "genotype.json"
    path.write_text("\n " + genotype.to_json())
    assert Genotype.from_json(path) == Genotype.from_json(str(path)) == genotype
    assert Genotype.from_json(path.read_text()) == genotype


def test_a_cell_that_is_not_there():
    with pytest.raises(ValueError, match=r"unknown cell 'darts_v3'; known: dass_99, dass_95"):
        darts.found_genotype("darts_v3")


def test_equal_by_value_and_frozen():
    a, b = Genotype.random(1), Genotype.random(1)
    assert a == b
    assert {a: 1}[b] == 1
    assert copy.deepcopy(a) == pickle.loads(pickle.dumps(a)) == a
    assert a != Genotype.random(2)
    assert isinstance(a.normal[0][0], Edge)
    with pytest.raises(AttributeError):
        a.normal = b.normal
    assert dass.Genotype is Genotype


def change(path, value):
    """The fields of a genotype with one place changed."""
    changed = fields()
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (["normal"], {}, r"normal must be a list of 4 nodes, got \{\}"),
        (["reduce"], [[["none", 0]]], "reduce must be a list of 4 nodes"),
        (["normal", 1], "sep", "normal, node 3 must be a list of 2 edges, got 'sep'"),
        (["normal", 1], [["none", 0]], "normal, node 3 must be a list of 2 edges"),
        (["reduce", 3, 1], 7, r"reduce, node 5, edge 1 must be \[op, input\] or"),
        (["reduce", 3, 1], ["none"], r"reduce, node 5, edge 1 must be \[op, input\] or"),
        (["reduce", 3, 1], ["none", 0, 1, 1], r"reduce, node 5, edge 1 must be \[op, input\] or"),
        (["normal", 0, 0, 0], "conv", "node 2, edge 0: unknown op 'conv'; known: none, max_pool"),
        (["normal", 0, 0, 0], ["none"], r"node 2, edge 0: unknown op \['none'\]"),
        (["normal", 0, 0], ["none", 2], r"node 2, edge 0 \(none\): input must be 0\.\.1, got 2"),
        (["normal", 2, 1], ["none", -1], r"node 4, edge 1 \(none\): input must be 0\.\.3, got -1"),
        (["normal", 0, 0], ["none", True], "input must be"),
        (["normal", 0, 0], ["none", 1.0], "input must be"),
        (["normal", 0], [["none", 1], ["skip_connect", 1]], "node 2: both edges read node 1"),
        (["normal", 0, 0], ["none", 0, 0], r"edge 0 \(none\): density must be in \(0, 1\], got 0"),
        (["normal", 0, 0], ["none", 0, 1.5], "density must be"),
        (["normal", 0, 0], ["none", 0, "0.1"], "density must be"),
        (["normal", 0, 0], ["none", 0, True], "density must be"),
        (["normal", 0, 0], ["none", 0, float("nan")], "density must be"),
        (["concat"], [2, 3, 4], r"concat must be \[2, 3, 4, 5\], got \[2, 3, 4\]"),
        (["concat"], [2.0, 3, 4, 5], "concat must be"),
        (["concat"], None, "concat must be"),
        (["source"], "x", "unknown in a genotype: source"),
    ],
)
def test_every_rejection_says_where(path, value, says):
    with pytest.raises(ValueError, match=says):
        Genotype.from_json(json.dumps(change(path, value)))


def test_what_is_no_genotype_at_all():
    with pytest.raises(ValueError, match="lacks reduce"):
        Genotype.from_json(json.dumps({"normal": fields()["normal"]}))
    with pytest.raises(ValueError, match="no JSON: Expecting"):
        Genotype.from_json("{'normal': __import__('os')}")
    with pytest.raises(ValueError, match="a key is there twice"):
        Genotype.from_json('{"normal": [], "normal": []}')
    with pytest.raises(ValueError, match="nested too deeply"):
        Genotype.from_json('{"normal": ' + "[" * 200_000)
    with pytest.raises(ValueError, match=r"a genotype is an object .* got \[\]"):
        Genotype.from_dict([])
    with pytest.raises(FileNotFoundError):
        Genotype.from_json("no such file")


def test_a_file_that_is_no_object(tmp_path):
    path = tmp_path / "list.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"a genotype is an object .* got \[1\]"):
        Genotype.from_json(path)


def test_concat_may_be_left_out():
    shorter = fields()
    del shorter["concat"]
    assert Genotype.from_dict(shorter) == Genotype.random(3)


def test_random_draws_every_choice_alike():
    draws = [Genotype.random(seed) for seed in range(600)]
    edges = [edge for g in draws for cell in (g.normal, g.reduce) for n in cell for edge in n]
    ops = Counter(edge.op for edge in edges)
    assert set(ops) == set(OPS) - {"none"}
    # 9600 draws of 1 in 7: mean 1371, standard deviation 34.
    assert all(abs(count - 1371) < 5 * 34 for count in ops.values())
    last = Counter((g.normal[3][0].input, g.normal[3][1].input) for g in draws)
    assert set(last) == {(a, b) for b in range(5) for a in range(b)}


def test_random_depends_on_its_seed_alone():
    # random.Random(0) gives 0.844, 0.758, 0.421: pair 0 of 1, operations 5 and 2 of 7.
    assert Genotype.random(0).normal[0] == (Edge("dil_conv_3x3", 0), Edge("skip_connect", 1))
    for seed in (-1, 1.0, True, "1", None):
        with pytest.raises(ValueError, match="seed must be an integer of at least 0"):
            Genotype.random(seed)


def test_the_cell_of_99_percent_is_nearly_free_of_parameters():
    genotype = darts.found_genotype("dass_99")
    assert genotype.skips() == {"normal": 5, "reduce": 2}
    # In the reduction cell skip<-0 has stride 2 and so weights; skip<-4 and three pools have none.
    assert genotype.parameter_free() == {"normal": 7 / 8, "reduce": 4 / 8}
