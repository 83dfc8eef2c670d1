"""Networks for the tests of the engine, and how its results are judged."""

import copy

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


def pruned(name, sparsity=0.9, exclude=(), side=None):
    """A network of the zoo, thin and with few cells, pruned; the shape of its inputs."""
    darts = dass.zoo.NETWORKS[name].module == "darts"
    options = {"layers": 3, "channels": 6} if darts else {"width": 0.25}
    if side is None:
        side = 18 if darts or dass.zoo.input_shape(name)[1] == 32 else 40
    torch.manual_seed(0)
    model = dass.zoo.create(name, num_classes=10, **options)
    dass.prune(model, sparsity, exclude=exclude)
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
    model = dass.densify(model).eval()
    with torch.no_grad():
        for layer in model:
            if hasattr(layer, "weight"):
                layer.weight *= 3 / layer.weight[0].norm()
    return model


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
    assert size > 1e-3 and (len(x) < 2 or want.std(0).max() > 0.01 * size)
    assert (got - want).abs().max() <= allowed
