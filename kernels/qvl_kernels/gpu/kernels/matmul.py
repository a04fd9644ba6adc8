"""Products with packed weights: fused dequantization, bias, GELU, residual, norm, SwiGLU, and a split along k.

The weight is the left operand, ``acc [BN, BM] = W [BN, k] @ x.T [k, BM]``: a tile of it is one contiguous block and,
unpacked in registers, is passed to the tensor cores without shared memory on Hopper. Nibble j of all words of a
128-column block is a contiguous run of 16 columns, so that no shuffles are needed between unpacking and the dot.

Codes become fp16 by placing them in the mantissa of 1024 (or, four bits higher, of 1024 = 16 * 64): the subtraction
of 1024 + zero is then exact, and the scale is applied after it. Folding 1024 into a scaled constant is not exact.
"""

import triton
import triton.language as tl

from qvl_kernels.gpu.kernels.common import (
    BIAS,
    BIAS_UP,
    GELU,
    GELU_TANH,
    OUT_HALF,
    QUICK_GELU,
    RESIDUAL,
    last_to_arrive,
    store_float,
    unpack_scale,
)
from qvl_kernels.gpu.kernels.norm import norm_row

SCALED_SUMS = tl.constexpr(32)
"""Up to this number of rows of x the sums are scaled, above it the weights."""

TILES_ALONG_M = tl.constexpr(8)
"""Number of tiles along m before the next tiles along n: consecutive programs share weights."""


@triton.jit
def unpack_nibbles(words):
    """int32 [BN, 16] -> eight fp16 tiles: 1024 + q for even nibbles, 1024 + 16 q for odd ones."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t0, t1, t2, t3;
        prmt.b32 t0, $8, $9, 0x5410;
        prmt.b32 t1, $8, $9, 0x7632;
        shr.u32 t2, t0, 8;
        shr.u32 t3, t1, 8;
        lop3.b32 $0, t0, 0x000f000f, 0x64006400, 0xEA;
        lop3.b32 $1, t0, 0x00f000f0, 0x64006400, 0xEA;
        lop3.b32 $2, t2, 0x000f000f, 0x64006400, 0xEA;
        lop3.b32 $3, t2, 0x00f000f0, 0x64006400, 0xEA;
        lop3.b32 $4, t1, 0x000f000f, 0x64006400, 0xEA;
        lop3.b32 $5, t1, 0x00f000f0, 0x64006400, 0xEA;
        lop3.b32 $6, t3, 0x000f000f, 0x64006400, 0xEA;
        lop3.b32 $7, t3, 0x00f000f0, 0x64006400, 0xEA;
        }""",
        "=r,=r,=r,=r,=r,=r,=r,=r,r,r",
        [words],
        dtype=(
            tl.float16,
            tl.float16,
            tl.float16,
            tl.float16,
            tl.float16,
            tl.float16,
            tl.float16,
            tl.float16,
        ),
        is_pure=True,
        pack=2,
    )


@triton.jit
def unpack_bytes(words):
    """int32 [BN, 32] -> four fp16 tiles of 1024 + q."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t0, t1;
        prmt.b32 t0, $4, $5, 0x5140;
        prmt.b32 t1, $4, $5, 0x7362;
        prmt.b32 $0, t0, 0x64646464, 0x4140;
        prmt.b32 $1, t0, 0x64646464, 0x4342;
        prmt.b32 $2, t1, 0x64646464, 0x4140;
        prmt.b32 $3, t1, 0x64646464, 0x4342;
        }""",
        "=r,=r,=r,=r,r,r",
        [words],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _even(tile, zero):
    return tile - (zero + 1024.0)[:, None]


@triton.jit
def _odd(tile, zero):
    return tile * 0.0625 - (zero + 64.0)[:, None]


@triton.jit
def _quarter(scales, rn, block, quarter: tl.constexpr, rows, group_shift):
    """Load scale [BN, 1] and zero [BN] of a quarter of a block's columns."""
    scale, zero = unpack_scale(tl.load(scales + ((4 * block + quarter) >> group_shift) * rows + rn))
    return scale[:, None], zero


@triton.jit
def _x_tiles(x_rows, block, COLUMNS: tl.constexpr):
    """Load a block's 128 columns of x: eight or four tiles fp16 [COLUMNS, BM]."""
    at = x_rows + block * 128 + tl.arange(0, COLUMNS)[:, None]
    if COLUMNS == 16:
        return (
            tl.load(at),
            tl.load(at + 16),
            tl.load(at + 32),
            tl.load(at + 48),
            tl.load(at + 64),
            tl.load(at + 80),
            tl.load(at + 96),
            tl.load(at + 112),
        )
    else:
        return tl.load(at), tl.load(at + 32), tl.load(at + 64), tl.load(at + 96)


