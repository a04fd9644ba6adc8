"""Vectors for Numba: a value type and intrinsics that emit LLVM vector instructions.

One description serves every processor. A `Vec` holds `m` vectors of `n` elements; LLVM cuts them into whatever
registers there are, so elementwise code is written for 16 lanes everywhere. What differs, the product of four bytes
(`dot`, `dot_bytes`), is emitted here for the selected `features.Level`. Operations loop over the `m` vectors while
the code is emitted, which is how register-blocked kernels are unrolled without generated source text: keep `m`
accumulators in one variable, and LLVM puts each in a register.

Everything works on raw addresses (int64). ``+ - * /`` work on vectors of one shape, on an ``m = 1`` vector against an
``m > 1`` one, and against a scalar. Names follow the element types "i8", "i16", "i32", "f32".

=====================================  =================================================================
factory (call at module level)         makes
=====================================  =================================================================
``zeros(el, n, m=1)``                  ``f()``: all zero
``splats(el, n)``                      ``f(x)``: a scalar in every lane
``loads(el, n, m=1)``                  ``f(addr)``: `m` vectors, one behind the other
``rows(el, n, m)``                     ``f(addr, stride)``: vector i from ``addr + i * stride``; "f16" becomes f32
``spreads(el, n, m=1)``                ``f(addr, stride)``: vector i holds the scalar at ``addr + i * stride``
``parts(n)``                           ``f(addr, count)``: the first `count` float32, the rest 0
``halves(n)``                          ``f(addr)``: fp16 in memory as f32
``bytes_(n, signed, m=1)``             ``f(addr)``: 8-bit integers in memory as i32
=====================================  =================================================================

Anywhere in a kernel: ``store(addr, v)``, ``store_rows(addr, v, stride)``, ``store_part(addr, v, count)``,
``store_half(addr, v)``, ``store_bytes(addr, v)``; ``piece(v, i)``; ``fma(a, b, c)``, ``maximum``, ``minimum``,
``absolute``, ``root``, ``rint`` (f32 to i32, ties to even), ``to_f32``, ``shl(v, k)``, ``sar(v, k)``,
``choose_gt(a, b, x, y)`` (x where a > b), ``exp2(v)``; ``sum_all(v)``, ``max_all(v)`` (of one vector);
``low(v)``, ``high(v)`` (nibbles of i8), ``dot``, ``dot_bytes``, ``widen``; scalars in memory: ``get_f32``,
``get_f16``, ``get_i32``, ``get_u8``, ``put_f32``, ``put_f16``, ``put_i32``, ``put_i8``.
`k` and `i` must be literals or names of integers imported into the kernel's module (``simd.NAME`` is no literal).
"""

from __future__ import annotations

import functools
import operator

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.core.extending import models, register_model
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic

from qvl_kernels.cpu import features

LEVEL = features.selected()
LANES = LEVEL.lanes
"""32-bit lanes of one register."""

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
ELEMENTS = {"i8": I8, "i16": I16, "i32": I32, "f32": F32}

# What the kernels must know about `dot` on this processor.
UNSHIFTED = LEVEL.name in ("avx512", "avxvnni")
HIGH_SHIFT = 4 if UNSHIFTED else 0
"""`high` leaves its nibble times 2**HIGH_SHIFT."""
BYTE_BIAS = 128 if LEVEL.name == "neon" else 0
"""`dot_bytes` multiplies ``byte - BYTE_BIAS``."""
SUM_EL = "i16" if LEVEL.name == "avx2" else "i32"
"""Element of a `dot` accumulator; ``widen`` turns it into i32."""
SUM_PER_LANE = 2 if SUM_EL == "i16" else 1
SUM_STEPS = 8 if SUM_EL == "i16" else 16
"""Products of nibbles an accumulator holds before it must be widened (8 * 2 * 15 * 127 < 2**15)."""


