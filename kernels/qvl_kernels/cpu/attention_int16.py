"""Attention of every query over every key in 16-bit integers, twice as fast as float32 with VNNI.

As `attention_prefill`, but queries, keys, weights and values are rounded and multiplied in pairs into int32, which
never overflows: the lengths of a query and of a key stay below the root of 2**31 (Cauchy and Schwarz), and a row's sum
of weights times the largest value below 2**31. Queries, keys and rows of weights have one scale each, values one per
column, for each block of keys. The mean of the keys is subtracted first: it adds a constant to all scores of a query,
which does not change the softmax, and it contains the outliers of keys (Zhang et al. 2024, "SageAttention"). Relative
error 2e-4 to 4e-4.
"""

from __future__ import annotations

from numba import float32

from qvl_kernels.cpu.atomics import claim
from qvl_kernels.cpu.attention_prefill import LOWEST, clear, end
from qvl_kernels.cpu.gemm_tile import LANES, WIDTH
from qvl_kernels.cpu.quantize import take
from qvl_kernels.cpu.registry import as_f32, kernel, routine, unpack
from qvl_kernels.cpu.rotary import rotate
from qvl_kernels.cpu.simd import (
    absolute,
    exp2,
    fma,
    get_f32,
    get_i32,
    loads,
    max_all,
    maximum,
    minimum,
    parts,
    piece,
    prefetch_read,
    put_f32,
    rint,
    rows,
    splats,
    spreads,
    store,
    store_part,
    store_rows,
    sum_all,
    to_f32,
    transpose,
    zeros,
)
from qvl_kernels.cpu.simd.pairs import dot_pairs, dot_pairs_narrow, pair, store_shorts
from qvl_kernels.cpu.tiles import KEYS, PAIR_QUERIES, PAIR_TOKENS

LENGTH_LIMIT, LIMIT, VALUE_LIMIT, WEIGHTS_LIMIT = float32(46000), float32(32767), float32(4095), float32(524000)
ROW, WEIGHT_ROW = 4 * KEYS, 2 * KEYS
AHEAD = 8
"""Prefetch distance for queries, keys and values, in rows."""

load, part, zero, splat = loads("f32", 16), parts(16), zeros("f32", 16), splats("f32", 16)
words = rows("i32", 16, 16)
four, no_four, no_four_i32 = loads("f32", 16, 4), zeros("f32", 16, 4), zeros("i32", 16, 4)
lanes_i32, lanes_f32 = loads("i32", LANES), loads("f32", LANES)
no_sums, spread = zeros("i32", LANES, PAIR_TOKENS), spreads("f32", LANES, PAIR_TOKENS)
out_rows = rows("f32", LANES, PAIR_TOKENS)


@routine
def layout(scratch, d):
    """Return the addresses of all arrays in a thread's scratch memory."""
    padded, pairs = (d + 15) // 16 * 16, (d + 31) // 32 * 16
    queries = scratch
    keys = queries + 4 * PAIR_QUERIES * pairs
    values = keys + 4 * KEYS * pairs
    scores = values + 2 * KEYS * padded
    weights = scores + ROW * PAIR_TOKENS
    out = weights + WEIGHT_ROW * PAIR_TOKENS
    tops = out + 4 * PAIR_QUERIES * padded
    totals = tops + 4 * PAIR_QUERIES
    return queries, keys, values, scores, weights, out, tops, totals, totals + 4 * PAIR_QUERIES


