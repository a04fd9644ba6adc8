"""Products of many rows with 8-bit activations, and attention of many queries: kernels and scratch memory."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from qvl_kernels.cpu import cache_sizes, features, tiles
from qvl_kernels.cpu.arrays import CpuCache, CpuWeight, address
from qvl_kernels.cpu.runner import Program
from qvl_kernels.ops import FEW_ROWS, Activation
from qvl_kernels.packing import BLOCK, SYMMETRIC_ZERO, round_up

SMALL = 1 << 20
"""Number of weights, or of values of keys, below which the exact product is cheap."""
SMALL_WIDTH = 591
"""Heads times head size below which attention is exact by default, too: with a key head for each query head, the matrix
of queries, keys and values has fewer weights than `SMALL` then."""
LARGE = 4 << 20
"""Results of at least this many bytes use non-temporal stores: they would be evicted before they are read."""
ITEMS, SMALLEST = 8, 16
"""Parts of a product that a thread should have for balance, and the fewest tiles that such a part has."""
BYTE_BIAS = features.selected().byte_bias
PAIRS = features.selected().product in ("vnni", "maddubs")
"""Whether int16 pair products are faster than float32."""
ACTIVATIONS: tuple[Activation | None, ...] = (None, "gelu", "gelu_tanh", "quick_gelu")
"""Activations in the order of their numbers in the kernels (`epilogue`)."""
ROWS_KIND, CACHE_KINDS = 0, {"fp32": 4, "fp16": 2, "int8": 1}


@dataclasses.dataclass(frozen=True)
class Recorder:
    """Adds instructions to a program; ``memory(purpose, nbytes)`` returns the address of scratch memory."""

    program: Program
    memory: Callable[[str, int], int]
    threads: int
    counters: int

    def add(self, name: str, *args: int) -> None:
        self.program.add(name, *args)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Packed activations for products with a matrix: addresses, and columns per scale."""

    parts: tuple[int, ...]
    span: int


def takes_int8(w: CpuWeight, rows: int, activations: str) -> bool:
    """Whether products of `w` with `rows` rows use 8-bit activations (the kernels here) or 16-bit ones (`gemv`).

    Up to `FEW_ROWS` they are limited by reading the weights, and 16-bit activations cost no time.
    """
    if rows <= FEW_ROWS or w.bits == 16:
        return False
    return activations == "int8" or (activations == "auto" and w.n * w.k >= SMALL)


def attends_alone(width: int, rows: int, activations: str) -> bool:
    """Whether attention of `rows` queries of `width` columns uses the kernels for few queries.

    They are the fastest, but their order of summation differs from `attention_prefill`.

    With exact products `cached_attention` is always used, so that a row's result does not depend on other rows.
    """
    exact = activations == "int16" or (activations == "auto" and width < SMALL_WIDTH)
    return rows <= FEW_ROWS and not exact


