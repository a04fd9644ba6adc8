"""RMSNorm and LayerNorm of float32 rows, in the format of the next product's input: fp16, gathered, padded."""

import triton
import triton.language as tl

from qvl_kernels.gpu.kernels.common import LAYER_NORM, OUT_HALF, PERMUTED, store_float


@triton.jit
def norm(x, weight, bias, perm, out, k, padded, eps, flags, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < k
    value = tl.load(x + row * k + column, mask=mask, other=0.0)
    mean = 0.0
    if flags & LAYER_NORM:
        mean = tl.sum(value, 0) / k
    centred = tl.where(mask, value - mean, 0.0)
    factor = tl.rsqrt(tl.sum(centred * centred, 0) / k + eps)

    source = column
    if flags & PERMUTED:
        source = tl.load(perm + column, mask=mask, other=0)
        value = tl.load(x + row * k + source, mask=mask, other=0.0)
    y = (value - mean) * factor * tl.load(weight + source, mask=mask, other=0.0)
    if flags & LAYER_NORM:
        y += tl.load(bias + source, mask=mask, other=0.0)
    store_float(out, row * padded, column, tl.where(mask, y, 0.0), column < padded, (flags & OUT_HALF) != 0)
