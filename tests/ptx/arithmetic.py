"""Opcodes that compute one value in every thread from its own registers (PTX ISA 8.7, chapter 9.7)."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

import numpy as np

from ptx.errors import PtxError
from ptx.group import UNSIGNED, Executor, Group, add_undefined, elementwise, opcode, reader
from ptx.parse import Instruction

Function = Callable[..., np.ndarray]

_KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}
_LEAST_NORMAL = np.float32(2.0**-126)


def type_of(name: str) -> np.dtype:
    """numpy's name for a PTX type: s32, f16, pred."""
    return np.dtype(bool) if name == "pred" else np.dtype(f"{_KINDS[name[0]]}{int(name[1:]) // 8}")


def _either(*halves: np.ndarray) -> np.ndarray:
    return np.bitwise_or.reduce(halves)


def _apply(
    function: Function, instruction: Instruction, dtype: np.dtype, sources: int, halves: Function | None = None
) -> Executor:
    """``d = function(a, b, ...)`` with all operands of one type."""
    target, *operands = instruction.operands
    if len(operands) != sources:
        raise PtxError(f"{len(operands)} operands")
    reads = [reader(operand, dtype) for operand in operands]
    if sources == 1:
        (one,) = reads
        return elementwise(target, operands, lambda group: function(one(group)), halves)
    if sources == 2:
        one, two = reads
        return elementwise(target, operands, lambda group: function(one(group), two(group)), halves)
    one, two, three = reads
    return elementwise(target, operands, lambda group: function(one(group), two(group), three(group)), halves)


# integers and bits --------------------------------------------------------------------------------------------------


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    quotient = np.trunc(a / np.where(b == 0, 1, b).astype(np.float64))
    return np.where(b == 0, -1, quotient).astype(a.dtype)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a - _divide(a, b) * b).astype(a.dtype)


_INTEGER = {
    "add": operator.add,
    "sub": operator.sub,
    "min": np.minimum,
    "max": np.maximum,
    "div": _divide,
    "rem": _remainder,
}


@opcode(r"(add|sub|min|max|div|rem)\.([us](?:16|32|64))")
def _integer(instruction: Instruction, match: re.Match) -> Executor:
    return _apply(_INTEGER[match[1]], instruction, type_of(match[2]), 2)


@opcode(r"(neg|abs)\.(s(?:16|32|64))")
def _integer_sign(instruction: Instruction, match: re.Match) -> Executor:
    return _apply({"neg": operator.neg, "abs": np.abs}[match[1]], instruction, type_of(match[2]), 1)


@opcode(r"(mul|mad)\.(lo|wide|hi)\.([us](?:16|32|64))")
def _multiply(instruction: Instruction, match: re.Match) -> Executor:
    name, part, kind = match.groups()
    dtype = type_of(kind)
    double = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}") if part != "lo" else dtype
    one, two = (reader(operand, dtype) for operand in instruction.operands[1:3])
    target, *sources = instruction.operands
    if part == "hi":
        shift = 8 * dtype.itemsize

        def product(group: Group) -> np.ndarray:
            return ((one(group).astype(double) * two(group)) >> shift).astype(dtype)

    elif part == "wide":

        def product(group: Group) -> np.ndarray:
            return one(group).astype(double) * two(group).astype(double)

    else:

        def product(group: Group) -> np.ndarray:
            return one(group) * two(group)

    if name == "mul":
        return elementwise(target, sources, product)
    three = reader(instruction.operands[3], double if part == "wide" else dtype)
    return elementwise(target, sources, lambda group: product(group) + three(group))


_BITS = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


@opcode(r"(and|or|xor)\.(b16|b32|b64|pred)")
def _bits(instruction: Instruction, match: re.Match) -> Executor:
    return _apply(_BITS[match[1]], instruction, type_of(match[2]), 2)


@opcode(r"(not)\.(b16|b32|b64|pred)")
def _not(instruction: Instruction, match: re.Match) -> Executor:
    return _apply(operator.invert, instruction, type_of(match[2]), 1)


_TABLES: dict[int, Function] = {
    0xEA: lambda a, b, c: (a & b) | c,
    0x80: lambda a, b, c: a & b & c,
    0xFE: lambda a, b, c: a | b | c,
    0x96: lambda a, b, c: a ^ b ^ c,
    0xF8: lambda a, b, c: a | (b & c),
    0x6A: lambda a, b, c: (a & b) ^ c,
    0xCA: lambda a, b, c: (a & b) | (~a & c),
}


@opcode(r"(lop3)\.(b32)")
def _lop3(instruction: Instruction, match: re.Match) -> Executor:
    table = instruction.operands[4].value
    if table not in _TABLES:
        raise PtxError(f"truth table {table:#x} is not known")
    plain = Instruction(instruction.opcode, instruction.operands[:4], None, False, instruction.line)
    return _apply(_TABLES[table], plain, type_of("b32"), 3)


