"""The search: a relaxed network trained together with, or in turn with, its architecture.

    result = dass.search(dass.SearchConfig(dataset="cifar10", density=0.05))
    print(result.genotype.to_json())

See docs/method.md. :mod:`dass.strategies` has the settings and the phases, :mod:`dass.bilevel` the
gradients, :mod:`dass.guards` the signs of collapse.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dass.bilevel import dominant_eigenvalue, first_order, second_order
from dass.checkpoints import check_identity, deferred_interrupts, read_checkpoint, save_whole
from dass.costs import Costs, costs_of
from dass.data import Augment, Batches
from dass.distributed import average, check_equal, follow_rank_zero, rank_and_world
from dass.genotype import Genotype
from dass.guards import signs_of_collapse
from dass.images import ImageDataset
from dass.perturbation import select_by_perturbation
from dass.search_sums import EpochSums, entropy, kept_share
from dass.sources import load_data
from dass.sparse_supernet import dress, freeze_masks, set_density, sparse_layers
from dass.strategies import Phase, SearchConfig, phases_of
from dass.supernet import Architecture, Supernet, choices_of
from dass.training import MIRRORED_IS_ANOTHER, TrainingError

__all__ = ["SearchProgress", "SearchResult", "Searcher", "search"]

_FORMAT = 1
_SAVE_EVERY_S = 15.0
_EIGENVALUE_IMAGES = 64


@dataclass(frozen=True)
class SearchProgress:
    """What `on_step` is told after each step; steps counts all phases."""

    step: int
    steps: int
    phase: str
    epoch: int
    epochs: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    history: one dict per epoch: phase, epoch, lr, density, train_loss, train_accuracy, val_loss (of
        the architecture steps), val_accuracy, entropy of the softmaxed alphas in nats, skips,
        eigenvalue (or None), signs of collapse, genotype, seconds.
    stopped: the sign of collapse that ended the search early, or None.
    selection: "alpha" or "perturbation": how the genotype was chosen; the last genotype of the
        history is that of the alphas.
    """

    genotype: Genotype
    config: SearchConfig
    history: list[dict]
    seconds: float
    resumed_at: int = 0
    stopped: str | None = None
    selection: str = "alpha"


def search(
    config: SearchConfig,
    *,
    checkpoint: Path | None = None,
    on_step: Callable[[SearchProgress], None] | None = None,
    on_epoch: Callable[[list[dict]], None] | None = None,
    data: ImageDataset | None = None,
) -> SearchResult:
    """Searches an architecture for sparse networks (DASS, arXiv 2207.06968).

    The training images are split in halves: weights and scores learn on one, alphas on the other;
    test images are not read. With torchrun each process takes its share of every half.

    Args:
        config: see :class:`dass.strategies.SearchConfig`.
        checkpoint: a file to go on from if it exists, written every 15 s and after each epoch. A
            search that was killed and goes on ends, bit for bit, as one that ran through.
        on_step: called after each step.
        on_epoch: called with the history so far at the start and after each epoch.
        data: training images, instead of what the configuration names.

    Raises:
        TrainingError: a loss is no number. CheckpointError: the file is of another search.
        DataError, UserError: the images. RanksDiffer: processes drifted apart.
    """
    if config.strategy == "random":
        return SearchResult(Genotype.random(config.seed), config, [], 0.0)
    if data is None:
        data = load_data(config.dataset, train=True, size=config.size, limit=config.limit)
    with deferred_interrupts() as interrupted:
        run = Searcher(config, data, checkpoint)
        resumed_at = run.resume()
        if on_epoch:
            on_epoch(run.history)
        while run.phase is not None and run.stopped is None:
            run.epoch(on_step, interrupted)
            if on_epoch:
                on_epoch(run.history)
    genotype, selection = run.select(on_step)
    return SearchResult(
        genotype, config, run.history, run.seconds, resumed_at, run.stopped, selection
    )


