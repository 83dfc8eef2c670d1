"""Networks of a genotype's cells (Liu et al. 2019, arXiv 1806.09055, section 3.2 and appendix A).

Stem, ``layers`` cells, global average pool, linear classifier. Each cell reads the two outputs
before it. The cells number ``layers // 3`` and ``2 * layers // 3`` (from 0) are reduction cells:
they halve height and width, and from there on the channels are doubled. Weights are initialised by
torch's defaults, as in the paper's code.
"""

import torch
from torch import Tensor, nn

from dass.genotype import Edge, Genotype
from dass.space import CONCAT, INPUTS, NODES, OPS, FactorizedReduce, relu_conv_bn
from dass.zoo import FOUND, scaled_channels

STEMS = ("cifar", "imagenet")


def drop_path(x: Tensor, probability: float) -> Tensor:
    """Each image's ``x`` as a whole becomes 0 with ``probability``, else x / (1 - probability).

    [B, C, H, W] -> [B, C, H, W], of the same expectation (Larsson et al. 2016, arXiv 1605.07648).
    """
    keep = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(1 - probability)
    return x * (keep / (1 - probability))


class Cell(nn.Module):
    """([B, before, H', W'], [B, previous, H, W]) -> [B, 4 * channels, H / stride, W / stride].

    Args:
        nodes: of the genotype's normal or reduction cell.
        before, previous: channels of the outputs of the two cells before.
        channels: of each node.
        stride: 1, or 2 for a reduction cell.
        halve: the first input is twice as high and wide as the second.
    """

    def __init__(
        self, nodes: tuple[tuple[Edge, Edge], ...], before: int, previous: int, channels: int,
        stride: int = 1, halve: bool = False,
    ):  # fmt: skip
        super().__init__()
        if halve:
            self.preprocess0 = FactorizedReduce(before, channels)
        else:
            self.preprocess0 = relu_conv_bn(before, channels)
        self.preprocess1 = relu_conv_bn(previous, channels)
        self.edges = [edge for node in nodes for edge in node]
        self.ops = nn.ModuleList(
            OPS[edge.op](channels, stride if edge.input < INPUTS else 1) for edge in self.edges
        )

    def forward(self, before: Tensor, previous: Tensor, drop_probability: float = 0.0) -> Tensor:
        """``drop_probability``: of `drop_path`, for every operation but the identity."""
        states = [self.preprocess0(before), self.preprocess1(previous)]
        for node in range(NODES):
            a, b = (self._edge(i, states, drop_probability) for i in range(2 * node, 2 * node + 2))
            states.append(a + b)
        return torch.cat([states[node] for node in CONCAT], dim=1)

    def _edge(self, i: int, states: list[Tensor], drop_probability: float) -> Tensor:
        y = self.ops[i](states[self.edges[i].input])
        if drop_probability > 0 and not isinstance(self.ops[i], nn.Identity):
            y = drop_path(y, drop_probability)
        return y


