"""What is computed for a row does not depend, to the last bit, on the rows that are computed with it.

So a conversation that is continued answers as one that is computed anew. It holds wherever activations have 16 bits:
always with ``activations="int16"``, with "auto" for matrices below a million weights.
"""

from __future__ import annotations

import numpy as np
import pytest
from test_cpu_gemm import attended, matrix, normal, poisoned

import qvl_runtime as qvl
from qvl_kernels.cpu.ops import CpuOps
from qvl_kernels.ops import Norm
from qvl_kernels.packing import group_sizes
from qvl_runtime.engine.decoder import Span

KINDS = [
    (bits, group, asymmetric)
    for bits in (3, 4, 8)
    for group in (32, 64, 128)
    for asymmetric in (False, True)
    if group in group_sizes(bits)
]


@pytest.fixture(scope="module", params=[("int16", 2), ("auto", 2), ("int16", 3)], ids=str)
def ops(request):
    activations, threads = request.param
    return CpuOps(activations=activations, threads=threads)


@pytest.mark.parametrize("bits,group,asymmetric", [*KINDS, (16, 128, False)])
@pytest.mark.parametrize("n,k", [(5, 7), (70, 333), (96, 256), (33, 4100)])
def test_products(ops, rng, bits, group, asymmetric, n, k):
    w = ops.weight(matrix(rng, n, k, bits, group, asymmetric=asymmetric, permuted=n == 70 and bits < 16, bias=True))
    up = ops.weight(matrix(rng, n, k, bits, group))
    norm = Norm(normal(rng, k), normal(rng, k), 1e-6)
    x, residual = normal(rng, 40, k), normal(rng, 40, n)
    x[:, 3] *= 1000

    def results(first: int, last: int) -> np.ndarray:
        rows, outs = x[first:last].copy(), [poisoned(last - first, n) for _ in range(3)]
        ops.linear(rows, w, out=outs[0])
        ops.linear(rows, w, out=outs[1], norm=norm, activation="gelu", residual=residual[first:last].copy())
        ops.gate_up(rows, w, up, out=outs[2], norm=norm)
        return np.stack(outs)

    alone = np.concatenate([results(i, i + 1) for i in range(40)], axis=1)
    for count in range(2, 41):
        first = 0 if count % 2 else 40 - count
        assert np.array_equal(results(first, first + count), alone[:, first : first + count]), count


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("heads,kv_heads,d", [(3, 3, 22), (4, 4, 64), (2, 2, 128), (4, 2, 24), (7, 1, 80), (12, 2, 32)])
def test_cached_attention(ops, rng, kind, heads, kv_heads, d):
    """A past longer than the blocks of keys, computed in slices of every size."""
    length = 600
    qkv = normal(rng, length, (heads + 2 * kv_heads) * d) * 2
    alone = attended(ops, qkv, ops.kv_cache(1, kv_heads, d, length, kind), heads, [1] * length)
    for pieces in ([length], range(1, 35), [250, 7, 256, 2, 85], [33] * 18):
        got = attended(ops, qkv, ops.kv_cache(1, kv_heads, d, length, kind), heads, list(pieces))
        assert np.array_equal(got[: sum(pieces)], alone[: sum(pieces)])


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("heads,kv_heads,d", [(3, 3, 128), (2, 2, 24), (4, 2, 32)])
def test_parts_of_a_long_past(rng, kind, heads, kv_heads, d):
    """Where parts begin and become longer: attention depends neither on the threads nor on the rows beside a row."""
    cache = CpuOps().kv_cache(1, kv_heads, d, 8300, kind)
    cache.keys[:] = rng.integers(0, 256, cache.keys.shape) if kind == "int8" else normal(rng, *cache.keys.shape)
    cache.values[:] = (
        rng.integers(-127, 128, cache.values.shape) if kind == "int8" else normal(rng, *cache.values.shape)
    )
    cache.scales[:] = rng.random(cache.scales.shape).astype(np.float16) / 100
    qkv = normal(rng, 3, (heads + 2 * kv_heads) * d) * 2

    def attend(ops: CpuOps, first: int, last: int, position: int) -> np.ndarray:
        out = poisoned(last - first, heads * d)
        ops.cached_attention(qkv[first:last].copy(), cache, 0, np.array([position + first], np.int32), out=out)
        return out

    exact, few = CpuOps(activations="int16"), [CpuOps(activations="int8", threads=n) for n in (1, 2, 3, 8)]
    for position in (0, 510, 511, 512, 2000, 8190, 8191, 8192):
        want = attend(few[0], 0, 3, position)
        assert np.linalg.norm(want - attend(exact, 0, 3, position)) <= 1e-4 * np.linalg.norm(want)
        assert all(np.array_equal(attend(ops, 0, 3, position), want) for ops in few[1:])
        assert all(np.array_equal(attend(few[2], row, row + 1, position)[0], want[row]) for row in range(3))


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("kv_heads", [5, 1])
def test_a_few_queries_of_a_large_model(rng, threads, kv_heads):
    """Up to 16 rows equal each row alone, also where more rows are rounded: checking drafts changes no answer."""
    ops, heads, d, length = CpuOps(activations="int8", threads=threads), 5, 128, 500
    assert ops.coarse_attention(heads * d)
    qkv = normal(rng, length, (heads + 2 * kv_heads) * d)
    for kind in ("fp16", "int8"):
        first, second = (ops.kv_cache(1, kv_heads, d, length, kind) for _ in range(2))
        alone = attended(ops, qkv, first, heads, [480] + [1] * 20)
        assert np.array_equal(attended(ops, qkv, second, heads, [480, 3, 16, 1]), alone)


