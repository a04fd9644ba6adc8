"""Opcodes that move values: between registers, threads, and memory (PTX ISA 8.7, chapter 9.7.9)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ptx.arithmetic import type_of
from ptx.errors import PtxError
from ptx.group import (
    HIGH,
    LOW,
    UNSIGNED,
    WARP,
    WHOLE,
    Executor,
    Group,
    Mask,
    add_undefined,
    address_reader,
    elementwise,
    opcode,
    reader,
    spread,
    strict,
)
from ptx.parse import Immediate, Instruction, Operand, Register

# registers ----------------------------------------------------------------------------------------------------------


@opcode(r"(mov)\.([busf](?:16|32|64)|pred)")
def _move(instruction: Instruction, match: re.Match) -> Executor:
    target, source = instruction.operands
    dtype = type_of(match[2])
    if isinstance(source, tuple):
        return _pack(target, source)
    if isinstance(target, tuple):
        return _unpack(target, source)
    dtype = UNSIGNED[target.width]
    if match[2] != "pred" and dtype.itemsize != type_of(match[2]).itemsize:
        raise PtxError("the register has another width")
    read = reader(source, dtype)
    return elementwise(target, [source], read, lambda halves: halves)


def _pack(target: Register, parts: Sequence[Register]) -> Executor:
    width = target.width // len(parts)
    reads, dtype = [reader(part, UNSIGNED[width]) for part in parts], UNSIGNED[target.width]

    def compute(group: Group) -> np.ndarray:
        value = np.zeros(group.lanes, dtype)
        for i, read in enumerate(reads):
            value |= read(group).astype(dtype) << dtype.type(width * i)
        return value

    return elementwise(target, parts, compute, _packed if len(parts) == 2 else None)


def _packed(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return (low != 0) * np.uint8(LOW) | (high != 0) * np.uint8(HIGH)


def _unpack(targets: Sequence[Register | None], source: Register) -> Executor:
    width, wide = source.width // len(targets), UNSIGNED[source.width]
    read = reader(source, wide)

    def part(i: int) -> Executor:
        return elementwise(
            targets[i],
            [source],
            lambda group: (read(group) >> wide.type(width * i)).astype(UNSIGNED[width]),
            lambda halves: ((halves & (1 << i)) != 0) * np.uint8(WHOLE) if len(targets) == 2 else halves,
        )

    parts = [part(i) for i, target in enumerate(targets) if target is not None]

    def run(group: Group, mask: Mask) -> None:
        for execute in parts:
            execute(group, mask)

    return run


@opcode(r"(shfl)\.sync\.(bfly|idx|up|down)\.b32")
def _shuffle(instruction: Instruction, match: re.Match) -> Executor:
    target, source, by, clamp, members = instruction.operands
    if members != Immediate(-1):
        raise PtxError("a shuffle of some threads is not known")
    if clamp != Immediate(0 if match[2] == "up" else 31):
        raise PtxError("a shuffle within parts of a warp is not known")
    value, distance = reader(source, "u4"), reader(by, "u4")

    def run(group: Group, mask: Mask) -> None:
        whole_warps(group, mask)
        lane = np.arange(group.lanes)
        within, at = lane % WARP, spread(distance(group), group.lanes).astype(np.int64) % WARP
        chosen = {"bfly": within ^ at, "idx": at, "up": within - at, "down": within + at}[match[2]]
        origin = np.where((chosen >= 0) & (chosen < WARP), lane - within + chosen, lane)
        undefined = group.undefined.get(getattr(source, "slot", None))
        group.write(target, spread(value(group), group.lanes)[origin], mask)
        if undefined is not None:
            moved = undefined[origin]
            add_undefined(group, target.slot, moved if mask is None else np.where(mask, moved, 0))

    return strict([by], run)


@opcode(r"(redux)\.sync\.(min|max|add)\.([us]32)")
def _reduce(instruction: Instruction, match: re.Match) -> Executor:
    target, source, _ = instruction.operands
    value = reader(source, type_of(match[3]))
    combine = {"min": np.min, "max": np.max, "add": np.sum}[match[2]]

    def run(group: Group, mask: Mask) -> None:
        whole_warps(group, mask)
        rows = value(group).reshape(-1, WARP)
        group.write(target, np.repeat(combine(rows, axis=1).astype(rows.dtype), WARP), mask)

    return strict([source], run)


def whole_warps(group: Group, mask: Mask) -> None:
    """Instructions of a whole warp: all its threads take part, or none."""
    if mask is not None:
        rows = np.count_nonzero(mask.reshape(-1, WARP), axis=1)
        if np.count_nonzero(rows) != np.count_nonzero(rows == WARP):
            raise PtxError("some threads of a warp are missing")


# memory -------------------------------------------------------------------------------------------------------------


@opcode(r"(ld)\.param\.[busf](8|16|32|64)")
def _parameter(instruction: Instruction, match: re.Match) -> Executor:
    target, address = instruction.operands
    nbytes = int(match[2]) // 8
    kept = UNSIGNED[target.width]

    def run(group: Group, mask: Mask) -> None:
        at = group.offsets[address.base] + address.offset
        value = int.from_bytes(group.arguments[at : at + nbytes], "little")
        group.write(target, np.full(group.lanes, value, kept), mask)

    return run


_CACHING = r"(?:\.(?:ca|cg|cs|lu|cv|wb|wt))?(?:\.L1::[\w]+)?(?:\.L2::[\w:]+)?"
_VALUES = r"(?:\.v([248]))?\.([busf])(8|16|32|64)"


def _vector(operand: Operand, count: int) -> tuple[Register, ...]:
    parts = operand if isinstance(operand, tuple) else (operand,)
    if len(parts) != count:
        raise PtxError(f"{len(parts)} registers for {count} values")
    return parts


@opcode(rf"(ld)\.(global|shared){_CACHING}{_VALUES}")
def _load(instruction: Instruction, match: re.Match) -> Executor:
    _, space, count, kind, bits = match.groups()
    targets = _vector(instruction.operands[0], int(count or 1))
    nbytes = int(bits) // 8
    total, dtype = nbytes * len(targets), np.dtype(f"{'i' if kind == 's' else 'u'}{nbytes}")
    place = address_reader(instruction.operands[1], 64 if space == "global" else 32)

    def run(group: Group, mask: Mask) -> None:
        lanes = group.selected(mask)
        addresses = place(group)[lanes]
        group.observe(space, addresses, total, lanes)
        values = (
            load_global(group, addresses, lanes, total)
            if space == "global"
            else _load_shared(group, addresses, lanes, total)
        )
        columns = values.view(dtype)
        for i, target in enumerate(targets):
            kept = UNSIGNED[target.width]
            column = columns[:, i].astype(np.dtype(f"{dtype.kind}{kept.itemsize}"))
            if mask is not None:
                whole = np.zeros(group.lanes, column.dtype)
                whole[lanes] = column
                column = whole
            group.write(target, column, mask)

    return strict([instruction.operands[1]], run)


def load_global(group: Group, addresses: np.ndarray, lanes: np.ndarray | slice, nbytes: int) -> np.ndarray:
    """uint8 ``[n, nbytes]``, checked against what other blocks of the launch wrote."""
    if group.meeting is not None:
        group.meeting.read(addresses, nbytes, *group.who(lanes))
    return group.memory.read(addresses, nbytes)


def _load_shared(group: Group, addresses: np.ndarray, lanes: np.ndarray | slice, nbytes: int) -> np.ndarray:
    shared = group.shared
    return shared.read(shared.places(addresses, lanes, nbytes), lanes, nbytes, group.epoch)


@opcode(rf"(st)\.(global|shared){_CACHING}{_VALUES}")
def _store(instruction: Instruction, match: re.Match) -> Executor:
    _, space, count, _, bits = match.groups()
    sources = _vector(instruction.operands[1], int(count or 1))
    nbytes = int(bits) // 8
    reads = [reader(source, UNSIGNED[getattr(source, "width", 8 * nbytes)]) for source in sources]
    place = address_reader(instruction.operands[0], 64 if space == "global" else 32)

    def run(group: Group, mask: Mask) -> None:
        lanes = group.selected(mask)
        addresses = place(group)[lanes]
        group.observe(space, addresses, nbytes * len(sources), lanes)
        columns = [spread(read(group), group.lanes)[lanes].astype(f"u{nbytes}") for read in reads]
        values = np.stack(columns, 1).view(np.uint8)
        if space == "shared":
            shared = group.shared
            shared.write(shared.places(addresses, lanes, values.shape[1]), lanes, values, group.epoch)
            return
        if group.meeting is not None:
            group.meeting.write(addresses, values.shape[1], *group.who(lanes))
        group.memory.write(addresses, values)

    return strict(instruction.operands, run)


@opcode(r"(atom)\.global\.(?:gpu\.)?(acq_rel|relaxed|acquire|release)\.(?:gpu\.)?(add|exch|max|min)\.([us]32)")
def _atomic(instruction: Instruction, match: re.Match) -> Executor:
    _, order, action, kind = match.groups()
    target, where, operand = instruction.operands
    place, value, dtype = address_reader(where, 64), reader(operand, type_of(kind)), type_of(kind)
    combine = {"add": np.add, "exch": lambda old, new: new, "max": np.maximum, "min": np.minimum}[action]

    def run(group: Group, mask: Mask) -> None:
        lanes, before = np.arange(group.lanes)[group.selected(mask)], np.zeros(group.lanes, dtype)
        addresses, values = place(group), spread(value(group), group.lanes)
        for lane in lanes:
            address, block = addresses[lane : lane + 1], int(group.block[lane])
            if group.meeting is None:
                raise PtxError("an atomic in a kernel whose blocks do not meet")
            if order in ("acq_rel", "release"):
                group.meeting.release(int(address[0]), int(group.grid_block[block]), int(group.epoch[block]))
            old = group.memory.read(address, 4).view(dtype)[0]
            if order in ("acq_rel", "acquire"):
                group.meeting.acquire(int(address[0]), int(group.grid_block[block]))
            before[lane] = old[0]
            group.memory.write(address, np.array([combine(old[0], values[lane])], dtype).view(np.uint8)[None])
        group.write(target, before, mask)

    return strict([where, operand], run)


# asynchronous copies ------------------------------------------------------------------------------------------------


@opcode(r"(cp)\.async\.(?:ca|cg)\.shared\.global(?:\.L2::[\w]+)?")
def _copy(instruction: Instruction, match: re.Match) -> Executor:
    target, source, size, *given = instruction.operands
    nbytes = size.value
    to, origin = address_reader(target, 32), address_reader(source, 64)
    taken = reader(given[0] if given else size, "u4")

    def run(group: Group, mask: Mask) -> None:
        lanes = np.arange(group.lanes)[group.selected(mask)]
        count = spread(taken(group), group.lanes)[lanes]
        if np.count_nonzero((count != 0) & (count != nbytes)):
            raise PtxError("a copy of a part is not known")
        values, filled = np.zeros((len(lanes), nbytes), np.uint8), count > 0
        addresses = origin(group)[lanes][filled]
        if len(addresses):
            group.observe("global", addresses, nbytes, lanes[filled])
            values[filled] = load_global(group, addresses, lanes[filled], nbytes)
        places = to(group)[lanes]
        group.observe("shared", places, nbytes, lanes)
        group.shared.copy(group.shared.places(places, lanes, nbytes), lanes, values, group.epoch)

    return strict([target, source, *given], run)


@opcode(r"(cp)\.async\.commit_group")
def _commit(instruction: Instruction, match: re.Match) -> Executor:
    return lambda group, mask: group.shared.commit(group.selected(mask))


@opcode(r"(cp)\.async\.wait_(?:group|all)")
def _wait(instruction: Instruction, match: re.Match) -> Executor:
    most = instruction.operands[0].value if instruction.operands else 0
    return lambda group, mask: group.shared.wait(group.selected(mask), most, group.epoch)
