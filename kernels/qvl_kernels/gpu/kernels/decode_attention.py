"""Attention of one new token over the cache, each head's positions split between programs (flash decoding).

Memory bound: plain multiplications keep up with it, and int8 keys need not become a dot's operand. The length is read
on the device, so a recorded launch serves every step. The programs of a head meet in `partials`; the last to arrive
merges them, always in the same order.
"""

import triton
import triton.language as tl

from qvl_kernels.gpu.kernels.common import LOG2_E, last_to_arrive, to_half

SPLITS = tl.constexpr(16)


@triton.jit
def _numbers(tile, INT8: tl.constexpr):
    """float32 of fp16 or int8: bytes go into the mantissa of 2^23, which is cheaper than converting them."""
    if INT8:
        bits = (tile.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.int32) | 0x4B000000
        return bits.to(tl.float32, bitcast=True) - 8388736.0
    else:
        return tile.to(tl.float32)


@triton.jit
def decode_attention(
    qkv, k, v, k_scale, v_scale, start, out, partials, counters, heads, capacity, d, scale,
    INT8: tl.constexpr, EXACT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    part = tl.program_id(1)
    rd = tl.arange(0, 128)
    if EXACT:
        width = 128
    else:
        width = d
    in_head = rd < width
    end = tl.load(start) + 1
    share = tl.cdiv(tl.cdiv(end, BN), SPLITS) * BN
    low = part * share
    high = tl.minimum(low + share, end)
    base = head.to(tl.int64) * capacity
    k += base * width
    v += base * width
    q = tl.load(qkv + head * width + rd, mask=in_head, other=0.0).to(tl.float32) * (scale * LOG2_E)
    largest = float("-inf")
    total = 0.0
    acc = tl.zeros((128,), tl.float32)
    for n0 in range(low, high, BN):
        rn = n0 + tl.arange(0, BN)
        seen = rn < high
        mask = seen[:, None] & in_head[None, :]
        keys = tl.load(k + rn[:, None] * width + rd[None, :], mask=mask, other=0)
        values = tl.load(v + rn[:, None] * width + rd[None, :], mask=mask, other=0)
        scores = tl.sum(_numbers(keys, INT8) * q[None, :], 1)
        if INT8:
            scores *= tl.load(k_scale + base + rn, mask=seen, other=0.0).to(tl.float32)
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 0))
        weights = tl.exp2(scores - new)
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(weights, 0)
        if INT8:
            weights *= tl.load(v_scale + base + rn, mask=seen, other=0.0).to(tl.float32)
        acc = acc * shrink + tl.sum(weights[:, None] * _numbers(values, INT8), 0)
        largest = new

    # [heads, SPLITS, 128] sums, then [heads, SPLITS] logarithms (base 2) of their totals; no positions: weight 0
    logs = partials + heads * SPLITS * 128
    slot = head * SPLITS + part
    tl.store(partials + slot * 128 + rd, acc / tl.where(total > 0, total, 1.0))
    tl.store(logs + slot, tl.where(total > 0, largest + tl.log2(total), float("-inf")))
    if last_to_arrive(counters + head, SPLITS):
        slots = head * SPLITS + tl.arange(0, SPLITS)
        log = tl.load(logs + slots, cache_modifier=".cg")
        weight = tl.exp2(log - tl.max(log, 0))
        sums = tl.load(partials + slots[:, None] * 128 + rd[None, :], cache_modifier=".cg")
        merged = tl.sum(sums * weight[:, None], 0) / tl.sum(weight, 0)
        tl.store(out + head * width + rd, to_half(merged), mask=in_head)
