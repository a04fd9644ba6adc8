"""Packed matrix times many vectors of 16-bit words, where `simd.WORDS`: they share the unpacked weights.

A block of 32 rows and 128 columns is unpacked into the L1 cache and multiplied with all vectors, four at a time. A
vector's result is that of `gemv_words`.
"""

from __future__ import annotations

from collections.abc import Callable

from qvl_kernels.cpu.gemm_tile import LANES, WIDTH, tile_rows
from qvl_kernels.cpu.gemv_blocks import make_scaled
from qvl_kernels.cpu.registry import routine
from qvl_kernels.cpu.simd import prefetch_read, store_rows, zeros
from qvl_kernels.cpu.simd.assembly import STEP, pair_sums
from qvl_kernels.cpu.tiles import TOKENS
from qvl_kernels.cpu.unpacking import WORDS_OF_ROWS, make_unpack_words

no_floats = zeros("f32", LANES, TOKENS)


def make_shared(bits: int, group: int) -> Callable:
    """Create a routine for a block of 32 rows by a multiple of four vectors; see `gemv_blocks.make_tile`."""
    block_bytes, groups, scaled = 512 * bits, 128 // group, make_scaled(bits, LANES, TOKENS)
    unpack = make_unpack_words(bits)

    @routine
    def group_of(turn):
        """Return the group that is added next: in the order of `gemv_words`, because the sums are rounded."""
        return turn // 2 + turn % 2 * (groups // 2) if bits < 8 else turn

    @routine
    def multiply(area, scales, zeros_, x, xs, sums, blocks, y, fresh):
        """``y += x @ w.T`` for `WIDTH` rows of a block and four vectors; if `fresh`, y is overwritten."""
        if fresh:
            a, b = no_floats(), no_floats()
        else:
            a, b = tile_rows(y, 128), tile_rows(y + 4 * LANES, 128)
        for turn in range(groups):
            part = group_of(turn)
            p, q = pair_sums(area + part * group // 2 * STEP, x + 2 * part * group, 256 * blocks, group // 2)
            s, z = scales + 64 * part, zeros_ + 32 * part if zeros_ != 0 else 0
            t, apart = sums + 4 * part, 4 * groups * blocks
            a = scaled(p, a, s, z, xs, 4 * blocks, t, apart)
            b = scaled(q, b, s + 2 * LANES, z + LANES if z != 0 else 0, xs, 4 * blocks, t, apart)
        store_rows(y, a, 128)
        store_rows(y + 4 * LANES, b, 128)

    @routine
    def shared(w, scales, zeros_, x, xs, sums, blocks, rows, y):
        """``y = x @ w.T`` for all vectors but the last ``rows % TOKENS``; return their number.

        y float32 ``[rows, 32]``. The unpacked weights lie behind it.
        """
        area, rows = y + 128 * rows, rows // TOKENS * TOKENS
        for block in range(blocks):
            unpack(w, area)
            # The next block arrives while this one is multiplied.
            for line in range(0, block_bytes, 64):
                prefetch_read(w + block_bytes + line)
            for row in range(0, rows, TOKENS):
                of_row, of_groups = xs + 4 * row * blocks, sums + 4 * groups * row * blocks
                for half in range(0, 32, WIDTH):
                    multiply(
                        area + half // WIDTH * WORDS_OF_ROWS, scales + 2 * half, zeros_ + half if zeros_ != 0 else 0,
                        x + 256 * row * blocks, of_row, of_groups, blocks, y + 128 * row + 4 * half, block == 0,
                    )  # fmt: skip
            w += block_bytes
            scales += 64 * groups
            if zeros_ != 0:
                zeros_ += 32 * groups
            x += 256
            xs += 4
            sums += 4 * groups
        return rows

    return shared
