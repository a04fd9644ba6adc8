"""Inner loops of products of many rows in assembler, for AVX2 without VNNI (`WORDS`), and what others share.

LLVM regroups sums of integers, holds more values at once than the 16 registers do, and spills: its loops take up to a
fifth longer. Weights are read in the order of memory, with the activations' words spread from memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import alloca_once
from numba.extending import intrinsic

from qvl_kernels.cpu.simd.emit import F32, I32, I64
from qvl_kernels.cpu.tiles import TOKENS

VECTOR = ir.VectorType(I32, 8)
SUMS = tuple(f"{half}{row}" for row in range(TOKENS) for half in "ab")
"""Sums of a tile: of each row times two vectors of weights."""
STEP = 64
"""Bytes of two vectors of weights."""


def assemble(b, lines, vectors, changed, read):
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


def add_step(product: str, add: str, weights: str, words: list[str], sums: Sequence[str], fresh: bool) -> list[str]:
    """Add the products of two registers of weights and the rows' words to two sums a row, or write them (`fresh`)."""
    lines = []
    for row, word in enumerate(words):
        totals = sums[2 * row : 2 * row + 2]
        lines.append(f"vpbroadcastd {word}, %word")
        if fresh:
            lines += [f"{product} %word, %{w}, %{total}" for w, total in zip(weights, totals)]
        else:
            lines += [f"{product} %word, %{w}, %{p}" for w, p in zip(weights, "pq")]
            lines += [f"{add} %{p}, %{total}, %{total}" for p, total in zip("pq", totals)]
    return lines


def add_loaded_step(product: str, add: str, at: int, words: list[str], fresh: bool) -> list[str]:
    """As `add_step`, of weights in memory, to `SUMS`."""
    return [f"vmovdqu {at}(%w), %u", f"vmovdqu {at + 32}(%w), %v", *add_step(product, add, "uv", words, SUMS, fresh)]


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


def set_ones(register: str) -> list[str]:
    """Write 1 to all words of a register."""
    return [f"vpcmpeqw %{register}, %{register}, %{register}", f"vpsrlw $15, %{register}, %{register}"]


def clear(registers: Sequence[str]) -> list[str]:
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
        assemble(b, lines, (*SUMS, "u", "v", "word", "p", "q"), changed, read)
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
        lines += add_loaded_step("vpmaddubsw", "vpaddw", STEP * step, _adjacent(4 * TOKENS * step), fresh=step == 0)
    lines += [*set_ones("u"), *_scale("u"), f"addq ${8 * STEP}, %w", f"addq ${8 * 4 * TOKENS}, %x"]
    return types.UniTuple(p, 2)(p, q, w, x, scales, spans, steps), _span_loop(lines)


@intrinsic
def add_pair_spans(typing, p, q, w, x, scales, spans, steps):
    """As `add_nibble_spans`, of `steps` steps of two columns: words at w and x."""
    lines = [*clear(SUMS), "movq %steps, %left", ".p2align 5", "2:"]
    lines += add_loaded_step("vpmaddwd", "vpaddd", 0, _adjacent(0), fresh=False)
    lines += [f"addq ${STEP}, %w", f"addq ${4 * TOKENS}, %x", "decq %left", "jnz 2b", *_scale(None)]
    return types.UniTuple(p, 2)(p, q, w, x, scales, spans, steps), _span_loop(lines)
