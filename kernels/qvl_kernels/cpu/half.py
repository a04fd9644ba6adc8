"""fp16 weights ``[N, K]`` times float32 activations: a row of weights with a row of activations, in float32."""

from __future__ import annotations

from qvl_kernels.cpu.epilogue import finish
from qvl_kernels.cpu.registry import kernel, routine, share, unpack
from qvl_kernels.cpu.simd import fma, get_f16, get_f32, piece, put_f32, rows, sum_all, zeros


@routine
def rest(w, x, start, k, total):
    """`total` and the columns after the last whole vector."""
    for i in range(start, k):
        total += get_f16(w + 2 * i) * get_f32(x + 4 * i)
    return total


def _make_tile(lines: int, tokens: int):
    """A routine: `lines` (1 or 4) rows by `tokens` (1 or 4) vectors; sums are taken in one order in all of them."""
    load_w, load_x, none = rows("f16", 16, lines), rows("f32", 16, tokens), zeros("f32", 16, tokens)

    if tokens == 1:

        @routine
        def reduce(a, w, x, start, k, y):
            put_f32(y, rest(w, x, start, k, sum_all(a)))

    else:

        @routine
        def reduce(a, w, x, start, k, y):
            put_f32(y, rest(w, x, start, k, sum_all(piece(a, 0))))
            put_f32(y + 128, rest(w, x + 4 * k, start, k, sum_all(piece(a, 1))))
            put_f32(y + 256, rest(w, x + 8 * k, start, k, sum_all(piece(a, 2))))
            put_f32(y + 384, rest(w, x + 12 * k, start, k, sum_all(piece(a, 3))))

    if lines == 1:

        @routine
        def tile(w, x, k, y):
            a, whole = none(), k // 16 * 16
            for i in range(0, whole, 16):
                a = fma(load_x(x + 4 * i, 4 * k), load_w(w + 2 * i, 2 * k), a)
            reduce(a, w, x, whole, k, y)

    else:

        @routine
        def tile(w, x, k, y):
            a0, a1, a2, a3, whole = none(), none(), none(), none(), k // 16 * 16
            for i in range(0, whole, 16):
                v, u = load_w(w + 2 * i, 2 * k), load_x(x + 4 * i, 4 * k)
                a0 = fma(u, piece(v, 0), a0)
                a1 = fma(u, piece(v, 1), a1)
                a2 = fma(u, piece(v, 2), a2)
                a3 = fma(u, piece(v, 3), a3)
            reduce(a0, w, x, whole, k, y)
            reduce(a1, w + 2 * k, x, whole, k, y + 4)
            reduce(a2, w + 4 * k, x, whole, k, y + 8)
            reduce(a3, w + 6 * k, x, whole, k, y + 12)

    return tile


tile_1x1, tile_1x4, tile_4x1, tile_4x4 = (_make_tile(lines, tokens) for lines in (1, 4) for tokens in (1, 4))


@kernel
def gemv16(args, thread, threads):
    """As the packed `gemv` kernels, 32 rows at a time."""
    w, n, k, x, count, out, bias, gelu, residual, gated, scratch = unpack(args, 11)
    y = scratch + thread * 512
    first, last = share((n + 31) // 32, thread, threads)
    for block in range(first, last):
        token = 0
        while token < count:
            tokens = 4 if count - token >= 4 else 1
            line, end = 32 * block, min(n, 32 * block + 32)
            while line < end:
                bw, bx, by = w + 2 * line * k, x + 4 * token * k, y + 4 * (line - 32 * block)
                lines = 4 if end - line >= 4 else 1
                if lines == 4 and tokens == 4:
                    tile_4x4(bw, bx, k, by)
                elif lines == 4:
                    tile_4x1(bw, bx, k, by)
                elif tokens == 4:
                    tile_1x4(bw, bx, k, by)
                else:
                    tile_1x1(bw, bx, k, by)
                line += lines
            for i in range(tokens):
                finish(y + 128 * i, out, bias, gelu, residual, gated, token + i, 32 * block, n, 32)
            token += tokens
