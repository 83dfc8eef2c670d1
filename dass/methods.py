"""Ways to a sparse network, each a list of stages that one loop runs.

    stages = stages_of("hydra", recipe, sparsity=0.99)
    for stage in stages:
        run_stage(model, stage, data)

    magnitude  pre-train dense, prune at once by magnitude, fine-tune
    gradual    pre-train dense, prune along the cubic schedule (arXiv 1710.01878), fine-tune
    hydra      pre-train dense, learn scores with all else fixed, fine-tune (arXiv 2002.10509)
    snip       prune at the start by |g w| (arXiv 1810.02340), train
    rigl       prune at random, ERK densities, train with masks that move (arXiv 1911.11134)
    random     prune at random, train

Training with a mask that stands runs on the sparse kernels.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dass.data import Batches, ImageDataset
from dass.distributed import share_model
from dass.nn import SparseConv2d, SparseLinear
from dass.pruning import prune
from dass.rigl import RigL
from dass.schedule import GradualPruner
from dass.training import Progress, TrainConfig, TrainResult, train

__all__ = [
    "METHODS",
    "RECIPES",
    "Recipe",
    "Stage",
    "run_stage",
    "snip_scores",
    "stages_of",
    "still_statistics",
]

_SPARSE = (SparseConv2d, SparseLinear)


@dataclass(frozen=True)
class Recipe:
    """Training settings of the three kinds of stage; the defaults are those of the paper.

    pretrain, prune, finetune: of dense training, of learning masks, of what comes after it. A
    method without dense training trains for the epochs of both, with the settings of pretrain.
    size: height and width that pictures in folders are scaled to; None: as they are.
    """

    pretrain: TrainConfig
    prune: TrainConfig
    finetune: TrainConfig
    size: int | None = None


_PAPER = TrainConfig(
    epochs=600, batch_size=128, lr=0.025, weight_decay=3e-4, warmup=0.0, cutout=16, clip=5.0,
    drop_path=0.2,
)  # fmt: skip
# DARTS' and the paper's settings on ImageNet; the lengths of prune and finetune are ours, in about
# the proportions that the paper has on CIFAR-10.
_IMAGENET = TrainConfig(
    epochs=90, batch_size=128, lr=0.1, weight_decay=3e-5, warmup=5 / 90, label_smoothing=0.1,
    resized_crop=True, clip=5.0, auxiliary=0.4,
)  # fmt: skip
_PLAIN = replace(_PAPER, cutout=0, clip=5.0, drop_path=0.0, batch_size=64)
RECIPES: dict[str, Recipe] = {
    "paper": Recipe(
        _PAPER,
        replace(_PAPER, epochs=20, lr=0.1),
        replace(_PAPER, epochs=200, lr=0.01, weight_decay=4e-4),
    ),
    "affordable": Recipe(
        replace(_PAPER, epochs=100),
        replace(_PAPER, epochs=10, lr=0.1),
        replace(_PAPER, epochs=50, lr=0.01, weight_decay=4e-4),
    ),
    "imagenet": Recipe(
        _IMAGENET,
        replace(_IMAGENET, epochs=5, warmup=0.0),
        replace(_IMAGENET, epochs=30, lr=0.01, warmup=0.0),
        size=224,
    ),
    "small": Recipe(
        replace(_PLAIN, epochs=6, lr=0.05),
        replace(_PLAIN, epochs=2, lr=0.1),
        replace(_PLAIN, epochs=4, lr=0.02),
    ),
    "smoke": Recipe(
        replace(_PLAIN, epochs=1, lr=0.05),
        replace(_PLAIN, epochs=1, lr=0.1),
        replace(_PLAIN, epochs=1, lr=0.02),
    ),
}


@dataclass(frozen=True)
class Stage:
    """One training.

    name: shown and stored. config: see :class:`dass.training.TrainConfig`. before: changes the
    model before it, (model, data) -> None. after: when it is done. sparsifier: see
    :func:`dass.training.train`.
    """

    name: str
    config: TrainConfig
    before: Callable[[nn.Module, ImageDataset], None] = lambda model, data: None
    after: Callable[[nn.Module], None] = lambda model: None
    sparsifier: Callable | None = None


@dataclass(frozen=True)
class Target:
    """How sparse, and where: the keywords of `dass.prune`."""

    sparsity: float
    rule: Mapping[str, object] = field(default_factory=dict)

    def pruned(self, method) -> Callable[[nn.Module, ImageDataset], None]:
        def before(model: nn.Module, data: ImageDataset) -> None:
            prune(model, self.sparsity, method=method, **self.rule)

        return before


def _magnitude(recipe: Recipe, target: Target) -> list[Stage]:
    return [
        Stage("pretrain", recipe.pretrain),
        Stage("finetune", recipe.finetune, target.pruned("magnitude")),
    ]


def _gradual(recipe: Recipe, target: Target) -> list[Stage]:
    def pruner(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> GradualPruner:
        end = max(1, int(0.75 * steps))
        every = max(1, end // 32)
        return GradualPruner(model, optimizer, target.sparsity, 0, end, every, **target.rule)

    epochs = recipe.prune.epochs + recipe.finetune.epochs
    config = replace(recipe.finetune, epochs=epochs)
    return [
        Stage("pretrain", recipe.pretrain),
        Stage("gradual", config, sparsifier=pruner),
    ]


def _hydra(recipe: Recipe, target: Target) -> list[Stage]:
    def learn(model: nn.Module, data: ImageDataset) -> None:
        report = prune(copy.deepcopy(model), target.sparsity, **target.rule)
        prune(model, 0.0, exclude=target.rule.get("exclude", ()))
        for row in report.layers:
            layer = model.get_submodule(row.names[0])
            layer.pattern = row.pattern
            layer.learn_mask(row.density)
        scores = {id(layer.scores) for layer in _sparse(model)}
        for p in model.parameters():
            p.requires_grad_(id(p) in scores)

    def freeze(model: nn.Module) -> None:
        for layer in _sparse(model):
            layer.freeze_mask()
        model.requires_grad_(True)

    return [
        Stage("pretrain", recipe.pretrain),
        Stage("prune", recipe.prune, learn, freeze),
        Stage("finetune", recipe.finetune),
    ]


def _snip(recipe: Recipe, target: Target) -> list[Stage]:
    def before(model: nn.Module, data: ImageDataset) -> None:
        scores = snip_scores(model, data, recipe.pretrain.batch_size)
        rule = {"scope": "global", **target.rule}
        prune(model, target.sparsity, method=lambda name, module: scores[name], **rule)

    return [Stage("train", _whole(recipe), before)]


def _rigl(recipe: Recipe, target: Target) -> list[Stage]:
    def pruner(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> RigL:
        end = int(0.75 * steps)
        return RigL(model, optimizer, end, every=min(100, max(1, end // 10)))

    erk = replace(target, rule={"scope": "erk", **target.rule})
    return [Stage("train", _whole(recipe), erk.pruned("random"), sparsifier=pruner)]


def _random(recipe: Recipe, target: Target) -> list[Stage]:
    return [Stage("train", _whole(recipe), target.pruned("random"))]


METHODS: dict[str, Callable[[Recipe, Target], list[Stage]]] = {
    "magnitude": _magnitude,
    "gradual": _gradual,
    "hydra": _hydra,
    "snip": _snip,
    "rigl": _rigl,
    "random": _random,
}


def stages_of(method: str, recipe: Recipe, sparsity: float, **rule) -> list[Stage]:
    """The stages of a method.

    Args:
        method: a name of METHODS.
        recipe: settings of the trainings.
        sparsity: share of zeros, in [0, 1).
        rule: scope, pattern, exclude, floor, seed, densities of :func:`dass.prune`. A layer with a
            density of its own starts (rigl), or ends, with that; sparsity is that of the others.

    Raises:
        ValueError: an unknown method, or a sparsity out of range.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    return METHODS[method](recipe, Target(sparsity, rule))


