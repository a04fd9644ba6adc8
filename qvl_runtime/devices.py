"""Choosing a backend by name."""

from __future__ import annotations

import os
import sys

from qvl_kernels.ops import DeviceError, Ops
from qvl_runtime.errors import QvlError

DEVICES = ("auto", "cpu", "cuda", "reference")


def make_ops(device: str, activations: str = "auto") -> Ops:
    """The backend `device` names; "auto" is a usable GPU, or else the CPU, and says why on standard error.

    Raises
    ------
    QvlError
        For another name.
    DeviceError
        When "cuda" is asked for and there is no usable GPU.
    """
    _known(device)
    if device == "reference":
        from qvl_kernels.reference import ReferenceOps

        return ReferenceOps()
    if device in ("auto", "cuda"):
        from qvl_kernels import gpu

        usable, reason = gpu.available()
        if usable:
            return gpu.CudaOps()
        if device == "cuda":
            raise DeviceError(reason)
        if not gpu.absent():
            print(f"qvl: no usable GPU ({reason}); running on the CPU", file=sys.stderr)
    from qvl_kernels.cpu import CpuOps

    return CpuOps(activations=activations)


def device_memory(device: str) -> tuple[str, int | None]:
    """The device a name stands for ("cpu", or the name of a GPU), and its free bytes where that is known.

    Raises
    ------
    QvlError, DeviceError
        As `make_ops`.
    """
    _known(device)
    if device in ("auto", "cuda"):
        from qvl_kernels import gpu

        usable, reason = gpu.available()
        if usable:
            from qvl_kernels.gpu.driver import Driver

            return reason, Driver().memory()[0]
        if device == "cuda":
            raise DeviceError(reason)
    return "cpu", free_memory()


def free_memory() -> int | None:
    """Bytes of main memory a program could still take, or None where the system does not tell.

    Memory that holds files, such as a mapped blob, counts as free: it is given back when asked for.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _known(device: str) -> None:
    if device not in DEVICES:
        raise QvlError(f"device {device!r} is unknown; choose one of {', '.join(DEVICES)}")
