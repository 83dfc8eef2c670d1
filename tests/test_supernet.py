"""The relaxed network: shapes, mixing, derivation, recomputation, partial channels."""

import pytest
import torch

from dass.genotype import Edge
from dass.space import CONCAT, EDGES, OPS, edge_index
from dass.supernet import Architecture, Choice, Supernet, choices_of

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


def test_a_one_hot_architecture_is_the_discrete_network():
    """With all weight of an edge on one choice, a node is the sum of these operations alone."""
    torch.manual_seed(0)
    network = Supernet(4, 3, 5).double()
    cell = network.cells[1]
    assert cell.kind == "reduce"
    a = torch.randn(2, 12, 6, 6, dtype=torch.double)
    b = torch.randn(2, 16, 6, 6, dtype=torch.double)
    for shift in range(len(OPS)):
        weights = torch.zeros(EDGES, len(OPS), dtype=torch.double)
        chosen = [(edge + shift) % len(OPS) for edge in range(EDGES)]
        weights[range(EDGES), chosen] = 1
        states = [cell.inputs[0](a), cell.inputs[1](b)]
        for node in CONCAT:
            edges = [edge_index(node, source) for source in range(node)]
            ops = [cell.edges[e].ops[chosen[e]] for e in edges]
            states.append(sum(op(x) for op, x in zip(ops, list(states), strict=True)))
        torch.testing.assert_close(cell(a, b, weights), torch.cat(states[2:], 1))


def test_pools_are_shared_by_the_edges_of_a_source_and_convolutions_are_not(network):
    pool, conv = list(OPS).index("max_pool_3x3"), list(OPS).index("sep_conv_3x3")
    for cell in network.cells:
        of_one = [cell.edges[edge_index(node, 1)].ops for node in CONCAT]
        assert len({id(ops[pool]) for ops in of_one}) == 1
        assert len({id(ops[conv]) for ops in of_one}) == len(CONCAT)
        assert cell.edges[edge_index(2, 0)].ops[pool] is not of_one[0][pool]


def test_the_shapes_that_operations_get(network):
    seen = {}
    for cell in network.cells:
        for edge in cell.edges:
            conv = edge.ops[list(OPS).index("sep_conv_3x3")][1]
            conv.register_forward_hook(
                lambda _, args, y, edge=edge: seen.update({edge: tuple(args[0].shape[1:])})
            )
    network(torch.randn(1, 3, 9, 7), Architecture(network.choices).weights())
    assert network.edge_shapes((3, 9, 7)) == seen
    assert {edge.stride for edge in seen} == {1, 2}


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
    assert not plain[2] and not again[2]  # no running statistics, which would move twice
    assert again[3] < plain[3] / 5


@pytest.mark.parametrize("partial", [2, 4])
def test_partial_channels(partial):
    torch.manual_seed(0)
    network = Supernet(4, 3, 5, partial=partial)
    architecture = Architecture(network.choices)
    for size in (8, 9):
        assert network(torch.randn(2, 3, size, size), architecture.weights()).shape == (2, 5)
    cell = network.cells[0]
    assert cell.taking_part == 4 // partial
    a, b = torch.randn(2, 1, 12, 6, 6)
    y = cell(a, b, torch.zeros(EDGES, len(OPS)))[:, :4]  # nothing is mixed in: the others pass
    rest = sum(before(x)[:, 4 // partial :] for before, x in zip(cell.inputs, (a, b), strict=True))
    expected = torch.zeros(1, partial, 4 // partial, 6, 6)  # interleaved
    expected[:, 1:] = rest.unflatten(1, (partial - 1, 4 // partial))
    torch.testing.assert_close(y, expected.transpose(1, 2).flatten(1, 2))


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
