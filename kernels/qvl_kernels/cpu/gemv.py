"""Packed matrix times a few vectors: int3 to int8 weights, 16-bit activations in two planes or words (`quantize`).

One pass over the weights serves all vectors: 32 rows (about 70 KB) stay in the cache while the vectors are processed a
few at a time. Where `WORDS`, `SHARING` vectors and more share what is unpacked of them (`gemv_shared`).
"""

from __future__ import annotations

from collections.abc import Callable

from qvl_kernels.cpu.atomics import claim
from qvl_kernels.cpu.epilogue import finish_rows
from qvl_kernels.cpu.gemv_blocks import set_ahead
from qvl_kernels.cpu.gemv_planes import TOKENS, make_planes
from qvl_kernels.cpu.gemv_shared import make_shared
from qvl_kernels.cpu.gemv_words import make_bytes, make_nibbles
from qvl_kernels.cpu.registry import kernel, routine, unpack
from qvl_kernels.cpu.simd import WORDS
from qvl_kernels.cpu.tiles import SHARING
from qvl_kernels.packing import group_sizes

STEP_BYTES = 256 << 10
"""Bytes of weights that a thread takes at a time for one vector: about 10 microseconds."""


def _make(
    name: str, bits: int, group: int, value: int, tiles: dict[int, Callable], shared: Callable | None = None
) -> None:
    """Create a kernel. `tiles`: routines by their number of vectors; an activation has `value` bytes at `x`.

    `shared` multiplies most vectors if there are `SHARING` or more, and returns their number.
    """
    block_bytes, groups, tokens = 512 * bits, 128 // group, max(tiles)
    one, two, many = tiles[1], tiles.get(2, tiles[1]), tiles[tokens]

    @routine
    def multiply(w, scales, zeros_, x, low, xs, sums, blocks, left, y):
        """Multiply the next vectors; return their number."""
        if tokens > 2 and left >= tokens:
            many(w, scales, zeros_, x, low, xs, sums, blocks, y)
            return tokens
        if tokens > 1 and left >= 2:
            two(w, scales, zeros_, x, low, xs, sums, blocks, y)
            return 2
        one(w, scales, zeros_, x, low, xs, sums, blocks, y)
        return 1

    def gemv(args, thread, threads):
        (counters, w, scales, zeros_, n, blocks, x, low, xs, sums, rows, out, bias, activation, residual, gated,
         scratch, scratch_bytes, ahead) = unpack(args, 19)  # fmt: skip
        set_ahead(ahead)
        y, lines = scratch + thread * scratch_bytes, (n + 31) // 32
        step = max(1, STEP_BYTES // (blocks * block_bytes * rows))
        for turn in range(threads):
            owner = (thread + turn) % threads
            first, last = claim(counters, owner, threads, lines, step)
            while first < last:
                for line in range(first, last):
                    bw, bs = w + line * blocks * block_bytes, scales + line * blocks * groups * 64
                    bz = zeros_ + line * blocks * groups * 32 if zeros_ != 0 else 0
                    row = 0
                    if shared is not None and rows >= SHARING:
                        row = shared(bw, bs, bz, x, xs, sums, blocks, rows, y)
                        finish_rows(y, out, bias, activation, residual, gated, 0, row, line, n, 0)
                    while row < rows:
                        o = row * blocks
                        at, lower = x + 128 * value * o, low + 128 * o
                        of_row, of_groups = xs + 4 * o, sums + 4 * groups * o
                        count = multiply(bw, bs, bz, at, lower, of_row, of_groups, blocks, rows - row, y)
                        finish_rows(y, out, bias, activation, residual, gated, row, count, line, n, 0)
                        row += count
                first, last = claim(counters, owner, threads, lines, step)

    gemv.__name__ = name
    kernel(gemv)


for _group in (32, 64, 128):
    for _bits in (3, 4) if _group in group_sizes(3) else (4,):
        _make(f"gemv{_bits}_{_group}", _bits, _group, 1, {n: make_planes(_bits, _group, n) for n in {1, TOKENS}})
        if WORDS:
            _tiles = {n: make_nibbles(_bits, _group, n) for n in (1, 2, 4)}
            _make(f"gemv{_bits}_{_group}_words", _bits, _group, 2, _tiles, make_shared(_bits, _group))
    if WORDS:
        _make(f"gemv8_{_group}", 8, _group, 2, {1: make_bytes(_group)}, make_shared(8, _group))
    else:
        _make(f"gemv8_{_group}", 8, _group, 1, {n: make_planes(8, _group, n) for n in {1, TOKENS}})