@routine
def round_row(x, mean, d, factor, target):
    """Round ``(x - mean) * factor`` to int16 (mean 0: none), zero-padded to whole vectors; return the scale.

    The scale is never 0: `weigh` multiplies the score that hides a padding key by it.
    """
    largest, square = zero(), zero()
    for c in range(0, d, 16):
        v = take(x + 4 * c, d - c)
        if mean != 0:
            v = v - load(mean + 4 * c)
        largest, square = maximum(largest, absolute(v)), fma(v, v, square)
    top, length = max_all(largest), sum_all(square) ** float32(0.5)
    inverse = min(LIMIT / top, LENGTH_LIMIT / length) if top > float32(1e-18) else float32(0)
    for c in range(0, (d + 31) // 32 * 32, 16):
        v = take(x + 4 * c, d - c) if c < d else zero()
        if mean != 0 and c < d:
            v = v - load(mean + 4 * c)
        store_shorts(target + 2 * c, rint(v * inverse))
    return factor / inverse if inverse > 0 else float32(1)


@routine
def prefetch_row(x, row, d):
    """Prefetch the row `AHEAD` rows further: rows are pages apart, beyond the hardware prefetcher."""
    x += AHEAD * row
    for c in range(0, 4 * d, 64):
        prefetch_read(x + c)


@routine
def turned(x, angles, index, d, buffer):
    """Rotate row `index` into `buffer` and return its address; x itself without `angles`."""
    if angles == 0:
        return x
    rotate(x, angles + 4 * index * d, d // 2, float32(1), buffer)
    return buffer


@routine
def mean_key(keys, row, angles, count, d, target, buffer):
    for c in range(0, d, 16):
        store(target + 4 * c, zero())
    for i in range(count):
        prefetch_row(keys + i * row, row, d)
        x = turned(keys + i * row, angles, i, d, buffer)
        for c in range(0, d, 16):
            store(target + 4 * c, load(target + 4 * c) + take(x + 4 * c, d - c))
    for c in range(0, d, 16):
        store(target + 4 * c, load(target + 4 * c) * (float32(1) / float32(count)))


@routine
def hold_keys(source, row, angles, held, d, mean, target, scales, buffer, turn_buffer):
    """Keys as pairs ``[held / 32, pairs, 32, 2]``, and their scales."""
    pairs = (d + 31) // 32 * 16
    for i in range(0, held, 16):
        for j in range(16):
            scale = float32(0)
            if i + j < held:
                prefetch_row(source + (i + j) * row, row, d)
                x = turned(source + (i + j) * row, angles, i + j, d, turn_buffer)
                scale = round_row(x, mean, d, float32(1), buffer + 4 * pairs * j)
            put_f32(scales + 4 * (i + j), scale)
        for c in range(0, pairs, 16):
            side = target + 4 * (i // 32 * 32 * pairs + 32 * c + i % 32)
            store_rows(side, transpose(words(buffer + 4 * c, 4 * pairs)), 128)


@routine
def hold_values(source, row, held, d, target, scales, inverses):
    """Values as pairs of rows ``[held / 2, padded, 2]``, and the columns' scales."""
    padded = (d + 15) // 16 * 16
    for c in range(0, d, 16):
        store(inverses + 4 * c, splat(float32(1e-30)))
    for i in range(held):
        prefetch_row(source + i * row, row, d)
        for c in range(0, d, 16):
            largest = maximum(load(inverses + 4 * c), absolute(take(source + i * row + 4 * c, d - c)))
            store(inverses + 4 * c, largest)
    for c in range(0, d, 16):
        largest = load(inverses + 4 * c)
        store(scales + 4 * c, largest * (float32(1) / VALUE_LIMIT))
        store(inverses + 4 * c, VALUE_LIMIT / largest)
    for i in range(0, held, 2):
        for c in range(0, d, 16):
            inverse = load(inverses + 4 * c)
            low = rint(take(source + i * row + 4 * c, d - c) * inverse)
            high = rint(take(source + (i + 1) * row + 4 * c, d - c) * inverse if i + 1 < held else zero())
            store(target + 2 * i * padded + 4 * c, pair(low, high))


@routine
def multiply(w, w_step, x, x_row, count):
    a, b = no_sums(), no_sums()
    for _ in range(count):
        a, b = dot_pairs(a, b, lanes_i32(w), lanes_i32(w + 4 * LANES), x, x_row)
        w += w_step
        x += 4
    return a, b


@routine
def multiply_narrow(w, w_step, x, x_row, count):
    a = no_sums()
    for _ in range(count):
        a = dot_pairs_narrow(a, lanes_i32(w), x, x_row)
        w += w_step
        x += 4
    return a


@routine
def total_of(v):
    """Return the sum of a block of four vectors."""
    return (piece(v, 0) + piece(v, 1)) + (piece(v, 2) + piece(v, 3))


@routine
def highest(scores, held, limit):
    """Return the largest of a row's scores; mask the following ones up to `limit`."""
    for j in range(held, limit):
        put_f32(scores + 4 * j, LOWEST)
    best = four(scores)
    for i in range(64, limit, 64):
        best = maximum(best, four(scores + 4 * i))
    return max_all(maximum(maximum(piece(best, 0), piece(best, 1)), maximum(piece(best, 2), piece(best, 3))))


@routine
def weigh(scores, limit, scale, top):
    """Convert a row's scores to weights of at most 1; return their sum.

    The product is rounded before `top` is subtracted, because `top` is a rounded product. A fused multiply-add would
    leave a difference above 0 at the largest score, and 32767 times a weight above 1 overflows int16.
    """
    total = no_four()
    for i in range(0, limit, 64):
        p = exp2(four(scores + 4 * i) * scale - top)
        total = total + p
        store(scores + 4 * i, p)
    return sum_all(total_of(total))


@routine
def round_weights(scores, limit, scale, weights):
    """Round a row's weights to int16; return their sum."""
    total = no_four_i32()
    for i in range(0, limit, 64):
        p = rint(four(scores + 4 * i) * scale)
        total = total + p
        store_shorts(weights + 2 * i, p)
    return float32(sum_all(total_of(total)))


@routine
def weigh_tile(scores, held, query_scales, tops, totals, weights, weight_scales, factors, sums):
    """Convert scores of a tile, divided by the queries' scales, to int16 weights and `weight_scales`.

    `factors`: rescaling of the rows' weighted values when their maxima rise. Each step processes all rows before the
    next step, so that the latency of one row's reduction overlaps with other rows.
    """
    limit = (held + 63) // 64 * 64
    for m in range(PAIR_TOKENS):
        put_f32(sums + 4 * m, highest(scores + m * ROW, held, limit))
    old = part(tops, PAIR_TOKENS)
    top = maximum(load(sums) * part(query_scales, PAIR_TOKENS), old)
    factor = exp2(old - top)
    store_part(tops, top, PAIR_TOKENS)
    store(factors, factor)
    for m in range(PAIR_TOKENS):
        total = weigh(scores + m * ROW, limit, get_f32(query_scales + 4 * m), get_f32(tops + 4 * m))
        put_f32(sums + 4 * m, total)
    store(weight_scales, minimum(splat(WEIGHTS_LIMIT) / load(sums), splat(LIMIT)))
    for m in range(PAIR_TOKENS):
        total = round_weights(scores + m * ROW, limit, get_f32(weight_scales + 4 * m), weights + m * WEIGHT_ROW)
        put_f32(sums + 4 * m, total)
    scale = float32(1) / load(weight_scales)
    store(weight_scales, scale)
    # The sum of the rounded weights, so that rounding errors cancel in the mean.
    store_part(totals, fma(part(totals, PAIR_TOKENS), factor, load(sums) * scale), PAIR_TOKENS)


@routine
def add_values(sums, scale, factor, y, value_scales, padded):
    held = out_rows(y, 4 * padded) * factor
    store_rows(y, fma(to_f32(sums) * scale, lanes_f32(value_scales), held), 4 * padded)


@routine
def attend(scratch, d, count, held, key_scales, value_scales, row_scales):
    """Process all queries of a task over the `held` keys and values in scratch memory."""
    queries, keys, values, scores, weights, out, tops, totals, query_scales = layout(scratch, d)
    padded, pairs = (d + 15) // 16 * 16, (d + 31) // 32 * 16
    weight_scales, factors, sums = row_scales, row_scales + 64, row_scales + 128
    for first in range(0, count, PAIR_TOKENS):
        x = queries + 4 * first * pairs
        for column in range(0, held, 32):
            for i in range(column, column + 32, WIDTH):
                w = keys + 4 * (column * pairs + i - column)
                a, b = multiply(w, 128, x, 4 * pairs, (d + 1) // 2)
                store_rows(scores + 4 * i, to_f32(a) * lanes_f32(key_scales + 4 * i), ROW)
                other = i + LANES
                store_rows(scores + 4 * other, to_f32(b) * lanes_f32(key_scales + 4 * other), ROW)
        weigh_tile(scores, held, query_scales + 4 * first, tops + 4 * first, totals + 4 * first, weights,
                   weight_scales, factors, sums)  # fmt: skip
        target, scale, factor = out + 4 * first * padded, spread(weight_scales, 4), spread(factors, 4)
        whole = padded // WIDTH * WIDTH
        for c in range(0, whole, WIDTH):
            a, b = multiply(values + 4 * c, 4 * padded, weights, WEIGHT_ROW, (held + 1) // 2)
            add_values(a, scale, factor, target + 4 * c, value_scales + 4 * c, padded)
            add_values(b, scale, factor, target + 4 * (c + LANES), value_scales + 4 * (c + LANES), padded)
        for c in range(whole, padded, LANES):
            a = multiply_narrow(values + 4 * c, 4 * padded, weights, WEIGHT_ROW, (held + 1) // 2)
            add_values(a, scale, factor, target + 4 * c, value_scales + 4 * c, padded)


@routine
def begin(scratch, q, row, angles, count, d, factor, buffer):
    """Round the queries (zero-padded to whole tiles) and clear the accumulators."""
    queries, _, _, _, _, out, tops, totals, scales = layout(scratch, d)
    padded, pairs = (d + 15) // 16 * 16, (d + 31) // 32 * 16
    for i in range((count + PAIR_TOKENS - 1) // PAIR_TOKENS * PAIR_TOKENS):
        scale = float32(1)
        if i < count:
            prefetch_row(q + i * row, row, d)
            x = turned(q + i * row, angles, i, d, buffer)
            scale = round_row(x, 0, d, factor, queries + 4 * i * pairs)
        put_f32(scales + 4 * i, scale)
        clear(tops + 4 * i, totals + 4 * i, out + 4 * i * padded, padded)


@kernel
def block_attention_int16(args, thread, threads):
    """Compute blocks of queries over the keys of their segment, see ``attention_prefill.block_attention``.

    Strides in float32: `q_row` and `k_row` of rows, `q_head` and `k_head` of heads. out ``[rows, heads * d]``.
    """
    (counters, q, q_row, q_head, blocks, block_count, heads, d, k, v, angles, k_row, k_head, out, factor, scratch,
     scratch_bytes) = unpack(args, 17)  # fmt: skip
    scratch += thread * scratch_bytes
    padded, pairs = (d + 15) // 16 * 16, (d + 31) // 32 * 16
    _, keys, values, _, _, sums, _, totals, query_scales = layout(scratch, d)
    key_scales = query_scales + 4 * PAIR_QUERIES
    value_scales = key_scales + 4 * KEYS
    mean = value_scales + 4 * (padded + 16)
    row_scales = mean + 4 * padded
    buffer = row_scales + 3 * 64
    turn_buffer = buffer + 64 * pairs
    for turn in range(threads):
        owner = (thread + turn) % threads
        task, stop = claim(counters, owner, threads, block_count * heads, 1)
        while task < stop:
            head, block = task // block_count, blocks + 16 * (task % block_count)
            row, count = int(get_i32(block)), int(get_i32(block + 4))
            first_key, end_key = int(get_i32(block + 8)), int(get_i32(block + 12))
            rotation = angles + 4 * row * d if angles != 0 else 0
            begin(scratch, q + 4 * (row * q_row + head * q_head), 4 * q_row, rotation, count, d, as_f32(factor),
                  turn_buffer)  # fmt: skip
            source, rows_apart = k + 4 * head * k_head, 4 * k_row
            rotation = angles + 4 * first_key * d if angles != 0 else 0
            mean_key(source + first_key * rows_apart, rows_apart, rotation, end_key - first_key, d, mean, turn_buffer)
            for first in range(first_key, end_key, KEYS):
                held = min(KEYS, end_key - first)
                rotation = angles + 4 * first * d if angles != 0 else 0
                hold_keys(source + first * rows_apart, rows_apart, rotation, held, d, mean, keys, key_scales, buffer,
                          turn_buffer)  # fmt: skip
                where = v + 4 * (first * k_row + head * k_head)
                hold_values(where, rows_apart, held, d, values, value_scales, buffer)
                attend(scratch, d, count, held, key_scales, value_scales, row_scales)
            end(totals, sums, d, count, out + 4 * (row * heads + head) * d, 4 * heads * d)
            task, stop = claim(counters, owner, threads, block_count * heads, 1)
