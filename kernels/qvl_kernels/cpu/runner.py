"""Programs of instructions and the threads that execute them."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import threading
from typing import Any

import numpy as np

from qvl_kernels.cpu import cache

WORDS = 32
"""int64 words of an instruction: the kernel's address and up to 31 arguments."""


def float_word(value: float) -> int:
    """A float32 as an argument of an instruction (`registry.as_f32` reads it)."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


def aligned(count: int, dtype: np.typing.DTypeLike = np.uint8) -> np.ndarray:
    """An uninitialised vector that starts on a cache line (a page, if it is large)."""
    dtype = np.dtype(dtype)
    boundary = 64 if count * dtype.itemsize < 1 << 20 else 4096
    buffer = np.empty(count * dtype.itemsize + boundary, np.uint8)
    offset = -buffer.ctypes.data % boundary
    return buffer[offset : offset + count * dtype.itemsize].view(dtype)


def default_threads() -> int:
    """``QVL_THREADS``, else ``NUMBA_NUM_THREADS``, else the processors this process may run on."""
    for name in ("QVL_THREADS", "NUMBA_NUM_THREADS"):
        if text := os.environ.get(name):
            if not text.isdigit() or not 1 <= int(text) <= 256:
                raise ValueError(f"{name}={text}: expected a number from 1 to 256")
            return int(text)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Program:
    """Instructions, and the arrays whose addresses they hold."""

    def __init__(self):
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
        """Keep objects alive for as long as the program."""
        self._keep.extend(owners)

    def words(self) -> np.ndarray:
        """int64 ``[instructions, WORDS]``."""
        if self._words is None:
            words = np.zeros((len(self._rows), WORDS), np.int64)
            for row, values in zip(words, self._rows):
                row[: len(values)] = values
            self._words = words
        return self._words


def _yield_address() -> tuple[Any, int]:
    """The system's "let others run" and its library."""
    if platform.system() == "Windows":
        function = ctypes.windll.kernel32.SwitchToThread  # type: ignore[attr-defined]
    else:
        function = ctypes.CDLL(None).sched_yield
    return function, ctypes.cast(function, ctypes.c_void_p).value or 0


class Pool:
    """`threads` - 1 sleeping daemon threads that, with the caller, execute one program at a time.

    Any thread may call `run`; programs then follow one another.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self._lock = threading.Lock()
        self._control = aligned(24 + 8 * threads, np.int64)
        self._control[:] = 0
        self._yield, self._control[3] = _yield_address()
        self._control[2] = WORDS
        self._run = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(cache.address("run"))
        self._wake: list[threading.Lock] = []
        self._pid = 0

    @property
    def counters(self) -> int:
        """The address `atomics.claim` wants, for instructions this pool will run."""
        return self._control.ctypes.data + 192

    def _start(self) -> None:
        """Start the workers, again in a forked child, which has none."""
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._control[8:] = 0
        # A lock is acquired by its worker and released by whoever has work: the cheapest way to sleep.
        self._wake = [threading.Lock() for _ in range(self.threads - 1)]
        for index, wake in enumerate(self._wake, 1):
            wake.acquire()
            name = f"qvl-worker-{index}"
            threading.Thread(target=self._work, args=(index, wake), name=name, daemon=True).start()

    def _work(self, index: int, wake: threading.Lock) -> None:
        control = self._control.ctypes.data
        while True:
            wake.acquire()
            self._run(control, index, self.threads)

    def run(self, program: Program) -> None:
        """Execute a program and return when it is done."""
        words = program.words()
        if not len(words):
            return
        if self._pid != os.getpid():
            self._start()
        with self._lock:
            self._control[0], self._control[1] = words.ctypes.data, len(words)
            for wake in self._wake:
                wake.release()
            self._run(self._control.ctypes.data, 0, self.threads)
