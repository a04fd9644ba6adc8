"""Packed matrix times vectors whose activations are two planes of bytes.

int3 weights become the nibbles of int4 in registers.
"""

from __future__ import annotations

from collections.abc import Callable

from qvl_kernels.cpu.gemv_blocks import make_fetch, make_prefetch, make_run, make_scaled, make_tile
from qvl_kernels.cpu.registry import routine
from qvl_kernels.cpu.simd import (
    HIGH_SHIFT,
    LANES,
    SUM_EL,
    SUM_PER_LANE,
    SUM_STEPS,
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

TOKENS = 2 if LANES == 16 else 1
"""Vectors per tile: all accumulators fit the registers. Reading the rows of a block in memory order matters more than
sharing the unpacking among more vectors."""
WIDTH = 32 if LANES == 16 else 16


@routine
def join(upper, lower):
    """Combine the sums of the two planes."""
    return shl(upper, 8) + lower


def make_planes(bits: int, group: int, tokens: int) -> Callable:
    """Create a routine for a block of 32 rows by `tokens` vectors; see `gemv_blocks.make_tile`."""
    merged = bits < 8 and group == 128 and SUM_EL == "i16"
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

    @routine
    def merged_step(upper, lower, w, v, xh, xl, stride):
        prefetch(w)
        a = low(v)
        upper, lower = dot(upper, a, xh, stride), dot(lower, a, xl, stride)
        c = high(v)
        upper, lower = dot(upper, c, xh + 64, stride), dot(lower, c, xl + 64, stride)
        step_end()
        return upper, lower

    fetch, run = make_fetch(bits, WIDTH), make_run(step, bits, WIDTH, 1)

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
    def merged_sums(w, xh, xl, stride):
        """Return sums of low and high nibbles over 16 steps: four of both fit an accumulator."""
        total = none_i32()
        for _ in range(4):
            upper, lower = merged_step(none(), none(), w, fetch(w, 0), xh, xl, stride)
            upper, lower = merged_step(upper, lower, w + 128, fetch(w, 1), xh + 4, xl + 4, stride)
            upper, lower = merged_step(upper, lower, w + 256, fetch(w, 2), xh + 8, xl + 8, stride)
            upper, lower = merged_step(upper, lower, w + 384, fetch(w, 3), xh + 12, xl + 12, stride)
            total = total + join(widen(upper), widen(lower))
            w += 128 * bits
            xh += 16
            xl += 16
        return total

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

    if merged:

        @routine
        def add_block(w, scales, zeros_, xh, xl, xs, sums, blocks, acc):
            total = merged_sums(w, xh, xl, blocks * 128)
            return scaled(total, acc, scales, zeros_, xs, blocks * 4, sums, blocks * 4)

    elif bits < 8:

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

    return make_tile(add_block, bits, group, WIDTH, tokens, 1)
