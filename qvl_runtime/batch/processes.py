"""Computing a job on one machine: one process per memory node, or several for a small model."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path

from qvl_kernels.control_group import processor_limit
from qvl_kernels.cpu.processors import parse_list
from qvl_runtime.batch.job import Computed, Task, Worker
from qvl_runtime.batch.options import ModelSpec, Options
from qvl_runtime.batch.records import Record
from qvl_runtime.batch.rows import Source
from qvl_runtime.errors import QvlError

NODES = Path("/sys/devices/system/node")

SMALL = 32 << 20
"""Size of a model that stays in a processor's cache. Its kernels are too short for threads to share, and Python between
them takes as long: a process a processor computes more rows a second than one for all."""

WORTH = 64
"""Least number of rows of a job for each such process, which takes a second to start."""


def memory_nodes(folder: Path = NODES) -> list[list[int]]:
    """Return the usable processors of each memory node; a single list if the nodes are unknown."""
    if not hasattr(os, "sched_getaffinity"):
        return [list(range(os.cpu_count() or 1))]
    mine = os.sched_getaffinity(0)
    nodes = []
    for entry in sorted(folder.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        found = parse_list((entry / "cpulist").read_text())
        if shared := sorted(mine & found):
            nodes.append(shared)
    return nodes or [sorted(mine)]


def on_this_machine(
    model: ModelSpec,
    source: Source,
    options: Options,
    on_record: Callable[[Record], None],
    tasks: Sequence[Task],
    on_computed: Callable[[Computed], None],
) -> None:
    """Compute tasks on the CPU, in this process if one is enough; `on_record` is called in that case only.

    A container that may use fewer processors than it sees has one process: others may be pinned to the same ones.
    """
    model = ModelSpec(model.path, model.load | {"device": "cpu"})  # so that no process looks for a GPU again
    nodes, each = memory_nodes(), 1
    limit = processor_limit()
    if limit is not None and limit < sum(map(len, nodes)):
        nodes = nodes[:1]
    elif model.path.stat().st_size <= SMALL:
        rows = sum(len(task.rows) for task in tasks)
        each = max(1, min(len(nodes[0]), rows // WORTH)) if options.max_batch > 1 else 1
    processes = [node[i::each] for node in nodes for i in range(min(each, len(node)))]
    if len(processes) == 1:
        Worker(model, source, options)(tasks, on_computed, on_record)
        return
    in_processes(processes, model, source, options, tasks, on_computed)


def in_processes(
    processes: Sequence[Sequence[int]],
    model: ModelSpec,
    source: Source,
    options: Options,
    tasks: Sequence[Task],
    on_computed: Callable[[Computed], None],
) -> None:
    """Compute tasks in processes, each pinned to its processors. A process asks for a task when it has room for it.

    Raises
    ------
    QvlError
        If a process ends early, usually for lack of memory.
    """
    context = multiprocessing.get_context("spawn")
    left, missing = list(reversed(tasks)), len(tasks)
    children, connections = [], []
    try:
        for processors in processes:
            mine, theirs = context.Pipe()
            arguments = (theirs, list(processors), model, source, options)
            child = context.Process(target=_work, args=arguments, daemon=True)
            with _without_interrupts():
                child.start()
                children.append(child)  # one that has not begun cannot be ended
            theirs.close()  # the child has the only one: its end is an `EOFError` here
            connections.append(mine)
        while missing:
            for connection in wait(connections):
                assert isinstance(connection, Connection)
                told = connection.recv()
                if isinstance(told, Exception):
                    raise told
                if told is None:
                    connection.send(left.pop() if left else None)
                else:
                    missing -= 1
                    on_computed(told)
    except (EOFError, ConnectionError):
        raise QvlError("a process of the job ended early; is there enough memory? Run again to go on") from None
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.join()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Block Ctrl-C, also in processes that start meanwhile, which would end with a traceback each."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # its start, which that of a first process includes, would unblock it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, processors: list[int], model: ModelSpec, source: Source, options: Options) -> None:
    """Compute tasks in a child, until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the job
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, processors)  # before any thread starts: threads inherit it

    def given() -> Iterator[Task]:
        while True:
            connection.send(None)
            task = connection.recv()
            if task is None:
                return
            yield task

    try:
        Worker(model, source, options)(given(), connection.send)
        connection.recv()
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        connection.send(error)
