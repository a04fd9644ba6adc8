"""`CpuOps`: the `Ops` protocol as instructions for the pool."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable

import numpy as np

from qvl_kernels.cpu import arrays, batched, cache, choices, features, tiles
from qvl_kernels.cpu.arrays import CpuCache, CpuWeight, address, check
from qvl_kernels.cpu.runner import Pool, Program, Replay, aligned, default_threads, float_word
from qvl_kernels.ops import FEW_ROWS, PRECISIONS, Norm, attend_in_turn, check_segments, query_heads
from qvl_kernels.packing import Matrix

F32, I32 = np.dtype(np.float32), np.dtype(np.int32)


_NOTHING = np.empty(0, np.uint8), 0
"""Scratch memory before its first use."""


class _Recording:
    """A context whose value is the program `outer`, or without one a new program, which then runs."""

    __slots__ = ("_ops", "_outer", "_program")

    def __init__(self, ops: CpuOps, outer: Program | None):
        self._ops, self._outer = ops, outer
        self._program = Program() if outer is None else outer

    def __enter__(self) -> Program:
        return self._program

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._outer is None and kind is None:
            self._ops.run(self._program)


class CpuOps:
    """The `Ops` protocol on the processor.

    Parameters
    ----------
    threads : int, optional
        Number of threads; by default ``QVL_THREADS``, else that of the performance cores available to this
        process.
    activations : {"auto", "int16", "int8"}
        Precision of activations in products of quantized weights with more than 16 rows. "int16": two int8 planes
        with one scale per 128 columns, relative error below 1e-4. "int8": one scale per 32 columns, relative error 0.5
        to 1.3% (for int8 weights in groups of 128, 128 columns and 0.6 to 2.5%), and vision attention in 16-bit
        integers, below 0.05%, if that is fast on the processor. "auto": int16 for matrices (and exact attention for
        keys) below a million values, else int8. Up to 16 rows always use int16: their cost is reading the weights.

    Attributes
    ----------
    choices : Choices
        What products are recorded with: measured on this machine, or built in. They change no result.

    Notes
    -----
    With 16-bit activations a row's result does not depend on other rows, bit for bit: products, also of fp16 weights,
    and attention over the cache have a fixed order of summation. A prompt may then be cut anywhere, and a continued
    conversation equals one that is computed again. With 8-bit activations they may differ if two tokens are nearly
    equal: up to 16 rows, such as the tokens of an earlier answer, are computed with 16 bits.

    The constructor compiles the kernels if they are not cached. An instance is thread-safe: operations and replayed
    captures of several threads run one after another.
    """

    name = "cpu"
    activation_dtype = F32
    score_cache_dtype = "fp32"
    any_capacity = False
    slice_rows = 64
    row_cost = 0.4
    """Measured on two cores: 2, 8 and 16 rows take 1.3, 4.4 to 5 and 6.4 to 9 times as long as one, the more the faster
    the memory is. With more cores it is the bottleneck, and a row costs less."""

    def __init__(self, *, activations: str = "auto", threads: int | None = None):
        if activations not in PRECISIONS:
            raise ValueError(f"activations {activations!r}: expected one of {', '.join(PRECISIONS)}")
        self.activations, self.threads = activations, threads or default_threads()
        self.choices = (choices.kept() if choices.wanted() else None) or choices.built_in()
        self._pool = Pool(self.threads)
        self._local = threading.local()
        self._scratch: dict[str, tuple[np.ndarray, int]] = {}

    # ---------------------------------------------------------------------------------------------- programs
    def _program(self) -> _Recording:
        """Return a context: the program being recorded by this thread, or a new one that then runs."""
        return _Recording(self, getattr(self._local, "recording", None))

    def run(self, program: Program) -> None:
        """Execute a program with this backend's threads."""
        self._pool.run(program)

    def _memory(self, program: Program, purpose: str, nbytes: int) -> int:
        """Return scratch memory that is valid until the program's next operation.

        Programs run one at a time, so they share it. When it grows, existing programs keep the old memory.
        """
        block, place = self._scratch.get(purpose, _NOTHING)
        if block.nbytes < nbytes:
            block = aligned(nbytes * 5 // 4 + 4096)
            place = address(block)
            self._scratch[purpose] = block, place
        program.keep(block)
        return place

    def capture(self, step: Callable[[], None]) -> Replay:
        program = Program()
        try:
            self._local.recording = program
            step()
        finally:
            self._local.recording = None
        program.words()
        return Replay(self._pool, program)

    def movable(self, replay, inputs):
        return arrays.movable(replay.program, inputs)

    def synchronize(self) -> None:
        pass

    # ---------------------------------------------------------------------------------------------- memory
    def empty(self, shape, dtype=np.float32):
        return arrays.empty(shape, dtype)

    def upload(self, values):
        return np.ascontiguousarray(values)

    def write(self, target, values):
        target[...] = values

    def download(self, array):
        return np.array(array)

    def copy(self, source, target):
        for array in (source, target):
            if array.dtype not in (np.float32, np.float16):
                raise ValueError(f"copy: expected float32 or float16, got {array.dtype.name}")
        check("source", source, source.dtype, target.shape)
        check("target", target, target.dtype, source.shape)
        with self._program() as program:
            program.keep(source, target)
            sizes = source.dtype.itemsize, target.dtype.itemsize
            program.add("copy", address(source), sizes[0], address(target), sizes[1], source.size)

    def weight(self, matrix: Matrix) -> CpuWeight:
        weight = CpuWeight(matrix)
        if self.coarse(weight):
            cache.prepare("large")  # while a model is loaded, not in its first answer
        return weight

    def coarse(self, weight):
        return batched.takes_int8(weight, FEW_ROWS + 1, self.activations)

    def coarse_attention(self, width):
        return batched.attends_alone(width, FEW_ROWS, self.activations)

    def kv_cache(self, layers, kv_heads, head_dim, capacity, dtype):
        return CpuCache(layers, kv_heads, head_dim, capacity, dtype)

    # ---------------------------------------------------------------------------------------------- products
    def embed(self, ids, table, *, out):
        check("ids", ids, I32, (None,))
        check("out", out, F32, (len(ids), table.k))
        with self._program() as program:
            program.keep(ids, table, out)
            w = table
            program.add(
                "embed", address(ids), len(ids), w.weight, w.scales, w.zeros, w.perm, w.bits, w.group_size, w.n, w.k,
                address(out),
            )  # fmt: skip

    def linear(self, x, w, *, out, norm=None, activation=None, residual=None):
        check("x", x, F32, (None, w.k))
        check("out", out, F32, (len(x), w.n))
        if residual is not None:
            check("residual", residual, F32, out.shape)
        with self._program() as program:
            program.keep(x, w, out, residual)
            self._multiplier(program, x, w, norm)(w, out, activation=activation, residual=residual)

    def gate_up(self, x, gate, up, *, out, norm):
        check("x", x, F32, (None, gate.k))
        check("out", out, F32, (len(x), gate.n))
        if (gate.n, gate.k) != (up.n, up.k):
            raise ValueError(f"gate is [{gate.n}, {gate.k}], up is [{up.n}, {up.k}]")
        with self._program() as program:
            program.keep(x, gate, up, out)
            product = self._multiplier(program, x, gate, norm)
            product(gate, out)
            if not batched.same_activations(gate, up):
                product = self._multiplier(program, x, up, norm)
            product(up, out, gated=True)

    def _recorder(self, program: Program) -> batched.Recorder:
        memory = functools.partial(self._memory, program)
        return batched.Recorder(program, memory, self.threads, self._pool.counters)

    def _multiplier(self, program: Program, x: np.ndarray, w: CpuWeight, norm: Norm | None) -> Callable[..., None]:
        """Convert x for products with `w`; return a function that adds such a product."""
        if not batched.takes_int8(w, len(x), self.activations):
            return functools.partial(self._product, program, self._activations(program, x, w, norm))
        recorder = self._recorder(program)
        parameters = self._norm(program, norm, w.k) if norm is not None else (0, 0, 0)
        return functools.partial(batched.product, recorder, batched.pack(recorder, x, w, parameters))

    def _activations(self, program: Program, x: np.ndarray, w: CpuWeight, norm: Norm | None) -> tuple[int, ...]:
        """Convert x for products with `w`: float32 for fp16 weights, else two planes or words."""
        rows, k = x.shape
        source: int = address(x)
        parameters = (0, 0, 0)
        if norm is not None:
            parameters = self._norm(program, norm, k)
        if norm is not None and (w.perm or w.bits == 16):
            target = self._memory(program, "normal", 4 * rows * k)
            program.add("normalize", source, rows, k, *parameters, target)
            source, parameters = target, (0, 0, 0)
        if w.perm:
            target = self._memory(program, "gathered", 4 * rows * k)
            program.add("gather_columns", source, rows, k, w.perm, target)
            source = target
        if w.bits == 16:
            return (source,)
        blocks = w.blocks
        size = rows * blocks * 128
        planes = self._memory(program, "planes", 2 * size + 4 * rows * blocks + 4 * size // 32)
        high, low, scales, sums = planes, planes + size, planes + 2 * size, planes + 2 * size + 4 * rows * blocks
        scratch = self._memory(program, "columns", 512 * self.threads)
        program.add(
            "quantize_planes", source, rows, k, *parameters, high, low, int(_in_words(w, rows)), scales, sums,
            w.group_size, scratch,
        )  # fmt: skip
        return high, low, scales, sums

    def _norm(self, program: Program, norm: Norm, k: int) -> tuple[int, int, int]:
        weight = check("norm.weight", norm.weight, F32, (k,))
        bias = None if norm.bias is None else check("norm.bias", norm.bias, F32, (k,))
        program.keep(norm)
        return address(weight), address(bias), float_word(norm.eps)

    def _product(self, program, activations, w, out, *, activation=None, residual=None, gated=False) -> None:
        rows = len(out)
        scratch_bytes = tiles.FEW_BYTES if w.bits == 16 else tiles.gemv_scratch_bytes(rows)
        scratch = self._memory(program, "tile", scratch_bytes * self.threads)
        after = (address(out), w.bias, batched.activation_code(activation), address(residual), int(gated), scratch)
        if w.bits == 16:
            program.add("gemv16", self._pool.counters, w.weight, w.n, w.k, *activations, rows, *after)
        else:
            name = f"gemv{w.bits}_{w.group_size}" + ("_words" if w.bits < 8 and _in_words(w, rows) else "")
            program.add(
                name, self._pool.counters, w.weight, w.scales, w.zeros, w.n, w.blocks, *activations, rows, *after,
                scratch_bytes, self.choices.ahead,
            )  # fmt: skip

    # ---------------------------------------------------------------------------------------------- elementwise
    def normalize(self, x, norm, *, out):
        check("x", x, F32, (None, None))
        check("out", out, F32, x.shape)
        with self._program() as program:
            program.keep(x, out)
            program.add("normalize", address(x), *x.shape, *self._norm(program, norm, x.shape[1]), address(out))

    def add(self, x, y, *, out):
        for name, array in (("x", x), ("y", y), ("out", out)):
            check(name, array, F32, x.shape)
        with self._program() as program:
            program.keep(x, y, out)
            program.add("add", address(x), address(y), address(out), x.size)

    def gather(self, x, index, *, out):
        check("index", index, I32, (None,))
        check("x", x, F32, (None, None))
        check("out", out, F32, (len(index), x.shape[1]))
        with self._program() as program:
            program.keep(x, index, out)
            program.add("gather_rows", address(x), *x.shape, address(index), len(index), address(out))

    # ---------------------------------------------------------------------------------------------- attention
    def vision_attention(self, qkv, heads, *, out, rope=None, segments=None):
        check("qkv", qkv, F32, (None, None))
        d = qkv.shape[1] // (3 * heads)
        check("qkv", qkv, F32, (len(qkv), heads * 3 * d))
        check("out", out, F32, (len(qkv), heads * d))
        if rope is not None:
            check("rope", rope, F32, (len(qkv), d))
            if d % 2:
                raise ValueError(f"a rotation of heads of {d}, which is odd")
        if segments is not None:
            check_segments(segments, len(qkv))
        with self._program() as program:
            program.keep(qkv, out)
            base, row, head = address(qkv), heads * 3 * d, 3 * d
            query, key = (base, row, head, len(qkv)), (base + 4 * d, base + 8 * d, row, head, len(qkv))
            self._attend(program, query, key, heads, d, out, rope=rope, segments=segments)

    def cross_attention(self, q, k, v, heads, *, out):
        check("q", q, F32, (None, None))
        width, d = q.shape[1], q.shape[1] // heads
        check("q", q, F32, (len(q), heads * d))
        check("k", k, F32, (None, width))
        check("v", v, F32, k.shape)
        check("out", out, F32, q.shape)
        with self._program() as program:
            program.keep(q, k, v, out)
            key = address(k), address(v), width, d, len(k)
            self._attend(program, (address(q), width, d, len(q)), key, heads, d, out)

    def _attend(self, program, query, key, heads, d, out, **options) -> None:
        recorder, factor = self._recorder(program), _softmax_scale(d)
        batched.full_attention(recorder, query, key, heads, d, out, factor, self.activations, **options)

    def rope_append(self, qkv, *, rope, logn, cache, layer, start, q_norm=None, k_norm=None):
        heads, d = self._check_cached(qkv, cache, start), cache.head_dim
        check("rope", rope, F32, (None, d))
        if logn is not None:
            check("logn", logn, F32, (None,))
        if min(len(rope), len(rope if logn is None else logn)) < cache.capacity:
            lengths = len(rope) if logn is None else f"{len(rope)} and {len(logn)}"
            raise ValueError(f"rope and logn: {lengths} positions for a cache of {cache.capacity}")
        with self._program() as program:
            program.keep(qkv, rope, logn, cache, start)
            norms = [part for norm in (q_norm, k_norm) for part in self._head_norm(program, norm, d)]
            scratch = self._memory(program, "append", 4096 * self.threads)
            program.add(
                f"rope_append_{cache.dtype}", address(qkv), len(qkv), heads, cache.kv_heads, d, *norms, address(rope),
                address(logn), address(start), *cache.addresses(layer), cache.padded, cache.depth, cache.width, scratch,
            )  # fmt: skip

    def _head_norm(self, program: Program, norm: Norm | None, d: int) -> tuple[int, int]:
        """Return weight and eps of the RMSNorm of each head, or zeros."""
        if norm is None:
            return 0, 0
        if norm.bias is not None:
            raise ValueError("a norm of queries or keys has no bias")
        weight, _, eps = self._norm(program, norm, d)
        return weight, eps

    def cached_attention(self, qkv, cache, layer, start, *, out):
        width = self._check_cached(qkv, cache, start) * cache.head_dim
        check("out", out, F32, (len(qkv), width))
        few = batched.attends_alone(width, len(qkv), self.activations)
        attention = batched.attention_of_a_few if few else batched.cached_attention
        with self._program() as program:
            program.keep(qkv, cache, start, out)
            factor = _softmax_scale(cache.head_dim)
            attention(self._recorder(program), qkv, cache, layer, start, out, factor)

    def _check_cached(self, qkv: np.ndarray, cache: CpuCache, start: np.ndarray) -> int:
        """Check the arguments; return the number of query heads in `qkv`."""
        check("qkv", qkv, F32, (None, None))
        heads = query_heads(qkv.shape[1], cache)
        check("start", start, I32, (None,))
        if not len(start):
            raise ValueError("start: empty")
        if getattr(self._local, "recording", None) is None and not 0 <= start[0] <= cache.capacity - len(qkv):
            raise ValueError(f"start {start[0]}: {len(qkv)} more positions do not fit a cache of {cache.capacity}")
        return heads

    def attend(self, qkv, sequences, *, out, q_norm=None, k_norm=None):
        attend_in_turn(self, qkv, sequences, out, q_norm, k_norm)

    # ---------------------------------------------------------------------------------------------- choosing
    def argmax(self, logits, *, out):
        check("logits", logits, F32, (None, None))
        check("out", out, I32, (len(logits),))
        with self._program() as program:
            program.keep(logits, out)
            program.add("argmax", address(logits), *logits.shape, address(out))


def _in_words(w: CpuWeight, rows: int) -> bool:
    """Whether the activations of a product with 16-bit activations are words, and not two planes of bytes."""
    return features.selected().words and (w.bits == 8 or rows > 1)


def _softmax_scale(d: int) -> int:
    """Return the scale of ``q . k`` for a softmax in base 2."""
    return float_word(math.log2(math.e) / math.sqrt(d))
