"""Products and attention of many rows on the CPU against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qvl_kernels.cpu import batched, choices, features
from qvl_kernels.cpu.ops import CpuOps
from qvl_kernels.ops import FEW_ROWS, Norm
from qvl_kernels.packing import Matrix, pack
from qvl_kernels.reference import ReferenceOps
from qvl_kernels.reference.functions import ACTIVATIONS

REFERENCE = ReferenceOps()
# Relative error of a product from its activations alone, measured 2e-5 and 4e-3 to 1e-2.
LIMIT = {"int16": 1e-4, "int8": 1.5e-2}
FLOAT_LIMIT = 2e-6


@pytest.fixture(scope="module")
def cpu():
    return {name: CpuOps(threads=2, activations=name) for name in LIMIT}


def normal(rng, *shape) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def poisoned(*shape) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def matrix(rng, n, k, bits, group=128, *, asymmetric=False, permuted=False, bias=False) -> Matrix:
    bias = normal(rng, n) if bias else None
    if bits == 16:
        return Matrix(n, k, 16, 128, normal(rng, n, k).astype(np.float16), bias=bias)
    codes = 1 << bits
    scales = rng.random((n, -(-k // group))) * 0.02 + 0.01
    zeros = rng.integers(0, codes, scales.shape).astype(np.uint8) if asymmetric else None
    perm = rng.permutation(k).astype(np.int32) if permuted else None
    values = rng.integers(0, codes, (n, k)).astype(np.uint8)
    return pack(values, scales, bits, group, zeros=zeros, perm=perm, bias=bias)


def rounded(x: np.ndarray, limit: int, span: int) -> np.ndarray:
    """Quantize activations like the kernels: integers up to `limit` with a scale for `span` columns."""
    rows, k = x.shape
    spans = np.zeros((rows, -(-k // span) * span), np.float32)
    spans[:, :k] = x
    spans = spans.reshape(rows, -1, span)
    scale = np.abs(spans).max(-1, keepdims=True) / limit
    return (np.rint(spans / np.where(scale == 0, 1, scale)) * scale).reshape(rows, -1)[:, :k]


def largest(activations: str, bits: int) -> int:
    """The largest integer of activations: int8 weights may be multiplied with more bits as fast as with 8."""
    if activations == "int16":
        return 32512
    return 32767 if bits == 8 and features.selected().words else 127


def span(activations: str, rows: int, bits: int, group: int) -> int:
    """Columns of activations with one scale."""
    return 128 if activations == "int16" or rows <= 16 or (bits, group) == (8, 128) else 32


@pytest.mark.parametrize("activations", LIMIT)
@pytest.mark.parametrize("rows,n,k", [(17, 5, 7), (18, 32, 128), (25, 33, 130), (31, 70, 333), (97, 64, 256)])
@pytest.mark.parametrize("bits,group", [(4, 32), (4, 64), (4, 128), (8, 32), (8, 64), (8, 128)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_quantized_product_is_that_of_rounded_activations(cpu, rng, activations, rows, n, k, bits, group, asymmetric):
    x = normal(rng, rows, k)
    w = matrix(rng, n, k, bits, group, asymmetric=asymmetric)
    out, want = poisoned(rows, n), poisoned(rows, n)
    cpu[activations].linear(x, cpu[activations].weight(w), out=out)
    columns = span(activations, rows, bits, group)
    limit = largest(activations, bits)
    REFERENCE.linear(rounded(x, limit, columns), w, out=want)
    # A value half-way between two integers may be rounded the other way.
    assert error(out, want) < (2e-3 if limit == 127 else 2e-5)
    REFERENCE.linear(x, w, out=want)
    assert error(out, want) < LIMIT["int8" if limit == 127 else "int16"]


@pytest.mark.parametrize("activations", LIMIT)
@pytest.mark.parametrize("bits", [4, 8])
def test_outlier_channel(cpu, rng, activations, bits):
    x = normal(rng, 40, 512)
    x[:, 77] *= 1000
    w = matrix(rng, 96, 512, bits)
    out, want = poisoned(40, 96), poisoned(40, 96)
    cpu[activations].linear(x, cpu[activations].weight(w), out=out)
    REFERENCE.linear(x, w, out=want)
    assert error(out, want) < LIMIT[activations]


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("kind", ["rms", "layer", "none"])
def test_everything_around_a_product(cpu, rng, bits, kind):
    rows, n, k = 23, 70, 333
    ops = cpu["int16"]
    x, residual = normal(rng, rows, k), normal(rng, rows, n)
    w = matrix(rng, n, k, bits, 64, permuted=bits < 16, bias=True)
    norm = None if kind == "none" else Norm(normal(rng, k), normal(rng, k) if kind == "layer" else None, 1e-6)
    out, want = poisoned(rows, n), poisoned(rows, n)
    for activation in (None, *ACTIVATIONS):
        ops.linear(x, ops.weight(w), out=out, norm=norm, activation=activation, residual=residual)
        REFERENCE.linear(x, w, out=want, norm=norm, activation=activation, residual=residual)
        assert error(out, want) < (FLOAT_LIMIT if bits == 16 else LIMIT["int16"])
    inplace = residual.copy()
    ops.linear(x, ops.weight(w), out=inplace, residual=inplace)
    REFERENCE.linear(x, w, out=want, residual=residual)
    assert error(inplace, want) < (FLOAT_LIMIT if bits == 16 else LIMIT["int16"])


@pytest.mark.parametrize("skipped", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_results_larger_than_caches(cpu, rng, bits, skipped):
    """Written past the caches, unless the array does not begin with a line of memory (`skipped` numbers on)."""
    rows, n, k = 133, 8192, 128
    ops, x, residual = cpu["int8"], normal(rng, rows, k), normal(rng, rows, n)
    w, up = (matrix(rng, n, k, bits, bias=True) for _ in range(2))
    out, want = ops.empty((rows * n + skipped,))[skipped:].reshape(rows, n), poisoned(rows, n)
    assert out.nbytes >= batched.LARGE and (out.ctypes.data % 64 == 0) == (skipped == 0)
    for activation in (None, *ACTIVATIONS):
        out[:] = np.nan
        ops.linear(x, ops.weight(w), out=out, activation=activation)
        REFERENCE.linear(x, w, out=want, activation=activation)
        assert error(out, want) < LIMIT["int8"]
    out[:] = residual
    ops.linear(x, ops.weight(w), out=out, residual=out)
    REFERENCE.linear(x, w, out=want, residual=residual)
    assert error(out, want) < LIMIT["int8"]
    out[:] = np.nan
    norm = Norm(normal(rng, k) * np.float32(0.1), None, 1e-6)
    ops.gate_up(x, ops.weight(w), ops.weight(up), out=out, norm=norm)
    REFERENCE.gate_up(x, w, up, out=want, norm=norm)
    assert error(out, want) < 2 * LIMIT["int8"]


EXACT_ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * (0.5 + 0.5 * np.tanh(0.851 * x)),
}


@pytest.mark.parametrize("activation", EXACT_ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 40])
def test_an_activation_alone(cpu, rows, activation):
    """A product with the identity, in float32: what is left is the activation's own error, also far out."""
    n = 64
    x = np.linspace(-9, 9, rows * n, dtype=np.float32).reshape(rows, n)
    x[0, :6] = [-1000, -20, -0.0, 0, 20, 1000]
    out = poisoned(rows, n)
    w = cpu["int16"].weight(Matrix(n, n, 16, 128, np.eye(n, dtype=np.float16)))
    cpu["int16"].linear(x, w, out=out, activation=activation)
    want = EXACT_ACTIVATIONS[activation](x.astype(np.float64))
    np.testing.assert_allclose(out, want, rtol=3e-7, atol=2e-6)
    np.testing.assert_allclose(out[0, :6], [0, 0, 0, 0, 20, 1000], rtol=0, atol=1e-12)


