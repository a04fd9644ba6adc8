"""The epilogue of a product: bias, activation, residual, SwiGLU, while the result is in the cache."""

from __future__ import annotations

from numba import float32

from qvl_kernels.cpu.quantize import take
from qvl_kernels.cpu.registry import routine
from qvl_kernels.cpu.simd import choose_gt, exp2, fma, maximum, minimum, rows, store_part, store_rows, store_streaming
from qvl_kernels.cpu.tiles import TOKENS

LOG2_E = float32(1.4426950408889634)
ROW = 128
"""Bytes of a row of results: 32 float32."""
GELU, GELU_TANH, QUICK_GELU = 1, 2, 3
"""Numbers of the activations; 0 is no activation."""
GELU_END = float32(3.6 * 2**0.5)
QUICK = float32(-1.702 * 1.4426950408889634)
LINEAR = float32(-2 * 0.7978845608028654 * 1.4426950408889634)
CUBIC = float32(-2 * 0.7978845608028654 * 1.4426950408889634 * 0.044715)


@routine
def gelu_exact(x):
    """``x (1 + erf(x / sqrt(2))) / 2``; the error of the parenthesis is 6e-7.

    Beyond `GELU_END` erf is the sign; else x times a polynomial of x squared, clamped to -1..1: a minimax fit of
    ``erf(x) / x``, weighted with x.
    """
    end = minimum(maximum(x, -GELU_END), GELU_END)
    s = fma(end * end, float32(1 / 3.6**2), float32(-1))
    p = fma(s, float32(0.000794114538), float32(-0.00204676573))
    p = fma(p, s, float32(0.00199104391))
    p = fma(p, s, float32(-0.00289427793))
    p = fma(p, s, float32(0.00712889041))
    p = fma(p, s, float32(-0.0121868867))
    p = fma(p, s, float32(0.0172527489))
    p = fma(p, s, float32(-0.0238690831))
    p = fma(p, s, float32(0.0317161005))
    p = fma(p, s, float32(-0.0402532521))
    p = fma(p, s, float32(0.0508476279))
    p = fma(p, s, float32(-0.0691156503))
    p = fma(p, s, float32(0.13884467))
    # Not an fma: far from 0 the rounded product makes the parenthesis exactly 0 or 1.
    return x * (p * end + float32(0.5))


@routine
def gate(x, power):
    """``x / (1 + 2**power)``; the exponent is clamped to the domain of `exp2`."""
    return x / (exp2(choose_gt(power, float32(126), float32(126), power)) + float32(1))


@routine
def silu(x):
    """``x * sigmoid(x)``."""
    return gate(x, x * -LOG2_E)


@routine
def quick_gelu(x):
    """``x * sigmoid(1.702 x)``."""
    return gate(x, x * QUICK)


@routine
def gelu_tanh(x):
    """``x / 2 * (1 + tanh(u))`` with ``u = sqrt(2 / pi) (x + 0.044715 x^3)``, which is ``x * sigmoid(2 u)``."""
    return gate(x, x * fma(x * x, CUBIC, LINEAR))


def _make_finish(m: int):
    """Create a routine for `m` rows at a time; more than one only with all 16 columns."""
    block = rows("f32", 16, m)

    if m == 1:

        @routine
        def get(x, row, count):
            return take(x, count)

    else:

        @routine
        def get(x, row, count):
            return block(x, row)

    @routine
    def finish(y, out, bias, activation, residual, gated, row, column, n, streaming):
        at, count = 4 * (row * n + column), n - column
        v = block(y, ROW)
        if bias != 0:
            v = v + take(bias + 4 * column, count)
        if activation == GELU:
            v = gelu_exact(v)
        elif activation == GELU_TANH:
            v = gelu_tanh(v)
        elif activation == QUICK_GELU:
            v = quick_gelu(v)
        if residual != 0:
            v = v + get(residual + at, 4 * n, count)
        if gated:
            v = v * silu(get(out + at, 4 * n, count))
        if streaming:
            store_streaming(out + at, v, 4 * n)
        elif m > 1 or count >= 16:
            store_rows(out + at, v, 4 * n)
        else:
            store_part(out + at, v, count)

    return finish


finish_tile, finish_row = _make_finish(TOKENS), _make_finish(1)


@routine
def finish_rows(y, out, bias, activation, residual, gated, row, count, line, n, streaming):
    """As `finish`, row by row, for any number of rows."""
    column = 32 * line
    for m in range(count):
        finish_row(y + ROW * m, out, bias, activation, residual, gated, row + m, column, n, streaming)
        if n - column > 16:
            finish_row(y + ROW * m + 64, out, bias, activation, residual, gated, row + m, column + 16, n, streaming)


@routine
def finish(y, out, bias, activation, residual, gated, row, count, line, n, streaming):
    """``out[row:row+count, 32*line:][:32] = activation?(y + bias?) + residual?``.

    `gated`: ``silu(out) * (y + bias?)``. `y` is float32 ``[count, 32]``, `out` and `residual` float32 ``[rows, n]``;
    absent arrays are 0. With `streaming`, results use non-temporal stores: `out` must then be aligned to a cache line,
    and n a multiple of 16.
    """
    column = 32 * line
    if count == TOKENS and n - column >= 32:
        # Not in a loop: LLVM would hoist its constants and spill all of them to the stack.
        finish_tile(y, out, bias, activation, residual, gated, row, column, n, streaming)
        finish_tile(y + 64, out, bias, activation, residual, gated, row, column + 16, n, streaming)
    else:
        finish_rows(y, out, bias, activation, residual, gated, row, count, line, n, streaming)
