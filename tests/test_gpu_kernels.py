"""Every GPU kernel, as it ships, in the PTX interpreter, compared with the reference backend."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("triton")

from fakes.compiled import ARCHITECTURE, CompiledImages
from fakes.ptx_gpu import PtxDriver

from qvl_kernels.gpu import signatures as s
from qvl_kernels.gpu.arrays import DeviceArray
from qvl_kernels.gpu.graph import Queue
from qvl_kernels.gpu.launcher import Launcher
from qvl_kernels.gpu.memory import Memory
from qvl_kernels.ops import Norm
from qvl_kernels.packing import Matrix, pack, round_up
from qvl_kernels.reference import ReferenceOps
from qvl_kernels.reference.functions import attention, quantize_kv, silu

reference = ReferenceOps()
HALF = np.float16
images = CompiledImages(ARCHITECTURE)


class Poisoned(np.ndarray):
    """An array whose every value is wrong, and may not be read on the device before it is written there."""

    written: np.ndarray


def poisoned(shape, dtype=np.float32):
    dtype = np.dtype(dtype)
    array = np.full(shape, np.nan if dtype.kind == "f" else 77, dtype).view(Poisoned)
    array.written = np.zeros(array.nbytes, np.uint8)
    return array


def launch(name, grid, *args, observer=None):
    """Run a kernel with the launch arguments of its signature, on the arrays where they are."""
    driver = PtxDriver(seed=len(name) + sum(grid))
    driver.observer = observer
    launcher = Launcher(driver, Queue(driver, Memory(driver)), images)
    arrays = [value for value in args if isinstance(value, np.ndarray)]
    for array, written in {owner(array)[0].ctypes.data: owner(array) for array in arrays}.values():
        driver.adopt(array, written)
    launcher(name, grid, *(on_device(value) if isinstance(value, np.ndarray) else value for value in args))


def owner(array):
    """The array a slice was taken from, which the kernel may use all of, and what of it was written so far."""
    written = getattr(array, "written", None)
    while isinstance(array.base, np.ndarray):
        array = array.base
        written = getattr(array, "written", written)
    return array, written


def on_device(array):
    assert array.flags.c_contiguous
    return DeviceArray(array.ctypes.data, array.shape, array.dtype, array)


def cleared(has_padding, shape, dtype):
    """As loading does: rows that it does not write hold zeros."""
    return np.zeros(shape, dtype) if has_padding else poisoned(shape, dtype)


def flags(**given):
    return sum(getattr(s, name) for name, wanted in given.items() if wanted)


def ceil(a, b):
    return -(-a // b)


def close(actual, expected, limit):
    """Errors relative to a value and to those of its row: what products of rounded numbers can promise."""
    actual, expected = actual.astype(np.float32), expected.astype(np.float32)
    size = np.abs(expected) + np.median(np.abs(expected), axis=-1, keepdims=True) + 1e-6
    error = float(np.max(np.abs(actual - expected) / size))
    assert error < limit, f"error {error:.2e}, limit {limit:.0e}"


# weights ---------------------------------------------------------------------------------------------------------


def matrix(rng, n, k, bits, group=128, *, asymmetric=False, perm=False, bias=False):
    order = rng.permutation(k).astype(np.int32) if perm else None
    offset = rng.standard_normal(n).astype(np.float32) if bias else None
    if bits == 16:
        return Matrix(n, k, 16, 128, (rng.standard_normal((n, k)) * 0.05).astype(HALF), bias=offset)
    groups = ceil(k, group)
    codes = rng.integers(0, 1 << bits, (n, k)).astype(np.uint8)
    scales = (rng.uniform(0.5, 1.5, (n, groups)) * (0.02 if bits == 4 else 0.001)).astype(HALF)
    zeros = rng.integers(0, 1 << bits, (n, groups)).astype(np.uint8) if asymmetric else None
    return pack(codes, scales, bits, group, zeros=zeros, perm=order, bias=offset)


class OnDevice:
    """A matrix in the layout of the kernels, brought there by the kernels that do it."""

    def __init__(self, m: Matrix):
        self.matrix, self.blocks, self.rows = m, ceil(m.k, 128), round_up(m.n, 128)
        self.padded = 128 * self.blocks
        self.shift = (m.group_size // 32).bit_length() - 1
        self.kind = "fp16" if m.bits == 16 else f"int{m.bits}" + ("" if m.group_size == 128 else "_fine")
        if m.bits == 16:
            self.codes, self.scales = cleared(m.n < self.rows, (self.rows, self.padded), HALF), None
            half = m.n // 2
            for first, part in ((0, m.weight[:half]), (half, m.weight[half:])):
                if len(part):
                    launch("pad_rows.any", (ceil(self.padded, s.ELEMENTS), len(part)), np.ascontiguousarray(part),
                           self.codes, first, m.k, self.padded)  # fmt: skip
            return
        groups = self.padded // m.group_size
        padded = round_up(m.n, 32) < self.rows
        self.codes = cleared(padded, (self.blocks, self.rows, 4 * m.bits), np.int32)
        self.scales = cleared(padded, (groups, self.rows), np.int32)
        for first in range(len(m.weight)):
            piece = slice(first, first + 1)
            launch(f"reorder.int{m.bits}", (self.blocks, 1), m.weight[piece].view(np.int32), self.codes,
                   first, self.rows, self.blocks)  # fmt: skip
        zeros = m.zeros
        launch("pack_scales.any", (groups, len(m.scales)), m.scales, zeros, self.scales, 0, self.rows, groups,
               8 if m.bits == 4 else 128, flags(HAS_ZEROS=zeros is not None))  # fmt: skip

    def prepare(self, x, norm=None):
        """x as the products want it: normalised, permuted, padded, fp16."""
        m, k = x.shape
        out, perm = poisoned((m, self.padded), HALF), self.matrix.perm
        if norm is None:
            launch("gather.any", (ceil(self.padded, s.ELEMENTS), m), x, perm, out, k, self.padded,
                   flags(PERMUTED=perm is not None, X_HALF=x.dtype == HALF, OUT_HALF=True))  # fmt: skip
        else:
            launch("norm.1024", (m,), x, norm.weight, norm.bias, perm, out, k, self.padded, norm.eps,
                   flags(PERMUTED=perm is not None, LAYER_NORM=norm.bias is not None, OUT_HALF=True))  # fmt: skip
        return out


def linear(x, w: OnDevice, out, *, tile="small", split=1, norm=None, gelu=False, residual=None):
    name = f"linear.{w.kind}.{tile}"
    shape = s.constants(name, ARCHITECTURE)
    m, n = x.shape[0], w.matrix.n
    tiles = ceil(m, shape["BM"]) * (w.rows // shape["BN"])
    partials, counters = poisoned((tiles, split, shape["BM"] * shape["BN"])), np.zeros(tiles, np.int32)
    launch(name, (tiles, split), w.prepare(x, norm), w.codes, w.scales, w.matrix.bias, residual, out, partials,
           counters, m, n, w.rows, w.blocks, w.shift,
           flags(BIAS=w.matrix.bias is not None, GELU=gelu, RESIDUAL=residual is not None,
                 OUT_HALF=out.dtype == HALF))  # fmt: skip
    assert not counters.any()


def activations(rng, m, k, *, outlier=False):
    x = rng.standard_normal((m, k)).astype(np.float32)
    if outlier:
        x[:, k // 3] *= 1000
    return x


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("n, k", [(32, 128), (65, 300), (130, 104), (1, 1)])
def test_a_packed_matrix_arrives_on_the_device(bits, n, k, rng):
    w = OnDevice(matrix(rng, n, k, bits))
    if bits == 16:
        np.testing.assert_array_equal(w.codes[:n, :k], w.matrix.weight)
        np.testing.assert_array_equal(w.codes[:n, k:], 0)
        return
    fields = w.codes.view(np.uint32)[..., None, :] >> (bits * np.arange(32 // bits, dtype=np.uint32))[:, None]
    codes = (fields & ((1 << bits) - 1)).reshape(w.blocks, w.rows, 128)
    np.testing.assert_array_equal(codes.transpose(1, 0, 2).reshape(w.rows, -1)[:n, :k], w.matrix.codes())


LINEAR_CASES = {
    "one row, one group": {"m": 1, "n": 32, "k": 128},
    "16 rows": {"m": 16, "n": 128, "k": 256, "dtype": HALF},
    "off every tile": {"m": 17, "n": 130, "k": 200},
    "split": {"m": 3, "n": 65, "k": 640, "split": 3, "dtype": HALF},
    "more programs than blocks need": {"m": 2, "n": 33, "k": 640, "split": 4},
    "outlier channel": {"m": 4, "n": 64, "k": 384, "outlier": True},
    "asymmetric, bias": {"m": 5, "n": 40, "k": 256, "asymmetric": True, "bias": True, "dtype": HALF},
    "column order, split": {"m": 2, "n": 40, "k": 300, "asymmetric": True, "perm": True, "split": 2},
    "gelu, residual": {"m": 3, "n": 96, "k": 128, "bias": True, "gelu": True, "residual": True},
    "large tile": {"m": 130, "n": 65, "k": 256, "tile": "large", "asymmetric": True},
    "large tile, split": {"m": 33, "n": 65, "k": 256, "tile": "large", "split": 2, "bias": True, "dtype": HALF},
}
KINDS = {"int4": (4, 128), "int4 in 64s": (4, 64), "int4 in 32s": (4, 32), "int8": (8, 128), "int8 in 32s": (8, 32),
         "fp16": (16, 128)}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", LINEAR_CASES)
def test_linear(kind, case, rng):
    options, (bits, group) = dict(LINEAR_CASES[case]), KINDS[kind]
    m, n, k = (options.pop(key) for key in ("m", "n", "k"))
    asymmetric, perm = (options.pop(key, False) and bits < 16 for key in ("asymmetric", "perm"))
    w = matrix(rng, n, k, bits, group, asymmetric=asymmetric, perm=perm, bias=options.pop("bias", False))
    x = activations(rng, m, k, outlier=options.pop("outlier", False))
    out, expected = poisoned((m, n), options.pop("dtype", np.float32)), poisoned((m, n))
    if options.pop("residual", False):
        options["residual"] = activations(rng, m, n)
    reference.linear(
        x, w, out=expected, activation="gelu" if options.get("gelu") else None, residual=options.get("residual")
    )
    linear(x, OnDevice(w), out, **options)
    close(out, expected, 4e-3)


def test_linear_adds_to_its_own_residual(rng):
    w, x, residual = matrix(rng, 40, 128, 4), activations(rng, 3, 128), activations(rng, 3, 40)
    expected = poisoned((3, 40))
    reference.linear(x, w, out=expected, residual=residual)
    linear(x, OnDevice(w), residual, residual=residual, split=1)
    close(residual, expected, 2e-3)


def test_a_split_product_has_the_same_bits_every_time(rng):
    """And those of adding the parts in order: what arrives last must not matter."""
    w, x = OnDevice(matrix(rng, 64, 640, 4)), activations(rng, 2, 640)
    first, second = poisoned((2, 64)), poisoned((2, 64))
    linear(x, w, first, split=5)
    linear(x, w, second, split=5)
    np.testing.assert_array_equal(first, second)


def test_products_beyond_fp16_saturate(rng):
    """Infinity would become NaN in the next norm; a residual stream in float32 keeps the true value."""
    w, x = matrix(rng, 32, 128, 4), activations(rng, 2, 128) * 6e4
    half, full, expected = poisoned((2, 32), HALF), poisoned((2, 32)), poisoned((2, 32))
    reference.linear(x.clip(-65504, 65504), w, out=expected)
    assert np.abs(expected).max() > 65504
    linear(x, OnDevice(w), half)
    linear(x, OnDevice(w), full)
    close(full, expected, 4e-3)
    close(half, expected.clip(-65504, 65504), 4e-3)


def test_a_norm_tames_what_fp16_could_not_hold(rng):
    x = activations(rng, 3, 256, outlier=True) * 1e4
    norm = Norm(rng.uniform(0.5, 2, 256).astype(np.float32), None, 1e-6)
    w, out, expected = matrix(rng, 64, 256, 4), poisoned((3, 64)), poisoned((3, 64))
    reference.linear(x, w, out=expected, norm=norm)
    linear(x, OnDevice(w), out, norm=norm)
    close(out, expected, 4e-3)


@pytest.mark.parametrize("m, n, k, tile, split, dtype", [
    (1, 32, 128, "small", 1, HALF),
    (5, 65, 640, "small", 3, np.float32),
    (65, 130, 256, "large", 1, HALF),
    (20, 40, 256, "large", 2, HALF),
])  # fmt: skip
@pytest.mark.parametrize("biased", [False, True])
def test_gate_up(m, n, k, tile, split, dtype, biased, rng):
    gate, up = (matrix(rng, n, k, 4, asymmetric=biased, bias=biased) for _ in range(2))
    norm = Norm(rng.uniform(0.5, 2, k).astype(np.float32), None, 1e-6)
    x, expected, out = activations(rng, m, k, outlier=True), poisoned((m, n)), poisoned((m, n), dtype)
    reference.gate_up(x, gate, up, out=expected, norm=norm)
    g, u, name = OnDevice(gate), OnDevice(up), f"gate_up.int4.{tile}"
    shape = s.constants(name, ARCHITECTURE)
    tiles = ceil(m, shape["BM"]) * (g.rows // shape["BN"])
    partials, counters = poisoned((tiles, split, 2 * shape["BM"] * shape["BN"])), np.zeros(tiles, np.int32)
    launch(name, (tiles, split), g.prepare(x, norm), g.codes, g.scales, gate.bias, u.codes, u.scales, up.bias, out,
           partials, counters, m, n, g.rows, g.blocks, g.shift,
           flags(BIAS=biased, BIAS_UP=biased, OUT_HALF=dtype == HALF))  # fmt: skip
    assert not counters.any()
    close(out, expected, 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_embed(kind, rng):
    bits, group = KINDS[kind]
    table = matrix(rng, 70, 200, bits, group, asymmetric=bits < 16, perm=bits == 8)
    w, ids, out, expected = (
        OnDevice(table),
        np.array([0, 69, 33, 33, 64], np.int32),
        poisoned((5, 200)),
        poisoned((5, 200)),
    )
    reference.embed(ids, table, out=expected)
    launch(f"embed.{w.kind.removesuffix('_fine')}", (w.blocks, 5), ids, w.codes, w.scales, table.perm, out, 200, w.rows,
           w.blocks, w.shift, flags(PERMUTED=table.perm is not None))  # fmt: skip
    np.testing.assert_allclose(out, expected, rtol=1e-6)


# rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant, m, k", [("1024", 3, 104), ("1024", 1, 1024), ("4096", 2, 1664), ("8192", 1, 5000)])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, HALF])
def test_norm(variant, m, k, layer, dtype, rng):
    x = activations(rng, m, k) + 3
    x[0, k // 3] *= 1000
    norm = Norm(rng.uniform(0.5, 2, k).astype(np.float32),
                rng.standard_normal(k).astype(np.float32) if layer else None, 0.5)  # fmt: skip
    perm = rng.permutation(k).astype(np.int32) if dtype == HALF else None
    expected, padded = poisoned((m, k)), round_up(k, 128) if dtype == HALF else k
    reference.normalize(x, norm, out=expected)
    out = poisoned((m, padded), dtype)
    launch(f"norm.{variant}", (m,), x, norm.weight, norm.bias, perm, out, k, padded, norm.eps,
           flags(LAYER_NORM=layer, PERMUTED=perm is not None, OUT_HALF=dtype == HALF))  # fmt: skip
    close(out[:, :k], expected if perm is None else expected[:, perm], 1e-3 if dtype == HALF else 1e-6)
    np.testing.assert_array_equal(out[:, k:], 0)


@pytest.mark.parametrize("source, target", [(np.float32, HALF), (HALF, np.float32), (HALF, HALF)])
@pytest.mark.parametrize("k, permuted", [(1, False), (1300, False), (1300, True)])
def test_gather(source, target, k, permuted, rng):
    x = activations(rng, 3, k).astype(source)
    perm = rng.permutation(k).astype(np.int32) if permuted else None
    out, padded = poisoned((3, round_up(k, 128)), target), round_up(k, 128)
    launch("gather.any", (ceil(padded, s.ELEMENTS), 3), x, perm, out, k, padded,
           flags(PERMUTED=permuted, X_HALF=source == HALF, OUT_HALF=target == HALF))  # fmt: skip
    np.testing.assert_array_equal(out[:, :k], (x[:, perm] if permuted else x).astype(target))
    np.testing.assert_array_equal(out[:, k:], 0)


@pytest.mark.parametrize("types", [(np.float32, np.float32, np.float32), (HALF, np.float32, HALF), (HALF, HALF, HALF)])
def test_add(types, rng):
    x, y = (activations(rng, 1, 1500)[0].astype(t) for t in types[:2])
    out = poisoned(1500, types[2])
    launch("add.any", (2,), x, y, out, 1500,
           flags(X_HALF=types[0] == HALF, Y_HALF=types[1] == HALF, OUT_HALF=types[2] == HALF))  # fmt: skip
    np.testing.assert_array_equal(out, (x.astype(np.float32) + y).astype(types[2]))


def test_swiglu(rng):
    gate, up = activations(rng, 2, 1100, outlier=True), activations(rng, 2, 1100)
    out = poisoned((2, 1100), HALF)
    launch("swiglu.any", (3,), gate, up, out, 2200, flags(OUT_HALF=True))
    close(out, silu(gate) * up, 1e-3)


# attention -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("t, heads, d, begin", [(1, 2, 128, 5), (5, 9, 64, 0), (3, 1, 10, 7)])
def test_rope_append(int8, t, heads, d, begin, rng):
    capacity = 12
    qkv = activations(rng, t, 3 * heads * d).astype(HALF)
    qkv[:, heads * d + 3] *= HALF(100)
    qkv[0, -d:] = 0  # a vector of zeros has a scale of zero
    rope, logn = rope_tables(rng, capacity, d)
    cache, start = Cache(heads, capacity, d, int8), np.array([begin], np.int32)
    expected = reference.kv_cache(1, heads, d, capacity, cache.kind)
    rotated = qkv.astype(np.float32)
    reference.rope_append(rotated, rope=rope, logn=logn, cache=expected, layer=0, start=start)
    launch(f"rope_append.{cache.kind}", (t, ceil(heads, s.ROPE_HEADS)), qkv, rope, logn, *cache.arguments, start, heads,
           capacity, d)  # fmt: skip
    new = slice(begin, begin + t)
    close(qkv[:, : heads * d], rotated[:, : heads * d], 1e-3)
    k, v = cache.values()
    np.testing.assert_allclose(k[:, new], expected.values[0, 0, :, new], rtol=1e-6 if int8 else 1e-3, atol=1e-4)
    np.testing.assert_array_equal(v[:, new], expected.values[0, 1, :, new])
    untouched = np.delete(cache.k, np.arange(begin, begin + t), axis=1)
    np.testing.assert_array_equal(untouched, poisoned(untouched.shape, untouched.dtype))


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
@pytest.mark.parametrize("t, heads, d, begin", [(1, 1, 128, 0), (3, 2, 128, 70), (140, 1, 128, 5), (40, 2, 64, 33),
                                                 (2, 1, 10, 1)])  # fmt: skip
def test_cached_attention(int8, t, heads, d, begin, rng):
    cache = filled_cache(rng, heads, begin + t + 3, d, int8, begin + t)
    qkv, out = activations(rng, t, 3 * heads * d).astype(HALF), poisoned((t, heads * d), HALF)
    name = f"cached_attention.{cache.kind}.{'128' if d == 128 else 'any'}"
    grid, start = (ceil(t, s.constants(name, ARCHITECTURE)["BM"]), heads), np.array([begin], np.int32)
    launch(name, grid, qkv, *cache.arguments, start, out, t, heads, begin + t + 3, d, d**-0.5)
    close(out, causal(qkv, cache, heads, begin), 3e-3)


def causal(qkv, cache, heads, begin):
    t, end = len(qkv), begin + len(qkv)
    q = qkv.astype(np.float32).reshape(t, 3, heads, -1)[:, 0].swapaxes(0, 1)
    k, v = (a[:, :end] for a in cache.values())
    return attention(q, k, v, np.arange(end) <= np.arange(begin, end)[:, None]).reshape(t, -1)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("heads, d, begin", [(1, 128, 0), (2, 128, 63), (2, 128, 1030), (2, 64, 100), (3, 10, 17)])
def test_decode_attention(int8, heads, d, begin, rng):
    cache = filled_cache(rng, heads, begin + 4, d, int8, begin + 1)
    qkv, out = activations(rng, 1, 3 * heads * d).astype(HALF), poisoned((1, heads * d), HALF)
    partials, counters = poisoned(heads * s.DECODE_SPLITS * 129), np.zeros(heads, np.int32)
    launch(f"decode_attention.{cache.kind}.{'128' if d == 128 else 'any'}", (heads, s.DECODE_SPLITS), qkv,
           *cache.arguments, np.array([begin], np.int32), out, partials, counters, heads, begin + 4, d,
           d**-0.5)  # fmt: skip
    assert not counters.any()
    close(out, causal(qkv, cache, heads, begin), 1e-3)


@pytest.mark.parametrize("variant, d", [("104", 104), ("128", 128), ("any", 104), ("any", 64), ("any", 24)])
@pytest.mark.parametrize("rows", [1, 75, 128])
def test_vision_attention(variant, d, rows, rng):
    heads, name = 2, f"attention.{variant}"
    qkv, out, expected = activations(rng, rows, heads * 3 * d).astype(HALF), poisoned((rows, heads * d), HALF), None
    expected = poisoned((rows, heads * d))
    reference.vision_attention(qkv.astype(np.float32), heads, out=expected)
    q = qkv.reshape(-1)
    launch_attention(name, q, q[d:], q[2 * d :], out, rows, rows, heads, 3, d)
    close(out, expected, 3e-3)


@pytest.mark.parametrize("q_rows, k_rows, d", [(1, 1, 128), (130, 70, 128), (33, 100, 32)])
def test_cross_attention(q_rows, k_rows, d, rng):
    heads = 2
    q, k, v = (activations(rng, rows, heads * d).astype(HALF) for rows in (q_rows, k_rows, k_rows))
    out, expected = poisoned((q_rows, heads * d), HALF), poisoned((q_rows, heads * d))
    reference.cross_attention(*(a.astype(np.float32) for a in (q, k, v)), heads, out=expected)
    name = f"attention.{'128' if d == 128 else 'any'}"
    launch_attention(name, q, k, v, out, q_rows, k_rows, heads, 1, d)
    close(out, expected, 3e-3)


def launch_attention(name, q, k, v, out, q_rows, k_rows, heads, parts, d):
    grid = (ceil(q_rows, s.constants(name, ARCHITECTURE)["BM"]), heads)
    launch(name, grid, q, k, v, out, q_rows, k_rows, heads, parts, d, d**-0.5)


# choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 65, 140000])
def test_argmax(size, rng):
    logits = rng.standard_normal((4, size)).astype(np.float32)
    logits[1] = logits[1].max()  # all tied
    logits[2, size // 2 :] = 9
    logits[3] = -np.inf
    out, counters = poisoned(4, np.int32), np.zeros(4, np.int32)
    values, indices = poisoned((4, s.ARGMAX_PARTS)), poisoned((4, s.ARGMAX_PARTS), np.int32)
    launch("argmax.any", (s.ARGMAX_PARTS, 4), logits, out, values, indices, counters, size)
    np.testing.assert_array_equal(out, logits.argmax(-1))
    assert not counters.any()


def sample(logits, temperature, top_k, top_p, uniform):
    out = poisoned(1, np.int32)
    settings = np.array([temperature, top_p, uniform], np.float32)
    launch("sample.any", (1,), logits, settings, np.array([top_k], np.int32), out, len(logits))
    return int(out[0])


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1, 0, 1), (0.7, 2, 1), (1.3, 0, 0.5), (0.8, 40, 0.9), (1, 0, 0)]
)
def test_sample_draws_what_the_host_would(temperature, top_k, top_p, rng):
    """The same steps, in float64, with the same uniform number; numbers too near a border are passed over."""
    logits = (3 * rng.standard_normal(1500)).astype(np.float32)
    logits[100:110] = np.sort(logits)[-3]  # ties, through which top_k and top_p cut
    probabilities = kept_probabilities(logits, temperature, top_k, top_p)
    borders = np.cumsum(probabilities)
    for uniform in rng.uniform(size=4).astype(np.float32):
        if np.abs(borders - uniform).min() > 1e-5:
            assert sample(logits, temperature, top_k, top_p, uniform) == np.searchsorted(borders, uniform, side="right")


def kept_probabilities(logits, temperature, top_k, top_p):
    x = logits.astype(np.float64) / temperature
    if top_k:
        x = np.where(x >= np.sort(x)[-top_k], x, -np.inf)
    p = np.exp(x - x.max())
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        kept = order[: np.searchsorted(np.cumsum(p[order]), top_p, side="right") + 1]
        p = np.where(np.isin(np.arange(len(p)), kept), p, 0)
    return p / p.sum()


def test_sample_keeps_what_the_golden_cases_keep(golden):
    for case in json.loads((golden / "sampling.json").read_text())["cases"]:
        logits, kept = np.array(case["logits"], np.float32), set(case["kept"])
        drawn = {sample(logits, case["temperature"], case["top_k"], case["top_p"], u) for u in (0, 0.5, 0.999)}
        assert drawn <= kept, case


# moving ----------------------------------------------------------------------------------------------------------


def test_move_rows(rng):
    source = rng.integers(-9, 9, (3, 1500)).astype(np.int16)
    target = poisoned((3, 1400), np.int16)
    launch("move_rows.any", (2, 3), source, target, 1100, 1500, 1400)
    np.testing.assert_array_equal(target[:, :1100], source[:, :1100])
    np.testing.assert_array_equal(target[:, 1100:], 77)
