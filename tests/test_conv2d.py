"""conv2d and its gradients against float64: every tile width, geometry, layout and dtype."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import dass_kernels as dk
from dass_kernels import reference, testing
from dass_kernels.testing import FORMATS, check_conv2d, lanes, randn, random_mask, random_weight

pytestmark = [
    pytest.mark.usefixtures("poisoned", "one_thread"),
    # F.conv2d, in the reference, where "same" needs unequal paddings.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

FLOATS = [torch.float32, torch.float64]
HALVES = [torch.float16, torch.bfloat16]


def widths(count: int) -> list[int]:
    """Pixels around every tile width of a register of ``count`` lanes."""
    near = {1, count - 1, count, count + 1}
    for vectors in range(2, 10):
        near |= {vectors * count - 1, vectors * count, vectors * count + 1}
    return sorted(near | {16 * count - 1, 17 * count + 3} - {0})


def case(c, o, kernel=(1, 1), density=0.5, format="csr", groups=1, dtype=torch.float32, seed=0):
    shape = (o, c // groups, *kernel)
    return random_weight(shape, density, format, dtype, seed)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_pointwise_widths(isa, dtype, format):
    """1x1 at every width: straight from the image (few outputs read a column) and copied (many)."""
    for pixels in widths(lanes(dtype)):
        x = randn(2, 5, 1, pixels, dtype=dtype)
        for outputs, density in ((3, 0.5), (17, 0.8)):
            weight, mask = case(5, outputs, density=density, format=format, dtype=dtype)
            check_conv2d(x[:1], weight, mask, randn(outputs, dtype=dtype), format=format)
        check_conv2d(x, weight, mask, format=format)


@pytest.mark.parametrize("kernel", [(1, 1), (1, 2)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_tail_of_every_tile(isa, dtype, kernel):
    """Forward only: all widths up to one tile, so every number of lanes of the last vector."""
    with torch.no_grad():
        for pixels in range(1, 8 * lanes(dtype) + 2):
            x = randn(2, 5, 1, pixels + kernel[1] - 1, dtype=dtype)
            for outputs, density, format in ((3, 0.5, "csr"), (17, 0.8, "csr"), (9, 0.5, "4x1")):
                weight, mask = case(5, outputs, kernel, density, format, dtype=dtype)
                check_conv2d(x, weight, mask, randn(outputs, dtype=dtype), format=format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_spatial_widths(isa, dtype, format):
    """3x3 planes at every output width, one row and several."""
    for width in widths(lanes(dtype)):
        for height in (1, 3):
            weight, mask = case(3, 9, (3, 3), 0.4, format, dtype=dtype)
            x = randn(1, 3, height, width, dtype=dtype)
            check_conv2d(x, weight, mask, format=format, padding=1)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_batches_around_the_lane_count(isa, dtype, format):
    """From as many images as lanes on they lie side by side; the remainder takes the other path."""
    count = lanes(dtype)
    for n in {1, count - 1, count, count + 1, 2 * count, 2 * count + 3}:
        for kernel, size, padding in (((1, 1), 3, 0), ((3, 3), 5, 1), ((1, 1), 16, 0)):
            weight, mask = case(4, 18, kernel, 0.7, format, dtype=dtype)
            x, bias = randn(n, 4, size, size, dtype=dtype), randn(18, dtype=dtype)
            check_conv2d(x, weight, mask, bias, format=format, padding=padding)
            check_conv2d(x, weight, mask, bias, format=format, padding=padding, activation="relu")


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 0.99, 1])
@pytest.mark.parametrize("format", [*FORMATS, "2:4"])
def test_sparsity(isa, format, sparsity):
    for dtype in FLOATS:
        for kernel, padding in (((1, 1), 0), ((3, 3), 1)):
            shape = (32, 16, *kernel)
            weight, mask = random_weight(shape, 1 - sparsity, format, dtype)
            x, bias = randn(2, 16, 6, 7, dtype=dtype), randn(32, dtype=dtype)
            check_conv2d(x, weight, mask, bias, format=format, padding=padding)


def test_empty_rows_columns_and_filters(isa):
    """Outputs, inputs and taps without a single weight; only the first, only the last kept."""
    weight = randn(10, 6, 3, 3)
    masks = {name: torch.ones(weight.shape, dtype=torch.bool) for name in ("o", "i", "tap", "mid")}
    masks["o"][[0, 4, 9]] = False
    masks["i"][:, [0, 5]] = False
    masks["tap"][:, :, [0, 2]] = False
    masks["mid"][1:9] = False
    for one in ((0, 0, 0, 0), (9, 5, 2, 2)):
        masks[str(one)] = torch.zeros(weight.shape, dtype=torch.bool)
        masks[str(one)][one] = True
    for mask in masks.values():
        for n in (1, lanes()):
            check_conv2d(randn(n, 6, 5, 5), weight, mask, randn(10), padding=1)


# kernel, geometry, channels, outputs, groups, height, width
GEOMETRIES = [
    ((3, 3), {"stride": 2, "padding": 1}, 6, 8, 1, 9, 10),
    ((3, 3), {"stride": (2, 1), "padding": (0, 2)}, 4, 8, 1, 7, 8),
    ((3, 3), {"stride": (1, 3), "padding": 1}, 4, 8, 1, 6, 11),
    ((2, 2), {"stride": 3}, 4, 8, 1, 8, 9),
    ((1, 1), {"stride": 2}, 8, 8, 1, 7, 8),
    ((1, 1), {"padding": 1}, 5, 8, 1, 4, 4),
    ((1, 1), {"padding": (0, 3), "stride": (3, 2)}, 5, 8, 1, 4, 5),
    ((1, 1), {"dilation": 3}, 5, 8, 1, 4, 5),
    ((3, 1), {"padding": (1, 0)}, 5, 8, 1, 6, 6),
    ((1, 7), {"padding": (0, 3)}, 5, 8, 1, 4, 9),
    ((5, 2), {"padding": (4, 1), "dilation": (2, 3)}, 3, 8, 1, 8, 9),
    ((3, 3), {"padding": "same", "dilation": 2}, 4, 8, 1, 5, 6),
    ((2, 4), {"padding": "same"}, 4, 8, 1, 5, 6),
    ((4, 2), {"padding": "same", "dilation": (1, 3)}, 4, 8, 1, 5, 6),
    ((3, 3), {"padding": "valid"}, 4, 8, 1, 5, 6),
    ((3, 3), {"padding": 5}, 3, 8, 1, 2, 3),
    ((5, 5), {"padding": 2}, 3, 8, 1, 1, 2),
    ((3, 3), {"padding": 7, "stride": 4, "dilation": 5}, 3, 8, 1, 6, 5),
    ((7, 7), {"stride": 2, "padding": 3}, 3, 16, 1, 15, 14),
    ((3, 3), {"stride": 5, "padding": 1}, 3, 8, 1, 12, 13),
    ((2, 2), {"stride": 4, "padding": 1, "dilation": 3}, 3, 8, 1, 9, 9),
    ((3, 3), {"padding": 1}, 8, 8, 2, 5, 6),
    ((3, 3), {"padding": 1, "stride": 2}, 6, 12, 3, 7, 6),
    ((1, 1), {}, 8, 16, 2, 5, 6),
    ((3, 3), {"padding": 1}, 8, 8, 8, 6, 7),
    ((3, 3), {"padding": 1, "stride": 2}, 8, 8, 8, 6, 7),
    ((5, 3), {"padding": "same"}, 4, 12, 4, 6, 7),
    ((3, 3), {"padding": 2, "dilation": 2}, 6, 6, 6, 6, 7),
]


def geometry_id(value):
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items()).replace(" ", "") or "plain"
    return str(value).replace(" ", "")


@pytest.mark.parametrize(
    ("kernel", "geometry", "c", "o", "groups", "h", "w"), GEOMETRIES, ids=geometry_id
)
def test_geometry(isa, kernel, geometry, c, o, groups, h, w):
    for dtype in FLOATS:
        for n in (2, lanes(dtype) + 1):
            weight, mask = case(c, o, kernel, 0.6, groups=groups, dtype=dtype)
            x, bias = randn(n, c, h, w, dtype=dtype), randn(o, dtype=dtype)
            check_conv2d(x, weight, mask, bias, groups=groups, **geometry)


@pytest.mark.parametrize("format", ["4x1", "8x1", "16x1"])
def test_blocks_in_groups_and_short_last_blocks(isa, format):
    rows = int(format.split("x")[0])
    for n in (1, lanes()):
        for groups in (1, 2, 3):
            weight, mask = case(6, groups * rows, (3, 3), 0.5, format, groups)
            check_conv2d(randn(n, 6, 5, 6), weight, mask, format=format, groups=groups, padding=1)
        for outputs in (1, rows - 1, rows + 1, 2 * rows + 3):
            weight, mask = case(4, outputs, (3, 3), 0.6, format)
            bias = randn(outputs)
            check_conv2d(randn(n, 4, 5, 6), weight, mask, bias, format=format, padding=1)
            whole = random_mask(weight.shape, 0.4)  # not made of blocks: explicit zeros
            check_conv2d(randn(n, 4, 5, 6), weight, whole, bias, format=format, padding=1)


def test_panels_of_several_row_tiles(isa):
    """Planes too big for the cache are done in bands of rows, the last one shorter."""
    for dtype, n in ((torch.float32, 1), (torch.float64, lanes(torch.float64))):
        weight, mask = case(96, 8, (3, 3), 0.05, dtype=dtype)
        x = randn(n, 96, 41, 61, dtype=dtype)
        for geometry in ({"padding": 1}, {"padding": 1, "stride": 2}):
            check_conv2d(x, weight, mask, **geometry)


@pytest.mark.parametrize("kernel", [(1, 1), (1, 3)])
def test_more_channels_than_fit_in_the_first_cache(isa, kernel):
    """Rows of many nonzeros are summed in blocks of columns, the sums passed on."""
    for dtype in FLOATS:
        weight, mask = case(2500, 9, kernel, 0.75, dtype=dtype)
        mask[2] = False
        for n, width in ((1, 5 * lanes(dtype) + 1), (lanes(dtype), 3)):
            x = randn(n, 2500, 1, width, dtype=dtype)
            check_conv2d(x, weight, mask, randn(9, dtype=dtype), padding=(0, kernel[1] // 2))


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "hardswish"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_epilogue(isa, activation, with_bias, with_residual):
    for dtype in FLOATS:
        for n, kernel in ((3, (1, 1)), (2, (3, 3)), (lanes(dtype) + 1, (3, 3))):
            weight, mask = case(6, 12, kernel, 0.5, dtype=dtype)
            x = randn(n, 6, 5, 7, dtype=dtype) * 2
            bias = randn(12, dtype=dtype) if with_bias else None
            residual = randn(n, 12, 5, 7, dtype=dtype, seed=3) if with_residual else None
            for format in ("csr", "4x1"):
                check_conv2d(
                    x,
                    weight,
                    mask,
                    bias,
                    residual,
                    format=format,
                    activation=activation,
                    padding=kernel[0] // 2,
                )


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
def test_fused_and_separate_activation_agree(isa, activation):
    """Without gradients the kernel applies the activation, with them torch does."""
    weight, mask = case(6, 12, (3, 3), 0.5)
    packed, x = dk.pack(weight, mask), randn(2, 6, 5, 7) * 4
    fused = dk.conv2d(x, packed, padding=1, activation=activation)
    leaf = x.clone().requires_grad_()
    separate = dk.conv2d(leaf, packed, padding=1, activation=activation)
    assert separate.grad_fn is not None and fused.grad_fn is None
    torch.testing.assert_close(
        fused, separate.detach(), rtol=4e-7, atol=0
    )  # hardswish: 4 roundings


def test_unbatched(isa):
    weight, mask = case(6, 12, (3, 3), 0.5)
    check_conv2d(randn(6, 5, 7), weight, mask, randn(12), randn(12, 5, 7), padding=1)
    check_conv2d(randn(6, 1, 7), weight[:, :, 1:2, :1], mask[:, :, 1:2, :1])


def layouts(n, c, h, w, dtype):
    """The same numbers in every layout that torch can hand over."""
    x = randn(n, c, h, w, dtype=dtype)
    padded = randn(n, c, h + 2, w + 3, dtype=dtype)
    flat = torch.empty(x.numel() + 1, dtype=dtype)
    flat[1:] = x.reshape(-1)
    single = x[:1, :1]
    yield "slice", padded[:, :, 1:-1, 2:-1]
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "transposed", randn(n, c, w, h, dtype=dtype).transpose(2, 3)
    yield "misaligned", flat[1:].view(n, c, h, w)
    yield "expanded batch", x[:1].expand(n, c, h, w)
    yield "expanded channels", x[:, :1].expand(n, c, h, w)
    yield "expanded pixel", x[:, :, :1, :1].expand(n, c, h, w)
    yield "step", randn(n, c, 2 * h, 2 * w, dtype=dtype)[:, :, ::2, ::2]
    yield "strides of size 1", single.as_strided(single.shape, (99, 77, w, 1))
    # One channel: contiguous and channels_last at once.
    yield "one channel", x[:, :1].contiguous(memory_format=torch.channels_last)
    yield "flipped", x.flip(3)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_input_layouts(isa, kernel):
    for dtype in FLOATS:
        for n in (2, lanes(dtype)):
            for name, x in layouts(n, 4, 5, 6, dtype):
                channels = x.shape[1]
                weight, mask = case(channels, 8, kernel, 0.6, dtype=dtype)
                try:
                    check_conv2d(x, weight, mask, padding=kernel[0] // 2)
                except AssertionError as error:
                    raise AssertionError(f"layout {name!r}, n = {n}: {error}") from None


def test_layouts_of_the_other_operands(isa):
    weight, mask = case(4, 8, (3, 3), 0.5)
    x = randn(2, 4, 5, 6)
    residual = randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    last = weight.contiguous(memory_format=torch.channels_last)
    check_conv2d(x, last, mask, randn(16)[::2], residual, padding=1)
    check_conv2d(x, weight, mask.transpose(2, 3), randn(1).expand(8), padding=1)
    check_conv2d(x, weight, mask, None, randn(2, 1, 5, 6).expand(2, 8, 5, 6), padding=1)


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_computed_in_float32_and_rounded_once(isa, dtype):
    for kernel, n in (((1, 1), 1), ((3, 3), 2), ((3, 3), lanes())):
        weight, mask = case(6, 12, kernel, 0.5, dtype=dtype)
        x, bias = randn(n, 6, 5, 7, dtype=dtype), randn(12, dtype=dtype)
        residual = randn(n, 12, 5, 7, dtype=dtype, seed=3)
        padding = kernel[0] // 2
        y = dk.conv2d(x, dk.pack(weight, mask), bias, padding=padding, residual=residual)
        assert y.dtype == dtype
        packed = dk.pack(weight.float(), mask)
        wide = dk.conv2d(
            x.float(), packed, bias.float(), padding=padding, residual=residual.float()
        )
        assert torch.equal(y, wide.to(dtype))
        exact = reference.conv2d(x, weight * mask, bias, padding=padding, residual=residual)
        size = reference.conv2d(
            x.abs(), (weight * mask).abs(), bias.abs(), padding=padding, residual=residual.abs()
        )
        inner = testing.forward_bound(torch.float32, testing.row_length(mask), size)
        info = torch.finfo(dtype)
        rounding = (exact.abs() + inner) * info.eps / 2 + info.smallest_normal * info.eps
        testing.assert_within(y, exact, inner + rounding)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_gradients_have_the_operands_dtypes(isa, dtype):
    weight, mask = case(6, 8, (3, 3), 0.5, dtype=dtype)
    operands = [t.requires_grad_() for t in (randn(2, 6, 5, 7, dtype=dtype), weight)]
    dk.conv2d(operands[0], dk.pack(operands[1], mask), padding=1).sum().backward()
    wide = [t.detach().float().requires_grad_() for t in operands]
    y = dk.conv2d(wide[0], dk.pack(wide[1], mask), padding=1)
    torch.autograd.backward(y, torch.ones_like(y))
    for narrow, exact in zip(operands, wide, strict=True):
        assert narrow.grad.dtype == dtype
        assert torch.equal(narrow.grad, exact.grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(isa, dtype):
    """As F.conv2d: the result has autocast's dtype, gradients those of the parameters."""
    weight, mask = case(6, 8, (3, 3), 0.5)
    weight.requires_grad_()
    x = randn(2, 6, 5, 7).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = dk.conv2d(x, dk.pack(weight, mask), randn(8), padding=1)
        mixed = dk.conv2d(x.to(dtype), dk.pack(weight, mask), randn(8), padding=1)
        dense = F.conv2d(x, weight * mask, randn(8), padding=1)
        exact = dk.conv2d(x.double(), dk.pack(weight.double(), mask), padding=1)
        assert F.conv2d(x.double(), weight.double()).dtype == exact.dtype == torch.float64
    assert y.dtype == mixed.dtype == dense.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    wide = dk.conv2d(x, dk.pack(weight, mask), randn(8), padding=1)
    assert torch.equal(y, wide.to(dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "hardswish"])
