"""Limits of the Linux control groups of this process, such as those of its container: processors and memory.

A group's limits also hold for the groups below it. Both versions of the interface are read: version 2 has one
hierarchy, version 1 one for each kind of limit. A container may see its own group as the root, or know only the name
that its group has outside of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

OWN = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")


def processor_limit(own: Path = OWN, root: Path = ROOT) -> float | None:
    """Return the number of processors whose time the groups may use, such as 1.5; None without a limit."""
    limits = []
    for group in _groups("cpu", own, root):
        try:
            if (group / "cpu.max").exists():
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota, period = (_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            if quota not in ("max", "-1"):
                limits.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(limits, default=None)


def available_memory(own: Path = OWN, root: Path = ROOT) -> int | None:
    """Return the bytes that the groups may still use; None without a limit. Cached files count as available."""
    left = []
    for group in _groups("memory", own, root):
        try:
            if (group / "memory.max").exists():
                limit, used, prefix = _text(group / "memory.max"), _text(group / "memory.current"), ""
            else:
                limit, used = (_text(group / f"memory.{name}_in_bytes") for name in ("limit", "usage"))
                prefix = "total_"
            if limit == "max":
                continue
            parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = sum(int(parts[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
            left.append(max(0, int(limit) - max(0, int(used) - cached)))
        except (OSError, ValueError, KeyError):
            continue
    return min(left, default=None)


def _text(path: Path) -> str:
    return path.read_text().strip()


def _groups(controller: str, own: Path, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups that have this controller, and of those above them."""
    try:
        lines = own.read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        controllers, _, name = line.partition(":")[2].partition(":")
        if controllers == "":
            base = root
        elif controller in controllers.split(","):
            base = root / controller
        else:
            continue
        group = base / name.lstrip("/")
        yield group
        if group != base:
            yield from (folder for folder in group.parents if folder.is_relative_to(base))