# ------------------------------------------------------------------------------------------------ the type
class Vec(types.Type):
    """`m` vectors of `n` elements, in registers; never boxed."""

    def __init__(self, el: str, n: int, m: int = 1):
        self.el, self.n, self.m = el, n, m
        super().__init__(name=f"vec({m}x{n}x{el})")

    @property
    def vector(self) -> ir.Type:
        return ir.VectorType(ELEMENTS[self.el], self.n)

    @property
    def llvm(self) -> ir.Type:
        return self.vector if self.m == 1 else ir.ArrayType(self.vector, self.m)

    def of(self, el: str | None = None, n: int | None = None, m: int | None = None) -> Vec:
        """This type with something changed."""
        return Vec(el or self.el, n or self.n, m or self.m)


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm, fe):
        super().__init__(dmm, fe, fe.llvm)


def _take(b, value, i):
    """Vector i of a block (of itself, if it is only one)."""
    return b.extract_value(value, i) if isinstance(value.type, ir.ArrayType) else value


def _gather(b, vectors):
    if len(vectors) == 1:
        return vectors[0]
    block = ir.Constant(ir.ArrayType(vectors[0].type, len(vectors)), ir.Undefined)
    for i, vector in enumerate(vectors):
        block = b.insert_value(block, vector, i)
    return block


def _each(b, m, emit, *blocks):
    """`emit` applied to every vector of the blocks."""
    return _gather(b, [emit(*(_take(b, block, i) for block in blocks)) for i in range(m)])


def _pointer(b, address, pointee, offset=0):
    if offset:
        address = b.add(address, ir.Constant(address.type, offset))
    return b.inttoptr(address, pointee.as_pointer())


def _word(b, value):
    """An integer as int64."""
    return b.sext(value, I64) if value.type.width < 64 else value


def _constant(vector, value):
    return ir.Constant(vector, [value] * vector.count)


def _broadcast(b, scalar, vector):
    one = b.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(
        one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
    )


def _cut(b, value, start, count):
    """Elements start .. start + count of a vector."""
    if count == value.type.count:
        return value
    mask = ir.Constant(ir.VectorType(I32, count), list(range(start, start + count)))
    return b.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)


def _join(b, pieces):
    """Vectors of one length, side by side."""
    while len(pieces) > 1:
        n = pieces[0].type.count
        mask = ir.Constant(ir.VectorType(I32, 2 * n), list(range(2 * n)))
        pieces = [b.shuffle_vector(x, y, mask) for x, y in zip(pieces[::2], pieces[1::2])]
    return pieces[0]


def _call(b, name, result, args):
    return b.call(get_or_insert_function(b.module, ir.FunctionType(result, [a.type for a in args]), name), args)


def _suffix(vector):
    return (
        f"v{vector.count}{'f' if vector.element == F32 else 'i'}{32 if vector.element == F32 else vector.element.width}"
    )


def _scalar(b, value, numba_type, element):
    """A Numba number as an element of a vector."""
    if isinstance(numba_type, types.Integer):
        if element == F32:
            return b.sitofp(value, F32)
        if value.type.width > element.width:
            return b.trunc(value, element)
        return value if value.type.width == element.width else b.sext(value, element)
    return value if value.type == F32 else b.fptrunc(value, F32)


def _operands(b, sig, args, like):
    """Arguments with the scalars among them broadcast to the vector type of `like`."""
    return [
        a if isinstance(t, Vec) else _broadcast(b, _scalar(b, a, t, ELEMENTS[like.el]), like.vector)
        for a, t in zip(args, sig.args)
    ]


def _common(*args):
    """The type of an elementwise result, or None if the arguments do not fit."""
    vectors = [a for a in args if isinstance(a, Vec)]
    if not vectors or not all(isinstance(a, (Vec, types.Number)) for a in args):
        return None
    result = max(vectors, key=lambda v: v.m)
    fits = all((v.el, v.n) == (result.el, result.n) and v.m in (1, result.m) for v in vectors)
    return result if fits else None


def _elementwise(emit):
    """An intrinsic of any number of vectors or scalars; ``emit(b, *vectors)``."""

    def lower(result):
        def codegen(context, b, sig, args):
            return _each(b, result.m, functools.partial(emit, b), *_operands(b, sig, args, result))

        return codegen

    return lower


