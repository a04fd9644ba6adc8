"""What the products of a few vectors in planes of bytes share: the walk through a block of 32 rows.

Integer sums are exact, and the scaled sums of the groups are added in a fixed order, so a vector's result does not
depend on the number of vectors. It is that of `gemv_words`.
"""

from __future__ import annotations

from collections.abc import Callable

from qvl_kernels.cpu.registry import routine, variable
from qvl_kernels.cpu.simd import (
    BYTE_BIAS,
    LANES,
    bytes_,
    fma,
    halves,
    loads,
    prefetch_read,
    spreads,
    steps_of_int3,
    store_rows,
    to_f32,
    zeros,
)
from qvl_kernels.packing import SYMMETRIC_ZERO

get_ahead, set_ahead = variable("ahead")
"""Bytes of weights between a step and what it prefetches; 0: nothing else (`choices`)."""


def make_prefetch(width: int) -> Callable:
    """Create a routine that prefetches what a later step of `width` rows reads."""

    @routine
    def prefetch(w):
        """One step at a time: many at once would wait for each other.

        A branch takes 2% of the time where a step has 64 bytes.
        """
        ahead = get_ahead()
        if LANES < 16 or ahead != 0:
            for line in range(0, 4 * width, 64):
                prefetch_read(w + ahead + line)

    return prefetch


def make_fetch(bits: int, width: int) -> Callable:
    """Create a routine that returns step `i`, a literal, of four steps at w: four lines of int4, or three of int3."""
    if bits == 3:
        return steps_of_int3(4 * width)
    weights = loads("i8", 4 * width)

    @routine
    def fetch(w, i):
        return weights(w + 128 * i)

    return fetch


def make_run(step: Callable, bits: int, width: int) -> Callable:
    """Create a routine for `count` steps of int3 (a multiple of four) or int4.

    ``step(so_far, v, x, low, stride)`` returns its sums `so_far` with those of the nibbles v of `width` rows.
    The count is an argument: LLVM would unroll a loop of few calls.
    """
    fetch, prefetch = make_fetch(bits, width), make_prefetch(width)

    if bits == 3:

        @routine
        def run(so_far, w, x, low, stride, count):
            for _ in range(count // 4):
                prefetch(w)
                so_far = step(so_far, fetch(w, 0), x, low, stride)
                prefetch(w + 128)
                so_far = step(so_far, fetch(w, 1), x + 4, low + 4, stride)
                prefetch(w + 256)
                so_far = step(so_far, fetch(w, 2), x + 8, low + 8, stride)
                so_far = step(so_far, fetch(w, 3), x + 12, low + 12, stride)
                w += 384
                x += 16
                low += 16
            return so_far

    else:

        @routine
        def run(so_far, w, x, low, stride, count):
            for _ in range(count):
                prefetch(w)
                so_far = step(so_far, fetch(w, 0), x, low, stride)
                w += 128
                x += 4
                low += 4
            return so_far

    return run


def make_scaled(bits: int, width: int, tokens: int) -> Callable:
    """Create a routine that adds a group's sums: ``acc + scale * x_scale * (total - zero * sum)``."""
    scalars, integers = spreads("f32", width, tokens), spreads("i32", width, tokens)
    half, byte = halves(width), bytes_(width, False)
    bias = BYTE_BIAS if bits == 8 else 0
    symmetric = SYMMETRIC_ZERO[bits] - bias

    @routine
    def scaled(total, acc, scales, zero, xs, xs_stride, sums, sums_stride):
        s = integers(sums, sums_stride)
        if zero == 0:
            total = total - s * symmetric
        else:
            total = total - s * (byte(zero) - bias)
        return fma(to_f32(total), scalars(xs, xs_stride) * half(scales), acc)

    return scaled


def make_tile(add_block: Callable, bits: int, group: int, width: int, tokens: int) -> Callable:
    """Create a routine for a block of 32 rows by `tokens` vectors: y float32 ``[tokens, 32]``.

    The rows are one tile if its accumulators fit the registers. Else two tiles of `width` rows take turns, 2 or 4 KB of
    weights each: one by itself would read every other cache line.
    """
    none, groups, block_bytes = zeros("f32", width, tokens), 128 // group, 512 * bits

    @routine
    def tile(w, scales, zeros_, x, low, xs, sums, blocks, y):
        first, second = none(), none()
        for _ in range(blocks):
            first = add_block(w, scales, zeros_, x, low, xs, sums, blocks, first)
            if width == 16:
                z = zeros_ + 16 if zeros_ != 0 else 0
                second = add_block(w + 64, scales + 32, z, x, low, xs, sums, blocks, second)
            w += block_bytes
            x += 128
            low += 128
            xs += 4
            scales += 64 * groups
            if zeros_ != 0:
                zeros_ += 32 * groups
            sums += 4 * groups
        store_rows(y, first, 128)
        if width == 16:
            store_rows(y + 64, second, 128)

    return tile
