"""What a search does, as data: its settings, and the phases of each strategy.

A strategy is a function from a :class:`SearchConfig` to phases; a new one is a row of STRATEGIES.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from dass.masks import parse_pattern

__all__ = ["PRESETS", "STRATEGIES", "Phase", "SearchConfig", "phases_of", "preset"]


@dataclass(frozen=True)
class SearchConfig:
    """Settings of :func:`dass.search`; the defaults are those of the preset ``affordable``.

    Args:
        dataset: as in :func:`dass.data.load`, or a path; "synthetic" for smoke runs.
        size, limit: of the images; see :func:`dass.data.load`.
        strategy: "dass" (pre-train, prune, fine-tune), "one_loop" (sparse from the start), "darts"
            (dense) or "random" (a random genotype: the neutral baseline).
        density: kept / all weights of every sparse convolution and linear layer, in (0, 1].
        densities: densities that are choices of the search instead, per operation.
        schedule: "jump" (the density falls at once at the start of the prune phase) or "cubic"
            (along Zhu & Gupta's schedule over the first three quarters of it).
        pattern, exclude: as in :func:`dass.prune`.
        channels, layers, partial, recompute: see :class:`dass.supernet.Supernet`.
        epochs, lr: of the three phases. one_loop takes the sum of epochs 1 and 3, darts the first.
        lr_min: where the cosine of each phase ends.
        batch_size: images per step, of the training and of the validation half.
        momentum, weight_decay, clip: of the weight optimiser (SGD); clip is the largest norm.
        alpha_lr, alpha_weight_decay: of the architecture optimiser (Adam, betas 0.5 and 0.999).
        second_order: unroll one weight step in the architecture gradient; three times slower.
        latency_weight: lambda in ``L_val + lambda E_alpha[time] / time at the start``.
        latency_budget_us: least penalised expected time; 0: all of it counts.
        latency_table: a file of ``dass latency-table``; needed where latency_weight > 0.
        nonzero_weight: the same lambda for the expected number of nonzero weights.
        latency_limit_us, nonzero_limit: the most that the operations of the genotype found may cost
            in a network of the search's channels and layers; 0: no limit.
        guard: "warn", "stop" or "off": what a sign of collapse does (:mod:`dass.guards`).
        eigenvalue_every: epochs between measurements of the Hessian's eigenvalue; 0: never.
        selection: what makes a genotype of the relaxed network: "alpha" (the strongest),
            "perturbation" (:mod:`dass.perturbation`), or "guarded" (by perturbation if the last
            epoch showed a sign of collapse).
        selection_images: validation images that a perturbation is measured on.
        selection_steps: steps of the weights after each decision of a selection by perturbation.
        seed: of weights, alphas, order and augmentation.

    Raises:
        ValueError: a setting out of range, named.
    """

    dataset: str = "auto"
    size: int | None = None
    limit: int | None = None
    strategy: str = "dass"
    density: float = 0.01
    densities: tuple[float, ...] = ()
    schedule: str = "jump"
    pattern: str = "unstructured"
    exclude: tuple[str, ...] = ()
    channels: int = 16
    layers: int = 8
    partial: int = 1
    recompute: bool = False
    epochs: tuple[int, int, int] = (50, 20, 50)
    lr: tuple[float, float, float] = (0.025, 0.1, 0.025)
    lr_min: float = 0.001
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0
    alpha_lr: float = 3e-4
    alpha_weight_decay: float = 1e-3
    second_order: bool = False
    latency_weight: float = 0.0
    latency_budget_us: float = 0.0
    latency_table: str | None = None
    nonzero_weight: float = 0.0
    latency_limit_us: float = 0.0
    nonzero_limit: int = 0
    guard: str = "warn"
    eigenvalue_every: int = 0
    selection: str = "alpha"
    selection_images: int = 256
    selection_steps: int = 0
    augment: bool = True
    seed: int = 0

    def __post_init__(self):
        for name in ("densities", "exclude", "epochs", "lr"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        in_unit = all(0 < d <= 1 for d in (self.density, *self.densities))
        for good, what in (
            (self.strategy in STRATEGIES, f"strategy must be one of {', '.join(STRATEGIES)}"),
            (in_unit, "density and densities must be in (0, 1]"),
            (self.schedule in ("jump", "cubic"), "schedule must be jump or cubic"),
            (self.guard in ("warn", "stop", "off"), "guard must be warn, stop or off"),
            (
                self.selection in ("alpha", "perturbation", "guarded"),
                "selection must be alpha, perturbation or guarded",
            ),
            (self.selection_images >= 1, "selection_images must be at least 1"),
            (self.selection_steps >= 0, "selection_steps must be at least 0"),
            (len(self.epochs) == 3 and min(self.epochs) >= 0, "epochs must be three, 0 or more"),
            (len(self.lr) == 3 and min(self.lr) > 0, "lr must be three, greater than 0"),
            (self.batch_size >= 1, "batch_size must be at least 1"),
            (self.clip > 0, "clip must be greater than 0"),
            (self.channels >= 1 and self.layers >= 1, "channels and layers must be at least 1"),
            (self.partial >= 1, "partial must be at least 1"),
            (self.latency_weight >= 0 and self.nonzero_weight >= 0, "weights must be at least 0"),
            (self.eigenvalue_every >= 0, "eigenvalue_every must be at least 0"),
            (
                self.latency_weight == self.latency_limit_us == 0 or self.latency_table is not None,
                "latency_weight and latency_limit_us need latency_table (dass latency-table makes "
                "one)",
            ),
            (
                self.latency_limit_us >= 0 and self.nonzero_limit >= 0,
                "latency_limit_us and nonzero_limit must be at least 0",
            ),
            (
                self.selection == "alpha" or self.latency_limit_us == self.nonzero_limit == 0,
                "limits hold for selection alpha only",
            ),
        ):
            if not good:
                given = {f.name: getattr(self, f.name) for f in fields(self)}
                shown = {k: v for k, v in given.items() if k in what} or given
                raise ValueError(f"{what}, got {shown}")
        parse_pattern(self.pattern)


@dataclass(frozen=True)
class Phase:
    """A stretch of the search in which the same things are trained.

    name: shown and stored. weights, scores, alphas: whether each is trained. sparse: whether the
    layers are masked; frozen: whether by a mask that no longer changes, on the sparse kernels.
    """

    name: str
    epochs: int
    lr: float
    weights: bool = True
    scores: bool = False
    alphas: bool = True
    sparse: bool = False
    frozen: bool = False

    def lr_at(self, epoch: int, lr_min: float) -> float:
        """Cosine from lr to lr_min over the phase's own epochs, 0 .. epochs - 1."""
        turn = math.cos(math.pi * epoch / max(self.epochs, 1))
        return lr_min + 0.5 * (self.lr - lr_min) * (1 + turn)


def _dass(config: SearchConfig) -> list[Phase]:
    """method.md, section 4: dense, then scores alone, then the frozen masks' weights."""
    a, b, c = config.epochs
    return [
        Phase("pretrain", a, config.lr[0]),
        Phase("prune", b, config.lr[1], weights=False, scores=True, alphas=False, sparse=True),
        Phase("finetune", c, config.lr[2], sparse=True, frozen=True),
    ]


def _one_loop(config: SearchConfig) -> list[Phase]:
    """Weights, scores and alphas in every step, at the target density from the start."""
    epochs = config.epochs[0] + config.epochs[2]
    return [Phase("one_loop", epochs, config.lr[0], scores=True, sparse=True)]


def _darts(config: SearchConfig) -> list[Phase]:
    return [Phase("darts", config.epochs[0], config.lr[0])]


def _random(config: SearchConfig) -> list[Phase]:
    return []


STRATEGIES: dict[str, Callable[[SearchConfig], list[Phase]]] = {
    "dass": _dass,
    "one_loop": _one_loop,
    "darts": _darts,
    "random": _random,
}

PRESETS: dict[str, dict] = {
    # The released settings: 100 / 50 / 100 epochs, second order with batches of 32.
    "paper": {"epochs": (100, 50, 100), "batch_size": 32, "second_order": True},
    "affordable": {},
    # Two cores, hours.
    "small": {
        "channels": 8,
        "layers": 5,
        "epochs": (4, 2, 4),
        "limit": 4000,
        "density": 0.05,
        # The alphas have a hundredth of the paper's steps to go the same way.
        "alpha_lr": 6e-3,
        "eigenvalue_every": 1,
    },
    # Two cores, minutes: shows that everything works, not a good network.
    "smoke": {
        "channels": 4,
        "layers": 3,
        "epochs": (2, 1, 2),
        "limit": 512,
        "size": 16,
        "batch_size": 64,
        "density": 0.1,
        "alpha_lr": 3e-3,
        "eigenvalue_every": 1,
    },
}


def phases_of(config: SearchConfig) -> list[Phase]:
    """The strategy's phases, those of no epochs left out."""
    return [phase for phase in STRATEGIES[config.strategy](config) if phase.epochs > 0]


def preset(name: str, **changes) -> SearchConfig:
    """The settings of a preset with some changed.

    Raises:
        ValueError: an unknown preset; the known ones are listed.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return replace(SearchConfig(**PRESETS[name]), **changes)
