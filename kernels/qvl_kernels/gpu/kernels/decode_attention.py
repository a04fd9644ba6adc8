"""Attention of a few new tokens over the cache, with positions split among programs (flash decoding).

The queries of one head of keys, of all tokens and all heads of its group, are the rows of one tile: each key is read
once. The length is read on the device, so a captured launch serves every step. The programs of a tile write `partials`;
the last one merges them in a fixed order.
"""

import triton
import triton.language as tl

from qvl_kernels.gpu.kernels.common import LOG2_E, ROPE, as_half, last_to_arrive, to_half, weigh
from qvl_kernels.gpu.kernels.rope import append, rotated

MOST_SPLITS = tl.constexpr(32)


@triton.jit
def decode_attention(
    qkv, k, v, k_scale, v_scale, start, out, partials, counters, rope, logn, q_norm, k_norm,
    t, heads, kv_heads, capacity, d, scale, q_eps, k_eps, flags,
    INT8: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    part = tl.program_id(1)
    group = heads // kv_heads
    tiles = tl.cdiv(t * group, BM)
    kv_head = tile // tiles
    # a row of the tile is a token and one of the heads of its group
    row = tile % tiles * BM + tl.arange(0, BM)
    token = row // group
    head = kv_head * group + row % group
    inside = row < t * group
    rd = tl.arange(0, 128)
    if EXACT:
        width = 128
    else:
        width = d
    in_head = rd < width
    mask = inside[:, None] & in_head[None, :]
    begin = tl.load(start)
    end = begin + t
    position = begin + token
    splits = tl.num_programs(1)
    share = tl.cdiv(tl.cdiv(end, BN), splits) * BN
    low = part * share
    high = tl.minimum(low + share, end)
    slot = (kv_head * (t * group) + row) * splits
    if flags & ROPE:
        # of one token: every program rotates the queries for itself, one of them appends
        which = tl.where(row < group, head, tl.where(row == group, heads + kv_head, heads + kv_heads))
        at, first, second, gain = rotated(
            qkv, rope, logn, q_norm, k_norm, begin - begin, begin, which, heads, kv_heads, width, q_eps, k_eps, flags
        )
        chosen = (row == group) & (low <= begin) & (begin < high)
        append(at, first, second, k, v, k_scale, v_scale, chosen, which - heads, begin, kv_heads, capacity, width, INT8)
        # the queries pass through the part of `partials` that is this program's own
        own = partials.to(tl.pointer_type(tl.float16)) + (slot + part)[:, None] * 256
        half = width // 2
        i = tl.arange(0, 64)
        q_mask = inside[:, None] & (i < half)[None, :]
        tl.store(own + i[None, :], to_half(first * gain), mask=q_mask)
        tl.store(own + half + i[None, :], to_half(second * gain), mask=q_mask)
        tl.debug_barrier()
        q = tl.load(own + rd[None, :], mask=mask, other=0.0)
    else:
        q_at = token * ((heads + 2 * kv_heads) * width) + head * width
        q = tl.load(qkv + q_at[:, None] + rd[None, :], mask=mask, other=0.0)
    base = kv_head.to(tl.int64) * capacity
    k += base * width
    v += base * width
    scale *= LOG2_E
    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, 128), tl.float32)
    for n0 in range(low, high, BN):
        rn = n0 + tl.arange(0, BN)
        seen = rn < high
        tile_mask = seen[:, None] & in_head[None, :]
        keys = tl.load(k + rn[:, None] * width + rd[None, :], mask=tile_mask, other=0)
        values = tl.load(v + rn[:, None] * width + rd[None, :], mask=tile_mask, other=0)
        scores = tl.dot(q, tl.trans(as_half(keys, INT8))) * scale
        if INT8:
            scores *= tl.load(k_scale + base + rn, mask=seen, other=0.0).to(tl.float32)[None, :]
        scores = tl.where(seen[None, :] & (rn[None, :] <= position[:, None]), scores, float("-inf"))
        weights, shrink, largest, total = weigh(scores, largest, total, True)
        if INT8:
            weights *= tl.load(v_scale + base + rn, mask=seen, other=0.0).to(tl.float32)[None, :]
        acc = tl.dot(weights.to(tl.float16), as_half(values, INT8), acc * shrink[:, None])

    # [t * heads, splits, 128] sums, then [t * heads, splits] logarithms (base 2) of their totals
    logs = partials + t * heads * (splits * 128)
    share_of = tl.where(total > 0, total, 1.0)
    tl.store(partials + (slot + part)[:, None] * 128 + rd[None, :], acc / share_of[:, None], mask=inside[:, None])
    tl.store(logs + slot + part, tl.where(total > 0, largest + tl.log2(share_of), float("-inf")), mask=inside)
    if last_to_arrive(counters + tile, splits):
        every = tl.arange(0, MOST_SPLITS)
        there = inside[:, None] & (every < splits)[None, :]
        log = tl.load(logs + slot[:, None] + every[None, :], mask=there, other=float("-inf"), cache_modifier=".cg")
        most = tl.where(inside, tl.max(log, 1), 0.0)
        merged = tl.zeros((BM, 128), tl.float32)
        weight = tl.zeros((BM,), tl.float32)
        for i in range(splits):
            this = tl.exp2(tl.load(logs + slot + i, mask=inside, other=0.0, cache_modifier=".cg") - most)
            at = partials + (slot + i)[:, None] * 128 + rd[None, :]
            merged += tl.load(at, mask=inside[:, None], other=0.0, cache_modifier=".cg") * this[:, None]
            weight += this
        tl.store(
            out + (token * heads + head)[:, None] * width + rd[None, :], to_half(merged / weight[:, None]), mask=mask
        )
