"""Dequantized rows of a packed table."""

import triton
import triton.language as tl

from qvl_kernels.gpu.kernels.common import PERMUTED, unpack_scale


@triton.jit
def embed(ids, codes, scales, perm, out, d, rows, blocks, group_shift, flags, BITS: tl.constexpr):
    block = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    row = tl.load(ids + token)
    i = tl.arange(0, 128)
    column = block * 128 + i
    mask = column < d
    if BITS == 16:
        value = tl.load(codes.to(tl.pointer_type(tl.float16)) + row.to(tl.int64) * (128 * blocks) + column).to(
            tl.float32
        )
    else:
        # field j of word i holds column i + words * j
        words: tl.constexpr = 4 * BITS
        word = tl.load(codes + (block.to(tl.int64) * rows + row) * words + i % words)
        code = (word >> (i // words * BITS)) & ((1 << BITS) - 1)
        scale, zero = unpack_scale(tl.load(scales + ((4 * block + i // 32) >> group_shift).to(tl.int64) * rows + row))
        value = (code.to(tl.float32) - zero.to(tl.float32)) * scale.to(tl.float32)
    target = column
    if flags & PERMUTED:
        target = tl.load(perm + column, mask=mask, other=0)
    tl.store(out + token * d + target, value, mask=mask)
