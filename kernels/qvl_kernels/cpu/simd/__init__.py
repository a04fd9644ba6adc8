"""Vectors for Numba: a value type and intrinsics that emit LLVM vector instructions.

One description serves every processor. A `Vec` holds `m` vectors of `n` elements; LLVM splits them into the available
registers, so elementwise code always uses 16 lanes. The product of four bytes (`dot`, `dot_bytes`) depends on the
processor and is emitted for the selected `features.Level`. Operations loop over the `m` vectors while the code is
emitted, which unrolls register-blocked kernels without generated source text: hold `m` accumulators in one variable,
and LLVM puts each in a register. For AVX2 without VNNI the inner loops of products are in `assembly` and
`assembly_few`.

Everything works on raw addresses (int64). ``+ - * /`` work on vectors of one shape, on an ``m = 1`` vector against an
``m > 1`` one, and against a scalar. Names follow the element types "i8", "i16", "i32", "f32".

=====================================  =================================================================
factory (call at module level)         makes
=====================================  =================================================================
``zeros(el, n, m=1)``                  ``f()``: all zero
``splats(el, n)``                      ``f(x)``: a scalar in every lane
``loads(el, n, m=1)``                  ``f(addr)``: `m` adjacent vectors
``rows(el, n, m)``                     ``f(addr, stride)``: vector i from ``addr + i * stride``; "f16" becomes f32
``spreads(el, n, m=1)``                ``f(addr, stride)``: vector i holds the scalar at ``addr + i * stride``
``parts(n)``                           ``f(addr, count)``: the first `count` float32, the rest 0
``halves(n)``                          ``f(addr)``: fp16 in memory as f32
``bytes_(n, signed, m=1)``             ``f(addr)``: 8-bit integers in memory as i32
``steps_of_int3(n)``                   ``f(addr, i)``: a step of packed int3 as nibbles
``masks(mask)``, ``highs(bits)``       ``f(v)``: those bits, or the high nibbles, of i8
=====================================  =================================================================

Anywhere in a kernel: ``store(addr, v)``, ``store_rows(addr, v, stride)``, ``store_part(addr, v, count)``,
``store_streaming(addr, v, stride)``, ``store_half(addr, v)``, ``store_bytes(addr, v)``; ``piece(v, i)``; ``fma(a, b,
c)``, ``maximum``, ``minimum``, ``absolute``, ``rint`` (f32 to i32, ties to even), ``to_f32``, ``shl(v, k)``,
``sar(v, k)``, ``choose_gt(a, b, x, y)`` (x where a > b), ``exp2(v)``; ``sum_all(v)``, ``max_all(v)`` (of one vector),
``sum_each(v)`` (i32), ``max_each(v)`` (f32; of every vector, as a vector of m); ``transpose(v)`` (m = n); ``dot``,
``dot_bytes``, ``widen``; scalars in memory: ``get_f32``, ``get_f16``, ``get_i32``, ``get_u8``, ``get_u16``,
``put_f32``, ``put_f16``, ``put_i32``.
`k` and `i` must be literals or names of integers imported into the kernel's module (``simd.NAME`` is no literal).
"""

from qvl_kernels.cpu.simd.bytes import (
    BYTE_BIAS,
    HIGH_SHIFT,
    LANES,
    LEVEL,
    MATRIX,
    SUM_EL,
    SUM_PER_LANE,
    SUM_STEPS,
    UNPACKS,
    UNSHIFTED,
    WORDS,
    dot,
    dot_bytes,
    high_byte,
    highs,
    masks,
    step_end,
    steps_of_int3,
    widen,
)
from qvl_kernels.cpu.simd.memory import (
    bytes_,
    get_f16,
    get_f32,
    get_i32,
    get_i64,
    get_u8,
    get_u16,
    halves,
    loads,
    parts,
    prefetch_read,
    prefetch_write,
    put_f16,
    put_f32,
    put_i32,
    rows,
    splats,
    spreads,
    store,
    store_bytes,
    store_half,
    store_part,
    store_rows,
    store_streaming,
    zeros,
)
from qvl_kernels.cpu.simd.vector import (
    Vec,
    absolute,
    choose_gt,
    exp2,
    fma,
    max_all,
    max_each,
    maximum,
    minimum,
    piece,
    rint,
    sar,
    shl,
    sum_all,
    sum_each,
    to_f32,
    transpose,
)

__all__ = [
    "BYTE_BIAS",
    "HIGH_SHIFT",
    "LANES",
    "LEVEL",
    "MATRIX",
    "SUM_EL",
    "SUM_PER_LANE",
    "SUM_STEPS",
    "UNPACKS",
    "UNSHIFTED",
    "WORDS",
    "Vec",
    "absolute",
    "bytes_",
    "choose_gt",
    "dot",
    "dot_bytes",
    "exp2",
    "fma",
    "get_f16",
    "get_f32",
    "get_i32",
    "get_i64",
    "get_u8",
    "get_u16",
    "halves",
    "high_byte",
    "highs",
    "loads",
    "masks",
    "max_all",
    "max_each",
    "maximum",
    "minimum",
    "parts",
    "piece",
    "prefetch_read",
    "prefetch_write",
    "put_f16",
    "put_f32",
    "put_i32",
    "rint",
    "rows",
    "sar",
    "shl",
    "splats",
    "spreads",
    "step_end",
    "steps_of_int3",
    "store",
    "store_bytes",
    "store_half",
    "store_part",
    "store_rows",
    "store_streaming",
    "sum_all",
    "sum_each",
    "to_f32",
    "transpose",
    "widen",
    "zeros",
]
