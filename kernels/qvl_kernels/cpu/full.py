"""Attention of every query over every key (vision and adapter), a query and head at a time."""

from __future__ import annotations

from numba import float32

from qvl_kernels.cpu.quantize import take
from qvl_kernels.cpu.registry import as_f32, kernel, share, unpack
from qvl_kernels.cpu.simd import exp2, fma, get_f32, max_all, put_f32, splats, store, store_part, sum_all, zeros

none, splat = zeros("f32", 16), splats("f32", 16)


@kernel
def full_attention(args, thread, threads):
    """Row strides count float32: q, k and v of a head lie `q_head`, `k_head`, `k_head` apart. `factor`: the scale."""
    (q, q_stride, k, v, k_stride, q_head, k_head, queries, keys, heads, d, out, factor, scratch) = unpack(args, 14)
    scratch += thread * 4 * (keys + 16)
    first, last = share(queries * heads, thread, threads)
    for item in range(first, last):
        head, query = item // queries, item % queries
        x, top = q + 4 * (query * q_stride + head * q_head), float32(-1e30)
        for i in range(keys):
            s, y = none(), k + 4 * (i * k_stride + head * k_head)
            for c in range(0, d, 16):
                s = fma(take(x + 4 * c, d - c), take(y + 4 * c, d - c), s)
            score = sum_all(s) * as_f32(factor)
            put_f32(scratch + 4 * i, score)
            top = max(top, score)
        total = float32(0)
        for i in range(keys):
            p = max_all(exp2(splat(get_f32(scratch + 4 * i) - top)))
            put_f32(scratch + 4 * i, p)
            total += p
        target = out + 4 * (query * heads + head) * d
        for c in range(0, d, 16):
            o = none()
            for i in range(keys):
                y = v + 4 * (i * k_stride + head * k_head + c)
                o = fma(take(y, d - c), splat(get_f32(scratch + 4 * i)), o)
            o = o * (float32(1) / total)
            if d - c >= 16:
                store(target + 4 * c, o)
            else:
                store_part(target + 4 * c, o, d - c)
