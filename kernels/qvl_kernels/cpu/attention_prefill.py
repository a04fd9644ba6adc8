"""Attention of many queries: blocked, with an online softmax (Dao et al. 2022, "FlashAttention").

A task is one head and up to `QUERIES` queries. Keys and values are processed `KEYS` at a time: converted to float32
in the thread's scratch memory, keys as ``[KEYS / 32, d, 32]`` and values as ``[KEYS, padded]`` (d rounded up to 16),
then used by all of the task's queries, `FLOAT_TOKENS` at a time: scores, weights, weighted values, all in float32.
The scales of int8 keys and values are applied to the scores and to the weights, which are fewer.
"""

from __future__ import annotations

from numba import float32

from qvl_kernels.cpu.atomics import claim
from qvl_kernels.cpu.gemm_tile import LANES, WIDTH, make_float_tile, make_narrow_tile
from qvl_kernels.cpu.quantize import take
from qvl_kernels.cpu.registry import as_f32, kernel, routine, unpack
from qvl_kernels.cpu.rotary import rotate
from qvl_kernels.cpu.simd import (
    bytes_,
    exp2,
    get_f32,
    get_i32,
    halves,
    high_byte,
    loads,
    max_all,
    maximum,
    put_f32,
    rows,
    splats,
    store,
    store_part,
    store_rows,
    sum_all,
    to_f32,
    transpose,
    zeros,
)
from qvl_kernels.cpu.tiles import FLOAT_TOKENS, KEYS, QUERIES

LOWEST = float32(-1e30)
ROW = 4 * KEYS
"""Bytes of a row of scores and of a query (`KEYS` is also the largest head size)."""

multiply, multiply_narrow = make_float_tile(4, ROW), make_narrow_tile(4, ROW)

load, half, words, signed = loads("f32", 16), halves(16), loads("i32", 16), bytes_(16, True)
zero, blank, splat, square = zeros("f32", 16), zeros("f32", WIDTH), splats("f32", 16), rows("f32", 16, 16)


# ------------------------------------------------------------------------------------------------ a task's memory
@routine
def layout(scratch, d):
    """Return the addresses of queries, keys, values, scores, outputs, maxima and sums in a thread's scratch memory."""
    padded = (d + 15) // 16 * 16
    keys = scratch + QUERIES * ROW
    values = keys + 4 * KEYS * d
    scores = values + 4 * KEYS * padded
    out = scores + 4 * KEYS * FLOAT_TOKENS
    tops = out + 4 * QUERIES * padded
    return scratch, keys, values, scores, out, tops, tops + 4 * QUERIES


# ------------------------------------------------------------------------------------------------ what is accumulated
@routine
def clear(top, total, out, padded):
    """Reset a row's maximum, sum of weights, and weighted values."""
    for c in range(0, padded, 16):
        store(out + 4 * c, zero())
    put_f32(top, LOWEST)
    put_f32(total, float32(0))


@routine
def end(totals, out, d, count, target, row):
    """Write the weighted means."""
    padded = (d + 15) // 16 * 16
    for i in range(count):
        scale = float32(1) / get_f32(totals + 4 * i)
        for c in range(0, d, 16):
            v = load(out + 4 * (i * padded + c)) * scale
            if d - c >= 16:
                store(target + i * row + 4 * c, v)
            else:
                store_part(target + i * row + 4 * c, v, d - c)