KINDS = [
    {"bits": 4},
    {"bits": 4, "asymmetric": True},
    {"bits": 4, "permuted": True},
    {"bits": 4, "group": 32, "asymmetric": True, "permuted": True},
    {"bits": 8},
    {"bits": 8, "asymmetric": True},
    {"bits": 16},
]


@pytest.mark.parametrize("activations", LIMIT)
@pytest.mark.parametrize("rows", [3, 19])
@pytest.mark.parametrize("gate_kind", range(len(KINDS)))
@pytest.mark.parametrize("up_kind", range(len(KINDS)))
def test_gate_up(cpu, rng, activations, rows, gate_kind, up_kind):
    """Two matrices of any two kinds; they share the activations' packed form only where both read it alike."""
    n, k = 40, 160
    ops = cpu[activations]
    x = normal(rng, rows, k)
    gate, up = matrix(rng, n, k, bias=True, **KINDS[gate_kind]), matrix(rng, n, k, **KINDS[up_kind])
    norm = Norm(normal(rng, k) * np.float32(0.1), None, 1e-6)
    out, want = poisoned(rows, n), poisoned(rows, n)
    ops.gate_up(x, ops.weight(gate), ops.weight(up), out=out, norm=norm)
    REFERENCE.gate_up(x, gate, up, out=want, norm=norm)
    both_float = KINDS[gate_kind]["bits"] == KINDS[up_kind]["bits"] == 16
    assert error(out, want) < (FLOAT_LIMIT if both_float else 2 * LIMIT[activations if rows > 16 else "int16"])


