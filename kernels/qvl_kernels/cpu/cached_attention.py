"""The KV cache: appending rotated keys and values, and decode attention.

Layout of a layer, head-major: keys ``[heads, capacity/16, depth, 16]`` (one load holds one dimension of 16 positions;
int8: ``[heads, capacity/16, depth/4, 16, 4]`` bytes, stored + 128, for the dot product of bytes) and values
``[heads, capacity, width]``, with `depth` the head size rounded up to 4 and `width` to 16; the padding is zero. int8
caches have one scale per position and head, float32 ``[heads, capacity]`` (rounded to fp16 values).
"""

from __future__ import annotations

from numba import float32

from qvl_kernels.cpu.atomics import claim
from qvl_kernels.cpu.quantize import take
from qvl_kernels.cpu.registry import as_f32, kernel, routine, share, unpack
from qvl_kernels.cpu.rotary import normalize_head, rotate
from qvl_kernels.cpu.simd import (
    BYTE_BIAS,
    WORDS,
    absolute,
    bytes_,
    dot_bytes,
    exp2,
    fma,
    get_f16,
    get_f32,
    get_i32,
    loads,
    max_all,
    maximum,
    minimum,
    prefetch_read,
    put_f16,
    put_f32,
    put_i32,
    rint,
    rows,
    sar,
    shl,
    splats,
    spreads,
    store,
    store_bytes,
    store_part,
    sum_all,
    to_f32,
    zeros,
)
from qvl_kernels.cpu.simd.pairs import bytes_of_pairs, dot_pairs_narrow, store_fours
from qvl_kernels.cpu.tiles import PART

CHUNK = 128
"""Positions per block of scores."""
LOWEST = float32(-1e30)

load, splat, spread = loads("f32", 16), splats("f32", 16), spreads("f32", 16)
none, none_i32, word = zeros("f32", 16), zeros("i32", 16), spreads("i32", 16)
keys_i8 = loads("i8", 64)
signed = bytes_(16, True)


# ------------------------------------------------------------------------------------------------ appending
@routine
def largest(x, n):
    top = none()
    for i in range(0, n, 16):
        top = maximum(top, absolute(take(x + 4 * i, n - i)))
    return max_all(top)


@routine
def int8_scale(x, n, scratch):
    """Return the scale of n float32 as an fp16 value, as in `reference.functions.quantize_kv`, and its divisor."""
    put_f16(scratch, largest(x, n) / float32(127))
    scale = get_f16(scratch)
    return scale, scale if scale > 0 else float32(1)


@routine
def clamp(x):
    """Limit codes to int8: a scale that is subnormal in fp16 may be much smaller than it should."""
    return minimum(maximum(x, splat(-127)), splat(127))


