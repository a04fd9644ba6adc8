"""What follows a product while its result is still in the cache: bias, GELU, residual, SwiGLU."""

from __future__ import annotations

from numba import float32

from qvl_kernels.cpu.registry import routine
from qvl_kernels.cpu.simd import choose_gt, exp2, fma, loads, maximum, minimum, parts, store, store_part

load, part = loads("f32", 16), parts(16)
LOG2_E = float32(1.4426950408889634)
ROOT_HALF = float32(0.7071067811865476)
ERF_END = float32(3.6)


@routine
def erf(x):
    """Error 6e-7: beyond `ERF_END` it is the sign, before it x times a polynomial of x squared, brought to -1..1.

    The polynomial is a minimax fit of ``erf(x) / x``, weighted with x.
    """
    x = minimum(maximum(x, -ERF_END), ERF_END)
    s = fma(x * x, float32(2 / 3.6**2), float32(-1))
    p = fma(s, float32(0.0022460951), float32(-0.0057891277))
    p = fma(p, s, float32(0.0056315226))
    p = fma(p, s, float32(-0.0081862542))
    p = fma(p, s, float32(0.020163547))
    p = fma(p, s, float32(-0.034469721))
    p = fma(p, s, float32(0.048798143))
    p = fma(p, s, float32(-0.067511962))
    p = fma(p, s, float32(0.089706679))
    p = fma(p, s, float32(-0.11385339))
    p = fma(p, s, float32(0.14381881))
    p = fma(p, s, float32(-0.19548858))
    p = fma(p, s, float32(0.39271203))
    return p * x


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
