"""Products with packed weights: fused dequantization, bias, GELU, residual, SwiGLU, and a split along k.

The weight is the left operand, ``acc [BN, BM] = W [BN, k] @ x.T [k, BM]``: a tile of it is one contiguous block and,
unpacked in registers, is passed to the tensor cores without shared memory on Hopper. Nibble j of all words of a
128-column block is a contiguous run of 16 columns, so that no shuffles are needed between unpacking and the product.

Codes become fp16 by placing them in the mantissa of 1024 (or, four bits higher, of 1024 = 16 * 64): the subtraction
of 1024 + zero is then exact, and the scale is applied after it. Folding 1024 into a scaled constant is not exact.
"""

import triton
import triton.language as tl

from qvl_kernels.gpu.kernels.common import (
    BIAS,
    BIAS_UP,
    FEW,
    GATE,
    GELU,
    GELU_TANH,
    OUT_HALF,
    QUICK_GELU,
    RESIDUAL,
    exp2,
    last_to_arrive,
    sigmoid,
    store_float,
    unpack_scale,
)
from qvl_kernels.gpu.kernels.lone import rows_of

PART = tl.constexpr(32)
"""Columns of a tile that are finished at once."""

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
def _beside(a, b):
    """Put two tiles side by side, [rows, 2 * columns]: every thread keeps what it has."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _quarter(scales, rn, block, quarter: tl.constexpr, rows, group_shift):
    """Load scale and zero [BN] of a quarter of a block's columns."""
    return unpack_scale(tl.load(scales + ((4 * block + quarter) >> group_shift) * rows + rn))


@triton.jit
def _nibbles(even, odd, scale, zero, SCALED: tl.constexpr):
    """Return 32 columns of weights, fp16 [BN, 32], not multiplied by the scale unless SCALED."""
    low = even - (zero + 1024.0)[:, None]
    high = odd * 0.0625 - (zero + 64.0)[:, None]
    if SCALED:
        low *= scale[:, None]
        high *= scale[:, None]
    return _beside(low, high)


@triton.jit
def _bytes(tile, scale, zero, SCALED: tl.constexpr):
    """The same of 8-bit codes."""
    tile -= (zero + 1024.0)[:, None]
    if SCALED:
        tile *= scale[:, None]
    return tile


@triton.jit
def _weights(codes, scales, rn, block, rows, group_shift, BITS: tl.constexpr, FINE: tl.constexpr, SCALED: tl.constexpr):
    """Load a block of 128 columns: two tiles fp16 [BN, 64], and the scales float32 [BN, 1] of the block."""
    WORDS: tl.constexpr = 4 * BITS
    i = tl.arange(0, WORDS)
    words = tl.load(codes + (block * rows + rn)[:, None] * WORDS + i[None, :], eviction_policy="evict_first")
    s0, z0 = _quarter(scales, rn, block, 0, rows, group_shift)
    s1, z1, s2, z2, s3, z3 = s0, z0, s0, z0, s0, z0
    if FINE:
        s1, z1 = _quarter(scales, rn, block, 1, rows, group_shift)
        s2, z2 = _quarter(scales, rn, block, 2, rows, group_shift)
        s3, z3 = _quarter(scales, rn, block, 3, rows, group_shift)
    if BITS == 4:
        w = unpack_nibbles(words)
        first = _beside(_nibbles(w[0], w[1], s0, z0, SCALED), _nibbles(w[2], w[3], s1, z1, SCALED))
        second = _beside(_nibbles(w[4], w[5], s2, z2, SCALED), _nibbles(w[6], w[7], s3, z3, SCALED))
    else:
        w = unpack_bytes(words)
        first = _beside(_bytes(w[0], s0, z0, SCALED), _bytes(w[1], s1, z1, SCALED))
        second = _beside(_bytes(w[2], s2, z2, SCALED), _bytes(w[3], s3, z3, SCALED))
    return first, second, s0.to(tl.float32)[:, None]


@triton.jit
def _x_tiles(x_rows, block):
    """Load a block's 128 columns of x: two tiles fp16 [64, BM]."""
    at = x_rows + block * 128 + tl.arange(0, 64)[:, None]
    return tl.load(at), tl.load(at + 64)


