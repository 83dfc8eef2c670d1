"""Every argument that must be refused: with its name, at the boundary, and never with a crash."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import dass_kernels as dk
from dass_kernels.testing import lanes, randn, random_weight

ops = torch.ops.dass

CONV = dk.pack(*random_weight((6, 4, 3, 3), 0.5))
MATRIX = dk.pack(*random_weight((6, 5), 0.5))
IMAGE, ROWS = randn(2, 4, 5, 5), randn(3, 5)

BAD_CONV2D = [
    ({"packed": MATRIX}, "packed must be"),
    ({"packed": CONV.values}, "packed must come from dass_kernels.pack, got Tensor"),
    ({"x": randn(4, 5)}, "input must be"),
    ({"x": randn(1, 1, 4, 5, 5)}, "input must be"),
    ({"x": randn(2, 3, 5, 5)}, "input has 3 channels, expected 4"),
    ({"x": randn(2, 4, 2, 5)}, "kernel is larger than the padded input"),
    ({"x": randn(2, 4, 0, 5)}, "kernel is larger than the padded input"),
    ({"x": IMAGE.double()}, "input and weight must have one dtype"),
    ({"x": IMAGE.half()}, "input and weight must have one dtype"),
    ({"x": IMAGE.int()}, "input and weight must have one dtype"),
    ({"bias": randn(5)}, "bias must have 6 elements"),
    ({"bias": randn(6, 1)}, "bias must have 6 elements"),
    ({"bias": randn(6).double()}, "bias must have the dtype of the input"),
    ({"residual": randn(2, 6, 3, 4)}, "residual.* must have the shape of the output"),
    ({"residual": randn(6, 3, 3)}, "residual"),
    ({"residual": randn(2, 6, 3, 3).double()}, "residual must have the dtype of the input"),
    ({"stride": 0}, "stride and dilation must be positive"),
    ({"stride": (1, -1)}, "stride and dilation must be positive"),
    ({"stride": (1, 2, 3)}, "stride must be an int or a pair"),
    ({"stride": ()}, "stride must be an int or a pair"),
    ({"stride": 1.5}, "stride must be an int or a pair"),
    ({"stride": "2"}, "stride must be an int or a pair"),
    ({"stride": None}, "stride must be an int or a pair"),
    ({"padding": -1}, "padding must not be negative"),
    ({"padding": (0, -2)}, "padding must not be negative"),
    ({"padding": "full"}, "padding must be ints, 'same' or 'valid'"),
    ({"padding": "same", "stride": 2}, "padding='same' is not supported for strided"),
    ({"padding": (1, 1, 1, 1)}, "padding must be an int or a pair"),
    ({"padding": [1, 0.5]}, "padding must be an int or a pair"),
    ({"dilation": 0}, "stride and dilation must be positive"),
    ({"dilation": 3}, "kernel is larger than the padded input"),
    ({"dilation": (1, 1, 1)}, "dilation must be an int or a pair"),
    ({"groups": 4}, "groups must divide the 6 outputs, got 4"),
    ({"groups": 0}, "groups must divide the 6 outputs, got 0"),
    ({"groups": -1}, "groups must divide the 6 outputs, got -1"),
    ({"groups": 2}, "input has 4 channels, expected 8"),
    ({"activation": "gelu"}, "activation must be None, 'relu', 'relu6' or 'hardswish', got 'gelu'"),
    ({"activation": 1}, "activation must be"),
    ({"activation": ["relu"]}, "activation must be"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_CONV2D)
def test_conv2d_names_the_bad_argument(changed, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        dk.conv2d(**{"x": IMAGE, "packed": CONV, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"packed": CONV}, "packed must be"),
        ({"packed": None}, "packed must come from dass_kernels.pack, got NoneType"),
        ({"x": randn(3, 4)}, "input must end in 5 features"),
        ({"x": torch.tensor(1.0)}, "input must end in 5 features"),
        ({"x": ROWS.double()}, "input and weight must have one dtype"),
        ({"x": ROWS.to(torch.complex64)}, "input and weight must have one dtype"),
        ({"bias": randn(5)}, "bias must have 6 elements"),
        ({"bias": randn(6).double()}, "bias must have the dtype of the input"),
        ({"activation": "gelu"}, "activation must be"),
    ],
)
def test_linear_names_the_bad_argument(changed, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        dk.linear(**{"x": ROWS, "packed": MATRIX, **changed})


@pytest.mark.parametrize(
    ("packed", "x", "message"),
    [
        (CONV, randn(5, 3), "packed must be"),
        ("csr", randn(5, 3), "packed must come from"),
        (MATRIX, randn(5), "x must be"),
        (MATRIX, randn(4, 3), r"x must be \[5, N\]"),
        (MATRIX, randn(1, 1, 5, 3), "x must be"),
        (MATRIX, randn(5, 3).double(), "one dtype"),
    ],
)
def test_spmm_names_the_bad_argument(packed, x, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        dk.spmm(packed, x)


SPEC = dk.conv_spec((6, 4, 3, 3), 1, 0, 1)
GRAD = randn(2, 6, 3, 3)


def spec(at, value):
    return [*SPEC[:at], value, *SPEC[at + 1 :]]


V, P, MV, MP = CONV.values, CONV.pattern, MATRIX.values, MATRIX.pattern
PATTERNS = [
    (P[:-1], "truncated"),
    (P[1:], "not one made by"),
    (P[:8], "not one made by"),
    (P[:0], "not one made by"),
    (torch.zeros_like(P), "not one made by"),
    (P.long(), "pattern must be a contiguous int32 vector"),
    (P.view(1, -1), "pattern must be a contiguous int32 vector"),
    (P.repeat_interleave(2)[::2], "pattern must be a contiguous int32 vector"),
]
BAD_OPS = [
    *[("conv2d", (IMAGE, V, p, None, None, SPEC), m) for p, m in PATTERNS],
    *[("conv2d_dx", (GRAD, V, p, SPEC, 4, 5, 5), m) for p, m in PATTERNS],
    *[("conv2d_dw", (GRAD, IMAGE, p, SPEC, len(V)), m) for p, m in PATTERNS],
    *[("linear", (ROWS, MV, p, None, 6, 0), m) for p, m in PATTERNS],
    ("conv2d", (IMAGE, V[1:], P, None, None, SPEC), "values must be a vector of"),
    ("conv2d", (IMAGE, V.view(1, -1), P, None, None, SPEC), "values must be a vector of"),
    ("conv2d", (IMAGE, V.double(), P, None, None, SPEC), "values must have the dtype"),
    ("conv2d", (IMAGE.half(), V.half(), P, None, None, SPEC), "float32 or float64 expected"),
    ("conv2d", (IMAGE.int(), V, P, None, None, SPEC), "float32 or float64 expected"),
    ("conv2d", (IMAGE[0], V, P, None, None, SPEC), "input must have 4 dimensions"),
    ("conv2d", (IMAGE, V, P, None, None, SPEC[:-1]), "spec must have 12 integers, got 11"),
    ("conv2d", (IMAGE, V, P, None, None, []), "spec must have 12 integers, got 0"),
    ("conv2d", (IMAGE, V, P, None, None, spec(0, 7)), "the pattern is of 6 outputs and 9 taps"),
    ("conv2d", (IMAGE, V, P, None, None, spec(1, 2)), "the pattern is of 6 outputs and 9 taps"),
    ("conv2d", (IMAGE, V, P, None, None, spec(3, 0)), "stride and dilation must be positive"),
    ("conv2d", (IMAGE, V, P, None, None, spec(6, -1)), "padding must be in .* got -1"),
    ("conv2d", (IMAGE, V, P, None, None, spec(9, -1)), "dilation must be in .* got -1"),
    ("conv2d", (IMAGE, V, P, None, None, spec(11, 4)), "unknown activation code 4"),
    ("conv2d", (IMAGE, V, P, None, None, spec(11, -1)), "must be in .* got -1"),
    ("conv2d", (IMAGE, V, P, None, None, spec(11, 2**32)), "must be in .* got 4294967296"),
    ("conv2d_dx", (GRAD[:, :5], V, P, SPEC, 4, 5, 5), "grad must have the shape of the output"),
    ("conv2d_dx", (GRAD, V, P, SPEC, 4, 6, 5), "grad must have the shape of the output"),
    ("conv2d_dx", (GRAD, V, P, SPEC, 3, 5, 5), "input has 3 channels, expected 4"),
    ("conv2d_dx", (GRAD, V, P, SPEC, 4, -1, 5), "kernel is larger"),
    ("conv2d_dx", (GRAD, V.double(), P, SPEC, 4, 5, 5), "values must have the dtype"),
    ("conv2d_dw", (GRAD, IMAGE, P, SPEC, len(V) + 1), "count must be"),
    ("conv2d_dw", (GRAD[:1], IMAGE, P, SPEC, len(V)), "grad must have the shape of the output"),
    ("conv2d_dw", (GRAD.double(), IMAGE, P, SPEC, len(V)), "grad must have the dtype"),
    ("linear", (ROWS, MV, MP, None, 7, 0), "outputs must be 6, got 7"),
    ("linear", (ROWS, MV, MP, None, 6, 9), "unknown activation code 9"),
    ("linear", (ROWS[:, 1:], MV, MP, None, 6, 0), r"input must be \(batch, 5\)"),
    ("linear", (ROWS[0], MV, MP, None, 6, 0), r"input must be \(batch, 5\)"),
    ("linear", (IMAGE, V, P, None, 6, 0), "the pattern is of a convolution"),
    ("linear_dx", (randn(3, 5), MV, MP, 5), r"grad must be \(batch, 6\)"),
    ("linear_dx", (randn(3, 6), MV, MP, 4), "inputs must be 5, got 4"),
    ("linear_dx", (randn(3, 6), V, P, 4), "the pattern is of a convolution"),
    ("linear_dw", (randn(2, 6), ROWS, MP, len(MV)), "grad has 2 rows, input 3"),
    ("linear_dw", (randn(3, 6), ROWS, MP, 0), "count must be"),
    ("linear_dw", (randn(3, 6).double(), ROWS, MP, len(MV)), "grad must have the dtype"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), BAD_OPS)
def test_ops_name_the_bad_argument(name, arguments, message):
    """Called directly, as a traced or exported graph would: RuntimeError, never a crash."""
    with pytest.raises(RuntimeError, match=f"dass::{name}.*{message}"):
        getattr(ops, name)(*arguments)


@pytest.mark.parametrize(
    "changed",
    [
        {"padding": 2**40},
        {"padding": 2**61},
        {"padding": (0, 2**62)},
        {"padding": 2**63},
        {"dilation": 2**40},
        {"dilation": 2**62},
        {"dilation": 2**63 - 1},
        {"dilation": 2**62, "padding": 2**61},
        {"stride": 2**31},
        {"stride": 2**63},
    ],
    ids=str,
)
def test_huge_integers_raise_instead_of_overflowing(changed):
    with pytest.raises((ValueError, RuntimeError)):
        dk.conv2d(IMAGE, CONV, **changed)


def test_ops_refuse_what_overflows_64_bits():
    """2 * (2^63 - 1) is -2: the kernel would read outside the image. In a process of its own."""
    code = (
        "import torch, dass_kernels as d\n"
        "p = d.pack(torch.ones(6, 4, 3, 3)); big = 2**63 - 1\n"
        "spec = [6, 3, 3, 1, 1, 0, 0, 0, 0, big, big, 0]\n"
        "x = torch.ones(2, 4, 5, 5)\n"
        "try: torch.ops.dass.conv2d(x, p.values, p.pattern, None, None, spec)\n"
        "except RuntimeError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "refused"


LANES_SPEC = dk.conv_spec((6, 4, 3, 3), 1, 0, 1)


@pytest.mark.parametrize(
    ("make", "changed", "message"),
    [
        (lambda n: randn(2, 4, 5, 5, n), {3: 2}, "stride must be 1"),
        (lambda n: randn(2, 4, 5, 5, n), {5: 1}, "padding part of the input"),
        (lambda n: randn(2, 4, 5, 5, n), {6: 2, 8: 2}, "padding part of the input"),
        (lambda n: randn(2, 4, 5, 5, n + 1), {}, "the last dimension must be"),
        (lambda n: randn(2, 4, 5, 5), {}, "input must be"),
        (lambda n: randn(2, 4, 5, n, 5).transpose(3, 4), {}, "with contiguous planes"),
        (
            lambda n: torch.zeros(9999).as_strided(
                (2, 4, 5, 5, n), (4 * (25 * n + 1), 25 * n + 1, 5 * n, n, 1)
            ),
            {},
            "input must be",
        ),
    ],
)
def test_conv2d_lanes_names_the_bad_argument(make, changed, message):
    spec = [changed.get(i, word) for i, word in enumerate(LANES_SPEC)]
    with pytest.raises(RuntimeError, match=f"dass::conv2d_lanes.*{message}"):
        ops.conv2d_lanes(make(lanes()), CONV.values, CONV.pattern, None, spec)


def test_a_stride_past_the_input_reads_one_pixel(isa):
    for stride in (5, 2**20, 2**31 - 1):
        y = dk.conv2d(IMAGE, CONV, stride=stride)
        torch.testing.assert_close(y, dk.conv2d(IMAGE, CONV)[:, :, :1, :1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1.0]],), "weight must be a torch.Tensor, got list"),
        ((torch.ones(2, 2, dtype=torch.int64),), "weight must be floating point, got torch.int64"),
        ((torch.ones(2),), r"weight must be \[O, I\] or"),
        ((torch.ones(2, 2, 2),), r"weight must be \[O, I\] or"),
        ((torch.ones(2, 2, 0, 3),), "weight must have a kernel of at least 1 x 1"),
        ((torch.ones(2, 2), torch.ones(2, 3)), "mask must have the weight's shape"),
        ((torch.ones(2, 2), None, "3x1"), "unknown format '3x1'; known formats"),
        ((torch.ones(2, 2), None, "4:2"), "unknown format '4:2'"),
        ((torch.ones(2, 2), None, "0:2"), "unknown format '0:2'"),
        ((torch.ones(2, 2), None, ""), "unknown format ''"),
        ((torch.ones(2, 6), None, "2:4"), "mask is not 2:4"),
        ((torch.ones(2, 4), None, "n:m"), "mask is not n:m"),
        ((torch.ones(6, 2, 1, 1), None, "csr", 4), "groups must divide the 6 outputs, got 4"),
        ((torch.ones(6, 2, 1, 1), None, "csr", 0), "groups must divide the 6 outputs, got 0"),
        ((torch.ones(8, 2, 1, 1), None, "8x1", 2), "outputs per group divisible by 8, got 4"),
    ],
)
def test_pack_names_the_bad_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        dk.pack(*arguments)
