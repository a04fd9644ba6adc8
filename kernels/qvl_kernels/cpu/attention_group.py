"""Grouped-query attention of a few queries over the cache: every key and value is read once for all heads of its group.

A task is one query row, one head of keys and a part of the positions. `LINES` heads at a time share each key and value
after its conversion to float32. The products with keys prefetch their values, and those with values the next keys:
otherwise arithmetic and memory would take turns. The arithmetic and its order are those of `attention_prefill`: with
one part the result is bit-identical.
"""

from __future__ import annotations

from numba import float32

from qvl_kernels.cpu.atomics import claim
from qvl_kernels.cpu.attention_prefill import KEY_FACTOR, ROW, clear, end, scale_row, weigh
from qvl_kernels.cpu.cached_attention import most_parts, part_size, prefetch
from qvl_kernels.cpu.quantize import take
from qvl_kernels.cpu.registry import as_f32, kernel, routine, unpack
from qvl_kernels.cpu.simd import (
    bytes_,
    fma,
    get_f32,
    get_i32,
    high_byte,
    loads,
    prefetch_read,
    put_f32,
    rows,
    spreads,
    store,
    store_rows,
    to_f32,
    zeros,
)
from qvl_kernels.cpu.tiles import KEYS, LINES

load, zero = loads("f32", 16), zeros("f32", 16)
none, held_rows, spread = zeros("f32", 16, LINES), rows("f32", 16, LINES), spreads("f32", 16, LINES)
words, signed = loads("i32", 16), bytes_(16, True)


@routine
def layout(scratch, lines, padded):
    """Return the addresses of queries, scores, outputs and the lines' maxima and sums."""
    scores = scratch + lines * ROW
    out = scores + lines * ROW
    tops = out + 4 * lines * padded
    return scratch, scores, out, tops, tops + 4 * lines


@routine
def begin(q, group, lines, d, factor, queries, out, tops, totals):
    """Copy the scaled queries of a group, with zeros up to `lines`, and clear the accumulators."""
    padded = (d + 15) // 16 * 16
    for i in range(lines):
        for c in range(0, padded, 16):
            v = take(q + 4 * (i * d + c), d - c) * factor if i < group else zero()
            store(queries + i * ROW + 4 * c, v)
        clear(tops + 4 * i, totals + 4 * i, out + 4 * i * padded, padded)


def _make(kind: str):
    size = {"fp32": 4, "fp16": 2, "int8": 1}[kind]
    floats = rows("f16" if kind == "fp16" else "f32", 16, 1)

    if kind == "int8":

        @routine
        def add_keys(total, query, keys):
            """Add the products of four dimensions of 16 positions and of `LINES` queries."""
            w = words(keys)
            total = fma(to_f32(high_byte(w, 0)), spread(query, ROW), total)
            total = fma(to_f32(high_byte(w, 1)), spread(query + 4, ROW), total)
            total = fma(to_f32(high_byte(w, 2)), spread(query + 8, ROW), total)
            return fma(to_f32(high_byte(w, 3)), spread(query + 12, ROW), total)

        @routine
        def convert(values):
            return to_f32(signed(values))

    else:

        @routine
        def add_keys(total, query, keys):
            total = fma(floats(keys, 0), spread(query, ROW), total)
            total = fma(floats(keys + 16 * size, 0), spread(query + 4, ROW), total)
            total = fma(floats(keys + 32 * size, 0), spread(query + 8, ROW), total)
            return fma(floats(keys + 48 * size, 0), spread(query + 12, ROW), total)

        @routine
        def convert(values):
            return floats(values, 0)

    @routine
    def score(query, depth, keys, values, out):
        """Scores of 16 positions and `LINES` queries; their values are prefetched."""
        total = none()
        for _ in range(0, depth, 4):
            prefetch(values, 64 * size)
            total = add_keys(total, query, keys)
            keys += 64 * size
            values += 64 * size
            query += 16
        store_rows(out, total, ROW)

    @routine
    def mean(weights, count, values, width, out, out_row, ahead, step):
        """Add 16 columns of `count` weighted values to each of `LINES` rows.

        Meanwhile `step` bytes, at most a line, are prefetched for each of the values, from `ahead` on.
        """
        total = held_rows(out, out_row)
        for _ in range(count):
            prefetch_read(ahead)
            total = fma(convert(values), spread(weights, ROW), total)
            values += width * size
            weights += 4
            ahead += step
        store_rows(out, total, out_row)

    def group_attention(args, thread, threads):
        (counters, qkv, tokens, kv_heads, group, d, keys, values, key_scales, value_scales, depth, width, capacity,
         start, most, out, factor, partial, scratch, scratch_bytes) = unpack(args, 20)  # fmt: skip
        lines, padded = (group + LINES - 1) // LINES * LINES, (d + 15) // 16 * 16
        queries, scores, sums, tops, totals = layout(scratch + thread * scratch_bytes, lines, padded)
        record, past = 4 * (width + 16), int(get_i32(start))
        parts = most_parts(min(capacity, past + tokens), most)
        items = tokens * kv_heads * parts
        for turn in range(threads):
            owner = (thread + turn) % threads
            item, stop = claim(counters, owner, threads, items, 1)
            while item < stop:
                which, part = item // parts, item % parts
                token = which // kv_heads
                kv_head = which - token * kv_heads
                length = min(capacity, past + token + 1)
                span = part_size(length, most)
                low, high = part * span, min((part + 1) * span, length)
                if low >= high:  # another query has more parts
                    item, stop = claim(counters, owner, threads, items, 1)
                    continue
                q = qkv + 4 * (token * (group + 2) * kv_heads + kv_head * group) * d
                begin(q, group, lines, d, as_f32(factor), queries, sums, tops, totals)
                for first in range(low, high, KEYS):
                    held, where = min(KEYS, high - first), kv_head * capacity + first
                    k, v = keys + where * depth * size, values + where * width * size
                    for i in range(0, held, 16):
                        for line in range(0, lines, LINES):
                            score(queries + line * ROW, depth, k + i * depth * size, v + i * width * size,
                                  scores + line * ROW + 4 * i)  # fmt: skip
                    for line in range(group):
                        row = scores + line * ROW
                        if kind == "int8":
                            scale_row(row, key_scales + 4 * where, KEY_FACTOR, held)
                        weigh(row, held, held, tops + 4 * line, totals + 4 * line, sums + 4 * line * padded, padded)
                        if kind == "int8":
                            scale_row(row, value_scales + 4 * where, float32(1), held)
                    step = min(KEYS, high - first - held) * depth * size // (padded // 16 * held)
                    for c in range(0, padded, 16):
                        ahead = k + held * (depth * size + c // 16 * step)
                        for line in range(0, lines, LINES):
                            mean(scores + line * ROW, held, v + c * size, width, sums + 4 * (line * padded + c),
                                 4 * padded, ahead, step)  # fmt: skip
                head = which * group
                if length <= span:
                    end(totals, sums, d, group, out + 4 * head * d, 4 * d)
                else:
                    for line in range(group):
                        target = partial + ((head + line) * most + part) * record
                        for c in range(0, padded, 16):
                            store(target + 4 * c, load(sums + 4 * (line * padded + c)))
                        put_f32(target + 4 * width, get_f32(tops + 4 * line))
                        put_f32(target + 4 * width + 4, get_f32(totals + 4 * line))
                item, stop = claim(counters, owner, threads, items, 1)

    group_attention.__name__ = f"group_attention_{kind}"
    return kernel(group_attention)


for _kind in ("fp32", "fp16", "int8"):
    _make(_kind)