# ------------------------------------------------------------------------------------------------ arithmetic
_BINARY = {
    operator.add: ("add", "fadd"),
    operator.sub: ("sub", "fsub"),
    operator.mul: ("mul", "fmul"),
    operator.truediv: (None, "fdiv"),
}


def _register(op, names):
    @infer_global(op)
    class Template(AbstractTemplate):
        def generic(self, args, kws):
            result = _common(*args)
            return None if result is None else signature(result, *args)

    def lower(context, b, sig, args):
        name = names[sig.return_type.el == "f32"]
        return _elementwise(lambda b, x, y: getattr(b, name)(x, y))(sig.return_type)(context, b, sig, args)

    for pair in ((Vec, Vec), (Vec, types.Number), (types.Number, Vec)):
        lower_builtin(op, *pair)(lower)


for _op, _names in _BINARY.items():
    _register(_op, _names)


@intrinsic
def fma(typing, a, b, c):
    """``a * b + c``, rounded once."""
    result = _common(a, b, c)
    emit = _elementwise(lambda b, *v: _call(b, f"llvm.fma.{_suffix(v[0].type)}", v[0].type, v))
    return result and (result(a, b, c), emit(result))


@intrinsic
def maximum(typing, a, b):
    result = _common(a, b)
    emit = _elementwise(lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
    return result and (result(a, b), emit(result))


@intrinsic
def minimum(typing, a, b):
    result = _common(a, b)
    emit = _elementwise(lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), x, y))
    return result and (result(a, b), emit(result))


@intrinsic
def choose_gt(typing, a, b, x, y):
    """x where a > b, else y (all f32)."""
    result = _common(a, b, x, y)
    emit = _elementwise(lambda b, p, q, u, v: b.select(b.fcmp_ordered(">", p, q), u, v))
    return result and (result(a, b, x, y), emit(result))


def _unary(name):
    @intrinsic
    def f(typing, a):
        emit = _elementwise(lambda b, v: _call(b, f"llvm.{name}.{_suffix(v.type)}", v.type, [v]))
        return (a(a), emit(a)) if isinstance(a, Vec) else None

    return f


absolute = _unary("fabs")
root = _unary("sqrt")


def _with_element(a, el, emit):
    """Signature and code of a conversion of every vector of `a` to elements `el`."""
    result = a.of(el)
    return result(a), lambda context, b, sig, args: _each(b, a.m, lambda v: emit(b, v, result.vector), args[0])


@intrinsic
def to_f32(typing, a):
    """i32 to f32."""
    return _with_element(a, "f32", lambda b, v, vector: b.sitofp(v, vector))


def _nearest(b, v):
    return _call(b, f"llvm.nearbyint.{_suffix(v.type)}", v.type, [v])


@intrinsic
def rint(typing, a):
    """f32 to i32, ties to even."""
    return _with_element(a, "i32", lambda b, v, vector: b.fptosi(_nearest(b, v), vector))


def _shift(name):
    @intrinsic(prefer_literal=True)
    def f(typing, a, k):
        if not isinstance(k, types.IntegerLiteral):
            return None
        bits = k.literal_value

        def codegen(context, b, sig, args):
            if not bits:
                return args[0]
            return _each(b, a.m, lambda v: getattr(b, name)(v, _constant(v.type, bits)), args[0])

        return a(a, k), codegen

    return f


shl, sar = _shift("shl"), _shift("ashr")


@intrinsic
def exp2(typing, a):
    """``2**a`` of f32, relative error 2e-7 or so; below -126 it is 2**-126 (0 to any sum), above 127 undefined.

    Round, then a polynomial of the remainder (minimax on [-0.5, 0.5]), then add to the exponent.
    """
    coefficients = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)

    def emit(b, x):
        integers = ir.VectorType(I32, x.type.count)
        floor = _constant(x.type, -126.0)
        x = b.select(b.fcmp_ordered(">", x, floor), x, floor)
        whole = _nearest(b, x)
        rest = b.fsub(x, whole)
        p = _constant(x.type, coefficients[0])
        for c in coefficients[1:]:
            p = _call(b, f"llvm.fma.{_suffix(x.type)}", x.type, [p, rest, _constant(x.type, c)])
        exponent = b.shl(b.fptosi(whole, integers), _constant(integers, 23))
        return b.bitcast(b.add(b.bitcast(p, integers), exponent), x.type)

    return a(a), _elementwise(emit)(a)


