"""The engine computes what the model does: every network of the zoo, batches, threads, layouts."""

import copy

import pytest
import torch
from torch import nn

import dass


def lively(model, shape):
    """Statistics of BatchNorm from a batch, so that signals reach the end; in eval mode.

    Signals that die out on the way would hide errors.
    """
    draw = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=draw)
                module.bias.normal_(0, 0.3, generator=draw)
    with torch.no_grad():
        model.train()(torch.randn(16, *shape, generator=draw))
    return model.eval()


def pruned(name, sparsity=0.9):
    """A network of the zoo, thin and with few cells, pruned; the shape of its inputs."""
    darts = dass.zoo.NETWORKS[name].module == "darts"
    options = {"layers": 3, "channels": 6} if darts else {"width": 0.25}
    side = 18 if darts or dass.zoo.input_shape(name)[1] == 32 else 40
    torch.manual_seed(0)
    model = dass.zoo.create(name, num_classes=10, **options)
    dass.prune(model, sparsity)
    return lively(dass.densify(model), (3, side, side)), (3, side, side)


def small_net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 32, 1),
        nn.Hardswish(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=32),
        nn.SiLU(),
        nn.Conv2d(32, 20, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(20, 7),
    )
    dass.prune(model, 0.7)
    return dass.densify(model).eval()


def compiled(model, shape, batch=1):
    return dass.compile(model, torch.zeros(batch, *shape), tune=False, cache=None)


def images(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(engine, model, x):
    """Against the model in float64; eager float32 sets the scale of what rounding may do."""
    with torch.inference_mode():
        want, eager = copy.deepcopy(model).double()(x.double()), model(x)
    size = want.abs().max()
    allowed = 4 * (eager - want).abs().max() + 2e-6 * size
    got = engine(x)
    assert got.shape == want.shape and got.dtype == torch.float32
    assert size > 1e-3
    assert (got - want).abs().max() <= allowed


@pytest.mark.parametrize("name", dass.zoo.list())
def test_every_network_of_the_zoo(name):
    model, shape = pruned(name)
    engine = compiled(model, shape)
    for side_by_side in (False, True):
        engine._side_by_side = side_by_side
        for batch in (1, 17):
            check(engine, model, images(batch, *shape))


@pytest.mark.parametrize("example", [1, 16])
def test_any_batch(example):
    model = small_net()
    engine = compiled(model, (3, 10, 9), example)
    for side_by_side in (False, True):
        engine._side_by_side = side_by_side
        for batch in range(1, 34):
            check(engine, model, images(batch, 3, 10, 9, seed=batch))
        assert engine(torch.zeros(0, 3, 10, 9)).shape == (0, 7)
