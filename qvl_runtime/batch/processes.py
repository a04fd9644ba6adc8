"""Computing a job on one machine, with one process per memory node."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from qvl_runtime.batch.job import Computed, Task, Worker
from qvl_runtime.batch.options import ModelSpec, Options
from qvl_runtime.batch.rows import Source
from qvl_runtime.errors import QvlError

NODES = Path("/sys/devices/system/node")


def memory_nodes(folder: Path = NODES) -> list[list[int]]:
    """Return the usable processors of each memory node; a single list if the nodes are unknown."""
    if not hasattr(os, "sched_getaffinity"):
        return [list(range(os.cpu_count() or 1))]
    mine = os.sched_getaffinity(0)
    nodes = []
    for entry in sorted(folder.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        found = _numbers((entry / "cpulist").read_text())
        if shared := sorted(mine & found):
            nodes.append(shared)
    return nodes or [sorted(mine)]


def _numbers(text: str) -> set[int]:
    """Parse a list such as ``0-3,8``."""
    found: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def in_processes(
    nodes: Sequence[Sequence[int]],
    model: ModelSpec,
    source: Source,
    options: Options,
    tasks: Sequence[Task],
    on_computed: Callable[[Computed], None],
) -> None:
    """Compute tasks in one process per node, pinned to the node's processors.

    Raises
    ------
    QvlError
        If a process ends early, usually for lack of memory.
    """
    context = multiprocessing.get_context("spawn")
    pools = [
        ProcessPoolExecutor(1, context, _begin, (list(processors), model, source, options)) for processors in nodes
    ]
    left, running = list(reversed(tasks)), dict[Future[Computed], ProcessPoolExecutor]()

    def give(pool: ProcessPoolExecutor) -> None:
        if left:
            running[pool.submit(_compute, left.pop())] = pool

    try:
        for pool in pools:
            give(pool)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                pool = running.pop(future)
                give(pool)
                on_computed(future.result())
    except BrokenProcessPool:
        raise QvlError("a process of the job ended early; is there enough memory? Run again to go on") from None
    finally:
        for child in multiprocessing.active_children() if running else ():
            child.terminate()
        for pool in pools:
            pool.shutdown(cancel_futures=True)


_worker: Worker | None = None
"""The worker of a child process."""


def _begin(processors: list[int], model: ModelSpec, source: Source, options: Options) -> None:
    """Initialize a child before any thread starts: threads inherit the processor affinity."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends the job
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, processors)
    _worker = Worker(model, source, options)


def _compute(task: Task) -> Computed:
    assert _worker is not None
    found: list[Computed] = []
    _worker([task], found.append)
    return found[0]
