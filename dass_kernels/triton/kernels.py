"""The Triton kernels: forward, input gradient and weight gradient over panels.

With ``e`` a column of a panel, ``(c, r, s)`` its channel and tap and ``o`` an output of the panel,

    y[o, p]  = sum over e  values[o, e] * x[c, p shifted by (r, s)]
    dx[c, q] = sum over e of c, o  values[o, e] * dy[o, q shifted back]
    dw[o, e] = sum over p  dy[o, p] * x[c, p shifted by (r, s)]

Each is a product of small dense tiles (``tl.dot``, sums in float32). Pixels are numbered over all
images. All geometry but the sizes is compiled in. ``UPCAST`` multiplies in float32: the interpreter
has no right bfloat16 product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _output_of(rows, at, v, R: tl.constexpr):
    """Outputs of a panel: R neighbours from each multiple of R, which the compiler cannot know."""
    return tl.max_contiguous(tl.multiple_of(tl.load(rows + at) + v % R, R), R)


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    # Comparisons, not maximum: NaN stays NaN.
    if ACTIVATION == 1:
        y = tl.where(y < 0, 0.0, y)
    if ACTIVATION == 2:
        y = tl.where(y < 0, 0.0, tl.where(y > 6, 6.0, y))
    if ACTIVATION == 3:
        gate = y + 3
        y = y * tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate)) / 6
    return y


@triton.jit
def _input_tile(
    x, columns, at, p, pixels, plane, width, x_h, x_w, sxn, sxc, sxh, sxw,
    TAPS: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr,
    PL: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, POINTWISE: tl.constexpr,
    BLOCKED: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows of the input that the columns of a step read, [BK, pixels]; zeros outside."""
    rk = tl.arange(0, BK)
    if BLOCKED:
        column = tl.load(columns + at)
        # x // 1 would be folded away, and the hint with it.
        begin = tl.multiple_of(column, BK) if TAPS == 1 else tl.multiple_of(column // TAPS, BK)
        channel = begin + rk
        tap = column % TAPS
        good = (p < pixels)[None, :]
    else:
        column = tl.load(columns + at + rk)
        channel = column // TAPS
        tap = column % TAPS
        good = (column >= 0)[:, None] & (p < pixels)[None, :]
    image = p // plane
    q = p - image * plane
    if POINTWISE:
        place = (channel * sxc)[:, None] + (image * sxn + q * sxw)[None, :]
    else:
        h = (q // width) * SH - PT
        w = (q % width) * SW - PL
        if BLOCKED:
            ih = (h + tap // KW * DH)[None, :]
            iw = (w + tap % KW * DW)[None, :]
        else:
            ih = h[None, :] + (tap // KW * DH)[:, None]
            iw = w[None, :] + (tap % KW * DW)[:, None]
        good = good & (ih >= 0) & (ih < x_h) & (iw >= 0) & (iw < x_w)
        place = (channel * sxc)[:, None] + (image * sxn)[None, :] + ih * sxh + iw * sxw
    return tl.load(x + place, mask=good, other=0.0)


@triton.jit
def forward(
    values, first, rows, ptr, columns, entry, x, y, bias, residual, outputs, pixels, plane, width,
    x_h, x_w, sxn, sxc, sxh, sxw, syn, syo, syp,
    R: tl.constexpr, V: tl.constexpr, TAPS: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr,
    SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    POINTWISE: tl.constexpr, BLOCKED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One panel times one run of pixels: ``y = act(W x + bias + residual)``."""
    panel = tl.program_id(1)
    p = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, V)
    rk = tl.arange(0, BK)
    start = tl.load(first + panel * (V // R) + m // R)
    output = _output_of(rows, panel * (V // R) + m // R, m, R)
    live = output < outputs
    begin = tl.load(ptr + panel)
    end = tl.load(ptr + panel + 1)
    acc = tl.zeros((V, BN), tl.float32)
    for at in tl.range(begin, end, BK, num_stages=STAGES):
        good = live[:, None]
        if BLOCKED:
            place = tl.load(entry + at + rk)
        else:
            place = at - begin + rk
            good = good & (tl.load(columns + at + rk) >= 0)[None, :]
        where = (start[:, None] + place[None, :]) * R + (m % R)[:, None]
        where = tl.max_contiguous(tl.multiple_of(where, [R, 1]), [R, 1])
        a = tl.load(values + where, mask=good, other=0.0)
        b = _input_tile(
            x, columns, at, p, pixels, plane, width, x_h, x_w, sxn, sxc, sxh, sxw,
            TAPS, KW, SH, SW, PT, PL, DH, DW, POINTWISE, BLOCKED, BK,
        )  # fmt: skip
        acc = _dot(a, b, acc, PRECISION, UPCAST)
    image = p // plane
    where = (output * syo)[:, None] + (image * syn + (p - image * plane) * syp)[None, :]
    good = live[:, None] & (p < pixels)[None, :]
    if BIAS:
        acc += tl.load(bias + output, mask=live, other=0.0).to(tl.float32)[:, None]
    if RESIDUAL:
        acc += tl.load(residual + where, mask=good, other=0.0).to(tl.float32)
    acc = _activate(acc, ACTIVATION)
    tl.store(y + where, acc.to(y.dtype.element_ty), mask=good)


@triton.jit
def input_gradient(
    values, first, rows, channels, ptr, panel_of, tap_of, entry, grad, dx, outputs, inputs, pixels,
    plane, width, g_h, g_w, sgn, sgo, sgh, sgw, sxn, sxc, sxp,
    R: tl.constexpr, V: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PT: tl.constexpr, PL: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    POINTWISE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of channels and one run of input pixels; ``plane`` and ``width`` are the input's."""
    tile = tl.program_id(1)
    p = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    v = tl.arange(0, V)
    image = p // plane
    q = p - image * plane
    acc = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(tl.load(ptr + tile), tl.load(ptr + tile + 1), num_stages=STAGES):
        at = tl.load(panel_of + step) * (V // R) + v // R
        start = tl.load(first + at)
        output = _output_of(rows, at, v, R)
        live = output < outputs
        place = tl.load(entry + step * BM + m)
        at_values = (start[None, :] + place[:, None]) * R + (v % R)[None, :]
        at_values = tl.max_contiguous(tl.multiple_of(at_values, [1, R]), [1, R])
        a = tl.load(values + at_values, mask=live[None, :] & (place >= 0)[:, None], other=0.0)
        good = p < pixels
        if POINTWISE:
            where = image * sgn + q * sgw
        else:
            tap = tl.load(tap_of + step)
            h = q // width + PT - tap // KW * DH
            w = q % width + PL - tap % KW * DW
            good = good & (h >= 0) & (w >= 0) & (h % SH == 0) & (w % SW == 0)
            good = good & (h // SH < g_h) & (w // SW < g_w)
            where = image * sgn + h // SH * sgh + w // SW * sgw
        b = tl.load(
            grad + (output * sgo)[:, None] + where[None, :],
            mask=live[:, None] & good[None, :],
            other=0.0,
        )
        acc = _dot(a, b, acc, PRECISION, UPCAST)
    channel = tl.load(channels + tile * BM + m)
    where = (channel * sxc)[:, None] + (image * sxn + q * sxp)[None, :]
    good = (channel < inputs)[:, None] & (p < pixels)[None, :]
    tl.store(dx + where, acc.to(dx.dtype.element_ty), mask=good)


@triton.jit
def weight_gradient(
    first, rows, columns, entry, owner, grad, x, dv, outputs, pixels, plane, width, x_h, x_w,
    sgn, sgo, sgp, sxn, sxc, sxh, sxw,
    R: tl.constexpr, V: tl.constexpr, TAPS: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr,
    SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    POINTWISE: tl.constexpr, BLOCKED: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One step of a panel over all pixels, in order: the sum does not depend on the schedule."""
    step = tl.program_id(0)
    m = tl.arange(0, V)
    rk = tl.arange(0, BK)
    at = tl.load(owner + step) * (V // R) + m // R
    start = tl.load(first + at)
    output = _output_of(rows, at, m, R)
    live = output < outputs
    acc = tl.zeros((V, BK), tl.float32)
    for begin in tl.range(0, pixels, BP, num_stages=STAGES):
        p = begin + tl.arange(0, BP)
        image = p // plane
        where = (output * sgo)[:, None] + (image * sgn + (p - image * plane) * sgp)[None, :]
        a = tl.load(grad + where, mask=live[:, None] & (p < pixels)[None, :], other=0.0)
        b = _input_tile(
            x, columns, step * BK, p, pixels, plane, width, x_h, x_w, sxn, sxc, sxh, sxw,
            TAPS, KW, SH, SW, PT, PL, DH, DW, POINTWISE, BLOCKED, BK,
        )  # fmt: skip
        acc = _dot(a, tl.trans(b), acc, PRECISION, UPCAST)
    place = tl.load(entry + step * BK + rk)
    kept = tl.load(columns + step * BK + rk) >= 0
    where = (start[:, None] + place[None, :]) * R + (m % R)[:, None]
    where = tl.max_contiguous(tl.multiple_of(where, [R, 1]), [R, 1])
    tl.store(dv + where, acc.to(dv.dtype.element_ty), mask=live[:, None] & kept[None, :])
