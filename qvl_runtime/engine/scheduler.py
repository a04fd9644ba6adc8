"""Scheduling of concurrent answers: one thread at a time uses the device.

This is the engine's thread or, for an only answer, the thread that reads it: its tokens then need no hand-over between
threads.

A tick computes the next token of all running answers, in products of up to `FEW_ROWS` rows, then at most one slice of
a picture, or of a prompt and of others that have room beside it. Rows of answers and of prompts are never in one
product, and the cuts between slices do not affect the result: an answer is the same alone and in a batch.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from qvl_kernels.locks import make_lock
from qvl_kernels.ops import FEW_ROWS
from qvl_kernels.threads import start_thread
from qvl_runtime.engine.decoder import DecodeStep
from qvl_runtime.engine.job import Cancelled, Job, Work
from qvl_runtime.engine.prefill import compute_slices, mixes
from qvl_runtime.engine.prefix_cache import PrefixCache
from qvl_runtime.engine.sequence import PAGE
from qvl_runtime.engine.session import PREFILL_ROWS, Session, SliceLimits, step
from qvl_runtime.errors import QvlError

MAX_BATCH = FEW_ROWS
"""Largest number of concurrent answers: each has at least one row of a step."""

SHARED_ROWS = 128
"""Tokens for which a slice always has room if several prompts end in it: their answers then begin, and end, in fuller
steps."""

IDLE_SECONDS = 5.0
"""Idle time after which the thread ends."""

LOOK_SECONDS = 0.02
"""Interval at which the thread checks whether the reader of an only answer still computes it."""


class Scheduler:
    """Runs jobs in a thread.

    The thread starts with the first job, and ends when it is idle or the scheduler is deleted. It does not keep the
    process alive. A forked child starts its own. A job submitted while there is no other is run by the thread that
    waits for its results, until another is submitted or no thread waits.

    Parameters
    ----------
    prefix_cache : PrefixCache
    max_batch : int
        Largest number of concurrent answers, up to `MAX_BATCH`.
    room : int
        Limit for the keys and values of concurrent answers, in bytes. A single answer may exceed it.
    prompts_first : bool
        Compute prompts whole, and no next token of an answer as long as there is one. While most of `max_batch` run,
        begin a quarter at a time, whose prompts are computed together. More answers a second, but others wait.

    Attributes
    ----------
    device : threading.RLock
        Held during a tick. Other threads that use the device take `gate`, then `device`.
    gate : threading.RLock
        Taken and released between ticks, so that other threads can take `device`.
    ticks, steps, slices : int
        Numbers since the start.
    """

    def __init__(
        self, prefix_cache: PrefixCache, *, max_batch: int = MAX_BATCH, room: int, prompts_first: bool = False
    ):
        self.prefix_cache, self.room = prefix_cache, room
        self.max_batch, self._prompts_first = max_batch, prompts_first
        self.gate, self.device = make_lock(), make_lock()
        self.ticks = self.steps = self.slices = 0
        self._step, self._page_bytes = DecodeStep(prefix_cache.decoder), prefix_cache.page_bytes()
        self._lock = make_lock()
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._bell: SimpleQueue[bool] = SimpleQueue()  # True: there is work; False: end
        self._inbox: deque[Job] = deque()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._alone: Job | None = None  # run by its reader
        self._encoding: Job | None = None
        self._oldest_next, self._stopped = True, False
        weakref.finalize(self, self._bell.put, False).atexit = False

    @property
    def load(self) -> tuple[int, int]:
        """The numbers of running and of waiting jobs."""
        return len(self._running), len(self._waiting) + len(self._inbox)

    def submit(self, work: Work, length: int, capacity: int) -> Job:
        """Submit a computation with a prompt of `length` tokens that needs a session of `capacity` positions.

        Raises
        ------
        QvlError
            If the interpreter is ending.
        DeviceError
            If no thread can be started.
        """
        job = Job(work, length, -(-capacity // PAGE) * self._page_bytes, self)
        with self._lock:
            if self._pid != os.getpid():
                self._reset()
            self._refuse_at_exit()
            if self._thread is None:
                self._thread = start_thread(_serve, (weakref.ref(self), self._bell), "qvl-engine")
                _threads.add(self._thread)
            if self._busy:
                self._inbox.append(job)
                self._alone = None
            else:
                self._alone = job
                self._waiting.append(job)
            self._bell.put(True)
        return job

    @property
    def _busy(self) -> bool:
        return bool(self._inbox or self._waiting or self._running)

    def compute_here(self, job: Job, ready: Callable[[], bool]) -> None:
        """Run an only job in the calling thread, until `ready` or until there is another job."""
        while self._alone is job and not ready() and not self._stopped:
            with self.gate:
                pass
            with self.device:
                if self._alone is job:
                    self._tick()
        if not ready():
            self._refuse_at_exit()

    def _refuse_at_exit(self) -> None:
        """Let exit handlers and finalizers not wait for ever. Other threads may: the interpreter ends without them."""
        if self._stopped and threading.current_thread() is threading.main_thread():
            raise QvlError("this process is ending and computes no more answers; ask before its end")

    def compute_in_thread(self, job: Job) -> None:
        """Run a job in the engine's thread: no thread waits for its results."""
        if self._alone is job:
            self._alone = None
            self._bell.put(True)

    def retire(self) -> bool:
        """Whether the thread may end: nothing was submitted meanwhile."""
        with self._lock:
            if self._bell.empty():
                self._thread = None
            return self._thread is None

    def stop(self) -> None:
        """End all jobs at the next layer, and the thread soon."""
        self._stopped = True
        for job in [*self._running, *self._waiting]:
            job.cancel()
        if self._pid == os.getpid():
            if self.device.acquire(timeout=IDLE_SECONDS):
                self.device.release()
            self._bell.put(False)

    # for the engine's thread
    def run(self) -> bool:
        """Run until there are no more jobs; return False after `stop`."""
        while self._busy and not self._stopped:
            if self._alone is not None:
                self._look()
                continue
            with self.gate:
                pass
            with self.device:
                if self._alone is None:
                    self._collect()
                    self._tick()
        with self.device:
            self._step.forget()
        return not self._stopped

    def _look(self) -> None:
        """Wait, and take over an only job whose reader has not computed it meanwhile."""
        ticks = self.ticks
        with suppress(Empty):
            self._bell.get(timeout=LOOK_SECONDS)  # rung where another comes
            return
        if self.ticks == ticks and self.device.acquire(blocking=False):
            self._alone = None
            self.device.release()

    def _collect(self) -> None:
        while self._inbox:
            self._waiting.append(self._inbox[0])
            self._inbox.popleft()  # not before: the next job would count as the only one

    def _tick(self) -> None:
        self._drop_ended()
        self._admit()
        decoding = [job for job in self._running if job.session is not None]
        if decoding and not (self._prompts_first and self._able()):
            self._decode(decoding)
        job = self._next_slice()
        if job is not None:
            self.slices += 1
            fewer = decoding and not self._prompts_first
            self._compute_slice(job, self.prefix_cache.decoder.ops.slice_rows if fewer else PREFILL_ROWS)
        self.ticks += 1

    def _drop_ended(self) -> None:
        """Remove cancelled jobs, and those whose removal an interrupt prevented."""
        for job in [*self._running, *self._waiting]:
            if job.cancelled or job.ended:
                self._end(job)

    def _end(self, job: Job, error: BaseException | None = None) -> None:
        """End a job early."""
        job.fail(error or Cancelled())
        self._forget(job)

    def _forget(self, job: Job) -> None:
        """Remove a job that has ended."""
        for jobs in (self._running, self._waiting):
            if job in jobs:
                jobs.remove(job)
        if self._encoding is job:
            self._encoding = None

    def _admit(self) -> None:
        """Start waiting jobs in order of arrival, while there is memory."""
        if self._prompts_first and len(self._running) > self.max_batch // 2:
            places = self.max_batch - len(self._running)
            if min(len(self._waiting), places) < self.max_batch // 4:
                return
        if not self._running:
            self.prefix_cache.release()  # an interrupt may have prevented `give`
        while self._waiting and len(self._running) < self.max_batch:
            taken = sum(job.nbytes for job in self._running)
            if self._running and taken + self._waiting[0].nbytes > self.room:
                return
            self._running.append(self._waiting[0])
            self._waiting.popleft()

    def _decode(self, jobs: list[Job]) -> None:
        """Compute the next token of each job, in steps of up to `FEW_ROWS` rows."""
        beside, spare = len(jobs) - 1, FEW_ROWS // len(jobs) - 1
        while jobs:
            together: list[Job] = []
            sessions: list[Session] = []
            rows = 0
            for job in jobs:
                rows += len(job.session.pending) if job.session else 0
                if rows > FEW_ROWS:
                    break
                if job.session:
                    together.append(job)
                    sessions.append(job.session)
            jobs = jobs[len(together) :]
            self.steps += 1
            try:
                step(self._step, sessions)
            except BaseException as error:
                for job in together:
                    self._end(job, error)
                continue
            for job, session in zip(together, sessions):
                session.beside, session.spare = beside, spare
                if not job.advance():
                    self._forget(job)

    def _able(self) -> list[Job]:
        """Return the jobs whose next slice can be computed now."""
        holder = self._encoding  # the vision part holds one picture
        return [
            job
            for job in self._running
            if job.slice is not None and job.slice.ready and (not job.slice.picture or holder is None or holder is job)
        ]

    def _next_slice(self) -> Job | None:
        """Choose the job of the next slice: alternately the oldest job, and the one with the least work left."""
        able = self._able()
        if not able:
            return None
        self._oldest_next = not self._oldest_next
        return min(able, key=lambda job: job.slice.left if job.slice else 0) if self._oldest_next else able[0]

    def _compute_slice(self, job: Job, rows: int) -> None:
        for other in self._able():
            if other.slice is not None and not other.slice.computes:
                self._go_on(other)  # it takes a session
        if job in self._able():
            shared = max(rows, SHARED_ROWS)
            together = self._prompts_beside(job, shared)
            if len(together) > 1:
                self._compute_prompts(together, shared)
            else:
                self._go_on(job, SliceLimits(rows, job.check))

    def _prompts_beside(self, job: Job, rows: int) -> list[Job]:
        """Return a job, and others whose prompts end with its own in a slice of `rows` tokens."""
        found: list[Job] = []
        for other in [job, *(able for able in self._able() if able is not job)]:
            wait = other.slice
            if wait is not None and wait.prompt is not None and wait.left <= rows and mixes(wait.prompt):
                found.append(other)
                rows -= wait.left
        return found if job in found else [job]

    def _compute_prompts(self, jobs: list[Job], rows: int) -> None:
        def check(*_: Any) -> None:
            for job in jobs:
                job.check()

        try:
            compute_slices([job.slice.prompt for job in jobs if job.slice and job.slice.prompt], rows, check)
        except Cancelled:
            return  # without those that are cancelled it is computed in the next tick
        except BaseException as error:
            for job in jobs:
                self._end(job, error)
            return
        for job in jobs:
            self._go_on(job)

    def _go_on(self, job: Job, limits: SliceLimits | None = None) -> None:
        if not job.advance(limits):
            self._forget(job)
        elif job.slice is not None and job.slice.picture:
            self._encoding = self._encoding or job
        elif self._encoding is job:
            self._encoding = None


_all: weakref.WeakSet[Scheduler] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """End all threads before the interpreter does: in a call of the GPU's driver it would end them by an abort.

    A thread may also be releasing a model whose scheduler is already gone.
    """
    for scheduler in list(_all):
        scheduler.stop()
    for thread in list(_threads):
        thread.join(IDLE_SECONDS)


def _serve(owner: weakref.ref[Scheduler], bell: SimpleQueue[bool]) -> None:
    """The thread's main loop. While idle it holds no reference to the model."""
    while True:
        try:
            work = bell.get(timeout=IDLE_SECONDS)
        except Empty:
            scheduler = owner()
            if scheduler is None or scheduler.retire():
                return
            del scheduler
            continue
        scheduler = owner()
        if not work or scheduler is None or not scheduler.run():
            return
        del scheduler
