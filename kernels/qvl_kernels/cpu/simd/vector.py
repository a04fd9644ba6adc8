"""The vector type and its arithmetic."""

from __future__ import annotations

import functools
import operator

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.core.extending import models, register_model
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic

from qvl_kernels.cpu.simd.emit import ELEMENTS, F32, I32, broadcast, call, constant, each, suffix, take


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
        """Return this type with some attributes replaced."""
        return Vec(el or self.el, n or self.n, m or self.m)


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm, fe):
        super().__init__(dmm, fe, fe.llvm)


def as_element(b, value, numba_type, element):
    """Convert a Numba number to an element of a vector."""
    if isinstance(numba_type, types.Integer):
        if element == F32:
            return b.sitofp(value, F32)
        if value.type.width > element.width:
            return b.trunc(value, element)
        return value if value.type.width == element.width else b.sext(value, element)
    return value if value.type == F32 else b.fptrunc(value, F32)


def operands(b, sig, args, like):
    """Broadcast scalar arguments to the vector type of `like`."""
    return [
        a if isinstance(t, Vec) else broadcast(b, as_element(b, a, t, ELEMENTS[like.el]), like.vector)
        for a, t in zip(args, sig.args)
    ]


def _common(*args):
    """Return the type of an elementwise result, or None if the arguments do not match."""
    vectors = [a for a in args if isinstance(a, Vec)]
    if not vectors or not all(isinstance(a, (Vec, types.Number)) for a in args):
        return None
    result = max(vectors, key=lambda v: v.m)
    fits = all((v.el, v.n) == (result.el, result.n) and v.m in (1, result.m) for v in vectors)
    return result if fits else None


def _elementwise(emit):
    """Create an intrinsic of any number of vectors or scalars; ``emit(b, *vectors)``."""

    def lower(result):
        def codegen(context, b, sig, args):
            return each(b, result.m, functools.partial(emit, b), *operands(b, sig, args, result))

        return codegen

    return lower


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
    emit = _elementwise(lambda b, *v: call(b, f"llvm.fma.{suffix(v[0].type)}", v[0].type, v))
    return result and (result(a, b, c), emit(result))


def _larger(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@intrinsic
def maximum(typing, a, b):
    result = _common(a, b)
    emit = _elementwise(_larger)
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


@intrinsic
def absolute(typing, a):
    emit = _elementwise(lambda b, v: call(b, f"llvm.fabs.{suffix(v.type)}", v.type, [v]))
    return (a(a), emit(a)) if isinstance(a, Vec) else None


def _with_element(a, el, emit):
    """Return signature and code of a conversion of every vector of `a` to elements `el`."""
    result = a.of(el)
    return result(a), lambda context, b, sig, args: each(b, a.m, lambda v: emit(b, v, result.vector), args[0])


@intrinsic
def to_f32(typing, a):
    """i32 to f32."""
    return _with_element(a, "f32", lambda b, v, vector: b.sitofp(v, vector))


def _nearest(b, v):
    return call(b, f"llvm.nearbyint.{suffix(v.type)}", v.type, [v])


@intrinsic
def rint(typing, a):
    """f32 of less than 2**22 to i32, ties to even.

    Adding 1.5 * 2**23 rounds a number to the last bits of the mantissa. This is cheaper than a conversion, and needs no
    subtraction if only the low bytes are used.
    """

    def emit(b, v, vector):
        moved = b.bitcast(b.fadd(v, constant(v.type, 1.5 * 2**23)), vector)
        return b.sub(moved, constant(vector, 0x4B400000))

    return _with_element(a, "i32", emit)


def _shift(name):
    @intrinsic(prefer_literal=True)
    def f(typing, a, k):
        if not isinstance(k, types.IntegerLiteral):
            return None
        bits = k.literal_value

        def codegen(context, b, sig, args):
            if not bits:
                return args[0]
            return each(b, a.m, lambda v: getattr(b, name)(v, constant(v.type, bits)), args[0])

        return a(a, k), codegen

    return f


shl, sar = _shift("shl"), _shift("ashr")


@intrinsic
def exp2(typing, a):
    """``2**a`` of f32, relative error about 2e-7; below -126 it is 2**-126 (0 to any sum), above 127 undefined.

    Round, then a polynomial of the remainder (minimax on [-0.5, 0.5]), then add to the exponent.
    """
    coefficients = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)

    def emit(b, x):
        integers = ir.VectorType(I32, x.type.count)
        floor = constant(x.type, -126.0)
        x = b.select(b.fcmp_ordered(">", x, floor), x, floor)
        whole = _nearest(b, x)
        rest = b.fsub(x, whole)
        p = constant(x.type, coefficients[0])
        for c in coefficients[1:]:
            p = call(b, f"llvm.fma.{suffix(x.type)}", x.type, [p, rest, constant(x.type, c)])
        exponent = b.shl(b.fptosi(whole, integers), constant(integers, 23))
        return b.bitcast(b.add(b.bitcast(p, integers), exponent), x.type)

    return a(a), _elementwise(emit)(a)


