"""Device memory: what will fit, said before anything is loaded; blocks; and getting weights up there."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from qvl_kernels.gpu.arrays import DeviceArray
from qvl_kernels.gpu.driver import Driver
from qvl_kernels.ops import DeviceError

RESERVE = 256 << 20
"""Bytes left alone: the driver's own, and the kernels'."""

ALIGNMENT = 256
"""Of every block, as `cuMemAlloc` aligns."""

POOL_LIMIT = 128 << 20
"""Most bytes of freed blocks kept for the next request of their size."""

PAGE = 2 << 20
"""`cuMemAlloc` takes blocks of more than half of this in multiples of it."""

ARENA = 64 << 20
"""Most bytes of an arena. An array of a quarter of it or more has one of its own, whose end others may use."""

_USEFUL_CONTEXT, _CONTEXT_STEP = 1024, 256
"""Tokens: an image and a few turns; and the steps in which a context is offered."""

STAGE, SMALL_STAGE = 32 << 20, 64 << 10
"""Bytes of the page-locked buffers that uploads go through."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where the memory of a GPU goes, in bytes.

    Attributes
    ----------
    weights, cache, workspace : int
        What the model needs; `reserve` is left to the driver.
    free : int
        What the GPU has to give.
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
    """Decide before loading whether a model fits.

    Parameters
    ----------
    weights_bytes : int
        All weights that go to the GPU, as they lie in the blob.
    cache_bytes, workspace_bytes : int
        KV cache at its full capacity; activations and scratch.
    free_bytes : int
        As `Driver.memory` tells.
    int8_cache_bytes : int, optional
        Size of the same cache in int8, when it is not int8 already: offered as a way out.
    context : int, optional
        Tokens the cache holds: with it a shorter context can be offered.
    vision_bytes : int
        The part of `weights_bytes` that could run on the CPU instead.

    Raises
    ------
    DeviceError
        When it does not fit, with all sizes and what would: an int8 cache, fewer tokens of context, vision on the
        CPU, or these together; or that nothing would.
    """
    whole = Plan(weights_bytes, cache_bytes, workspace_bytes, free_bytes)
    if whole.fits:
        return whole
    remedy = _remedy(whole, int8_cache_bytes, context, vision_bytes)
    raise DeviceError(f"the model does not fit on the GPU: {whole}; {remedy}")


def _remedy(whole: Plan, int8_cache: int | None, context: int | None, vision: int) -> str:
    """The mildest change that makes it fit."""
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
    """How long a context there is room for."""
    room = option.free - (option.needed - option.cache)
    return context * room // option.cache // _CONTEXT_STEP * _CONTEXT_STEP


