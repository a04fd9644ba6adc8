"""The registers of the threads that advance together, and how an opcode's meaning is attached to it.

A register is one numpy array over all threads ("lanes") of a group of blocks, unsigned of its declared width, or bool
for a predicate. Which lanes hold an undefined value is tracked through every instruction: copying such a value about is
allowed, as compilers do where it will not be used; storing it, branching on it, or taking it for an address is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ptx.errors import PtxError
from ptx.parse import Address, Immediate, Instruction, Operand, Program, Register, Special

if TYPE_CHECKING:
    from ptx.meeting import Meeting
    from ptx.memory import DeviceMemory
    from ptx.shared import SharedMemory
    from ptx.tensor import Products

Mask = np.ndarray | None
"""Lanes that take part: bool, or None for all of them."""

Executor = Callable[["Group", Mask], None]
"""What an instruction does, made once when a kernel is loaded."""

Observer = Callable[[str, np.ndarray, int, np.ndarray | slice], None]

Reader = Callable[["Group"], np.ndarray]

WARP = 32
LOW, HIGH, WHOLE = 1, 2, 3
"""Halves of a register, in `Group.undefined`."""
UNSIGNED = {1: np.dtype(bool), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}


class Group:
    """Blocks that advance together.

    Attributes
    ----------
    lanes : int
        Threads of all blocks; block i has those from ``i * threads`` on.
    thread, block : np.ndarray
        Of every lane: its thread in the block, and its block in this group.
    grid_block : np.ndarray
        Of every block: its index in the grid.
    registers : list of np.ndarray
    undefined : dict of int to np.ndarray
        Register -> what of its value means nothing, uint8: 1 for the lower half, 2 for the upper one. Others are
        defined everywhere. (Compilers put a value beside an undefined one where they compute on pairs.)
    epoch : np.ndarray
        Barriers every block has passed.
    meeting : Meeting or None
        Of the blocks of the launch, for kernels that have atomic operations.
    observer : callable or None
        Told of every access to memory: its kind, the addresses, bytes of each, and the lanes.
    products : Products or None
        Asynchronous products, for kernels that have them.
    """

    def __init__(
        self,
        program: Program,
        arguments: bytes,
        offsets: dict[str, int],
        blocks: np.ndarray,
        grid: tuple[int, int, int],
        memory: DeviceMemory,
        meeting: Meeting | None,
    ):
        self.program, self.arguments, self.offsets = program, arguments, offsets
        self.memory, self.meeting = memory, meeting
        self.shared: SharedMemory
        self.products: Products | None = None
        self.observer: Observer | None = None
        self.threads, self.lanes = program.threads, program.threads * len(blocks)
        self.thread = np.tile(np.arange(self.threads, dtype=np.uint32), len(blocks))
        self.block = np.repeat(np.arange(len(blocks)), self.threads)
        self.grid_block = blocks
        self.epoch = np.zeros(len(blocks), np.int32)
        zeros = {width: np.zeros(self.lanes, dtype) for width, dtype in UNSIGNED.items()}
        everywhere = np.full(self.lanes, WHOLE, np.uint8)
        self.registers = [zeros[width] for width in program.widths]
        self.undefined = dict.fromkeys(range(len(self.registers)), everywhere)
        place = np.unravel_index(blocks, grid[::-1])[::-1]
        self.special = {"%tid.x": self.thread, "%tid.y": zeros[32], "%tid.z": zeros[32]}
        for axis, at, size in zip("xyz", place, grid):
            self.special[f"%ctaid.{axis}"] = at.astype(np.uint32)[self.block]
            self.special[f"%nctaid.{axis}"] = np.full(self.lanes, size, np.uint32)

    def write(self, register: Register, value: np.ndarray, mask: Mask) -> None:
        """Give a register its value where `mask` says so; the lanes' definedness is the caller's business."""
        kind = UNSIGNED[register.width]
        if value.dtype != kind:
            value = value.view(kind)
        value = spread(value, self.lanes)
        slot = register.slot
        if mask is None:
            self.registers[slot] = value
            self.undefined.pop(slot, None)
            return
        self.registers[slot] = np.where(mask, value, self.registers[slot])
        undefined = self.undefined.get(slot)
        if undefined is not None:
            self.set_undefined(slot, np.where(mask, 0, undefined))

    def set_undefined(self, slot: int, lanes: np.ndarray) -> None:
        """Note where a register means nothing: bool, or halves as in `undefined`."""
        if np.count_nonzero(lanes):
            self.undefined[slot] = lanes * np.uint8(WHOLE) if lanes.dtype == bool else lanes.astype(np.uint8)
        else:
            self.undefined.pop(slot, None)

    def any_undefined(self, sources: Sequence[int], mask: Mask) -> np.ndarray | None:
        """Lanes where one of the registers means nothing, among those of `mask`; None for nowhere."""
        found = None
        for slot in sources:
            lanes = self.undefined.get(slot)
            if lanes is not None:
                found = lanes != 0 if found is None else found | (lanes != 0)
        if found is not None and mask is not None:
            found = found & mask
        return found if found is not None and np.count_nonzero(found) else None

    def observe(self, kind: str, addresses: np.ndarray, nbytes: int, lanes: np.ndarray | slice) -> None:
        """Tell the observer, if there is one, of an access."""
        if self.observer is not None:
            self.observer(kind, addresses, nbytes, lanes)

    def who(self, lanes: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Block in the grid, thread, and epoch of lanes."""
        block = self.block[lanes]
        return self.grid_block[block], self.thread[lanes], self.epoch[block]

    def selected(self, mask: Mask) -> np.ndarray | slice:
        """An index of the lanes that take part."""
        return slice(None) if mask is None else np.flatnonzero(mask)


