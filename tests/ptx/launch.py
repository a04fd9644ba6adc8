"""A kernel, and a launch of it: which threads advance, and when.

Blocks come in a random order, several at a time as one group. Where the blocks of a kernel meet through atomic
operations, several groups are under way and take turns at random instructions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

import ptx.arithmetic
import ptx.tensor  # noqa: F401  (both attach the meaning of their opcodes)
from ptx.errors import PtxError
from ptx.group import Executor, Group, executor, registers_in
from ptx.meeting import Meeting
from ptx.memory import DeviceMemory
from ptx.parse import Instruction, parse
from ptx.shared import SharedMemory
from ptx.tensor import Products

LANES = 1024
"""Threads that advance together, at least one block's."""

TURNS = 4
"""Groups under way at the same time, where blocks meet, unless a launch says otherwise."""

MOST_STEPS = 3_000_000
"""Instructions of a group, before it is said not to end."""

_CONTROL = {"bra", "ret", "bar"}


class Kernel:
    """A kernel, ready to be launched."""

    def __init__(self, text: str):
        self.program = program = parse(text)
        self._code = [_decode(instruction) for instruction in program.instructions]
        opcodes = [instruction.opcode for instruction in program.instructions]
        self._meets = any(opcode.startswith("atom.") for opcode in opcodes)
        self._async = any(opcode.startswith("wgmma.") for opcode in opcodes)
        self._granule = min((_shared_bytes(i) for i in program.instructions), default=16)
        self._labels = set(program.labels.values())
        self._targets = {
            at: program.labels[instruction.operands[0]]
            for at, instruction in enumerate(program.instructions)
            if instruction.opcode.startswith("bra")
        }
        self._offsets, at = {}, 0
        for name, width in program.parameters.items():
            at = -(-at // (width // 8)) * (width // 8)
            self._offsets[name] = at
            at += width // 8

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        arguments: Sequence[np.generic],
        memory: DeviceMemory,
        rng: np.random.Generator,
        observer: Callable | None = None,
        turns: int = TURNS,
    ) -> None:
        """Run all blocks.

        Parameters
        ----------
        grid : tuple of int
        threads, shared : int
            Threads of a block; its dynamic shared memory in bytes.
        arguments : sequence of numpy scalars
            In the order and of the widths the kernel declares.
        turns : int
            Groups under way at the same time, where blocks meet.

        Raises
        ------
        PtxError
            The launch is not what the kernel declares, or it does what a GPU leaves undefined.
        """
        program = self.program
        if threads != program.threads:
            raise PtxError(f"{program.name} is launched with {threads} threads and declares {program.threads}")
        widths = [8 * argument.itemsize for argument in arguments]
        if widths != list(program.parameters.values()):
            raise PtxError(f"{program.name} takes {list(program.parameters.values())} bits, given are {widths}")
        packed = bytearray()
        for offset, argument in zip(self._offsets.values(), arguments):
            packed += bytes(offset - len(packed)) + argument.tobytes()

        order = rng.permutation(int(np.prod(grid)))
        size = max(1, LANES // threads)
        if self._meets:
            size = min(size, -(-len(order) // turns))
        meeting = Meeting(len(order), memory) if self._meets else None
        waiting = [order[i : i + size] for i in range(0, len(order), size)]
        running: list[_Run] = []
        with np.errstate(all="ignore"):
            while waiting or running:
                while waiting and len(running) < (turns if self._meets else 1):
                    group = Group(program, bytes(packed), self._offsets, waiting.pop(), grid, memory, meeting)
                    group.shared = SharedMemory(len(group.grid_block), shared, self._granule, group.block, group.thread)
                    group.observer = observer
                    group.products = Products(group) if self._async else None
                    running.append(_Run(group, self._code, self._labels, self._targets))
                turn = running[int(rng.integers(len(running)))]
                turn.advance(int(rng.integers(1, 400)) if self._meets else MOST_STEPS)
                running = [run for run in running if not run.ended.all()]


def _shared_bytes(instruction: Instruction) -> int:
    """Bytes of an access to shared memory; 16 for other instructions."""
    match = re.match(r"(?:ld|st)\.shared.*?(?:\.v(\d))?\.[busf](\d+)$", instruction.opcode)
    if match:
        return int(match[1] or 1) * int(match[2]) // 8
    if instruction.opcode.startswith("cp.async.c") and len(instruction.operands) > 2:
        return instruction.operands[2].value
    return 16


Step = tuple[Instruction, Executor | None, tuple[int, ...]]
"""An instruction, what it does (None: control flow), and the registers it writes."""


def _decode(instruction: Instruction) -> Step:
    name = instruction.opcode.partition(".")[0]
    if name in _CONTROL:
        known = {"bra": r"bra(\.uni)?", "ret": "ret", "bar": r"bar(\.warp)?\.sync"}[name]
        if not re.fullmatch(known, instruction.opcode):
            raise PtxError(f"{instruction.location}: unknown opcode")
        return instruction, None, ()
    writes = () if name in ("st", "cp", "wgmma", "fence", "stmatrix") else registers_in(instruction.operands[:1])
    return instruction, executor(instruction), writes


class _Run:
    """A group on its way through a kernel."""

    def __init__(self, group: Group, code: Sequence[Step], labels: set[int], targets: dict[int, int]):
        self.group, self._code, self._labels, self._targets = group, code, labels, targets
        self._at = np.zeros(group.lanes, np.int32)
        self._waits = np.zeros(group.lanes, bool)
        self.ended = np.zeros(group.lanes, bool)
        self._steps = 0

    def advance(self, budget: int) -> None:
        """Let threads go on for some instructions; those that are behind go first."""
        while budget > 0 and not self.ended.all():
            live = ~self.ended & ~self._waits
            at = int(self._at[live].min())
            active = live & (self._at == at)
            before = self._steps
            self._run(at, active, budget)
            budget -= self._steps - before
            if self._steps > MOST_STEPS:
                raise PtxError(f"{self.group.program.name} does not end")

    def _run(self, at: int, active: np.ndarray, budget: int) -> None:
        """Until the threads part, meet others, or the budget is used up."""
        group, code, labels = self.group, self._code, self._labels
        together = np.count_nonzero(active) == group.lanes
        written = group.products.written_since_fence if group.products is not None else None
        last = self._steps + budget
        while self._steps < last:
            instruction, execute, writes = code[at]
            self._steps += 1
            mask = None if together else active
            if instruction.guard is not None:
                slot = instruction.guard.slot
                if slot in group.undefined and group.any_undefined([slot], mask) is not None:
                    raise self._error(instruction, "an uninitialized predicate decides")
                chosen = group.registers[slot]
                chosen = ~chosen if instruction.negated else chosen
                chosen = chosen if together else chosen & active
                mask = None if together and np.count_nonzero(chosen) == group.lanes else chosen
            if execute is None:
                stays = self._control(instruction, at, active, mask)
                if stays is None:
                    return
                at = stays
            else:
                if mask is None or np.count_nonzero(mask):
                    if group.observer is not None:
                        group.observer(instruction.opcode, mask, 0, active)
                    try:
                        execute(group, mask)
                    except PtxError as error:
                        raise self._error(instruction, str(error)) from None
                    if written is not None:
                        written.update(writes)
                at += 1
            if not together and at in labels:
                break
        self._at[active] = at

    def _control(self, instruction: Instruction, at: int, active: np.ndarray, mask: np.ndarray | None) -> int | None:
        """Where the threads go on together; None if they part, wait, or end."""
        group = self.group
        if group.observer is not None:
            group.observer(instruction.opcode, mask, 0, active)
        if instruction.opcode.startswith("bra"):
            target = self._targets[at]
            if mask is None or not np.count_nonzero(mask != active):
                return target
            if not np.count_nonzero(mask):
                return at + 1
            self._at[active] = at + 1
            self._at[mask] = target
            return None
        if instruction.opcode == "ret":
            self._at[active] = at + 1
            self.ended[active if mask is None else mask] = True
            return None
        if mask is not None and (mask != active).any():
            raise self._error(instruction, "some threads do not reach a barrier")
        if instruction.opcode == "bar.warp.sync":
            group.shared.meet_in_warps(active)
            if group.threads == 32:  # all of the block
                self._pass(np.unique(group.block[active]))
            return at + 1
        if instruction.operands[0].value != 0 or len(instruction.operands) > 1:
            raise self._error(instruction, "a named barrier is not known")
        return self._barrier(instruction, at, active)

    def _barrier(self, instruction: Instruction, at: int, active: np.ndarray) -> int | None:
        group = self.group
        rows = active.reshape(-1, group.threads)
        if (rows.any(1) != rows.all(1)).any():
            # others of the block may be behind and still come to this barrier
            self._at[active] = at
            self._waits[active] = True
            waiting = self._waits.reshape(rows.shape)
            if ((waiting | self.ended.reshape(rows.shape)).all(1) & ~waiting.all(1)).any():
                raise self._error(instruction, "some threads end before a barrier")
            complete = waiting.all(1)
            if (complete & (self._at.reshape(rows.shape) != at).any(1)).any():
                raise self._error(instruction, "threads of a block wait at different barriers")
            released = np.repeat(complete, group.threads)
            self._waits[released] = False
            self._at[released] = at + 1
            self._pass(np.flatnonzero(complete))
            return None
        self._pass(np.flatnonzero(rows[:, 0]))
        return at + 1

    def _pass(self, blocks: np.ndarray) -> None:
        self.group.epoch[blocks] += 1
        if self.group.meeting is not None:
            self.group.meeting.barrier(self.group.grid_block[blocks])

    def _error(self, instruction: Instruction, text: str) -> PtxError:
        return PtxError(f"{self.group.program.name}, {instruction.location}: {text}")
