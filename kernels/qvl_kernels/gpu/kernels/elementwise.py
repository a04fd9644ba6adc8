"""Casts, copies, gathers, sums, and SwiGLU of two finished products."""

import triton
import triton.language as tl

from qvl_kernels.gpu.kernels.common import OUT_HALF, PERMUTED, ROWS, X_HALF, Y_HALF, load_as_float, store_float

ELEMENTS = tl.constexpr(1024)


@triton.jit
def gather(x, index, perm, out, k, padded, flags):
    row = tl.program_id(1).to(tl.int64)
    taken = row
    if flags & ROWS:
        taken = tl.load(index + row).to(tl.int64)
    column = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    source = column
    if flags & PERMUTED:
        source = tl.load(perm + column, mask=column < k, other=0)
    value = load_as_float(x, taken * k, source, column < k, (flags & X_HALF) != 0)
    store_float(out, row * padded, column, value, column < padded, (flags & OUT_HALF) != 0)


@triton.jit
def add(x, y, out, size, flags):
    i = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = i < size
    value = load_as_float(x, 0, i, mask, (flags & X_HALF) != 0) + load_as_float(y, 0, i, mask, (flags & Y_HALF) != 0)
    store_float(out, 0, i, value, mask, (flags & OUT_HALF) != 0)