def reader(operand: Operand, dtype: np.dtype | str) -> Reader:
    """A function that gives an operand's value in every lane (or one for all), as `dtype`.

    Raises
    ------
    PtxError
        The register has another width than `dtype`.
    """
    dtype = np.dtype(dtype)
    if isinstance(operand, Register):
        slot = operand.slot
        if operand.width != (1 if dtype.kind == "b" else dtype.itemsize * 8):
            raise PtxError(f"a register of {operand.width} bits is read as {dtype}")
        if dtype == UNSIGNED[operand.width]:
            return lambda group: group.registers[slot]
        return lambda group: group.registers[slot].view(dtype)
    if isinstance(operand, Special):
        name = operand.name
        if not re.fullmatch(r"%(tid|ctaid|nctaid)\.[xyz]", name) or dtype.itemsize != 4:
            raise PtxError(f"{name} is not known")
        return lambda group: group.special[name].view(dtype)
    if isinstance(operand, Immediate):
        constant = _constant(operand, dtype)
        return lambda group: constant
    raise PtxError(f"{operand} is no value")


def _constant(operand: Immediate, dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "b":
        return np.array(operand.value != 0)
    if operand.bits is not None and operand.bits != 8 * dtype.itemsize:
        raise PtxError(f"a float of {operand.bits} bits is read as {dtype}")
    bits = 8 * dtype.itemsize
    return np.array([operand.value & ((1 << bits) - 1)], UNSIGNED[bits]).view(dtype)[0, ...]


def spread(value: np.ndarray, lanes: int) -> np.ndarray:
    """A value in every lane."""
    return value if value.ndim else np.broadcast_to(value, lanes)


def address_reader(operand: Operand, width: int) -> Callable[[Group], np.ndarray]:
    """A function that gives the address ``[base + offset]`` in every lane, int64."""
    assert isinstance(operand, Address) and not isinstance(operand.base, str)
    base, offset = reader(operand.base, UNSIGNED[width]), operand.offset

    def read(group: Group) -> np.ndarray:
        return spread(base(group).astype(np.int64) + offset, group.lanes)

    return read


# what an opcode does ------------------------------------------------------------------------------------------------

Maker = Callable[[Instruction, re.Match], Executor]
_MAKERS: dict[str, list[tuple[re.Pattern, Maker]]] = {}


def opcode(pattern: str) -> Callable[[Maker], Maker]:
    """Register a function that makes executors for all opcodes a regular expression matches as a whole."""

    def register(make: Maker) -> Maker:
        for first in re.match(r"\(?([\w|]+)\)?", pattern)[1].split("|"):
            _MAKERS.setdefault(first, []).append((re.compile(pattern), make))
        return make

    return register


def executor(instruction: Instruction) -> Executor:
    """What an instruction does.

    Raises
    ------
    PtxError
        Its opcode is not known.
    """
    for pattern, make in _MAKERS.get(instruction.opcode.partition(".")[0], []):
        match = pattern.fullmatch(instruction.opcode)
        if match:
            try:
                return make(instruction, match)
            except PtxError as error:
                raise PtxError(f"{instruction.location}: {error}") from None
    raise PtxError(f"{instruction.location}: unknown opcode")


def registers_in(operands: Sequence[Operand]) -> tuple[int, ...]:
    """The registers among operands, in vectors and addresses, too."""
    found = []
    for operand in operands:
        if isinstance(operand, tuple):
            found += registers_in([part for part in operand if part is not None])
        elif isinstance(operand, Address):
            found += registers_in([operand.base])
        elif isinstance(operand, Register):
            found.append(operand.slot)
    return tuple(found)


def elementwise(
    target: Operand,
    sources: Sequence[Operand],
    compute: Callable[[Group], np.ndarray],
    halves: Callable[..., np.ndarray] | None = None,
) -> Executor:
    """An executor for what every lane does for itself: undefined operands make an undefined result.

    `halves` tells which halves of it, from those of every operand; without it, all of it.
    """
    if not isinstance(target, Register):
        raise PtxError(f"{target} is no register")
    slots = registers_in(sources)
    each = [getattr(source, "slot", None) for source in sources]

    def run(group: Group, mask: Mask) -> None:
        undefined = None
        if not group.undefined.keys().isdisjoint(slots):
            if halves is None:
                undefined = group.any_undefined(slots, mask)
            else:
                nothing = np.zeros(group.lanes, np.uint8)
                undefined = halves(*(group.undefined.get(slot, nothing) for slot in each)).astype(np.uint8)
                undefined = undefined if mask is None else np.where(mask, undefined, 0)
        group.write(target, compute(group), mask)
        if undefined is not None:
            add_undefined(group, target.slot, undefined)

    return run


def add_undefined(group: Group, slot: int, lanes: np.ndarray) -> None:
    """Note where a register means nothing, besides where it already did."""
    lanes = lanes * np.uint8(WHOLE) if lanes.dtype == bool else lanes
    before = group.undefined.get(slot)
    group.set_undefined(slot, lanes if before is None else before | lanes)


def strict(sources: Sequence[Operand], run: Executor) -> Executor:
    """`run`, which must not meet undefined operands."""
    slots = registers_in(sources)

    def checked(group: Group, mask: Mask) -> None:
        if not group.undefined.keys().isdisjoint(slots) and group.any_undefined(slots, mask) is not None:
            raise PtxError("an uninitialized register is used")
        run(group, mask)

    return checked
