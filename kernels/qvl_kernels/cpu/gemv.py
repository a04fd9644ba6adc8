"""Packed matrix times vectors: int4 and int8 weights, 16-bit activations in two planes (or words, see `quantize`).

One pass over the weights serves all vectors: a block of 32 rows (about 70 KB) stays in the cache while the vectors are
processed `TOKENS` at a time. Integer sums are exact, and the scaled sums of the groups are added from left to right, so
a vector's result does not depend on the number of vectors.
"""

from __future__ import annotations

from qvl_kernels.cpu.atomics import claim
from qvl_kernels.cpu.epilogue import finish_rows
from qvl_kernels.cpu.gemm_tile import prefetch_read
from qvl_kernels.cpu.registry import kernel, routine, unpack
from qvl_kernels.cpu.simd import (
    BYTE_BIAS,
    HIGH_SHIFT,
    LANES,
    SUM_EL,
    SUM_PER_LANE,
    SUM_STEPS,
    WORDS,
    bytes_,
    dot,
    dot_bytes,
    fma,
    halves,
    high,
    loads,
    low,
    sar,
    shl,
    spreads,
    step_end,
    store_rows,
    to_f32,
    widen,
    zeros,
)
from qvl_kernels.cpu.simd.pairs import bytes_of_pairs, dot_pairs_narrow

TOKENS = 2 if LANES == 16 else 1
"""Vectors per tile: all accumulators fit the registers. Reading the rows of a block in memory order matters more than
sharing the unpacking among more vectors."""
AHEAD = 2048
"""Bytes of weights between a tile and what is prefetched, without 32 registers: chosen on Zen 3."""
STEP_BYTES = 256 << 10
"""Bytes of weights that a thread takes at a time for one vector: about 10 microseconds."""