def _reduction(float_name, int_name):
    @intrinsic
    def f(typing, a):
        scalar = types.float32 if a.el == "f32" else types.int32

        def codegen(context, b, sig, args):
            element = ELEMENTS[a.el]
            name = f"llvm.vector.reduce.{float_name if a.el == 'f32' else int_name}.{_suffix(a.vector)}"
            if name.startswith("llvm.vector.reduce.fadd"):
                function = get_or_insert_function(b.module, ir.FunctionType(F32, [F32, a.vector]), name)
                return b.call(function, [ir.Constant(F32, 0.0), args[0]], fastmath=("reassoc",))
            function = get_or_insert_function(b.module, ir.FunctionType(element, [a.vector]), name)
            return b.call(function, [args[0]], fastmath=("nnan",) if a.el == "f32" else ())

        return (scalar(a), codegen) if isinstance(a, Vec) and a.m == 1 else None

    return f


sum_all, max_all = _reduction("fadd", "add"), _reduction("fmax", "smax")


# ------------------------------------------------------------------------------------------------ making vectors
@functools.cache
def zeros(el, n, m=1):
    result = Vec(el, n, m)

    @intrinsic
    def f(typing):
        return result(), lambda context, b, sig, args: ir.Constant(result.llvm, None)

    return f


@functools.cache
def splats(el, n):
    result = Vec(el, n)

    @intrinsic
    def f(typing, x):
        return result(x), lambda context, b, sig, args: _operands(b, sig, args, result)[0]

    return f


@functools.cache
def loads(el, n, m=1):
    result = Vec(el, n, m)
    size = n * int(el[1:]) // 8

    @intrinsic
    def f(typing, addr):
        def codegen(context, b, sig, args):
            return _gather(b, [b.load(_pointer(b, args[0], result.vector, i * size), align=1) for i in range(m)])

        return result(addr), codegen

    return f


@functools.cache
def rows(el, n, m):
    """``f(addr, stride)``: vector i is loaded from ``addr + i * stride``; el may be "f16" (as f32)."""
    half = el == "f16"
    result = Vec("f32" if half else el, n, m)

    @intrinsic
    def f(typing, addr, stride):
        def codegen(context, b, sig, args):
            address, step = args[0], _word(b, args[1])
            vectors = []
            for _ in range(m):
                if half:
                    vectors.append(_load_half(b, address, n))
                else:
                    vectors.append(b.load(_pointer(b, address, result.vector), align=1))
                address = b.add(address, step)
            return _gather(b, vectors)

        return result(addr, stride), codegen

    return f


@functools.cache
def spreads(el, n, m=1):
    result = Vec(el, n, m)

    @intrinsic
    def f(typing, addr, stride):
        def codegen(context, b, sig, args):
            address, step = args[0], _word(b, args[1])
            vectors = []
            for _ in range(m):
                scalar = b.load(_pointer(b, address, ELEMENTS[el]), align=1)
                vectors.append(_broadcast(b, scalar, result.vector))
                address = b.add(address, step)
            return _gather(b, vectors)

        return result(addr, stride), codegen

    return f


def _lane_mask(b, n, count):
    lanes = ir.VectorType(I32, n)
    numbers = ir.Constant(lanes, list(range(n)))
    count = b.trunc(count, I32) if count.type.width > 32 else count
    return b.icmp_signed("<", numbers, _broadcast(b, count, lanes))


@functools.cache
def parts(n):
    result = Vec("f32", n)

    @intrinsic
    def f(typing, addr, count):
        def codegen(context, b, sig, args):
            vector = result.vector
            pointer = _pointer(b, args[0], vector)
            mask = _lane_mask(b, n, args[1])
            arguments = [pointer, ir.Constant(I32, 1), mask, ir.Constant(vector, None)]
            return _call(b, f"llvm.masked.load.v{n}f32.p0", vector, arguments)

        return result(addr, count), codegen

    return f


