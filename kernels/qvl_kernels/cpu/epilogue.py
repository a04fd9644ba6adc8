"""What follows a product while its result is still in the cache: bias, GELU, residual, SwiGLU."""

from __future__ import annotations

from numba import float32

from qvl_kernels.cpu.registry import routine
from qvl_kernels.cpu.simd import absolute, choose_gt, exp2, fma, loads, parts, store, store_part

load, part = loads("f32", 16), parts(16)
LOG2_E = float32(1.4426950408889634)
ROOT_HALF = float32(0.7071067811865476)


@routine
def erf(x):
    """Error 1.5e-7 (Abramowitz and Stegun 7.1.26)."""
    a = absolute(x)
    t = float32(1) / fma(a, float32(0.3275911), float32(1))
    p = fma(t, float32(1.061405429), float32(-1.453152027))
    p = fma(p, t, float32(1.421413741))
    p = fma(p, t, float32(-0.284496736))
    p = fma(p, t, float32(0.254829592)) * t
    e = float32(1) - p * exp2(a * a * -LOG2_E)
    return choose_gt(x, float32(0), e, e * float32(-1))


@routine
def gelu_exact(x):
    return x * float32(0.5) * (erf(x * ROOT_HALF) + float32(1))


@routine
def silu(x):
    """``x / (1 + exp(-x))``; the exponent is kept where `exp2` is defined."""
    e = x * -LOG2_E
    e = choose_gt(e, float32(126), float32(126), e)
    return x / (exp2(e) + float32(1))


@routine
def finish(y, out, bias, gelu, residual, gated, row, column, n, width):
    """``out[row, column:column+width] = gelu?(y + bias?) + residual?``, or with `gated` ``silu(out) * (y + bias?)``.

    `y` holds `width` float32 (a multiple of 16), `out` and `residual` float32 ``[rows, n]``; absent things are 0.
    """
    for i in range(0, width, 16):
        count = n - column - i
        if count <= 0:
            return
        o = 4 * (row * n + column + i)
        v = load(y + 4 * i)
        if bias != 0:
            v = v + part(bias + 4 * (column + i), count)
        if gelu:
            v = gelu_exact(v)
        if residual != 0:
            v = v + part(residual + o, count)
        if gated:
            v = v * silu(part(out + o, count))
        if count >= 16:
            store(out + o, v)
        else:
            store_part(out + o, v, count)