@pytest.mark.parametrize("activations", LIMIT)
@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize("bits,group", [(4, 32), (4, 64), (4, 128), (8, 32), (8, 64), (8, 128)])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("code", ["lowest", "highest"])
def test_sums_of_extreme_codes(cpu, activations, rows, bits, group, asymmetric, code):
    """Every weight and activation at its largest magnitude and of one sign: no partial sum may overflow."""
    n, k = 33, 512
    values = np.full((n, k), 0 if code == "lowest" else (1 << bits) - 1, np.uint8)
    scales = np.full((n, k // group), 0.01)
    zeros = np.full(scales.shape, 0 if code == "highest" else (1 << bits) - 1, np.uint8) if asymmetric else None
    w = pack(values, scales, bits, group, zeros=zeros)
    # Alone, or beside a larger number that leaves the largest or the smallest low plane to the others.
    ones = np.ones((rows, k), np.float32)
    for x in (ones, ones * np.float32(127.49 / 32512), ones * np.float32(128 / 32512)):
        x[1::2] *= -1
        x[:, ::128] = np.copysign(1, x[:, ::128])
        out, want = poisoned(rows, n), poisoned(rows, n)
        cpu[activations].linear(x, cpu[activations].weight(w), out=out)
        limit = largest("int16" if rows <= 16 else activations, bits)
        REFERENCE.linear(rounded(x, limit, span(activations, rows, bits, group)), w, out=want)
        assert error(out, want) < 1e-4


@pytest.mark.parametrize("rows,n,k", [(17, 3, 5), (400, 33, 588), (24, 64, 1024)])
def test_float_product(cpu, rng, rows, n, k):
    x, w = normal(rng, rows, k), matrix(rng, n, k, 16)
    out, want = poisoned(rows, n), poisoned(rows, n)
    cpu["int16"].linear(x, cpu["int16"].weight(w), out=out)
    REFERENCE.linear(x, w, out=want)
    assert error(out, want) < FLOAT_LIMIT


def test_zero_rows_stay_zero(cpu, rng):
    x = normal(rng, 20, 128)
    x[3] = 0
    w = matrix(rng, 32, 128, 4)
    out = poisoned(20, 32)
    cpu["int8"].linear(x, cpu["int8"].weight(w), out=out)
    assert not out[3].any()


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_threads_do_not_change_a_result(cpu, rng, bits):
    """Nor does a product before it: the threads' shares of the work begin anew."""
    x, w = normal(rng, 50, 256), matrix(rng, 100, 256, bits)
    results = []
    for threads in (1, 2, 5):
        ops = CpuOps(threads=threads, activations="int8")
        for _ in range(2):
            results.append(poisoned(50, 100))
            ops.linear(x, ops.weight(w), out=results[-1])
    assert not np.isnan(results[0]).any()
    assert all(np.array_equal(results[0], other) for other in results)


@pytest.mark.parametrize("bits,group", [(3, 128), (4, 32), (4, 128), (8, 64), (8, 128)])
def test_choices_do_not_change_a_result(rng, monkeypatch, bits, group):
    """Every prefetch distance for a few rows, every number of parts for many; what is prefetched may not exist."""
    ops = CpuOps(threads=2, activations="int8")
    for n, k in ((1, 7), (33, 130), (70, 2304)):
        w = matrix(rng, n, k, bits, group, asymmetric=n == 33)
        for rows in (1, 7, 16, 70):
            x, results = normal(rng, rows, k), []
            # 1000 parts: more than there are tiles
            for chosen in choices.AHEAD if rows <= FEW_ROWS else (1, 2, 5, 1000):
                ops.choices, out = choices.Choices(chosen), poisoned(rows, n)
                monkeypatch.setattr(batched, "row_parts", lambda *_, chosen=chosen: chosen)
                ops.linear(x, ops.weight(w), out=out)
                results.append(out)
            assert not np.isnan(results[0]).any()
            assert all(np.array_equal(results[0], other) for other in results)


def attended(ops, qkv, cache, heads, pieces):
    """Append and attend piece by piece; rope is the identity."""
    rope = np.zeros((cache.capacity, cache.head_dim), np.float32)
    rope[:, : rope.shape[1] // 2] = 1
    out = poisoned(len(qkv), heads * cache.head_dim)
    begin = 0
    for count in pieces:
        piece, start = qkv[begin : begin + count].copy(), np.array([begin], np.int32)
        ops.rope_append(piece, rope=rope, logn=None, cache=cache, layer=0, start=start)
        ops.cached_attention(piece, cache, 0, start, out=out[begin : begin + count])
        begin += count
    return out


@pytest.mark.parametrize("activations", LIMIT)
@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("head_dim", [16, 22, 128])
@pytest.mark.parametrize("pieces", [[17], [40, 30], [100, 200], [3, 290, 18]])
def test_cached_attention(cpu, rng, activations, kind, head_dim, pieces):
    ops = cpu[activations]
    heads, length = 3, sum(pieces)
    # Strong scores, so that the maximum moves from block to block.
    qkv = normal(rng, length, 3 * heads * head_dim) * 2
    cache = ops.kv_cache(1, heads, head_dim, length + 5, kind)
    want = attended(REFERENCE, qkv, REFERENCE.kv_cache(1, heads, head_dim, length + 5, kind), heads, [length])
    got = attended(ops, qkv, cache, heads, pieces)
    # Up to 16 rows the int8 cache is read with 16-bit queries, if not everything is to be exact.
    rounded = (activations, kind) == ("int8", "int8") and min(pieces) <= 16
    assert error(got, want) < (1e-4 if rounded else FLOAT_LIMIT)


def test_int8_cache_of_equal_scores(cpu):
    """Every byte of a key, and exactly equal weights: each query's answer is the mean of the values it may see."""
    length, d = 255, 128
    qkv = np.zeros((length, 3 * d), np.float32)
    qkv[:, d : 2 * d] = np.arange(-127, 128)[:, None]
    qkv[:, 2 * d :] = np.arange(length)[:, None] - 100
    out = attended(cpu["int16"], qkv, cpu["int16"].kv_cache(1, 1, d, length, "int8"), 1, [length])
    np.testing.assert_allclose(out[:, 5], np.arange(length) / 2 - 100, atol=0.2)


# Attention in 16-bit integers: measured 2e-4 to 4e-4. Only processors that multiply pairs fast do it so.
ATTENTION_LIMIT = {"int16": FLOAT_LIMIT, "int8": 1e-3}


@pytest.mark.parametrize("activations", LIMIT)
@pytest.mark.parametrize("patches,heads,d", [(17, 1, 8), (64, 2, 104), (301, 2, 104), (700, 1, 20), (100, 1, 256)])
@pytest.mark.parametrize("strength", [0.01, 1, 3])
def test_vision_attention(cpu, rng, activations, patches, heads, d, strength):
    qkv = normal(rng, patches, heads * 3 * d) * np.float32(strength)
    out, want = poisoned(patches, heads * d), poisoned(patches, heads * d)
    cpu[activations].vision_attention(qkv, heads, out=out)
    REFERENCE.vision_attention(qkv, heads, out=want)
    assert error(out, want) < ATTENTION_LIMIT[activations]


@pytest.mark.parametrize("activations", LIMIT)
def test_vision_attention_with_outliers(cpu, rng, activations):
    """One channel of all keys far off, and one channel of the values a hundred times as large as the others."""
    patches, d = 200, 104
    parts = normal(rng, patches, 3, d)
    parts[:, 1, 3] += 100
    parts[:, 2, 5] *= 100
    out, want = poisoned(patches, d), poisoned(patches, d)
    cpu[activations].vision_attention(parts.reshape(patches, -1), 1, out=out)
    REFERENCE.vision_attention(parts.reshape(patches, -1), 1, out=want)
    for column in range(d):
        # The reference itself has lost digits to scores of about 100.
        assert error(out[:, column], want[:, column]) < max(ATTENTION_LIMIT[activations], 2e-5)


def test_attention_sums_do_not_overflow(cpu):
    """Two groups of equal queries, keys and values, far apart: sums at their limit, and each attends to its group."""
    patches, d = 256, 256
    parts = np.ones((patches, 3, d), np.float32)
    parts[:, 2] = 7
    parts[:128] *= -1
    out = poisoned(patches, d)
    cpu["int8"].vision_attention(parts.reshape(patches, -1), 1, out=out)
    np.testing.assert_allclose(out, parts[:, 2], rtol=1e-3)


ATTENTIONS = {"float32": FLOAT_LIMIT, "int16": 1e-3}
"""Both kernels of attention over all keys, whichever this processor would be given."""


def vision_attention(cpu, monkeypatch, kernel: str, qkv: np.ndarray, heads: int) -> np.ndarray:
    """Vision attention by one of `ATTENTIONS`."""
    monkeypatch.setattr(batched, "PAIRS", True)
    out = poisoned(len(qkv), qkv.shape[1] // 3)
    cpu["int8" if kernel == "int16" else "int16"].vision_attention(qkv, heads, out=out)
    return out


@pytest.mark.parametrize("kernel", ATTENTIONS)
@pytest.mark.parametrize("patches,d", [(65, 16), (130, 104), (513, 64), (1024, 128)])
@pytest.mark.parametrize("strength", [100, 355, 513, 1000, 3000, 10000])
def test_one_key_wins(cpu, rng, monkeypatch, kernel, patches, d, strength):
    """Each query has one key with a logit of about `strength`, far above the others: the result is that key's value."""
    parts = normal(rng, patches, 3, d)
    winners = rng.permutation(patches)
    keys = parts[:, 1]
    keys *= np.sqrt(d) / np.linalg.norm(keys, axis=1, keepdims=True)
    parts[:, 0] = keys[winners] * (strength / np.sqrt(d) * (1 + 0.01 * rng.random((patches, 1)))).astype(np.float32)
    out = vision_attention(cpu, monkeypatch, kernel, parts.reshape(patches, -1), 1)
    for got, want in zip(out, parts[winners, 2]):
        assert error(got, want) < ATTENTIONS[kernel]


@pytest.mark.parametrize("kernel", ATTENTIONS)
@pytest.mark.parametrize("patches", [1, 63, 64, 65, 100, 257, 300])
def test_a_zero_query_gives_the_mean(cpu, rng, monkeypatch, kernel, patches):
    """Padding up to the kernels' blocks of keys must not count, also where every score is 0."""
    d = 40
    parts = normal(rng, patches, 3, d)
    parts[::3, 0] = 0
    parts[:, 2] += 1
    out = vision_attention(cpu, monkeypatch, kernel, parts.reshape(patches, -1), 1)
    mean = parts[:, 2].mean(0, dtype=np.float64)
    for row in out[::3]:
        assert error(row, mean) < ATTENTIONS[kernel]


@pytest.mark.parametrize("kernel", ATTENTIONS)
@pytest.mark.parametrize("d", [24, 64, 72, 80])
def test_rotated_patches_of_segments(cpu, rng, monkeypatch, kernel, d):
    """Windows and whole pictures of any length, each alone and rotated, by both kernels."""
    heads, segments = 2, [0, 64, 128, 128, 132, 700, 1300]
    qkv, angles = normal(rng, 1300, heads * 3 * d), rng.uniform(0, 7, (1300, d // 2))
    rope = np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    out, want = poisoned(1300, heads * d), poisoned(1300, heads * d)
    monkeypatch.setattr(batched, "PAIRS", True)
    ops = cpu["int8" if kernel == "int16" else "int16"]
    ops.vision_attention(qkv, heads, out=out, rope=rope, segments=segments)
    REFERENCE.vision_attention(qkv, heads, out=want, rope=rope, segments=segments)
    assert error(out, want) < ATTENTIONS[kernel]
    captured = poisoned(1300, heads * d)
    replay = ops.capture(lambda: ops.vision_attention(qkv, heads, out=captured, rope=rope, segments=list(segments)))
    replay()
    assert np.array_equal(captured, out)


@pytest.mark.parametrize("segments", [[0], [0, 5], [1, 9], [0, 7, 3, 9], [[0, 9]]])
def test_segments_that_do_not_fit(cpu, segments):
    for ops in (cpu["int16"], REFERENCE):
        with pytest.raises(ValueError, match="segments"):
            ops.vision_attention(np.zeros((9, 48), np.float32), 2, out=poisoned(9, 16), segments=segments)


@pytest.mark.parametrize("activations", LIMIT)
@pytest.mark.parametrize("queries,keys", [(1, 1), (19, 70), (256, 300)])
def test_cross_attention(cpu, rng, activations, queries, keys):
    heads, d = 2, 128
    q, k, v = normal(rng, queries, heads * d), normal(rng, keys, heads * d), normal(rng, keys, heads * d)
    out, want = poisoned(queries, heads * d), poisoned(queries, heads * d)
    cpu[activations].cross_attention(q, k, v, heads, out=out)
    REFERENCE.cross_attention(q, k, v, heads, out=want)
    assert error(out, want) < ATTENTION_LIMIT[activations]