def rounded(nbytes: int) -> int:
    """Bytes the driver takes for an allocation."""
    unit = ALIGNMENT if nbytes <= PAGE // 2 else PAGE
    return max(-(-nbytes // unit), 1) * unit


class Memory:
    """Blocks of device memory, given back when the last array in them is gone.

    Work runs in the order of one stream, so a block may be handed out again while what last used it still runs.

    Attributes
    ----------
    in_use, peak : int
        Bytes in live arrays now, and the most there were.
    """

    def __init__(self, driver: Driver):
        self.driver = driver
        self.in_use = self.peak = 0
        self.scratch = Scratch(self)
        self._pool: dict[int, list[int]] = collections.defaultdict(list)
        self._pooled = 0
        self._arenas: weakref.WeakSet[Arena] = weakref.WeakSet()

    def array(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> DeviceArray:
        """An uninitialized array."""
        array = DeviceArray(0, shape, dtype, None)
        array.owner = Block(self, array.nbytes)
        array.address = array.owner.address
        return array

    def constant(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> DeviceArray:
        """An uninitialized array that a step being captured takes for one made before it."""
        recording, self.scratch.recording = self.scratch.recording, False
        try:
            return self.array(shape, dtype)
        finally:
            self.scratch.recording = recording

    def weight(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> DeviceArray:
        """An uninitialized array that stays as long as the model: hundreds of them share a few allocations.

        An arena is as large as all before it together, so that a small model takes little.
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
        """The address of a block."""
        if self._pool[nbytes]:
            address = self._pool[nbytes].pop()
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
        """Take a block back."""
        self.in_use -= nbytes
        if self._pooled + nbytes <= POOL_LIMIT:
            self._pool[nbytes].append(address)
            self._pooled += nbytes
        else:
            # After a fault the driver refuses this, too; whoever runs into the fault is told, not the collector.
            with contextlib.suppress(DeviceError):
                self.driver.free(address)

    def trim(self) -> None:
        """Give the blocks kept for later back to the driver."""
        # a block may come back at any moment: the collector decides
        pool, self._pool, self._pooled = self._pool, collections.defaultdict(list), 0
        for addresses in pool.values():
            for address in addresses:
                self.driver.free(address)


class Scratch:
    """Blocks that steps made and let go of again while they were captured.

    Steps run one after another and leave nothing for each other in such blocks, so that all share them: they are taken
    again within a step, and by the next one that is captured. They stay as long as any of the steps does.
    """

    def __init__(self, memory: Memory):
        self._memory = memory
        self._free: dict[int, list[int]] = collections.defaultdict(list)
        self._steps = 0
        self.recording = False

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Blocks taken within belong to a captured step, which `release` ends."""
        self._steps += 1
        self.recording = True
        try:
            yield
        except BaseException:
            self.release()
            raise
        finally:
            self.recording = False

    def release(self) -> None:
        """A captured step is gone."""
        self._steps -= 1
        if self._steps == 0:
            free, self._free = self._free, collections.defaultdict(list)
            for nbytes, addresses in free.items():
                for address in addresses:
                    self._memory.give(address, nbytes)

    def take(self, nbytes: int) -> int:
        """As `Memory.take`."""
        return self._free[nbytes].pop() if self._free[nbytes] else self._memory.take(nbytes)

    def give(self, address: int, nbytes: int) -> None:
        """As `Memory.give`."""
        if self._steps:
            self._free[nbytes].append(address)
        else:
            self._memory.give(address, nbytes)


class Block:
    """One allocation; it lives as long as an array refers to it.

    Attributes
    ----------
    address : int
    scratch : bool
        Whether it was made within a captured step.
    """

    __slots__ = ("__weakref__", "address", "release", "scratch")

    def __init__(self, memory: Memory, nbytes: int):
        nbytes = max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT
        self.scratch = memory.scratch.recording
        home = memory.scratch if self.scratch else memory
        self.address = home.take(nbytes)
        self.release = weakref.finalize(self, home.give, self.address, nbytes)
        """Gives the memory back at once, whoever still refers to it."""
        self.release.atexit = False


class Arena(Block):
    """One allocation that several arrays share; it lives as long as one of them.

    Attributes
    ----------
    nbytes, room : int
        Its size, and what no array has yet.
    """

    __slots__ = ("nbytes", "room")

    def __init__(self, memory: Memory, nbytes: int):
        super().__init__(memory, nbytes)
        self.nbytes = self.room = nbytes

    def part(self, nbytes: int) -> int:
        """The address of the next `nbytes` bytes."""
        address = self.address + self.nbytes - self.room
        self.room = max(self.room - max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT, 0)
        return address


class Uploader:
    """Copies host arrays to the device through page-locked buffers: some fill while others travel.

    What is small goes through small buffers, so that it does not wait for what is large.
    """

    def __init__(self, driver: Driver, progress: Callable[[int], None]):
        self.progress = progress
        self._small, self._large = _Stages(driver, 8, SMALL_STAGE), _Stages(driver, 2, STAGE)

    def __call__(self, values: np.ndarray, target: DeviceArray) -> None:
        """Copy `values`, of any layout, into `target`; `progress` is told of the bytes as they leave."""
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        stages = self._small if len(data) <= SMALL_STAGE else self._large
        for first in range(0, len(data), stages.nbytes):
            part = data[first : first + stages.nbytes]
            stages.send(part, target.address + first)
            self.progress(len(part))


class _Stages:
    """Page-locked buffers that are filled in turn, each when the device has read it."""

    def __init__(self, driver: Driver, count: int, nbytes: int):
        self.driver, self.count, self.nbytes = driver, count, nbytes
        self._buffers: list[np.ndarray] = []
        self._sent: list[Any] = [None] * count
        self._next = 0

    def send(self, data: np.ndarray, address: int) -> None:
        """Copy bytes to the device; `data` may be changed at once."""
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
