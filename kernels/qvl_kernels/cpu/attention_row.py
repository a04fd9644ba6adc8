"""Attention of one query over the cache, bit-identical to `attention_prefill`.

`attention_prefill` converts keys and values to float32 in memory, for many queries. This kernel reads them from the
cache (layout: `cached_attention`) and converts them in registers. It adds in the same order: a score from the first
dimension to the last, a mean from the first position to the last, with the softmax's state carried over every `KEYS`
positions.
"""

from __future__ import annotations

from qvl_kernels.cpu.atomics import claim
from qvl_kernels.cpu.attention_prefill import begin, end, layout, weigh
from qvl_kernels.cpu.registry import as_f32, kernel, routine, unpack
from qvl_kernels.cpu.simd import bytes_, fma, get_f32, get_i32, loads, rows, sar, spreads, store, to_f32, zeros
from qvl_kernels.cpu.tiles import KEYS

spread = spreads("f32", 16)


def _make_parts(kind: str, groups: int):
    """Routines for `groups` times 16 positions, and for as many columns of values."""
    size = {"fp32": 4, "fp16": 2, "int8": 1}[kind]
    none, held = zeros("f32", 16, groups), loads("f32", 16, groups)
    floats = rows("f16" if kind == "fp16" else "f32", 16, groups)
    words, key_scales, integers = rows("i32", 16, groups), rows("f32", 16, groups), bytes_(16, True, groups)

    if kind == "int8":

        @routine
        def scores(query, d, keys, depth, scales, out):
            total, scale = none(), key_scales(scales, 64)
            for i in range(0, d, 4):
                w = words(keys + 16 * i, 16 * depth)
                for j in range(min(4, d - i)):
                    key = to_f32(sar(w * (1 << (24 - 8 * j)) - 0x80000000, 24)) * scale
                    total = fma(key, spread(query + 4 * (i + j), 0), total)
            store(out, total)

        @routine
        def mean(weights, count, values, width, scales, out):
            total = held(out)
            for _ in range(count):
                total = fma(to_f32(integers(values)) * get_f32(scales), spread(weights, 0), total)
                values += width
                scales += 4
                weights += 4
            store(out, total)

    else:

        @routine
        def scores(query, d, keys, depth, scales, out):
            total = none()
            for _ in range(d):
                total = fma(floats(keys, 16 * size * depth), spread(query, 0), total)
                keys += 16 * size
                query += 4
            store(out, total)

        @routine
        def mean(weights, count, values, width, scales, out):
            total = held(out)
            for _ in range(count):
                total = fma(floats(values, 16 * size), spread(weights, 0), total)
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
                        s, target = key_scales + 4 * (where + i), weights + 4 * i
                        if held - i > 48:
                            scores_4(query, d, k + i * depth * size, depth, s, target)
                            i += 64
                        else:
                            scores(query, d, k + i * depth * size, depth, s, target)
                            i += 16
                    weigh(weights, held, held, top, total, mean_so_far, width)
                    s, c = value_scales + 4 * where, 0
                    while c < width:
                        if width - c >= 64:
                            mean_4(weights, held, v + c * size, width, s, mean_so_far + 4 * c)
                            c += 64
                        else:
                            mean(weights, held, v + c * size, width, s, mean_so_far + 4 * c)
                            c += 16
                end(total, mean_so_far, d, 1, out + 4 * head * d, 0)
                head, stop = claim(counters, owner, threads, heads, 1)

    row_attention.__name__ = f"row_attention_{kind}"
    return kernel(row_attention)


for _kind in ("fp32", "fp16", "int8"):
    _make(_kind)
