"""The CUDA kernels, emulated: the sources of csrc/cuda compiled by g++, a fiber per thread.

The emulation is checked first: that it computes what CUDA says, and that it finds bugs. Then every
kernel against float64, under several orders of fibers.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_shim import build, cases, gates
from cuda_shim.cases import CASES, Case

import dass_kernels as dk
from dass_kernels import formats, reference, testing

DTYPES = [torch.float32, torch.float16]

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


@pytest.fixture(scope="module")
def emulator():
    return build.Emulator(build.ops_library())


@pytest.fixture(params=[0, 1, 2], ids=["ascending", "random", "warp-ahead"])
def ops(emulator, request):
    """The emulated ops under one order of each kind."""
    emulator.seed(request.param)
    yield emulator.ops
    emulator.seed(0)


def run(program: Path, *words: object) -> subprocess.CompletedProcess:
    env = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"}
    env.pop("LD_PRELOAD", None)
    return subprocess.run([program, *map(str, words)], capture_output=True, text=True, env=env)


def test_the_emulation_computes_what_cuda_says():
    done = run(build.program("selftest", sanitize=False))
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("sanitize", "more"), [(True, []), (False, ["-DSHIM_UCONTEXT"])])
def test_the_emulation_under_sanitizers_and_on_other_processors(sanitize, more):
    """Without the hand-written switch, fibers are those of ucontext, as on anything but x86-64."""
    done = run(build.program("selftest", sanitize, *more))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("bug", gates.BUGS)
def test_a_planted_bug_is_found_and_its_absence_too(bug):
    """Sanitized: the bug must show under every random order, and the repaired twin under none."""
    program = build.program("planted", sanitize=True)
    for seed in (1, 2, 3):
        done = run(program, bug, seed)
        found = f"{done.returncode} {done.stdout} {done.stderr}"
        assert gates.BUGS[bug] in found, f"seed {seed}: {found}"
        done = run(program, bug, seed, "fixed")
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_forward_and_gradients_agree_with_float64(ops, case, dtype):
    cases.check(ops, case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_same_under_many_orders(emulator, case, dtype):
    for seed in range(3, 3 + gates.ORDERS):
        emulator.seed(seed)
        cases.check(emulator.ops, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16"])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[4], CASES[19]], ids=lambda c: c.name)
def test_no_order_changes_a_bit(emulator, case, dtype):
    """No atomics: whoever runs first, the sums are formed in the same order."""
    mask = cases.mask_of(case)
    given = cases.operands(case, dtype, mask)
    packed = dk.pack(given["weight"], mask, case.format, case.groups)
    want = cases.dense(case, **{k: v for k, v in given.items() if v is not None}, mask=mask)
    grad, before = testing.randn(*want.shape, dtype=dtype), None
    for seed in range(4):
        emulator.seed(seed)
        got = cases.kernel_calls(emulator.ops, case, packed, given, grad)
        assert before is None or all(torch.equal(got[k], before[k]) for k in got)
        before = got


def test_the_kernels_really_ran(emulator):
    before = emulator.launches
    cases.check(emulator.ops, CASES[0], torch.float32)
    assert emulator.launches - before >= 3


@pytest.mark.parametrize("layer", [0, 12, 40])
def test_trained_masks(emulator, layer):
    """Corners of ResNet-50's layers as magnitude pruning left them, at 90 and 98 %."""
    folder = os.environ.get("DASS_DATA_DIR")
    if not folder:
        pytest.skip("DASS_DATA_DIR does not point to the development data")
    masks = Path(folder) / "dlmc" / "dlmc_rn50_magnitude.npz"
    emulator.seed(5)
    for sparsity in ("0.9", "0.98"):
        mask = cases.dlmc(masks, sparsity, layer, 140, 200)
        shape = tuple(mask.shape)
        cases.check(emulator.ops, Case("dlmc", (70, shape[1]), shape), torch.float32, mask)
        conv = Case("dlmc 1x1", (2, shape[1], 7, 7), (*shape, 1, 1))
        cases.check(emulator.ops, conv, torch.float16, mask[:, :, None, None])


