"""Training steps: of single layers (forward, dX, dW on the mask), and of a whole network.

    python -m bench.bench_training --network resnet18 --width 0.5 --batch 16 --json out.json

The network is pruned, then trained for a few steps twice: dense with its weights masked after every
step, as any PyTorch user can, and on the sparse kernels.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dass_kernels
from bench import cases, session
from bench.cases import Conv
from bench.contest import Contest, Entry, NotAvailable
from bench.layers import masked_layer, packed_constant, random_input, seed, sparse_layer
from bench.peers import sparseprop
from dass import zoo
from dass.convert import densify
from dass.pruning import prune
from dass.schedule import attach_masks


def training(sparsities: Iterable[float]) -> Iterator[Contest]:
    for case in cases.TRAINING:
        for sparsity in sparsities:
            yield layer_contest(case, sparsity)


def layer_contest(case: Conv, sparsity: float, batch: int = cases.TRAINING_BATCH) -> Contest:
    """One step of one layer: as op (kept values given), as module (dense weight), as peer."""
    layer, mask = masked_layer(case, sparsity, bias=False)
    layer.train()
    x = random_input(case, batch).requires_grad_()
    grad = torch.randn(layer(x).shape, generator=seed(case, "grad"))
    sparse = sparse_layer(layer, mask).train()
    packed = packed_constant(sparse)
    values, pattern = packed.values.requires_grad_(), packed.pattern
    spec = dass_kernels.conv_spec(packed.shape, sparse.stride, sparse.padding, sparse.dilation)

    def op(x: Tensor) -> Tensor:
        return dass_kernels.conv2d_values(x, values, pattern, spec)

    def kept(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y, dx, dw = result
        return y, dx, dw[mask]

    last = torch.channels_last
    found = {
        "op": Entry(step(op, x, values, grad)),
        "module": Entry(step(sparse, x, sparse.weight, grad), kept),
        "nchw": Entry(step(layer, x, layer.weight, grad), kept),
    }
    wide, wide_x = copy.deepcopy(layer).to(memory_format=last), _formatted(x, last)
    wide_grad = grad.contiguous(memory_format=last)
    found["channels_last"] = Entry(step(wide, wide_x, wide.weight, wide_grad), kept)
    baselines = {"dense": ("nchw", "channels_last")}
    missing = ()
    try:
        peer = sparseprop.training_entries(layer, x, grad)
        found |= peer
        baselines["sparseprop"] = tuple(peer)
    except NotAvailable as reason:
        missing = (str(reason),)
    return Contest(
        group="training",
        kind=case.kind,
        label=f"{case.label} b{batch}",
        sparsity=sparsity,
        entries=found,
        baselines=baselines,
        tolerance=5e-4,  # dW sums over batch * pixels, up to 50,000 terms
        missing=missing,
    )


def step(forward: Callable, x: Tensor, weight: Tensor, grad: Tensor) -> Callable:
    """One training step of a layer: output, input gradient and weight gradient."""

    def run() -> tuple[Tensor, Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            y = forward(x)
            return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))

    return run


def _formatted(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    return x.detach().contiguous(memory_format=memory_format).requires_grad_()


class Trainer:
    """A network, its optimiser and one batch; ``step`` trains on it, ``probe`` only looks."""

    def __init__(self, model: nn.Module, x: Tensor, target: Tensor, masks: dict[str, Tensor]):
        self.model, self.x, self.target = model.train(), x, target
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        parameters = dict(model.named_parameters())
        self.masks = {parameters[name]: mask for name, mask in masks.items()}

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.target)

    def step(self) -> None:
        """Forward, backward, optimiser, and zeros again where weights are pruned."""
        with torch.inference_mode(False), torch.enable_grad():
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
            with torch.no_grad():
                for weight, mask in self.masks.items():
                    weight.mul_(mask)

    def probe(self) -> tuple[Tensor, ...]:
        """The loss, and in float64 the kept gradients of the first and the last layer.

        No step is made. In float32 the first layer's gradients differ by a percent between two
        layouts of the same dense network: the batch norms of a random network amplify rounding.
        """
        with torch.inference_mode(False), torch.enable_grad():
            loss = self.loss()
            exact = copy.deepcopy(self.model).double()
            weights = [p for p in exact.parameters() if p.dim() > 1]
            ends = (weights[0], weights[-1])
            grads = torch.autograd.grad(F.cross_entropy(exact(self.x.double()), self.target), ends)
        return (loss.detach(), *(g * (w != 0) for g, w in zip(grads, ends, strict=True)))


def network_contest(
    name: str, sparsity: float, batch: int = 16, threads: int = 1, **overrides
) -> Contest:
    """Training steps of a network of the zoo: dense and masked, against sparse."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = zoo.create(name, **overrides)
    prune(model, sparsity, exclude=("first", "last", "depthwise"))
    masks = {f"{key}.weight": m.mask for key, m in model.named_modules() if hasattr(m, "mask")}
    generator = seed(name, batch)
    x = torch.randn(batch, *zoo.input_shape(name), generator=generator)
    target = torch.randint(10, (batch,), generator=generator)
    dense = densify(model)
    wide = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    trainers = {
        "sparse": Trainer(model, x, target, {}),
        "nchw": Trainer(dense, x, target, masks),
        "channels_last": Trainer(wide, _formatted(x, torch.channels_last).detach(), target, masks),
    }
    attach_masks(trainers["sparse"].optimizer, model)
    return Contest(
        group="training_network",
        kind=name,
        label=f"{name} b{batch}" + "".join(f" {k}={v}" for k, v in overrides.items()),
        sparsity=sparsity,
        entries={key: Entry(t.step, probe=t.probe) for key, t in trainers.items()},
        baselines={"dense": ("nchw", "channels_last")},
        threads=threads,
        tolerance=1e-4,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    session.add_common_arguments(parser)
    parser.add_argument("--network", default="resnet18", help="a network of the zoo for 32 x 32")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sparsity", type=float, nargs="+", default=cases.SPARSITIES)
    options = session.parse(parser, arguments)
    overrides = {} if options.width == 1 else {"width": options.width}
    session.run(
        (
            network_contest(options.network, s, options.batch, options.threads, **overrides)
            for s in options.sparsity
        ),
        options,
    )


if __name__ == "__main__":
    main()