def run_stage(
    model: nn.Module,
    stage: Stage,
    data: ImageDataset,
    *,
    test: ImageDataset | None = None,
    checkpoint=None,
    on_step: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[list[dict[str, float]]], None] | None = None,
) -> TrainResult:
    """Runs a stage on `model`, in place; with a checkpoint it goes on where it stopped.

    In a process group rank 0's weights and masks hold for all, before, after and in between.

    Raises:
        RuntimeError: a pruned weight is not zero at the end. And what `dass.training.train` raises.
    """
    share_model(model)
    stage.before(model, data)
    result = train(
        model,
        data,
        stage.config,
        test=test,
        checkpoint=checkpoint,
        on_step=on_step,
        on_epoch=on_epoch,
        sparsifier=stage.sparsifier,
    )
    stage.after(model)
    share_model(model)
    for name, module in model.named_modules():
        if isinstance(module, _SPARSE) and bool((module.weight[~module.current_mask()] != 0).any()):
            raise RuntimeError(f"{name}: pruned weights are not zero after the stage {stage.name}")
    return result


@contextlib.contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Within, BatchNorm in training mode leaves its running statistics as they are."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm._buffers["num_batches_tracked"] = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm._buffers["num_batches_tracked"] = count


def snip_scores(model: nn.Module, data: ImageDataset, images: int = 128) -> dict[str, Tensor]:
    """``|dL/dw * w|`` of every convolution and linear layer, on the first `images` of an epoch.

    Connection sensitivity (Lee, Ajanthan, Torr 2019, SNIP, arXiv 1810.02340, equation 5), by the
    names of modules. The model's gradients, statistics and mode are left as they were.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    weights = [layer.weight for layer in layers.values()]
    x, y = next(iter(Batches(data, min(images, len(data)))))
    was_training = model.training
    model.train()
    with still_statistics(model):
        logits = model(x.to(weights[0].device))
        logits = logits[0] if isinstance(logits, tuple) else logits
        loss = F.cross_entropy(logits, y.to(logits.device))
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    model.train(was_training)
    return {
        name: (torch.zeros_like(w) if g is None else (g * w).abs()).detach()
        for name, w, g in zip(layers, weights, gradients, strict=True)
    }


def _whole(recipe: Recipe) -> TrainConfig:
    return replace(recipe.pretrain, epochs=recipe.pretrain.epochs + recipe.finetune.epochs)


def _sparse(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _SPARSE)]
