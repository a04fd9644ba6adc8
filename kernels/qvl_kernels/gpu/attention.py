"""Rotation and attention on an NVIDIA GPU: launches, and what is kept between them."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qvl_kernels.gpu import signatures as s
from qvl_kernels.gpu.arrays import DeviceArray, expect
from qvl_kernels.gpu.cache import CudaCache
from qvl_kernels.gpu.driver import Driver
from qvl_kernels.gpu.graph import Queue, Replay
from qvl_kernels.gpu.launcher import Images, Launcher
from qvl_kernels.gpu.memory import Memory, Uploader
from qvl_kernels.gpu.table import SequenceTable
from qvl_kernels.gpu.tiles import COUNTERS
from qvl_kernels.ops import Array, Attended, DeviceError, Norm, check_segments, query_heads

_HALF, _FLOAT = np.dtype(np.float16), np.dtype(np.float32)

_FEWEST_SPLITS = 4
"""Fewest parts of the positions in the attention of a few tokens."""

_CONSTANTS = 8
"""Number of cached arrays of segment boundaries."""

_COUNTERS_ALIGNED = 4
"""Each branch's counters begin at a multiple of this, as an argument of a kernel has to."""

MOST_VALUES = 1 << 31
"""Most values that a product or `attention` may read: the kernels compute offsets in int32."""


class _Given(NamedTuple):
    """The launch arguments for a sequence, or for several in a table."""

    arrays: tuple[DeviceArray | None, ...]
    rope: DeviceArray | None
    logn: DeviceArray | None
    capacity: int
    flags: int


class _Norms(NamedTuple):
    """The launch arguments for the norms of queries and keys."""

    weights: tuple[DeviceArray | None, ...] = (None, None)
    epsilons: tuple[float, ...] = (0.0, 0.0)
    flags: int = 0


