"""Packed matrix times vectors of 16-bit words, where `simd.WORDS`: int8 weights, and others by several vectors.

An activation is one word instead of two planes of bytes. It takes as many multiplications, but only one accumulator, so
that vectors can share the unpacked weights.
"""

from __future__ import annotations

from collections.abc import Callable

from qvl_kernels.cpu.gemv_blocks import make_prefetch, make_run, make_scaled, make_tile
from qvl_kernels.cpu.registry import routine
from qvl_kernels.cpu.simd import loads, step_end, zeros
from qvl_kernels.cpu.simd.pairs import bytes_of_pairs, dot_pairs_narrow, nibbles_of_pairs


def make_bytes(group: int) -> Callable:
    """Create a routine for a block of 32 rows of int8 weights by a vector; see `gemv_blocks.make_tile`."""
    weights, none, prefetch, scaled = loads("i8", 128), zeros("i32", 32), make_prefetch(32), make_scaled(8, 32, 1)
    groups, steps = 128 // group, group // 4

    @routine
    def byte_sums(w, x):
        """Return sums over `steps` steps: 128 products of 255 and 32512 fit an accumulator."""
        total = none()
        for _ in range(steps):
            prefetch(w)
            v = weights(w)
            total = dot_pairs_narrow(total, bytes_of_pairs(v, 0), x, 0)
            total = dot_pairs_narrow(total, bytes_of_pairs(v, 1), x + 4, 0)
            w += 128
            x += 8
        return total

    @routine
    def add_block(w, scales, zeros_, x, unused, xs, sums, blocks, acc):
        for part in range(groups):
            z = zeros_ + part * 32 if zeros_ != 0 else 0
            total = byte_sums(w + part * steps * 128, x + part * steps * 8)
            acc = scaled(total, acc, scales + part * 64, z, xs, 0, sums + part * 4, 0)
        return acc

    return make_tile(add_block, 8, group, 32, 1, 2)


def make_nibbles(bits: int, group: int, tokens: int) -> Callable:
    """Create a routine for a block of 32 rows of int3 or int4 by `tokens` vectors; see `gemv_blocks.make_tile`."""
    width = 32 if tokens <= 2 else 16
    none, scaled = zeros("i32", width, tokens), make_scaled(bits, width, tokens)
    nibbles, groups, steps = nibbles_of_pairs(bits), 128 // group, min(group, 64) // 4

    def make_sums(low: bool, high: bool) -> Callable:
        """Create a routine that returns sums of these nibbles over `steps` steps."""

        @routine
        def step(total, v, x, unused, stride):
            if low:
                total = dot_pairs_narrow(total, nibbles(v, 0), x, stride)
                total = dot_pairs_narrow(total, nibbles(v, 2), x + 4, stride)
            if high:  # 64 columns behind
                total = dot_pairs_narrow(total, nibbles(v, 1), x + 128, stride)
                total = dot_pairs_narrow(total, nibbles(v, 3), x + 132, stride)
            step_end()
            return total

        run = make_run(step, bits, width, 2)

        @routine
        def sums_of_steps(w, x, stride):
            return run(none(), w, x, 0, stride, steps)

        return sums_of_steps

    if group == 128:
        all_sums = make_sums(True, True)

        @routine
        def add_block(w, scales, zeros_, x, unused, xs, sums, blocks, acc):
            total = all_sums(w, x, blocks * 256)
            return scaled(total, acc, scales, zeros_, xs, blocks * 4, sums, blocks * 4)

    else:
        low_sums, high_sums = make_sums(True, False), make_sums(False, True)

        @routine
        def add_block(w, scales, zeros_, x, unused, xs, sums, blocks, acc):
            # groups of low and of high nibbles in turns, as in `gemv_planes`: the results are the same
            for span in range(groups // 2):
                offset, z = span * steps, zeros_ + span * 32 if zeros_ != 0 else 0
                s, t = scales + span * 64, sums + span * 4
                total = low_sums(w + offset * 32 * bits, x + offset * 8, blocks * 256)
                acc = scaled(total, acc, s, z, xs, blocks * 4, t, blocks * groups * 4)
                z = z + 16 * groups if z != 0 else 0
                total = high_sums(w + offset * 32 * bits, x + offset * 8, blocks * 256)
                acc = scaled(total, acc, s + 32 * groups, z, xs, blocks * 4, t + 2 * groups, blocks * groups * 4)
            return acc

    return make_tile(add_block, bits, group, width, tokens, 2)
