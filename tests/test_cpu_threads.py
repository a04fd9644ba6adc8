"""The CPU backend's threads: callers at the same time, interrupts, forks, and threads that are no longer needed."""

from __future__ import annotations

import gc
import os
import random as stdlib_random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from test_ops import matrix, random, values

from qvl_kernels.cpu import CpuOps, runner
from qvl_kernels.cpu.arrays import CpuWeight
from qvl_kernels.locks import make_lock
from qvl_kernels.ops import Norm

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def ops():
    return CpuOps(activations="int16", threads=2)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_do_not_depend_on_their_neighbours(ops, bits, group):
    """Up to 16 rows, each result is bit-identical for all row tiles of the kernel."""
    rng = random(f"rows {bits} {group}")
    for zeros in (False, True):
        w, x = ops.weight(matrix(rng, 70, 300, bits, group, zeros=zeros)), values(rng, 16, 300)
        x[3] *= 1000
        alone = np.full((16, 70), np.nan, np.float32)
        for row in range(16):
            ops.linear(x[row : row + 1], w, out=alone[row : row + 1])
        for count in (2, 3, 7, 16):
            together = np.full((count, 70), np.nan, np.float32)
            ops.linear(x[:count], w, out=together)
            assert np.array_equal(alone[:count], together)


def test_two_python_threads_at_once(ops):
    """Eager and captured operations of several threads follow one another and do not mix their scratch memory."""
    rng = random("threads")
    work, failures = [], []
    for _ in range(3):
        w, x = ops.weight(matrix(rng, 256, 512, 4)), values(rng, 3, 512)
        norm, out = Norm(values(rng, 512), None, 1e-6), ops.empty((3, 256))
        ops.linear(x, w, out=out, norm=norm, activation="gelu")
        work.append((w, x, norm, out.copy()))

    def run(w, x, norm, want):
        out = ops.empty(want.shape)

        def step():
            ops.linear(x, w, out=out, norm=norm, activation="gelu")

        replay = ops.capture(step)
        for i in range(200):
            out[:] = np.nan
            step() if i % 2 else replay()
            if not np.array_equal(out, want):
                failures.append(i)

    threads = [threading.Thread(target=run, args=item) for item in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_more_threads_than_work():
    ops = CpuOps(threads=7)
    x, out = np.ones((1, 5), np.float32), np.empty((1, 5), np.float32)
    for _ in range(50):
        ops.add(x, x, out=out)
        assert (out == 2).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked_child(ops):
    x, out = np.ones((1, 64), np.float32), np.empty((1, 64), np.float32)
    ops.add(x, x, out=out)
    child = os.fork()
    if not child:
        ops.add(out, x, out=out)
        os._exit(int(not (out == 3).all()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_while_another_thread_computes(ops):
    """The child computes with its own threads, though the parent's lock was held at the fork."""
    rng = random("fork")
    w, x = ops.weight(matrix(rng, 2048, 2048, 4)), values(rng, 1, 2048)
    out, want = ops.empty((1, 2048)), ops.empty((1, 2048))
    ops.linear(x, w, out=want)
    busy = threading.Event()

    def compute():
        other = ops.empty((1, 2048))
        while not busy.is_set():
            ops.linear(x, w, out=other)

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if not child:
                ops.linear(x, w, out=out)
                os._exit(int(not np.array_equal(out, want)))
            assert exit_status(child) == 0
    finally:
        busy.set()
        thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_while_another_thread_asks_the_model(model):
    """The child answers, whichever of the model's locks another thread of the parent held."""
    asked = model("tiny-vl", device="cpu", bits=4)
    want, busy, answers = asked.generate("Hi", max_new_tokens=3).token_ids, threading.Event(), []

    def ask():
        while not busy.is_set():
            answers.append(asked.generate("A man and a dog " * 20, max_new_tokens=2).token_ids)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for _ in range(8):
            child = os.fork()
            if not child:
                status = 2
                try:
                    status = int(asked.generate("Hi", max_new_tokens=3).token_ids != want)
                finally:
                    os._exit(status)
            assert exit_status(child) == 0
    finally:
        busy.set()
        thread.join()
    assert len(answers) > 1 and answers.count(answers[0]) == len(answers)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_keeps_what_the_forking_thread_holds():
    lock = make_lock()
    with lock:
        child = os.fork()
        if not child:
            other = []
            thread = threading.Thread(target=lambda: other.append(lock.acquire(timeout=0.1)))
            thread.start()
            thread.join()
            os._exit(int(other != [False]))
        assert exit_status(child) == 0


def exit_status(child: int, seconds: float = 20) -> int | str:
    """How a child ends; one that does not is killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "stuck"


# ------------------------------------------------------------------------------------------------ first use
def test_first_use_from_several_threads():
    """Four threads that run a new instance's first operation at the same time."""
    rng = random("first use")
    w, x = CpuWeight(matrix(rng, 512, 512, 4)), values(rng, 3, 512)
    norm, want = Norm(values(rng, 512), None, 1e-6), np.empty((3, 512), np.float32)
    CpuOps(activations="int16", threads=3).linear(x, w, out=want, norm=norm)
    wrong = []
    for _ in range(100):
        ops, start = CpuOps(activations="int16", threads=3), threading.Barrier(4)

        def use(ops=ops, start=start):
            out = np.full((3, 512), np.nan, np.float32)
            start.wait()
            ops.linear(x, w, out=out, norm=norm)
            if not np.array_equal(out, want):
                wrong.append(out)

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_workers_end_with_their_pool():
    before = set(threading.enumerate())
    ops = CpuOps(threads=4)
    x = np.ones((1, 8), np.float32)
    ops.add(x, x, out=x)
    workers = set(threading.enumerate()) - before
    assert len(workers) == 3
    del ops
    gc.collect()
    for worker in workers:
        worker.join(5)
        assert not worker.is_alive()


# ------------------------------------------------------------------------------------------------ interrupts
@pytest.fixture
def interrupts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import interrupts

    return interrupts


def layer(ops: CpuOps):
    """A function that runs a few operations one at a time and as a recorded program, and returns the results."""
    rng = random("interrupts")
    w, x = ops.weight(matrix(rng, 96, 256, 4)), values(rng, 2, 256)
    norm, out, total = Norm(values(rng, 256), None, 1e-6), ops.empty((2, 96)), ops.empty((2, 96))
    replay = ops.capture(lambda: ops.linear(x, w, out=out, norm=norm))

    def answer() -> bytes:
        out[:], total[:] = np.nan, np.nan
        ops.linear(x, w, out=out, norm=norm, activation="gelu")
        ops.add(out, out, out=total)
        replay()
        return total.tobytes() + out.tobytes()

    return answer


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers")
def test_interrupts_at_random_moments(interrupts):
    """`bench/interrupts.py` makes 10,000 of them."""
    answer = layer(CpuOps(activations="int16", threads=3))
    hit, got, want = interrupts.rounds(answer, 1000, stdlib_random.Random(1))
    assert got == want
    assert hit > 100


def test_an_interrupt_at_every_line_of_run(interrupts):
    ops = CpuOps(activations="int16", threads=3)
    answer = layer(ops)
    want = answer()
    code, hit = runner.Pool.run.__code__, set()
    lines = {line for _, _, line in code.co_lines() if line and line != code.co_firstlineno}
    for line in sorted(lines):
        for event in ("line", "opcode"):
            for occurrence in range(6):

                def trace(frame, kind, argument, line=line, event=event, left=[occurrence]):  # noqa: B006
                    if frame.f_code is not code:
                        return None
                    frame.f_trace_opcodes = True
                    if kind == event and frame.f_lineno == line:
                        if not left[0]:
                            hit.add(line)
                            raise KeyboardInterrupt
                        left[0] -= 1
                    return trace

                sys.settrace(trace)
                try:
                    answer()
                except KeyboardInterrupt:
                    pass
                finally:
                    sys.settrace(None)
                assert interrupts.within(10, answer) == want
    # What only a forked child reaches is not run here.
    assert len(hit) >= 4