def _half_to_float(b, bits):
    """fp16 as i16 bits to f32 without a conversion instruction; infinities and NaN come out finite."""
    n = bits.type.count
    integers, floats = ir.VectorType(I32, n), ir.VectorType(F32, n)
    wide = b.zext(bits, integers)
    sign = b.shl(b.and_(wide, _constant(integers, 0x8000)), _constant(integers, 16))
    rest = b.shl(b.and_(wide, _constant(integers, 0x7FFF)), _constant(integers, 13))
    value = b.fmul(b.bitcast(rest, floats), _constant(floats, 2.0**112))
    return b.bitcast(b.or_(b.bitcast(value, integers), sign), floats)


def _float_to_half(b, value):
    """f32 to fp16 bits, ties to even, too large values to infinity (after Giesen's float_to_half_fast3_rtne)."""
    n = value.type.count
    integers, floats = ir.VectorType(I32, n), ir.VectorType(F32, n)
    bits = b.bitcast(value, integers)
    sign = b.and_(bits, _constant(integers, -0x80000000))
    bits = b.xor(bits, sign)
    magic = b.fadd(b.bitcast(bits, floats), _constant(floats, 0.5))
    small = b.sub(b.bitcast(magic, integers), _constant(integers, 126 << 23))
    odd = b.and_(b.lshr(bits, _constant(integers, 13)), _constant(integers, 1))
    normal = b.add(bits, b.add(odd, _constant(integers, ((15 - 127) << 23) + 0xFFF)))
    normal = b.lshr(normal, _constant(integers, 13))
    out = b.select(b.icmp_signed("<", bits, _constant(integers, 113 << 23)), small, normal)
    out = b.select(b.icmp_signed(">=", bits, _constant(integers, 143 << 23)), _constant(integers, 0x7C00), out)
    return b.trunc(b.or_(out, b.lshr(sign, _constant(integers, 16))), ir.VectorType(I16, n))


def _load_half(b, address, n):
    if LEVEL.name == "plain":
        return _half_to_float(b, b.load(_pointer(b, address, ir.VectorType(I16, n)), align=1))
    return b.fpext(b.load(_pointer(b, address, ir.VectorType(F16, n)), align=1), ir.VectorType(F32, n))


def _store_half(b, address, value):
    n = value.type.count
    if LEVEL.name == "plain":
        half = _float_to_half(b, value)
    else:
        half = b.fptrunc(value, ir.VectorType(F16, n))
    b.store(half, _pointer(b, address, half.type), align=1)


@functools.cache
def halves(n):
    result = Vec("f32", n)

    @intrinsic
    def f(typing, addr):
        return result(addr), lambda context, b, sig, args: _load_half(b, args[0], n)

    return f


@functools.cache
def bytes_(n, signed, m=1):
    result = Vec("i32", n, m)

    @intrinsic
    def f(typing, addr):
        def codegen(context, b, sig, args):
            extend = b.sext if signed else b.zext
            loaded = [b.load(_pointer(b, args[0], ir.VectorType(I8, n), i * n), align=1) for i in range(m)]
            return _gather(b, [extend(v, result.vector) for v in loaded])

        return result(addr), codegen

    return f


@intrinsic(prefer_literal=True)
def piece(typing, v, i):
    """Vector `i` of a block."""
    if not isinstance(i, types.IntegerLiteral):
        return None
    return v.of(m=1)(v, i), lambda context, b, sig, args: _take(b, args[0], i.literal_value)


# ------------------------------------------------------------------------------------------------ to memory
def _nothing(context):
    return context.get_dummy_value()


@intrinsic
def store(typing, addr, v):
    """Write the vectors one behind the other."""
    size = v.n * int(v.el[1:]) // 8

    def codegen(context, b, sig, args):
        for i in range(v.m):
            b.store(_take(b, args[1], i), _pointer(b, args[0], v.vector, i * size), align=1)
        return _nothing(context)

    return types.none(addr, v), codegen


