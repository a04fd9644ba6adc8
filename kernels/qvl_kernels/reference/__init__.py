"""The reference backend: every operation in plain numpy and float32, written for readability."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from qvl_kernels.ops import Norm, attend_in_turn, check_segments, query_heads, restored
from qvl_kernels.packing import Matrix
from qvl_kernels.reference.functions import ACTIVATIONS, attention, dequantize_kv, quantize_kv, rotate, silu
from qvl_kernels.sizes import MappedSizes

CACHE_DTYPES = ("fp32", "fp16", "int8")


class ReferenceCache:
    """Keys and values as float32 ``[layers, 2, kv_heads, capacity, head_dim]``, rounded to `dtype`."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, capacity: int, dtype: str):
        if dtype not in CACHE_DTYPES:
            raise ValueError(f"cache dtype {dtype!r}: expected one of {CACHE_DTYPES}")
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.capacity, self.dtype = capacity, dtype
        self.values = np.zeros((layers, 2, kv_heads, capacity, head_dim), np.float32)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def resized(self, capacity: int, length: int, *, keep: bool = False) -> ReferenceCache:
        other = ReferenceCache(self.layers, self.kv_heads, self.head_dim, capacity, self.dtype)
        other.values[:, :, :, :length] = self.values[:, :, :, :length]
        return other

    def saved(self, layer: int, length: int) -> list[np.ndarray]:
        return [np.ascontiguousarray(self.values[layer, :, :, :length])]

    def restore(self, layer: int, length: int, arrays: Sequence[np.ndarray]) -> None:
        target = self.values[layer, :, :, :length]
        (target[...],) = restored([(target.shape, target.dtype)], arrays)

    def append(self, layer: int, start: int, k: np.ndarray, v: np.ndarray) -> None:
        """Store k and v, float32 ``[kv_heads, T, head_dim]``, from position `start` on."""
        for slot, x in enumerate((k, v)):
            if self.dtype == "fp16":
                x = x.astype(np.float16)
            elif self.dtype == "int8":
                x = dequantize_kv(*quantize_kv(x))
            self.values[layer, slot, :, start : start + x.shape[1]] = x


class ReferenceOps:
    """The `Ops` protocol in numpy."""

    name = "reference"
    activation_dtype = np.dtype(np.float32)
    score_cache_dtype = "fp32"
    row_cost = 1.0
    any_capacity = False
    slice_rows = 64

    def empty(self, shape, dtype=np.float32):
        return np.empty(shape, dtype)

    def upload(self, values):
        return np.ascontiguousarray(values)

    def write(self, target, values):
        target[...] = values

    def download(self, array):
        return np.array(array)

    def copy(self, source, target):
        target[...] = source

    def weight(self, matrix: Matrix) -> Matrix:
        return matrix

    def coarse(self, weight):
        return False

    def coarse_attention(self, width):
        return False

    def kv_cache(self, layers, kv_heads, head_dim, capacity, dtype):
        return ReferenceCache(layers, kv_heads, head_dim, capacity, dtype)

    def embed(self, ids, table, *, out):
        out[...] = table.rows(ids)

    def linear(self, x, w, *, out, norm=None, activation=None, residual=None):
        h = x if norm is None else self._norm(x, norm)
        y = h @ w.dequantize().T
        if w.bias is not None:
            y += w.bias
        if activation is not None:
            y = ACTIVATIONS[activation](y)
        out[...] = y if residual is None else y + residual

    def gate_up(self, x, gate, up, *, out, norm):
        h = self._norm(x, norm)
        g, u = np.empty((len(x), gate.n), np.float32), np.empty((len(x), up.n), np.float32)
        self.linear(h, gate, out=g)
        self.linear(h, up, out=u)
        out[...] = silu(g) * u

    def _norm(self, x: np.ndarray, norm: Norm) -> np.ndarray:
        if norm.bias is None:
            return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + norm.eps) * norm.weight
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + norm.eps) * norm.weight + norm.bias

    def normalize(self, x, norm, *, out):
        out[...] = self._norm(x, norm)

    def add(self, x, y, *, out):
        out[...] = x + y

    def gather(self, x, index, *, out):
        out[...] = x[index]

    def vision_attention(self, qkv, heads, *, out, rope=None, segments=None):
        segments = [0, len(qkv)] if segments is None else segments
        check_segments(segments, len(qkv))
        q, k, v = qkv.reshape(len(qkv), heads, 3, -1).transpose(2, 1, 0, 3)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        for begin, end in itertools.pairwise(segments):
            part = attention(q[:, begin:end], k[:, begin:end], v[:, begin:end])
            out[begin:end] = part.reshape(end - begin, out.shape[1])

    def cross_attention(self, q, k, v, heads, *, out):
        q, k, v = (a.reshape(len(a), heads, -1).swapaxes(0, 1) for a in (q, k, v))
        out[...] = attention(q, k, v).reshape(out.shape)

    def rope_append(self, qkv, *, rope, logn, cache, layer, start, q_norm=None, k_norm=None):
        begin, heads = int(start[0]), query_heads(qkv.shape[1], cache)
        positions = slice(begin, begin + len(qkv))
        by_head = qkv.reshape(len(qkv), -1, cache.head_dim).swapaxes(0, 1)
        q, k, v = np.split(by_head, [heads, heads + cache.kv_heads])
        rotated = rotate(k if k_norm is None else self._norm(k, k_norm), rope[positions])
        cache.append(layer, begin, rotated, v)
        rotated = rotate(q if q_norm is None else self._norm(q, q_norm), rope[positions])
        q[...] = rotated if logn is None else rotated * logn[positions, None]

    def cached_attention(self, qkv, cache, layer, start, *, out):
        begin, heads = int(start[0]), query_heads(qkv.shape[1], cache)
        end = begin + len(qkv)
        q = qkv.reshape(len(qkv), -1, cache.head_dim)[:, :heads].swapaxes(0, 1)
        k, v = cache.values[layer, :, :, :end].repeat(heads // cache.kv_heads, axis=1)
        visible = np.arange(end) <= np.arange(begin, end)[:, None]
        out[...] = attention(q, k, v, visible).reshape(out.shape)

    def attend(self, qkv, sequences, *, out, q_norm=None, k_norm=None):
        attend_in_turn(self, qkv, sequences, out, q_norm, k_norm)

    def argmax(self, logits, *, out):
        out[...] = np.where(np.isfinite(logits).all(-1), logits.argmax(-1), -1)

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        return step

    def movable(self, replay, inputs):
        return None

    def synchronize(self):
        pass


class ReferenceSizes(MappedSizes):
    """`Sizes` of `ReferenceOps`."""

    def kv_cache(self, layers: int, kv_heads: int, head_dim: int, capacity: int, dtype: str) -> int:
        """Return the size in float32, independent of `dtype`."""
        return 8 * layers * kv_heads * head_dim * capacity


SIZES = ReferenceSizes()
