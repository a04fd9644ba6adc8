"""8-bit activations for matrix-matrix products: tiles of `TOKENS` rows, in the order of access.

A row is divided into spans of 32 columns (or 128, for int8 weights with groups of 128), each with a scale: ``x = s q``
with q in -127..127, or -32767..32767::

    packed  int8 [tiles, spans, span / 4, TOKENS, 4]
            or, for int8 weights where `WORDS`, int16 [tiles, spans, span / 4, 2, TOKENS, 2]: columns
            0 and 2 of each four, then 1 and 3; or, where `MATRIX`, int8 [tiles, spans, span / 8, TOKENS, 8]
    scales  float32 [tiles, spans, TOKENS]
    sums    float32 [tiles, K / group, TOKENS]     minus the sum of a group's x, times `center`

`center` is the zero point of symmetric codes, or 1 if the matrix has zero points. Scales of the columns
that lie in high nibbles are divided by ``2**HIGH_SHIFT``. K is rounded up to 128.

The normalization before a product and the column order of its matrix are applied during packing. Rows beyond the last
are undefined: results of them are not stored.
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
    MATRIX,
    WORDS,
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
from qvl_kernels.cpu.simd.emit import I8, I16, I32, I64, join, pointer, take
from qvl_kernels.cpu.tiles import TOKENS

zero, none, no_sums = zeros("f32", 16), zeros("i32", 16, TOKENS), zeros("f32", TOKENS)
tile_rows, spread = rows("f32", 16, TOKENS), spreads("f32", 16, TOKENS)
LIMIT = float32(127)
WORD_LIMIT = float32(32767)
HIGH_SCALE = float32(1 / (1 << HIGH_SHIFT))


def _store_steps(element: ir.Type, columns: tuple[int, ...], unit: ir.Type):
    """An intrinsic that writes integers (16 as i32) of each row of a tile, every four in the order of `columns`.

    The rows take turns after each `unit`.
    """

    @intrinsic
    def f(typing, addr, v):
        def codegen(context, b, sig, args):
            order = [4 * at + column for at in range(4) for column in columns]
            within, count = ir.Constant(ir.VectorType(I32, 16), order), 16 * element.width // unit.width
            steps = []
            for m in range(v.m):
                x = take(b, args[1], m)
                x = b.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), within)
                x = b.trunc(x, ir.VectorType(element, 16))
                steps.append(b.bitcast(x, ir.VectorType(unit, count)))
            whole = join(b, steps)
            order = [count * m + at for at in range(count) for m in range(v.m)]
            lanes = ir.Constant(ir.VectorType(I32, len(order)), order)
            whole = b.shuffle_vector(whole, ir.Constant(whole.type, ir.Undefined), lanes)
            b.store(whole, pointer(b, args[0], whole.type), align=1)
            return context.get_dummy_value()

        return types.none(addr, v), codegen

    return f


store_bytes = _store_steps(I8, (0, 1, 2, 3), I64 if MATRIX else I32)
store_words = _store_steps(I16, (0, 2, 1, 3), I32)


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
def quantize_span(x, row, span, words, target, scale_at, factor, inverses):
    """Quantize `span` columns of a tile's rows, `row` bytes apart; returns their sums."""
    largest = absolute(tile_rows(x, row))
    for i in range(16, span, 16):
        largest = maximum(largest, absolute(tile_rows(x + 4 * i, row)))
    top = max_each(largest)
    limit = WORD_LIMIT if words else LIMIT
    scale = top * (float32(1) / limit)
    store(scale_at, scale * factor)
    store(inverses, choose_gt(top, float32(1e-30), limit / top, float32(0)))
    inverse, total = spread(inverses, 4), none()
    for i in range(0, span, 16):
        q = rint(tile_rows(x + 4 * i, row) * inverse)
        total = total + q
        if words:
            store_words(target + 2 * i * TOKENS, q)
        else:
            store_bytes(target + i * TOKENS, q)
    return to_f32(sum_each(total)) * scale


@kernel
def pack_int8(args, thread, threads):
    x, total, k, weight, bias, eps, perm, bits, group, center, span, packed, scales, sums, scratch = unpack(args, 15)
    columns, value = (k + 127) // 128 * 128, 2 if WORDS and bits == 8 else 1
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
        target = packed + tile * columns * TOKENS * value
        scale_at = scales + 4 * tile * (columns // span) * TOKENS
        sum_at = sums + 4 * tile * (columns // group) * TOKENS
        so_far = no_sums()
        for column in range(0, columns, span):
            factor = HIGH_SCALE if bits == 4 and column % 128 >= 64 else float32(1)
            so_far = so_far + quantize_span(source + 4 * column, row, span, value == 2, target, scale_at, factor,
                                            inverses)  # fmt: skip
            target += span * TOKENS * value
            scale_at += 4 * TOKENS
            if (column + span) % group == 0:
                store(sum_at, so_far * float32(-center))
                sum_at += 4 * TOKENS
                so_far = no_sums()