class AttentionOps:
    """The part of `CudaOps` that rotates and attends, and with it what captured steps need; see there."""

    def __init__(self, driver: Driver, images: Images, progress: Callable[[int], None]):
        self.driver = driver
        self.memory = Memory(driver)
        self.queue = Queue(driver, self.memory)
        self.launch = Launcher(driver, self.queue, images)
        self.uploader = Uploader(driver, progress)
        self._counters = self.memory.array((COUNTERS,), np.int32)
        driver.fill(self._counters.address, 0, self._counters.nbytes)
        self._table = SequenceTable(self.memory, self.uploader)
        self._bounds: collections.OrderedDict[tuple[int, ...], DeviceArray] = collections.OrderedDict()

    def vision_attention(self, qkv, heads, *, out, rope=None, segments=None):
        rows, d = qkv.shape[0], qkv.shape[1] // (3 * heads)
        expect(qkv, (rows, 3 * heads * d), _HALF)
        if rope is not None:
            expect(rope, (rows, d), _FLOAT)
            if d % 2:
                raise ValueError(f"a rotation of heads of {d}, which is odd")
            self.launch("rotate.any", (rows, -(-2 * heads // s.ROPE_HEADS)), qkv, rope, heads, d)
        bounds = None if segments is None else self._row_bounds(segments, rows)
        self._attention((qkv, qkv, qkv), bounds, rows, rows, heads, 3, d, out)

    def _row_bounds(self, segments: Sequence[int], rows: int) -> DeviceArray:
        """Return int32 ``[2, rows]``: first row and end of each row's segment.

        All blocks of a picture use the same bounds: they are uploaded once, outside of captured steps.
        """
        key = tuple(map(int, segments))
        found = self._bounds.pop(key, None)
        if found is None:
            check_segments(key, rows)
            ends = np.asarray(key, np.int32)
            found = self.memory.constant((2, rows), np.int32)
            self.uploader(np.repeat(np.stack([ends[:-1], ends[1:]]), np.diff(ends), axis=1), found)
        self._bounds[key] = found
        if len(self._bounds) > _CONSTANTS:
            self._bounds.popitem(last=False)
        return found

    def cross_attention(self, q, k, v, heads, *, out):
        self._attention((q, k, v), None, q.shape[0], k.shape[0], heads, 1, q.shape[1] // heads, out)

    def _attention(self, qkv: tuple, bounds, q_rows: int, k_rows: int, heads: int, parts: int, d: int, out) -> None:
        expect(out, (q_rows, heads * d), _HALF)
        if d > 128:
            raise ValueError(f"heads of {d}: the GPU kernels take at most 128")
        if max(q_rows, k_rows) * parts * heads * d > MOST_VALUES:
            raise DeviceError(f"a picture of {k_rows} patches is too large for the GPU: lower the limits of its pixels")
        segments = "" if bounds is None else ".segments"
        name = f"{d}{segments}"
        if name not in s.KERNELS["attention"].variants:
            name = f"any{segments}"
        name = f"attention.{name}"
        grid = (-(-q_rows // self.launch.constants(name)["BM"]), heads)
        self.launch(name, grid, *qkv, bounds, out, q_rows, k_rows, heads, parts, d, 1 / math.sqrt(d))

    def rope_append(self, qkv, *, rope, logn, cache, layer, start, q_norm=None, k_norm=None):
        used = Attended(qkv.shape[0], rope, logn, cache, layer, start)
        self._rope_append(qkv, used, _given(used), _norms(q_norm, k_norm, cache.head_dim))

    def cached_attention(self, qkv, cache, layer, start, *, out):
        given = _Given((*cache.layer(layer), start, None), None, None, cache.stride, 0)
        self._cached_attention(qkv, cache, given, out)

    def attend(self, qkv, sequences, *, out, q_norm=None, k_norm=None):
        """In a captured step several sequences are in a table; their launches are branches, one for all lone rows."""
        recording = self.queue.recording
        parts = list(self._parts(qkv, sequences)) if recording else [[one] for one in sequences]
        listed, norms = recording and len(sequences) > 1, _norms(q_norm, k_norm, sequences[0].cache.head_dim)
        with self.queue.branches(len(parts)) as begin:
            first, counter = 0, 0
            for part in parts:
                begin()
                last = first + sum(one.rows for one in part)
                given = self._listed(part) if listed else _given(part[0])
                counter += self._attend(qkv[first:last], part, given, norms, out[first:last], counter)
                first = last

    def _parts(self, qkv, sequences) -> Iterator[list]:
        """Yield sequences that a launch can serve together: lone rows, or one sequence."""

        def kind(one) -> tuple[bool, bool]:
            return one.rows == 1 and self._rotates(qkv, one.cache), one.logn is None

        for (lone, _), some in itertools.groupby(sequences, kind):
            part = list(some)
            yield from [part] if lone else ([one] for one in part)

    def _rotates(self, qkv: DeviceArray, cache: CudaCache) -> bool:
        """Whether the attention of a lone row can rotate and append: its tile has room for the keys' head."""
        group = query_heads(qkv.shape[1], cache) // cache.kv_heads
        return group < self.launch.constants(f"decode_attention.{_variant(cache)}")["BM"]

    def _attend(self, qkv, part, given: _Given, norms: _Norms, out, counter: int) -> int:
        """Launch for one part; return the number of counters in use from `counter` on."""
        one = part[0]
        if one.rows == 1 and self._rotates(qkv, one.cache):
            flags = given.flags | norms.flags | s.ROPE | flags_of((one.logn, s.LOGN))
            return self._decode_attention(qkv, one.cache, 1, given, out, norms, flags, counter)
        self._rope_append(qkv, one, given, norms)
        return self._cached_attention(qkv, one.cache, given, out, counter)

    def _rope_append(self, qkv, used, given: _Given, norms: _Norms) -> None:
        cache, heads = used.cache, query_heads(qkv.shape[1], used.cache)
        grid = (used.rows, -(-(heads + cache.kv_heads) // s.ROPE_HEADS))
        flags = given.flags | norms.flags | flags_of((used.logn, s.LOGN))
        sizes = (heads, cache.kv_heads, given.capacity, cache.head_dim, *norms.epsilons, flags)
        tables = (given.rope, given.logn, *norms.weights)
        self.launch(f"rope_append.{cache.dtype}", grid, qkv, *tables, *given.arrays, *sizes)

    def _cached_attention(self, qkv, cache: CudaCache, given: _Given, out, counter: int = 0) -> int:
        t, d, heads = qkv.shape[0], cache.head_dim, query_heads(qkv.shape[1], cache)
        if t <= s.FEW_ROWS:
            return self._decode_attention(qkv, cache, t, given, out, _Norms(), given.flags, counter)
        if given.flags & s.LISTED:
            raise ValueError(f"{t} rows of a sequence in a captured step of several: at most {s.FEW_ROWS}")
        expect(out, (t, heads * d), _HALF)
        name = f"cached_attention.{_variant(cache)}"
        grid = (-(-t // self.launch.constants(name)["BM"]), heads)
        sizes = (t, heads, cache.kv_heads, given.capacity, d, 1 / math.sqrt(d))
        self.launch(name, grid, qkv, *given.arrays[:-1], out, *sizes)
        return 0

    def _decode_attention(
        self, qkv, cache: CudaCache, t: int, given: _Given, out, norms: _Norms, flags: int, counter: int
    ) -> int:
        """Attention of sequences with `t` rows each; with ROPE it rotates and appends first. Return its counters."""
        rows, d, heads, kv_heads = qkv.shape[0], cache.head_dim, query_heads(qkv.shape[1], cache), cache.kv_heads
        expect(out, (rows, heads * d), _HALF)
        name = f"decode_attention.{_variant(cache)}"
        splits = min(max(2 * self.driver.multiprocessors // kv_heads, _FEWEST_SPLITS), s.DECODE_SPLITS)
        partials = self.memory.array((rows * heads, splits, 128 + 1), _FLOAT)
        tiles = rows // t * kv_heads * -(-t * (heads // kv_heads) // self.launch.constants(name)["BM"])
        sizes = (t, heads, kv_heads, given.capacity, d, 1 / math.sqrt(d), *norms.epsilons, flags)
        scratch, tables = (partials, self._counters[counter:]), (given.rope, given.logn, *norms.weights)
        self.launch(name, (tiles, splits), qkv, *given.arrays, out, *scratch, *tables, *sizes)
        return -(-tiles // _COUNTERS_ALIGNED) * _COUNTERS_ALIGNED

    def _listed(self, part) -> _Given:
        return _Given((*[None] * 5, self._table.add(part)), None, None, 0, s.LISTED)

    # steps

    def capture(self, step: Callable[[], None]) -> Replay:
        table = self._table
        try:
            replay = self.queue.capture(step, table)
        finally:
            self._table = SequenceTable(self.memory, self.uploader)  # the other one refers to caches
        table.upload()
        return replay

    def movable(self, replay, inputs):
        return replay.table.movable(inputs)


def _variant(cache: CudaCache) -> str:
    return f"{cache.dtype}.{'128' if cache.head_dim == 128 else 'any'}"


def _given(used) -> _Given:
    cache = used.cache
    return _Given((*cache.layer(used.layer), used.start, None), used.rope, used.logn, cache.stride, 0)


def _norms(q_norm: Norm | None, k_norm: Norm | None, d: int) -> _Norms:
    weights, epsilons = zip(*(_head_norm(norm, d) for norm in (q_norm, k_norm)))
    return _Norms(weights, epsilons, flags_of((q_norm, s.Q_NORM), (k_norm, s.K_NORM)))


def flags_of(*conditions: tuple) -> int:
    """Return the sum of the flags whose condition is an array or True."""
    return sum(flag for condition, flag in conditions if condition is not None and condition is not False)


def _head_norm(norm: Norm | None, d: int) -> tuple[Array | None, float]:
    """Return weight and eps of the RMSNorm of each head."""
    if norm is None:
        return None, 0.0
    if norm.bias is not None:
        raise ValueError("a norm of queries or keys has no bias")
    expect(norm.weight, (d,), _FLOAT)
    return norm.weight, norm.eps
