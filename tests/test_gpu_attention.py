"""Attention on the GPU, as it ships, in the PTX interpreter, against the reference backend."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("triton")

from gpu_kernels import HALF, Poisoned, activations, ceil, close, constants, flags, launch, poisoned, reference

from qvl_kernels.gpu import signatures as s
from qvl_kernels.ops import Norm
from qvl_kernels.reference.functions import attention, quantize_kv, rotate


class Cache:
    """A layer of a cache, with poison where nothing was appended yet."""

    def __init__(self, heads, capacity, d, int8):
        self.int8, self.kind = int8, "int8" if int8 else "fp16"
        self.k, self.v = (poisoned((heads, capacity, d), np.int8 if int8 else HALF) for _ in range(2))
        self.scales = [poisoned((heads, capacity), HALF) if int8 else None for _ in range(2)]

    @property
    def arguments(self):
        return self.k, self.v, *self.scales

    def values(self):
        if not self.int8:
            return [a.astype(np.float32) for a in (self.k, self.v)]
        return [a * b.astype(np.float32)[..., None] for a, b in zip((self.k, self.v), self.scales)]


def rope_tables(rng, capacity, d):
    angles = rng.uniform(0, 6, (capacity, d // 2))
    table = np.concatenate([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
    return table, rng.uniform(1, 1.3, capacity).astype(np.float32)


ROPE_CASES = {
    # t, heads, kv_heads, d, begin, logn, q_norm, k_norm
    "one token": (1, 2, 2, 128, 5, True, False, False),
    "two programs": (5, 9, 9, 64, 0, True, False, False),
    "odd": (3, 1, 1, 10, 7, False, False, False),
    "groups": (2, 6, 2, 24, 3, False, False, False),
    "norms": (2, 7, 1, 128, 4, False, True, True),
    "k norm": (3, 4, 2, 32, 0, True, False, True),
}


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("case", ROPE_CASES)
def test_rope_append(int8, case, rng):
    t, heads, kv_heads, d, begin, scaled, *normed = ROPE_CASES[case]
    capacity, all_heads = 12, heads + kv_heads
    qkv = activations(rng, t, (heads + 2 * kv_heads) * d).astype(HALF)
    qkv[:, heads * d + 3] *= HALF(100)
    qkv[0, -d:] = 0  # a vector of zeros has a scale of zero
    rope, logn = rope_tables(rng, capacity, d)
    logn = logn if scaled else None
    norms = [Norm(rng.uniform(0.5, 2, d).astype(np.float32), None, eps) if n else None
             for n, eps in zip(normed, (1e-6, 0.5))]  # fmt: skip
    cache, start = Cache(kv_heads, capacity, d, int8), np.array([begin], np.int32)
    expected = reference.kv_cache(1, kv_heads, d, capacity, cache.kind)
    rotated = qkv.astype(np.float32)
    reference.rope_append(rotated, rope=rope, logn=logn, cache=expected, layer=0, start=start,
                          q_norm=norms[0], k_norm=norms[1])  # fmt: skip
    launch(f"rope_append.{cache.kind}", (t, ceil(all_heads, s.ROPE_HEADS)), qkv, rope, logn,
           *(n and n.weight for n in norms), *cache.arguments, start, None, heads, kv_heads, capacity, d,
           *(n.eps if n else 0.0 for n in norms), flags(LOGN=scaled, Q_NORM=normed[0], K_NORM=normed[1]))  # fmt: skip
    new = slice(begin, begin + t)
    close(qkv[:, : heads * d], rotated[:, : heads * d], 1e-3)
    k, v = cache.values()
    np.testing.assert_allclose(k[:, new], expected.values[0, 0, :, new], rtol=1e-6 if int8 else 1e-3, atol=1e-4)
    np.testing.assert_array_equal(v[:, new], expected.values[0, 1, :, new])
    untouched = np.delete(cache.k, np.arange(begin, begin + t), axis=1)
    np.testing.assert_array_equal(untouched, poisoned(untouched.shape, untouched.dtype))


@pytest.mark.parametrize("rows, heads, d", [(3, 2, 80), (2, 5, 12)])
def test_rotation_of_patches(rows, heads, d, rng):
    qkv, (rope, _) = activations(rng, rows, heads * 3 * d).astype(HALF), rope_tables(rng, rows, d)
    parts = qkv.astype(np.float32).reshape(rows, heads, 3, d)
    expected = rotate(parts.transpose(1, 2, 0, 3), rope).transpose(2, 0, 1, 3)
    launch("rotate.any", (rows, ceil(2 * heads, s.ROPE_HEADS)), qkv, rope, heads, d)
    found = qkv.reshape(rows, heads, 3, d)
    close(found[:, :, :2], expected[:, :, :2], 1e-3)
    np.testing.assert_array_equal(found[:, :, 2], parts[:, :, 2])


def filled_cache(rng, heads, capacity, d, int8, length):
    cache = Cache(heads, capacity, d, int8)
    k, v = rng.standard_normal((2, heads, length, d)).astype(np.float32)
    k[:, length // 2] *= 3
    for slot, (array, x) in enumerate(((cache.k, k), (cache.v, v))):
        if int8:
            codes, scale = quantize_kv(x)
            put(array, length, codes)
            put(cache.scales[slot], length, scale[..., 0])
        else:
            put(array, length, x)
    return cache


def put(array, length, values):
    """Fill the first positions of every head."""
    array[:, :length] = values
    array.written.reshape(*array.shape, -1)[:, :length] = 1


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("t, heads, kv_heads, d, begin", [(1, 1, 1, 128, 0), (3, 2, 2, 128, 70), (140, 1, 1, 128, 5),
                                                          (40, 2, 2, 64, 33), (2, 1, 1, 10, 1), (9, 4, 2, 128, 60),
                                                          (5, 6, 2, 24, 3)])  # fmt: skip
def test_cached_attention(int8, t, heads, kv_heads, d, begin, rng):
    cache = filled_cache(rng, kv_heads, begin + t + 3, d, int8, begin + t)
    qkv, out = activations(rng, t, (heads + 2 * kv_heads) * d).astype(HALF), poisoned((t, heads * d), HALF)
    name = f"cached_attention.{cache.kind}.{'128' if d == 128 else 'any'}"
    grid, start = (ceil(t, constants(name)["BM"]), heads), np.array([begin], np.int32)
    launch(name, grid, qkv, *cache.arguments, start, out, t, heads, kv_heads, begin + t + 3, d, d**-0.5)
    close(out, causal(qkv, cache, heads, begin), 3e-3)


def test_rows_of_a_long_prompt_are_more_than_2_31_values_apart(rng):
    """As of the logits of 209,716 tokens with Qwen3-VL-32B. Of the arrays only a head is touched, and takes memory."""
    name, heads, d = "cached_attention.fp16.any", 1 << 20, 64
    t = constants(name)["BM"] + 1
    cache = filled_cache(rng, 1, t, d, False, t)
    qkv, out = (sparse((t, columns * d), HALF, d, written) for columns, written in ((heads + 2, 1), (heads, 0)))
    assert (t - 1) * heads * d == 1 << 31
    qkv[:, :d] = rng.standard_normal((t, d))
    launch(name, (2, 1), qkv, *cache.arguments, np.zeros(1, np.int32), out, t, heads, 1, t, d, d**-0.5)
    close(np.array(out[:, :d]), causal(np.array(qkv[:, : 3 * d]), cache, 1, 0), 3e-3)


def sparse(shape, dtype, columns, written):
    """Zeros, of which the first columns are `written` or not, and no others."""
    array = np.zeros(shape, dtype).view(Poisoned)
    array.written = np.zeros(array.nbytes, np.uint8)
    array.written.reshape(shape[0], -1)[:, : columns * array.itemsize] = written
    return array


def causal(qkv, cache, heads, begin):
    t, end = len(qkv), begin + len(qkv)
    q = qkv.astype(np.float32).reshape(t, -1, cache.k.shape[2])[:, :heads].swapaxes(0, 1)
    k, v = (a[:, :end].repeat(heads // len(a), axis=0) for a in cache.values())
    return attention(q, k, v, np.arange(end) <= np.arange(begin, end)[:, None]).reshape(t, -1)


SPLITS = 9

DECODE_CASES = [
    # t, heads, kv_heads, d, begin
    (1, 1, 1, 128, 0), (1, 2, 2, 128, 63), (1, 2, 2, 128, 1030), (1, 2, 2, 64, 100), (1, 3, 3, 10, 17),
    *((1, group, 1, 128, 40) for group in (4, 6, 7, 8)), (1, 6, 2, 24, 50), (1, 4, 2, 128, 70),
    (2, 2, 2, 128, 1), (5, 12, 2, 32, 9), (16, 8, 1, 128, 30),
]  # fmt: skip


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("t, heads, kv_heads, d, begin", DECODE_CASES)
def test_decode_attention(int8, t, heads, kv_heads, d, begin, rng):
    cache = filled_cache(rng, kv_heads, begin + t + 3, d, int8, begin + t)
    qkv, out = activations(rng, t, (heads + 2 * kv_heads) * d).astype(HALF), poisoned((t, heads * d), HALF)
    name = f"decode_attention.{cache.kind}.{'128' if d == 128 else 'any'}"
    tiles, splits = kv_heads * ceil(t * heads // kv_heads, constants(name)["BM"]), SPLITS if t == 1 else s.DECODE_SPLITS
    partials, counters = poisoned(t * heads * splits * 129), np.zeros(tiles, np.int32)
    launch(name, (tiles, splits), qkv, *cache.arguments, np.array([begin], np.int32), None, out, partials, counters,
           None, None, None, None, t, heads, kv_heads, begin + t + 3, d, d**-0.5, 0.0, 0.0, 0)  # fmt: skip
    assert not counters.any()
    close(out, causal(qkv, cache, heads, begin), 1e-3)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("d, begin", [(128, 0), (128, 62), (128, 2046), (24, 285)])
def test_attention_of_a_token_has_the_same_bits_whatever_comes_after(int8, d, begin, rng):
    """Tokens of one step, as drafts are, beside one token a step; at the ends of tiles and of turns, too."""
    t, heads, kv_heads, capacity = 5, 4, 2, begin + 8
    cache = filled_cache(rng, kv_heads, capacity, d, int8, begin + t)
    qkv = activations(rng, t, (heads + 2 * kv_heads) * d).astype(HALF)
    name = f"decode_attention.{cache.kind}.{'128' if d == 128 else 'any'}"

    def attended(first, count):
        out, counters = poisoned((count, heads * d), HALF), np.zeros(4, np.int32)
        grid = kv_heads * ceil(count * heads // kv_heads, constants(name)["BM"]), SPLITS
        partials = poisoned(count * heads * SPLITS * 129)
        rows, start = qkv[first : first + count].copy(), np.array([begin + first], np.int32)
        sizes = count, heads, kv_heads, capacity, d, d**-0.5, 0.0, 0.0, 0
        launch(name, grid, rows, *cache.arguments, start, None, out, partials, counters, None, None, None, None, *sizes)
        return np.array(out)

    np.testing.assert_array_equal(attended(0, t), np.concatenate([attended(i, 1) for i in range(t)]))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("d, begin", [(128, 0), (128, 70), (24, 33)])
def test_attention_of_a_prompt_has_the_same_bits_however_it_is_cut(int8, d, begin, rng):
    t, heads, capacity = 200, 1, begin + 203
    cache = filled_cache(rng, heads, capacity, d, int8, begin + t)
    qkv = activations(rng, t, 3 * heads * d).astype(HALF)
    name = f"cached_attention.{cache.kind}.{'128' if d == 128 else 'any'}"

    def attended(first, count):
        out, grid = poisoned((count, heads * d), HALF), (ceil(count, constants(name)["BM"]), heads)
        rows, start = qkv[first : first + count].copy(), np.array([begin + first], np.int32)
        launch(name, grid, rows, *cache.arguments, start, out, count, heads, heads, capacity, d, d**-0.5)
        return np.array(out)

    whole = attended(0, t)
    for cuts in ((0, 64, 81, t), (0, 17, 145, t)):
        np.testing.assert_array_equal(whole, np.concatenate([attended(a, b - a) for a, b in itertools.pairwise(cuts)]))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("heads, kv_heads, d, begin, normed", [
    (1, 1, 128, 0, False), (8, 1, 128, 64, True), (6, 2, 24, 31, True), (14, 2, 80, 1030, False),
])  # fmt: skip
def test_attention_of_a_token_rotates_and_appends_as_the_kernel_for_it(int8, heads, kv_heads, d, begin, normed, rng):
    """Bit for bit: the cache, and what is attended to; also if the arrays of the sequence are in a table."""
    capacity = begin + 4
    rope, logn = rope_tables(rng, capacity, d)
    weights = [rng.uniform(0.5, 2, d).astype(np.float32) if normed else None for _ in range(2)]
    flags_ = flags(LOGN=not normed, Q_NORM=normed, K_NORM=normed)
    qkv, found = activations(rng, 1, (heads + 2 * kv_heads) * d).astype(HALF), []
    kind, start = "int8" if int8 else "fp16", np.array([begin], np.int32)
    name = f"decode_attention.{kind}.{'128' if d == 128 else 'any'}"
    seed = rng.integers(1 << 30)
    for fused, listed in itertools.product((False, True), repeat=2):
        layer = kv_heads, capacity, d, int8
        cache = filled_cache(np.random.default_rng(seed), *layer, begin) if begin else Cache(*layer)
        row, out, counters = qkv.copy(), poisoned((1, heads * d), HALF), np.zeros(kv_heads, np.int32)
        partials, tables, there = poisoned(heads * SPLITS * 129), (rope, logn), s.LISTED * listed
        arrays, extra, sizes = (*cache.arguments, start, None), (), (heads, kv_heads, capacity, d)
        if listed:
            extra = tuple(array for array in (*cache.arguments, start, *tables) if array is not None)
            addresses = [0 if array is None else array.ctypes.data for array in (*cache.arguments, start, *tables)]
            arrays, tables = (*[None] * 5, np.array([*addresses, capacity], np.int64)), (None, None)
            sizes = (heads, kv_heads, 0, d)
        if not fused:
            grid = 1, ceil(heads + kv_heads, s.ROPE_HEADS)
            launch(f"rope_append.{kind}", grid, row, *tables, *weights, *arrays, *sizes, 1e-6, 1e-5, flags_ | there,
                   reached=extra)  # fmt: skip
        launch(name, (kv_heads, SPLITS), row, *arrays, out, partials, counters,
               *((*tables, *weights) if fused else (None,) * 4), 1, *sizes, d**-0.5, 1e-6, 1e-5,
               (flags_ | s.ROPE if fused else 0) | there, reached=extra)  # fmt: skip
        assert not counters.any()
        found.append([out, *(array[:, begin] for array in cache.arguments if array is not None)])
    for every in zip(*found):
        for other in every[1:]:
            np.testing.assert_array_equal(every[0], other)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("heads, kv_heads, d, scaled", [(4, 2, 128, False), (3, 3, 24, True)])
def test_one_launch_attends_for_the_lone_rows_of_several_sequences(int8, heads, kv_heads, d, scaled, rng):
    """With the bits of a launch for each, whatever their lengths, and in every cache."""
    begins, kind, found = (70, 0, 301), "int8" if int8 else "fp16", []
    name, seed = f"decode_attention.{kind}.{'128' if d == 128 else 'any'}", rng.integers(1 << 30)
    qkv = activations(rng, len(begins), (heads + 2 * kv_heads) * d).astype(HALF)
    tables = [rope_tables(rng, begin + 9, d) for begin in begins]
    starts = [np.array([begin], np.int32) for begin in begins]
    norm, flags_ = rng.uniform(0.5, 2, d).astype(np.float32), s.LISTED | flags(Q_NORM=True, ROPE=True, LOGN=scaled)
    for together in (True, False):
        layers = [(kv_heads, begin + 5, d, int8) for begin in begins]
        caches = [filled_cache(np.random.default_rng(seed), *layer, begin) if begin else Cache(*layer)
                  for layer, begin in zip(layers, begins)]  # fmt: skip
        sequences = [(*cache.arguments, start, *table) for cache, start, table in zip(caches, starts, tables)]
        entries = np.array([[*(0 if array is None else array.ctypes.data for array in sequence), begin + 5]
                            for sequence, begin in zip(sequences, begins)], np.int64)  # fmt: skip
        extra = tuple(array for sequence in sequences for array in sequence if array is not None)
        out = poisoned((len(begins), heads * d), HALF)
        for some in (slice(0, 3),) if together else (slice(0, 1), slice(1, 2), slice(2, 3)):
            rows = qkv[some].copy()
            mine, counters = poisoned((len(rows), heads * d), HALF), np.zeros(len(rows) * kv_heads, np.int32)
            partials = poisoned(len(rows) * heads * SPLITS * 129)
            launch(name, (len(rows) * kv_heads, SPLITS), rows, *[None] * 5, entries[some].copy(), mine, partials,
                   counters, None, None, norm, None, 1, heads, kv_heads, 0, d, d**-0.5, 1e-6, 0.0, flags_,
                   reached=extra)  # fmt: skip
            assert not counters.any()
            out[some] = mine
        new = [
            array[:, begin] for cache, begin in zip(caches, begins) for array in cache.arguments if array is not None
        ]
        found.append([np.array(out), *new])
    for one, other in zip(*found):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("variant, d", [("64", 64), ("72", 72), ("80", 80), ("104", 104), ("128", 128), ("any", 104),
                                        ("any", 20)])  # fmt: skip
@pytest.mark.parametrize("rows", [1, 75, 128])
def test_vision_attention(variant, d, rows, rng):
    heads = 2
    qkv, out = activations(rng, rows, heads * 3 * d).astype(HALF), poisoned((rows, heads * d), HALF)
    expected = poisoned((rows, heads * d))
    reference.vision_attention(qkv.astype(np.float32), heads, out=expected)
    launch_attention(f"attention.{variant}", qkv, qkv, qkv, None, out, rows, rows, heads, 3, d)
    close(out, expected, 3e-3)


@pytest.mark.parametrize("variant, d, segments", [
    ("80", 80, [0, 64, 128, 144, 160]),
    ("any", 12, [0, 1, 1, 70, 75]),
    ("any", 20, [0, 16, 17, 33]),
])  # fmt: skip
def test_vision_attention_within_segments(variant, d, segments, rng):
    heads, rows = 1, segments[-1]
    qkv, out = activations(rng, rows, heads * 3 * d).astype(HALF), poisoned((rows, heads * d), HALF)
    expected = poisoned((rows, heads * d))
    reference.vision_attention(qkv.astype(np.float32), heads, out=expected, segments=segments)
    bounds = np.stack([np.repeat(ends, np.diff(segments)) for ends in (segments[:-1], segments[1:])]).astype(np.int32)
    launch_attention(f"attention.{variant}.segments", qkv, qkv, qkv, bounds, out, rows, rows, heads, 3, d)
    close(out, expected, 3e-3)


@pytest.mark.parametrize("q_rows, k_rows, d", [(1, 1, 128), (130, 70, 128), (33, 100, 32)])
def test_cross_attention(q_rows, k_rows, d, rng):
    heads = 2
    q, k, v = (activations(rng, rows, heads * d).astype(HALF) for rows in (q_rows, k_rows, k_rows))
    out, expected = poisoned((q_rows, heads * d), HALF), poisoned((q_rows, heads * d))
    reference.cross_attention(*(a.astype(np.float32) for a in (q, k, v)), heads, out=expected)
    name = f"attention.{'128' if d == 128 else 'any'}"
    launch_attention(name, q, k, v, None, out, q_rows, k_rows, heads, 1, d)
    close(out, expected, 3e-3)


def launch_attention(name, q, k, v, bounds, out, q_rows, k_rows, heads, parts, d):
    grid = (ceil(q_rows, constants(name)["BM"]), heads)
    launch(name, grid, q, k, v, bounds, out, q_rows, k_rows, heads, parts, d, d**-0.5)