@pytest.mark.parametrize("activations,heads,coarse", [("auto", 4, False), ("auto", 5, True), ("int16", 5, False)])
@pytest.mark.parametrize("kv_heads", [1, None])
def test_attention_that_depends_on_the_number_of_rows_says_so(rng, activations, heads, coarse, kv_heads):
    ops, d, kv_heads = CpuOps(activations=activations, threads=2), 128, kv_heads or heads
    assert ops.coarse_attention(heads * d) == coarse
    qkv = normal(rng, 700, (heads + 2 * kv_heads) * d)

    def last(pieces):
        return attended(ops, qkv, ops.kv_cache(1, kv_heads, d, 700, "fp16"), heads, pieces)[-17:]

    whole = last([700])
    for count in (17, 100):
        assert np.array_equal(last([700 - count, count]), whole)
    for count in (1, 16):
        assert np.array_equal(last([700 - count, count]), whole) != coarse


@pytest.mark.parametrize("bits,group,asymmetric", [(4, 128, False), (4, 32, True), (8, 128, False)])
def test_a_prompt_of_a_large_model_may_be_cut_into_pieces_of_more_than_16_rows(rng, bits, group, asymmetric):
    ops = CpuOps(activations="auto", threads=2)
    w, x = ops.weight(matrix(rng, 1100, 1024, bits, group, asymmetric=asymmetric)), normal(rng, 560, 1024)
    assert ops.coarse(w)
    whole = poisoned(560, 1100)
    ops.linear(x, w, out=whole)
    for first, last in ((0, 17), (17, 81), (64, 128), (128, 208), (3, 531), (500, 560)):
        part = poisoned(last - first, 1100)
        ops.linear(x[first:last].copy(), w, out=part)
        assert np.array_equal(part, whole[first:last])


@pytest.mark.parametrize("kv_cache", ["fp16", "int8"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_logits_of_a_whole_model(blob, bits, kv_cache):
    """Every token's logits, for any tokens computed with it and any length of the cache."""
    model = qvl.load(blob("tiny-vl", "long", bits=bits, head_bits=bits), device="cpu", kv_cache=kv_cache)
    ids = [int(i) for i in np.random.default_rng(bits).integers(32, 127, 300)]

    def logits(pieces) -> np.ndarray:
        context, out, ops, decoder = model.decoder.sequence(kv_cache, 300), [], model.ops, model.decoder
        context.begin(300)
        for count in pieces:
            work, rows = decoder.workspace(count), ops.empty((count, model.config.vocab_size))
            decoder.embed(ops.upload(np.array(ids[context.length : context.length + count], np.int32)), work.x)
            decoder.forward(work, [Span(context, count)])
            decoder.logits(work.x, rows)
            context.advance(count)
            out.append(ops.download(rows))
        return np.concatenate(out)

    alone = logits([1] * 300)
    assert np.array_equal(logits([300]), alone)
    assert np.array_equal(logits([9, *range(1, 24), 15]), alone)
    assert np.array_equal(logits([137, *range(40, 36, -1)]), alone[:291])