def test_nan_and_infinity_reach_exactly_the_outputs_that_use_them(isa, bad, activation):
    """A pruned weight is absent: 0 x NaN never happens. relu keeps NaN, as torch's does."""
    for kernel, geometry in (((1, 1), {}), ((3, 3), {"padding": 1}), ((3, 3), {"stride": 2})):
        for n in (1, lanes()):
            for format in ("csr", "4x1"):
                weight, mask = case(4, 8, kernel, 0.3, format)
                x = randn(n, 4, 6, 7)
                x[0, 1, 0, 0] = x[-1, 2, 3, 6] = x[-1, 0, 5, 3] = bad
                args = {**geometry, "activation": activation}
                y = dk.conv2d(x, dk.pack(weight, mask, format), **args)
                want = reference.conv2d_kept(x, weight, mask, **args)
                touched = int((~want.isfinite()).sum())
                assert touched < want.numel() and (touched or activation), "the test is void"
                size = reference.conv2d_kept(
                    x.nan_to_num(0, 0, 0).abs(), weight.abs(), mask, **geometry
                )
                bound = testing.forward_bound(torch.float32, 36, size, activation)
                testing.assert_within(y, want, bound)


def test_nan_under_the_mask_is_absent(isa):
    weight, mask = case(4, 8, (3, 3), 0.5)
    packed = dk.pack(weight.masked_fill(~mask, math.nan), mask)
    x = randn(2, 4, 5, 5)
    assert torch.equal(
        dk.conv2d(x, packed, padding=1), dk.conv2d(x, dk.pack(weight, mask), padding=1)
    )
    leaf = weight.masked_fill(~mask, math.inf).requires_grad_()
    dk.conv2d(x, dk.pack(leaf, mask), padding=1).sum().backward()
    assert bool((leaf.grad[~mask] == 0).all()) and bool(leaf.grad[mask].isfinite().all())


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(
            "one",
            marks=pytest.mark.xfail(
                strict=True,
                reason="flat tiles of conv2d_dw multiply what lies between rows by a zero gradient",
            ),
        ),
        "lanes",
    ],
)
def test_nan_in_the_input_reaches_exactly_the_weight_gradients_that_use_it(isa, images):
    weight, mask = case(3, 8, (3, 3), 0.7)
    x = randn(1 if images == "one" else lanes(), 3, 5, 6)
    x[0, 1, 2, 5] = math.nan  # right border: the left taps of no output read it
    leaf, exact = weight.clone().requires_grad_(), weight.double().requires_grad_()
    dk.conv2d(x, dk.pack(leaf, mask), padding=1).sum().backward()
    reference.conv2d_kept(x, exact, mask, padding=1).sum().backward()
    assert torch.equal(leaf.grad.isnan(), exact.grad.isnan())


