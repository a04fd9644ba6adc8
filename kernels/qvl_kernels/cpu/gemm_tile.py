"""The inner kernels of matrix-matrix products: a tile of `TOKENS` rows times two vectors of weights.

Each is one description for all processors: `WIDTH` is the vector width, and `simd.dot` emits the processor's
instructions. Where `WORDS`, the loop over the columns is assembler (`simd.assembly`); where `MATRIX`, blocks of two
rows of weights and of activations are multiplied at once (`simd.blocks`). The sums of a span of columns are integers.
They are scaled by the activations' scale, summed in float32 over a group of the weights, scaled by the weights' scale
and added to the tile.

Loop counts are arguments even if they are always 8 or 32: otherwise LLVM unrolls the loops, keeps the weights of
several steps in registers, and spills.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from qvl_kernels.cpu.registry import inlined, routine
from qvl_kernels.cpu.simd import (
    BYTE_BIAS,
    LEVEL,
    MATRIX,
    UNPACKS,
    UNSHIFTED,
    WORDS,
    bytes_,
    dot,
    dot_bytes,
    emit,
    fma,
    halves,
    loads,
    piece,
    prefetch_read,
    rows,
    spreads,
    store_rows,
    to_f32,
    zeros,
)
from qvl_kernels.cpu.simd.assembly import STEP, add_nibble_spans, add_pair_spans
from qvl_kernels.cpu.simd.blocks import add_rows, dot_blocks, dot_lanes, scales_of_sums
from qvl_kernels.cpu.tiles import FLOAT_TOKENS, TOKENS, value_bytes

LANES = {"avx512": 16, "plain": 4}.get(LEVEL.name, 8)
"""Rows of weights per vector: all accumulators of two vectors by `TOKENS` rows fit the registers."""
WIDTH = 2 * LANES
TOKEN_BYTES = 4 * TOKENS

four_columns = loads("i8", 4 * TOKENS)
weights, half, byte = loads("i8", 4 * LANES, 2), halves(LANES), bytes_(LANES, False)
row_pairs, token_pairs = loads("i8", 16, WIDTH // 2), loads("i8", 16, TOKENS // 2)
no_blocks, no_block_floats = zeros("i32", 4, WIDTH * TOKENS // 4), zeros("f32", 4, WIDTH * TOKENS // 4)
no_sums, no_floats = zeros("i32", LANES, TOKENS), zeros("f32", LANES, TOKENS)
spread, tile_rows = spreads("f32", LANES, TOKENS), rows("f32", LANES, TOKENS)
float_spread, float_rows = spreads("f32", LANES, FLOAT_TOKENS), rows("f32", LANES, FLOAT_TOKENS)
vector = loads("f32", LANES)


@intrinsic
def nibble(typing, v, upper):
    """Return low nibbles of i8 or, if `upper` is not 0, high nibbles as `simd.highs` does."""

    def codegen(context, b, sig, args):
        wide = ir.VectorType(ir.IntType(16), v.n // 2)

        def choose(yes, no):
            i16 = ir.IntType(16)
            taken = b.icmp_signed("!=", args[1], ir.Constant(args[1].type, 0))
            return emit.broadcast(b, b.select(taken, ir.Constant(i16, yes), ir.Constant(i16, no)), wide)

        block = args[0]
        mask, amount = (choose(0xF0F0 - 0x10000, 0x0F0F), None) if UNSHIFTED else (None, choose(4, 0))
        for i in range(v.m):
            x = b.bitcast(b.extract_value(block, i), wide)
            if UNSHIFTED:
                x = b.and_(x, mask)
            else:
                x = b.and_(b.lshr(x, amount), ir.Constant(wide, [0x0F0F] * wide.count))
            block = b.insert_value(block, b.bitcast(x, v.vector), i)
        return block

    return v(v, upper), codegen


@routine
def add_nibbles(a, b, u, x):
    """Return two vectors of sums plus the products of their weights `u` with x."""
    return dot(a, piece(u, 0), x, 4), dot(b, piece(u, 1), x, 4)


@routine
def add_bytes(a, b, u, x):
    return dot_bytes(a, piece(u, 0), x, 4), dot_bytes(b, piece(u, 1), x, 4)


def _make_add_spans(bits: int):
    """Create a routine that adds spans to p and q: the scaled sums of `steps` steps of four columns each."""
    add = add_nibbles if bits == 4 else add_bytes

    @routine
    def locate(w, span, steps):
        """Return the address of a span; spans 2 and 3 of 128 columns of int4 are the high nibbles of 0 and 1."""
        if bits == 4:
            return w + (span >> 2) * 2048 + (span & 1) * 1024
        return w + span * steps * 128

    @inlined
    def add_spans(p, q, w, first, x, xs, spans, steps):
        for span in range(first, first + spans):
            a, b = no_sums(), no_sums()
            source = locate(w, span, steps)
            for _ in range(steps):
                u = weights(source)
                if bits == 4:
                    u = nibble(u, span & 2)
                a, b = add(a, b, u, x)
                source += 128
                x += TOKEN_BYTES
            scale = spread(xs, 4)
            p, q = fma(to_f32(a), scale, p), fma(to_f32(b), scale, q)
            xs += TOKEN_BYTES
        return p, q

    return add_spans


def _make_add_unpacked(bits: int):
    """Create a routine that does the same with weights that `unpacking` wrote, int8 in steps of two columns."""
    add = add_nibble_spans if bits == 4 else add_pair_spans

    @inlined
    def add_spans(p, q, w, first, x, xs, spans, steps):
        return add(p, q, w + first * steps * STEP, x, xs, spans, steps)

    return add_spans


@inlined
def add_byte_spans(p, q, w, first, x, xs, spans, steps):
    """Do the same with weights that `unpacking` wrote as signed bytes."""
    w += first * steps * STEP
    for _ in range(spans):
        a, b = no_sums(), no_sums()
        for _ in range(steps):
            u, columns = weights(w), four_columns(x)
            a, b = dot_lanes(a, piece(u, 0), columns), dot_lanes(b, piece(u, 1), columns)
            w += STEP
            x += TOKEN_BYTES
        scale = spread(xs, 4)
        p, q = fma(to_f32(a), scale, p), fma(to_f32(b), scale, q)
        xs += TOKEN_BYTES
    return p, q


@inlined
def add_block_spans(p, q, w, first, x, xs, spans, steps):
    """Do the same with weights that `unpacking` wrote in steps of eight columns."""
    w += first * steps * 2 * STEP
    total = no_block_floats()
    for _ in range(spans):
        sums = no_blocks()
        for _ in range(steps):
            sums = dot_blocks(sums, row_pairs(w), token_pairs(x))
            w += 2 * STEP
            x += 2 * TOKEN_BYTES
        total = fma(to_f32(sums), scales_of_sums(sums, xs), total)
        xs += TOKEN_BYTES
    return add_rows(p, total, 0), add_rows(q, total, 8)


def _make_tile(bits: int):
    bias, x_column = 0 if bits == 4 else BYTE_BIAS, TOKENS * value_bytes(bits)
    if MATRIX:
        add_spans, columns_a_step = add_block_spans, 8
    elif WORDS:
        add_spans, columns_a_step = _make_add_unpacked(bits), 2 if bits == 8 else 4
    elif UNPACKS:
        add_spans, columns_a_step = add_byte_spans, 4
    else:
        add_spans, columns_a_step = _make_add_spans(bits), 4

    @routine
    def tile(w, scales, zero_points, x, xs, sums, groups, spans, columns, y, fresh, ahead):
        """``y += x @ w.T`` for `WIDTH` of a block's rows: y float32 ``[TOKENS, 32]``, `spans` in each of `groups`.

        A span has `columns`. If `fresh`, y is overwritten. One line at `ahead` is prefetched per group, so that
        prefetches do not delay the loads.
        """
        span, steps = 0, columns // columns_a_step
        if fresh:
            f, h = no_floats(), no_floats()
        else:
            f, h = tile_rows(y, 128), tile_rows(y + 4 * LANES, 128)
        for _ in range(groups):
            prefetch_read(ahead)
            ahead += 64
            p = spread(sums, 4)
            q = p
            if zero_points != 0:
                p = p * (to_f32(byte(zero_points)) - bias)
                q = q * (to_f32(byte(zero_points + LANES)) - bias)
                zero_points += 32
            p, q = add_spans(p, q, w, span, x, xs, spans, steps)
            span += spans
            x += spans * columns * x_column
            xs += spans * TOKEN_BYTES
            sums += TOKEN_BYTES
            f, h = fma(p, half(scales), f), fma(q, half(scales + 2 * LANES), h)
            scales += 64
        store_rows(y, f, 128)
        store_rows(y + 4 * LANES, h, 128)

    return tile


tile4, tile8 = _make_tile(4), _make_tile(8)


@intrinsic
def fma_spread(typing, p, q, u, v, addr, stride):
    """``p[i] + u * x, q[i] + v * x`` with x the float32 at ``addr + i * stride``, one after another."""
    result = types.UniTuple(p, 2)

    def codegen(context, b, sig, args):
        p_, q_, u_, v_, address, step = args
        name = f"llvm.fma.{emit.suffix(p.vector)}"
        for i, where in enumerate(emit.addresses(b, address, step, p.m)):
            x = emit.spread(b, where, p.vector)
            p_ = b.insert_value(p_, emit.call(b, name, p.vector, [u_, x, b.extract_value(p_, i)]), i)
            q_ = b.insert_value(q_, emit.call(b, name, p.vector, [v_, x, b.extract_value(q_, i)]), i)
        return context.make_tuple(b, result, [p_, q_])

    return result(p, q, u, v, addr, stride), codegen


def make_float_tile(x_step: int, x_row: int):
    """Create a routine for x[m, i] at ``x + i * x_step + m * x_row``. Constant strides save a register per row."""

    @routine
    def tile(w, w_step, x, count, y, y_row):
        """``y[m, :WIDTH] += sum over i < count of x[m, i] * w[i, :WIDTH]``, all float32; w_step and y_row in bytes."""
        p, q = float_rows(y, y_row), float_rows(y + 4 * LANES, y_row)
        for _ in range(count):
            p, q = fma_spread(p, q, vector(w), vector(w + 4 * LANES), x, x_row)
            w += w_step
            x += x_step
        store_rows(y, p, y_row)
        store_rows(y + 4 * LANES, q, y_row)

    return tile


def make_narrow_tile(x_step: int, x_row: int):
    """Create a routine of half the width; see `make_float_tile`."""

    @routine
    def tile(w, w_step, x, count, y, y_row):
        p = float_rows(y, y_row)
        for _ in range(count):
            p = fma(float_spread(x, x_row), vector(w), p)
            w += w_step
            x += x_step
        store_rows(y, p, y_row)

    return tile
