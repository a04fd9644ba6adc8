"""Matrix-matrix products: ``out [M, N] = x [M, K] @ w.T`` for many rows, packed by `gemm_pack`.

Threads take one 32-row block of the weights after another. A piece of a block, `PIECE` columns, is multiplied with as
many tiles of activations as fit the second-level cache, so that weights come from memory once for all of them, and the
next piece is fetched meanwhile.

16-bit weights lie row by row; a piece of 32 rows is turned into float32 ``[columns, 32]`` first.
"""

from __future__ import annotations

from llvmlite import ir
from numba import float32
from numba.extending import intrinsic

from qvl_kernels.cpu.atomics import claim
from qvl_kernels.cpu.epilogue import finish
from qvl_kernels.cpu.gemm_tile import WIDTH, prefetch_write, tile4, tile8, tile_float
from qvl_kernels.cpu.registry import kernel, routine, unpack
from qvl_kernels.cpu.simd import get_f16, put_f32, rows, store, store_rows, zeros
from qvl_kernels.cpu.tiles import FLOAT_PIECE, FLOAT_TILES, FLOAT_TOKENS, HELD_TILES, PIECE, TOKENS

CACHE_BYTES = 400 << 10
"""Of packed activations that stay in the second-level cache beside the weights."""
ROW = 128
"""Bytes of a row of a tile's results, 32 float32."""

nothing, square = zeros("f32", 32), rows("f16", 16, 16)


@routine
def clear_tiles(y, row_count):
    for m in range(row_count):
        store(y + ROW * m, nothing())


@routine
def expect_rows(out, row, count, block, n):
    """The lines `finish_rows` will write, before they are needed: a store that misses holds up those behind it."""
    for m in range(row, row + count):
        line = out + 4 * (m * n + 32 * block)
        prefetch_write(line)
        prefetch_write(line + 64)


@routine
def finish_rows(y, out, bias, gelu, residual, gated, row, count, block, n):
    for m in range(count):
        finish(y + ROW * m, out, bias, gelu, residual, gated, row + m, 32 * block, n, 32)