@triton.jit
def _add_block(
    acc, x, codes, scales, rn, block, rows, group_shift, BITS: tl.constexpr, FINE: tl.constexpr, BM: tl.constexpr
):
    """Return acc + the product of a block's 128 columns.

    With few rows of x, scaling the sums is cheaper than scaling the weights; the weights are then also exact in fp16.
    All tiles of few rows compute a row in the same way, and so do all tiles of many.
    Each product takes 64 columns: on Hopper a program waits for its end, since the weights are in registers.
    """
    SCALED: tl.constexpr = FINE or BM > FEW
    first, second, scale = _weights(codes, scales, rn, block, rows, group_shift, BITS, FINE, SCALED)
    if SCALED:
        acc = tl.dot(second, x[1], tl.dot(first, x[0], acc))
    else:
        acc += tl.dot(second, x[1], tl.dot(first, x[0])) * scale
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
def _share(blocks, part, parts):
    """Return the first block of 128 columns of a part, and the end of its blocks; there is at least one.

    The compiler has to know that on Hopper: in a loop that may not run at all it lets every matrix instruction wait for
    the one before it.
    """
    share = tl.cdiv(blocks, parts)
    low = part * share
    high = tl.minimum(low + share, blocks)
    tl.assume(low < high)
    return low, high


@triton.jit
def _slot(partials, slot, slots, BM: tl.constexpr, BN: tl.constexpr):
    """Return the address of a tile of partial sums: [tiles, slots, BN, BM]."""
    tile = (tl.program_id(0) * slots + slot).to(tl.int64)
    return partials + tile * (BM * BN) + tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]


@triton.jit
def _sum_parts(partials, first, count, slots, BM: tl.constexpr, BN: tl.constexpr):
    """Add partial sums of this tile, those from slot `first` on, in a fixed order."""
    acc = tl.zeros((BN, BM), tl.float32)
    for slot in range(first, first + count):
        acc += tl.load(_slot(partials, slot, slots, BM, BN), cache_modifier=".cg")
    return acc


@triton.jit
def _add_bias(acc, bias, rn, n, wanted):
    if wanted:
        acc += tl.load(bias + rn, mask=rn < n, other=0.0)[:, None]
    return acc


@triton.jit
def _gelu(x):
    """x * F(x), F the distribution function of the standard normal distribution; the error is at most 7e-7.

    With a = |x| it is (x + a) / 2 - a * F(-a). log2(2 * F(-a)) is close to a parabola: the polynomial of degree 5 was
    fitted to the smallest error of a * F(-a). One exponential and no division, unlike with an error function.
    """
    a = tl.abs(x)
    log = ((((-4.7329412e-4 * a + 7.0844619e-3) * a - 5.1827170e-2) * a - 4.5999265e-1) * a - 1.1507878) * a
    return 0.5 * ((x + a) - a * exp2(log - 3.7632075e-5))


@triton.jit
def _activated(acc, flags):
    if flags & GELU:
        acc = _gelu(acc)
    if flags & GELU_TANH:  # as (1 + tanh(y / 2)) / 2 = sigmoid(y)
        acc *= sigmoid(acc * (1.5957691216057308 + 0.07135481627159632 * acc * acc))
    if flags & QUICK_GELU:
        acc *= sigmoid(1.702 * acc)
    return acc


@triton.jit
def _halves(tile):
    """Return the left and the right half of the columns; every thread keeps what it has."""
    rows: tl.constexpr = tile.shape[0]
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, half)), (0, 2, 1)))


