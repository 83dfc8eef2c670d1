"""Gradients of the outer problem: architecture parameters on the validation loss.

    min_alpha L_val(w*(alpha), alpha)    with    w*(alpha) = argmin_w L_train(w, alpha)

First order takes w* for constant. Second order replaces it by one step of the weight optimiser,
``w' = w - xi u(w, alpha)``, and differentiates through that step (Liu et al. 2019, DARTS,
arXiv 1806.09055, equations 6 to 8).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["Loss", "dominant_eigenvalue", "first_order", "second_order"]

Loss = Callable[[], Tensor]  # the loss at the present values of weights and alphas


def first_order(
    val_loss: Loss, alphas: Sequence[Tensor], weights: Sequence[Tensor] = ()
) -> tuple[float, list[Tensor]]:
    """(L_val, its gradient by alpha) with the weights taken as they are.

    weights: whose gradients need not be computed on the way.
    """
    with _constant(weights):
        loss = val_loss()
        return loss.item(), _gradients(loss, alphas)


def second_order(
    train_loss: Loss,
    val_loss: Loss,
    weights: Sequence[Tensor],
    alphas: Sequence[Tensor],
    xi: float,
    *,
    momenta: Sequence[Tensor | None] | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    radius: float = 0.01,
) -> tuple[float, list[Tensor]]:
    """(L_val(w', alpha), its gradient by alpha) after one unrolled step of SGD.

    ``w' = w - xi (momentum buf + dL_train/dw + weight_decay w)``. The Hessian-vector product is a
    central difference, divided by 2 eps, with ``eps = radius / |v|`` and ``v = dL_val/dw'``:

        g = dL_val(w')/dalpha - xi (dL_train(w + eps v)/dalpha - dL_train(w - eps v)/dalpha) / 2 eps

    Args:
        train_loss, val_loss: evaluate the loss at the present weights; the weights are changed in
            place meanwhile and are what they were, bit for bit, at the end.
        weights: what the step moves, each a leaf that requires a gradient.
        momenta: the optimiser's buffers, None where there are none yet.
        xi: the step's learning rate.
    """
    kept = [w.detach().clone() for w in weights]
    momenta = momenta or [None] * len(weights)
    try:
        gradients = _gradients(train_loss(), weights)
        with torch.no_grad():
            for w, g, buffer in zip(weights, gradients, momenta, strict=True):
                step = g + weight_decay * w
                if buffer is not None:
                    step += momentum * buffer
                w.sub_(xi * step)
        loss = val_loss()
        outer = _gradients(loss, [*alphas, *weights])
        direct, vector = outer[: len(alphas)], outer[len(alphas) :]
        norm = torch.linalg.vector_norm(torch.stack([v.norm() for v in vector]))
        if norm == 0:
            return loss.item(), direct
        eps = radius / float(norm)
        with _constant(weights):
            plus = _moved(train_loss, weights, kept, vector, eps, alphas)
            minus = _moved(train_loss, weights, kept, vector, -eps, alphas)
    finally:
        _restore(weights, kept)
    found = zip(direct, plus, minus, strict=True)
    return loss.item(), [d - xi * (p - m) / (2 * eps) for d, p, m in found]


def dominant_eigenvalue(
    loss: Loss,
    alphas: Sequence[Tensor],
    weights: Sequence[Tensor] = (),
    *,
    iterations: int = 8,
    radius: float = 1e-3,
    seed: int = 0,
) -> float:
    """The eigenvalue of largest magnitude of the Hessian of `loss` by alpha, by power iteration.

    A sharp optimum of alpha foretells a poor network (Zela et al. 2020, arXiv 1909.09656). Products
    with the Hessian are central differences of the gradient. weights: as in :func:`first_order`.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = [a.detach().clone() for a in alphas]
    vector = [torch.randn(a.shape, generator=generator).to(a) for a in alphas]
    value = 0.0
    try:
        for _ in range(iterations):
            norm = float(torch.linalg.vector_norm(torch.stack([v.norm() for v in vector])))
            if norm == 0:
                return 0.0
            vector = [v / norm for v in vector]
            with _constant(weights):
                plus = _moved(loss, alphas, kept, vector, radius, alphas)
                minus = _moved(loss, alphas, kept, vector, -radius, alphas)
            product = [(p - m) / (2 * radius) for p, m in zip(plus, minus, strict=True)]
            value = float(sum((v * h).sum() for v, h in zip(vector, product, strict=True)))
            vector = product
    finally:
        _restore(alphas, kept)
    return value


@contextlib.contextmanager
def _constant(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within, the tensors require no gradient, so that a backward pass leaves theirs out."""
    before = [t.requires_grad for t in tensors]
    for t in tensors:
        t.requires_grad_(False)
    try:
        yield
    finally:
        for t, wanted in zip(tensors, before, strict=True):
            t.requires_grad_(wanted)


def _moved(loss, moving, kept, vector, by: float, wanted) -> list[Tensor]:
    """The gradient by `wanted` at ``kept + by * vector``."""
    with torch.no_grad():
        for tensor, old, v in zip(moving, kept, vector, strict=True):
            tensor.copy_(old + by * v)
    return _gradients(loss(), wanted)


def _restore(tensors: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, old in zip(tensors, kept, strict=True):
            tensor.copy_(old)


def _gradients(loss: Tensor, by: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, by, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(by, found, strict=True)]