# ------------------------------------------------------------------------------------------------ a task
@routine
def begin(q, row, angles, count, d, factor, queries, out, tops, totals):
    """Copy `count` scaled queries (zero-padded to whole tiles) and clear the accumulators.

    They are rotated by `angles`, one row for each, if that is not 0.
    """
    padded = (d + 15) // 16 * 16
    for i in range((count + FLOAT_TOKENS - 1) // FLOAT_TOKENS * FLOAT_TOKENS):
        if angles != 0 and i < count:
            rotate(q + i * row, angles + 4 * i * d, d // 2, factor, queries + i * ROW)
        else:
            for c in range(0, padded, 16):
                store(queries + i * ROW + 4 * c, take(q + i * row + 4 * c, d - c) * factor if i < count else zero())
        clear(tops + 4 * i, totals + 4 * i, out + 4 * i * padded, padded)


@routine
def weigh(scores, visible, limit, top_at, total_at, out, padded):
    """Convert scores of one row to weights, 0 from `visible` to `limit`; rescale the row's accumulators."""
    best = splat(LOWEST)
    for i in range(0, visible, 16):
        if visible - i < 16:
            for j in range(visible - i, 16):
                put_f32(scores + 4 * (i + j), LOWEST)
        best = maximum(best, load(scores + 4 * i))
    old, highest = get_f32(top_at), max_all(best)
    top = max(old, highest)
    if top > old:
        put_f32(top_at, top)
        factor = exp2(splat(old - top))
        put_f32(total_at, get_f32(total_at) * max_all(factor))
        for c in range(0, padded, 16):
            store(out + 4 * c, load(out + 4 * c) * factor)
    total = zero()
    for i in range(0, limit, 16):
        if i < visible:
            p = exp2(load(scores + 4 * i) - top)
            store(scores + 4 * i, p)
            if visible - i < 16:
                # `exp2` is at least 2**-126, which would show in a sum that is still 0.
                for j in range(visible - i, 16):
                    put_f32(scores + 4 * (i + j), float32(0))
                p = load(scores + 4 * i)
            total = total + p
        else:
            store(scores + 4 * i, zero())
    put_f32(total_at, get_f32(total_at) + sum_all(total))


@routine
def scale_row(row, scales, factor, count):
    """Multiply `count` scores or weights, rounded up to 16, by the scales of their positions, times `factor`."""
    for i in range(0, count, 16):
        store(row + 4 * i, load(row + 4 * i) * (load(scales + 4 * i) * factor))


@routine
def attend(scratch, d, count, held, visible, step, key_scales, value_scales):
    """Process all queries of a task over the `held` keys and values; query i sees ``visible + i * step`` of them.

    The scales are those of the first of them, or 0.
    """
    queries, keys, values, scores, out, tops, totals = layout(scratch, d)
    padded = (d + 15) // 16 * 16
    for first in range(0, count, FLOAT_TOKENS):
        limit = min(held, visible + (first + FLOAT_TOKENS - 1) * step)
        if limit <= 0:
            continue
        target = out + 4 * first * padded
        for column in range(0, limit, 32):
            for i in range(column, column + 32, WIDTH):
                for m in range(FLOAT_TOKENS):
                    store(scores + m * ROW + 4 * i, blank())
                multiply(keys + 4 * (column * d + i - column), 128, queries + first * ROW, d, scores + 4 * i, ROW)
        for m in range(FLOAT_TOKENS):
            seen = max(0, min(held, visible + (first + m) * step))
            row, line = first + m, scores + m * ROW
            if key_scales != 0:
                scale_row(line, key_scales, KEY_FACTOR, limit)
            weigh(line, seen, limit, tops + 4 * row, totals + 4 * row, target + 4 * m * padded, padded)
            if value_scales != 0:
                scale_row(line, value_scales, float32(1), limit)
        whole = padded // WIDTH * WIDTH
        for c in range(0, whole, WIDTH):
            multiply(values + 4 * c, 4 * padded, scores, limit, target + 4 * c, 4 * padded)
        for c in range(whole, padded, LANES):
            multiply_narrow(values + 4 * c, 4 * padded, scores, limit, target + 4 * c, 4 * padded)


# ------------------------------------------------------------------------------------------------ where keys come from
ROWS, INT8, FP16, FP32 = 0, 1, 2, 4
"""`kind`: float32 rows, or the bytes of an element of the cache (`qvl_kernels.cpu.cached_attention` describes it)."""
KEY_FACTOR = float32(2**-24)
"""int8 keys are converted times 2**24 (`high_byte`)."""


@routine
def cached_keys(kind, source, d, target):
    """Convert 16 positions of one head to float32, half of ``[d, 32]``."""
    if kind == FP32:
        for i in range(d):
            store(target + 128 * i, load(source + 64 * i))
    elif kind == FP16:
        for i in range(d):
            store(target + 128 * i, half(source + 32 * i))
    else:
        for i in range(0, d, 4):
            w, to = words(source + 16 * i), target + 128 * i
            store(to, to_f32(high_byte(w, 0)))
            if i + 1 < d:
                store(to + 128, to_f32(high_byte(w, 1)))
            if i + 2 < d:
                store(to + 256, to_f32(high_byte(w, 2)))
            if i + 3 < d:
                store(to + 384, to_f32(high_byte(w, 3)))


@routine
def cached_values(kind, source, width, target):
    if kind == FP32:
        for c in range(0, width, 16):
            store(target + 4 * c, load(source + 4 * c))
    elif kind == FP16:
        for c in range(0, width, 16):
            store(target + 4 * c, half(source + 2 * c))
    else:
        for c in range(0, width, 16):
            store(target + 4 * c, to_f32(signed(source + c)))


@routine
def row_keys(source, row, lines, d, target):
    """Transpose up to 16 float32 rows."""
    whole = d // 16 * 16 if lines == 16 else 0
    for c in range(0, whole, 16):
        store_rows(target + 128 * c, transpose(square(source + 4 * c, row)), 128)
    for c in range(whole, d):
        for j in range(lines):
            put_f32(target + 128 * c + 4 * j, get_f32(source + j * row + 4 * c))


@routine
def row_values(source, d, padded, target):
    for c in range(0, padded, 16):
        store(target + 4 * c, take(source + 4 * c, d - c) if c < d else zero())


@routine
def hold(
    kind, keys, values, angles, depth, width, length, head, first, held, d, key_target, value_target, turned,
):  # fmt: skip
    """Convert positions first .. first + held of one head for `attend`.

    Rows of keys are rotated by `angles`, if that is not 0, in `turned`, a buffer of 16 rows.
    """
    padded = (d + 15) // 16 * 16
    for i in range(0, held, 16):
        target, where = key_target + 4 * (i // 32 * 32 * d + i % 32), head * length + first + i
        if kind == ROWS:
            source, row, lines = keys + 4 * ((first + i) * depth + head * width), 4 * depth, min(16, held - i)
            if angles != 0:
                for j in range(lines):
                    rotate(source + j * row, angles + 4 * (first + i + j) * d, d // 2, float32(1),
                           turned + 4 * j * padded)  # fmt: skip
                source, row = turned, 4 * padded
            row_keys(source, row, lines, d, target)
        else:
            cached_keys(kind, keys + where * depth * kind, d, target)
    for i in range(held):
        target, where = value_target + 4 * i * padded, head * length + first + i
        if kind == ROWS:
            row_values(values + 4 * ((first + i) * depth + head * width), d, padded, target)
        else:
            cached_values(kind, values + where * width * kind, width, target)


@kernel
def block_attention(args, thread, threads):
    """Compute attention of blocks of queries over the keys of their segment, or causally from position `start` on.

    A block is four int32: first query, number of queries, first key, end of the keys (ignored with `start`). Strides
    in float32 of queries are `q_row` and `q_head`, of keys of kind `ROWS` `depth` and `width`; both are rotated by
    `angles`, ``[rows, d]``, if not 0. For cached keys `depth` and `width` are those of the cache. `group` query heads
    share one head of keys. `length` is the cache's capacity.
    """
    (counters, q, q_row, q_head, blocks, count, heads, group, d, kind, keys, values, key_scales, value_scales, angles,
     depth, width, length, start, out, factor, scratch, scratch_bytes) = unpack(args, 23)  # fmt: skip
    scratch += thread * scratch_bytes
    for turn in range(threads):
        owner = (thread + turn) % threads
        task, stop = claim(counters, owner, threads, count * heads, 1)
        while task < stop:
            head, block = task % heads, blocks + 16 * (task // heads)
            row, queries = int(get_i32(block)), int(get_i32(block + 4))
            first_key, end_key = int(get_i32(block + 8)), int(get_i32(block + 12))
            seen = end_key
            if start != 0:
                seen = int(get_i32(start)) + row + 1
                end_key = min(length, seen + queries - 1)
            held_queries, held_keys, held_values, _, sums, tops, totals = layout(scratch, d)
            begin(q + 4 * (row * q_row + head * q_head), 4 * q_row, angles + (4 * row * d if angles != 0 else 0),
                  queries, d, as_f32(factor), held_queries, sums, tops, totals)  # fmt: skip
            for first in range(first_key, end_key, KEYS):
                held = min(KEYS, end_key - first)
                kv_head = head // group
                hold(kind, keys, values, angles, depth, width, length, kv_head, first, held, d, held_keys, held_values,
                     totals + 4 * QUERIES)  # fmt: skip
                step, scales, weights = 0 if start == 0 else 1, 0, 0
                if kind == INT8:
                    scales = key_scales + 4 * (kv_head * length + first)
                    weights = value_scales + 4 * (kv_head * length + first)
                attend(scratch, d, queries, held, seen - first, step, scales, weights)
            end(totals, sums, d, queries, out + 4 * (row * heads + head) * d, 4 * heads * d)
            task, stop = claim(counters, owner, threads, count * heads, 1)
