"""Shared code of kernels: arrays whose type depends on a flag, packed scales, and synchronization of programs."""

import triton
import triton.language as tl

# flags, as in signatures.py
BIAS = tl.constexpr(1)
GELU = tl.constexpr(2)
RESIDUAL = tl.constexpr(4)
OUT_HALF = tl.constexpr(8)
GELU_TANH = tl.constexpr(16)
QUICK_GELU = tl.constexpr(32)
GATE = tl.constexpr(64)
BIAS_UP = tl.constexpr(2)
NORM = tl.constexpr(128)
GATHER = tl.constexpr(256)
ORDERED = tl.constexpr(512)
LAYER_NORM = tl.constexpr(1)
PERMUTED = tl.constexpr(2)
X_HALF = tl.constexpr(4)
Y_HALF = tl.constexpr(16)
ROWS = tl.constexpr(32)
HAS_ZEROS = tl.constexpr(1)
LOGN = tl.constexpr(1)
Q_NORM = tl.constexpr(2)
K_NORM = tl.constexpr(4)
ROPE = tl.constexpr(8)
LISTED = tl.constexpr(16)
ENTRY = tl.constexpr(8)
"""Values of an entry of `table.SequenceTable`."""

FEW = tl.constexpr(16)
"""Rows of the largest tile of a product of few rows; see `signatures.FEW_ROWS`."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def to_half(x):
    """Convert float32 to fp16; overflow saturates to the largest number."""
    return tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)


@triton.jit
def exp2(x):
    """2^x with a relative error of 2^-22; 0 for results below 1.2e-38, for which Triton's function has three more
    instructions."""
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """1 / x with a relative error of 2^-23; 0 for results below 1.2e-38."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return reciprocal(1.0 + exp2(x * -LOG2_E))


@triton.jit
def load_row(x, column, k):
    """Load columns of a row; zeros from column k on."""
    return tl.load(x + column, mask=column < k, other=0.0)


@triton.jit
def load_as_float(base, first, offsets, mask, is_half):
    """Load float32 values at ``first + offsets`` of an array that is fp16 if `is_half`.

    `first` is a scalar and may be int64; the offsets from it then fit int32, which saves registers.
    """
    if is_half:
        value = tl.load(base.to(tl.pointer_type(tl.float16)) + first + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        value = tl.load(base + first + offsets, mask=mask, other=0.0)
    return value


@triton.jit
def store_float(base, first, offsets, value, mask, is_half):
    """Store float32 values at ``first + offsets`` of an array that is fp16 if `is_half`."""
    if is_half:
        tl.store(base.to(tl.pointer_type(tl.float16)) + first + offsets, to_half(value), mask=mask)
    else:
        tl.store(base + first + offsets, value, mask=mask)


@triton.jit
def unpack_scale(packed):
    """Unpack scale and zero, fp16, from the low and high halves of int32 words."""
    scale = (packed & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    zero = (packed >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return scale, zero


@triton.jit
def _given_or_listed(given, entry, column: tl.constexpr, listed):
    """Of a pointer made of an integer the compiler would not believe that it is aligned; so this is an offset."""
    size: tl.constexpr = given.dtype.element_ty.primitive_bitwidth // 8
    away = (tl.load(entry + column, mask=listed, other=0) - given.to(tl.int64)) // size
    return given + tl.multiple_of(tl.where(listed, away, 0), 16 // size)


@triton.jit
def given_or_listed(
    k, v, k_scale, v_scale, start, rope, logn, capacity, entry, flags, INT8: tl.constexpr
):  # fmt: skip
    """Return the arrays of a sequence as they are, or with LISTED those of an entry of `table.SequenceTable`."""
    listed = (flags & LISTED) != 0
    k = _given_or_listed(k, entry, 0, listed)
    v = _given_or_listed(v, entry, 1, listed)
    if INT8:
        k_scale = _given_or_listed(k_scale, entry, 2, listed)
        v_scale = _given_or_listed(v_scale, entry, 3, listed)
    start = _given_or_listed(start, entry, 4, listed)
    rope = _given_or_listed(rope, entry, 5, listed)
    logn = _given_or_listed(logn, entry, 6, listed)
    capacity = tl.where(listed, tl.load(entry + 7, mask=listed, other=0).to(tl.int32), capacity)
    return k, v, k_scale, v_scale, start, rope, logn, capacity


@triton.jit
def last_to_arrive(counter, parts):
    """Whether this program is the last of `parts` to arrive; it then sees the stores of the others.

    The barriers extend one thread's atomic operation to all threads of its program. The counter ends at zero.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1
    tl.debug_barrier()
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def as_half(tile, INT8: tl.constexpr):
    """Convert fp16 or int8 to fp16: bytes are placed in the mantissa of 1024, which is cheaper than a conversion."""
    if INT8:
        bits = (tile.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.int16) | 0x6400
        return bits.to(tl.float16, bitcast=True) - 1152.0
    else:
        return tile


@triton.jit
def weigh(scores, scale, largest, total, BLIND: tl.constexpr):
    """Compute one step of the online softmax: weights of these keys, and the factor of the earlier sums.

    The exponents are scores * scale, in base 2, with a positive scale. BLIND: rows may not have seen a key yet.
    """
    new = tl.maximum(largest, tl.max(scores, 1) * scale)
    origin = new
    if BLIND:
        origin = tl.where(new == float("-inf"), 0.0, new)
    weights = exp2(scores * scale - origin[:, None])
    shrink = exp2(largest - origin)
    return weights, shrink, new, total * shrink + tl.sum(weights, 1)