def activation_code(activation: Activation | None) -> int:
    """Return the number of an activation in the kernels.

    Raises
    ------
    ValueError
        For an unknown one.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: expected one of {', '.join(map(repr, ACTIVATIONS))}")
    return ACTIVATIONS.index(activation)


def columns_a_scale(w: CpuWeight) -> int:
    """Return the columns per scale of 8-bit activations.

    With a scale for 32 columns the relative error of a product is 0.5% for normal activations and 1.2% with channels
    a hundred times as large. int8 weights in groups of 128 use one scale per 128 columns (0.65% and 2.4%), which is a
    seventh faster.
    """
    return 128 if w.bits == 8 and w.group_size == 128 else 32


def same_activations(a: CpuWeight, b: CpuWeight) -> bool:
    """Whether two matrices of the same shape can share packed activations."""
    return (a.bits, a.group_size, a.zeros == 0, a.perm, b.perm) == (b.bits, b.group_size, b.zeros == 0, 0, 0)


def pack(to: Recorder, x: np.ndarray, w: CpuWeight, norm: tuple[int, ...]) -> Packed:
    """Pack x for `product`. `norm`: addresses of weight and bias, and eps as a word; or zeros."""
    rows, k = x.shape
    scratch = to.memory("rows", to.threads * tiles.gemm_scratch_bytes(k))
    span = columns_a_scale(w)
    sizes = tiles.int8_bytes(rows, k, w.product_bits, w.group_size, span)
    packed = to.memory("packed", sum(sizes))
    parts = (packed, packed + sizes[0], packed + sizes[0] + sizes[1])
    center = 1 if w.zeros else SYMMETRIC_ZERO[w.bits] - (BYTE_BIAS if w.bits == 8 else 0)
    to.add("pack_int8", address(x), rows, k, *norm, w.perm, w.product_bits, w.group_size, center, span, *parts, scratch)
    return Packed(parts, span)


def product(
    to: Recorder,
    x: Packed,
    w: CpuWeight,
    out: np.ndarray,
    *,
    activation: Activation | None = None,
    residual: np.ndarray | None = None,
    gated: bool = False,
) -> None:
    """Add ``out = activation?(x @ w.T + bias) + residual?``, or with `gated` ``silu(out) * (x @ w.T + bias)``."""
    scratch = to.memory("rows", to.threads * tiles.gemm_scratch_bytes(w.k))
    streaming = out.nbytes >= LARGE and w.n % 32 == 0 and address(out) % 64 == 0
    after = (address(out), w.bias, activation_code(activation), address(residual), int(gated), int(streaming), scratch)
    parts = row_parts(len(out), w.n, w.k, w.product_bits, to.threads)
    unpacked = tiles.unpacked_bytes(w.bits)
    area = to.memory("unpacked", to.threads * unpacked) if unpacked else 0
    to.add(
        f"gemm{w.product_bits}", to.counters, w.weight, w.scales, w.zeros, w.n, w.k, w.group_size, *x.parts, len(out),
        x.span, *after, parts, int(w.bits == 3), area, unpacked,
    )  # fmt: skip


def row_parts(rows: int, n: int, k: int, bits: int, threads: int) -> int:
    """Return the number of parts of the rows of a product, each multiplied with one block of weights after another.

    As few as fit the L2 cache, so that weights are rarely read again; but where there are more threads than a few
    blocks of 32 weights serve evenly, more, each of `SMALLEST` tiles or more. It does not change a result.
    """
    whole, blocks = -(-rows // tiles.TOKENS), -(-n // 32)
    a_tile = min(round_up(k, BLOCK), tiles.PIECE) * tiles.TOKENS * tiles.value_bytes(bits)
    room = max(cache_sizes.level2() - tiles.unpacked_bytes(bits), a_tile)
    fitting = -(-whole // min(tiles.HELD_TILES, room // a_tile))
    return max(fitting, min(-(-ITEMS * threads // blocks), whole // SMALLEST))


def cached_attention(
    to: Recorder, qkv: np.ndarray, cache: CpuCache, layer: int, start: np.ndarray, out: np.ndarray, factor: int
) -> None:
    """Add `Ops.cached_attention`; results do not depend on other queries. `factor`: the softmax scale, as a word."""
    d, group = cache.head_dim, out.shape[1] // (cache.kv_heads * cache.head_dim)
    if len(qkv) == 1 and group > 1:
        group_attention(to, qkv, cache, layer, start, out, factor, most=1)
        return
    scratch = _attention_scratch(to, d, tiles.attention_scratch_bytes(d))
    if len(qkv) == 1:
        to.add(
            f"row_attention_{cache.dtype}", to.counters, address(qkv), cache.kv_heads, d, *cache.addresses(layer),
            cache.depth, cache.width, cache.padded, address(start), address(out), factor, *scratch,
        )  # fmt: skip
        return
    # The longest blocks first, for balanced threads.
    blocks = query_blocks([0, len(qkv)], lambda queries: tiles.QUERIES)[::-1].copy()
    to.program.keep(blocks)
    to.add(
        "block_attention", to.counters, address(qkv), qkv.shape[1], d, address(blocks), len(blocks),
        cache.kv_heads * group, group, d, CACHE_KINDS[cache.dtype], *cache.addresses(layer), 0, cache.depth,
        cache.width, cache.padded, address(start), address(out), factor, *scratch,
    )  # fmt: skip


def attention_of_a_few(
    to: Recorder, qkv: np.ndarray, cache: CpuCache, layer: int, start: np.ndarray, out: np.ndarray, factor: int
) -> None:
    """Add `Ops.cached_attention` if `attends_alone`: threads share the parts of a long past (`tiles.PART`)."""
    d, heads = cache.head_dim, out.shape[1] // cache.head_dim
    if heads != cache.kv_heads:
        partial = group_attention(to, qkv, cache, layer, start, out, factor, most=tiles.PARTS)
    else:
        partial, vectors = _partial(to, len(qkv) * heads, cache), 8 if cache.width == 128 else 1
        to.add(
            f"attention_{cache.dtype}_{16 * vectors}", to.counters, address(qkv), len(qkv), heads, d, address(start),
            *cache.addresses(layer), cache.padded, cache.depth, cache.width, tiles.PARTS, address(out), factor, partial,
            to.memory("attend", 16384 * to.threads),
        )  # fmt: skip
    if partial:
        to.add(
            "attention_merge", partial, len(qkv), heads, address(start), cache.padded, tiles.PARTS, cache.width, d,
            address(out),
        )  # fmt: skip


def group_attention(
    to: Recorder,
    qkv: np.ndarray,
    cache: CpuCache,
    layer: int,
    start: np.ndarray,
    out: np.ndarray,
    factor: int,
    *,
    most: int,
) -> int:
    """Add the kernel for groups, with at most so many parts; return the address of their sums, or 0."""
    d, heads = cache.head_dim, out.shape[1] // cache.head_dim
    group, partial = heads // cache.kv_heads, _partial(to, len(qkv) * heads, cache) if most > 1 else 0
    scratch = _attention_scratch(to, d, tiles.group_attention_scratch_bytes(d, group))
    to.add(
        f"group_attention_{cache.dtype}", to.counters, address(qkv), len(qkv), cache.kv_heads, group, d,
        *cache.addresses(layer), cache.depth, cache.width, cache.padded, address(start), most, address(out), factor,
        partial, *scratch,
    )  # fmt: skip
    return partial


def _partial(to: Recorder, items: int, cache: CpuCache) -> int:
    """Return the address of the sums of parts of so many queries and heads; 0 if the cache fits one part."""
    nbytes = items * tiles.PARTS * 4 * (cache.width + 16)
    return to.memory("partial", nbytes) if cache.padded > tiles.PART else 0


def query_blocks(segments: Sequence[int], most: Callable[[int], int]) -> np.ndarray:
    """Return blocks of rows for attention, int32 ``[blocks, 4]``: first row, rows, first key, end of the keys.

    `segments`: boundaries of segments; `most`: returns the rows per block for the rows of a segment.
    """
    blocks = []
    for begin, end in itertools.pairwise(map(int, segments)):
        step = most(end - begin)
        blocks += [(row, min(step, end - row), begin, end) for row in range(begin, end, step)]
    return np.array(blocks, np.int32).reshape(-1, 4)


def full_attention(
    to: Recorder,
    query: tuple[int, int, int, int],
    key: tuple[int, int, int, int, int],
    heads: int,
    d: int,
    out: np.ndarray,
    factor: int,
    activations: str,
    *,
    rope: np.ndarray | None = None,
    segments: Sequence[int] | None = None,
) -> None:
    """Add full attention (within segments), in float32 or, unless `activations` is "int16", 16-bit integers.

    `query`: address, row stride and head stride in float32, rows; `key`: addresses of keys and of values, then the
    same.
    """
    q, q_row, q_head, queries = query
    k, v, k_row, k_head, keys = key
    pairs = PAIRS and (activations == "int8" or (activations == "auto" and keys * heads * d >= SMALL))
    most = functools.partial(_paired_queries, heads, to.threads) if pairs else lambda queries: tiles.QUERIES
    blocks = query_blocks([0, queries] if segments is None else segments, most)
    if segments is None:
        blocks[:, 3] = keys
    to.program.keep(blocks, rope)
    work = address(blocks), len(blocks), heads
    if pairs:
        nbytes = tiles.int16_attention_scratch_bytes(d)
        to.add(
            "block_attention_int16", to.counters, q, q_row, q_head, *work, d, k, v, address(rope), k_row, k_head,
            address(out), factor, *_attention_scratch(to, d, nbytes),
        )  # fmt: skip
        return
    to.add(
        "block_attention", to.counters, q, q_row, q_head, *work, 1, d, ROWS_KIND, k, v, 0, 0, address(rope), k_row,
        k_head, keys, 0, address(out), factor, *_attention_scratch(to, d, tiles.attention_scratch_bytes(d)),
    )  # fmt: skip


def _paired_queries(heads: int, threads: int, queries: int) -> int:
    """Return the queries per block: many, as each block converts all keys, but enough blocks for all threads."""
    blocks = max(-(-queries // tiles.PAIR_QUERIES), -(-4 * threads // heads))
    whole_tiles = -(-queries // tiles.PAIR_TOKENS)
    return max(1, -(-whole_tiles // blocks)) * tiles.PAIR_TOKENS


def _attention_scratch(to: Recorder, d: int, nbytes: int) -> tuple[int, int]:
    """Return the address, and the bytes per thread."""
    if d > tiles.KEYS:
        raise ValueError(f"heads of {d}: at most {tiles.KEYS}")
    return to.memory("attend", to.threads * nbytes), nbytes
