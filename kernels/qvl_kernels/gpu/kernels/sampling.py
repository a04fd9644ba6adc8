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


@triton.jit
def _keys(x):
    """Map floats to int32 keys of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _mass(logits, size, key, best, sharpness, COUNT: tl.constexpr):
    """Return the sum of unnormalized probabilities (or the number) of logits from `key` up."""
    total = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, size, CHUNK):
        i = first + tl.arange(0, CHUNK)
        x = tl.load(logits + i, mask=i < size, other=float("-inf"))
        if COUNT:
            weight = 1.0
        else:
            weight = tl.exp((x - best) * sharpness)
        total += tl.where((i < size) & (_keys(x) >= key), weight, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _threshold(logits, size, low, best, sharpness, wanted, COUNT: tl.constexpr):
    """Find the highest key from which up the mass exceeds `wanted`, by bisection from `low`, where it does."""
    high = _keys(best) + 1
    while high - 1 > low:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        if _mass(logits, size, middle, best, sharpness, COUNT) > wanted:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def sample(logits, settings, top_k, out, size):
    """Sample as `qvl_runtime.engine.sampling.Sampler` does, without sorting: thresholds are found by bisection.

    Candidates are the tokens above the threshold and, in order, as many at it as top_p needs. The draw accumulates
    their mass in index order until it exceeds the random number's share.
    """
    sharpness = 1.0 / tl.maximum(tl.load(settings), 1e-6)
    top_p = tl.load(settings + 1)
    k = tl.load(top_k)
    best = tl.full((CHUNK,), float("-inf"), tl.float32)
    for first in range(0, size, CHUNK):
        i = first + tl.arange(0, CHUNK)
        best = tl.maximum(best, tl.load(logits + i, mask=i < size, other=float("-inf")))
    best = tl.max(best, 0)

    threshold = -2139095041  # the key of minus infinity
    if (k > 0) & (k < size):
        threshold = _threshold(logits, size, threshold, best, sharpness, k.to(tl.float32) - 0.5, True)
    total = _mass(logits, size, threshold, best, sharpness, False)
    ties = 2147483647.0
    if top_p < 1.0:
        wanted = top_p * total
        threshold = _threshold(logits, size, threshold, best, sharpness, wanted, False)
        above = _mass(logits, size, threshold + 1, best, sharpness, False)
        tie = tl.exp((_float(threshold) - best) * sharpness)
        count = _mass(logits, size, threshold, best, sharpness, True)
        count -= _mass(logits, size, threshold + 1, best, sharpness, True)
        ties = tl.minimum(tl.floor((wanted - above) / tie) + 1.0, count)
        total = above + ties * tie

    target = tl.load(settings + 2) * total
    passed = 0.0
    seen = 0.0
    chosen = NOWHERE
    last = 0
    for first in range(0, size, CHUNK):
        i = first + tl.arange(0, CHUNK)
        x = tl.load(logits + i, mask=i < size, other=float("-inf"))
        key = tl.where(i < size, _keys(x), -2147483648)
        at = (key == threshold).to(tl.float32)
        kept = (key > threshold) | ((at > 0) & (seen + tl.cumsum(at, 0) <= ties))
        weight = tl.where(kept, tl.exp((x - best) * sharpness), 0.0)
        kept = kept & (weight > 0)
        mass = passed + tl.cumsum(weight, 0)
        chosen = tl.minimum(chosen, tl.min(tl.where(kept & (mass > target), i, NOWHERE), 0))
        last = tl.maximum(last, tl.max(tl.where(kept, i, 0), 0))
        passed += tl.sum(weight, 0)
        seen += tl.sum(at, 0)
    tl.store(out, tl.where(chosen == NOWHERE, last, chosen))


@triton.jit
def _float(key):
    """Invert `_keys`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