@intrinsic
def store_rows(typing, addr, v, stride):
    """Write vector i at ``addr + i * stride``."""

    def codegen(context, b, sig, args):
        address, step = args[0], _word(b, args[2])
        for i in range(v.m):
            b.store(_take(b, args[1], i), _pointer(b, address, v.vector), align=1)
            address = b.add(address, step)
        return _nothing(context)

    return types.none(addr, v, stride), codegen


@intrinsic
def store_part(typing, addr, v, count):
    """Write the first `count` elements of one f32 vector."""

    def codegen(context, b, sig, args):
        mask = _lane_mask(b, v.n, args[2])
        arguments = [args[1], _pointer(b, args[0], v.vector), ir.Constant(I32, 1), mask]
        _call(b, f"llvm.masked.store.v{v.n}f32.p0", ir.VoidType(), arguments)
        return _nothing(context)

    return types.none(addr, v, count), codegen


@intrinsic
def store_half(typing, addr, v):
    """Write one f32 vector as fp16, ties to even."""

    def codegen(context, b, sig, args):
        _store_half(b, args[0], args[1])
        return _nothing(context)

    return types.none(addr, v), codegen


@intrinsic
def store_bytes(typing, addr, v):
    """Write one i32 vector as its low bytes."""

    def codegen(context, b, sig, args):
        value = b.trunc(args[1], ir.VectorType(I8, v.n))
        b.store(value, _pointer(b, args[0], value.type), align=1)
        return _nothing(context)

    return types.none(addr, v), codegen


def _getter(numba_type, load):
    @intrinsic
    def f(typing, addr):
        return numba_type(addr), lambda context, b, sig, args: load(b, args[0])

    return f


get_f32 = _getter(types.float32, lambda b, a: b.load(_pointer(b, a, F32), align=1))
get_f16 = _getter(types.float32, lambda b, a: b.extract_element(_load_half(b, a, 1), ir.Constant(I32, 0)))
get_i32 = _getter(types.int32, lambda b, a: b.load(_pointer(b, a, I32), align=1))
get_i64 = _getter(types.int64, lambda b, a: b.load(_pointer(b, a, I64), align=1))
get_u8 = _getter(types.int32, lambda b, a: b.zext(b.load(_pointer(b, a, I8)), I32))


def _putter(element, write=None):
    @intrinsic
    def f(typing, addr, x):
        def codegen(context, b, sig, args):
            value = _scalar(b, args[1], x, element)
            if write:
                write(b, args[0], value)
            else:
                b.store(value, _pointer(b, args[0], element), align=1)
            return _nothing(context)

        return types.none(addr, x), codegen

    return f


put_f32, put_i32, put_i8 = _putter(F32), _putter(I32), _putter(I8)
put_f16 = _putter(F32, lambda b, a, x: _store_half(b, a, _broadcast(b, x, ir.VectorType(F32, 1))))


# ------------------------------------------------------------------------------------------------ bytes and nibbles
@intrinsic
def low(typing, v):
    """Low nibbles of i8."""
    return v(v), lambda context, b, sig, args: _each(b, v.m, lambda x: b.and_(x, _constant(x.type, 15)), args[0])


@intrinsic
def high(typing, v):
    """High nibbles of i8, times ``2**HIGH_SHIFT``."""

    def emit(b, x):
        return b.and_(x, _constant(x.type, 0xF0)) if UNSHIFTED else b.lshr(x, _constant(x.type, 4))

    return v(v), lambda context, b, sig, args: _each(b, v.m, functools.partial(emit, b), args[0])


@functools.cache
def _byte_operands():
    """Whether this LLVM's vpdpbusd takes byte vectors (22 and later) or i32 vectors."""
    name, v, w = "llvm.x86.avx512.vpdpbusd.512", "<16 x i32>", "<64 x i8>"
    text = f"declare {v} @{name}({v}, {w}, {w})"
    return w in str(llvm.parse_assembly(text)).split("declare")[-1]


