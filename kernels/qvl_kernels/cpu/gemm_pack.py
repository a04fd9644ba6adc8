"""8-bit activations for the matrix-matrix products: tiles of `TOKENS` rows, in the order the kernels read them.

A row is cut into spans of 32 columns (or 128, for int8 weights with groups of 128), each with a scale: ``x = s q``
with q in -127..127::

    packed  int8 [tiles, spans, span / 4, TOKENS, 4]
    scales  float32 [tiles, spans, TOKENS]
    sums    float32 [tiles, K / group, TOKENS]     minus the sum of a group's x, times `center`

`center` is the zero point of symmetric codes, or 1 where the matrix has zero points of its own. Scales of the columns
that lie in high nibbles are divided by ``2**HIGH_SHIFT``. K is rounded up to 128.

The normalisation before a product and the column order of its matrix are applied on the way. Rows beyond the last are
left as they are: nothing that is computed from them is stored.
"""

from __future__ import annotations

from numba import float32

from qvl_kernels.cpu.quantize import normal, row_statistics
from qvl_kernels.cpu.registry import as_f32, kernel, routine, share, unpack
from qvl_kernels.cpu.simd import (
    HIGH_SHIFT,
    absolute,
    get_f32,
    get_i32,
    loads,
    max_all,
    maximum,
    put_f32,
    put_i32,
    rint,
    store,
    store_bytes,
    sum_all,
    zeros,
)
from qvl_kernels.cpu.tiles import TOKENS

load, zero, zero_i32 = loads("f32", 16), zeros("f32", 16), zeros("i32", 16)
LIMIT = float32(127)
HIGH_SCALE = float32(1 / (1 << HIGH_SHIFT))


@routine
def prepare_row(x, k, columns, weight, bias, eps, perm, row):
    """Normalise (if `weight`) and permute (if `perm`) the row `x` and pad it with zeros to `columns`.

    Returns where it lies: at `row`, or behind it if it was permuted (`row` has room for two).
    """
    mean, scale = float32(0), float32(1)
    if weight != 0:
        mean, scale = row_statistics(x, k, bias != 0, eps)
    for i in range(0, columns, 16):
        if i < k:
            w, b = weight + 4 * i if weight != 0 else 0, bias + 4 * i if bias != 0 else 0
            store(row + 4 * i, normal(x + 4 * i, w, b, k - i, mean, scale))
        else:
            store(row + 4 * i, zero())
    if perm == 0:
        return row
    permuted = row + 4 * columns
    for i in range(k):
        put_f32(permuted + 4 * i, get_f32(row + 4 * get_i32(perm + 4 * i)))
    for i in range(k, columns):
        put_f32(permuted + 4 * i, float32(0))
    return permuted


@routine
def put_steps(target, q, buffer):
    """16 int8 as four steps of a tile's row."""
    store_bytes(buffer, q)
    for i in range(4):
        put_i32(target + 4 * TOKENS * i, get_i32(buffer + 4 * i))


@routine
def quantize_span(row, span, target, scale_at, factor, buffer):
    """Quantise `span` columns at `row`; returns their sum."""
    largest = zero()
    for i in range(0, span, 16):
        largest = maximum(largest, absolute(load(row + 4 * i)))
    top = max_all(largest)
    scale = top * (float32(1) / LIMIT)
    inverse = LIMIT / top if top > float32(1e-30) else float32(0)
    total = zero_i32()
    for i in range(0, span, 16):
        q = rint(load(row + 4 * i) * inverse)
        total = total + q
        put_steps(target + i * TOKENS, q, buffer)
    put_f32(scale_at, scale * factor)
    return float32(sum_all(total)) * scale


@kernel
def pack_int8(args, thread, threads):
    x, rows, k, weight, bias, eps, perm, bits, group, center, span, packed, scales, sums, scratch = unpack(args, 15)
    columns = (k + 127) // 128 * 128
    buffer = scratch + thread * (8 * columns + 64)
    first, last = share((rows + TOKENS - 1) // TOKENS, thread, threads)
    for tile in range(first, last):
        for m in range(min(TOKENS, rows - tile * TOKENS)):
            row = prepare_row(x + 4 * k * (tile * TOKENS + m), k, columns, weight, bias, as_f32(eps), perm, buffer + 64)
            target = packed + tile * columns * TOKENS + 4 * m
            scale_at = scales + 4 * (tile * (columns // span) * TOKENS + m)
            sum_at = sums + 4 * (tile * (columns // group) * TOKENS + m)
            total = float32(0)
            for column in range(0, columns, span):
                factor = HIGH_SCALE if bits == 4 and column % 128 >= 64 else float32(1)
                total += quantize_span(row + 4 * column, span, target, scale_at, factor, buffer)
                target += span * TOKENS
                scale_at += 4 * TOKENS
                if (column + span) % group == 0:
                    put_f32(sum_at, total * float32(-center))
                    sum_at += 4 * TOKENS
                    total = float32(0)
