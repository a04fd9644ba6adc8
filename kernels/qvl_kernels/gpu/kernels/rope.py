"""Rotary embedding of q and k, and appending k and v to the cache."""

import triton
import triton.language as tl

from qvl_kernels.gpu.kernels.common import to_half

HEADS = tl.constexpr(8)
HALF = tl.constexpr(64)
ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds a float32 below 2^22 to an integer, halves to even."""


@triton.jit
def _store_int8(base, scales, first, offset, row, half, low, high, mask):
    """One scale a vector, rounded to fp16 before it is used: the rounding of the reference's `quantize_kv`."""
    largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
    scale = to_half(tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32)))
    divisor = tl.where(scale == 0, 1.0, scale.to(tl.float32))[:, None] + tl.zeros(low.shape, tl.float32)
    low = tl.clamp((tl.div_rn(low, divisor) + ROUND) - ROUND, -127.0, 127.0)
    high = tl.clamp((tl.div_rn(high, divisor) + ROUND) - ROUND, -127.0, 127.0)
    tl.store(base + offset, low.to(tl.int8), mask=mask)
    tl.store(base + offset + half, high.to(tl.int8), mask=mask)
    tl.store(scales + row, scale, mask=first)


@triton.jit
def rope_append(qkv, rope, logn, k, v, k_scale, v_scale, start, heads, capacity, d, INT8: tl.constexpr):
    token = tl.program_id(0)
    position = tl.load(start) + token
    half = d // 2
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    first = head < heads
    mask = first[:, None] & (i < half)[None, :]
    cos = tl.load(rope + position * d + i, mask=i < half, other=0.0)[None, :]
    sin = tl.load(rope + position * d + half + i, mask=i < half, other=0.0)[None, :]
    gain = tl.load(logn + position)

    q_low = qkv + token.to(tl.int64) * (3 * heads * d) + head[:, None] * d + i[None, :]
    a = tl.load(q_low, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(q_low + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(q_low, to_half((a * cos - b * sin) * gain), mask=mask)
    tl.store(q_low + half, to_half((b * cos + a * sin) * gain), mask=mask)

    k_low = q_low + heads * d
    a = tl.load(k_low, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(k_low + half, mask=mask, other=0.0).to(tl.float32)
    low = a * cos - b * sin
    high = b * cos + a * sin
    v_low = k_low + heads * d
    row = head.to(tl.int64) * capacity + position
    offset = row[:, None] * d + i[None, :]
    if INT8:
        _store_int8(k, k_scale, first, offset, row, half, low, high, mask)
        low = tl.load(v_low, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(v_low + half, mask=mask, other=0.0).to(tl.float32)
        _store_int8(v, v_scale, first, offset, row, half, low, high, mask)
    else:
        tl.store(k + offset, to_half(low), mask=mask)
        tl.store(k + offset + half, to_half(high), mask=mask)
        tl.store(v + offset, tl.load(v_low, mask=mask), mask=mask)
        tl.store(v + offset + half, tl.load(v_low + half, mask=mask), mask=mask)