def _reduction(float_name, int_name):
    @intrinsic
    def f(typing, a):
        scalar = types.float32 if a.el == "f32" else types.int32

        def codegen(context, b, sig, args):
            element = ELEMENTS[a.el]
            name = f"llvm.vector.reduce.{float_name if a.el == 'f32' else int_name}.{suffix(a.vector)}"
            if name.startswith("llvm.vector.reduce.fadd"):
                function = get_or_insert_function(b.module, ir.FunctionType(F32, [F32, a.vector]), name)
                return b.call(function, [ir.Constant(F32, 0.0), args[0]], fastmath=("reassoc",))
            function = get_or_insert_function(b.module, ir.FunctionType(element, [a.vector]), name)
            return b.call(function, [args[0]], fastmath=("nnan",) if a.el == "f32" else ())

        return (scalar(a), codegen) if isinstance(a, Vec) and a.m == 1 else None

    return f


sum_all, max_all = _reduction("fadd", "add"), _reduction("fmax", "smax")


def _halves(b, x, y, rows):
    """Return the first and the second halves of the `rows` pieces of x and y, adjacent."""
    width = x.type.count // rows
    starts = range(0, (2 if y is not x else 1) * x.type.count, width)
    for begin in (0, width // 2):
        lanes = [start + begin + i for start in starts for i in range(width // 2)]
        yield b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _reduction_of_each(emit):
    """Create an intrinsic that reduces a block of m vectors, m a power of two, to a vector of m."""

    @intrinsic
    def f(typing, a):
        def codegen(context, b, sig, args):
            vectors, rows = [take(b, args[0], i) for i in range(a.m)], 1
            while len(vectors) > 1:
                vectors = [emit(b, *_halves(b, x, y, rows)) for x, y in zip(vectors[::2], vectors[1::2])]
                rows *= 2
            (v,) = vectors
            while v.type.count > rows:
                v = emit(b, *_halves(b, v, v, rows))
            return v

        return a.of(n=a.m, m=1)(a), codegen

    return f


sum_each = _reduction_of_each(lambda b, x, y: b.add(x, y))
"""Of i32."""
max_each = _reduction_of_each(_larger)
"""Of f32."""


@intrinsic(prefer_literal=True)
def piece(typing, v, i):
    """Return vector `i` of a block."""
    if not isinstance(i, types.IntegerLiteral):
        return None
    return v.of(m=1)(v, i), lambda context, b, sig, args: take(b, args[0], i.literal_value)


@intrinsic
def transpose(typing, v):
    """Transpose a block of n vectors of n elements, n a power of two."""

    def codegen(context, b, sig, args):
        vectors = [b.extract_value(args[0], i) for i in range(v.n)]
        half = v.n // 2
        index = ir.VectorType(ir.IntType(32), v.n)
        low = ir.Constant(index, [i // 2 + v.n * (i % 2) for i in range(v.n)])
        high = ir.Constant(index, [half + i // 2 + v.n * (i % 2) for i in range(v.n)])
        # Interleaving the first half with the second, log2(n) times, is a transposition (a perfect shuffle).
        for _ in range(v.n.bit_length() - 1):
            pairs = zip(vectors[:half], vectors[half:])
            vectors = [b.shuffle_vector(x, y, order) for x, y in pairs for order in (low, high)]
        block = args[0]
        for i, vector in enumerate(vectors):
            block = b.insert_value(block, vector, i)
        return block

    return (v(v), codegen) if v.m == v.n else None
