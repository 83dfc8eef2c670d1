"""The architecture gradients against exact automatic differentiation, in float64."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from dass.bilevel import dominant_eigenvalue, first_order, second_order


class Relaxed(nn.Module):
    """Two weighted candidates on one edge, smooth, so that second derivatives exist."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x, alpha):
        p = alpha.softmax(0)
        return self.out(torch.tanh(p[0] * self.a(x) + p[1] * torch.sin(self.b(x))))


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = Relaxed().double()
    alpha = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    data = [(torch.randn(8, 5).double(), torch.randint(0, 3, (8,))) for _ in range(2)]
    return model, alpha, *data


def cross_entropy(model, alpha, batch, parameters=None):
    parameters = dict(model.named_parameters()) if parameters is None else parameters
    logits = functional_call(model, parameters, (batch[0], alpha))
    return nn.functional.cross_entropy(logits, batch[1])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_second_order_is_the_exact_gradient_through_the_unrolled_step(
    problem, momentum, weight_decay
):
    model, alpha, train, val = problem
    weights, xi = dict(model.named_parameters()), 0.1
    momenta = [torch.randn_like(w) if momentum else None for w in weights.values()]
    before = [w.detach().clone() for w in weights.values()]

    gradients = torch.autograd.grad(
        cross_entropy(model, alpha, train), list(weights.values()), create_graph=True
    )
    moved = {
        name: w - xi * (g + weight_decay * w + (momentum * m if m is not None else 0))
        for (name, w), g, m in zip(weights.items(), gradients, momenta, strict=True)
    }
    (exact,) = torch.autograd.grad(cross_entropy(model, alpha, val, moved), alpha)

    _, (found,) = second_order(
        lambda: cross_entropy(model, alpha, train),
        lambda: cross_entropy(model, alpha, val),
        list(weights.values()),
        [alpha],
        xi,
        momenta=momenta,
        momentum=momentum,
        weight_decay=weight_decay,
        radius=1e-4,
    )
    # Central differences err by O(eps^2): 1e-8 relative to second derivatives of order one.
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)
    _, (first,) = first_order(lambda: cross_entropy(model, alpha, val), [alpha])
    assert (first - exact).abs().max() > 1e-4  # the second order matters here
    for w, old in zip(weights.values(), before, strict=True):
        assert torch.equal(w, old)


def test_weights_come_back_where_the_loss_raises(problem):
    model, alpha, train, _ = problem
    before = [w.detach().clone() for w in model.parameters()]

    def broken():
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        second_order(
            lambda: cross_entropy(model, alpha, train),
            broken,
            list(model.parameters()),
            [alpha],
            1.0,
        )
    for w, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(w, old)


def test_the_dominant_eigenvalue_of_a_quadratic_form():
    generator = torch.Generator().manual_seed(1)
    q, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    values = torch.tensor([5.0, -1.0, 0.5, 0.3, 2.0, 0.1], dtype=torch.float64)
    hessian = q @ torch.diag(values) @ q.T
    alphas = [torch.randn(4, generator=generator).double().requires_grad_() for _ in range(1)]
    alphas.append(torch.randn(2, generator=generator).double().requires_grad_())
    before = [a.detach().clone() for a in alphas]

    def loss():
        z = torch.cat(alphas)
        return 0.5 * z @ hessian @ z

    assert dominant_eigenvalue(loss, alphas, iterations=60) == pytest.approx(5.0, rel=1e-6)
    assert dominant_eigenvalue(lambda: -loss(), alphas, iterations=60) == pytest.approx(
        -5, rel=1e-6
    )
    for a, old in zip(alphas, before, strict=True):
        assert torch.equal(a, old)


def test_the_eigenvalue_of_a_real_loss(problem):
    model, alpha, train, _ = problem
    exact = torch.autograd.functional.hessian(lambda a: cross_entropy(model, a, train), alpha)
    largest = max(torch.linalg.eigvalsh(exact), key=abs)
    found = dominant_eigenvalue(lambda: cross_entropy(model, alpha, train), [alpha], iterations=60)
    assert found == pytest.approx(float(largest), rel=1e-4)