@opcode(r"(shl|shr)\.([bus](?:16|32|64))")
def _shift(instruction: Instruction, match: re.Match) -> Executor:
    dtype, (target, *sources) = type_of(match[2]), instruction.operands
    bits, shift = 8 * dtype.itemsize, np.left_shift if match[1] == "shl" else np.right_shift
    value, count = reader(sources[0], dtype), reader(sources[1], "u4")

    def compute(group: Group) -> np.ndarray:
        by = count(group)
        shifted = shift(value(group), np.minimum(by, bits - 1).astype(dtype))
        if not np.count_nonzero(by >= bits):
            return shifted
        beyond = shifted if dtype.kind == "i" and match[1] == "shr" else dtype.type(0)
        return np.where(by < bits, shifted, beyond)

    return elementwise(target, sources, compute)


@opcode(r"(bfe)\.([us](?:32|64))")
def _bit_field(instruction: Instruction, match: re.Match) -> Executor:
    dtype, (target, *sources) = type_of(match[2]), instruction.operands
    value, first, length = reader(sources[0], dtype), *(reader(operand, "u4") for operand in sources[1:])
    bits = 8 * dtype.itemsize
    if match[2] == "s64":
        raise PtxError("bfe.s64 is not known")

    def compute(group: Group) -> np.ndarray:
        at, count = (x(group).astype(np.int64) & 0xFF for x in (first, length))
        if (at + count > bits).any() or (count == 0).any():
            raise PtxError("a bit field beyond the register is not known")
        field = (value(group).view(UNSIGNED[bits]) >> at.astype(UNSIGNED[bits])) & ((1 << count) - 1).astype(
            UNSIGNED[bits]
        )
        if dtype.kind == "i":
            sign = (1 << (count - 1)).astype(np.int64)
            return ((field.astype(np.int64) ^ sign) - sign).astype(dtype)
        return field

    return elementwise(target, sources, compute)


@opcode(r"(prmt)\.(b32)")
def _permute(instruction: Instruction, match: re.Match) -> Executor:
    target, *sources = instruction.operands
    low, high, selector = (reader(operand, "u4") for operand in sources)

    def compute(group: Group) -> np.ndarray:
        both = low(group).astype(np.uint64) | (high(group).astype(np.uint64) << np.uint64(32))
        chosen, result = selector(group).astype(np.uint64), np.uint64(0)
        if np.count_nonzero(chosen & np.uint64(0x8888)):
            raise PtxError("prmt that spreads a sign is not known")
        for i in range(4):
            at = ((chosen >> np.uint64(4 * i)) & np.uint64(7)) * np.uint64(8)
            result = result | (((both >> at) & np.uint64(0xFF)) << np.uint64(8 * i))
        return result.astype(np.uint32)

    return elementwise(target, sources, compute)


