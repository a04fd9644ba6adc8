"""Conversion of weights from the file's layout (see qvl_kernels/packing.py) to the layout of products."""

import triton
import triton.language as tl

from qvl_kernels.gpu.kernels.common import HAS_ZEROS

ELEMENTS = tl.constexpr(1024)


@triton.jit
def reorder(source, codes, first, rows, blocks, BITS: tl.constexpr):
    """Reorder one block of 32 rows and 128 columns: words [32 / (8 / BITS), 32 rows] -> words [32 rows, 4 * BITS]."""
    block = tl.program_id(0)
    piece = tl.program_id(1)
    WORDS: tl.constexpr = 4 * BITS
    i = tl.arange(0, WORDS)[None, :]
    lane = tl.arange(0, 32)[:, None]
    base = source + (piece.to(tl.int64) * blocks + block) * (WORDS * 32) + lane
    word = tl.zeros((32, WORDS), tl.int32)
    # Byte b of a source word in step j holds column 4 j + b, and at 4 bits column 4 j + b + 64 in its high nibble.
    for field in tl.static_range(4):
        step = field * (WORDS // 4) + i // 4
        byte = (tl.load(base + step * 32) >> (i % 4 * 8)) & 0xFF
        if BITS == 4:
            word |= ((byte & 0xF) << (4 * field)) | ((byte >> 4) << (4 * field + 16))
        else:
            word |= byte << (8 * field)
    row = (first + piece) * 32 + lane
    tl.store(codes + (block.to(tl.int64) * rows + row) * WORDS + i, word)


@triton.jit
def pack_scales(source, zeros, scales, first, rows, groups, zero, flags):
    group = tl.program_id(0)
    piece = tl.program_id(1)
    lane = tl.arange(0, 32)
    at = (piece.to(tl.int64) * groups + group) * 32 + lane
    scale = tl.load(source + at).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    if flags & HAS_ZEROS:
        centre = tl.load(zeros + at).to(tl.float16)
    else:
        centre = tl.full((32,), 0, tl.float16) + zero.to(tl.float16)
    packed = scale | (centre.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    tl.store(scales + group.to(tl.int64) * rows + (first + piece) * 32 + lane, packed)


@triton.jit
def pad_rows(source, codes, first, k, padded):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    value = tl.load(source + row * k + column, mask=column < k, other=0.0)
    tl.store(codes + (first + row) * padded + column, value, mask=column < padded)


@triton.jit
def move_rows(source, target, size, source_stride, target_stride):
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    value = tl.load(source + row * source_stride + i, mask=i < size)
    tl.store(target + row * target_stride + i, value, mask=i < size)
