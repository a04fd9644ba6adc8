"""Matrix-matrix products: ``out [M, N] = x [M, K] @ w.T`` for many rows of 8-bit activations, see `gemm_pack`.

Threads take 32-row blocks of the weights dynamically. A piece of a block, `PIECE` columns, is multiplied with as many
tiles of activations as fit the L2 cache (one of `parts` of them), so that weights are read from memory once for all of
them. The next piece is prefetched meanwhile. Some weights are first unpacked in the thread's scratch memory.
"""

from __future__ import annotations

from qvl_kernels.cpu import unpacking, unpacking_blocks
from qvl_kernels.cpu.atomics import claim
from qvl_kernels.cpu.epilogue import ROW, finish
from qvl_kernels.cpu.gemm_tile import WIDTH, tile4, tile8
from qvl_kernels.cpu.registry import kernel, routine, unpack
from qvl_kernels.cpu.simd import MATRIX, UNPACKS, WORDS, prefetch_write
from qvl_kernels.cpu.tiles import HELD_TILES, PIECE, TOKENS, value_bytes


@routine
def prefetch_rows(rows, row, count, block, n):
    """Prefetch the lines that `finish` will access."""
    for m in range(row, row + count):
        line = rows + 4 * (m * n + 32 * block)
        prefetch_write(line)
        prefetch_write(line + 64)


def _make(bits: int):
    tile_kernel, value, widen_blocks = tile4 if bits == 4 else tile8, value_bytes(bits), unpacking.widen_blocks
    if MATRIX:
        unpack_piece = unpacking_blocks.unpack_nibbles if bits == 4 else unpacking_blocks.unpack_bytes
    elif bits == 4:
        unpack_piece = unpacking.unpack_nibbles
    else:
        unpack_piece = unpacking.unpack_bytes if WORDS else unpacking.sign_bytes

    @routine
    def unpacked(weights, area, columns, from_int3):
        """Return the address of a piece of weights as the tiles take it."""
        blocks = columns // 128
        if from_int3:
            target = area + 32 * PIECE if UNPACKS else area
            widen_blocks(weights, target, blocks)
            weights = target
        if UNPACKS:
            unpack_piece(weights, area, blocks)
            weights = area
        return weights

    def gemm(args, thread, threads):
        (counters, w, scales, zero_points, n, k, group, x, xs, sums, total, span, out, bias, activation, residual,
         gated, streaming, scratch, parts, from_int3, area, area_bytes) = unpack(args, 23)  # fmt: skip
        y = scratch + thread * HELD_TILES * TOKENS * ROW
        columns, blocks = (k + 127) // 128 * 128, (n + 31) // 32
        tile_bytes = columns * TOKENS * value
        tile_scales, tile_sums = 4 * (columns // span) * TOKENS, 4 * (columns // group) * TOKENS
        tiles = (total + TOKENS - 1) // TOKENS
        block_bytes = 1536 if from_int3 else 512 * bits
        area += thread * area_bytes
        for turn in range(threads):
            owner = (thread + turn) % threads
            item, stop = claim(counters, owner, threads, parts * blocks, 1)
            while item < stop:
                part, block = item // blocks, item % blocks
                begin, end = tiles * part // parts, tiles * (part + 1) // parts
                for column in range(0, columns, PIECE):
                    count = min(PIECE, columns - column)
                    where = block * columns + column
                    bw, bs = w + where // 128 * block_bytes, scales + where // group * 64
                    bz = zero_points + where // group * 32 if zero_points != 0 else 0
                    ahead = bw + count // 128 * block_bytes
                    limit = min(ahead + PIECE // 128 * block_bytes, w + blocks * columns // 128 * block_bytes)
                    bw = unpacked(bw, area, count, from_int3)
                    for tile in range(begin, end):
                        row = tile * TOKENS
                        rows_left, ty = min(TOKENS, total - row), y + (row - begin * TOKENS) * ROW
                        complete = column + count == columns
                        if complete and (not streaming or gated):
                            prefetch_rows(out, row, rows_left, block, n)
                        elif complete and residual != 0:
                            prefetch_rows(residual, row, rows_left, block, n)
                        for i in range(0, 32, WIDTH):
                            # unpacked, the rows of a tile are adjacent
                            tile_kernel(
                                bw + i * (count * value if UNPACKS else 4), bs + 2 * i, bz + i if bz != 0 else 0,
                                x + tile * tile_bytes + column * TOKENS * value,
                                xs + tile * tile_scales + 4 * (column // span) * TOKENS,
                                sums + tile * tile_sums + 4 * (column // group) * TOKENS,
                                count // group, group // span, span, ty + 4 * i, column == 0,
                                ahead if ahead < limit else y,
                            )  # fmt: skip
                        ahead += count // group * 64
                        if complete:
                            finish(ty, out, bias, activation, residual, gated, row, rows_left, block, n, streaming)
                item, stop = claim(counters, owner, threads, parts * blocks, 1)

    gemm.__name__ = f"gemm{bits}"
    return kernel(gemm)


_make(4)
_make(8)
