"""The processors that threads are for: all but the slow ones of a hybrid machine."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path

from qvl_kernels.control_group import processor_limit

SYSTEM = Path("/sys/devices")

SLOW = 0.6
"""Processors with less than this share of the largest capacity are slow: efficiency cores have 0.3 to 0.55 of it, the
middle cores of a phone 0.7 or more."""


def performance_processors(system: Path = SYSTEM) -> int:
    """Return the number of processors available to this process, without efficiency cores if there are others.

    Linux names the capacity of each processor (`cpu_capacity`), or those of Intel's performance cores; macOS has their
    number. Elsewhere all count as alike. A container's limit counts in whole processors: threads that share less wait
    for one another.
    """
    if sys.platform == "darwin":
        return _performance_processors_of_macos() or os.cpu_count() or 1
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    mine = os.sched_getaffinity(0)
    count = len(mine & (_large(mine, system) or _intel(system))) or len(mine)
    limit = processor_limit()
    return count if limit is None else max(1, min(count, int(limit)))


def _large(mine: set[int], system: Path) -> set[int]:
    """Return the processors of large capacity; none if the system does not say."""
    try:
        files = {n: system / "system" / "cpu" / f"cpu{n}" / "cpu_capacity" for n in mine}
        capacity = {n: int(file.read_text()) for n, file in files.items()}
    except (OSError, ValueError):
        return set()
    return {n for n in mine if capacity[n] >= SLOW * max(capacity.values())}


def _intel(system: Path) -> set[int]:
    """Return the performance cores of a hybrid processor of Intel; none of another."""
    try:
        return parse_list((system / "cpu_core" / "cpus").read_text())
    except (OSError, ValueError):
        return set()


def parse_list(text: str) -> set[int]:
    """Parse Linux' list of processors, such as ``0-3,8``; ValueError if it is none, or has one above 99999."""
    if not re.fullmatch(r"([0-9]{1,5}(-[0-9]{1,5})?(,|$))*", text.strip()):
        raise ValueError(f"{text[:80]!r} is no list of processors")
    found: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _performance_processors_of_macos() -> int:
    value, size = ctypes.c_int(0), ctypes.c_size_t(4)
    find = ctypes.CDLL(None).sysctlbyname
    failed = find(b"hw.perflevel0.logicalcpu", ctypes.byref(value), ctypes.byref(size), None, 0)
    return 0 if failed else value.value