@triton.jit
def _int4_block(acc, x, codes, scales, rn, block, rows, group_shift, FINE: tl.constexpr, BM: tl.constexpr):
    """Return acc + the product of a block's 128 columns.

    With few rows of x, scaling the sums is cheaper than scaling the weights; the weights are then also exact in fp16.
    """
    i = tl.arange(0, 16)
    words = tl.load(codes + (block * rows + rn)[:, None] * 16 + i[None, :], eviction_policy="evict_first")
    w = unpack_nibbles(words)
    if FINE:
        for quarter in tl.static_range(4):
            s, z = _quarter(scales, rn, block, quarter, rows, group_shift)
            acc = tl.dot(_even(w[2 * quarter], z) * s, x[2 * quarter], acc)
            acc = tl.dot(_odd(w[2 * quarter + 1], z) * s, x[2 * quarter + 1], acc)
    else:
        s, z = unpack_scale(tl.load(scales + block * rows + rn))
        s = s[:, None]
        if BM <= SCALED_SUMS:
            part = tl.zeros_like(acc)
            for pair in tl.static_range(4):
                part = tl.dot(_even(w[2 * pair], z), x[2 * pair], part)
                part = tl.dot(_odd(w[2 * pair + 1], z), x[2 * pair + 1], part)
            acc += part * s.to(tl.float32)
        else:
            for pair in tl.static_range(4):
                acc = tl.dot(_even(w[2 * pair], z) * s, x[2 * pair], acc)
                acc = tl.dot(_odd(w[2 * pair + 1], z) * s, x[2 * pair + 1], acc)
    return acc


@triton.jit
def _int8_block(acc, x, codes, scales, rn, block, rows, group_shift, FINE: tl.constexpr, BM: tl.constexpr):
    """Return acc + the product of a block's 128 columns; see `_int4_block`."""
    i = tl.arange(0, 32)
    words = tl.load(codes + (block * rows + rn)[:, None] * 32 + i[None, :], eviction_policy="evict_first")
    w = unpack_bytes(words)
    if FINE:
        for quarter in tl.static_range(4):
            s, z = _quarter(scales, rn, block, quarter, rows, group_shift)
            acc = tl.dot(_even(w[quarter], z) * s, x[quarter], acc)
    else:
        s, z = unpack_scale(tl.load(scales + block * rows + rn))
        s = s[:, None]
        if BM <= SCALED_SUMS:
            part = tl.zeros_like(acc)
            for quarter in tl.static_range(4):
                part = tl.dot(_even(w[quarter], z), x[quarter], part)
            acc += part * s.to(tl.float32)
        else:
            for quarter in tl.static_range(4):
                acc = tl.dot(_even(w[quarter], z) * s, x[quarter], acc)
    return acc


@triton.jit
def _place(m, rows, BM: tl.constexpr, BN: tl.constexpr):
    """Return this program's first row of x and of the weight."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(m, BM)
    width = TILES_ALONG_M * (rows // BN)
    first = pid // width * TILES_ALONG_M
    height = tl.minimum(tiles_m - first, TILES_ALONG_M)
    return (first + pid % width % height) * BM, pid % width // height * BN


@triton.jit
def _share(blocks):
    """Return this program's blocks of 128 columns."""
    share = tl.cdiv(blocks, tl.num_programs(1))
    low = tl.program_id(1) * share
    return low, tl.minimum(low + share, blocks)


