"""MobileNet-v2 (Sandler et al. 2018, arXiv 1801.04381) for ImageNet and for CIFAR.

The ImageNet form has the parameter names of torchvision's ``mobilenet_v2``, so that its weights
load: ``features.0.0``, ``features.1.conv.0.0``, ..., ``classifier.1``. The CIFAR form is the one
that pruning papers use (2.297 M parameters): the stem and the first stage of stride 2 have stride 1
instead, the first block keeps its expansion although the ratio is 1, and a stride-1 block whose
channel count changes has a 1x1 projection as its shortcut.
"""

from collections import OrderedDict

from torch import Tensor, nn

from dass.zoo import init_weights, scaled_channels

# Table 2 of the paper: expansion, channels, blocks, stride of the first block.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def conv_bn_relu6(
    cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1, same: bool = False
) -> nn.Sequential:
    """Convolution "0", BatchNorm "1", ReLU6 "2".

    With ``same`` a strided convolution pads like TensorFlow's SAME on even sizes (for a 3x3 nothing
    before and 1 after) by a module "pad" in front, which leaves the parameter names unchanged.
    """
    layers = OrderedDict()
    padding = (kernel - 1) // 2
    if same and stride > 1:
        before = (kernel - stride) // 2
        after = kernel - stride - before
        layers["pad"] = nn.ZeroPad2d((before, after, before, after))
        padding = 0
    layers["0"] = nn.Conv2d(cin, cout, kernel, stride, padding, groups=groups, bias=False)
    layers["1"] = nn.BatchNorm2d(cout)
    layers["2"] = nn.ReLU6(inplace=True)
    return nn.Sequential(layers)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection; [B, cin, H, W] -> [B, cout, H/s, W/s].

    Args:
        cin, cout: channels.
        stride: of the depthwise convolution.
        expand: ratio of the hidden channels to ``cin``.
        cifar: expand even at ratio 1, and project the shortcut where the channels change.
        same: TensorFlow's padding, see `conv_bn_relu6`.
    """

    def __init__(
        self, cin: int, cout: int, stride: int, expand: int, cifar: bool = False, same: bool = False
    ):
        super().__init__()
        hidden = cin * expand
        layers = [conv_bn_relu6(cin, hidden, 1)] if expand != 1 or cifar else []
        layers += [
            conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden, same=same),
            nn.Conv2d(hidden, cout, 1, bias=False),
            nn.BatchNorm2d(cout),
        ]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and (cin == cout or cifar)
        if self.residual and cin != cout:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout))
        elif self.residual:
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Adds the input back where the block has stride 1 and a shortcut."""
        return self.conv(x) + self.shortcut(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Stem, 17 inverted residual blocks, 1x1 head (``features``), pool, ``classifier``."""

    def __init__(
        self, num_classes: int, in_channels: int, width: float, dropout: float, cifar: bool,
        same: bool = False,
    ):  # fmt: skip
        super().__init__()
        cin = scaled_channels(32, width)
        # The head keeps its 1280 channels in narrow networks (section 4 of the paper).
        head = scaled_channels(1280, max(1.0, width))
        blocks = [conv_bn_relu6(in_channels, cin, 3, 1 if cifar else 2, same=same)]
        for i, (expand, channels, count, stride) in enumerate(_STAGES):
            cout = scaled_channels(channels, width)
            for n in range(count):
                s = stride if n == 0 and not (cifar and i == 1) else 1
                blocks.append(InvertedResidual(cin, cout, s, expand, cifar, same))
                cin = cout
        blocks.append(conv_bn_relu6(cin, head, 1))
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(head, num_classes))
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, C, H, W] -> logits [B, num_classes]."""
        return self.classifier(self.pool(self.features(x)).flatten(1))


def cifar(
    num_classes: int, *, in_channels: int = 3, width: float = 1.0, dropout: float = 0.0
) -> MobileNetV2:
    """The CIFAR form: 2.297 M parameters, 91 M multiply-adds at 32x32 with 10 classes."""
    return MobileNetV2(num_classes, in_channels, width, dropout, cifar=True)


def imagenet(
    num_classes: int,
    *,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.2,
    padding: str = "symmetric",
) -> MobileNetV2:
    """The ImageNet form: 3.505 M parameters, 301 M multiply-adds at 224x224 with 1000 classes.

    Args:
        num_classes, in_channels, width: see `dass.zoo.create`.
        dropout: probability before the classifier.
        padding: "symmetric" as in torchvision, or "same" as in TensorFlow, for weights trained
            there (exact where the sizes are even, such as 224 and all multiples of 32).

    Raises:
        ValueError: another padding.
    """
    if padding not in ("symmetric", "same"):
        raise ValueError(f'padding must be "symmetric" or "same", got {padding!r}')
    return MobileNetV2(
        num_classes, in_channels, width, dropout, cifar=False, same=padding == "same"
    )
