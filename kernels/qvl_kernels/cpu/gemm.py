"""Matrix-matrix products: ``out [M, N] = x [M, K] @ w.T`` for many rows, packed by `gemm_pack`.

A thread takes a range of the 32-row blocks of the weights. As many tiles of activations as fit the second-level cache
are gone through for one block after another, so a block's weights are read from memory once for all of them.

16-bit weights lie row by row; a piece of 32 rows is turned into float32 ``[columns, 32]`` first.
"""

from __future__ import annotations

from llvmlite import ir
from numba import float32
from numba.extending import intrinsic

from qvl_kernels.cpu.epilogue import finish
from qvl_kernels.cpu.gemm_tile import WIDTH, tile4, tile8, tile_float
from qvl_kernels.cpu.registry import kernel, routine, share, unpack
from qvl_kernels.cpu.simd import get_f16, put_f32, rows, store, store_rows, zeros
from qvl_kernels.cpu.tiles import FLOAT_TILES, PIECE, TOKENS

CACHE_BYTES = 400 << 10
"""Of packed activations that stay in the second-level cache beside a block of weights."""
TILE_BYTES = TOKENS * 128

nothing, square = zeros("f32", 32 * TOKENS), rows("f16", 16, 16)


@routine
def finish_tile(y, out, bias, gelu, residual, gated, tile, total, block, n):
    for m in range(min(TOKENS, total - tile * TOKENS)):
        finish(y + 128 * m, out, bias, gelu, residual, gated, tile * TOKENS + m, 32 * block, n, 32)


def _make(bits: int):
    tile_kernel, block_bytes = (tile4, 2048) if bits == 4 else (tile8, 4096)

    def gemm(args, thread, threads):
        (w, scales, zero_points, n, k, group, x, xs, sums, total, span, planes, out, bias, gelu, residual, gated,
         scratch) = unpack(args, 18)  # fmt: skip
        y = scratch + thread * TILE_BYTES
        columns = (k + 127) // 128 * 128
        groups = columns // group
        tile_bytes = columns * planes * TOKENS
        tiles = (total + TOKENS - 1) // TOKENS
        parts = (tiles * tile_bytes + CACHE_BYTES - 1) // CACHE_BYTES
        first, last = share((n + 31) // 32, thread, threads)
        for part in range(parts):
            for block in range(first, last):
                bw, bs = w + block * (columns // 128) * block_bytes, scales + block * groups * 64
                bz = zero_points + block * groups * 32 if zero_points != 0 else 0
                for tile in range(tiles * part // parts, tiles * (part + 1) // parts):
                    store(y, nothing())
                    for i in range(0, 32, WIDTH):
                        tile_kernel(
                            bw + 4 * i, bs + 2 * i, bz + i if bz != 0 else 0, x + tile * tile_bytes,
                            xs + 4 * tile * (columns // span) * planes * TOKENS, sums + 4 * tile * groups * TOKENS,
                            groups, group // span, span // 4, planes, y + 4 * i,
                        )  # fmt: skip
                    finish_tile(y, out, bias, gelu, residual, gated, tile, total, block, n)

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
    w, n, k, x, total, out, bias, gelu, residual, gated, scratch = unpack(args, 11)
    piece = scratch + thread * (PIECE * 128 + FLOAT_TILES * TILE_BYTES)
    y = piece + PIECE * 128
    tiles = (total + TOKENS - 1) // TOKENS
    first, last = share((n + 31) // 32, thread, threads)
    for begin in range(0, tiles, FLOAT_TILES):
        end = min(tiles, begin + FLOAT_TILES)
        for block in range(first, last):
            for tile in range(end - begin):
                store(y + tile * TILE_BYTES, nothing())
            for column in range(0, k, PIECE):
                count = min(PIECE, k - column)
                convert_piece(w, n, k, 32 * block, column, count, piece)
                for tile in range(end - begin):
                    for i in range(0, 32, WIDTH):
                        tile_float(
                            piece + 4 * i, 128, x + 4 * TOKENS * ((begin + tile) * k + column), 4 * TOKENS, 4, count,
                            y + tile * TILE_BYTES + 4 * i, 128,
                        )  # fmt: skip
            for tile in range(end - begin):
                finish_tile(y + tile * TILE_BYTES, out, bias, gelu, residual, gated, begin + tile, total, block, n)