class AuxiliaryHead(nn.Module):
    """A second classifier on the output of the second reduction, 8x8 for CIFAR, 7x7 for ImageNet.

    With the BatchNorm before the classifier that the paper's code leaves out for ImageNet alone.
    [B, cin, H, W] -> [B, num_classes]; H and W are at least 5, for ``stride`` 3 at least 8.
    """

    def __init__(self, cin: int, num_classes: int, stride: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, stride, count_include_pad=False),
            nn.Conv2d(cin, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(inplace=True),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class CellNetwork(nn.Module):
    """A network of a genotype's cells; `build` documents the arguments.

    Attributes:
        drop_path_prob: in [0, 1); applies in training. Set it anew each epoch to ramp it.
        genotype: what it was built of.
    """

    def __init__(
        self, genotype: Genotype, channels: int, layers: int, num_classes: int, in_channels: int,
        auxiliary: bool, stem: str,
    ):  # fmt: skip
        super().__init__()
        self.genotype, self.drop_path_prob = genotype, 0.0
        cifar = stem == "cifar"
        if cifar:
            self.stem, before = _cifar_stem(in_channels, 3 * channels), 3 * channels
            self.stem1 = nn.Identity()
        else:
            self.stem, before = _imagenet_stem(in_channels, channels), channels
            self.stem1 = _relu_strided(channels, channels)
        previous, halve = before, not cifar
        self.cells = nn.ModuleList()
        self.auxiliary, self._auxiliary_at = None, 2 * layers // 3
        for i in range(layers):
            stride = 2 if i in (layers // 3, 2 * layers // 3) else 1
            channels *= stride
            nodes = genotype.reduce if stride == 2 else genotype.normal
            self.cells.append(Cell(nodes, before, previous, channels, stride, halve))
            before, previous, halve = previous, NODES * channels, stride == 2
            if auxiliary and i == self._auxiliary_at:
                self.auxiliary = AuxiliaryHead(previous, num_classes, 3 if cifar else 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(previous, num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Float [B, C, H, W] -> logits [B, num_classes].

        In training, with an auxiliary head: (logits, logits of the auxiliary head).
        """
        before = self.stem(x)
        previous = self.stem1(before)
        drop_probability = self.drop_path_prob if self.training else 0.0
        auxiliary = None
        for i, cell in enumerate(self.cells):
            before, previous = previous, cell(before, previous, drop_probability)
            if i == self._auxiliary_at and self.training and self.auxiliary is not None:
                auxiliary = self.auxiliary(previous)
        logits = self.classifier(self.pool(previous).flatten(1))
        return logits if auxiliary is None else (logits, auxiliary)

    def edge_densities(self) -> dict[str, float]:
        """Name of a convolution -> density, for the edges whose genotype gives one."""
        return {
            f"cells.{c}.ops.{i}.{name}": edge.density
            for c, cell in enumerate(self.cells)
            for i, edge in enumerate(cell.edges)
            if edge.density is not None
            for name, module in cell.ops[i].named_modules()
            if isinstance(module, nn.Conv2d)
        }


def _cifar_stem(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout))


def _imagenet_stem(cin: int, cout: int) -> nn.Sequential:
    first = nn.Conv2d(cin, cout // 2, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(cout // 2), *_relu_strided(cout // 2, cout))


def _relu_strided(cin: int, cout: int) -> nn.Sequential:
    conv = nn.Conv2d(cin, cout, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(cout))


def build(
    genotype: Genotype,
    channels: int,
    layers: int,
    classes: int,
    *,
    in_channels: int = 3,
    auxiliary: bool = False,
    stem: str = "cifar",
) -> CellNetwork:
    """The network of a genotype.

    Args:
        genotype: the cells.
        channels: of each node of the first cells, at least 2; a cell has four times as many.
        layers: number of cells.
        classes: outputs of the classifier.
        in_channels: of the images.
        auxiliary: a second classifier after the second reduction, for training alone.
        stem: "cifar" (one 3x3 convolution) or "imagenet" (three of stride 2).

    Raises:
        TypeError: ``genotype`` is none. ValueError: a number out of range, or another stem.
    """
    if not isinstance(genotype, Genotype):
        raise TypeError(f"genotype must be a dass.Genotype, got {type(genotype).__name__}")
    for name, value, least in (
        ("channels", channels, 2),
        ("layers", layers, 1),
        ("classes", classes, 1),
        ("in_channels", in_channels, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if not isinstance(auxiliary, bool):
        raise ValueError(f"auxiliary must be True or False, got {auxiliary!r}")
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}")
    return CellNetwork(genotype, channels, layers, classes, in_channels, auxiliary, stem)


def found(
    num_classes: int,
    *,
    name: str,
    in_channels: int = 3,
    width: float = 1.0,
    channels: int | None = None,
    layers: int | None = None,
    auxiliary: bool = False,
    stem: str = "cifar",
) -> CellNetwork:
    """A network of ``found.json``.

    Args:
        num_classes, in_channels, width: see `dass.zoo.create`.
        channels, layers: instead of those of the file.
        auxiliary, stem: see `build`.
    """
    row = FOUND["networks"][name]
    return _scaled(
        found_genotype(row["cell"]), width,
        row["channels"] if channels is None else channels,
        row["layers"] if layers is None else layers,
        num_classes, in_channels=in_channels, auxiliary=auxiliary, stem=stem,
    )  # fmt: skip


def random_cell(
    num_classes: int,
    *,
    seed: int = 0,
    in_channels: int = 3,
    width: float = 1.0,
    channels: int = 36,
    layers: int = 20,
    auxiliary: bool = False,
    stem: str = "cifar",
) -> CellNetwork:
    """A network of `Genotype.random(seed)`, the baseline that a search has to beat.

    ``seed`` chooses the cells, torch's generator the weights. The others are those of `found`.
    """
    return _scaled(
        Genotype.random(seed), width, channels, layers,
        num_classes, in_channels=in_channels, auxiliary=auxiliary, stem=stem,
    )  # fmt: skip


def cells(
    num_classes: int,
    *,
    genotype: str = "dass_99",
    in_channels: int = 3,
    width: float = 1.0,
    channels: int = 36,
    layers: int = 20,
    auxiliary: bool = False,
    stem: str = "cifar",
) -> CellNetwork:
    """A network of any genotype: its JSON (`Genotype.to_json`), or a cell's name in ``found.json``.

    The others are those of `found`.
    """
    is_json = genotype.lstrip().startswith("{")
    return _scaled(
        Genotype.from_json(genotype) if is_json else found_genotype(genotype),
        width, channels, layers,
        num_classes, in_channels=in_channels, auxiliary=auxiliary, stem=stem,
    )  # fmt: skip


def found_genotype(cell: str) -> Genotype:
    """A genotype of ``found.json``.

    Raises:
        ValueError: there is none of this name; the message lists the known ones.
    """
    if cell not in FOUND["cells"]:
        raise ValueError(f"unknown cell {cell!r}; known: {', '.join(FOUND['cells'])}")
    return Genotype.from_dict({k: v for k, v in FOUND["cells"][cell].items() if k != "source"})


def _scaled(genotype, width: float, channels: int, *args, **kwargs) -> CellNetwork:
    if width != 1:
        channels = max(2, scaled_channels(channels, width, divisor=1))
    return build(genotype, channels, *args, **kwargs)
