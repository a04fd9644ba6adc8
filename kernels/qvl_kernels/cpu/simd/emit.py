"""Building blocks of LLVM IR for the intrinsics."""

from __future__ import annotations

from llvmlite import ir
from numba.core.cgutils import get_or_insert_function

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
ELEMENTS = {"i8": I8, "i16": I16, "i32": I32, "f32": F32}


def take(b, value, i):
    """Return vector i of a block (the vector itself, if there is only one)."""
    return b.extract_value(value, i) if isinstance(value.type, ir.ArrayType) else value


def gather(b, vectors):
    if len(vectors) == 1:
        return vectors[0]
    block = ir.Constant(ir.ArrayType(vectors[0].type, len(vectors)), ir.Undefined)
    for i, vector in enumerate(vectors):
        block = b.insert_value(block, vector, i)
    return block


def each(b, m, emit, *blocks):
    """Apply `emit` to every vector of the blocks."""
    return gather(b, [emit(*(take(b, block, i) for block in blocks)) for i in range(m)])


def pointer(b, address, pointee, offset=0):
    if offset:
        address = b.add(address, ir.Constant(address.type, offset))
    return b.inttoptr(address, pointee.as_pointer())


def word(b, value):
    """Convert an integer to int64."""
    return b.sext(value, I64) if value.type.width < 64 else value


def constant(vector, value):
    return ir.Constant(vector, [value] * vector.count)


def broadcast(b, scalar, vector):
    one = b.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(
        one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
    )


def addresses(b, address, step, count):
    """Emit ``address + i * step`` for i below `count`; a generator, for one at a time."""
    step = word(b, step)
    for i in range(count):
        if i:
            address = b.add(address, step)
        yield address


def spread(b, address, vector):
    """Emit the load of an element into every lane."""
    return broadcast(b, b.load(pointer(b, address, vector.element), align=1), vector)


def cut(b, value, start, count):
    """Return elements start .. start + count of a vector."""
    if count == value.type.count:
        return value
    mask = ir.Constant(ir.VectorType(I32, count), list(range(start, start + count)))
    return b.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)


def join(b, pieces):
    """Concatenate vectors of the same length."""
    while len(pieces) > 1:
        n = pieces[0].type.count
        mask = ir.Constant(ir.VectorType(I32, 2 * n), list(range(2 * n)))
        pieces = [b.shuffle_vector(x, y, mask) for x, y in zip(pieces[::2], pieces[1::2])]
    return pieces[0]


def call(b, name, result, args):
    return b.call(get_or_insert_function(b.module, ir.FunctionType(result, [a.type for a in args]), name), args)


def suffix(vector):
    return (
        f"v{vector.count}{'f' if vector.element == F32 else 'i'}{32 if vector.element == F32 else vector.element.width}"
    )