def _vnni(b, acc, u, s):
    n = acc.type.count
    operand = ir.VectorType(I8, 4 * n) if _byte_operands() else acc.type
    args = [acc] + [x if x.type == operand else b.bitcast(x, operand) for x in (u, s)]
    return _call(b, f"llvm.x86.avx512.vpdpbusd.{32 * n}", acc.type, args)


def _pairs(b, u, s):
    """i16 sums of two products, u8 by s8 (saturating)."""
    return _call(b, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), [u, b.bitcast(s, u.type)])


def _pair_sums(b, v):
    ones = _constant(v.type, 1)
    return _call(b, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), [v, ones])


def _sdot(b, acc, u, s):
    return _call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, [acc, u, b.bitcast(s, u.type)])


def _plain_dot(b, acc, u, s):
    u = b.bitcast(u, acc.type)
    for k in range(4):
        x = b.lshr(u, _constant(u.type, 8 * k)) if k else u
        x = b.and_(x, _constant(u.type, 255))
        y = b.ashr(b.shl(s, _constant(u.type, 24 - 8 * k)) if k < 3 else s, _constant(u.type, 24))
        acc = b.add(acc, b.mul(x, y))
    return acc


def _dot_nibbles(b, acc, u, s):
    if LEVEL.name == "avx2":
        return b.add(acc, _pairs(b, u, s))
    return {"neon": _sdot, "plain": _plain_dot}.get(LEVEL.name, _vnni)(b, acc, u, s)


def _dot_any(b, acc, u, s):
    if LEVEL.name == "avx2":
        # 255 * 127 * 2 overflows i16; 127 * 127 * 2 and 128 * 127 * 2 do not.
        for mask in (0x7F, 0x80):
            acc = b.add(acc, _pair_sums(b, _pairs(b, b.and_(u, _constant(u.type, mask)), s)))
        return acc
    if LEVEL.name == "neon":
        u = b.xor(u, _constant(u.type, 0x80))
    return {"neon": _sdot, "plain": _plain_dot}.get(LEVEL.name, _vnni)(b, acc, u, s)


def _dot(emit):
    """An intrinsic ``f(acc, u, addr, stride)``, cut into registers of `LANES` lanes."""

    @intrinsic
    def f(typing, acc, u, addr, stride):
        per_lane = acc.n * 4 // u.n
        step = LANES * (2 if acc.el == "i16" else 1)

        def codegen(context, b, sig, args):
            address, stride = args[2], _word(b, args[3])
            sums = []
            for i in range(acc.m):
                block, bytes_ = _take(b, args[0], i), _take(b, args[1], i)
                word = b.load(_pointer(b, address, I32), align=1)
                word = _broadcast(b, word, ir.VectorType(I32, LANES))
                cuts = range(acc.n // step)
                sums.append(
                    _join(
                        b,
                        [
                            emit(b, _cut(b, block, c * step, step), _cut(b, bytes_, c * 4 * LANES, 4 * LANES), word)
                            for c in cuts
                        ],
                    )
                )
                if i + 1 < acc.m:
                    address = b.add(address, stride)
            return _gather(b, sums)

        fits = isinstance(u, Vec) and u.el == "i8" and u.m in (1, acc.m) and acc.n % step == 0 and per_lane in (1, 2)
        return (acc(acc, u, addr, stride), codegen) if fits else None

    return f


dot = _dot(_dot_nibbles)
"""``acc[i] += u . s_i``: bytes u (at most 127, or a nibble as `low` and `high` give it) by the four int8 at
``addr + i * stride``; each lane of four products is summed into its lane of `acc` (`SUM_EL`)."""

dot_bytes = _dot(_dot_any)
"""As `dot` with any bytes less `BYTE_BIAS`, into an i32 accumulator."""


@intrinsic
def widen(typing, acc):
    """A `dot` accumulator as i32."""
    if acc.el == "i32":
        return acc(acc), lambda context, b, sig, args: args[0]
    result = acc.of("i32", acc.n // 2)

    def emit(b, v):
        return _join(b, [_pair_sums(b, _cut(b, v, i, 16)) for i in range(0, acc.n, 16)])

    return result(acc), lambda context, b, sig, args: _each(b, acc.m, functools.partial(emit, b), args[0])
