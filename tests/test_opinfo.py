"""PyTorch's own samples for conv2d and linear, run with a sparse weight.

The samples are those that PyTorch tests ``F.conv2d`` and ``F.linear`` with (OpInfo). Each one runs
with its weight whole and with a random half of it, forward and backward, against the dense op.
"""

from __future__ import annotations

import pytest
import torch

import dass_kernels as dk
from dass_kernels import testing
from dass_kernels.testing import check_conv2d, check_linear, random_mask

try:
    from torch.testing._internal.common_methods_invocations import op_db
except ImportError as error:  # it needs expecttest, which the extra "test" installs
    pytest.skip(f"torch's OpInfo is not importable: {error}", allow_module_level=True)

pytestmark = [
    pytest.mark.usefixtures("poisoned", "one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

OPINFO = {
    op.name: op for op in op_db if op.name in ("nn.functional.conv2d", "nn.functional.linear")
}
# Samples we do not support, by what PyTorch names them: reason. None so far.
UNSUPPORTED: dict[str, str] = {}


def check(name: str, sample, mask) -> None:
    weight, *bias = sample.args
    bias = sample.kwargs.pop("bias", bias[0] if bias else None)
    check_op = check_conv2d if name == "nn.functional.conv2d" else check_linear
    check_op(sample.input, weight, mask, bias, **sample.kwargs)


@pytest.mark.parametrize("name", ["nn.functional.conv2d", "nn.functional.linear"])
def test_every_sample(isa, name, report):
    total, passed, failed, unsupported = 0, 0, [], []
    for dtype in (torch.float32, torch.float64):
        for density in (1, 0.5):
            # Samples are consumed by `check`: make them anew.
            samples = list(OPINFO[name].sample_inputs("cpu", dtype, requires_grad=False))
            assert len(samples) >= 15, "PyTorch has fewer samples than when this was written"
            for i, sample in enumerate(samples):
                total += 1
                if sample.name in UNSUPPORTED:
                    unsupported.append(f"{sample.name}: {UNSUPPORTED[sample.name]}")
                    continue
                try:
                    check(name, sample, random_mask(sample.args[0].shape, density, seed=i))
                    passed += 1
                except Exception as error:
                    failed.append(f"{dtype} density {density} {sample}: {error}")
    report(f"OpInfo {name} on {isa}: {passed}/{total} passed, {len(unsupported)} unsupported")
    for line in unsupported:
        report(f"  {line}")
    assert not failed, "\n".join(failed)
    assert passed + len(unsupported) == total


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["nn.functional.conv2d", "nn.functional.linear"])
def test_every_sample_in_halves(isa, name, dtype):
    """Halves are computed in float32: the same samples, rounded once."""
    op = dk.conv2d if name == "nn.functional.conv2d" else dk.linear
    for i, sample in enumerate(OPINFO[name].sample_inputs("cpu", dtype, requires_grad=False)):
        weight, *bias = sample.args
        mask = random_mask(weight.shape, 0.5, seed=i)
        groups = sample.kwargs.get("groups", 1)
        y = op(sample.input, dk.pack(weight, mask, groups=groups), *bias, **sample.kwargs)
        bias = [None if b is None else b.float() for b in bias]
        packed = dk.pack(weight.float(), mask, groups=groups)
        wide = op(sample.input.float(), packed, *bias, **sample.kwargs)
        assert y.dtype == dtype and torch.equal(y, wide.to(dtype))


def test_every_bad_input_is_refused(report):
    """What F.conv2d refuses, with the arguments that PyTorch tests it with."""
    errors = list(OPINFO["nn.functional.conv2d"].error_inputs("cpu"))
    assert errors
    for error in errors:
        sample = error.sample_input
        weight, *bias = sample.args
        bias = sample.kwargs.get("bias", bias[0] if bias else None)
        rest = {k: v for k, v in sample.kwargs.items() if k != "bias"}
        with pytest.raises((ValueError, RuntimeError)):
            packed = dk.pack(weight, torch.ones(weight.shape, dtype=torch.bool))
            dk.conv2d(sample.input, packed, bias, **rest)
    report(f"OpInfo nn.functional.conv2d error inputs: {len(errors)}/{len(errors)} refused")


def test_the_oracle_can_fail():
    """A wrong result is seen: the bounds are not so wide that anything passes."""
    weight, mask = testing.random_weight((8, 4, 3, 3), 0.5)
    x = testing.randn(2, 4, 5, 5)
    y = dk.conv2d(x, dk.pack(weight, mask), padding=1)
    want = testing.reference.conv2d(x, weight * mask, padding=1)
    size = testing.reference.conv2d(x.abs(), weight.abs() * mask, padding=1)
    bound = testing.forward_bound(torch.float32, testing.row_length(mask), size)
    testing.assert_within(y, want, bound)
    assert float((bound / size).max()) < 3e-6  # 36 terms of float32
    for spoil in (
        lambda t: t * (1 + 1e-5),
        lambda t: t.roll(1, -1),
        lambda t: t.index_fill(1, torch.tensor([3]), torch.nan),
        lambda t: torch.where(t == t.flatten()[17], 0, t),
    ):
        with pytest.raises(AssertionError, match="elements wrong"):
            testing.assert_within(spoil(y), want, bound)
