"""Selection of the next token on the device."""

import triton
import triton.language as tl

from qvl_kernels.gpu.kernels.common import last_to_arrive

PARTS = tl.constexpr(64)
CHUNK = tl.constexpr(1024)
NOWHERE = tl.constexpr(2147483647)


@triton.jit
def argmax(logits, out, values, indices, counters, size):
    """Find the first of the largest values in each program's part of a row; the last program compares the parts.

    NaN counts as infinity, and the result of a row with infinity is -1.
    """
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    share = tl.cdiv(size, PARTS)
    low = part * share
    high = tl.minimum(low + share, size)
    best = tl.full((CHUNK,), float("-inf"), tl.float32)
    where = tl.full((CHUNK,), NOWHERE, tl.int32)
    for first in range(low, high, CHUNK):
        i = first + tl.arange(0, CHUNK)
        value = tl.load(logits + row * size + i, mask=i < high, other=float("-inf"))
        value = tl.where((i >= high) | (tl.abs(value) < float("inf")), value, float("inf"))
        better = value > best
        best = tl.where(better, value, best)
        where = tl.where(better, i, where)
    _store_first(best, where, values + row * PARTS + part, indices + row * PARTS + part)
    if last_to_arrive(counters + row, PARTS):
        parts = row * PARTS + tl.arange(0, PARTS)
        bests = tl.load(values + parts, cache_modifier=".cg")
        largest = tl.max(bests, 0)
        first = tl.min(tl.where(bests == largest, tl.load(indices + parts, cache_modifier=".cg"), NOWHERE), 0)
        tl.store(out + row, tl.where(largest < float("inf"), first, -1))


@triton.jit
def _store_first(best, where, value, index):
    largest = tl.max(best, 0)
    tl.store(value, largest)
    tl.store(index, tl.min(tl.where(best == largest, where, NOWHERE), 0))
