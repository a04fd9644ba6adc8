"""Inner loops of products in assembler, for AVX2 without VNNI (`WORDS`).

LLVM regroups sums of integers, holds more values at once than the 16 registers do, and spills: its loops take up to a
fifth longer. Weights are read in the order of memory, with the activations' words spread from memory.
"""

from __future__ import annotations

import re

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import alloca_once
from numba.extending import intrinsic

from qvl_kernels.cpu.simd.emit import F32, I32, I64, gather, join
from qvl_kernels.cpu.simd.vector import Vec
from qvl_kernels.cpu.tiles import TOKENS

VECTOR = ir.VectorType(I32, 8)
SUMS = tuple(f"{half}{row}" for row in range(TOKENS) for half in "ab")
"""Sums of a tile: of each row times two vectors of weights."""
STEP = 64
"""Bytes of two vectors of weights."""
TOTALS = ("t0", "t1", "t2", "t3")


def _assemble(b, lines, vectors, changed, read):
    """Emit assembler, in which ``%name`` stands for a register; return the vector registers by name.

    `changed`, `read`: the integers that start in a register, by name; the code changes the first.
    """
    first = len(vectors)
    numbers = {name: i for i, name in enumerate((*vectors, *changed))}
    numbers |= {name: first + 2 * len(changed) + i for i, name in enumerate(read)}
    text = "\n".join(lines).replace("$", "$$")
    text = re.sub(r"%(\w+)", lambda match: f"${numbers[match[1]]}", text)
    outputs = ["=&x"] * first + ["=&r"] * len(changed)
    inputs = [str(first + i) for i in range(len(changed))] + ["r"] * len(read)
    operands = [*changed.values(), *read.values()]
    result = ir.LiteralStructType([VECTOR] * first + [I64] * len(changed))
    kind = ir.FunctionType(result, [x.type for x in operands])
    constraints = ",".join((*outputs, *inputs, "~{memory}", "~{flags}"))
    found = b.call(ir.InlineAsm(kind, text, constraints, side_effect=True), operands)
    return {name: b.extract_value(found, i) for i, name in enumerate(vectors)}


def _step(product: str, add: str, at: int, words: list[str], fresh: bool) -> list[str]:
    """Add a step's products with the rows' words to the sums of a tile, or, if `fresh`, write them there."""
    lines = [f"vmovdqu {at}(%w), %u", f"vmovdqu {at + 32}(%w), %v"]
    for row, word in enumerate(words):
        a, b = SUMS[2 * row : 2 * row + 2]
        lines.append(f"vpbroadcastd {word}, %word")
        if fresh:
            lines += [f"{product} %word, %u, %{a}", f"{product} %word, %v, %{b}"]
        else:
            lines += [f"{product} %word, %u, %p", f"{product} %word, %v, %q"]
            lines += [f"{add} %p, %{a}, %{a}", f"{add} %q, %{b}, %{b}"]
    return lines


def _adjacent(at: int) -> list[str]:
    """The addresses of the words of all rows of a step, one behind the other."""
    return [f"{at + 4 * row}(%x)" for row in range(TOKENS)]


def _scale(ones: str | None) -> list[str]:
    """``held[i] += sums[i] * scale of the row``, in float32; `ones`: a vector that adds pairs of i16 before."""
    lines = []
    for i, name in enumerate(SUMS):
        if i % 2 == 0:
            lines.append(f"vbroadcastss {2 * i}(%scales), %word")
        if ones:
            lines.append(f"vpmaddwd %{ones}, %{name}, %{name}")
        at = f"{32 * i}(%held)"
        lines += [f"vcvtdq2ps %{name}, %{name}", f"vfmadd213ps {at}, %word, %{name}", f"vmovups %{name}, {at}"]
    return lines


def _ones(register: str) -> list[str]:
    """Write 1 to all words of a register."""
    return [f"vpcmpeqw %{register}, %{register}, %{register}", f"vpsrlw $15, %{register}, %{register}"]


def _clear(registers: tuple[str, ...]) -> list[str]:
    """Write 0 to registers."""
    return [f"vpxor %{name}, %{name}, %{name}" for name in registers]


