"""Attention of one query over the cache, bit-identical to `attention_prefill`.

`attention_prefill` converts keys and values to float32 in memory, for many queries. This kernel reads them from the
cache (layout: `cached_attention`) and converts them in registers. It adds in the same order: a score from the first
dimension to the last, a mean from the first position to the last, with the softmax's state carried over every `KEYS`
positions.
"""

from __future__ import annotations

from numba import float32

from qvl_kernels.cpu.atomics import claim
from qvl_kernels.cpu.attention_prefill import KEY_FACTOR, begin, end, layout, scale_row, weigh
from qvl_kernels.cpu.registry import as_f32, kernel, routine, unpack
from qvl_kernels.cpu.simd import bytes_, fma, get_i32, high_byte, loads, rows, spreads, store, to_f32, zeros
from qvl_kernels.cpu.tiles import KEYS

spread = spreads("f32", 16)


def _make_parts(kind: str, groups: int):
    """Routines for `groups` times 16 positions, and for as many columns of values."""
    size = {"fp32": 4, "fp16": 2, "int8": 1}[kind]
    none, held = zeros("f32", 16, groups), loads("f32", 16, groups)
    floats = rows("f16" if kind == "fp16" else "f32", 16, groups)
    words, integers = rows("i32", 16, groups), bytes_(16, True, groups)

    if kind == "int8":

        @routine
        def scores(query, d, keys, depth, out):
            total = none()
            for _ in range(0, d, 4):
                w = words(keys, 16 * depth)
                total = fma(to_f32(high_byte(w, 0)), spread(query, 0), total)
                total = fma(to_f32(high_byte(w, 1)), spread(query + 4, 0), total)
                total = fma(to_f32(high_byte(w, 2)), spread(query + 8, 0), total)
                total = fma(to_f32(high_byte(w, 3)), spread(query + 12, 0), total)
                keys += 64
                query += 16
            store(out, total)

        @routine
        def convert(values):
            return to_f32(integers(values))

    else:

        @routine
        def scores(query, d, keys, depth, out):
            total = none()
            for _ in range(d):
                total = fma(floats(keys, 16 * size * depth), spread(query, 0), total)
                keys += 16 * size
                query += 4
            store(out, total)

        @routine
        def convert(values):
            return floats(values, 16 * size)

    @routine
    def mean(weights, count, values, width, out):
        total = held(out)
        for _ in range(count):
            total = fma(convert(values), spread(weights, 0), total)
            values += width * size
            weights += 4
        store(out, total)

    return scores, mean


def _make(kind: str):
    size = {"fp32": 4, "fp16": 2, "int8": 1}[kind]
    (scores, mean), (scores_4, mean_4) = _make_parts(kind, 1), _make_parts(kind, 4)

    def row_attention(args, thread, threads):
        (counters, q, heads, d, keys, values, key_scales, value_scales, depth, width, capacity, start, out, factor,
         scratch, scratch_bytes) = unpack(args, 16)  # fmt: skip
        query, weights, _, _, mean_so_far, top, total = layout(scratch + thread * scratch_bytes, d)
        length = min(capacity, int(get_i32(start)) + 1)
        for turn in range(threads):
            owner = (thread + turn) % threads
            head, stop = claim(counters, owner, threads, heads, 1)
            while head < stop:
                begin(q + 4 * head * d, 0, 0, 1, d, as_f32(factor), query, mean_so_far, top, total)
                for first in range(0, length, KEYS):
                    held, where = min(KEYS, length - first), head * capacity + first
                    k, v, i = keys + where * depth * size, values + where * width * size, 0
                    while i < held:
                        if held - i > 48:
                            scores_4(query, d, k + i * depth * size, depth, weights + 4 * i)
                            i += 64
                        else:
                            scores(query, d, k + i * depth * size, depth, weights + 4 * i)
                            i += 16
                    if kind == "int8":
                        scale_row(weights, key_scales + 4 * where, KEY_FACTOR, held)
                    weigh(weights, held, held, top, total, mean_so_far, width)
                    if kind == "int8":
                        scale_row(weights, value_scales + 4 * where, float32(1), held)
                    c = 0
                    while c < width:
                        if width - c >= 64:
                            mean_4(weights, held, v + c * size, width, mean_so_far + 4 * c)
                            c += 64
                        else:
                            mean(weights, held, v + c * size, width, mean_so_far + 4 * c)
                            c += 16
                end(total, mean_so_far, d, 1, out + 4 * head * d, 0)
                head, stop = claim(counters, owner, threads, heads, 1)

    row_attention.__name__ = f"row_attention_{kind}"
    return kernel(row_attention)


for _kind in ("fp32", "fp16", "int8"):
    _make(_kind)
