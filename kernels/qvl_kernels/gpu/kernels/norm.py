"""RMSNorm and LayerNorm of float32 rows, in the format of the next product's input: fp16, gathered, padded."""

import triton
import triton.language as tl

from qvl_kernels.gpu.kernels.common import LAYER_NORM, OUT_HALF, PERMUTED, store_float

CHUNK = tl.constexpr(1024)


@triton.jit
def _values(x, column, k):
    """What another program of this launch may have stored: not from the cache of this multiprocessor."""
    return tl.load(x + column, mask=column < k, other=0.0, cache_modifier=".cg")


@triton.jit
def norm_row(x, row, weight, bias, perm, out, k, padded, eps, flags):
    """One row, a chunk at a time: the registers of a program that does this at its end are those of its main loop."""
    row = row.to(tl.int64)
    x += row * k
    i = tl.arange(0, CHUNK)
    mean = 0.0
    if flags & LAYER_NORM:
        sums = tl.zeros((CHUNK,), tl.float32)
        for first in range(0, k, CHUNK):
            sums += _values(x, first + i, k)
        mean = tl.sum(sums, 0) / k
    squares = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, k, CHUNK):
        centred = tl.where(first + i < k, _values(x, first + i, k) - mean, 0.0)
        squares += centred * centred
    factor = tl.rsqrt(tl.sum(squares, 0) / k + eps)
    for first in range(0, padded, CHUNK):
        column = first + i
        source = column
        if flags & PERMUTED:
            source = tl.load(perm + column, mask=column < k, other=k)
        y = (_values(x, source, k) - mean) * factor * tl.load(weight + source, mask=source < k, other=0.0)
        if flags & LAYER_NORM:
            y += tl.load(bias + source, mask=source < k, other=0.0)
        store_float(out, row * padded, column, tl.where(column < k, y, 0.0), column < padded, (flags & OUT_HALF) != 0)


@triton.jit
def norm(x, weight, bias, perm, out, k, padded, eps, flags):
    norm_row(x, tl.program_id(0), weight, bias, perm, out, k, padded, eps, flags)