def _make_tile(bits: int, group: int, tokens: int):
    """Create a routine for a block of 32 rows by `tokens` vectors: y float32 ``[tokens, 32]``.

    The rows are one tile if its accumulators fit the registers. Else two tiles take turns, 2 or 4 KB of weights each:
    one by itself would read every other cache line.
    """
    merged = bits == 4 and group == 128 and WORDS
    width = 32 if LANES == 16 or (bits == 8 and WORDS) else 16
    weights = loads("i8", 4 * width)
    none, none_i32, none_f32 = (
        zeros(SUM_EL, width * SUM_PER_LANE, tokens),
        zeros("i32", width, tokens),
        zeros("f32", width, tokens),
    )
    scalars, integers = spreads("f32", width, tokens), spreads("i32", width, tokens)
    half, byte = halves(width), bytes_(width, False)
    groups, block_bytes = 128 // group, 512 * bits
    spans = 2 if bits == 4 and group == 32 else 1  # runs of steps between two scalings
    steps = (16 if bits == 4 else 32 // groups) // spans
    rounds = max(1, steps // SUM_STEPS)
    chunk = steps // rounds
    symmetric = 8 if bits == 4 else 128
    value = 2 if bits == 8 and WORDS else 1  # bytes of an activation at `xh`

    @routine
    def prefetch(w):
        """Prefetch what a later step reads. One step at a time: many at once would wait for each other."""
        if LANES < 16:
            for line in range(0, 4 * width, 64):
                prefetch_read(w + AHEAD + line)

    @routine
    def join(upper, lower):
        """Combine the sums of the two planes."""
        return shl(upper, 8) + lower

    @routine
    def nibble_sums(w, xh, xl, stride):
        """Return sums of low and of high nibbles over `steps` steps."""
        lows, highs = none_i32(), none_i32()
        for _ in range(rounds):
            lh, ll, hh, hl = none(), none(), none(), none()
            for _ in range(chunk):
                prefetch(w)
                v = weights(w)
                a = low(v)
                lh = dot(lh, a, xh, stride)
                ll = dot(ll, a, xl, stride)
                c = high(v)
                hh = dot(hh, c, xh + 64, stride)
                hl = dot(hl, c, xl + 64, stride)
                w += 128
                xh += 4
                xl += 4
                step_end()
            lows = lows + join(widen(lh), widen(ll))
            highs = highs + sar(join(widen(hh), widen(hl)), HIGH_SHIFT)
        return lows, highs

    @routine
    def merged_step(upper, lower, w, xh, xl, stride):
        prefetch(w)
        v = weights(w)
        a = low(v)
        upper, lower = dot(upper, a, xh, stride), dot(lower, a, xl, stride)
        c = high(v)
        upper, lower = dot(upper, c, xh + 64, stride), dot(lower, c, xl + 64, stride)
        step_end()
        return upper, lower

    @routine
    def merged_sums(w, xh, xl, stride):
        """Return sums of low and high nibbles over 16 steps: four of both fit an accumulator."""
        total = none_i32()
        for _ in range(4):
            upper, lower = merged_step(none(), none(), w, xh, xl, stride)
            upper, lower = merged_step(upper, lower, w + 128, xh + 4, xl + 4, stride)
            upper, lower = merged_step(upper, lower, w + 256, xh + 8, xl + 8, stride)
            upper, lower = merged_step(upper, lower, w + 384, xh + 12, xl + 12, stride)
            total = total + join(widen(upper), widen(lower))
            w += 512
            xh += 16
            xl += 16
        return total

    @routine
    def word_sums(w, x, unused, stride):
        """Return sums of bytes with int16: 128 products of 255 and 32512 fit an accumulator."""
        total = none_i32()
        for _ in range(steps):
            prefetch(w)
            v = weights(w)
            total = dot_pairs_narrow(total, bytes_of_pairs(v, 0), x, 2 * stride)
            total = dot_pairs_narrow(total, bytes_of_pairs(v, 1), x + 4, 2 * stride)
            w += 128
            x += 8
        return total

    @routine
    def plane_sums(w, xh, xl, stride):
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

    byte_sums = word_sums if WORDS else plane_sums

    @routine
    def scaled(total, acc, scales, zero, xs, xs_stride, sums, sums_stride):
        """``acc + scale * x_scale * (total - zero * sum)``."""
        s = integers(sums, sums_stride)
        if zero == 0:
            total = total - s * (symmetric - BYTE_BIAS if bits == 8 else symmetric)
        else:
            z = byte(zero)
            if bits == 8:
                z = z - BYTE_BIAS
            total = total - s * z
        return fma(to_f32(total), scalars(xs, xs_stride) * half(scales), acc)

    if merged:

        @routine
        def add_block(w, scales, zeros_, xh, xl, xs, sums, blocks, acc):
            total = merged_sums(w, xh, xl, blocks * 128)
            return scaled(total, acc, scales, zeros_, xs, blocks * 4, sums, blocks * 4)

    elif bits == 4:

        @routine
        def add_block(w, scales, zeros_, xh, xl, xs, sums, blocks, acc):
            stride = blocks * 128
            for span in range(spans):
                lows, highs = nibble_sums(w + span * steps * 128, xh + span * steps * 4, xl + span * steps * 4, stride)
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
                total = byte_sums(w + offset * 32, xh + value * offset, xl + offset, stride)
                acc = scaled(total, acc, scales + part * 64, z, xs, blocks * 4, sums + part * 4, stride * 4 // group)
            return acc

    @routine
    def tile(w, scales, zeros_, xh, xl, xs, sums, blocks, y):
        first, second = none_f32(), none_f32()
        for _ in range(blocks):
            first = add_block(w, scales, zeros_, xh, xl, xs, sums, blocks, first)
            if width == 16:
                z = zeros_ + 16 if zeros_ != 0 else 0
                second = add_block(w + 64, scales + 32, z, xh, xl, xs, sums, blocks, second)
            w += block_bytes
            xh += 128 * value
            xl += 128
            xs += 4
            scales += 64 * groups
            if zeros_ != 0:
                zeros_ += 32 * groups
            sums += 4 * groups
        store_rows(y, first, 128)
        if width == 16:
            store_rows(y + 64, second, 128)

    return tile


def _make(bits: int, group: int):
    one, many = _make_tile(bits, group, 1), _make_tile(bits, group, TOKENS)
    block_bytes, groups, value = 512 * bits, 128 // group, 2 if bits == 8 and WORDS else 1

    def gemv(args, thread, threads):
        (counters, w, scales, zeros_, n, blocks, xh, xl, xs, sums, rows, out, bias, activation, residual, gated,
         scratch) = unpack(args, 17)  # fmt: skip
        y, lines = scratch + thread * 128 * TOKENS, (n + 31) // 32
        step = max(1, STEP_BYTES // (blocks * block_bytes * rows))
        for turn in range(threads):
            owner = (thread + turn) % threads
            first, last = claim(counters, owner, threads, lines, step)
            while first < last:
                for line in range(first, last):
                    bw, bs = w + line * blocks * block_bytes, scales + line * blocks * groups * 64
                    bz = zeros_ + line * blocks * groups * 32 if zeros_ != 0 else 0
                    row = 0
                    while row < rows:
                        o, count = row * blocks, TOKENS if rows - row >= TOKENS else 1
                        high_plane, low_plane = xh + o * 128 * value, xl + o * 128
                        factors, of_groups = xs + 4 * o, sums + 4 * o * groups
                        if count == 1:
                            one(bw, bs, bz, high_plane, low_plane, factors, of_groups, blocks, y)
                        else:
                            many(bw, bs, bz, high_plane, low_plane, factors, of_groups, blocks, y)
                        finish_rows(y, out, bias, activation, residual, gated, row, count, line, n, 0)
                        row += count
                first, last = claim(counters, owner, threads, lines, step)

    gemv.__name__ = f"gemv{bits}_{group}"
    return kernel(gemv)


for _bits in (4, 8):
    for _group in (32, 64, 128):
        _make(_bits, _group)
