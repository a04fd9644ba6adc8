"""Sizes of the processor's caches, as the system tells them: block sizes follow from them, but no result does."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from pathlib import Path

from qvl_kernels.cpu.processors import parse_list

SYSTEM = Path("/sys/devices/system/cpu")

LEVEL2, LEVEL3 = 512 << 10, 32 << 20
"""Bytes where the system does not say."""
SMALLEST_LEVEL2, LARGEST_LEVEL2 = 256 << 10, 2 << 20
LARGEST_LEVEL3 = 96 << 20
"""Limits to what is believed: a virtual machine may name sizes that no processor has."""


@functools.cache
def level2(system: Path = SYSTEM) -> int:
    """Return the bytes of the L2 cache that a thread has to itself, 256 KB to 2 MB."""
    size, sharing = _of_macos() if sys.platform == "darwin" else _of_linux(system, 2)
    return min(max(size // sharing if size else LEVEL2, SMALLEST_LEVEL2), LARGEST_LEVEL2)


@functools.cache
def level3(system: Path = SYSTEM) -> int:
    """Return the bytes of the L3 cache, 32 to 96 MB: the smaller is also for an unknown one."""
    return min(max(_of_linux(system, 3)[0], LEVEL3), LARGEST_LEVEL3)


def _of_linux(system: Path, level: int) -> tuple[int, int]:
    """Return a cache's bytes, and the processors available to this process that share it; 0 and 1 if unknown."""
    try:
        mine = os.sched_getaffinity(0)
        for folder in (system / f"cpu{min(mine)}" / "cache").glob("index*"):
            level_text, kind = ((folder / name).read_text().strip() for name in ("level", "type"))
            size = re.fullmatch(r"([0-9]{1,7})K", (folder / "size").read_text().strip())
            if level_text == str(level) and kind != "Instruction" and size:
                shared = mine & parse_list((folder / "shared_cpu_list").read_text())
                return int(size[1]) << 10, max(1, len(shared))
    except (AttributeError, OSError, ValueError):
        pass
    return 0, 1


def _of_macos() -> tuple[int, int]:
    """Return the bytes of a performance core's L2 cache, and the cores that share it; 0 and 1 if unknown."""
    size, sharing = (_number_of_macos(f"hw.perflevel0.{name}") for name in ("l2cachesize", "cpusperl2"))
    return max(0, size), max(1, sharing)


def _number_of_macos(name: str) -> int:
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return 0 if failed else value.value
