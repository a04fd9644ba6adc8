"""RMSNorm and LayerNorm of float32 rows, in the format of the next product's input: fp16, gathered, padded."""

import triton
import triton.language as tl

from qvl_kernels.gpu.kernels.common import LAYER_NORM, OUT_HALF, PERMUTED, load_row, store_float


@triton.jit
def _scaled(values, mean, factor, weight, bias, source, k, flags):
    y = (values - mean) * factor * tl.load(weight + source, mask=source < k, other=0.0)
    if flags & LAYER_NORM:
        y += tl.load(bias + source, mask=source < k, other=0.0)
    return y


@triton.jit
def norm(x, weight, bias, perm, out, k, padded, eps, flags, CHUNK: tl.constexpr):
    """Compute one row, CHUNK columns at a time; the first chunk, often the only one, stays in registers."""
    row = tl.program_id(0).to(tl.int64)
    x += row * k
    out_half = (flags & OUT_HALF) != 0
    i = tl.arange(0, CHUNK)
    values = load_row(x, i, k)
    mean = 0.0
    if flags & LAYER_NORM:
        sums = values
        for first in range(CHUNK, k, CHUNK):
            sums += load_row(x, first + i, k)
        mean = tl.sum(sums, 0) / k
    centred = tl.where(i < k, values - mean, 0.0)
    squares = centred * centred
    for first in range(CHUNK, k, CHUNK):
        centred = tl.where(first + i < k, load_row(x, first + i, k) - mean, 0.0)
        squares += centred * centred
    factor = tl.rsqrt(tl.sum(squares, 0) / k + eps)
    done = 0
    if (flags & PERMUTED) == 0:
        y = _scaled(values, mean, factor, weight, bias, i, k, flags)
        store_float(out, row * padded, i, tl.where(i < k, y, 0.0), i < padded, out_half)
        done = CHUNK
    for first in range(done, padded, CHUNK):
        column = first + i
        source = column
        if flags & PERMUTED:
            source = tl.load(perm + column, mask=column < k, other=k)
        y = _scaled(load_row(x, source, k), mean, factor, weight, bias, source, k, flags)
        store_float(out, row * padded, column, tl.where(column < k, y, 0.0), column < padded, out_half)