@pytest.mark.parametrize(("n", "c", "o"), [(0, 4, 8), (2, 4, 0), (0, 4, 0), (2, 0, 8)])
def test_zero_sizes(isa, n, c, o):
    for kernel, padding in (((1, 1), 0), ((3, 3), 1)):
        weight = randn(o, c, *kernel).requires_grad_()
        x = randn(n, c, 5, 6).requires_grad_()
        bias = randn(o).requires_grad_()
        mask = torch.ones(weight.shape, dtype=torch.bool)
        y = dk.conv2d(x, dk.pack(weight, mask), bias, padding=padding)
        assert y.shape == (n, o, 5, 6)
        assert torch.equal(y, bias.view(1, -1, 1, 1).expand(y.shape)) or c
        y.sum().backward()
        assert torch.equal(x.grad, torch.zeros_like(x)) or (n and o)
        assert torch.equal(weight.grad, torch.zeros_like(weight)) or (n and o)
        assert torch.equal(bias.grad, torch.full((o,), float(n * 30)))


def test_reference_agrees_with_itself():
    """The dense and the kept-weights reference are independent; both must say the same."""
    for kernel, geometry, c, o, groups, h, w in GEOMETRIES:
        weight, mask = case(c, o, kernel, 0.5, groups=groups, dtype=torch.float64)
        x, bias = randn(2, c, h, w, dtype=torch.float64), randn(o, dtype=torch.float64)
        dense = reference.conv2d(x, weight * mask, bias, groups=groups, **geometry)
        kept = reference.conv2d_kept(x, weight, mask, bias, groups=groups, **geometry)
        torch.testing.assert_close(dense, kept)


