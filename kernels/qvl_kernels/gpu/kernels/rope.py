"""Norm and rotary embedding of q and k, appending k and v to the cache, and rotation of patches."""

import triton
import triton.language as tl

from qvl_kernels.gpu.kernels.common import K_NORM, LOGN, Q_NORM, given_or_listed, to_half

HEADS = tl.constexpr(8)
HALF = tl.constexpr(64)
ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds a float32 below 2^22 to an integer, ties to even."""


@triton.jit
def _store_int8(base, scales, first, offset, row, half, low, high, mask):
    """Store int8 with one scale per vector, rounded to fp16 first as in the reference's `quantize_kv`."""
    largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
    scale = to_half(tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32)))
    divisor = tl.where(scale == 0, 1.0, scale.to(tl.float32))[:, None] + tl.zeros(low.shape, tl.float32)
    low = tl.clamp((tl.div_rn(low, divisor) + ROUND) - ROUND, -127.0, 127.0)
    high = tl.clamp((tl.div_rn(high, divisor) + ROUND) - ROUND, -127.0, 127.0)
    tl.store(base + offset, low.to(tl.int8), mask=mask)
    tl.store(base + offset + half, high.to(tl.int8), mask=mask)
    tl.store(scales + row, scale, mask=first)


@triton.jit
def _angles(rope, position, d):
    """Load cosines and sines [1, HALF] of a row of the table."""
    half = d // 2
    i = tl.arange(0, HALF)
    cos = tl.load(rope + position * d + i, mask=i < half, other=0.0)
    sin = tl.load(rope + position * d + half + i, mask=i < half, other=0.0)
    return cos[None, :], sin[None, :]


@triton.jit
def _factor(a, b, d, eps):
    """Return the RMSNorm factor of each head, [HEADS, 1]."""
    return tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / d + eps)[:, None]


@triton.jit
def _weighted(a, b, factor, weight, half, normed):
    """Normalize the heads selected by `normed`, [HEADS, 1]."""
    i = tl.arange(0, HALF)
    low = tl.load(weight + i, mask=i < half, other=0.0)[None, :]
    high = tl.load(weight + half + i, mask=i < half, other=0.0)[None, :]
    return tl.where(normed, a * factor * low, a), tl.where(normed, b * factor * high, b)


@triton.jit
def rotated(
    qkv, rope, logn, q_norm, k_norm, token, position, head, heads, kv_heads, d, q_eps, k_eps, flags,
):  # fmt: skip
    """Where some heads of a row begin, of queries, then of keys, as they lie there; halves of them; a factor for q."""
    half = d // 2
    i = tl.arange(0, HALF)
    is_q = head < heads
    is_k = (head >= heads) & (head < heads + kv_heads)
    at = qkv + token.to(tl.int64) * ((heads + 2 * kv_heads) * d) + head[:, None] * d + i[None, :]
    mask = (is_q | is_k)[:, None] & (i < half)[None, :]
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + half, mask=mask, other=0.0).to(tl.float32)
    if flags & (Q_NORM | K_NORM):
        factor = _factor(a, b, d, tl.where(is_q, q_eps, k_eps))
        if flags & Q_NORM:
            a, b = _weighted(a, b, factor, q_norm, half, is_q[:, None])
        if flags & K_NORM:
            a, b = _weighted(a, b, factor, k_norm, half, is_k[:, None])
    cos, sin = _angles(rope, position, d)
    low = a * cos - b * sin
    high = b * cos + a * sin
    gain = 1.0
    if flags & LOGN:
        gain = tl.load(logn + position)
    return at, low, high, gain


@triton.jit
def append(
    at, low, high, k, v, k_scale, v_scale, chosen, kv_head, position, kv_heads, capacity, d, INT8: tl.constexpr
):  # fmt: skip
    """Put rotated heads of keys that are `chosen`, and the values that belong to them, into the cache."""
    half = d // 2
    i = tl.arange(0, HALF)
    mask = chosen[:, None] & (i < half)[None, :]
    row = kv_head.to(tl.int64) * capacity + position
    offset = row[:, None] * d + i[None, :]
    v_at = at + kv_heads * d
    if INT8:
        _store_int8(k, k_scale, chosen, offset, row, half, low, high, mask)
        low = tl.load(v_at, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(v_at + half, mask=mask, other=0.0).to(tl.float32)
        _store_int8(v, v_scale, chosen, offset, row, half, low, high, mask)
    else:
        tl.store(k + offset, to_half(low), mask=mask)
        tl.store(k + offset + half, to_half(high), mask=mask)
        tl.store(v + offset, tl.load(v_at, mask=mask), mask=mask)
        tl.store(v + offset + half, tl.load(v_at + half, mask=mask), mask=mask)


@triton.jit
def rope_append(
    qkv, rope, logn, q_norm, k_norm, k, v, k_scale, v_scale, start, entry, heads, kv_heads, capacity, d, q_eps, k_eps,
    flags, INT8: tl.constexpr,
):  # fmt: skip
    k, v, k_scale, v_scale, start, rope, logn, capacity = given_or_listed(
        k, v, k_scale, v_scale, start, rope, logn, capacity, entry, flags, INT8
    )
    token = tl.program_id(0)
    position = tl.load(start) + token
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at, low, high, gain = rotated(
        qkv, rope, logn, q_norm, k_norm, token, position, head, heads, kv_heads, d, q_eps, k_eps, flags
    )
    i = tl.arange(0, HALF)
    q_mask = (head < heads)[:, None] & (i < d // 2)[None, :]
    tl.store(at, to_half(low * gain), mask=q_mask)
    tl.store(at + d // 2, to_half(high * gain), mask=q_mask)
    is_k = (head >= heads) & (head < heads + kv_heads)
    append(at, low, high, k, v, k_scale, v_scale, is_k, head - heads, position, kv_heads, capacity, d, INT8)


@triton.jit
def rotate(qkv, rope, heads, d):
    """Rotate q and k of patches in place; q, k and v of a head are adjacent."""
    row = tl.program_id(0)
    half = d // 2
    part = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    mask = (part < 2 * heads)[:, None] & (i < half)[None, :]
    at = qkv + row.to(tl.int64) * (3 * heads * d) + (part // 2 * 3 + part % 2)[:, None] * d + i[None, :]
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + half, mask=mask, other=0.0).to(tl.float32)
    cos, sin = _angles(rope, row, d)
    tl.store(at, to_half(a * cos - b * sin), mask=mask)
    tl.store(at + half, to_half(b * cos + a * sin), mask=mask)