def _span_loop(lines: list[str]):
    """The codegen of ``f(p, q, w, x, scales, spans, steps)``, which returns p and q plus all spans.

    Meanwhile p and q are in memory, at `held`: the sums of a span need the registers.
    """
    lines = [".p2align 5", "1:", *lines, f"addq ${4 * TOKENS}, %scales", "decq %spans", "jnz 1b"]

    def codegen(context, b, sig, args):
        p, q, w, x, scales, spans, steps = args
        held = alloca_once(b, ir.VectorType(F32, 8), len(SUMS))
        places = [b.gep(held, [ir.Constant(I32, i)]) for i in range(len(SUMS))]
        for i, place in enumerate(places):
            b.store(b.extract_value((p, q)[i % 2], i // 2), place)
        changed = {"w": w, "x": x, "scales": scales, "spans": spans, "left": steps}
        read = {"held": b.ptrtoint(held, I64), "steps": steps}
        _assemble(b, lines, (*SUMS, "u", "v", "word", "p", "q"), changed, read)
        for i, place in enumerate(places):
            value = b.load(place)
            if i % 2:
                q = b.insert_value(q, value, i // 2)
            else:
                p = b.insert_value(p, value, i // 2)
        return context.make_tuple(b, sig.return_type, (p, q))

    return codegen


@intrinsic
def add_nibble_spans(typing, p, q, w, x, scales, spans, steps):
    """Add `spans` (not 0) adjacent spans of 8 `steps` to p and q, float32: unpacked nibbles at w, bytes at x.

    A step is four columns of two vectors of weights and of `TOKENS` rows; a span's sums are scaled by a row's scale.
    """
    lines = []
    for step in range(8):
        lines += _step("vpmaddubsw", "vpaddw", STEP * step, _adjacent(4 * TOKENS * step), fresh=step == 0)
    lines += [*_ones("u"), *_scale("u"), f"addq ${8 * STEP}, %w", f"addq ${8 * 4 * TOKENS}, %x"]
    return types.UniTuple(p, 2)(p, q, w, x, scales, spans, steps), _span_loop(lines)


@intrinsic
def add_pair_spans(typing, p, q, w, x, scales, spans, steps):
    """As `add_nibble_spans`, of `steps` steps of two columns: words at w and x."""
    lines = [*_clear(SUMS), "movq %steps, %left", ".p2align 5", "2:"]
    lines += _step("vpmaddwd", "vpaddd", 0, _adjacent(0), fresh=False)
    lines += [f"addq ${STEP}, %w", f"addq ${4 * TOKENS}, %x", "decq %left", "jnz 2b", *_scale(None)]
    return types.UniTuple(p, 2)(p, q, w, x, scales, spans, steps), _span_loop(lines)


@intrinsic
def pair_sums(typing, w, x, row, steps):
    """Return the i32 sums of `steps` (not 0) steps of two vectors of words at w, with the words of `TOKENS` rows at x.

    The rows are `row` bytes apart. The sums of the first vector come first.
    """
    result = types.UniTuple(Vec("i32", 8, TOKENS), 2)
    lines = [*_clear(SUMS), ".p2align 5", "1:"]
    lines += _step("vpmaddwd", "vpaddd", 0, ["(%x)", "(%x,%row)", "(%x,%row,2)", "(%x,%rows)"], fresh=False)
    lines += [f"addq ${STEP}, %w", "addq $4, %x", "decq %left", "jnz 1b"]

    def codegen(context, b, sig, args):
        w, x, row, steps = args
        read = {"row": row, "rows": b.mul(row, ir.Constant(I64, TOKENS - 1))}
        found = _assemble(b, lines, (*SUMS, "u", "v", "word", "p", "q"), {"w": w, "x": x, "left": steps}, read)
        blocks = [gather(b, [found[name] for name in SUMS[first::2]]) for first in range(2)]
        return context.make_tuple(b, result, blocks)

    return result(w, x, row, steps), codegen


def _add_plane(plane: str, at: int, weights: tuple[str, str], fresh: bool) -> list[str]:
    """Add the products of two vectors of nibbles with a word of a plane to the plane's sums, or write them there."""
    sums, lines = (f"%{plane}0", f"%{plane}1"), [f"vpbroadcastd {at}(%{plane}), %word"]
    if fresh:
        return lines + [f"vpmaddubsw %word, %{w}, {s}" for w, s in zip(weights, sums)]
    lines += [f"vpmaddubsw %word, %{w}, %{p}" for w, p in zip(weights, "pq")]
    return lines + [f"vpaddw %{p}, {s}, {s}" for p, s in zip("pq", sums)]


def _join_planes(totals: tuple[str, ...]) -> list[str]:
    """Add the sums of the planes to the totals, the upper ones times 256."""
    lines = _ones("word")
    for i, total in enumerate(totals):
        for sums in (f"%lower{i}", f"%upper{i}"):
            lines.append(f"vpmaddwd %word, {sums}, {sums}")
            if "upper" in sums:
                lines.append(f"vpslld $8, {sums}, {sums}")
            lines.append(f"vpaddd {sums}, %{total}, %{total}")
    return lines


def _load_step(bits: int, step: int, half: int) -> list[str]:
    """Load one of four steps of int4, or of int3 (see `steps_of_int3`); prefetch each line once."""
    at = 128 * step + STEP * half
    lines = [f"prefetcht1 {at}(%w,%ahead)"] if step < bits else []
    if bits == 4:
        return [*lines, f"vmovdqu {at}(%w), %u", f"vmovdqu {at + 32}(%w), %v"]
    at, third = 128 * (step // 2) + STEP * half, 256 + STEP * half
    lines += [f"vmovdqu {at}(%w), %u", f"vmovdqu {at + 32}(%w), %v"]
    if step % 2:
        return [*lines, "vpsrlw $1, %u, %u", "vpsrlw $1, %v, %v"]
    shift = "vpsrlw" if step else "vpsllw"
    lines += [f"vmovdqu {third}(%w), %m", f"vmovdqu {third + 32}(%w), %n", f"{shift} $1, %m, %m", f"{shift} $1, %n, %n"]
    return [*lines, "vpxor %m, %u, %u", "vpxor %n, %v, %v"]


def make_plane_sums(bits: int):
    """Create ``f(w, upper, lower, ahead)``: the i32 sums of a block of 32 rows and 128 columns of packed int3 or int4
    times two planes of 128 bytes.

    It takes four steps of 16 rows at a time: so many of low and of high nibbles fit the i16 sums. Every line of weights
    is prefetched `ahead` bytes before it is read.
    """
    result = Vec("i32", 32)
    lines = ["vpcmpeqb %mask, %mask, %mask", f"vpsrlw ${16 - bits}, %mask, %mask", "vpackuswb %mask, %mask, %mask"]
    lines += [*_clear(TOTALS), "movq $4, %left", "1:"]
    for half in range(2):
        for step in range(4):
            lines += [*_load_step(bits, step, half), "vpand %mask, %u, %m", "vpand %mask, %v, %n"]
            for plane in ("upper", "lower"):
                lines += _add_plane(plane, 4 * step, ("m", "n"), fresh=step == 0)
            lines += ["vpsrlw $4, %u, %u", "vpsrlw $4, %v, %v", "vpand %mask, %u, %u", "vpand %mask, %v, %v"]
            for plane in ("upper", "lower"):
                lines += _add_plane(plane, 4 * step + 64, ("u", "v"), fresh=False)
        lines += _join_planes(TOTALS[2 * half : 2 * half + 2])
    lines += [f"addq ${128 * bits}, %w", "addq $16, %upper", "addq $16, %lower", "decq %left", "jnz 1b"]

    def codegen(context, b, sig, args):
        w, upper, lower, ahead = args
        vectors = (*TOTALS, "u", "v", "m", "n", "word", "p", "q", "mask", "upper0", "upper1", "lower0", "lower1")
        changed = {"w": w, "upper": upper, "lower": lower, "left": ir.Constant(I64, 0)}
        found = _assemble(b, lines, vectors, changed, {"ahead": ahead})
        return join(b, [found[name] for name in TOTALS])

    @intrinsic
    def plane_sums(typing, w, upper, lower, ahead):
        return result(w, upper, lower, ahead), codegen

    return plane_sums
