"""A strided convolution reads its input apart by phases: which of them, and of which channels."""

from __future__ import annotations

import numpy as np

from dass.engine import graph as g

# Of fewer planes than this the layers that read one picture have their own; else they share all.
MOST_PLANES = 0.75


def phases_read(
    node: g.Conv, channels: int, dy: np.ndarray, dx: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The planes that hold pixel (sh y + a, sw x + b) of a channel at (y, x), one for each phase.

    Args:
        channels: of the input. dy, dx: rows and columns of the taps, from the window's corner.

    Returns:
        int32 channel and phase, a * sw + b, of each plane that some weight reads, or of all if that
        is nearly all of them; and the plane that each weight reads, [channels, kh, kw].
    """
    sh, sw = node.stride
    phase = (dy % sh)[:, None] * sw + dx % sw
    kept = np.zeros((channels, sh * sw), bool)
    np.logical_or.at(kept, (np.arange(channels)[:, None, None], phase), _read(node, channels))
    whole = np.zeros(sh * sw, bool)
    whole[phase] = True
    if kept.sum() > MOST_PLANES * channels * whole.sum():
        kept[:] = whole
    kept[0, phase.flat[0]] |= not kept.any()  # a layer without weights
    number = np.cumsum(kept.ravel()).reshape(kept.shape) - 1
    channel, which = (each.astype(np.int32) for each in np.nonzero(kept))
    return channel, which, number[np.arange(channels)[:, None, None], phase]


def _read(node: g.Conv, channels: int) -> np.ndarray:
    """Whether some weight reads a channel at a tap, [channels, kh, kw]."""
    used = (node.weight != 0).numpy()
    used = used.reshape(node.groups, -1, *used.shape[1:]).any(1)
    return used.reshape(channels, *used.shape[2:])