# floats -------------------------------------------------------------------------------------------------------------


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Rounded once: float64 holds the product of two float32 exactly."""
    return (a.astype(np.float64) * b + c).astype(a.dtype)


_FLOAT: dict[str, tuple[int, Function]] = {
    "add": (2, operator.add),
    "sub": (2, operator.sub),
    "mul": (2, operator.mul),
    "div": (2, operator.truediv),
    "min": (2, np.fmin),
    "max": (2, np.fmax),
    "fma": (3, _fma),
    "neg": (1, operator.neg),
    "abs": (1, np.abs),
    "ex2": (1, np.exp2),
    "lg2": (1, np.log2),
    "sqrt": (1, np.sqrt),
    "rcp": (1, lambda x: np.float32(1) / x),
    "rsqrt": (1, lambda x: np.float32(1) / np.sqrt(x)),
    "tanh": (1, np.tanh),
}


def _flushed(x: np.ndarray) -> np.ndarray:
    """Numbers below the least normal one become zeros of their sign."""
    small = np.abs(x) < _LEAST_NORMAL
    return np.where(small, np.copysign(np.float32(0), x), x) if np.count_nonzero(small) else x


@opcode(
    r"(add|sub|mul|div|min|max|fma|neg|abs|ex2|lg2|sqrt|rcp|rsqrt|tanh)(?:\.(?:rn|full|approx))?(\.ftz)?(\.NaN)?"
    r"(\.xorsign\.abs)?\.(f16|f32)"
)
def _float(instruction: Instruction, match: re.Match) -> Executor:
    name, flush, nan, sign, kind = match.groups()
    sources, function = _FLOAT[name]
    if nan:
        function = {"min": np.minimum, "max": np.maximum}[name]
    if sign:
        function = _with_sign_of_product(function)
    if flush:
        function = _flushing(function)
    return _apply(function, instruction, type_of(kind), sources)


def _with_sign_of_product(function: Function) -> Function:
    def compute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.copysign(
            function(np.abs(a), np.abs(b)), np.copysign(np.float32(1), a) * np.copysign(np.float32(1), b)
        )

    return compute


def _flushing(function: Function) -> Function:
    return lambda *values: _flushed(function(*map(_flushed, values)))


@opcode(r"(add|sub|mul|fma)(?:\.rn)?\.(f16x2|f32x2)")
def _float_pairs(instruction: Instruction, match: re.Match) -> Executor:
    name, kind = match.groups()
    count, function = _FLOAT[name]
    half, whole = (np.float16, np.uint32) if kind == "f16x2" else (np.float32, np.uint64)

    def compute(*values: np.ndarray) -> np.ndarray:
        values = np.broadcast_arrays(*values)
        return function(*(np.ascontiguousarray(value).view(half) for value in values)).view(whole)

    return _apply(compute, instruction, np.dtype(whole), count, _either)


# comparing, choosing, converting ------------------------------------------------------------------------------------

_COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def _comparison(name: str, is_float: bool) -> Function:
    if not is_float:
        return _COMPARISONS[name]
    if name in ("nan", "num"):
        wanted = name == "nan"
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == wanted
    if name == "ne":  # ordered: false for NaN, unlike numpy's
        return lambda a, b: (a < b) | (a > b)
    if name in _COMPARISONS:
        return _COMPARISONS[name]
    compare = _COMPARISONS[name.removesuffix("u")]
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


@opcode(r"(setp)\.(eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|nan|num)(?:\.ftz)?\.([busf](?:16|32|64))")
def _compare(instruction: Instruction, match: re.Match) -> Executor:
    dtype, (target, *sources) = type_of(match[3]), instruction.operands
    compare = _comparison(match[2], dtype.kind == "f")
    one, two = (reader(operand, dtype) for operand in sources)
    return elementwise(target, sources, lambda group: compare(one(group), two(group)))


@opcode(r"(selp)\.([busf](?:16|32|64))")
def _select(instruction: Instruction, match: re.Match) -> Executor:
    dtype = type_of(match[2])
    target, yes, no, condition = instruction.operands
    reads = reader(condition, bool), reader(yes, dtype), reader(no, dtype)
    inner = elementwise(target, (yes, no, condition), lambda group: np.where(*(read(group) for read in reads)))
    slots = [operand.slot if hasattr(operand, "slot") else None for operand in (yes, no, condition)]

    def run(group: Group, mask: np.ndarray | None) -> None:
        """Only the operand that is chosen must be defined."""
        undefined = [group.undefined.get(slot) for slot in slots]
        if undefined[0] is None and undefined[1] is None:
            return inner(group, mask)
        nowhere = np.zeros(group.lanes, np.uint8)
        of_yes, of_no, of_condition = (nowhere if lanes is None else lanes for lanes in undefined)
        lanes = np.where(reads[0](group), of_yes, of_no) | of_condition
        lanes = lanes if mask is None else np.where(mask, lanes, 0)
        group.write(target, np.where(*(read(group) for read in reads)), mask)
        add_undefined(group, target.slot, lanes)
        return None

    return run


@opcode(r"(cvt)\.rn(?:\.(satfinite))?\.f16x2\.f32")
def _convert_pair(instruction: Instruction, match: re.Match) -> Executor:
    target, *sources = instruction.operands
    high, low = (reader(operand, "f4") for operand in sources)

    def half(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float16).view(np.uint16).astype(np.uint32)

    return elementwise(target, sources, lambda group: (half(high(group)) << np.uint32(16)) | half(low(group)))


_ROUNDINGS = {None: np.trunc, "rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@opcode(r"(cvt)(?:\.(rn|rz|rzi|rni|rmi|rpi))?(\.ftz)?(\.sat)?\.([busf](?:8|16|32|64))\.([busf](?:8|16|32|64))")
def _convert(instruction: Instruction, match: re.Match) -> Executor:
    _, rounding, _, saturate, to, source = match.groups()
    if saturate or rounding == "rz":
        raise PtxError("this rounding is not known")
    target, operand = instruction.operands
    narrow, wide = type_of(source), UNSIGNED[operand.width]
    read, dtype, kept = reader(operand, wide), type_of(to), UNSIGNED[target.width]

    def compute(group: Group) -> np.ndarray:
        value = read(group)
        value = (
            value.view(narrow)
            if narrow.itemsize == wide.itemsize
            else value.astype(UNSIGNED[8 * narrow.itemsize]).view(narrow)
        )
        if narrow.kind == "f" and rounding in ("rni", "rmi", "rpi", "rzi"):
            value = _ROUNDINGS[rounding](value)
        if narrow.kind == "f" and dtype.kind != "f":
            limits = np.iinfo(dtype)
            value = np.clip(np.nan_to_num(value.astype(np.float64), nan=0.0), limits.min, limits.max)
        result = value.astype(dtype)
        if result.dtype.itemsize != kept.itemsize:  # a byte in a wider register
            result = result.astype(np.dtype(f"{dtype.kind}{kept.itemsize}"))
        return result.view(kept)

    return elementwise(target, [operand], compute)
