"""Which kernels do products and attention of many rows, with what activations, and the memory they need.

A `Program` gets the instructions; `memory(purpose, nbytes)` gives addresses of scratch memory.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qvl_kernels.cpu import features, tiles
from qvl_kernels.cpu.arrays import CpuCache, CpuWeight, address
from qvl_kernels.cpu.runner import Program

Memory = Callable[[str, int], int]

FEW = 16
"""Up to so many rows a product is the reading of its weights, and `gemv` does that best."""
SMALL = 1 << 20
"""Weights below which 16-bit activations cost nothing that matters."""
ROWS_KIND = 0
BYTE_BIAS = 128 if features.selected().name == "neon" else 0


def planes(w: CpuWeight, activations: str) -> int:
    """int8 planes of the activations that `w` multiplies."""
    small = activations == "auto" and w.n * w.k < SMALL
    return 2 if small or activations == "int16" else 1


def same_activations(a: CpuWeight, b: CpuWeight) -> bool:
    """Whether two matrices can take the same packed activations."""
    return (a.bits, a.group_size, a.zeros == 0, a.perm, b.perm) == (b.bits, b.group_size, b.zeros == 0, 0, 0)


def pack(
    program: Program, memory: Memory, threads: int, x: np.ndarray, w: CpuWeight, norm: tuple[int, ...], count: int
) -> tuple[int, ...]:
    """Bring x into the form `product` takes, in `count` planes.

    `norm`: addresses of weight and bias, and eps as a word; all 0 for none.
    """
    rows, k = x.shape
    scratch = memory("rows", threads * tiles.gemm_scratch_bytes(k))
    if w.bits == 16:
        packed = memory("packed", tiles.float_bytes(rows, k))
        program.add("pack_float", address(x), rows, k, *norm, packed, scratch)
        return (packed,)
    sizes = tiles.int8_bytes(rows, k, w.group_size, tiles.SPAN, count)
    packed = memory("packed", sum(sizes))
    parts = (packed, packed + sizes[0], packed + sizes[0] + sizes[1])
    center = 1 if w.zeros else 8 if w.bits == 4 else 128 - BYTE_BIAS
    program.add(
        "pack_int8", address(x), rows, k, *norm, w.perm, w.bits, w.group_size, center, tiles.SPAN, count, *parts,
        scratch,
    )  # fmt: skip
    return parts


def product(
    program: Program,
    memory: Memory,
    threads: int,
    w: CpuWeight,
    packed: tuple[int, ...],
    count: int,
    out: np.ndarray,
    *,
    gelu: bool = False,
    residual: np.ndarray | None = None,
    gated: bool = False,
) -> None:
    """``out = gelu?(x @ w.T + bias) + residual?``, or with `gated` ``silu(out) * (x @ w.T + bias)``."""
    scratch = memory("rows", threads * tiles.gemm_scratch_bytes(w.k))
    after = (address(out), w.bias, int(gelu), address(residual), int(gated), scratch)
    if w.bits == 16:
        program.add("gemm16", w.weight, w.n, w.k, *packed, len(out), *after)
        return
    program.add(
        f"gemm{w.bits}", w.weight, w.scales, w.zeros, w.n, w.k, w.group_size, *packed, len(out), tiles.SPAN, count,
        *after,
    )  # fmt: skip


def cached_attention(
    program: Program,
    memory: Memory,
    threads: int,
    qkv: np.ndarray,
    cache: CpuCache,
    layer: int,
    start: np.ndarray,
    out: np.ndarray,
    factor: int,
) -> None:
    """`Ops.cached_attention`; `factor`: what turns q . k into a power of two, as a word."""
    d = cache.head_dim
    kind = {"fp32": 4, "fp16": 2, "int8": 1}[cache.dtype]
    nbytes = tiles.attention_scratch_bytes(d)
    program.add(
        "block_attention", address(qkv), 3 * cache.heads * d, d, len(qkv), cache.heads, d, kind,
        *cache.addresses(layer), cache.depth, cache.width, cache.padded, address(start), address(out), factor,
        memory("attend", threads * nbytes), nbytes,
    )  # fmt: skip


def full_attention(
    program: Program,
    memory: Memory,
    threads: int,
    query: tuple[int, int, int, int],
    key: tuple[int, int, int, int, int],
    heads: int,
    d: int,
    out: np.ndarray,
    factor: int,
) -> None:
    """Every query over every key.

    `query`: address, float32 in a row, float32 from head to head, rows; `key`: addresses of keys and of values, then
    the same.
    """
    q, q_row, q_head, queries = query
    k, v, k_row, k_head, keys = key
    nbytes = tiles.attention_scratch_bytes(d)
    program.add(
        "block_attention", q, q_row, q_head, queries, heads, d, ROWS_KIND, k, v, 0, 0, k_row, k_head, keys, 0,
        address(out), factor, memory("attend", threads * nbytes), nbytes,
    )  # fmt: skip