def test_result_is_contiguous_and_inputs_stay_as_they_were(isa):
    weight, mask = case(4, 8, (3, 3), 0.5)
    packed = dk.pack(weight, mask)
    x = randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    before = x.detach().clone(), packed.values.clone(), packed.pattern.clone()
    y = dk.conv2d(x, packed, padding=1)
    y.sum().backward()
    assert y.is_contiguous()
    for now, then in zip((x.detach(), packed.values, packed.pattern), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("format", ["csr", "4x1"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_images_side_by_side(isa, format, activation):
    """conv2d_lanes, which compiled programs call: (N, C, H, W, lanes) in and out, padding made."""
    for dtype in FLOATS:
        for kernel, groups, dilation in (((1, 1), 1, 1), ((3, 3), 1, 1), ((3, 2), 2, 2)):
            weight, mask = case(6, 16, kernel, 0.5, format, groups, dtype)
            packed, bias = dk.pack(weight, mask, format, groups), randn(16, dtype=dtype)
            spec = dk.conv_spec(weight.shape, 1, 0, dilation, activation)
            count = lanes(dtype)
            x = randn(2, 6, 7, 9, count, dtype=dtype)
            y = torch.ops.dass.conv2d_lanes(x, packed.values, packed.pattern, bias, spec)
            images = x.permute(0, 4, 1, 2, 3).flatten(0, 1)
            args = {"dilation": dilation, "groups": groups}
            want = reference.conv2d(images, weight * mask, bias, **args, activation=activation)
            size = reference.conv2d(images.abs(), weight.abs() * mask, bias.abs(), **args)
            bound = testing.forward_bound(dtype, testing.row_length(mask), size, activation)
            testing.assert_within(y.permute(0, 4, 1, 2, 3).flatten(0, 1), want, bound)
