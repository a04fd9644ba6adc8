"""Attention of a few new tokens over the cache, with positions split among programs (flash decoding).

The queries of one head of keys, of all tokens and all heads of its group, are the rows of one tile: each key is read
once. The length is read on the device, so a captured launch serves every step. The programs of a tile take tiles of
positions in turns and write `partials`; the last one merges them in a fixed order. Which program has a position does
not depend on the length: a token gets the same bits whatever tokens come after it.

One launch serves sequences with equally many tokens, whose rows and entries of the table follow each other.
"""

import triton
import triton.language as tl

from qvl_kernels.gpu.kernels.common import (
    ENTRY,
    LOG2_E,
    ROPE,
    as_half,
    exp2,
    given_or_listed,
    last_to_arrive,
    reciprocal,
    to_half,
    weigh,
)
from qvl_kernels.gpu.kernels.rope import append, rotated

MOST_SPLITS = tl.constexpr(16)
MERGED = tl.constexpr(4)
"""Rows that are merged at once: all that is read for them is on its way at the same time."""


@triton.jit
def _merge(partials, logs, first, count, out, head, heads, group, width, splits):
    """Weigh the parts of MERGED rows from row `first` of `count` on, and store them.

    In `partials` and `logs` the rows of this head of keys lie side by side; `head` is the first of its group.
    """
    row = first + tl.arange(0, MERGED)
    rd = tl.arange(0, 128)
    part = tl.arange(0, MOST_SPLITS)
    inside = row < count
    slot = row[:, None] * splits + part[None, :]
    there = inside[:, None] & (part < splits)[None, :]
    log = tl.load(logs + slot, mask=there, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(
        partials + slot[:, :, None] * 128 + rd[None, None, :], mask=there[:, :, None], other=0.0, cache_modifier=".cg"
    )
    weight = exp2(log - tl.where(inside, tl.max(log, 1), 0.0)[:, None])
    merged = tl.sum(sums * weight[:, :, None], 1) / tl.sum(weight, 1)[:, None]
    at = (row // group * heads + head + row % group) * width
    tl.store(out + at[:, None] + rd[None, :], to_half(merged), mask=inside[:, None] & (rd < width)[None, :])


@triton.jit
def decode_attention(
    qkv, k, v, k_scale, v_scale, start, entry, out, partials, counters, rope, logn, q_norm, k_norm,
    t, heads, kv_heads, capacity, d, scale, q_eps, k_eps, flags,
    INT8: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    group = heads // kv_heads
    tiles = tl.cdiv(t * group, BM)
    tile = tl.program_id(0) % (kv_heads * tiles)
    sequence = tl.program_id(0) // (kv_heads * tiles)
    k, v, k_scale, v_scale, start, rope, logn, capacity = given_or_listed(
        k, v, k_scale, v_scale, start, rope, logn, capacity, entry + sequence * ENTRY, flags, INT8
    )
    part = tl.program_id(1)
    kv_head = tile // tiles
    # a row of the tile is a token and one of the heads of its group
    row = tile % tiles * BM + tl.arange(0, BM)
    token = row // group
    head = kv_head * group + row % group
    inside = row < t * group
    rd = tl.arange(0, 128)
    # queries and keys are in registers as two halves of 64, the way rotation leaves them
    if EXACT:
        width = 128
        rk = rd
        in_key = rd < width
    else:
        width = d
        rk = rd % 64 + rd // 64 * (width // 2)
        in_key = rd % 64 < width // 2
    in_head = rd < width
    begin = tl.load(start)
    end = begin + t
    position = begin + token
    splits = tl.num_programs(1)
    qkv += sequence * t * ((heads + 2 * kv_heads) * width)
    out += sequence * t * (heads * width)
    first_slot = sequence * t * heads * splits
    slot = first_slot + (kv_head * (t * group) + row) * splits
    if flags & ROPE:
        # of one token: every program rotates the queries for itself, one of them appends
        which = tl.where(row < group, head, tl.where(row == group, heads + kv_head, heads + kv_heads))
        at, first, second, gain = rotated(
            qkv, rope, logn, q_norm, k_norm, begin - begin, begin, which, heads, kv_heads, width, q_eps, k_eps, flags
        )
        chosen = (row == group) & (begin // BN % splits == part)
        append(at, first, second, k, v, k_scale, v_scale, chosen, which - heads, begin, kv_heads, capacity, width, INT8)
        q = tl.reshape(tl.permute(tl.join(to_half(first * gain), to_half(second * gain)), (0, 2, 1)), (BM, 128))
        tl.debug_barrier()
    else:
        q_at = token * ((heads + 2 * kv_heads) * width) + head * width
        q = tl.load(qkv + q_at[:, None] + rk[None, :], mask=inside[:, None] & in_key[None, :], other=0.0)
    base = kv_head.to(tl.int64) * capacity
    k += base * width
    v += base * width
    scale *= LOG2_E
    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, 128), tl.float32)
    for n0 in range(part * BN, end, splits * BN):
        rn = n0 + tl.arange(0, BN)
        seen = rn < end
        keys = tl.load(k + rn[:, None] * width + rk[None, :], mask=seen[:, None] & in_key[None, :], other=0)
        values = tl.load(v + rn[:, None] * width + rd[None, :], mask=seen[:, None] & in_head[None, :], other=0)
        scores = tl.dot(q, tl.trans(as_half(keys, INT8)))
        if INT8:
            scores *= tl.load(k_scale + base + rn, mask=seen, other=0.0).to(tl.float32)[None, :]
        scores = tl.where(seen[None, :] & (rn[None, :] <= position[:, None]), scores, float("-inf"))
        weights, shrink, largest, total = weigh(scores, scale, largest, total, True)
        if INT8:
            weights *= tl.load(v_scale + base + rn, mask=seen, other=0.0).to(tl.float32)[None, :]
        acc = tl.dot(weights.to(tl.float16), as_half(values, INT8), acc * shrink[:, None])

    # [rows * heads, splits, 128] sums, then [rows * heads, splits] logarithms (base 2) of their totals
    logs = partials + tl.num_programs(0) // (kv_heads * tiles) * t * heads * (splits * 128)
    divisor = tl.where(total > 0, total, 1.0)
    acc *= reciprocal(divisor)[:, None]
    tl.store(partials + (slot + part)[:, None] * 128 + rd[None, :], acc, mask=inside[:, None])
    tl.store(logs + slot + part, tl.where(total > 0, largest + tl.log2(divisor), float("-inf")), mask=inside)
    if last_to_arrive(counters + tl.program_id(0), splits):
        rows = t * group
        at = first_slot + kv_head * rows * splits
        for first_row in range(tile % tiles * BM, tl.minimum(tile % tiles * BM + BM, rows), MERGED):
            _merge(partials + at * 128, logs + at, first_row, rows, out, kv_head * group, heads, group, width, splits)