def _make(bits: int):
    tile_kernel, block_bytes = (tile4, 2048) if bits == 4 else (tile8, 4096)

    def gemm(args, thread, threads):
        (counters, w, scales, zero_points, n, k, group, x, xs, sums, total, span, planes, out, bias, gelu, residual,
         gated, scratch) = unpack(args, 19)  # fmt: skip
        y = scratch + thread * HELD_TILES * TOKENS * ROW
        columns, blocks = (k + 127) // 128 * 128, (n + 31) // 32
        tile_bytes = columns * planes * TOKENS
        tile_scales, tile_sums = 4 * (columns // span) * planes * TOKENS, 4 * (columns // group) * TOKENS
        tiles = (total + TOKENS - 1) // TOKENS
        held = min(HELD_TILES, CACHE_BYTES // (PIECE * planes * TOKENS))
        parts = (tiles + held - 1) // held
        for turn in range(threads):
            owner = (thread + turn) % threads
            item, stop = claim(counters, owner, threads, parts * blocks, 1)
            while item < stop:
                part, block = item // blocks, item % blocks
                begin, end = tiles * part // parts, tiles * (part + 1) // parts
                clear_tiles(y, (end - begin) * TOKENS)
                for column in range(0, columns, PIECE):
                    count = min(PIECE, columns - column)
                    where = block * columns + column
                    bw, bs = w + where // 128 * block_bytes, scales + where // group * 64
                    bz = zero_points + where // group * 32 if zero_points != 0 else 0
                    ahead = bw + count // 128 * block_bytes
                    limit = min(ahead + PIECE // 128 * block_bytes, w + blocks * columns // 128 * block_bytes)
                    for tile in range(begin, end):
                        row = tile * TOKENS
                        rows_left, ty = min(TOKENS, total - row), y + (row - begin * TOKENS) * ROW
                        complete = column + count == columns
                        if complete:
                            expect_rows(out, row, rows_left, block, n)
                        for i in range(0, 32, WIDTH):
                            tile_kernel(
                                bw + 4 * i, bs + 2 * i, bz + i if bz != 0 else 0,
                                x + tile * tile_bytes + column * planes * TOKENS,
                                xs + tile * tile_scales + 4 * (column // span) * planes * TOKENS,
                                sums + tile * tile_sums + 4 * (column // group) * TOKENS,
                                count // group, group // span, span // 4, planes, ty + 4 * i,
                                ahead if ahead < limit else y,
                            )  # fmt: skip
                        ahead += count // group * 64
                        if complete:
                            finish_rows(ty, out, bias, gelu, residual, gated, row, rows_left, block, n)
                item, stop = claim(counters, owner, threads, parts * blocks, 1)

    gemm.__name__ = f"gemm{bits}"
    return kernel(gemm)


_make(4)
_make(8)


@intrinsic
def transpose(typing, v):
    """Swap rows and columns of a block of n vectors of n elements, n a power of two."""

    def codegen(context, b, sig, args):
        vectors = [b.extract_value(args[0], i) for i in range(v.n)]
        half = v.n // 2
        index = ir.VectorType(ir.IntType(32), v.n)
        low = ir.Constant(index, [i // 2 + v.n * (i % 2) for i in range(v.n)])
        high = ir.Constant(index, [half + i // 2 + v.n * (i % 2) for i in range(v.n)])
        # Interleaving the first half with the second, log2(n) times, is a transposition (a perfect shuffle).
        for _ in range(v.n.bit_length() - 1):
            pairs = zip(vectors[:half], vectors[half:])
            vectors = [b.shuffle_vector(x, y, order) for x, y in pairs for order in (low, high)]
        block = args[0]
        for i, vector in enumerate(vectors):
            block = b.insert_value(block, vector, i)
        return block

    return (v(v), codegen) if v.m == v.n else None


@routine
def convert_piece(w, n, k, row, column, count, target):
    """fp16 ``w[row : row + 32, column : column + count]`` to float32 ``[count, 32]``; rows beyond n become 0."""
    for r in range(row, row + 32, 16):
        side = target + 4 * (r - row)
        whole = count // 16 * 16 if r + 16 <= n else 0
        for i in range(0, whole, 16):
            store_rows(side + 128 * i, transpose(square(w + 2 * (r * k + column + i), 2 * k)), 128)
        for i in range(whole, count):
            for j in range(16):
                value = get_f16(w + 2 * ((r + j) * k + column + i)) if r + j < n else float32(0)
                put_f32(side + 128 * i + 4 * j, value)


@kernel
def gemm16(args, thread, threads):
    counters, w, n, k, x, total, out, bias, gelu, residual, gated, scratch = unpack(args, 12)
    piece = scratch + thread * (FLOAT_PIECE + FLOAT_TILES * FLOAT_TOKENS) * ROW
    y = piece + FLOAT_PIECE * ROW
    tiles, blocks = (total + FLOAT_TOKENS - 1) // FLOAT_TOKENS, (n + 31) // 32
    parts = (tiles + FLOAT_TILES - 1) // FLOAT_TILES
    for turn in range(threads):
        owner = (thread + turn) % threads
        item, stop = claim(counters, owner, threads, parts * blocks, 1)
        while item < stop:
            part, block = item // blocks, item % blocks
            begin, end = tiles * part // parts, tiles * (part + 1) // parts
            clear_tiles(y, (end - begin) * FLOAT_TOKENS)
            for column in range(0, k, FLOAT_PIECE):
                count = min(FLOAT_PIECE, k - column)
                convert_piece(w, n, k, 32 * block, column, count, piece)
                for tile in range(begin, end):
                    for i in range(0, 32, WIDTH):
                        tile_float(
                            piece + 4 * i, ROW, x + 4 * FLOAT_TOKENS * (tile * k + column), count,
                            y + (tile - begin) * FLOAT_TOKENS * ROW + 4 * i, ROW,
                        )  # fmt: skip
            row = begin * FLOAT_TOKENS
            finish_rows(y, out, bias, gelu, residual, gated, row, min(end * FLOAT_TOKENS, total) - row, block, n)
            item, stop = claim(counters, owner, threads, parts * blocks, 1)
