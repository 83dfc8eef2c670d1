"""A small network with all kinds of layers, and what the tests of its pruning need."""

import torch
from torch import nn
from torch.nn import functional as F

from dass.nn import SparseConv2d, SparseLinear


class Net(nn.Module):
    """Stem, depthwise, a module used under two names, BatchNorm, classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block = nn.Sequential(
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.Conv2d(16, 16, 1),
        )
        self.again = self.block[3]
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.again(F.relu(self.block(self.stem(x))))
        return self.fc(x.mean((2, 3)))


def batch(seed=0, n=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 6, 6, generator=generator), torch.arange(n) % 10


def train_step(model, optimizer, seed=0):
    x, y = batch(seed)
    x.requires_grad_()  # the first layer's input gradient is computed too

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return optimizer.step(closure)


def sparse_layers(model):
    return [m for m in model.modules() if isinstance(m, (SparseConv2d, SparseLinear))]


def pruned_weights(model):
    return torch.cat([m.weight[~m.mask] for m in sparse_layers(model)])
