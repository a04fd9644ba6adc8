"""8-bit activations for the matrix-matrix products: tiles of `TOKENS` rows, in the order the kernels read them.

A row is cut into spans of 32 columns (or 128, for int8 weights with groups of 128), each with a scale: ``x = s q``
with q in -127..127::

    packed  int8 [tiles, spans, span / 4, TOKENS, 4]
    scales  float32 [tiles, spans, TOKENS]
    sums    float32 [tiles, K / group, TOKENS]     minus the sum of a group's x, times `center`

`center` is the zero point of symmetric codes, or 1 where the matrix has zero points of its own. Scales of the columns
that lie in high nibbles are divided by ``2**HIGH_SHIFT``. K is rounded up to 128.

The normalization before a product and the column order of its matrix are applied on the way. Rows beyond the last hold
anything: nothing that is computed from them is stored.
"""

from __future__ import annotations

from llvmlite import ir
from numba import float32
from numba.core import types
from numba.extending import intrinsic

from qvl_kernels.cpu.quantize import normal, row_statistics
from qvl_kernels.cpu.registry import as_f32, kernel, routine, share, unpack
from qvl_kernels.cpu.simd import (
    HIGH_SHIFT,
    absolute,
    choose_gt,
    get_f32,
    get_i32,
    max_each,
    maximum,
    put_f32,
    rint,
    rows,
    spreads,
    store,
    sum_each,
    to_f32,
    zeros,
)
from qvl_kernels.cpu.simd.emit import I8, I32, join, pointer, take
from qvl_kernels.cpu.tiles import TOKENS

zero, none, no_sums = zeros("f32", 16), zeros("i32", 16, TOKENS), zeros("f32", TOKENS)
tile_rows, spread = rows("f32", 16, TOKENS), spreads("f32", 16, TOKENS)
LIMIT = float32(127)
HIGH_SCALE = float32(1 / (1 << HIGH_SHIFT))


@intrinsic
def store_steps(typing, addr, v):
    """Write 16 int8 (as i32) of each row of a tile: four steps of four columns, in each row after row."""

    def codegen(context, b, sig, args):
        four = ir.VectorType(I32, 4)
        narrow = [b.trunc(take(b, args[1], m), ir.VectorType(I8, 16)) for m in range(v.m)]
        whole = join(b, [b.bitcast(x, four) for x in narrow])
        order = [4 * m + step for step in range(4) for m in range(v.m)]
        lanes = ir.Constant(ir.VectorType(I32, len(order)), order)
        steps = b.shuffle_vector(whole, ir.Constant(whole.type, ir.Undefined), lanes)
        b.store(steps, pointer(b, args[0], whole.type), align=1)
        return context.get_dummy_value()

    return types.none(addr, v), codegen


@routine
def prepare_row(x, k, columns, weight, bias, eps, perm, target, spare):
    """Normalize (if `weight`) and permute (if `perm`) the row `x` into `target` and pad it with zeros to `columns`."""
    mean, scale = float32(0), float32(1)
    if weight != 0:
        mean, scale = row_statistics(x, k, bias != 0, eps)
    row = spare if perm != 0 else target
    for i in range(0, columns, 16):
        if i < k:
            w, b = weight + 4 * i if weight != 0 else 0, bias + 4 * i if bias != 0 else 0
            store(row + 4 * i, normal(x + 4 * i, w, b, k - i, mean, scale))
        else:
            store(row + 4 * i, zero())
    if perm != 0:
        for i in range(k):
            put_f32(target + 4 * i, get_f32(row + 4 * get_i32(perm + 4 * i)))
        for i in range(k, columns):
            put_f32(target + 4 * i, float32(0))


@routine
def quantize_span(x, row, span, target, scale_at, factor, inverses):
    """Quantize `span` columns of a tile's rows, `row` bytes apart; returns their sums."""
    largest = absolute(tile_rows(x, row))
    for i in range(16, span, 16):
        largest = maximum(largest, absolute(tile_rows(x + 4 * i, row)))
    top = max_each(largest)
    scale = top * (float32(1) / LIMIT)
    store(scale_at, scale * factor)
    store(inverses, choose_gt(top, float32(1e-30), LIMIT / top, float32(0)))
    inverse, total = spread(inverses, 4), none()
    for i in range(0, span, 16):
        q = rint(tile_rows(x + 4 * i, row) * inverse)
        total = total + q
        store_steps(target + i * TOKENS, q)
    return to_f32(sum_each(total)) * scale


@kernel
def pack_int8(args, thread, threads):
    x, total, k, weight, bias, eps, perm, bits, group, center, span, packed, scales, sums, scratch = unpack(args, 15)
    columns = (k + 127) // 128 * 128
    inverses = scratch + thread * (4 * columns * (TOKENS + 1) + 64)
    held = inverses + 64
    spare = held + 4 * columns * TOKENS
    first, last = share((total + TOKENS - 1) // TOKENS, thread, threads)
    for tile in range(first, last):
        source, row, count = x + 4 * k * TOKENS * tile, 4 * k, min(TOKENS, total - tile * TOKENS)
        if weight != 0 or perm != 0 or k < columns or count < TOKENS:
            for m in range(count):
                prepare_row(source + row * m, k, columns, weight, bias, as_f32(eps), perm, held + 4 * columns * m,
                            spare)  # fmt: skip
            source, row = held, 4 * columns
        target = packed + tile * columns * TOKENS
        scale_at = scales + 4 * tile * (columns // span) * TOKENS
        sum_at = sums + 4 * tile * (columns // group) * TOKENS
        so_far = no_sums()
        for column in range(0, columns, span):
            factor = HIGH_SCALE if bits == 4 and column % 128 >= 64 else float32(1)
            so_far = so_far + quantize_span(source + 4 * column, row, span, target, scale_at, factor, inverses)
            target += span * TOKENS
            scale_at += 4 * TOKENS
            if (column + span) % group == 0:
                store(sum_at, so_far * float32(-center))
                sum_at += 4 * TOKENS
                so_far = no_sums()
