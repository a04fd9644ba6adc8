"""Programs of instructions, and the threads that execute them."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import struct
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from qvl_kernels.cpu import cache
from qvl_kernels.cpu.processors import performance_processors
from qvl_kernels.locks import make_lock
from qvl_kernels.ops import DeviceError
from qvl_kernels.threads import start_thread

WORDS = 32
"""Number of int64 words of an instruction: the kernel's address and up to 31 arguments."""


def float_word(value: float) -> int:
    """Encode a float32 as an argument of an instruction (`registry.as_f32` decodes it)."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


def aligned(count: int, dtype: np.typing.DTypeLike = np.uint8) -> np.ndarray:
    """Allocate an uninitialized vector, aligned to a cache line (a page, if it is large)."""
    dtype = np.dtype(dtype)
    boundary = 64 if count * dtype.itemsize < 1 << 20 else 4096
    buffer = np.empty(count * dtype.itemsize + boundary, np.uint8)
    offset = -buffer.ctypes.data % boundary
    return buffer[offset : offset + count * dtype.itemsize].view(dtype)


def default_threads() -> int:
    """Return ``QVL_THREADS``, else ``NUMBA_NUM_THREADS``, else the number of performance cores for this process.

    Raises
    ------
    DeviceError
        A variable is not a number from 1 to 256.
    """
    for name in ("QVL_THREADS", "NUMBA_NUM_THREADS"):
        if text := os.environ.get(name):
            if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= 256:
                raise DeviceError(f"{name}={text}: expected a number from 1 to 256; unset {name}")
            return int(text)
    return performance_processors()


class Address(int):
    """The address of an array or a cache. The type tells it from a number of the same value."""


class Program:
    """Instructions, and the arrays that they refer to."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, ...]] = []
        self._keep: list[Any] = []
        self._words: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, name: str, *args: int) -> None:
        """Append the kernel `name` with int64 arguments."""
        if len(args) >= WORDS:
            raise ValueError(f"{name}: {len(args)} arguments, at most {WORDS - 1}")
        self._rows.append((cache.address(name), *args))
        self._words = None

    def keep(self, *owners: Any) -> None:
        """Keep objects alive as long as the program."""
        self._keep.extend(owners)

    def release(self, *owners: Any) -> None:
        """Undo `keep`."""
        released = {id(owner) for owner in owners}
        self._keep = [owner for owner in self._keep if id(owner) not in released]

    def find(self, addresses: Sequence[Address]) -> tuple[np.ndarray, np.ndarray]:
        """Return the places in `words` (flat) that hold one of `addresses`, and its index, int64 ``[n]`` each."""
        index = {address: i for i, address in enumerate(addresses)}
        found = [
            (row * WORDS + column, index[word])
            for row, words in enumerate(self._rows)
            for column, word in enumerate(words)
            if type(word) is Address and word in index
        ]
        places, indices = np.array(found, np.int64).reshape(-1, 2).T
        return places, indices

    def words(self) -> np.ndarray:
        """Return the instructions, int64 ``[instructions, WORDS]``."""
        if self._words is None:
            words = np.zeros((len(self._rows), WORDS), np.int64)
            for row, values in zip(words, self._rows):
                row[: len(values)] = values
            self._words = words
        return self._words


def _pointer(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _yield_address() -> int:
    """Return the address of the system's yield function."""
    if platform.system() == "Windows":
        return _pointer(ctypes.windll.kernel32.SwitchToThread)  # type: ignore[attr-defined]
    return _pointer(ctypes.CDLL(None).sched_yield)


class _Lock:
    """A lock that native code acquires and releases without the GIL: CPython's low-level lock."""

    _allocate = ctypes.PYFUNCTYPE(ctypes.c_void_p)(("PyThread_allocate_lock", ctypes.pythonapi))
    _free = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(("PyThread_free_lock", ctypes.pythonapi))
    acquire, release = (_pointer(getattr(ctypes.pythonapi, f"PyThread_{verb}_lock")) for verb in ("acquire", "release"))

    def __init__(self, *, held: bool):
        self.address = self._allocate()
        if not self.address:
            raise MemoryError("no memory for a lock")
        if held:
            ctypes.pythonapi.PyThread_acquire_lock(ctypes.c_void_p(self.address), 1)

    def __del__(self) -> None:
        self._free(self.address)


_NATIVE = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)
HEAD = 32
"""Words of a control block before the counters of `atomics.claim`; see `sync`."""


def _serve(work: Any, index: int, wake: _Lock, control: np.ndarray, *owners: Any) -> None:
    """Run the native loop in a worker thread, and keep its objects alive."""
    work(control.ctypes.data, index, wake.address)


def _stop(pid: int, execute: Any, control: np.ndarray, *owners: Any) -> None:
    """Stop the workers of a deleted pool (a forked child has none)."""
    if pid == os.getpid():
        execute(control.ctypes.data, 0, -1)


class Pool:
    """`threads` - 1 sleeping daemon threads that, with the caller, execute one program at a time.

    `run` is thread-safe; programs run one after another.

    Attributes
    ----------
    counters : int
        The address of the counters for `atomics.claim`, for instructions of this pool.

    Notes
    -----
    A program runs inside one foreign call. An exception in the calling thread (Ctrl-C, or one sent by another thread)
    is raised before or after that call, so it cannot interrupt a program or leave a lock held.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self._control = aligned(HEAD + 8 * threads, np.int64)
        self._address = self._control.ctypes.data
        self.counters = self._address + 8 * HEAD
        self._execute, self._work = (_NATIVE(cache.address(name)) for name in ("execute", "work"))
        self._restart = make_lock()
        self._start()

    def _start(self) -> None:
        """Initialize the control block, at a fixed address because recorded programs refer to it, and start workers."""
        lock, wake = _Lock(held=False), [_Lock(held=True) for _ in range(self.threads - 1)]
        addresses = np.array([lock.address for lock in wake], np.int64)
        self._control[:] = 0
        self._control[2:9] = (
            WORDS, _yield_address(), _Lock.acquire, _Lock.release, lock.address, addresses.ctypes.data, self.threads,
        )  # fmt: skip
        owners = (self._control, lock, wake, addresses)
        for index, own in enumerate(wake, 1):
            arguments = (self._work, index, own, *owners)
            start_thread(_serve, arguments, f"qvl-worker-{index}")
        pid = os.getpid()
        weakref.finalize(self, _stop, pid, self._execute, *owners).atexit = False
        self._pid = pid

    def run(self, program: Program) -> None:
        """Execute a program and wait for its end."""
        words = program.words()
        if self._pid != os.getpid():
            with self._restart:  # a forked child has no workers
                if self._pid != os.getpid():
                    self._start()
        if len(words):
            self._execute(self._address, words.ctypes.data, len(words))


class Replay:
    """A captured program."""

    def __init__(self, pool: Pool, program: Program):
        self._pool, self.program = pool, program

    def __call__(self) -> None:
        self._pool.run(self.program)
