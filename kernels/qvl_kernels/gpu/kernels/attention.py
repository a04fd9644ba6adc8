"""Flash attention (Dao 2023): scores of a tile of queries stay on the chip.

Softmax runs in base 2, so `scale` is multiplied by log2(e) once. `cached_attention` is causal and reads keys and values
from the cache only; `attention` is full or within segments, and reads the outputs of products directly.
"""

import triton
import triton.language as tl

from qvl_kernels.gpu.kernels.common import LOG2_E, as_half, reciprocal, to_half, weigh


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
    scores = tl.dot(q, as_half(keys, INT8))
    if INT8:
        scores *= tl.load(k_scale + rn, mask=rn < end, other=0.0).to(tl.float32)[None, :]
    if MASKED:
        scores = tl.where(rn[None, :] <= position[:, None], scores, float("-inf"))
    weights, shrink, largest, total = weigh(scores, scale, largest, total, False)
    if INT8:
        weights *= tl.load(v_scale + rn, mask=rn < end, other=0.0).to(tl.float32)[None, :]
    if MASKED:
        values = tl.load(v_tile, mask=(rn < end)[:, None] & (rd < width)[None, :], other=0)
    else:
        values = tl.load(v_tile)
    acc = tl.dot(weights.to(tl.float16), as_half(values, INT8), acc * shrink[:, None])
    return acc, largest, total


@triton.jit
def cached_attention(
    qkv, k, v, k_scale, v_scale, start, out, t, heads, kv_heads, capacity, d, scale,
    INT8: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # the longest rows first, for balance
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
    row = (heads + 2 * kv_heads) * width
    # counted from the tile's first row, since offsets from that of a long prompt need not fit int32
    first = (tile * BM).to(tl.int64)
    own = tl.arange(0, BM)[:, None]
    qkv += first * row
    out += first * (heads * width)
    q = tl.load(qkv + own * row + head * width + rd[None, :], mask=mask, other=0.0)
    base = (head // (heads // kv_heads)).to(tl.int64) * capacity
    k += base * width
    v += base * width
    k_scale += base
    v_scale += base
    scale *= LOG2_E
    position = begin + rm
    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, 128), tl.float32)
    # first the keys visible to every query of the tile, then those that need a mask
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
    acc *= reciprocal(total)[:, None]
    tl.store(out + own * (heads * width) + head * width + rd[None, :], to_half(acc), mask=mask)


@triton.jit
def _columns(base, row, seen, width, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Load fp16 [rows, WIDTH]: columns from FIRST on of rows that begin at ``base + row``."""
    column = FIRST + tl.arange(0, WIDTH)
    at = base + row[:, None] + column[None, :]
    if D == 0 or FIRST + WIDTH > D:
        inside = (column < width)[None, :]
        if MASKED:
            tile = tl.load(at, mask=seen[:, None] & inside, other=0.0)
        else:
            tile = tl.load(at, mask=inside, other=0.0)
    elif MASKED:
        tile = tl.load(at, mask=seen[:, None], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _step(
    q0, q1, q2, a0, a1, a2, largest, total, k, v, n0, low, high, k_rows, stride, width, scale,
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr,
    MASKED: tl.constexpr, SEGMENTS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rn = n0 + tl.arange(0, BN)
    seen = rn < k_rows
    row = rn * stride
    scores = tl.dot(q0, tl.trans(_columns(k, row, seen, width, 0, W0, D, MASKED)))
    if W1:
        scores = tl.dot(q1, tl.trans(_columns(k, row, seen, width, W0, W1, D, MASKED)), scores)
    if W2:
        scores = tl.dot(q2, tl.trans(_columns(k, row, seen, width, W0 + W1, W2, D, MASKED)), scores)
    if SEGMENTS:
        scores = tl.where((rn[None, :] >= low[:, None]) & (rn[None, :] < high[:, None]), scores, float("-inf"))
    elif MASKED:
        scores = tl.where(seen[None, :], scores, float("-inf"))
    weights, shrink, largest, total = weigh(scores, scale, largest, total, SEGMENTS)
    weights = weights.to(tl.float16)
    shrink = shrink[:, None]
    a0 = tl.dot(weights, _columns(v, row, seen, width, 0, W0, D, MASKED), a0 * shrink)
    if W1:
        a1 = tl.dot(weights, _columns(v, row, seen, width, W0, W1, D, MASKED), a1 * shrink)
    if W2:
        a2 = tl.dot(weights, _columns(v, row, seen, width, W0 + W1, W2, D, MASKED), a2 * shrink)
    return a0, a1, a2, largest, total


@triton.jit
def attention(
    q, k, v, bounds, out, q_rows, k_rows, heads, parts, d, scale,
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, SEGMENTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute a head in pieces of W0, W1 and W2 columns, to reduce padding: 104 = 64 + 32 + 8."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    head = tl.program_id(1)
    if D == 0:
        width = d
    else:
        width = D
    inside = rm < q_rows
    stride = parts * heads * width
    q += head * parts * width
    k += (head * parts + parts // 2) * width
    v += (head * parts + parts - 1) * width
    scale *= LOG2_E
    q0 = _columns(q, rm * stride, inside, width, 0, W0, D, True)
    q1 = q0
    q2 = q0
    a0 = tl.zeros((BM, W0), tl.float32)
    a1 = 0.0
    a2 = 0.0
    if W1:
        q1 = _columns(q, rm * stride, inside, width, W0, W1, D, True)
        a1 = tl.zeros((BM, W1), tl.float32)
    if W2:
        q2 = _columns(q, rm * stride, inside, width, W0 + W1, W2, D, True)
        a2 = tl.zeros((BM, W2), tl.float32)
    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    first = 0
    last = k_rows
    low = rm
    high = rm
    if SEGMENTS:
        # int32 [2, q_rows]: first visible row and end for each row
        low = tl.load(bounds + rm, mask=inside, other=k_rows)
        high = tl.load(bounds + q_rows + rm, mask=inside, other=0)
        first = tl.min(low, 0) // BN * BN
        last = tl.max(high, 0)
    elif D != 0:
        first = k_rows // BN * BN
        for n0 in range(0, first, BN):
            a0, a1, a2, largest, total = _step(
                q0, q1, q2, a0, a1, a2, largest, total, k, v, n0, low, high, k_rows, stride, width, scale,
                D, W0, W1, W2, False, SEGMENTS, BN,
            )  # fmt: skip
    for n0 in range(first, last, BN):
        a0, a1, a2, largest, total = _step(
            q0, q1, q2, a0, a1, a2, largest, total, k, v, n0, low, high, k_rows, stride, width, scale,
            D, W0, W1, W2, True, SEGMENTS, BN,
        )  # fmt: skip
    factor = reciprocal(total)[:, None]
    out += head * width
    _store(out, a0 * factor, rm * (heads * width), inside, width, 0, W0)
    if W1:
        _store(out, a1 * factor, rm * (heads * width), inside, width, W0, W1)
    if W2:
        _store(out, a2 * factor, rm * (heads * width), inside, width, W0 + W1, W2)


@triton.jit
def _store(out, values, row, inside, width, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    column = FIRST + tl.arange(0, WIDTH)
    mask = inside[:, None] & (column < width)[None, :]
    tl.store(out + row[:, None] + column[None, :], to_half(values), mask=mask)
