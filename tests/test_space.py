"""The operations of the search space: shapes at every stride, what search and network differ in."""

import pytest
import torch
from torch import nn

from dass import space


def bn_like_one(op):
    """A FactorizedReduce with one BatchNorm over the joined convolutions."""
    bn = nn.BatchNorm2d(op.bn1.num_features + op.bn2.num_features)
    with torch.no_grad():
        for key, value in bn.state_dict().items():
            if value.ndim:
                value.copy_(torch.cat([op.bn1.state_dict()[key], op.bn2.state_dict()[key]]))
    return bn


def test_edges_are_numbered_node_by_node():
    ends = [space.edge_ends(edge) for edge in range(space.EDGES)]
    assert ends == [(node, source) for node in space.CONCAT for source in range(node)]
    assert [space.edge_index(*pair) for pair in ends] == list(range(space.EDGES))
    assert sum(range(space.INPUTS, space.INPUTS + space.NODES)) == space.EDGES


@pytest.mark.parametrize("pair", [(1, 0), (6, 0), (2, 2), (3, -1)])
def test_there_is_no_such_edge(pair):
    with pytest.raises(ValueError, match=f"no edge from node {pair[1]} to node {pair[0]}"):
        space.edge_index(*pair)


@pytest.mark.parametrize("edge", [-1, 14])
def test_there_is_no_edge_of_this_number(edge):
    with pytest.raises(ValueError, match=r"edge must be 0\.\.13, got"):
        space.edge_ends(edge)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 2)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", space.OPS)
def test_shape_at_every_stride_and_size(name, stride, size, search):
    op = space.OPS[name](6, stride, affine=not search, pool_norm=search)
    x = torch.randn(3, 6, *size, requires_grad=True)
    y = op(x)
    assert y.shape == (3, 6, *(-(-n // stride) for n in size))
    assert y.isfinite().all()
    if name != "none":
        y.square().sum().backward()
        assert x.grad is not None
        assert all(p.grad is not None for p in op.parameters())


@pytest.mark.parametrize("name", space.OPS)
def test_the_input_is_left_alone(name):
    x = torch.randn(2, 4, 6, 6)
    before = x.clone()
    space.OPS[name](4, 2)(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("name", "count"), [("max_pool_3x3", 1), ("avg_pool_3x3", 1)])
def test_pools_have_a_batchnorm_in_search_only(name, count):
    def norms(op):
        return [m for m in op.modules() if isinstance(m, nn.BatchNorm2d)]

    assert norms(space.OPS[name](4, 1)) == []
    (norm,) = norms(space.OPS[name](4, 1, affine=False, pool_norm=True))
    assert norm.weight is None


@pytest.mark.parametrize("name", space.OPS)
def test_affine_is_that_of_every_batchnorm(name):
    for affine in (False, True):
        for module in space.OPS[name](4, 2, affine=affine).modules():
            if isinstance(module, nn.BatchNorm2d):
                assert (module.weight is not None) == affine


def test_parameters_of_the_convolutions():
    """Depthwise k*k*C and 1x1 C*C, twice in sep_conv; C*C in all for the two halves of a skip."""
    c = 6
    expected = {"none": 0, "max_pool_3x3": 0, "avg_pool_3x3": 0, "skip_connect": c * c}
    for kernel in (3, 5):
        expected[f"sep_conv_{kernel}x{kernel}"] = 2 * (kernel * kernel * c + c * c)
        expected[f"dil_conv_{kernel}x{kernel}"] = kernel * kernel * c + c * c
    got = {name: sum(p.numel() for p in space.OPS[name](c, 2, affine=False).parameters())
           for name in space.OPS}  # fmt: skip
    assert got == expected
    for name in space.OPS:
        assert space.has_weights(name, 2) == (expected[name] > 0)
    assert not space.has_weights("skip_connect", 1)


@pytest.mark.parametrize("kernel", [3, 5])
def test_dilated_convolutions_reach_twice_as_far(kernel):
    op = space.OPS[f"dil_conv_{kernel}x{kernel}"](1, 1).eval()
    x = torch.ones(1, 1, 15, 15, requires_grad=True)
    op(x)[0, 0, 7, 7].backward()
    reached = sorted(set(x.grad[0, 0].nonzero().flatten().tolist()))
    assert reached == list(range(7 - (kernel - 1), 7 + kernel, 2))


def test_zero_is_zero_whatever_the_input_holds():
    x = torch.tensor([float("nan"), float("inf")]).view(1, 1, 1, 2)
    assert torch.equal(space.OPS["none"](1, 1)(x), torch.zeros(1, 1, 1, 2))


@pytest.mark.parametrize("cout", [2, 5, 8])
def test_factorized_reduce_is_that_of_the_paper_on_even_sizes(cout):
    """There one BatchNorm follows the joined convolutions, and the second reads x[1:, 1:]."""
    op = space.FactorizedReduce(3, cout)
    bn = bn_like_one(op)
    x = torch.randn(4, 3, 6, 8)
    relu = x.relu()
    joined = torch.cat([op.conv1(relu), op.conv2(relu[:, :, 1:, 1:])], dim=1)
    torch.testing.assert_close(op(x), bn(joined))
    with pytest.raises(ValueError, match="cout must be at least 2, got 1"):
        space.FactorizedReduce(3, 1)


def test_an_average_counts_only_pixels_that_are_there():
    pooled = space.OPS["avg_pool_3x3"](1, 1)(torch.ones(1, 1, 4, 4))
    torch.testing.assert_close(pooled, torch.ones(1, 1, 4, 4))
