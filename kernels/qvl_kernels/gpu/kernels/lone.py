"""A lone row of x, which every program of a product prepares for itself, so that no launch has to."""

import triton
import triton.language as tl

from qvl_kernels.gpu.kernels.common import FEW, GATHER, NORM, ORDERED, load_row, to_half

CHUNK = tl.constexpr(1024)


@triton.jit
def _source(perm, column, there, flags):
    """Return where the columns of the weight are in x."""
    source = column
    if flags & ORDERED:
        source = tl.load(perm + column, mask=there, other=0)
    return source


@triton.jit
def _weighed(x, weight, perm, column, end, k, flags):
    """Load columns of x and of the norm's weight, in the order of the product's."""
    there = column < tl.minimum(end, k)
    source = _source(perm, column, there, flags)
    return tl.load(x + source, mask=there, other=0.0), tl.load(weight + source, mask=there, other=0.0)


@triton.jit
def _normalized(x, weight, perm, out, k, eps, first, end, flags):
    """RMSNorm. All that the first columns need is on its way together, before anything is waited for."""
    x = x.to(tl.pointer_type(tl.float32))
    i = tl.arange(0, CHUNK)
    value, gain = _weighed(x, weight, perm, first + i, end, k, flags)
    squares = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, k, 2 * CHUNK):
        a, b = load_row(x, start + i, k), load_row(x, start + CHUNK + i, k)
        squares += a * a + b * b
    factor = tl.rsqrt(tl.sum(squares, 0) / k + eps)
    tl.store(out + i, to_half(value * factor * gain), mask=first + i < end)
    for start in range(first + CHUNK, end, CHUNK):
        value, gain = _weighed(x, weight, perm, start + i, end, k, flags)
        tl.store(out + (start - first) + i, to_half(value * factor * gain), mask=start + i < end)


@triton.jit
def few_norm(x, weight, perm, out, blocks, k, stride, eps, flags):
    """Normalize each of a few rows, with the bits that a lone row gets.

    `stride` is k. The order of a sum depends on which thread loads what: the compiler has to know that a row is aligned
    as a lone row is.
    """
    row = tl.program_id(0)
    x += row * stride
    out += row * (128 * blocks)
    end = 128 * blocks
    if (end <= 4 * CHUNK) & ((flags & ORDERED) == 0):
        # all at once, in the order of the sums of `_normalized`
        i = tl.arange(0, CHUNK)
        a, b = load_row(x, i, k), load_row(x, CHUNK + i, k)
        c, d = load_row(x, 2 * CHUNK + i, k), load_row(x, 3 * CHUNK + i, k)
        a_gain, b_gain = load_row(weight, i, k), load_row(weight, CHUNK + i, k)
        c_gain, d_gain = load_row(weight, 2 * CHUNK + i, k), load_row(weight, 3 * CHUNK + i, k)
        squares = a * a + b * b
        squares += c * c + d * d
        factor = tl.rsqrt(tl.sum(squares, 0) / k + eps)
        tl.store(out + i, to_half(a * factor * a_gain), mask=i < end)
        tl.store(out + CHUNK + i, to_half(b * factor * b_gain), mask=CHUNK + i < end)
        tl.store(out + 2 * CHUNK + i, to_half(c * factor * c_gain), mask=2 * CHUNK + i < end)
        tl.store(out + 3 * CHUNK + i, to_half(d * factor * d_gain), mask=3 * CHUNK + i < end)
    else:
        _normalized(x, weight, perm, out, k, eps, 0, end, flags)


@triton.jit
def _lone_row(x, weight, perm, out, k, eps, low, high, flags):
    """Prepare blocks of 128 columns as the weight has them, fp16; return the address where column 0 would be.

    With NORM x is float32 and is normalized; otherwise it is fp16. From column k on there are zeros.
    """
    first, end = 128 * low, 128 * high
    if flags & NORM:
        _normalized(x, weight, perm, out, k, eps, first, end, flags)
    else:
        i = tl.arange(0, CHUNK)
        for start in range(first, end, CHUNK):
            there = start + i < tl.minimum(end, k)
            source = _source(perm, start + i, there, flags)
            tl.store(out + (start - first) + i, tl.load(x + source, mask=there, other=0.0), mask=start + i < end)
    tl.debug_barrier()
    return out - first


@triton.jit
def rows_of(x, weight, perm, prepared, m, m0, blocks, split, k, eps, low, high, flags, BM: tl.constexpr):
    """Return the addresses [1, BM] of a tile's rows of x.

    After its last row x begins again: reading row 0 for all rows that a tile has too many slowed it down (32 rows in a
    tile of 64 took 38 us on an H100, 64 rows 24 us).

    If the flags say so, this program prepares what it reads of the only row.
    """
    rm = (m0 + tl.arange(0, BM)) % m
    rows = x + rm[None, :] * (128 * blocks)
    if BM > FEW:
        return rows
    if flags & (NORM | GATHER):
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        prepared += program * (128 * tl.cdiv(blocks, split))
        rows = _lone_row(x, weight, perm, prepared, k, eps, low, high, flags) + tl.zeros_like(rm)[None, :]
    return rows