@triton.jit
def _slot(partials, part, index: tl.constexpr, count: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Return the address of a tile of partial sums: [tiles, split, count, BN, BM]."""
    tile = (tl.program_id(0) * tl.num_programs(1) + part).to(tl.int64) * count + index
    return partials + tile * (BM * BN) + tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]


@triton.jit
def _sum_parts(partials, index: tl.constexpr, count: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Add the partial sums of all programs of this tile in a fixed order."""
    acc = tl.zeros((BN, BM), tl.float32)
    for part in range(tl.num_programs(1)):
        acc += tl.load(_slot(partials, part, index, count, BM, BN), cache_modifier=".cg")
    return acc


@triton.jit
def _add_bias(acc, bias, rn, n, wanted):
    if wanted:
        acc += tl.load(bias + rn, mask=rn < n, other=0.0)[:, None]
    return acc


@triton.jit
def _finish(acc, residual, out, m0, n0, m, n, flags, BM: tl.constexpr, BN: tl.constexpr):
    """Add the residual and store."""
    rm = tl.arange(0, BM)
    rn = n0 + tl.arange(0, BN)
    first = m0.to(tl.int64) * n
    offsets = rm[None, :] * n + rn[:, None]
    mask = (m0 + rm < m)[None, :] & (rn < n)[:, None]
    if flags & RESIDUAL:
        acc += tl.load(residual + first + offsets, mask=mask, other=0.0)
    store_float(out, first, offsets, acc, mask, (flags & OUT_HALF) != 0)


@triton.jit
def linear(
    x,
    codes,
    scales,
    bias,
    residual,
    out,
    partials,
    counters,
    norm_weight,
    norm_perm,
    normed,
    m,
    n,
    rows,
    blocks,
    group_shift,
    flags,
    padded,
    eps,
    norm_flags,
    BITS: tl.constexpr,
    FINE: tl.constexpr,
    NORM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    m0, n0 = _place(m, rows, BM, BN)
    rm = m0 + tl.arange(0, BM)
    rn = n0 + tl.arange(0, BN)
    low, high = _share(blocks)
    x_rows = x + tl.where(rm < m, rm, 0)[None, :] * (128 * blocks)
    acc = tl.zeros((BN, BM), tl.float32)
    if BITS == 4:
        for block in range(low, high):
            xs = _x_tiles(x_rows, block, 16)
            acc = _int4_block(acc, xs, codes, scales, rn, block, rows, group_shift, FINE, BM)
    elif BITS == 8:
        for block in range(low, high):
            xs = _x_tiles(x_rows, block, 32)
            acc = _int8_block(acc, xs, codes, scales, rn, block, rows, group_shift, FINE, BM)
    else:
        k = tl.arange(0, 64)
        w_rows = codes.to(tl.pointer_type(tl.float16)) + rn.to(tl.int64)[:, None] * (128 * blocks) + k[None, :]
        for half in range(2 * low, 2 * high):
            w = tl.load(w_rows + half * 64, eviction_policy="evict_first")
            acc = tl.dot(w, tl.load(x_rows + half * 64 + k[:, None]), acc)

    split = tl.num_programs(1)
    done = split == 1
    if split > 1:
        tl.store(_slot(partials, tl.program_id(1), 0, 1, BM, BN), acc)
        done = last_to_arrive(counters + tl.program_id(0), split)
        if done:
            acc = _sum_parts(partials, 0, 1, BM, BN)
    if done:
        acc = _add_bias(acc, bias, rn, n, (flags & BIAS) != 0)
        if flags & GELU:
            acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
        # these two are x * sigmoid(y), as (1 + tanh(y / 2)) / 2 = sigmoid(y)
        if flags & GELU_TANH:
            acc /= 1.0 + tl.exp(acc * (-1.5957691216057308 - 0.07135481627159632 * acc * acc))
        if flags & QUICK_GELU:
            acc /= 1.0 + tl.exp(-1.702 * acc)
        _finish(acc, residual, out, m0, n0, m, n, flags, BM, BN)
        if NORM and norm_flags != 0:
            # the last tile of all: the row is complete. m is 1, but a compiler that knew it would order the sum
            # otherwise than in `norm`
            tiles = tl.num_programs(0)
            if last_to_arrive(counters + tiles, tiles):
                norm_row(out, m - 1, norm_weight, norm_weight, norm_perm, normed, n, padded, eps, norm_flags)


@triton.jit
def gate_up(
    x,
    gate_codes,
    gate_scales,
    gate_bias,
    up_codes,
    up_scales,
    up_bias,
    out,
    partials,
    counters,
    m,
    n,
    rows,
    blocks,
    group_shift,
    flags,
    BITS: tl.constexpr,
    FINE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tl.static_assert(BITS == 4)
    m0, n0 = _place(m, rows, BM, BN)
    rm = m0 + tl.arange(0, BM)
    rn = n0 + tl.arange(0, BN)
    low, high = _share(blocks)
    x_rows = x + tl.where(rm < m, rm, 0)[None, :] * (128 * blocks)
    gate = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    for block in range(low, high):
        xs = _x_tiles(x_rows, block, 16)
        gate = _int4_block(gate, xs, gate_codes, gate_scales, rn, block, rows, group_shift, FINE, BM)
        up = _int4_block(up, xs, up_codes, up_scales, rn, block, rows, group_shift, FINE, BM)

    split = tl.num_programs(1)
    done = split == 1
    if split > 1:
        tl.store(_slot(partials, tl.program_id(1), 0, 2, BM, BN), gate)
        tl.store(_slot(partials, tl.program_id(1), 1, 2, BM, BN), up)
        done = last_to_arrive(counters + tl.program_id(0), split)
        if done:
            gate = _sum_parts(partials, 0, 2, BM, BN)
            up = _sum_parts(partials, 1, 2, BM, BN)
    if done:
        gate = _add_bias(gate, gate_bias, rn, n, (flags & BIAS) != 0)
        up = _add_bias(up, up_bias, rn, n, (flags & BIAS_UP) != 0)
        _finish(gate / (1.0 + tl.exp(-gate)) * up, out, out, m0, n0, m, n, flags & OUT_HALF, BM, BN)
