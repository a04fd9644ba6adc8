"""Device memory: the plan before loading, allocation, and uploads."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from qvl_kernels.gpu.arrays import DeviceArray
from qvl_kernels.gpu.driver import Driver
from qvl_kernels.ops import DeviceError

RESERVE = 256 << 20
"""Bytes reserved for the driver and the kernels."""

ALIGNMENT = 256
"""Alignment of blocks, as in `cuMemAlloc`."""

POOL_LIMIT = 128 << 20
"""Limit of freed blocks that are kept for the next request of the same size, in bytes.

Beyond it the sizes go whose last block was freed longest ago: after loading, those of the uploads.
"""

PAGE = 2 << 20
"""`cuMemAlloc` rounds blocks of more than half of this up to multiples of it."""

ARENA = 64 << 20
"""Largest arena in bytes. An array of at least a quarter of it gets its own arena, whose rest others may use."""

_USEFUL_CONTEXT, _CONTEXT_STEP = 1024, 256
"""Smallest context that is suggested (a picture and a few turns), and the step of suggestions, in tokens."""

STAGE, SMALL_STAGE = 32 << 20, 64 << 10
"""Bytes of the page-locked buffers for uploads."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The use of a GPU's memory, in bytes.

    Attributes
    ----------
    weights, cache, workspace : int
        Needs of the model; `reserve` is for the driver.
    free : int
        Free memory of the GPU.
    """

    weights: int
    cache: int
    workspace: int
    free: int
    reserve: int = RESERVE

    @property
    def needed(self) -> int:
        return self.weights + self.cache + self.workspace + self.reserve

    @property
    def fits(self) -> bool:
        return self.needed <= self.free

    def __str__(self) -> str:
        parts = (self.weights, self.cache, self.workspace, self.reserve)
        weights, cache, workspace, reserve = (f"{part / 1e9:.2f} GB" for part in parts)
        return (
            f"{self.needed / 1e9:.2f} GB needed ({weights} weights, {cache} KV cache, {workspace} workspace, "
            f"{reserve} driver), {self.free / 1e9:.2f} GB free"
        )


def plan(
    weights_bytes: int,
    cache_bytes: int,
    workspace_bytes: int,
    free_bytes: int,
    *,
    int8_cache_bytes: int | None = None,
    context: int | None = None,
    vision_bytes: int = 0,
) -> Plan:
    """Check before loading whether a model fits.

    Parameters
    ----------
    weights_bytes : int
        All weights on the GPU.
    cache_bytes, workspace_bytes : int
        KV cache at full capacity; activations and scratch memory.
    free_bytes : int
        The result of `Driver.memory`.
    int8_cache_bytes : int, optional
        Size of the same cache in int8, if it is not int8; for a suggestion.
    context : int, optional
        Capacity of the cache in tokens; for suggesting a shorter context.
    vision_bytes : int
        The part of `weights_bytes` that could run on the CPU.

    Raises
    ------
    DeviceError
        If it does not fit; with all sizes and suggestions: an int8 cache, a shorter context, vision on the CPU, or a
        combination; or that nothing fits.
    """
    whole = Plan(weights_bytes, cache_bytes, workspace_bytes, free_bytes)
    if whole.fits:
        return whole
    remedy = _remedy(whole, int8_cache_bytes, context, vision_bytes)
    raise DeviceError(f"the model does not fit on the GPU: {whole}; {remedy}")


def _remedy(whole: Plan, int8_cache: int | None, context: int | None, vision: int) -> str:
    """Return the mildest change that makes it fit."""
    int8, off = "an int8 KV cache", "vision on the CPU"
    options = []
    if int8_cache is not None:
        options.append((int8, dataclasses.replace(whole, cache=int8_cache)))
    if vision:
        options.append((off, dataclasses.replace(whole, weights=whole.weights - vision)))
    if int8_cache is not None and vision:
        both = dataclasses.replace(whole, cache=int8_cache, weights=whole.weights - vision)
        options.append((f"{int8} and {off}", both))
    for name, option in options:
        if option.fits:
            return f"what fits: {name} ({option.needed / 1e9:.2f} GB)"
    shorter = [(name, _tokens(option, context)) for name, option in [("", whole), *options]] if context else []
    for name, tokens in [*(s for s in shorter if s[1] >= _USEFUL_CONTEXT), *shorter[::-1]]:
        if tokens > 0:
            return f"what fits: {name and name + ' with '}a context of {tokens} tokens instead of {context}"
    return "nothing would make it fit: use the CPU, or close other programs that use the GPU"


def _tokens(option: Plan, context: int) -> int:
    """Return the context that fits, in tokens."""
    room = option.free - (option.needed - option.cache)
    return context * room // option.cache // _CONTEXT_STEP * _CONTEXT_STEP


def rounded(nbytes: int) -> int:
    """Return the bytes that the driver uses for an allocation."""
    unit = ALIGNMENT if nbytes <= PAGE // 2 else PAGE
    return max(-(-nbytes // unit), 1) * unit


class Memory:
    """Blocks of device memory, freed with their last array.

    Work runs in the order of one stream, so a block may be reused while its previous user still runs.

    Attributes
    ----------
    in_use, peak : int
        Bytes of live arrays now, and their maximum.
    """

    def __init__(self, driver: Driver):
        self.driver = driver
        self.in_use = self.peak = 0
        self.scratch = Scratch(self)
        self._pool: collections.OrderedDict[int, list[int]] = collections.OrderedDict()
        self._pooled = 0
        self._arenas: weakref.WeakSet[Arena] = weakref.WeakSet()
        weakref.finalize(self, _free, driver, self._pool).atexit = False

    def array(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> DeviceArray:
        """An uninitialized array."""
        array = DeviceArray(0, shape, dtype, None)
        array.owner = Block(self, array.nbytes)
        array.address = array.owner.address
        return array

    def constant(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> DeviceArray:
        """Allocate an uninitialized array that is not scratch memory of the step being captured."""
        recording, self.scratch.recording = self.scratch.recording, False
        try:
            return self.array(shape, dtype)
        finally:
            self.scratch.recording = recording

    def weight(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> DeviceArray:
        """Allocate an uninitialized array for the lifetime of the model; hundreds of them share a few allocations.

        An arena is as large as all earlier ones together, so that a small model wastes little.
        """
        array = DeviceArray(0, shape, dtype, None)
        fitting = [arena for arena in self._arenas if arena.room >= array.nbytes]
        if fitting:
            arena = min(fitting, key=lambda arena: arena.room)
        else:
            held = sum(arena.nbytes for arena in self._arenas)
            shared = min(held, ARENA) if array.nbytes < ARENA // 4 else 0
            arena = Arena(self, rounded(max(array.nbytes, PAGE, shared)))
            self._arenas.add(arena)
        array.address, array.owner = arena.part(array.nbytes), arena
        return array

    def take(self, nbytes: int) -> int:
        """Allocate a block; return the address."""
        kept = self._pool.get(nbytes)
        if kept:
            address = kept.pop()
            self._pooled -= nbytes
        else:
            try:
                address = self.driver.allocate(nbytes)
            except DeviceError:
                if not self._pooled:
                    raise
                self.trim()
                address = self.driver.allocate(nbytes)
        self.in_use += nbytes
        self.peak = max(self.peak, self.in_use)
        return address

    def give(self, address: int, nbytes: int) -> None:
        """Free a block."""
        self.in_use -= nbytes
        self._pool.setdefault(nbytes, []).append(address)
        self._pool.move_to_end(nbytes)
        self._pooled += nbytes
        if self._pooled > POOL_LIMIT:
            # After a fault this fails, too. The fault is reported where it occurs, not in the garbage collector.
            with contextlib.suppress(DeviceError):
                self._shrink(POOL_LIMIT)

    def trim(self) -> None:
        """Free the blocks that are kept."""
        self._shrink(0)

    def _shrink(self, limit: int) -> None:
        """Free blocks that are kept, until `limit` bytes are left."""
        # the garbage collector may free a block at any moment: no iteration over the pool itself
        for nbytes, addresses in [*self._pool.items()]:
            while addresses and self._pooled > limit:
                self._pooled -= nbytes
                self.driver.free(addresses.pop())


def _free(driver: Driver, pool: Mapping[int, list[int]]) -> None:
    """Free the blocks that the memory of a deleted backend kept."""
    with contextlib.suppress(DeviceError):  # as in `Memory.give`
        for addresses in pool.values():
            while addresses:
                driver.free(addresses.pop())


class Scratch:
    """Blocks that captured steps allocated and freed during recording.

    Steps run one after another and share no data in these blocks, so all of them reuse the same blocks. These live as
    long as any of the steps.
    """

    def __init__(self, memory: Memory):
        self._memory = memory
        self._free: dict[int, list[int]] = collections.defaultdict(list)
        self._steps = 0
        self._held: list[tuple[int, int]] | None = None
        self.recording = False

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Assign blocks allocated within the context to a captured step, until `release`."""
        self._steps += 1
        self.recording = True
        try:
            yield
        except BaseException:
            self.release()
            raise
        finally:
            self.recording = False

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Use no block twice within the context: its work may run at the same time."""
        self._held = held = list[tuple[int, int]]()
        try:
            yield
        finally:
            self._held = None
            for address, nbytes in held:
                self.give(address, nbytes)

    def release(self) -> None:
        """Note that a captured step was deleted."""
        self._steps -= 1
        if self._steps == 0:
            free, self._free = self._free, collections.defaultdict(list)
            for nbytes, addresses in free.items():
                for address in addresses:
                    self._memory.give(address, nbytes)

    def take(self, nbytes: int) -> int:
        """Allocate a block; see `Memory.take`."""
        return self._free[nbytes].pop() if self._free[nbytes] else self._memory.take(nbytes)

    def give(self, address: int, nbytes: int) -> None:
        """Free a block; see `Memory.give`."""
        if self._held is not None:
            self._held.append((address, nbytes))
            return
        if self._steps:
            self._free[nbytes].append(address)
        else:
            self._memory.give(address, nbytes)


class Block:
    """One allocation, freed with the last array that refers to it.

    Attributes
    ----------
    address : int
    scratch : bool
        Whether it was allocated within a captured step.
    """

    __slots__ = ("__weakref__", "address", "release", "scratch")

    def __init__(self, memory: Memory, nbytes: int):
        nbytes = max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT
        self.scratch = memory.scratch.recording
        home = memory.scratch if self.scratch else memory
        self.address = home.take(nbytes)
        self.release = weakref.finalize(self, home.give, self.address, nbytes)
        """Frees the memory at once, even if arrays refer to it."""
        self.release.atexit = False


class Arena(Block):
    """One allocation shared by several arrays, freed with the last of them.

    Attributes
    ----------
    nbytes, room : int
        Its size, and the unused rest.
    """

    __slots__ = ("nbytes", "room")

    def __init__(self, memory: Memory, nbytes: int):
        super().__init__(memory, nbytes)
        self.nbytes = self.room = nbytes

    def part(self, nbytes: int) -> int:
        """Reserve the next `nbytes` bytes; return the address."""
        address = self.address + self.nbytes - self.room
        self.room = max(self.room - max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT, 0)
        return address


class Uploader:
    """Copies host arrays to the device through page-locked buffers, which overlaps filling and transfer.

    Small arrays use separate small buffers, so that they do not wait for large ones.
    """

    def __init__(self, driver: Driver, progress: Callable[[int], None]):
        self.progress = progress
        self._small, self._large = _Stages(driver, 8, SMALL_STAGE), _Stages(driver, 2, STAGE)

    def __call__(self, values: np.ndarray, target: DeviceArray) -> None:
        """Copy `values`, of any layout, to `target`; call `progress` with the bytes sent."""
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        stages = self._small if len(data) <= SMALL_STAGE else self._large
        for first in range(0, len(data), stages.nbytes):
            part = data[first : first + stages.nbytes]
            stages.send(part, target.address + first)
            self.progress(len(part))


class _Stages:
    """A ring of page-locked buffers; each is reused when the device has read it."""

    def __init__(self, driver: Driver, count: int, nbytes: int):
        self.driver, self.count, self.nbytes = driver, count, nbytes
        self._buffers: list[np.ndarray] = []
        self._sent: list[Any] = [None] * count
        self._next = 0

    def send(self, data: np.ndarray, address: int) -> None:
        """Copy bytes to the device; `data` may be changed immediately."""
        if not self._buffers:
            memory = self.driver.pinned(self.count * self.nbytes)
            self._buffers = [memory[i * self.nbytes : (i + 1) * self.nbytes] for i in range(self.count)]
        turn, self._next = self._next, (self._next + 1) % self.count
        if self._sent[turn] is not None:
            self.driver.wait(self._sent[turn])
        buffer = self._buffers[turn][: len(data)]
        buffer[:] = data
        self.driver.to_device(address, buffer)
        self._sent[turn] = self.driver.mark()
