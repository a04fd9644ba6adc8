"""Packed matrix times vectors of 16-bit words, where `simd.WORDS`: int8 weights, and others by several vectors.

An activation is one word instead of two planes of bytes. It takes as many multiplications, but only one accumulator, so
that vectors can share the unpacked weights: the first four leave a block of 32 rows and 128 columns in the L1 cache, as
words, for the next ones.
"""

from __future__ import annotations

from collections.abc import Callable

from qvl_kernels.cpu.epilogue import ROW
from qvl_kernels.cpu.gemm_tile import LANES, WIDTH
from qvl_kernels.cpu.gemv_blocks import get_ahead
from qvl_kernels.cpu.registry import routine
from qvl_kernels.cpu.simd import bytes_, halves, store, zeros
from qvl_kernels.cpu.simd.assembly import STEP
from qvl_kernels.cpu.simd.assembly_few import make_add_packed, make_add_words
from qvl_kernels.cpu.tiles import FACTORS, TOKENS
from qvl_kernels.packing import SYMMETRIC_ZERO

half, byte, no_floats, no_integers = halves(LANES), bytes_(LANES, False), zeros("f32", LANES), zeros("i32", LANES)
OF_ROWS = 8 * WIDTH
"""Bytes of the factors of `WIDTH` rows in a group."""
WORDS_OF_ROWS = 64 * STEP
"""Bytes of `WIDTH` rows of a block as words."""


def _make_packed(bits: int, fields: dict[int, int], steps: int) -> Callable:
    """Create a routine for a group of packed weights by 1 to `TOKENS` vectors; see `assembly_few`."""
    one, two, three, four = (make_add_packed(bits, fields, steps, count) for count in (1, 2, 3, TOKENS))

    @routine
    def packed(count, w, x, row, xs, xs_row, sums, sums_row, factors, y, area, ahead):
        if count == TOKENS:
            four(w, x, row, xs, xs_row, sums, sums_row, factors, y, area, ahead)
            w, factors, y, area = w + STEP, factors + OF_ROWS, y + STEP, area + WORDS_OF_ROWS
            four(w, x, row, xs, xs_row, sums, sums_row, factors, y, area, ahead)
        elif count == 3:
            three(w, x, row, xs, xs_row, sums, sums_row, factors, y, area, ahead)
            w, factors, y = w + STEP, factors + OF_ROWS, y + STEP
            three(w, x, row, xs, xs_row, sums, sums_row, factors, y, area, ahead)
        elif count == 2:
            two(w, x, row, xs, xs_row, sums, sums_row, factors, y, area, ahead)
        else:
            one(w, x, row, xs, xs_row, sums, sums_row, factors, y, area, ahead)

    return packed


def make_words(bits: int, group: int) -> Callable:
    """Create a routine for a block of 32 rows; see `gemv_planes.make_planes`."""
    groups, block_bytes, symmetric = 128 // group, 512 * bits, SYMMETRIC_ZERO[bits]
    unpacked, spans = make_add_words(group // 2), groups
    if bits == 8:
        low = high = _make_packed(bits, {0: 0, 8: 1}, group // 4)
    elif group == 128:
        low = high = _make_packed(bits, {0: 0, 4: 32, 8: 1, 12: 33}, 16)
    else:  # low nibbles belong to other groups than high ones
        low, high = _make_packed(bits, {0: 0, 8: 1}, group // 4), _make_packed(bits, {4: 0, 12: 1}, group // 4)
        spans = groups // 2

    @routine
    def group_of(turn):
        """Return the group that is added next: in the order of `gemv_planes`, because the sums are rounded."""
        return turn if spans == groups else turn // 2 + turn % 2 * spans

    @routine
    def convert(scales, zeros_, to):
        """Write float32 scales and int32 zero points in the order of the turns: of `WIDTH` rows, then of the others."""
        for turn in range(groups):
            for first in range(0, 32, WIDTH):
                for i in range(first, first + WIDTH, LANES):
                    at = 32 * group_of(turn) + i
                    zero = no_integers() + symmetric
                    if zeros_ != 0:
                        zero = byte(zeros_ + at)
                    store(to + 4 * (i - first), half(scales + 2 * at))
                    store(to + 4 * (i - first + WIDTH), zero)
                to += OF_ROWS

    @routine
    def words(w, scales, zeros_, x, unused, xs, sums, blocks, rows, y):
        factors = y + ROW * rows
        area, row_bytes, sums_row = factors + FACTORS, 256 * blocks, 4 * groups * blocks
        # Measured for one vector; while several are multiplied, all of the next block arrives.
        ahead = get_ahead() if rows == 1 else block_bytes
        for i in range(0, ROW * rows, 4 * LANES):
            store(y + i, no_floats())
        for _ in range(blocks):
            convert(scales, zeros_, factors)
            row = 0
            while row < rows:
                count = min(rows - row, TOKENS)
                of_row, scale, to = x + row * row_bytes, xs + 4 * row * blocks, y + ROW * row
                for turn in range(groups):
                    g = group_of(turn)
                    v, t, factor = of_row + 2 * g * group, sums + row * sums_row + 4 * g, factors + turn * 2 * OF_ROWS
                    packed, u = w + g % spans * (block_bytes // spans), area + g * group // 2 * STEP
                    if count == TOKENS and row > 0:
                        unpacked(u, v, row_bytes, scale, 4 * blocks, t, sums_row, factor, to, 0, 0)
                        u, factor = u + WORDS_OF_ROWS, factor + OF_ROWS
                        unpacked(u, v, row_bytes, scale, 4 * blocks, t, sums_row, factor, to + STEP, 0, 0)
                    elif g < spans:
                        low(count, packed, v, row_bytes, scale, 4 * blocks, t, sums_row, factor, to, u, ahead)
                    else:
                        high(count, packed, v, row_bytes, scale, 4 * blocks, t, sums_row, factor, to, u, ahead)
                row += count
            w += block_bytes
            scales += 64 * groups
            if zeros_ != 0:
                zeros_ += 32 * groups
            x += 256
            xs += 4
            sums += 4 * groups

    return words
