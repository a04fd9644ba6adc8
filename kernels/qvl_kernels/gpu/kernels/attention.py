"""Flash attention (Dao 2023): scores of a tile of queries never leave the chip.

Softmax runs in base 2, so `scale` is multiplied by log2(e) once. `cached_attention` is causal and reads keys and values
from the cache alone; `attention` sees everything and reads them where the products left them.
"""

import triton
import triton.language as tl

from qvl_kernels.gpu.kernels.common import LOG2_E, to_half


@triton.jit
def _weigh(scores, largest, total):
    """One step of the running softmax: weights of these keys, and what the sums so far must be scaled by."""
    new = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp2(scores - new[:, None])
    shrink = tl.exp2(largest - new)
    return weights, shrink, new, total * shrink + tl.sum(weights, 1)


@triton.jit
def _half(tile, INT8: tl.constexpr):
    """fp16 of fp16 or int8: bytes go into the mantissa of 1024, which is cheaper than converting them."""
    if INT8:
        bits = (tile.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.int16) | 0x6400
        return bits.to(tl.float16, bitcast=True) - 1152.0
    else:
        return tile


@triton.jit
def _cached_step(
    q, acc, largest, total, k, v, k_scale, v_scale, n0, position, end, rd, width, scale,
    MASKED: tl.constexpr, INT8: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rn = n0 + tl.arange(0, BN)
    k_tile = k + rn[None, :] * width + rd[:, None]
    v_tile = v + rn[:, None] * width + rd[None, :]
    if MASKED:
        keys = tl.load(k_tile, mask=(rn < end)[None, :] & (rd < width)[:, None], other=0)
    else:
        keys = tl.load(k_tile)
    scores = tl.dot(q, _half(keys, INT8)) * scale
    if INT8:
        scores *= tl.load(k_scale + rn, mask=rn < end, other=0.0).to(tl.float32)[None, :]
    if MASKED:
        scores = tl.where(rn[None, :] <= position[:, None], scores, float("-inf"))
    weights, shrink, largest, total = _weigh(scores, largest, total)
    if INT8:
        weights *= tl.load(v_scale + rn, mask=rn < end, other=0.0).to(tl.float32)[None, :]
    if MASKED:
        values = tl.load(v_tile, mask=(rn < end)[:, None] & (rd < width)[None, :], other=0)
    else:
        values = tl.load(v_tile)
    acc = tl.dot(weights.to(tl.float16), _half(values, INT8), acc * shrink[:, None])
    return acc, largest, total


@triton.jit
def cached_attention(
    qkv, k, v, k_scale, v_scale, start, out, t, heads, capacity, d, scale,
    INT8: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # the longest rows first: short ones fill the gaps at the end
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    rm = tile * BM + tl.arange(0, BM)
    rd = tl.arange(0, 128)
    if EXACT:
        width = 128
    else:
        width = d
    begin = tl.load(start)
    end = begin + t
    mask = (rm < t)[:, None] & (rd < width)[None, :]
    q = tl.load(qkv + rm[:, None] * (3 * heads * width) + head * width + rd[None, :], mask=mask, other=0.0)
    base = head.to(tl.int64) * capacity
    k += base * width
    v += base * width
    k_scale += base
    v_scale += base
    scale *= LOG2_E
    position = begin + rm
    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, 128), tl.float32)
    # first the keys that every query of the tile sees, then those that need a mask
    n_open = 0
    if EXACT:
        n_open = (begin + tile * BM + 1) // BN * BN
        for n0 in range(0, n_open, BN):
            acc, largest, total = _cached_step(
                q, acc, largest, total, k, v, k_scale, v_scale, n0, position, end, rd, width, scale, False, INT8, BN
            )
    for n0 in range(n_open, tl.minimum(end, begin + (tile + 1) * BM), BN):
        acc, largest, total = _cached_step(
            q, acc, largest, total, k, v, k_scale, v_scale, n0, position, end, rd, width, scale, True, INT8, BN
        )
    tl.store(out + rm[:, None] * (heads * width) + head * width + rd[None, :], to_half(acc / total[:, None]), mask=mask)


