"""fp16 weights ``[N, K]`` times float32 activations, in float32.

A lane always sums every 16th column from left to right, so that a vector's result does not depend on the number of
vectors.
"""

from __future__ import annotations

from qvl_kernels.cpu.atomics import claim
from qvl_kernels.cpu.epilogue import finish
from qvl_kernels.cpu.gemv import STEP_BYTES
from qvl_kernels.cpu.registry import kernel, routine, unpack
from qvl_kernels.cpu.simd import (
    LANES,
    fma,
    get_f16,
    get_f32,
    loads,
    piece,
    prefetch_read,
    put_f32,
    rows,
    store,
    sum_all,
    zeros,
)
from qvl_kernels.cpu.tiles import FEW_BYTES

AHEAD = 2048
"""Bytes of a row of weights between what is multiplied and what is prefetched, with registers of less than 512 bits."""
ONE_STREAM = 4096
"""Columns of activations that fit the L1 cache. With more columns, eight rows share each load of activations; with
fewer, sequential rows are faster."""


@routine
def rest(w, x, count, total):
    """Add the columns after the last whole vector to `total`."""
    for i in range(count):
        total += get_f16(w + 2 * i) * get_f32(x + 4 * i)
    return total


def _make_tile(lines: int, tokens: int):
    """Create a routine for `lines` (1 or 4) rows by `tokens` (1 or 4) vectors."""
    load_w, load_x, none = rows("f16", 16, lines), rows("f32", 16, tokens), zeros("f32", 16, tokens)

    if tokens == 1:

        @routine
        def reduce(a, w, x, count, k, y):
            put_f32(y, rest(w, x, count, sum_all(a)))

    else:

        @routine
        def reduce(a, w, x, count, k, y):
            put_f32(y, rest(w, x, count, sum_all(piece(a, 0))))
            put_f32(y + 128, rest(w, x + 4 * k, count, sum_all(piece(a, 1))))
            put_f32(y + 256, rest(w, x + 8 * k, count, sum_all(piece(a, 2))))
            put_f32(y + 384, rest(w, x + 12 * k, count, sum_all(piece(a, 3))))

    if lines == 1:

        @routine
        def tile(w, x, k, y):
            a, whole = none(), k // 16 * 16
            for i in range(0, whole, 16):
                if tokens == 1 and LANES < 16:
                    prefetch_read(w + 2 * i + AHEAD)
                a = fma(load_x(x + 4 * i, 4 * k), load_w(w + 2 * i, 0), a)
            reduce(a, w + 2 * whole, x + 4 * whole, k - whole, k, y)

    else:

        @routine
        def tile(w, x, k, y):
            a0, a1, a2, a3, whole = none(), none(), none(), none(), k // 16 * 16
            for i in range(0, whole, 16):
                v, u = load_w(w + 2 * i, 2 * k), load_x(x + 4 * i, 4 * k)
                a0 = fma(u, piece(v, 0), a0)
                a1 = fma(u, piece(v, 1), a1)
                a2 = fma(u, piece(v, 2), a2)
                a3 = fma(u, piece(v, 3), a3)
            w, x, count = w + 2 * whole, x + 4 * whole, k - whole
            reduce(a0, w, x, count, k, y)
            reduce(a1, w + 2 * k, x, count, k, y + 4)
            reduce(a2, w + 4 * k, x, count, k, y + 8)
            reduce(a3, w + 6 * k, x, count, k, y + 12)

    return tile


tile_1x1, tile_1x4, tile_4x4 = _make_tile(1, 1), _make_tile(1, 4), _make_tile(4, 4)


eight, load, none_of_eight = rows("f16", 16, 8), loads("f32", 16), zeros("f32", 16, 8)


@routine
def tile_8x1(w, x, k, y, scratch):
    """Multiply eight rows by one vector; `scratch`: 512 bytes."""
    a, whole = none_of_eight(), k // 16 * 16
    for i in range(0, whole, 16):
        a = fma(load(x + 4 * i), eight(w + 2 * i, 2 * k), a)
    store(scratch, a)
    for i in range(8):
        total = sum_all(load(scratch + 64 * i))
        put_f32(y + 4 * i, rest(w + 2 * (i * k + whole), x + 4 * whole, k - whole, total))


@routine
def multiply(w, x, k, lines, tokens, y):
    """Multiply `lines` rows of weights by 1 or 4 vectors: y float32 ``[tokens, 32]``, followed by scratch memory."""
    line = 0
    while line < lines:
        by = y + 4 * line
        if tokens == 1 and k > ONE_STREAM and lines - line >= 8:
            tile_8x1(w, x, k, by, y + 512)
            line += 7
            w += 14 * k
        elif tokens == 1:
            tile_1x1(w, x, k, by)
        elif lines - line >= 4:
            tile_4x4(w, x, k, by)
            line += 3
            w += 6 * k
        else:
            tile_1x4(w, x, k, by)
        line += 1
        w += 2 * k


@kernel
def gemv16(args, thread, threads):
    """Multiply 32 rows at a time, as the packed `gemv` kernels."""
    counters, w, n, k, x, rows, out, bias, activation, residual, gated, scratch = unpack(args, 12)
    y = scratch + thread * FEW_BYTES
    lines, step = (n + 31) // 32, max(1, STEP_BYTES // (64 * k * rows))
    for turn in range(threads):
        owner = (thread + turn) % threads
        first, last = claim(counters, owner, threads, lines, step)
        while first < last:
            for line in range(first, last):
                row = 0
                while row < rows:
                    count = 4 if rows - row >= 4 else 1
                    multiply(w + 64 * line * k, x + 4 * row * k, k, min(32, n - 32 * line), count, y)
                    finish(y, out, bias, activation, residual, gated, row, count, line, n, 0)
                    row += count
            first, last = claim(counters, owner, threads, lines, step)
