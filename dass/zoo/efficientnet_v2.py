"""EfficientNet-V2 S (Tan & Le 2021, arXiv 2104.00298, table 4).

Parameter names are those of torchvision's ``efficientnet_v2_s`` (``features.1.0.block.0.0``, ...,
``classifier.1``), whose padding it has as well. Stochastic depth is left to the training.
"""

from torch import Tensor, nn

from dass.zoo import init_weights, scaled_channels

# Fused, blocks, stride of the first block, expansion, channels. All kernels are 3x3; the blocks
# that are not fused have squeeze-excitation to a quarter of the block's input.
_STAGES = (
    (True, 2, 1, 1, 24),
    (True, 4, 2, 4, 48),
    (True, 4, 2, 4, 64),
    (False, 6, 2, 4, 128),
    (False, 9, 1, 6, 160),
    (False, 15, 2, 6, 256),
)
_HEAD = 1280


def _conv_bn(
    cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers = [conv, nn.BatchNorm2d(cout, eps=1e-3)]
    return nn.Sequential(*layers, nn.SiLU(inplace=True)) if act else nn.Sequential(*layers)


class SqueezeExcitation(nn.Module):
    """x * sigmoid(fc2(silu(fc1(mean of x over its pixels)))); Hu et al. 2018, arXiv 1709.01507."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.activation = nn.SiLU(inplace=True)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.scale_activation = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.fc2(self.activation(self.fc1(self.avgpool(x))))
        return x * self.scale_activation(scale)


class Block(nn.Module):
    """MBConv, or with ``fused`` a 3x3 convolution for its expansion and depthwise convolution.

    [B, cin, H, W] -> [B, cout, H / stride, W / stride].
    """

    def __init__(self, fused: bool, cin: int, cout: int, stride: int, expand: int):
        super().__init__()
        hidden = cin * expand
        if fused and expand == 1:
            layers = [_conv_bn(cin, cout, 3, stride)]
        elif fused:
            layers = [_conv_bn(cin, hidden, 3, stride), _conv_bn(hidden, cout, 1, act=False)]
        else:
            layers = [
                _conv_bn(cin, hidden, 1),
                _conv_bn(hidden, hidden, 3, stride, groups=hidden),
                SqueezeExcitation(hidden, max(1, cin // 4)),
                _conv_bn(hidden, cout, 1, act=False),
            ]
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + x if self.residual else self.block(x)


class EfficientNetV2(nn.Module):
    """Stem, 40 blocks in 6 stages, 1x1 head (``features``), pool, ``classifier``."""

    def __init__(self, num_classes: int, in_channels: int, width: float, dropout: float, stem: str):
        super().__init__()
        cifar = stem == "cifar"
        cin = scaled_channels(24, width)
        head = scaled_channels(_HEAD, max(1.0, width))
        features = [_conv_bn(in_channels, cin, 3, 1 if cifar else 2)]
        for i, (fused, count, stride, expand, channels) in enumerate(_STAGES):
            cout, blocks = scaled_channels(channels, width), []
            for n in range(count):
                s = stride if n == 0 and not (cifar and i == 1) else 1
                blocks.append(Block(fused, cin, cout, s, expand))
                cin = cout
            features.append(nn.Sequential(*blocks))
        self.features = nn.Sequential(*features, _conv_bn(cin, head, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(head, num_classes))
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, C, H, W] -> logits [B, num_classes]."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def small(
    num_classes: int,
    *,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.2,
    stem: str = "imagenet",
) -> EfficientNetV2:
    """21.458 M parameters, 2.850 G multiply-adds at 224x224 with 1000 classes.

    Args:
        num_classes, in_channels, width: see `dass.zoo.create`.
        dropout: probability before the classifier.
        stem: "imagenet", or "cifar": the first two strides are 1, as in `mobilenet_v2.cifar`.

    Raises:
        ValueError: another stem.
    """
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f'stem must be "cifar" or "imagenet", got {stem!r}')
    return EfficientNetV2(num_classes, in_channels, width, dropout, stem)
