"""What a measurement on this machine chose for the kernels (`tuning`), kept in one file beside the compiled ones."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from qvl_kernels import cache_folder
from qvl_kernels.cpu import bundle, cache_sizes, features
from qvl_kernels.ops import DeviceError

AHEAD = (0, 1024, 2048, 4096)
"""Bytes of weights between a step of a product of a few rows and what it prefetches: the values to choose from."""
LARGEST_FILE = 4096


@dataclasses.dataclass(frozen=True)
class Choices:
    """Values that change the time of a product, and no result.

    Attributes
    ----------
    ahead : int
        One of `AHEAD`; 0 prefetches nothing.
    times : dict of int to float
        The median time of each of `AHEAD`, relative to the built-in one; empty if nothing was measured.
    """

    ahead: int
    times: dict[int, float] = dataclasses.field(default_factory=dict)


def built_in() -> Choices:
    """The choices without a measurement: chosen on Zen 3, and on Zen 4 for registers of 512 bits."""
    return Choices(0 if features.selected().lanes == 16 else 2048)


def wanted() -> bool:
    """Whether to measure, and to use what was measured: unless ``QVL_TUNE`` is 0.

    Raises
    ------
    DeviceError
        ``QVL_TUNE`` is something else than 0 or 1.
    """
    text = os.environ.get("QVL_TUNE", "")
    if text not in ("", "0", "1"):
        raise DeviceError(f"QVL_TUNE={text}: expected 0 or 1; unset QVL_TUNE")
    return text != "0"


@functools.cache
def key() -> str:
    """A hash of the kernels' sources and of what is known of this processor."""
    processor = (llvm.get_host_cpu_name(), cache_sizes.level2(), cache_sizes.level3())
    known = (bundle.source_hash(), bundle.machine(), features.selected().name, processor)
    return hashlib.sha256(repr(known).encode()).hexdigest()[:20]


def kept() -> Choices | None:
    """Return what an earlier run on this processor, of these kernels, has stored; None if there is no such file."""
    path = _path()
    file = cache_folder.open_private(path) if path else None
    if file is None:
        return None
    with file:
        return _parse(file.read(LARGEST_FILE))


def _parse(data: bytes) -> Choices | None:
    try:
        found: Any = json.loads(data)
        if found["key"] != key() or found["ahead"] not in AHEAD or type(found["ahead"]) is not int:
            return None
        times = {int(ahead): float(time) for ahead, time in found["times"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return Choices(found["ahead"], times)


def keep(choices: Choices) -> None:
    """Store choices for later runs, if there is a private folder."""
    path = _path()
    if path:
        data = json.dumps({"key": key(), **dataclasses.asdict(choices)})
        cache_folder.store(path, data.encode(), "what was measured", "measured")


def can_keep() -> bool:
    """Whether there is a folder for `keep`."""
    return not cache_folder.find().problem


def _path() -> Path | None:
    folder = cache_folder.find().path
    return folder and folder / f"cpu-choices-{key()}.json"
