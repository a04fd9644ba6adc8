"""Activations as 16-bit integers in two int8 planes: ``x = scale * (256 high + low)``, one scale per 128 columns.

Planes int8 ``[M, K]`` with K rounded up to 128; for `gemv_words`, instead of both, int16 ``[M, K]``, columns 0, 2, 1, 3
of every four. Scales float32 ``[M, K/128]``, and the sums of the integers over each of the weight's groups, int32
``[M, K/group]``, for the zero points. The normalization before a product is applied, too.
"""

from __future__ import annotations

from numba import float32

from qvl_kernels.cpu.registry import as_f32, kernel, routine, share, unpack
from qvl_kernels.cpu.simd import (
    absolute,
    fma,
    get_f32,
    get_i32,
    loads,
    max_all,
    maximum,
    parts,
    put_f32,
    put_i32,
    rint,
    sar,
    shl,
    store,
    store_bytes,
    store_part,
    sum_all,
    zeros,
)
from qvl_kernels.cpu.simd.pairs import store_fours

load, part = loads("f32", 16), parts(16)
zero, zero_i32 = zeros("f32", 16), zeros("i32", 16)
LIMIT = float32(32512)  # 127 * 256: the high plane never rounds up to 128


@routine
def take(x, count):
    """Load 16 float32, or `count` of them and zeros."""
    if count >= 16:
        return load(x)
    return part(x, count)


@routine
def row_statistics(x, k, layer, eps):
    """Return mean (0 for RMSNorm) and reciprocal deviation of a row."""
    total = zero()
    mean = float32(0)
    if layer:
        for i in range(0, k, 16):
            total = total + take(x + 4 * i, k - i)
        mean = sum_all(total) / float32(k)
        total = zero()
    whole = k // 16 * 16
    for i in range(0, whole, 16):
        v = load(x + 4 * i) - mean
        total = fma(v, v, total)
    square = sum_all(total)
    for i in range(whole, k):
        v = get_f32(x + 4 * i) - mean
        square += v * v
    return mean, float32(1) / (square / float32(k) + eps) ** float32(0.5)


@routine
def normal(x, weight, bias, count, mean, scale):
    """Return 16 normalized values (unchanged if `weight` is 0)."""
    v = take(x, count)
    if weight == 0:
        return v
    v = (v - mean) * scale * take(weight, count)
    if bias != 0:
        v = v + take(bias, count)
    return v


@kernel
def quantize_planes(args, thread, threads):
    x, rows, k, weight, bias, eps, high, low, words, scales, sums, group, scratch = unpack(args, 13)
    blocks = (k + 127) // 128
    scratch += thread * 512
    first, last = share(rows * blocks, thread, threads)
    row, mean, scale = -1, float32(0), float32(1)
    for item in range(first, last):
        if item // blocks != row:
            row = item // blocks
            if weight != 0:
                mean, scale = row_statistics(x + 4 * row * k, k, bias != 0, as_f32(eps))
        column = (item - row * blocks) * 128
        source = 4 * (row * k + column)
        largest = zero()
        for i in range(0, 128, 16):
            if column + i < k:
                o = 4 * (column + i)
                v = normal(
                    x + source + 4 * i,
                    weight + (o if weight != 0 else 0),
                    bias + (o if bias != 0 else 0),
                    k - column - i,
                    mean,
                    scale,
                )
            else:
                v = zero()
            store(scratch + 4 * i, v)
            largest = maximum(largest, absolute(v))
        top = max_all(largest)
        inverse = LIMIT / top if top > float32(1e-30) else float32(0)
        put_f32(scales + 4 * item, top * (float32(1) / LIMIT))
        total, target = zero_i32(), item * 128
        for i in range(0, 128, 16):
            q = rint(load(scratch + 4 * i) * inverse)
            if words:
                store_fours(high + 2 * (target + i), q)
            else:
                h = sar(q + 128, 8)
                store_bytes(high + target + i, h)
                store_bytes(low + target + i, q - shl(h, 8))
            total = total + q
            if (i + 16) % group == 0:
                put_i32(sums + 4 * ((target + i) // group), sum_all(total))
                total = zero_i32()


@kernel
def normalize(args, thread, threads):
    """``out = norm(x)``, float32 ``[rows, k]``."""
    x, rows, k, weight, bias, eps, out = unpack(args, 7)
    first, last = share(rows, thread, threads)
    for row in range(first, last):
        o = 4 * row * k
        mean, scale = row_statistics(x + o, k, bias != 0, as_f32(eps))
        for i in range(0, k, 16):
            v = normal(x + o + 4 * i, weight + 4 * i, bias + (4 * i if bias != 0 else 0), k - i, mean, scale)
            if k - i >= 16:
                store(out + o + 4 * i, v)
            else:
                store_part(out + o + 4 * i, v, k - i)


@kernel
def gather_columns(args, thread, threads):
    """``out[:, j] = x[:, index[j]]``, float32 ``[rows, k]``, index int32."""
    x, rows, k, index, out = unpack(args, 5)
    first, last = share(rows * k, thread, threads)
    for item in range(first, last):
        row = item // k
        source = get_i32(index + 4 * (item - row * k))
        put_f32(out + 4 * item, get_f32(x + 4 * (row * k + source)))
