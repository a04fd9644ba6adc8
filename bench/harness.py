"""What the scripts of this folder share: options, timing, rows of a table, and the JSON document."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import numpy as np

from qvl_runtime.benchmark import machine


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_timing(options: argparse.ArgumentParser, rounds: int | None = None) -> None:
    """Add ``--realtime`` and, with a default number, ``--rounds``."""
    if rounds is not None:
        options.add_argument("--rounds", type=int, default=rounds)
    options.add_argument("--realtime", action="store_true", help="keep other programs off the processors (root)")


def take_processors() -> None:
    """Run this process's threads before those of all other programs (Linux, root); new threads inherit it."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setscheduler(int(thread), os.SCHED_RR, os.sched_param(1))


def seconds(call: Callable[[], object]) -> float:
    """Elapsed time of a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def busy_seconds() -> float:
    """CPU time of all programs since the system started (0 where it cannot be read)."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq = map(int, file.readline().split()[1:8])
    except OSError:
        return 0.0
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def interleave(calls: dict[str, Callable[[], float | None]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, all calls in turns; a call that returns a number has timed itself.

    ``others`` is the number of processors that other programs kept busy meanwhile: on a shared machine it says how
    far the figures can be trusted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    busy, own_busy, since = busy_seconds(), time.process_time(), time.perf_counter()
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            own = call()
            times[name].append(time.perf_counter() - begin if own is None else own)
    others = (busy_seconds() - busy - (time.process_time() - own_busy)) / (time.perf_counter() - since)
    return {"others": max(others, 0.0), **{name: float(np.median(values)) for name, values in times.items()}}


def print_row(row: dict[str, Any]) -> None:
    """Print a row of the table as names and values."""
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def print_document(**values: Any) -> None:
    """Print the last line: a JSON object with the date, the machine and `values`."""
    print(json.dumps({"date": date.today().isoformat(), "machine": machine(), **values}))
