"""The relaxed network: shapes, mixing, derivation, recomputation, partial channels."""

import math

import pytest
import torch
from torch import nn

from dass.genotype import Edge
from dass.space import CONCAT, EDGES, OPS, edge_index
from dass.supernet import Architecture, Choice, Supernet, choices_of, still_statistics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Supernet(4, 3, 5)


@pytest.fixture
def architecture(network):
    return Architecture(network.choices)


def test_alphas_are_outside_the_network(network, architecture):
    inside = {id(p) for p in network.parameters()}
    assert not inside & {id(p) for p in architecture.parameters()}
    assert [tuple(p.shape) for p in architecture.parameters()] == [(EDGES, len(OPS))] * 2
    values = torch.cat([p.detach().flatten() for p in architecture.parameters()])
    assert 0.0005 < values.std() < 0.0015


@pytest.mark.parametrize("layers", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [8, 9])
def test_the_output_and_the_gradients(layers, size):
    network = Supernet(4, layers, 5)
    architecture = Architecture(network.choices)
    y = network(torch.randn(2, 3, size, size), architecture.weights())
    assert y.shape == (2, 5)
    y.square().sum().backward()
    used = architecture.normal, *([architecture.reduce] if layers > 2 else [])
    assert all(bool(p.grad.abs().sum() > 0) for p in used)
    assert all(p.grad is not None for p in network.parameters())


def test_a_one_hot_architecture_is_the_discrete_network(network):
    """With all weight on one choice an edge is that operation alone."""
    x = torch.randn(2, 4, 8, 8)
    edge = network.cells[0].edges[0]
    for i, op in enumerate(edge.ops):
        weights = torch.zeros(len(edge.ops))
        weights[i] = 1
        with still_statistics(network):
            torch.testing.assert_close(edge(x, weights), op(x))


def test_channels_double_at_a_third_and_two_thirds():
    network = Supernet(4, 6, 5)
    kinds = [cell.kind for cell in network.cells]
    assert kinds == ["normal", "normal", "reduce", "normal", "reduce", "normal"]
    assert network.classifier.in_features == 4 * 4 * 4


def test_the_derived_genotype_keeps_the_two_strongest_edges_and_never_none():
    choices = choices_of()
    architecture = Architecture(choices)
    none, skip, conv = (
        [c.op for c in choices].index(op) for op in ("none", "skip_connect", "sep_conv_3x3")
    )
    with torch.no_grad():
        for alpha in architecture.parameters():
            alpha.zero_()
            alpha[:, none] = 5.0
        for node in CONCAT:
            architecture.normal[edge_index(node, 0), conv] = 3.0
            architecture.normal[edge_index(node, node - 1), skip] = 2.0
    genotype = architecture.genotype()
    for node, edges in zip(CONCAT, genotype.normal, strict=True):
        assert edges == (Edge("sep_conv_3x3", 0), Edge("skip_connect", node - 1))
    assert all(edge.op != "none" for node in genotype.reduce for edge in node)


def test_densities_as_choices():
    choices = choices_of((0.1, 0.05))
    assert Choice("sep_conv_3x3", 0.05) in choices and Choice("skip_connect") in choices
    assert len(choices) == 4 + 4 * 2
    architecture = Architecture(choices)
    with torch.no_grad():
        architecture.normal[:, choices.index(Choice("dil_conv_5x5", 0.05))] = 1.0
    assert {edge.density for node in architecture.genotype().normal for edge in node} == {0.05}


def test_recomputation_changes_nothing_but_memory():
    x = torch.randn(4, 3, 8, 8)
    found = {}
    for recompute in (False, True):
        torch.manual_seed(0)
        network = Supernet(4, 3, 5, recompute=recompute)
        architecture = Architecture(network.choices)
        saved = 0

        def count(tensor):
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            y = network(x, architecture.weights())
        kept = saved
        y.square().sum().backward()
        gradients = [p.grad for p in (*network.parameters(), *architecture.parameters())]
        found[recompute] = (y, gradients, list(network.buffers()), kept)
    plain, again = found[False], found[True]
    assert torch.equal(plain[0], again[0])
    for a, b in zip(plain[1], again[1], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    for a, b in zip(plain[2], again[2], strict=True):  # running statistics moved once, not twice
        assert torch.equal(a, b)
    assert again[3] < plain[3] / 5


@pytest.mark.parametrize("partial", [2, 4])
def test_partial_channels(partial):
    torch.manual_seed(0)
    network = Supernet(4, 3, 5, partial=partial)
    assert network(torch.randn(2, 3, 8, 8), Architecture(network.choices).weights()).shape == (2, 5)
    edge = network.cells[0].edges[0]
    assert edge.taking_part == 4 // partial
    x = torch.randn(1, 4, 6, 6)
    y = edge(x, torch.zeros(len(OPS)))  # nothing is mixed in: the others pass, interleaved
    rest = x[:, 4 // partial :]
    assert sorted(y.flatten(2).abs().sum(-1)[0].tolist())[4 // partial :] == pytest.approx(
        sorted(rest.flatten(2).abs().sum(-1)[0].tolist())
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, 5), "channels"),
        ((4, 0, 5), "layers"),
        ((4, 3, 0), "classes"),
        ((4, 3, 5, None), None),
    ],
)
def test_sizes_are_checked(arguments, message):
    if message is None:
        with pytest.raises(ValueError, match="partial must divide channels, got 3 and 4"):
            Supernet(*arguments, partial=3)
    else:
        with pytest.raises(ValueError, match=f"{message} must be at least 1, got 0"):
            Supernet(*arguments)


def test_still_statistics_restores_even_after_an_error():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    norm = network[1]
    before = norm.running_mean.clone()
    with pytest.raises(RuntimeError, match="stop"), still_statistics(network):
        network(torch.randn(2, 3, 4, 4))
        raise RuntimeError("stop")
    assert torch.equal(norm.running_mean, before) and int(norm.num_batches_tracked) == 0
    network(torch.randn(2, 3, 4, 4))
    assert norm.momentum == 0.1 and int(norm.num_batches_tracked) == 1
    assert not math.isclose(float(norm.running_mean.sum()), float(before.sum()))
