"""Choosing a backend by name."""

from __future__ import annotations

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
    if device not in DEVICES:
        raise QvlError(f"device {device!r} is unknown; choose one of {', '.join(DEVICES)}")
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
