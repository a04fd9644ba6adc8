"""Packed matrix times a few vectors: int3 to int8 weights, 16-bit activations in two planes or words (`quantize`).

One pass over the weights serves all vectors: 32 rows (about 70 KB) stay in the cache while vectors in planes are
processed a few at a time, and 128 columns of them while all vectors in words are.
"""

from __future__ import annotations

from collections.abc import Callable

from qvl_kernels.cpu.atomics import claim
from qvl_kernels.cpu.epilogue import finish_rows
from qvl_kernels.cpu.gemv_blocks import set_ahead
from qvl_kernels.cpu.gemv_planes import make_planes
from qvl_kernels.cpu.gemv_words import make_words
from qvl_kernels.cpu.registry import kernel, unpack
from qvl_kernels.cpu.simd import WORDS
from qvl_kernels.packing import group_sizes

STEP_BYTES = 256 << 10
"""Bytes of weights that a thread takes at a time for one vector: about 10 microseconds."""


def _make(name: str, bits: int, group: int, product: Callable) -> None:
    """Create a kernel. `product`: as of `gemv_planes.make_planes`."""
    block_bytes, groups = 512 * bits, 128 // group

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
                    product(bw, bs, bz, x, low, xs, sums, blocks, rows, y)
                    finish_rows(y, out, bias, activation, residual, gated, 0, rows, line, n, 0)
                first, last = claim(counters, owner, threads, lines, step)

    gemv.__name__ = name
    kernel(gemv)


for _group in (32, 64, 128):
    for _bits in (3, 4) if _group in group_sizes(3) else (4,):
        _make(f"gemv{_bits}_{_group}", _bits, _group, make_planes(_bits, _group))
        if WORDS:
            _make(f"gemv{_bits}_{_group}_words", _bits, _group, make_words(_bits, _group))
    _make(f"gemv8_{_group}", 8, _group, make_words(8, _group) if WORDS else make_planes(8, _group))
