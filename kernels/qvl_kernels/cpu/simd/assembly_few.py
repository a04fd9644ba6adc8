"""Products of a few vectors in assembler, for AVX2 without VNNI (`WORDS`): of planes of bytes, and of words."""

from __future__ import annotations

import itertools

from llvmlite import ir
from numba.core import types
from numba.core.typing import signature
from numba.extending import intrinsic

from qvl_kernels.cpu.simd.assembly import STEP, SUMS, add_loaded_step, add_step, assemble, clear, set_ones
from qvl_kernels.cpu.simd.emit import I64, join
from qvl_kernels.cpu.simd.vector import Vec

TOTALS = ("t0", "t1", "t2", "t3")


def _load_step(bits: int, step: int, half: int) -> list[str]:
    """Load a step of int8 or int4, or one of four steps of int3 (see `steps_of_int3`); prefetch each line once."""
    at = 128 * step + STEP * half
    lines = [f"prefetcht1 {at}(%w,%ahead)"] if step < bits else []
    if bits > 3:
        return [*lines, f"vmovdqu {at}(%w), %u", f"vmovdqu {at + 32}(%w), %v"]
    at, third = 128 * (step // 2) + STEP * half, 256 + STEP * half
    lines += [f"vmovdqu {at}(%w), %u", f"vmovdqu {at + 32}(%w), %v"]
    if step % 2:
        return [*lines, "vpsrlw $1, %u, %u", "vpsrlw $1, %v, %v"]
    shift = "vpsrlw" if step else "vpsllw"
    lines += [f"vmovdqu {third}(%w), %m", f"vmovdqu {third + 32}(%w), %n", f"{shift} $1, %m, %m", f"{shift} $1, %n, %n"]
    return [*lines, "vpxor %m, %u, %u", "vpxor %n, %v, %v"]


def _add_planes(at: int, weights: str, fresh: bool) -> list[str]:
    """Add the products of two registers of nibbles with a word of each plane to the planes' sums, or write them."""
    lines = []
    for plane in ("upper", "lower"):
        lines += add_step("vpmaddubsw", "vpaddw", weights, [f"{at}(%{plane})"], (f"{plane}0", f"{plane}1"), fresh)
    return lines


def _join_planes(totals: tuple[str, ...]) -> list[str]:
    """Add the sums of the planes to the totals, the upper ones times 256."""
    lines = set_ones("word")
    for i, total in enumerate(totals):
        for sums in (f"%lower{i}", f"%upper{i}"):
            lines.append(f"vpmaddwd %word, {sums}, {sums}")
            if "upper" in sums:
                lines.append(f"vpslld $8, {sums}, {sums}")
            lines.append(f"vpaddd {sums}, %{total}, %{total}")
    return lines


def make_plane_sums(bits: int):
    """Create ``f(w, upper, lower, ahead)``: the i32 sums of a block of 32 rows and 128 columns of packed int3 or int4
    times two planes of 128 bytes.

    It takes four steps of 16 rows at a time: so many of low and of high nibbles fit the i16 sums. Every line of weights
    is prefetched `ahead` bytes before it is read.
    """
    result = Vec("i32", 32)
    lines = ["vpcmpeqb %mask, %mask, %mask", f"vpsrlw ${16 - bits}, %mask, %mask", "vpackuswb %mask, %mask, %mask"]
    lines += [*clear(TOTALS), "movq $4, %left", "1:"]
    for half in range(2):
        for step in range(4):
            lines += [*_load_step(bits, step, half), "vpand %mask, %u, %m", "vpand %mask, %v, %n"]
            lines += _add_planes(4 * step, "mn", fresh=step == 0)
            lines += ["vpsrlw $4, %u, %u", "vpsrlw $4, %v, %v", "vpand %mask, %u, %u", "vpand %mask, %v, %v"]
            lines += _add_planes(4 * step + 64, "uv", fresh=False)
        lines += _join_planes(TOTALS[2 * half : 2 * half + 2])
    lines += [f"addq ${128 * bits}, %w", "addq $16, %upper", "addq $16, %lower", "decq %left", "jnz 1b"]

    def codegen(context, b, sig, args):
        w, upper, lower, ahead = args
        vectors = (*TOTALS, "u", "v", "m", "n", "word", "p", "q", "mask", "upper0", "upper1", "lower0", "lower1")
        changed = {"w": w, "upper": upper, "lower": lower, "left": ir.Constant(I64, 0)}
        found = assemble(b, lines, vectors, changed, {"ahead": ahead})
        return join(b, [found[name] for name in TOTALS])

    @intrinsic
    def plane_sums(typing, w, upper, lower, ahead):
        return result(w, upper, lower, ahead), codegen

    return plane_sums


def _row_words(at: int, rows: int) -> list[str]:
    """The addresses of the words of a step of up to four rows, `row` bytes apart."""
    return [f"{at}(%x{index})" for index in ("", ",%row", ",%row,2", ",%rows")[:rows]]


def _add_scaled(rows: int, parts: int) -> list[str]:
    """Add the scaled sums of a tile to y, as `gemv_blocks.make_scaled`: ``scale * x_scale * (total - zero * sum)``."""
    lines = []
    for row in range(rows):
        for part in range(parts):
            first, at, to = 2 * (rows * part + row), 128 * part, 128 * row + 64 * part
            tile = list(zip(SUMS[first : first + 2], "pq", (to, to + 32)))
            lines.append("vpbroadcastd (%sums), %word")
            lines += [f"vpmulld {at + 64}(%factors), %word, %p", f"vpmulld {at + 96}(%factors), %word, %q"]
            lines += [f"vpsubd %{product}, %{total}, %{total}" for total, product, _ in tile]
            lines.append("vbroadcastss (%xs), %word")
            lines += [f"vmulps {at}(%factors), %word, %p", f"vmulps {at + 32}(%factors), %word, %q"]
            for total, factor, to in tile:
                lines += [f"vcvtdq2ps %{total}, %{total}", f"vfmadd213ps {to}(%y), %{factor}, %{total}"]
                lines.append(f"vmovups %{total}, {to}(%y)")
        lines += ["addq %xs_row, %xs", "addq %sums_row, %sums"]
    return lines


def _make_product(lines: list[str], vectors: tuple[str, ...], turns: int):
    """Create the product that `lines` do, in `turns` turns; see `make_add_words`."""

    def codegen(context, b, sig, args):
        w, x, row, xs, xs_row, sums, sums_row, factors, y, area, ahead = args
        changed = {"w": w, "x": x, "xs": xs, "sums": sums, "area": area, "left": ir.Constant(I64, turns)}
        read = {"row": row, "rows": b.mul(row, ir.Constant(I64, 3)), "xs_row": xs_row, "sums_row": sums_row}
        read |= {"factors": factors, "y": y, "ahead": ahead}
        assemble(b, lines, (*SUMS, "u", "v", "word", "p", "q", *vectors), changed, read)
        return context.get_dummy_value()

    @intrinsic
    def product(typing, w, x, row, xs, xs_row, sums, sums_row, factors, y, area, ahead):
        return signature(types.void, *[types.int64] * 11), codegen

    return product


def make_add_words(steps: int):
    """Create ``f(w, x, row, xs, xs_row, sums, sums_row, factors, y, area, ahead)``: products with unpacked weights.

    Two vectors of words at w times four rows at x, in so many steps, are added to y, float32, 128 bytes a row. The rows
    of x, of their scales xs and of their sums are `row`, `xs_row` and `sums_row` bytes apart. `factors`: the float32
    scales of the two vectors of weights, then their int32 zero points. The last two arguments are not used.
    """
    lines = [*clear(SUMS), ".p2align 6", "1:", *add_loaded_step("vpmaddwd", "vpaddd", 0, _row_words(0, 4), fresh=False)]
    lines += [f"addq ${STEP}, %w", "addq $4, %x", "decq %left", "jnz 1b", *_add_scaled(4, 1)]
    return _make_product(lines, (), steps)


def make_add_packed(bits: int, fields: dict[int, int], steps: int, rows: int):
    """Create the same function of packed weights, in so many steps (a multiple of four of int3).

    It is for 1 or 2 rows and four vectors of weights, with the factors of the last two behind those of the first; or
    for 3 or 4 rows and two vectors. Four rows leave the words in `area`. `fields`: which step of words each shift of a
    packed step yields. Every line of weights is prefetched `ahead` bytes before it is read.
    """
    unit, parts = 4 if bits == 3 else 1, 2 if rows <= 2 else 1
    lines = ["vpcmpeqw %mask, %mask, %mask", f"vpsrlw ${16 - bits}, %mask, %mask", *clear(SUMS[: 2 * rows * parts])]
    lines += [".p2align 6", "1:"]
    for step, part in itertools.product(range(unit), range(parts)):
        lines, shifted, sums = lines + _load_step(bits, step, part), 0, SUMS[2 * rows * part :]
        for shift, to in fields.items():
            at = to + 2 * step
            if shift > shifted:
                lines += [f"vpsrlw ${shift - shifted}, %{v}, %{v}" for v in "uv"]
                shifted = shift
            field = "uv" if shift + bits == 16 else "mn"  # nothing is above the last one
            if field == "mn":
                lines += ["vpand %mask, %u, %m", "vpand %mask, %v, %n"]
            if rows == 4:
                lines += [f"vmovdqu %{field[i]}, {STEP * at + 32 * i}(%area)" for i in range(2)]
            lines += add_step("vpmaddwd", "vpaddd", field, _row_words(4 * at, rows), sums, fresh=False)
    lines += [f"addq ${384 if bits == 3 else 128}, %w", f"addq ${8 * unit}, %x", f"addq ${2 * unit * STEP}, %area"]
    lines += ["decq %left", "jnz 1b", *_add_scaled(rows, parts)]
    return _make_product(lines, ("m", "n", "mask"), steps // unit)
