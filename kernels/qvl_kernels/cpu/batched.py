"""Products of many rows with 8-bit activations, and attention of many queries: which kernels, and their memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from qvl_kernels.cpu import features, tiles
from qvl_kernels.cpu.arrays import CpuCache, CpuWeight, address
from qvl_kernels.cpu.runner import Program
from qvl_kernels.ops import Activation

FEW = 16
"""Up to so many rows a product is the reading of its weights, and 16-bit activations cost nothing."""
SMALL = 1 << 20
"""Weights, or values of keys, below which the more exact product costs nothing that matters."""
SMALL_WIDTH = 591
"""Heads times head size below which a model's matrix of queries, keys and values has fewer weights than `SMALL`."""
LARGE = 4 << 20
"""Bytes of a result that is written past the caches: it would not be found there by the one who reads it."""
BYTE_BIAS = features.selected().byte_bias
PAIRS = features.selected().product == "vnni"
"""Whether pairs of int16 are multiplied faster than float32."""
ACTIVATIONS: tuple[Activation | None, ...] = (None, "gelu", "gelu_tanh", "quick_gelu")
"""In the order of the kernels' numbers (`epilogue`)."""
ROWS_KIND, CACHE_KINDS = 0, {"fp32": 4, "fp16": 2, "int8": 1}


@dataclasses.dataclass(frozen=True)
class Recorder:
    """A program that instructions are added to, and what they need: ``memory(purpose, nbytes)`` gives an address."""

    program: Program
    memory: Callable[[str, int], int]
    threads: int
    counters: int

    def add(self, name: str, *args: int) -> None:
        self.program.add(name, *args)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Activations in the form the products of a matrix take: addresses, and columns with one scale."""

    parts: tuple[int, ...]
    span: int


def takes_int8(w: CpuWeight, rows: int, activations: str) -> bool:
    """Whether `w` multiplies so many rows of activations in 8 bits, by the kernels here; else in 16, by `gemv`."""
    if rows <= FEW or w.bits == 16:
        return False
    return activations == "int8" or (activations == "auto" and w.n * w.k >= SMALL)


def attends_alone(cache: CpuCache, rows: int, activations: str) -> bool:
    """Whether so many queries go over the cache by `cached`, which is the fastest for a few and adds up otherwise.

    Where products are exact `cached_attention` is taken always, so that a row's result is the same among any others.
    """
    exact = activations == "int16" or (activations == "auto" and cache.heads * cache.head_dim < SMALL_WIDTH)
    return rows <= FEW and not exact


def activation_code(activation: Activation | None) -> int:
    """What the kernels call an activation.

    Raises
    ------
    ValueError
        For an unknown one.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: expected one of {', '.join(map(repr, ACTIVATIONS))}")
    return ACTIVATIONS.index(activation)


def columns_a_scale(w: CpuWeight) -> int:
    """Columns of 8-bit activations with one scale.

    With a scale for 32 columns the relative error of a product is 0.5% for normal activations and 1.2% with channels
    a hundred times as large; int8 weights in groups of 128 have a scale for 128 (0.65% and 2.4%), which is a seventh
    faster.
    """
    return 128 if w.bits == 8 and w.group_size == 128 else 32


def same_activations(a: CpuWeight, b: CpuWeight) -> bool:
    """Whether two matrices of one shape can take the same packed activations."""
    return (a.bits, a.group_size, a.zeros == 0, a.perm, b.perm) == (b.bits, b.group_size, b.zeros == 0, 0, 0)


def pack(to: Recorder, x: np.ndarray, w: CpuWeight, norm: tuple[int, ...]) -> Packed:
    """Bring x into the form `product` takes; `norm`: addresses of weight and bias, and eps as a word, or zeros."""
    rows, k = x.shape
    scratch = to.memory("rows", to.threads * tiles.gemm_scratch_bytes(k))
    span = columns_a_scale(w)
    sizes = tiles.int8_bytes(rows, k, w.group_size, span)
    packed = to.memory("packed", sum(sizes))
    parts = (packed, packed + sizes[0], packed + sizes[0] + sizes[1])
    center = 1 if w.zeros else 8 if w.bits == 4 else 128 - BYTE_BIAS
    to.add("pack_int8", address(x), rows, k, *norm, w.perm, w.bits, w.group_size, center, span, *parts, scratch)
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
    """``out = activation?(x @ w.T + bias) + residual?``, or with `gated` ``silu(out) * (x @ w.T + bias)``."""
    scratch = to.memory("rows", to.threads * tiles.gemm_scratch_bytes(w.k))
    past = out.nbytes >= LARGE and w.n % 32 == 0 and address(out) % 64 == 0
    after = (address(out), w.bias, activation_code(activation), address(residual), int(gated), int(past), scratch)
    to.add(
        f"gemm{w.bits}", to.counters, w.weight, w.scales, w.zeros, w.n, w.k, w.group_size, *x.parts, len(out), x.span,
        *after,
    )  # fmt: skip


def cached_attention(
    to: Recorder, qkv: np.ndarray, cache: CpuCache, layer: int, start: np.ndarray, out: np.ndarray, factor: int
) -> None:
    """`Ops.cached_attention`, of one query as among many; `factor`: what turns q . k into a power of two, as a word."""
    d = cache.head_dim
    scratch = _attention_scratch(to, d, tiles.attention_scratch_bytes(d))
    if len(qkv) == 1:
        to.add(
            f"row_attention_{cache.dtype}", to.counters, address(qkv), cache.heads, d, *cache.addresses(layer),
            cache.depth, cache.width, cache.padded, address(start), address(out), factor, *scratch,
        )  # fmt: skip
        return
    to.add(
        "block_attention", to.counters, address(qkv), 3 * cache.heads * d, d, len(qkv), cache.heads, d,
        CACHE_KINDS[cache.dtype], *cache.addresses(layer), cache.depth, cache.width, cache.padded, address(start),
        address(out), factor, *scratch,
    )  # fmt: skip


def full_attention(
    to: Recorder,
    query: tuple[int, int, int, int],
    key: tuple[int, int, int, int, int],
    heads: int,
    d: int,
    out: np.ndarray,
    factor: int,
    activations: str,
) -> None:
    """Every query over every key, in float32 or (unless `activations` is "int16") 16-bit integers.

    `query`: address, float32 in a row, float32 from head to head, rows; `key`: addresses of keys and of values, then
    the same.
    """
    q, q_row, q_head, queries = query
    k, v, k_row, k_head, keys = key
    if PAIRS and (activations == "int8" or (activations == "auto" and keys * heads * d >= SMALL)):
        nbytes = tiles.int16_attention_scratch_bytes(d)
        to.add(
            "block_attention_int16", to.counters, q, q_row, q_head, queries, heads, d, k, v, k_row, k_head, keys,
            address(out), factor, *_attention_scratch(to, d, nbytes),
        )  # fmt: skip
        return
    to.add(
        "block_attention", to.counters, q, q_row, q_head, queries, heads, d, ROWS_KIND, k, v, 0, 0, k_row, k_head,
        keys, 0, address(out), factor, *_attention_scratch(to, d, tiles.attention_scratch_bytes(d)),
    )  # fmt: skip


def _attention_scratch(to: Recorder, d: int, nbytes: int) -> tuple[int, int]:
    """Address, and bytes for each thread."""
    if d > tiles.KEYS:
        raise ValueError(f"heads of {d}: at most {tiles.KEYS}")
    return to.memory("attend", to.threads * nbytes), nbytes
