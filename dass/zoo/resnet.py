"""ResNets (He et al. 2015, arXiv 1512.03385): basic and bottleneck blocks, for CIFAR and ImageNet.

resnet18 and resnet50 have the parameter names of torchvision (``layer1.0.downsample.0``, ``fc``).
resnet20, 32, 44 and 56 are the networks of section 4.2 of the paper with option-A shortcuts, named
``conv1``, ``bn1``, ``layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}``, ``linear`` as in the weights that
are published for them.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dass.zoo import init_weights, scaled_channels


class PadShortcut(nn.Module):
    """Option A: every ``stride``-th pixel, new channels zero, half of them before and half after.

    [B, C, H, W] -> [B, C + 2 * pad, ceil(H / stride), ceil(W / stride)]; no parameters.
    """

    def __init__(self, stride: int, pad: int):
        super().__init__()
        self.stride, self.pad = stride, pad

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.pad, self.pad))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, pad={self.pad}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; [B, cin, H, W] -> [B, cout, H/s, W/s]."""

    expansion = 1

    def __init__(self, cin: int, channels: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu2(y + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; [B, cin, H, W] -> [B, 4 * channels, H/s, W/s].

    The stride is on the 3x3 (not on the first 1x1 as in the paper), like in torchvision.
    """

    expansion = 4

    def __init__(self, cin: int, channels: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        cout = channels * self.expansion
        self.conv1 = nn.Conv2d(cin, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(channels, cout, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(cout)
        self.relu3 = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu3(y + shortcut)


class ResNet(nn.Module):
    """Four stages with projection shortcuts.

    Args:
        block: BasicBlock or Bottleneck.
        counts: blocks of the four stages.
        stem: "imagenet" (7x7 stride 2, max pool) or "cifar" (3x3 stride 1, no pool).
        num_classes, in_channels, width: see `dass.zoo.create`.
    """

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], counts: tuple[int, ...], stem: str,
        num_classes: int, in_channels: int, width: float,
    ):  # fmt: skip
        super().__init__()
        base = scaled_channels(64, width, divisor=4)
        if stem == "cifar":
            self.conv1 = nn.Conv2d(in_channels, base, 3, 1, 1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, base, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(base)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        cin = base
        for i, count in enumerate(counts):
            channels, blocks = base * 2**i, []
            cout = channels * block.expansion
            for n in range(count):
                stride = 2 if i > 0 and n == 0 else 1
                projects = stride != 1 or cin != cout
                blocks.append(
                    block(cin, channels, stride, _project(cin, cout, stride) if projects else None)
                )
                cin = cout
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(cin, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, C, H, W] -> logits [B, num_classes]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class OptionAResNet(nn.Module):
    """Three stages of basic blocks with 16, 32, 64 channels (times width), option-A shortcuts."""

    def __init__(self, blocks: int, num_classes: int, in_channels: int, width: float):
        super().__init__()
        base = scaled_channels(16, width, divisor=2)
        self.conv1 = nn.Conv2d(in_channels, base, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(base)
        self.relu = nn.ReLU(inplace=True)
        cin = base
        for i in range(3):
            cout, stage = base * 2**i, []
            for n in range(blocks):
                first = i > 0 and n == 0
                shortcut = PadShortcut(2, (cout - cin) // 2) if first else None
                stage.append(BasicBlock(cin, cout, 2 if first else 1, shortcut))
                cin = cout
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(cin, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, C, H, W] -> logits [B, num_classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))


def _project(cin: int, cout: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))


def resnet18(num_classes: int, *, stem: str, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """11.174 M parameters and 555 M multiply-adds at 32x32 with 10 classes (stem "cifar");
    11.690 M and 1.814 G at 224x224 with 1000 classes (stem "imagenet")."""
    return ResNet(BasicBlock, (2, 2, 2, 2), stem, num_classes, in_channels, width)


def resnet50(num_classes: int, *, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """25.557 M parameters, 4.089 G multiply-adds at 224x224 with 1000 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), "imagenet", num_classes, in_channels, width)


def option_a(
    num_classes: int, *, blocks: int, in_channels: int = 3, width: float = 1.0
) -> OptionAResNet:
    """ResNet of 6 * blocks + 2 layers: 0.270, 0.464, 0.659, 0.853 M parameters for 3, 5, 7, 9."""
    return OptionAResNet(blocks, num_classes, in_channels, width)