@triton.jit
def attention(
    q, k, v, out, q_rows, k_rows, heads, parts, d, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    if D == 104:
        _attention_104(q, k, v, out, q_rows, k_rows, heads, parts, scale, BM, BN)
    else:
        _attention_128(q, k, v, out, q_rows, k_rows, heads, parts, d, scale, D, BM, BN)


@triton.jit
def _step_128(
    tile, acc, largest, total, k, v, n0, k_rows, stride, rd, in_head, scale,
    MASKED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rn = n0 + tl.arange(0, BN)
    k_tile = k + rn[None, :] * stride + rd[:, None]
    v_tile = v + rn[:, None] * stride + rd[None, :]
    seen = rn < k_rows
    if MASKED:
        keys = tl.load(k_tile, mask=seen[None, :] & in_head[:, None], other=0.0)
    else:
        keys = tl.load(k_tile)
    scores = tl.dot(tile, keys) * scale
    if MASKED:
        scores = tl.where(seen[None, :], scores, float("-inf"))
    weights, shrink, largest, total = _weigh(scores, largest, total)
    if MASKED:
        values = tl.load(v_tile, mask=seen[:, None] & in_head[None, :], other=0.0)
    else:
        values = tl.load(v_tile)
    acc = tl.dot(weights.to(tl.float16), values, acc * shrink[:, None])
    return acc, largest, total


@triton.jit
def _attention_128(
    q, k, v, out, q_rows, k_rows, heads, parts, d, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    head = tl.program_id(1)
    rd = tl.arange(0, 128)
    if D == 0:
        width = d
    else:
        width = D
    in_head = rd < width
    mask = (rm < q_rows)[:, None] & in_head[None, :]
    stride = parts * heads * width
    tile = tl.load(q + head * parts * width + rm[:, None] * stride + rd[None, :], mask=mask, other=0.0)
    k += head * parts * width
    v += head * parts * width
    scale *= LOG2_E
    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, 128), tl.float32)
    whole = 0
    if D != 0:
        whole = k_rows // BN * BN
        for n0 in range(0, whole, BN):
            acc, largest, total = _step_128(
                tile, acc, largest, total, k, v, n0, k_rows, stride, rd, in_head, scale, False, BN
            )
    for n0 in range(whole, k_rows, BN):
        acc, largest, total = _step_128(
            tile, acc, largest, total, k, v, n0, k_rows, stride, rd, in_head, scale, True, BN
        )
    tl.store(out + rm[:, None] * (heads * width) + head * width + rd[None, :], to_half(acc / total[:, None]), mask=mask)


@triton.jit
def _step_104(
    q0, q1, q2, a0, a1, a2, largest, total, k, v, n0, k_rows, stride, scale, MASKED: tl.constexpr, BN: tl.constexpr
):
    r0 = tl.arange(0, 64)
    r1 = 64 + tl.arange(0, 32)
    r2 = 96 + tl.arange(0, 16)
    m2 = r2 < 104
    rn = n0 + tl.arange(0, BN)
    seen = rn < k_rows
    k_row = k + rn[None, :] * stride
    v_row = v + rn[:, None] * stride
    if MASKED:
        scores = tl.dot(q0, tl.load(k_row + r0[:, None], mask=seen[None, :], other=0.0))
        scores = tl.dot(q1, tl.load(k_row + r1[:, None], mask=seen[None, :], other=0.0), scores)
        scores = tl.dot(q2, tl.load(k_row + r2[:, None], mask=seen[None, :] & m2[:, None], other=0.0), scores)
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
    else:
        scores = tl.dot(q0, tl.load(k_row + r0[:, None]))
        scores = tl.dot(q1, tl.load(k_row + r1[:, None]), scores)
        scores = tl.dot(q2, tl.load(k_row + r2[:, None], mask=m2[:, None], other=0.0), scores) * scale
    weights, shrink, largest, total = _weigh(scores, largest, total)
    weights = weights.to(tl.float16)
    shrink = shrink[:, None]
    if MASKED:
        a0 = tl.dot(weights, tl.load(v_row + r0[None, :], mask=seen[:, None], other=0.0), a0 * shrink)
        a1 = tl.dot(weights, tl.load(v_row + r1[None, :], mask=seen[:, None], other=0.0), a1 * shrink)
        a2 = tl.dot(weights, tl.load(v_row + r2[None, :], mask=seen[:, None] & m2[None, :], other=0.0), a2 * shrink)
    else:
        a0 = tl.dot(weights, tl.load(v_row + r0[None, :]), a0 * shrink)
        a1 = tl.dot(weights, tl.load(v_row + r1[None, :]), a1 * shrink)
        a2 = tl.dot(weights, tl.load(v_row + r2[None, :], mask=m2[None, :], other=0.0), a2 * shrink)
    return a0, a1, a2, largest, total


@triton.jit
def _attention_104(q, k, v, out, q_rows, k_rows, heads, parts, scale, BM: tl.constexpr, BN: tl.constexpr):
    """104 = 64 + 32 + 8: the last piece padded to 16, instead of everything to 128."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    head = tl.program_id(1)
    r0 = tl.arange(0, 64)
    r1 = 64 + tl.arange(0, 32)
    r2 = 96 + tl.arange(0, 16)
    m2 = (r2 < 104)[None, :]
    mask = (rm < q_rows)[:, None]
    stride = parts * heads * 104
    q_row = q + head * parts * 104 + rm[:, None] * stride
    q0 = tl.load(q_row + r0[None, :], mask=mask, other=0.0)
    q1 = tl.load(q_row + r1[None, :], mask=mask, other=0.0)
    q2 = tl.load(q_row + r2[None, :], mask=mask & m2, other=0.0)
    k += head * parts * 104
    v += head * parts * 104
    scale *= LOG2_E
    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    a0 = tl.zeros((BM, 64), tl.float32)
    a1 = tl.zeros((BM, 32), tl.float32)
    a2 = tl.zeros((BM, 16), tl.float32)
    whole = k_rows // BN * BN
    for n0 in range(0, whole, BN):
        a0, a1, a2, largest, total = _step_104(
            q0, q1, q2, a0, a1, a2, largest, total, k, v, n0, k_rows, stride, scale, False, BN
        )
    if whole < k_rows:
        a0, a1, a2, largest, total = _step_104(
            q0, q1, q2, a0, a1, a2, largest, total, k, v, whole, k_rows, stride, scale, True, BN
        )
    factor = 1.0 / total[:, None]
    out_row = out + head * 104 + rm[:, None] * (heads * 104)
    tl.store(out_row + r0[None, :], to_half(a0 * factor), mask=mask)
    tl.store(out_row + r1[None, :], to_half(a1 * factor), mask=mask)
    tl.store(out_row + r2[None, :], to_half(a2 * factor), mask=mask & m2)
