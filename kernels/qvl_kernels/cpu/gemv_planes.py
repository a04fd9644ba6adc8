"""Packed matrix times vectors whose activations are two planes of bytes.

int3 weights become the nibbles of int4 in registers.
"""

from __future__ import annotations

from collections.abc import Callable

from qvl_kernels.cpu.epilogue import ROW
from qvl_kernels.cpu.gemv_blocks import get_ahead, make_prefetch, make_run, make_scaled, make_tile
from qvl_kernels.cpu.registry import routine
from qvl_kernels.cpu.simd import (
    HIGH_SHIFT,
    LANES,
    SUM_EL,
    SUM_PER_LANE,
    SUM_STEPS,
    WORDS,
    dot,
    dot_bytes,
    highs,
    loads,
    masks,
    sar,
    shl,
    step_end,
    widen,
    zeros,
)
from qvl_kernels.cpu.simd.assembly_few import make_plane_sums

TOKENS = 2 if LANES == 16 else 1
"""Vectors per tile: all accumulators fit the registers. Reading the rows of a block in memory order matters more than
sharing the unpacking among more vectors."""
WIDTH = 32 if LANES == 16 else 16


@routine
def join(upper, lower):
    """Combine the sums of the two planes."""
    return shl(upper, 8) + lower


def _make_assembled(bits: int) -> Callable:
    """Create a routine for a block of 32 rows of int3 or int4 in groups of 128 by a vector."""
    scaled, plane_sums = make_scaled(bits, 32, 1), make_plane_sums(bits)

    @routine
    def add_block(w, scales, zeros_, xh, xl, xs, sums, blocks, acc):
        return scaled(plane_sums(w, xh, xl, get_ahead()), acc, scales, zeros_, xs, 0, sums, 0)

    return make_tile(add_block, bits, 128, 32, 1)


def make_planes(bits: int, group: int) -> Callable:
    """Create a routine for a block of 32 rows by any number of vectors: y float32 ``[rows, 32]``."""
    one, many, groups = _make_tile(bits, group, 1), _make_tile(bits, group, TOKENS), 128 // group

    @routine
    def planes(w, scales, zeros_, xh, xl, xs, sums, blocks, rows, y):
        row = 0
        while row < rows:
            o = row * blocks
            high, low, of_rows, of_groups = xh + 128 * o, xl + 128 * o, xs + 4 * o, sums + 4 * groups * o
            to = y + ROW * row
            if TOKENS > 1 and rows - row >= TOKENS:
                many(w, scales, zeros_, high, low, of_rows, of_groups, blocks, to)
                row += TOKENS
            else:
                one(w, scales, zeros_, high, low, of_rows, of_groups, blocks, to)
                row += 1

    return planes


def _make_tile(bits: int, group: int, tokens: int) -> Callable:
    """Create a routine for a block of 32 rows by `tokens` vectors; see `gemv_blocks.make_tile`."""
    if WORDS and bits < 8 and group == 128:
        assert tokens == 1
        return _make_assembled(bits)
    weights, prefetch, scaled = loads("i8", 4 * WIDTH), make_prefetch(WIDTH), make_scaled(bits, WIDTH, tokens)
    none, none_i32 = zeros(SUM_EL, WIDTH * SUM_PER_LANE, tokens), zeros("i32", WIDTH, tokens)
    low, high, groups = masks((1 << bits) - 1), highs(bits), 128 // group
    spans = 2 if bits < 8 and group == 32 else 1  # runs of steps between two scalings
    steps = (16 if bits < 8 else 32 // groups) // spans
    rounds = max(1, steps // SUM_STEPS)
    chunk = steps // rounds

    @routine
    def step(so_far, v, xh, xl, stride):
        lh, ll, hh, hl = so_far
        a = low(v)
        lh = dot(lh, a, xh, stride)
        ll = dot(ll, a, xl, stride)
        c = high(v)
        hh = dot(hh, c, xh + 64, stride)
        hl = dot(hl, c, xl + 64, stride)
        step_end()
        return lh, ll, hh, hl

    run = make_run(step, bits, WIDTH)

    @routine
    def nibble_sums(w, xh, xl, stride):
        """Return sums of low and of high nibbles over `steps` steps."""
        lows, highs = none_i32(), none_i32()
        for _ in range(rounds):
            lh, ll, hh, hl = run((none(), none(), none(), none()), w, xh, xl, stride, chunk)
            lows = lows + join(widen(lh), widen(ll))
            highs = highs + sar(join(widen(hh), widen(hl)), HIGH_SHIFT)
            w += 32 * bits * chunk
            xh += 4 * chunk
            xl += 4 * chunk
        return lows, highs

    @routine
    def byte_sums(w, xh, xl, stride):
        sh, sl = none_i32(), none_i32()
        for _ in range(steps):
            prefetch(w)
            v = weights(w)
            sh = dot_bytes(sh, v, xh, stride)
            sl = dot_bytes(sl, v, xl, stride)
            w += 128
            xh += 4
            xl += 4
        return join(sh, sl)

    if bits < 8:

        @routine
        def add_block(w, scales, zeros_, xh, xl, xs, sums, blocks, acc):
            stride = blocks * 128
            for span in range(spans):
                offset = span * steps * 4
                lows, highs = nibble_sums(w + offset * 8 * bits, xh + offset, xl + offset, stride)
                z = zeros_ + span * 32 if zeros_ != 0 else 0
                s, t = scales + span * 64, sums + span * 4
                if group == 128:
                    acc = scaled(lows + highs, acc, s, z, xs, blocks * 4, t, stride * 4 // group)
                else:
                    acc = scaled(lows, acc, s, z, xs, blocks * 4, t, stride * 4 // group)
                    z = z + 16 * groups if z != 0 else 0
                    acc = scaled(highs, acc, s + 32 * groups, z, xs, blocks * 4, t + 2 * groups, stride * 4 // group)
            return acc

    else:

        @routine
        def add_block(w, scales, zeros_, xh, xl, xs, sums, blocks, acc):
            stride = blocks * 128
            for part in range(groups):
                z = zeros_ + part * 32 if zeros_ != 0 else 0
                offset = part * steps * 4
                total = byte_sums(w + offset * 32, xh + offset, xl + offset, stride)
                acc = scaled(total, acc, scales + part * 64, z, xs, blocks * 4, sums + part * 4, stride * 4 // group)
            return acc

    return make_tile(add_block, bits, group, WIDTH, tokens)