def test_halves_pass_unchanged(ops):
    """Every half through an identity matrix, subnormal numbers, -0.0, infinity and NaN too."""
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.float16).view(-1, 1).contiguous()
    packed = dk.pack(torch.ones(1, 1, dtype=torch.float16))
    y = ops.linear(x, packed.values, packed.pattern, None, 1, 0)
    assert bool(((y == x) | (y.isnan() & x.isnan())).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16"])
def test_nan_and_infinity_reach_only_what_they_should(ops, dtype):
    """A pruned weight is absent: 0 * nan never happens; a kept 0 is not absent."""
    weight, mask = testing.random_weight((20, 9, 3, 3), 0.1, dtype=dtype)
    weight[3], weight[4] = 0.0, -0.0
    x = testing.randn(2, 9, 5, 6, dtype=dtype)
    x[0, 2, 1, 1], x[1, 5, 4, 5], x[1, 0, 0, 0] = torch.nan, torch.inf, -0.0
    weight[~mask] = torch.nan
    packed = dk.pack(weight, mask)
    spec = dk.conv_spec(weight.shape, 1, 1, 1, "relu6")
    y = ops.conv2d(x, packed.values, packed.pattern, None, None, spec)
    want = reference.conv2d_kept(x, weight, mask, padding=1, activation="relu6")
    assert torch.equal(y.isnan(), want.isnan()) and y.isnan().any() and not y.isnan().all()
    good = ~want.isnan()
    size = reference.conv2d_kept(x.abs(), weight.abs(), mask, padding=1)
    length = testing.row_length(mask)
    limit = cases.bound(dtype, length, size.nan_to_num(0.0, 0.0), want)
    testing.assert_within(y[good], want[good], limit[good])


def test_negative_zero_is_kept_and_adds_nothing(ops):
    weight = torch.tensor([[-0.0, 1.0, 0.0], [0.0, -0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [False, True, False]])
    packed = dk.pack(weight, mask)
    assert packed.nnz == 3 and bool(torch.signbit(packed.values[0]))
    y = ops.linear(torch.tensor([[5.0, 2.0, torch.nan]]), packed.values, packed.pattern, None, 2, 0)
    assert y.tolist() == [[2.0, 0.0]]


@pytest.mark.parametrize(
    ("shape", "groups", "density"),
    [((5, 7), 1, 0.3), ((70, 130), 1, 0.02), ((9, 3, 2, 3), 3, 0.5), ((64, 1, 3, 3), 64, 0.4),
     ((300, 33), 1, 0.1), ((4, 0), 1, 0.0), ((0, 4), 1, 0.0), ((6, 5, 1, 1), 2, 0.0),
     ((3, 40, 5, 5), 1, 1.0)],
)  # fmt: skip
def test_packing_gives_the_same_pattern_word_for_word(ops, shape, groups, density):
    """But for the bit mask, which only the processor's kernels read."""
    mask = testing.random_mask(shape, density)
    want = formats.build_pattern(mask, "csr", groups)
    got = ops.build_pattern(mask, groups)
    formats.validate_pattern(got, torch.Size(shape), "csr", groups)
    end = int(want[formats._BITS]) or len(want)
    want = want[:end].clone()
    want[formats._BITS], want[formats._LENGTH] = 0, end
    assert torch.equal(got, want)


def _conv_arguments():
    weight, mask = testing.random_weight((6, 4, 3, 3), 0.5)
    packed = dk.pack(weight, mask)
    return (
        testing.randn(1, 4, 5, 5),
        packed.values,
        packed.pattern,
        dk.conv_spec((6, 4, 3, 3), 1, 0, 1),
    )


def test_a_pattern_that_does_not_fit_ends_the_kernel(emulator):
    """Only the device can look into it: a trap, instead of reads past the end."""
    x, values, pattern, spec = _conv_arguments()
    conv = emulator.ops.conv2d
    conv(x, values, pattern, None, None, spec)
    wrong = pattern.clone()
    wrong[0] += 1
    calls = [
        (x, values, wrong, None, None, spec),
        (x, values, pattern[:-1].clone(), None, None, spec),
        (x, values[:-1].clone(), pattern, None, None, spec),
        (x[:, :3].contiguous(), values, pattern, None, None, spec),
        (x, values, pattern, None, None, [5, *spec[1:]]),
        (x, values, pattern, None, None, [6, 1, 3, *spec[3:]]),
    ]
    for arguments in calls:
        with pytest.raises(RuntimeError, match="__trap"):
            conv(*arguments)
    conv(x, values, pattern, None, None, spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"x": a["x"].double()}, "float32 or float16 expected on CUDA"),
        (lambda a: {"x": a["x"].half()}, "values must have the dtype of the input"),
        (lambda a: {"x": a["x"][0]}, r"input must have 4 dimensions \(N, C, H, W\), got 3"),
        (lambda a: {"values": a["values"][:, None]}, "values must be a vector"),
        (lambda a: {"pattern": a["pattern"].long()}, "pattern must be a contiguous int32 vector"),
        (lambda a: {"bias": torch.ones(5)}, "bias must have 6 elements"),
        (lambda a: {"bias": torch.ones(6).double()}, "bias must have the dtype of the input"),
        (lambda a: {"residual": torch.ones(1, 6, 2, 3)}, "must have the shape of the output"),
        (lambda a: {"spec": a["spec"][:-1]}, "spec must have 12 integers, got 11"),
        (lambda a: {"spec": [*a["spec"][:-1], 9]}, "unknown activation code 9"),
        (lambda a: {"spec": [6, 9, 3, *a["spec"][3:]]}, "larger than the padded input"),
    ],
)
def test_wrong_arguments_are_named(emulator, change, message):
    x, values, pattern, spec = _conv_arguments()
    given = {"x": x, "values": values, "pattern": pattern, "bias": None, "residual": None}
    given["spec"] = spec
    with pytest.raises(RuntimeError, match=message):
        emulator.ops.conv2d(**{**given, **change(given)})


@pytest.mark.slow
def test_the_kernels_under_sanitizers():
    """All cases, both dtypes, in a Python that preloads AddressSanitizer."""
    done = gates.run_sanitized(orders=2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_the_sanitizer_watches_tensors_too():
    """A read one element behind a tensor of torch's ends the process."""
    done = gates.run_sanitized(0, "--overrun")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]


def test_strided_arguments(ops):
    """What is not contiguous is copied first, as on the processor."""
    x, values, pattern, spec = _conv_arguments()
    want = ops.conv2d(x, values, pattern, None, None, spec)
    strided = torch.stack([x, x], -1)[..., 0]
    doubled = torch.stack([values, values], -1)[:, 0]
    assert not strided.is_contiguous() and not doubled.is_contiguous()
    assert torch.equal(ops.conv2d(strided, doubled, pattern, None, None, spec), want)