def _make_append(kind: str):
    size = {"fp32": 4, "fp16": 2, "int8": 1}[kind]
    if kind == "int8":

        @routine
        def put_vectors(
            k, v, keys, values, key_scales, value_scales, depth, width, head_dim, capacity, head, position, t
        ):
            where = 4 * (head * capacity + position)
            scale, divisor = int8_scale(k, head_dim, t)
            put_f32(key_scales + where, scale)
            base = keys + ((head * (capacity // 16) + position // 16) * depth * 16) + position % 16 * 4
            for i in range(0, head_dim, 16):
                q = rint(clamp(take(k + 4 * i, head_dim - i) / divisor))
                store_bytes(t, q + 128)
                for j in range(0, min(16, depth - i), 4):
                    put_i32(base + (i + j) * 16, get_i32(t + j))
            scale, divisor = int8_scale(v, head_dim, t)
            put_f32(value_scales + where, scale)
            base = values + (head * capacity + position) * width
            for i in range(0, head_dim, 16):
                store_bytes(base + i, rint(clamp(take(v + 4 * i, head_dim - i) / divisor)))

    else:

        @routine
        def put_vectors(
            k, v, keys, values, key_scales, value_scales, depth, width, head_dim, capacity, head, position, t
        ):
            key = keys + size * ((head * (capacity // 16) + position // 16) * depth * 16 + position % 16)
            value = values + size * (head * capacity + position) * width
            for i in range(head_dim):
                if size == 2:
                    put_f16(key + 32 * i, get_f32(k + 4 * i))
                    put_f16(value + 2 * i, get_f32(v + 4 * i))
                else:
                    put_f32(key + 64 * i, get_f32(k + 4 * i))
                    put_f32(value + 4 * i, get_f32(v + 4 * i))

    def rope_append(args, thread, threads):
        (qkv, tokens, heads, kv_heads, head_dim, q_norm, q_eps, k_norm, k_eps, rope, logn, start, keys, values,
         key_scales, value_scales, capacity, depth, width, scratch) = unpack(args, 20)  # fmt: skip
        scratch += thread * 4096
        half, begin, turned = head_dim // 2, int(get_i32(start)), heads + kv_heads
        first, last = share(tokens * turned, thread, threads)
        for item in range(first, last):
            token = item // turned
            which, position = item - token * turned, begin + token
            if position >= capacity:
                continue
            row = qkv + 4 * (token * (turned + kv_heads) + which) * head_dim
            angles = rope + 4 * position * head_dim
            if which < heads:
                normalize_head(row, q_norm, head_dim, as_f32(q_eps))
                rotate(row, angles, half, get_f32(logn + 4 * position) if logn != 0 else float32(1), row)
                continue
            normalize_head(row, k_norm, head_dim, as_f32(k_eps))
            rotate(row, angles, half, float32(1), row)
            put_vectors(
                row,
                row + 4 * kv_heads * head_dim,
                keys,
                values,
                key_scales,
                value_scales,
                depth,
                width,
                head_dim,
                capacity,
                which - heads,
                position,
                scratch,
            )

    rope_append.__name__ = f"rope_append_{kind}"
    return kernel(rope_append)


for _kind in ("fp32", "fp16", "int8"):
    _make_append(_kind)


# ------------------------------------------------------------------------------------------------ attention
@routine
def part_size(length, most):
    """Return the positions per part of a query that sees `length`, so that there are at most `most` parts."""
    size = PART
    while length > most * size:
        size *= 2
    return size


@routine
def most_parts(length, most):
    """Return a number of parts that a query that sees `length` or less does not exceed."""
    return min(most, (length + PART - 1) // PART)


@routine
def prefetch(start, nbytes):
    for i in range(0, nbytes, 64):
        prefetch_read(start + i)


def _make_attention(kind: str, vectors: int):
    """Create the attention of one query and head; values are summed `vectors` * 16 columns at a time."""
    size = {"fp32": 4, "fp16": 2, "int8": 1}[kind]
    floats = rows("f16" if kind == "fp16" else "f32", 16, 1)
    values_f = rows("f16" if kind == "fp16" else "f32", 16, vectors)
    held, none_held = loads("f32", 16, vectors), zeros("f32", 16, vectors)
    values_i = bytes_(16, True, vectors)

    if kind == "int8":

        @routine
        def scores(query, keys, key_scales, depth, values):
            """Compute scores of 16 positions, and prefetch their values; `query`: see `prepare`."""
            high, low = none_i32(), word(query, 0)
            for i in range(0, depth, 4):
                prefetch(values + 16 * i, 64)
                k = keys_i8(keys + 16 * i)
                if WORDS:
                    low = dot_pairs_narrow(low, bytes_of_pairs(k, 0), query + 64 + 2 * i, 0)
                    low = dot_pairs_narrow(low, bytes_of_pairs(k, 1), query + 68 + 2 * i, 0)
                else:
                    high = dot_bytes(high, k, query + 64 + i, 0)
                    low = dot_bytes(low, k, query + 64 + depth + i, 0)
            return to_f32(shl(high, 8) + low) * (load(key_scales) * spread(query + 4, 0))

        @routine
        def load_values(v):
            return to_f32(values_i(v))

    else:

        @routine
        def scores(query, keys, key_scales, depth, values):
            a, b, c, d = none(), none(), none(), none()
            for _ in range(0, depth, 4):
                prefetch(values, 64 * size)
                a = fma(floats(keys, 0), spread(query, 0), a)
                b = fma(floats(keys + 16 * size, 0), spread(query + 4, 0), b)
                c = fma(floats(keys + 32 * size, 0), spread(query + 8, 0), c)
                d = fma(floats(keys + 48 * size, 0), spread(query + 12, 0), d)
                keys += 64 * size
                values += 64 * size
                query += 16
            return (a + b) + (c + d)

        @routine
        def load_values(v):
            return values_f(v, 16 * size)

    @routine
    def attend(query, keys, values, key_scales, value_scales, depth, width, begin, end, weights, out):
        """Compute the online softmax over positions begin (a multiple of 16) .. end.

        Writes the unnormalized sum, float32 ``[width]``, then the maximum and the sum of weights. The keys' products
        prefetch the values, and those the next keys.
        """
        top, total = LOWEST, none()
        for i in range(0, width, 16 * vectors):
            store(out + 4 * i, none_held())
        for chunk in range(begin, end, CHUNK):
            count = min(CHUNK, end - chunk)
            best = splat(LOWEST)
            for i in range(0, count, 16):
                where = chunk + i
                s = scores(query, keys + where * depth * size, key_scales + 4 * where, depth,
                           values + where * width * size)  # fmt: skip
                if count - i < 16:
                    store(weights + 4 * i, s)
                    for j in range(count - i, 16):
                        put_f32(weights + 4 * (i + j), LOWEST)
                    s = load(weights + 4 * i)
                best = maximum(best, s)
                store(weights + 4 * i, s)
            highest, factor = max_all(best), splat(float32(1))
            if highest > top:
                factor = exp2(splat(top - highest))
                top = highest
                total = total * factor
            for i in range(0, count, 16):
                p = exp2(load(weights + 4 * i) - top)
                total = total + p
                if kind == "int8":
                    p = p * load(value_scales + 4 * (chunk + i))
                store(weights + 4 * i, p)
            step = min(CHUNK, end - chunk - count) * depth * size // (width // (16 * vectors) * count)
            for i in range(0, width, 16 * vectors):
                o = held(out + 4 * i) * factor
                v = values + (chunk * width + i) * size
                ahead = keys + (chunk + count) * depth * size + count * i // (16 * vectors) * step
                for j in range(count):
                    prefetch(ahead, 16 * vectors * size)
                    ahead += step
                    o = fma(load_values(v), spread(weights + 4 * j, 0), o)
                    v += width * size
                store(out + 4 * i, o)
        put_f32(out + 4 * width, top)
        put_f32(out + 4 * width + 4, sum_all(total))

    if kind == "int8":

        @routine
        def prepare(q, n, depth, factor, query):
            """Quantize ``q * factor`` to 16 bits: int32 -128 * sum, float32 scale, int8 [depth] high and low.

            Where `WORDS`, one plane of int16 in the order of `store_fours`: words cost less than bytes times 2 planes.
            """
            top = largest(q, n)
            inverse = float32(32512) / top if top > float32(1e-30) else float32(0)
            total = none_i32()
            for i in range(0, n, 16):
                v = rint(take(q + 4 * i, n - i) * inverse)
                total = total + v
                if WORDS:
                    store_fours(query + 64 + 2 * i, v)
                else:
                    store_bytes(query + 64 + i, sar(v + 128, 8))
            if not WORDS:
                # The planes are `depth` apart, the last vector may be wider: low after high, and all high ones first.
                for i in range(0, n, 16):
                    v = rint(take(q + 4 * i, n - i) * inverse)
                    store_bytes(query + 64 + depth + i, v - shl(sar(v + 128, 8), 8))
            put_i32(query, sum_all(total) * (BYTE_BIAS - 128))
            put_f32(query + 4, top / float32(32512) * factor)

    else:

        @routine
        def prepare(q, n, depth, factor, query):
            for i in range(0, n, 16):
                store(query + 4 * i, take(q + 4 * i, n - i) * factor)

    def attention(args, thread, threads):
        (counters, qkv, tokens, heads, head_dim, start, keys, values, key_scales, value_scales, capacity, depth, width,
         most, out, factor, partial, scratch) = unpack(args, 18)  # fmt: skip
        query = scratch + thread * 16384
        weights, whole, begin = query + 4096, query + 8192, int(get_i32(start))
        record, parts = 4 * (width + 16), most_parts(min(capacity, begin + tokens), most)
        items = tokens * heads * parts
        for turn in range(threads):
            owner = (thread + turn) % threads
            item, last = claim(counters, owner, threads, items, 1)
            while item < last:
                which, part = item // parts, item % parts
                token = which // heads
                head = which - token * heads
                length = min(begin + token + 1, capacity)
                span = part_size(length, most)
                low, high = part * span, min((part + 1) * span, length)
                if low >= high:  # another query has more parts
                    item, last = claim(counters, owner, threads, items, 1)
                    continue
                prepare(qkv + 4 * (token * 3 * heads + head) * head_dim, head_dim, depth, as_f32(factor), query)
                target = whole if length <= span else partial + (which * most + part) * record
                k, v = keys + head * capacity * depth * size, values + head * capacity * width * size
                k_scales, v_scales = key_scales + 4 * head * capacity, value_scales + 4 * head * capacity
                attend(query, k, v, k_scales, v_scales, depth, width, low, high, weights, target)
                if length <= span:
                    merge(target, record, 1, width, head_dim, out + 4 * which * head_dim)
                item, last = claim(counters, owner, threads, items, 1)

    attention.__name__ = f"attention_{kind}_{16 * vectors}"
    return kernel(attention)


@routine
def merge(partial, record, parts, width, head_dim, out):
    """Merge the partial sums of one query and head."""
    top = LOWEST
    for i in range(parts):
        top = max(top, get_f32(partial + i * record + 4 * width))
    total = float32(0)
    for i in range(parts):
        p = partial + i * record + 4 * width
        total += get_f32(p + 4) * weight_of(get_f32(p) - top)
    for c in range(0, head_dim, 16):
        o = none()
        for i in range(parts):
            p = partial + i * record
            o = fma(load(p + 4 * c), exp2(splat(get_f32(p + 4 * width) - top)), o)
        o = o * (float32(1) / total)
        if head_dim - c >= 16:
            store(out + 4 * c, o)
        else:
            store_part(out + 4 * c, o, head_dim - c)


@routine
def weight_of(x):
    return max_all(exp2(splat(x)))


@kernel
def attention_merge(args, thread, threads):
    """Merge the parts of `heads` heads of each query, where there are several."""
    partial, tokens, heads, start, capacity, most, width, head_dim, out = unpack(args, 9)
    record, begin = 4 * (width + 16), int(get_i32(start))
    first, last = share(tokens * heads, thread, threads)
    for item in range(first, last):
        length = min(capacity, begin + item // heads + 1)
        size = part_size(length, most)
        if length > size:
            parts = (length + size - 1) // size
            merge(partial + item * most * record, record, parts, width, head_dim, out + 4 * item * head_dim)


for _kind in ("fp32", "fp16", "int8"):
    for _vectors in (1, 8):
        _make_attention(_kind, _vectors)
