"""The search space of DARTS (Liu et al. 2019, arXiv 1806.09055, section 2.1 and appendix A.1).

A cell is a graph of numbered nodes: 0 is the output of the cell before the previous one, 1 that of
the previous one, 2 to 5 are sums over all earlier nodes of an operation each, and the cell's output
is the concatenation of nodes 2 to 5. There are 2 + 3 + 4 + 5 = 14 edges, numbered node by node.

An operation maps [B, C, H, W] to [B, C, ceil(H / stride), ceil(W / stride)]. It is built of plain
layers; `dass.prune` or ``learn_mask`` makes its convolutions sparse.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

INPUTS = 2  # nodes that come from earlier cells
NODES = 4  # nodes that a cell computes
EDGES = 14
CONCAT = tuple(range(INPUTS, INPUTS + NODES))


def edge_index(node: int, source: int) -> int:
    """The number 0..13 of the edge from node ``source`` to node ``node``.

    Raises:
        ValueError: ``node`` is not 2..5, or ``source`` is no earlier node.
    """
    if node not in CONCAT or not 0 <= source < node:
        raise ValueError(f"no edge from node {source} to node {node}: 0 <= source < node in 2..5")
    return node * (node - 1) // 2 - 1 + source


def edge_ends(edge: int) -> tuple[int, int]:
    """(node, source) of an edge; the inverse of `edge_index`.

    Raises:
        ValueError: ``edge`` is not 0..13.
    """
    if not 0 <= edge < EDGES:
        raise ValueError(f"edge must be 0..{EDGES - 1}, got {edge}")
    node = INPUTS
    while edge >= node:
        edge -= node
        node += 1
    return node, edge


class Zero(nn.Module):
    """0, of the shape of every ``stride``-th pixel, whatever the input holds."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


class FactorizedReduce(nn.Module):
    """Halves height and width: ReLU, then two 1x1 convolutions of stride 2, joined.

    The first reads the even pixels, the second the odd ones (past an odd size it reads zeros). Each
    has its own BatchNorm, which is the same as one for both, as every channel is its own.

    [B, cin, H, W] -> [B, cout, ceil(H / 2), ceil(W / 2)]; cout is at least 2.
    """

    def __init__(self, cin: int, cout: int, affine: bool = True):
        super().__init__()
        if cout < 2:
            raise ValueError(f"cout must be at least 2, got {cout}")
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(cin, cout // 2, 1, stride=2, bias=False)
        self.bn1 = norm(cout // 2, affine)
        self.shift = nn.ZeroPad2d((-1, 1, -1, 1))
        self.conv2 = nn.Conv2d(cin, cout - cout // 2, 1, stride=2, bias=False)
        self.bn2 = norm(cout - cout // 2, affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.after_relu(self.relu(x))

    def after_relu(self, x: Tensor) -> Tensor:
        """The operation on what its ReLU gave."""
        return torch.cat([self.bn1(self.conv1(x)), self.bn2(self.conv2(self.shift(x)))], dim=1)


class ReLUFirst(nn.Sequential):
    """A chain whose first module is a ReLU, which several chains on one input may share."""

    def after_relu(self, x: Tensor) -> Tensor:
        """The operation on what its ReLU gave."""
        for module in list(self)[1:]:
            x = module(x)
        return x


def norm(channels: int, affine: bool) -> nn.BatchNorm2d:
    """A final network's BatchNorm; without `affine` the search's, which has no state at all and
    normalises by its batch in both modes."""
    return nn.BatchNorm2d(channels, affine=affine, track_running_stats=affine)


def relu_conv_bn(cin: int, cout: int, kernel: int = 1, affine: bool = True) -> ReLUFirst:
    """ReLU, convolution of stride 1, BatchNorm: what brings a cell's inputs to its channels."""
    conv = nn.Conv2d(cin, cout, kernel, padding=kernel // 2, bias=False)
    return ReLUFirst(nn.ReLU(), conv, norm(cout, affine))


def _separable(channels: int, kernel: int, stride: int, dilation: int, affine: bool) -> list:
    """ReLU, depthwise, 1x1, BatchNorm; the padding keeps the size at stride 1."""
    padding = dilation * (kernel // 2)
    depthwise = nn.Conv2d(
        channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False
    )
    pointwise = nn.Conv2d(channels, channels, 1, bias=False)
    return [nn.ReLU(), depthwise, pointwise, norm(channels, affine)]


Builder = Callable[..., nn.Module]


def _sep_conv(kernel: int) -> Builder:
    """ReLU, depthwise, 1x1, BatchNorm, twice; the stride is the first one's."""

    def build(channels: int, stride: int, affine: bool = True, pool_norm: bool = False):
        first = _separable(channels, kernel, stride, 1, affine)
        return ReLUFirst(*first, *_separable(channels, kernel, 1, 1, affine))

    return build


def _dil_conv(kernel: int) -> Builder:
    """ReLU, depthwise of dilation 2, 1x1, BatchNorm."""

    def build(channels: int, stride: int, affine: bool = True, pool_norm: bool = False):
        return ReLUFirst(*_separable(channels, kernel, stride, 2, affine))

    return build


def _pool(kind: str) -> Builder:
    """3x3 pooling; an average counts only the pixels that are there."""

    def build(channels: int, stride: int, affine: bool = True, pool_norm: bool = False):
        if kind == "max":
            pool = nn.MaxPool2d(3, stride, padding=1)
        else:
            pool = nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
        if not pool_norm:
            return pool
        return nn.Sequential(pool, norm(channels, affine=False))

    return build


def _skip(channels: int, stride: int, affine: bool = True, pool_norm: bool = False):
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)


def _none(channels: int, stride: int, affine: bool = True, pool_norm: bool = False):
    return Zero(stride)


# name -> builder(channels, stride, affine=True, pool_norm=False). affine: BatchNorms have weights
# and biases. pool_norm: a BatchNorm without them follows each pool. The search has affine=False and
# pool_norm=True, so that all outputs are of one scale; final networks have the defaults.
OPS: dict[str, Builder] = {
    "none": _none,
    "max_pool_3x3": _pool("max"),
    "avg_pool_3x3": _pool("avg"),
    "skip_connect": _skip,
    "sep_conv_3x3": _sep_conv(3),
    "sep_conv_5x5": _sep_conv(5),
    "dil_conv_3x3": _dil_conv(3),
    "dil_conv_5x5": _dil_conv(5),
}


def has_weights(op: str, stride: int) -> bool:
    """Whether an operation of a final network has parameters."""
    with torch.device("meta"):
        return any(True for _ in OPS[op](2, stride).parameters())