@triton.jit
def _finish(acc, bias, residual, out, m0, n0, m, n, flags, BN: tl.constexpr):
    """Add the bias, activate, add the residual or apply the gate, and store.

    A wide tile goes in parts, which take fewer registers.
    """
    if acc.shape[1] > PART:
        left, right = _halves(acc)
        _finish(left, bias, residual, out, m0, n0, m, n, flags, BN)
        _finish(right, bias, residual, out, m0 + acc.shape[1] // 2, n0, m, n, flags, BN)
    else:
        rm = tl.arange(0, acc.shape[1])
        rn = n0 + tl.arange(0, BN)
        first = m0.to(tl.int64) * n
        offsets = rm[None, :] * n + rn[:, None]
        mask = (m0 + rm < m)[None, :] & (rn < n)[:, None]
        acc = _activated(_add_bias(acc, bias, rn, n, (flags & BIAS) != 0), flags)
        if flags & (RESIDUAL | GATE):
            other = tl.load(residual + first + offsets, mask=mask, other=0.0)
            if flags & GATE:
                acc *= other * sigmoid(other)
            else:
                acc += other
        store_float(out, first, offsets, acc, mask, (flags & OUT_HALF) != 0)


@triton.jit
def linear(
    x,
    norm_weight,
    perm,
    prepared,
    codes,
    scales,
    bias,
    residual,
    out,
    partials,
    counters,
    m,
    n,
    rows,
    blocks,
    group_shift,
    k,
    eps,
    flags,
    BITS: tl.constexpr,
    FINE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    m0, n0 = _place(m, rows, BM, BN)
    rn = n0 + tl.arange(0, BN)
    split = tl.num_programs(1)
    low, high = _share(blocks, tl.program_id(1), split)
    x_rows = rows_of(x, norm_weight, perm, prepared, m, m0, blocks, split, k, eps, low, high, flags, BM)
    acc = tl.zeros((BN, BM), tl.float32)
    if BITS < 16:
        for block in range(low, high):
            x_tiles = _x_tiles(x_rows, block)
            acc = _add_block(acc, x_tiles, codes, scales, rn, block, rows, group_shift, BITS, FINE, BM)
    else:
        i = tl.arange(0, 64)
        w_rows = codes.to(tl.pointer_type(tl.float16)) + rn.to(tl.int64)[:, None] * (128 * blocks) + i[None, :]
        for half in range(2 * low, 2 * high):
            w = tl.load(w_rows + half * 64, eviction_policy="evict_first")
            acc = tl.dot(w, tl.load(x_rows + half * 64 + i[:, None]), acc)

    done = True
    if BM <= FEW:
        done = split == 1
        if split > 1:
            tl.store(_slot(partials, tl.program_id(1), split, BM, BN), acc)
            done = last_to_arrive(counters + tl.program_id(0), split)
            if done:
                acc = _sum_parts(partials, 0, split, split, BM, BN)
    if done:
        _finish(acc, bias, residual, out, m0, n0, m, n, flags, BN)


@triton.jit
def gate_up(
    x,
    norm_weight,
    perm,
    prepared,
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
    k,
    eps,
    flags,
    BITS: tl.constexpr,
    FINE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tl.static_assert(BITS == 4)
    m0, n0 = _place(m, rows, BM, BN)
    rn = n0 + tl.arange(0, BN)
    acc = tl.zeros((BN, BM), tl.float32)
    # half of the programs of a tile have gate, half up: more of them fit on a multiprocessor
    programs = tl.num_programs(1)
    split = programs // 2
    part = tl.program_id(1)
    codes = gate_codes
    scales = gate_scales
    if part >= split:
        codes = up_codes
        scales = up_scales
    low, high = _share(blocks, part % split, split)
    x_rows = rows_of(x, norm_weight, perm, prepared, m, m0, blocks, split, k, eps, low, high, flags, BM)
    for block in range(low, high):
        x_tiles = _x_tiles(x_rows, block)
        acc = _add_block(acc, x_tiles, codes, scales, rn, block, rows, group_shift, BITS, FINE, BM)
    tl.store(_slot(partials, part, programs, BM, BN), acc)
    if last_to_arrive(counters + tl.program_id(0), programs):
        gate = _sum_parts(partials, 0, split, programs, BM, BN)
        up = _sum_parts(partials, split, split, programs, BM, BN)
        gate = _add_bias(gate, gate_bias, rn, n, (flags & BIAS) != 0)
        up = _add_bias(up, up_bias, rn, n, (flags & BIAS_UP) != 0)
        _finish(gate * sigmoid(gate) * up, gate_bias, out, out, m0, n0, m, n, flags & OUT_HALF, BN)
