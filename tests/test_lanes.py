"""The batch-innermost layout: the way in, the convolution, the way out."""

import pytest
import torch
import torch.nn.functional as F

import dass_kernels as dk
from dass_kernels import reference, testing
from dass_kernels.testing import randn


def test_layout_there_and_back(isa):
    lanes = dk.register_lanes()
    x = randn(2 * lanes, 3, 5, 6)
    inside = dk.to_lanes(x, (1, 2))
    assert inside.shape == (2, 3, 7, 10, lanes)
    assert torch.equal(dk.from_lanes(inside), F.pad(x, (2, 2, 1, 1)))
    assert torch.equal(inside[1, 2, 3, 4], F.pad(x, (2, 2, 1, 1))[lanes:, 2, 3, 4])


def test_channels_are_not_a_page_apart(isa):
    lanes = dk.register_lanes()
    inside = dk.to_lanes(randn(lanes, 2, 14, 14), 1)  # 16 x 16 x 64 bytes with AVX-512
    assert inside.stride(1) * 4 % 4096 != 0


@pytest.mark.parametrize("width", [1, 4, 5, 7, 8, 9, 14, 17, 33])
@pytest.mark.parametrize("format", ["csr", "4x1", "16x1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conv2d_lanes_equals_conv2d(isa, width, format, dtype):
    lanes = dk.register_lanes(dtype)
    for channels, density in ((3, 0.5), (40, 0.3)):  # the second takes several column blocks
        weight = randn(32, channels, 3, 3, dtype=dtype)
        mask = testing.random_mask(weight.shape, density, format)
        packed, bias = dk.pack(weight, mask, format), randn(32, dtype=dtype)
        for height in (1, 2, 5):
            x = randn(2 * lanes, channels, height, width, dtype=dtype)
            y = dk.from_lanes(dk.conv2d_lanes(dk.to_lanes(x, 1), packed, bias, activation="relu"))
            size = reference.conv2d_kept(x.abs(), weight.abs(), mask, bias.abs(), padding=1)
            want = reference.conv2d_kept(x, weight, mask, bias, padding=1).relu()
            length = testing.row_length(mask)
            testing.assert_within(y, want, testing.forward_bound(dtype, length, size, "relu"))


def test_groups_and_dilation(isa):
    lanes = dk.register_lanes()
    weight, x = randn(8, 3, 3, 3), randn(lanes, 6, 9, 8)
    mask = torch.rand(weight.shape) < 0.5
    packed = dk.pack(weight, mask)
    y = dk.from_lanes(dk.conv2d_lanes(dk.to_lanes(x, 2), packed, dilation=2, groups=2))
    want = F.conv2d(x, weight * mask, padding=2, dilation=2, groups=2)
    torch.testing.assert_close(y, want)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="multiple of"):
        dk.to_lanes(randn(dk.register_lanes() + 1, 3, 5, 6))
    with pytest.raises(ValueError, match="packed must"):
        dk.conv2d_lanes(dk.to_lanes(randn(dk.register_lanes(), 3, 5, 6)), None)


def test_opcheck():
    packed = dk.pack(randn(4, 3, 3, 3))
    x = dk.to_lanes(randn(dk.register_lanes(), 3, 5, 6), 1)
    args = (x, packed.values, packed.pattern, None, dk.conv_spec(packed.shape, 1, 0, 1))
    torch.library.opcheck(torch.ops.dass.conv2d_lanes.default, args)