class Searcher:
    """The state of a search, and how it advances by an epoch."""

    def __init__(self, config: SearchConfig, data: ImageDataset, checkpoint: Path | None):
        self.config, self.path, self.data = config, checkpoint, data
        self.network, self.architecture = build(config, data)
        self.costs: Costs = costs_of(config, self.network, data.shape)
        self.phases = phases_of(config)
        self.genotype()  # a limit that cannot be kept is an error now, not at the end
        rank, world = rank_and_world()
        halves = data.split(0.5, seed=config.seed)
        augment = Augment(flip=data.name not in MIRRORED_IS_ANOTHER) if config.augment else None
        self.train, self.val = (
            Batches(
                half,
                min(config.batch_size, len(half) // world),
                augment=augment,
                seed=config.seed + i,
                drop_last=True,
                rank=rank,
                world=world,
            )
            for i, half in enumerate(halves)
        )
        self.at, self.epochs_done, self.step = 0, 0, 0
        self.seconds, self.history, self.stopped = 0.0, [], None
        self.sums = EpochSums()
        self.saved_at = time.monotonic()
        self.alpha_optimizer = torch.optim.Adam(
            self.architecture.parameters(),
            lr=config.alpha_lr,
            betas=(0.5, 0.999),
            weight_decay=config.alpha_weight_decay,
        )
        follow_rank_zero([*self.network.state_dict().values(), *self.architecture.parameters()])
        if self.phases:
            self._enter(self.phases[0])

    @property
    def phase(self) -> Phase | None:
        return self.phases[self.at] if self.at < len(self.phases) else None

    @property
    def steps(self) -> int:
        return len(self.train) * sum(phase.epochs for phase in self.phases)

    def _enter(self, phase: Phase) -> None:
        """Brings the network into the phase's form and makes the phase's optimiser."""
        if phase.sparse:
            dress(self.network, self.config)
            if phase.frozen:
                freeze_masks(self.network)
                follow_rank_zero(layer.mask for layer in sparse_layers(self.network))
                for layer in sparse_layers(self.network):
                    layer.refresh()
                self.network.skip_dead()
        self.network.train()
        scores = [layer.scores for layer in sparse_layers(self.network) if layer.scores is not None]
        mine = {id(s) for s in scores}
        weights = [p for p in self.network.parameters() if id(p) not in mine]
        for w in weights:
            w.requires_grad_(phase.weights)
        self.weights = weights if phase.weights else []
        groups = [{"params": self.weights, "scale": 1.0}] if phase.weights else []
        if phase.scores and scores:
            scale = self.config.lr[1] / self.config.lr[0] if phase.weights else 1.0
            groups.append({"params": scores, "scale": scale})
        self.optimizer = torch.optim.SGD(
            groups,
            lr=phase.lr,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
        )

    def epoch(self, on_step, interrupted: Callable[[], bool]) -> None:
        """The rest of the epoch that the search is in."""
        phase = self.phase
        lr = phase.lr_at(self.epochs_done, self.config.lr_min)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        others = _endless(self.val)
        for x, y in self.train:
            self._step(x, y, others, lr)
            if on_step:
                on_step(self._progress())
            if interrupted():
                self.save()
                raise KeyboardInterrupt
            if time.monotonic() - self.saved_at > _SAVE_EVERY_S:
                self.save()
        self._close_epoch(lr)
        self.save()
        if interrupted():
            raise KeyboardInterrupt

    def _step(self, x: Tensor, y: Tensor, others: Iterator, lr: float) -> None:
        start = time.perf_counter()
        self._set_density()
        if self.phase.alphas:
            self._alpha_step(x, y, *next(others), lr)
        self._weight_step(x, y)
        self.step += 1
        self.sums.seconds += time.perf_counter() - start

    def one_step(self) -> None:
        """A step of the present phase on the first batch, to see what it costs."""
        x, y = _first_images(self.train.data, self.train.batch_size)
        self._step(x, y, iter([(x, y)]), self.phase.lr)

    def skip_to(self, phase: int) -> None:
        """Enters a phase without what comes before it."""
        self.at, self.epochs_done = phase, 0
        self._enter(self.phase)

    def _loss(self, x: Tensor, y: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = self.network(x, weights)
        return F.cross_entropy(logits, y), logits

    def _val_loss(self, x: Tensor, y: Tensor) -> Tensor:
        weights = self.architecture.weights()
        loss, logits = self._loss(x, y, weights)
        self.sums.add_val(loss.item(), int((logits.argmax(1) == y).sum()), len(y))
        return loss + self.costs.penalty(weights)

    def _alpha_step(self, x: Tensor, y: Tensor, val_x: Tensor, val_y: Tensor, lr: float) -> None:
        alphas = list(self.architecture.parameters())
        if self.config.second_order:
            state = self.optimizer.state
            _, gradients = second_order(
                lambda: self._loss(x, y, self.architecture.weights())[0],
                lambda: self._val_loss(val_x, val_y),
                self.weights,
                alphas,
                lr,
                momenta=[state[w].get("momentum_buffer") for w in self.weights],
                momentum=self.config.momentum,
                weight_decay=self.config.weight_decay,
            )
        else:
            weights = list(self.network.parameters())
            _, gradients = first_order(lambda: self._val_loss(val_x, val_y), alphas, weights)
        average(gradients)
        for alpha, gradient in zip(alphas, gradients, strict=True):
            alpha.grad = gradient
        self.alpha_optimizer.step()

    def _weight_step(self, x: Tensor, y: Tensor, weights: dict[str, Tensor] | None = None) -> None:
        if weights is None:
            weights = {cell: w.detach() for cell, w in self.architecture.weights().items()}
        loss, logits = self._loss(x, y, weights)
        value = loss.item()
        if value != value or value in (float("inf"), float("-inf")):
            raise TrainingError(
                f"the loss is {value} in step {self.step + 1}: try a learning rate below "
                f"{self.optimizer.param_groups[0]['lr']:g}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        trained = [p for p in trained if p.grad is not None]
        average([p.grad for p in trained])
        torch.nn.utils.clip_grad_norm_(trained, self.config.clip)
        self.optimizer.step()
        self.sums.add(value, int((logits.argmax(1) == y).sum()), len(y))

    def _set_density(self) -> None:
        phase = self.phase
        if not phase.scores or self.config.schedule != "cubic":
            return
        begun = self.sums.batches + self.epochs_done * len(self.train)
        share = begun / max(1.0, 0.75 * phase.epochs * len(self.train))
        set_density(self.network, self.config, min(share, 1.0))

    def _progress(self) -> SearchProgress:
        phase, sums = self.phase, self.sums
        return SearchProgress(
            self.step,
            self.steps,
            phase.name,
            self.epochs_done + 1,
            phase.epochs,
            sums.loss / sums.images,
            sums.correct / sums.images,
        )

    def _close_epoch(self, lr: float) -> None:
        phase, sums = self.phase, self.sums
        genotype = self.genotype()
        eigenvalue = self._eigenvalue()
        found = [row["eigenvalue"] for row in self.history if row["eigenvalue"] is not None]
        found += [eigenvalue] if eigenvalue is not None else []
        signs = []
        if phase.alphas and self.config.guard != "off":
            signs = signs_of_collapse(genotype, found)
        layers = list(sparse_layers(self.network))
        self.history.append(
            {
                "phase": phase.name,
                "epoch": len(self.history) + 1,
                "lr": lr,
                "density": kept_share(layers),
                "train_loss": sums.loss / sums.images,
                "train_accuracy": sums.correct / sums.images,
                "val_loss": sums.val_loss / sums.val_images if sums.val_images else None,
                "val_accuracy": sums.val_correct / sums.val_images if sums.val_images else None,
                "entropy": entropy(self.architecture),
                "eigenvalue": eigenvalue,
                "expected_cost": self.costs.report(self.architecture.weights()),
                "signs": signs,
                "genotype": genotype.to_json(),
                "seconds": sums.seconds,
            }
        )
        check_equal(
            [*self.architecture.parameters(), *(layer.current_mask() for layer in layers)],
            "alphas and masks",
        )
        follow_rank_zero(self.network.buffers())
        self.seconds += sums.seconds
        self.sums = EpochSums()
        self.epochs_done += 1
        if signs and self.config.guard == "stop":
            self.stopped = signs[0]
        elif self.epochs_done == phase.epochs:
            self.at, self.epochs_done = self.at + 1, 0
            if self.phase is not None:
                self._enter(self.phase)

    def genotype(self) -> Genotype:
        """The strongest by the alphas, within the limits."""
        return self.costs.genotype(self.architecture)

    def select(self, on_step=None) -> tuple[Genotype, str]:
        """The genotype, and how it was chosen: see `selection` of SearchConfig."""
        last = self.history[-1] if self.history else None
        collapsed = last is not None and bool(last["signs"])
        wanted = self.config.selection
        if wanted == "alpha" or (wanted == "guarded" and not collapsed):
            return self.genotype(), "alpha"
        x, y = _first_images(self.val.data, self.config.selection_images)

        def loss(weights: dict[str, Tensor]) -> float:
            with torch.no_grad():
                return self._loss(x, y, weights)[0].item()

        def tell(done: int, decisions: int) -> None:
            if on_step and last is not None:
                seen = last["train_loss"], last["train_accuracy"]
                on_step(SearchProgress(self.step, self.steps, "select", done, decisions, *seen))

        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=self.config.lr_min, momentum=self.config.momentum
        )
        batches = _endless(self.train)

        def tune(weights: dict[str, Tensor]) -> None:
            for _ in range(self.config.selection_steps):
                self._weight_step(*next(batches), weights)

        found = select_by_perturbation(
            self.architecture, loss, tune=tune, tell=tell, seed=self.config.seed
        )
        return found, "perturbation"

    def _eigenvalue(self) -> float | None:
        every, epoch = self.config.eigenvalue_every, len(self.history) + 1
        if not self.phase.alphas or not every or epoch % every:
            return None
        x, y = _first_images(self.val.data, _EIGENVALUE_IMAGES)
        return dominant_eigenvalue(
            lambda: self._loss(x, y, self.architecture.weights())[0],
            list(self.architecture.parameters()),
            list(self.network.parameters()),
        )

    def identity(self) -> dict:
        """What must agree for a checkpoint to be of this search."""
        found = asdict(self.config)
        return {**found, "data": self.data.name, "images": len(self.data)}

    def save(self) -> None:
        if self.path is None or rank_and_world()[0] != 0:
            return
        state = {
            "format": _FORMAT,
            "identity": self.identity(),
            "network": self.network.state_dict(),
            "architecture": self.architecture.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.phase else None,
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "train": self.train.state_dict(),
            "val": self.val.state_dict(),
            "sums": vars(self.sums),
            "place": [self.at, self.epochs_done, self.step, self.seconds, self.stopped],
            "history": self.history,
        }
        save_whole(state, self.path)
        self.saved_at = time.monotonic()

    def resume(self) -> int:
        """Takes over the checkpoint if there is one; -> the step it was written at."""
        if self.path is None or not self.path.exists():
            return 0
        state = read_checkpoint(self.path, _FORMAT)
        check_identity(self.path, state["identity"], self.identity(), "search")
        self.at, self.epochs_done, self.step, self.seconds, self.stopped = state["place"]
        self._enter(self.phase or self.phases[-1])
        self.network.load_state_dict(state["network"])
        self.architecture.load_state_dict(state["architecture"])
        if self.phase:
            self.optimizer.load_state_dict(state["optimizer"])
        self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        self.train.load_state_dict(state["train"])
        self.val.load_state_dict(state["val"])
        self.history, self.sums = state["history"], EpochSums(**state["sums"])
        return self.step


def build(config: SearchConfig, data: ImageDataset) -> tuple[Supernet, Architecture]:
    """The relaxed network and the alphas of a configuration, from its seed."""
    choices = choices_of(config.densities)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = Supernet(
            config.channels,
            config.layers,
            len(data.classes),
            choices,
            in_channels=data.shape[0],
            partial=config.partial,
            recompute=config.recompute,
        )
    return network, Architecture(choices, config.seed)


def _endless(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from batches


def _first_images(data: ImageDataset, count: int) -> tuple[Tensor, Tensor]:
    index = torch.arange(min(count, len(data)))
    return data.normalise(data.images[index]), data.labels[index]
