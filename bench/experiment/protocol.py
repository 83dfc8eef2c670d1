"""What is the same for every network of the experiment; docs/results.md says why."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace

from dass.images import ImageDataset
from dass.methods import Recipe
from dass.sources import load_data
from dass.strategies import SearchConfig
from dass.training import TrainConfig

__all__ = ["PROTOCOL", "Protocol"]


@dataclass(frozen=True)
class Protocol:
    """Data, training, sizes and searches.

    Args:
        data, size: as in :func:`dass.data.load`; size is height and width in pixels.
        images, held_out: of the training set, stratified by class; disjoint.
        split_seed: of that choice, the same for all rows.
        epochs, lr: of pre-training, of learning masks, of fine-tuning (HYDRA, with a density that
            falls while masks are learned: :mod:`bench.experiment.falling`).
        batch_size, weight_decay, clip, warmup: see :class:`dass.training.TrainConfig`.
        width: of the MobileNet-v2 whose nonzeros and weights all others are given.
        layers: cells of a network of cells.
        seeds, sparsities: of the rows, in order.
        core_hours: no row or search is started once so much has been used, in CPU time.
        search_channels, search_epochs: of a search, which uses all training images.
        time_weight, nonzero_weight: prices of the two searches that have one.
        density_factors: densities that the third search chooses from, over that of the row.
    """

    data: str = "cifar10"
    size: int = 16
    images: int = 8_000
    held_out: int = 2_000
    split_seed: int = 0
    epochs: tuple[int, int, int] = (5, 3, 9)
    lr: tuple[float, float, float] = (0.05, 0.1, 0.1)
    batch_size: int = 32
    weight_decay: float = 3e-4
    clip: float = 5.0
    warmup: float = 0.1
    width: float = 1.0
    layers: int = 5
    seeds: tuple[int, ...] = (0, 1, 2)
    sparsities: tuple[float, ...] = (0.99, 0.95)
    core_hours: float = 24.0
    search_channels: int = 8
    search_epochs: tuple[int, int, int] = (4, 2, 8)
    time_weight: float = 0.1
    nonzero_weight: float = 0.1
    density_factors: tuple[float, ...] = (5.0, 1.0, 0.2)

    @functools.lru_cache(1)  # noqa: B019 - the rows of a run share it
    def training(self) -> tuple[ImageDataset, ImageDataset]:
        """(training images, held-out images), both of the training set."""
        whole = load_data(self.data, train=True, size=self.size)
        if self.data == "cifar10" and whole.name != "cifar10":
            raise SystemExit("CIFAR-10 is not to be had: see dass.data.load")
        both = whole.subset(self.images + self.held_out, self.split_seed)
        return both.split(self.held_out / (self.images + self.held_out), self.split_seed)

    def test(self) -> ImageDataset:
        """The whole test set."""
        return load_data(self.data, train=False, size=self.size)

    def recipe(self, seed: int) -> Recipe:
        """The three trainings of a row."""
        same = TrainConfig(
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            clip=self.clip,
            warmup=self.warmup,
            seed=seed,
        )
        stages = zip(self.epochs, self.lr, strict=True)
        return Recipe(*(replace(same, epochs=epochs, lr=lr) for epochs, lr in stages))

    def search(self, kind: str, sparsity: float, table: str | None = None) -> SearchConfig:
        """The search "paper", "time" (a price of measured time; table: the file of times) or
        "density" (densities are choices, with a price of nonzeros)."""
        density = round(1 - sparsity, 6)
        config = SearchConfig(
            dataset=self.data,
            size=self.size,
            density=density,
            channels=self.search_channels,
            layers=self.layers,
            epochs=self.search_epochs,
            batch_size=self.batch_size,
            alpha_lr=6e-3,
            eigenvalue_every=1,
            seed=self.seeds[0],
        )
        if kind == "time":
            return replace(config, latency_weight=self.time_weight, latency_table=table)
        if kind == "density":
            choices = tuple(round(factor * density, 6) for factor in self.density_factors)
            return replace(config, densities=choices, nonzero_weight=self.nonzero_weight)
        return config

    def to_dict(self) -> dict:
        """What decides the result of a row; part of every file of results."""
        return asdict(self)


PROTOCOL = Protocol()
