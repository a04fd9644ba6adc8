"""Matrix opcodes: fragments spread over the threads of a warp, or of four (PTX ISA 8.7, chapters 9.7.14 and 9.7.15)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from ptx.errors import PtxError
from ptx.group import WARP, WHOLE, Executor, Group, Mask, address_reader, opcode, reader, registers_in, spread, strict
from ptx.movement import whole_warps
from ptx.parse import Immediate, Instruction, Operand, Register

_WARPGROUP = 4 * WARP


def _warps(group: Group, mask: Mask) -> np.ndarray:
    """The warps that take part."""
    whole_warps(group, mask)
    count = group.lanes // WARP
    return np.arange(count) if mask is None else np.flatnonzero(mask.reshape(-1, WARP)[:, 0])


def _parts(operand: Operand) -> tuple[Register, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _scatter(group: Group, warps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values ``[warps, 32]`` of those that take part, spread over all lanes."""
    if len(warps) * WARP == group.lanes:
        return values.reshape(-1)
    result = np.zeros((group.lanes // WARP, WARP), values.dtype)
    result[warps] = values
    return result.reshape(-1)


# 8 x 8 matrices in shared memory ------------------------------------------------------------------------------------


def _matrix_lanes(warps: np.ndarray, count: int) -> np.ndarray:
    """The lanes that hold the addresses of the rows of `count` matrices."""
    return (warps[:, None] * WARP + np.arange(8 * count)).reshape(-1)


@opcode(r"(ldmatrix)\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16")
def _load_matrix(instruction: Instruction, match: re.Match) -> Executor:
    count, transposed = int(match[2]), bool(match[3])
    targets, place = _parts(instruction.operands[0]), address_reader(instruction.operands[1], 32)

    def run(group: Group, mask: Mask) -> None:
        warps = _warps(group, mask)
        lanes = _matrix_lanes(warps, count)
        addresses = place(group)[lanes]
        group.observe("ldmatrix", addresses, 16, lanes)
        rows = group.shared.read(group.shared.places(addresses, lanes, 16), lanes, 16, group.epoch)
        matrices = rows.view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(len(warps), count, WARP)
        for i, target in enumerate(targets):
            group.write(target, _scatter(group, warps, words[:, i]), mask)

    return strict([instruction.operands[1]], run)


@opcode(r"(stmatrix)\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16")
def _store_matrix(instruction: Instruction, match: re.Match) -> Executor:
    count, transposed = int(match[2]), bool(match[3])
    sources, place = _parts(instruction.operands[1]), address_reader(instruction.operands[0], 32)
    reads = [reader(source, "u4") for source in sources]

    def run(group: Group, mask: Mask) -> None:
        warps = _warps(group, mask)
        lanes = _matrix_lanes(warps, count)
        addresses = place(group)[lanes]
        group.observe("stmatrix", addresses, 16, lanes)
        words = np.stack([read(group).reshape(-1, WARP)[warps] for read in reads], 1)
        matrices = np.ascontiguousarray(words).view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        rows = np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, 16)
        group.shared.write(group.shared.places(addresses, lanes, 16), lanes, rows, group.epoch)

    return strict(instruction.operands, run)


def _multiplied(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float32 ``left @ right.T`` of halves, rounded once: a value does not depend on its place in the matrix."""
    return np.matmul(left.astype(np.float64), right.astype(np.float64).swapaxes(-1, -2)).astype(np.float32)


# products of a warp -------------------------------------------------------------------------------------------------


def _halves(group: Group, registers: Sequence[Register], warps: np.ndarray) -> list[np.ndarray]:
    """Each register's fragment as float32 ``[warps, 8, 8]``: row ``lane // 4``, columns from ``2 (lane % 4)`` on."""
    found = []
    for register in registers:
        words = np.ascontiguousarray(group.registers[register.slot])
        if len(warps) * WARP != group.lanes:
            words = words.reshape(-1, WARP)[warps]
        found.append(words.view(np.float16).reshape(-1, 8, 8).astype(np.float32))
    return found


def _left(fragments: Sequence[np.ndarray]) -> np.ndarray:
    """A ``[warps, 16, k]`` of two or four fragments: rows, then columns."""
    columns = [np.concatenate(fragments[i : i + 2], 1) for i in range(0, len(fragments), 2)]
    return np.concatenate(columns, 2)


@opcode(r"(mma)\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.f16\.f16\.f32")
def _product(instruction: Instruction, match: re.Match) -> Executor:
    out, a, b, c = instruction.operands
    if (len(out), len(a), len(b), len(c)) != (4, int(match[2]) // 4, int(match[2]) // 8, 4):
        raise PtxError("a product of other fragments")
    sums = [reader(part, "f4") for part in c]

    def run(group: Group, mask: Mask) -> None:
        warps = _warps(group, mask)
        left, right = _left(_halves(group, a, warps)), np.concatenate(_halves(group, b, warps), 2)
        product = _multiplied(left, right).reshape(len(warps), 2, 8, 4, 2)
        results = []
        for i, read in enumerate(sums):
            before = spread(read(group), group.lanes).reshape(-1, WARP)[warps]
            results.append(before + product[:, i // 2, :, :, i % 2].reshape(-1, WARP))
        for target, result in zip(out, results):
            group.write(target, _scatter(group, warps, result), mask)

    return strict([a, b, c], run)


# products of four warps, which go on while the program does (sm_90) -------------------------------------------------


@dataclasses.dataclass
class _Running:
    """A product of one warpgroup that was not waited for yet; `batch` counts the commits before it."""

    batch: int
    sums: tuple[Register, ...]
    granules: list[np.ndarray]


class Products:
    """The asynchronous products of a group."""

    def __init__(self, group: Group):
        count = group.lanes // _WARPGROUP
        self.running: list[list[_Running]] = [[] for _ in range(count)]
        self._commits = [0] * count
        self.written_since_fence: set[int] = set()

    def commit(self, warpgroups: np.ndarray) -> None:
        for warpgroup in warpgroups:
            self._commits[warpgroup] += 1

    def wait(self, group: Group, warpgroups: np.ndarray, most: int) -> None:
        """Let end all but the latest `most` batches: their sums are defined then, and their operands free."""
        for warpgroup in warpgroups:
            first = self._commits[warpgroup] - most
            done = [product for product in self.running[warpgroup] if product.batch < first]
            left = [product for product in self.running[warpgroup] if product.batch >= first]
            self.running[warpgroup] = left
            still = {register.slot for product in left for register in product.sums}
            lanes = slice(warpgroup * _WARPGROUP, (warpgroup + 1) * _WARPGROUP)
            for product in done:
                for granules in product.granules:
                    group.shared.release(granules, int(group.epoch[group.block[lanes.start]]))
                for slot in {register.slot for register in product.sums} - still:
                    if slot in group.undefined:
                        undefined = group.undefined[slot].copy()
                        undefined[lanes] = 0
                        group.set_undefined(slot, undefined)

    def begin(self, group: Group, warpgroup: int, sums: tuple[Register, ...], granules: list[np.ndarray]) -> None:
        """The sums mean nothing until the product was waited for."""
        self.running[warpgroup].append(_Running(self._commits[warpgroup], sums, granules))
        for register in sums:
            undefined = group.undefined.get(register.slot)
            undefined = np.zeros(group.lanes, np.uint8) if undefined is None else undefined.copy()
            undefined[warpgroup * _WARPGROUP : (warpgroup + 1) * _WARPGROUP] = WHOLE
            group.undefined[register.slot] = undefined


def _warpgroups(group: Group, mask: Mask) -> np.ndarray:
    if mask is None:
        return np.arange(group.lanes // _WARPGROUP)
    rows = mask.reshape(-1, _WARPGROUP)
    if (rows.any(1) != rows.all(1)).any():
        raise PtxError("some threads of a warpgroup are missing")
    return np.flatnonzero(rows[:, 0])


_SWIZZLES = {1: 128, 2: 64, 3: 32}


def _operand(
    group: Group, descriptor: int, rows: int, transposed: bool, warpgroup: int
) -> tuple[np.ndarray, np.ndarray]:
    """float32 ``[rows, 16]`` in shared memory as a descriptor says, and the granules read.

    Rows of 16 bytes lie side by side in lines of the swizzle's width; 16-byte columns are exchanged by the line's
    number. Eight lines are `stride` apart from the next eight. Transposed, a line holds values of one k.
    """
    start, leading, stride, swizzle = (
        (descriptor & 0x3FFF) << 4,
        (descriptor >> 16 & 0x3FFF) << 4,
        (descriptor >> 32 & 0x3FFF) << 4,
        descriptor >> 62,
    )
    if swizzle not in _SWIZZLES or descriptor >> 49 & 7:
        raise PtxError(f"matrix descriptor {descriptor:#x} is not known")
    line = _SWIZZLES[swizzle]
    if transposed:
        k, column = np.meshgrid(np.arange(16), np.arange(0, 2 * rows, 16), indexing="ij")
        address = start + column // line * leading + column % line + k // 8 * stride + k % 8 * line
    else:
        row, column = np.meshgrid(np.arange(rows), np.array([0, 16]), indexing="ij")
        address = start + row // 8 * stride + row % 8 * line + column
    address ^= (address >> 3) & (line - 16)
    first = warpgroup * _WARPGROUP
    places = group.shared.places(address.reshape(-1), np.full(address.size, first), 16)
    values, granules = group.shared.read_async(places, group.epoch, int(group.block[first]))
    matrix = values.view(np.float16).reshape(address.shape[0], -1).astype(np.float32)
    return (matrix.T if transposed else matrix), granules


@opcode(r"(wgmma)\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.f16\.f16")
def _wide_product(instruction: Instruction, match: re.Match) -> Executor:
    columns = int(match[2])
    out, a, b, scale, *flags = instruction.operands
    constants = [flag.value for flag in flags if isinstance(flag, Immediate)]
    in_registers = isinstance(a, tuple)
    if constants[:2] != [1, 1] or len(constants) != (3 if in_registers else 4) or len(out) != columns // 2:
        raise PtxError("a product of this form is not known")
    transposed_a, transposed_b = (0 if in_registers else constants[2]), constants[-1]
    keep, right = reader(scale, bool), reader(b, "u8")
    left = None if in_registers else reader(a, "u8")
    sources = registers_in([*(a if in_registers else [a]), b, scale])
    sum_slots = {register.slot for register in out}

    def run(group: Group, mask: Mask) -> None:
        products = group.products
        if products.written_since_fence & (sum_slots | set(registers_in([a] if in_registers else []))):
            raise PtxError("registers of a product were written after the last wgmma.fence")
        for warpgroup in _warpgroups(group, mask):
            lanes = slice(warpgroup * _WARPGROUP, (warpgroup + 1) * _WARPGROUP)
            y, granules = _operand(group, _uniform(right(group), lanes), columns, bool(transposed_b), warpgroup)
            used = [granules]
            if in_registers:
                warps = np.arange(4 * warpgroup, 4 * warpgroup + 4)
                x = _left(_halves(group, a, warps)).reshape(64, 16)
            else:
                x, granules = _operand(group, _uniform(left(group), lanes), 64, bool(transposed_a), warpgroup)
                used.append(granules)
            # [warp, half of its 16 rows, 8 rows, 8 columns each, 4 threads of a row, 2 columns of a thread]
            fragments = _multiplied(x, y).reshape(4, 2, 8, columns // 8, 4, 2)
            _add(group, out, fragments, bool(_uniform(keep(group), lanes)), lanes)
            products.begin(group, warpgroup, out, used)

    def checked(group: Group, mask: Mask) -> None:
        running = {r.slot for w in _warpgroups(group, mask) for p in group.products.running[w] for r in p.sums}
        needed = sum_slots - running if keep(group).any() else set()
        if group.any_undefined([*sources, *needed], mask) is not None:
            raise PtxError("an uninitialized register is used")
        run(group, mask)

    return checked


def _uniform(values: np.ndarray, lanes: slice) -> int:
    """A value that is the same in all threads of a warpgroup."""
    part = values[lanes] if values.ndim else values
    if part.size > 1 and (part != part[0]).any():
        raise PtxError("threads of a warpgroup disagree")
    return int(part.reshape(-1)[0])


def _add(group: Group, out: Sequence[Register], fragments: np.ndarray, keep: bool, lanes: slice) -> None:
    for i, register in enumerate(out):
        part = fragments[:, i // 2 % 2, :, i // 4, :, i % 2].reshape(-1)
        values = group.registers[register.slot].view(np.float32).copy()
        values[lanes] = values[lanes] + part if keep else part
        group.registers[register.slot] = values.view(np.uint32)


@opcode(r"(wgmma)\.fence\.sync\.aligned")
def _wide_fence(instruction: Instruction, match: re.Match) -> Executor:
    return lambda group, mask: group.products.written_since_fence.clear()


@opcode(r"(wgmma)\.commit_group\.sync\.aligned")
def _wide_commit(instruction: Instruction, match: re.Match) -> Executor:
    return lambda group, mask: group.products.commit(_warpgroups(group, mask))


@opcode(r"(wgmma)\.wait_group\.sync\.aligned")
def _wide_wait(instruction: Instruction, match: re.Match) -> Executor:
    most = instruction.operands[0].value
    return lambda group, mask: group.products.wait(group, _warpgroups(group, mask), most)


@opcode(r"(fence)\.proxy\.async\.shared::cta")
def _fence(instruction: Instruction, match: re.Match) -> Executor:
    return lambda group, mask: group.shared.fence(np.unique(group.block[group.selected(mask)]))
