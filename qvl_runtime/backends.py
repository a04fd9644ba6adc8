"""Choosing a backend by name."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from qvl_kernels.control_group import available_memory
from qvl_kernels.ops import PRECISIONS, DeviceError, Ops
from qvl_runtime.blob import Blob
from qvl_runtime.budget import VISION_PARTS, budget
from qvl_runtime.errors import QvlError

if TYPE_CHECKING:
    from qvl_kernels.cpu import CpuOps

USUAL_CONTEXT = 2048
"""Tokens for which a GPU must have memory: a picture, a question, and a long answer."""
TUNED_BYTES = 1 << 30
"""Bytes of weights from which on a measurement of the CPU pays."""

log = logging.getLogger(__name__)

DEVICES = ("auto", "cpu", "cuda", "reference")


def check_device(device: str) -> None:
    """Raise a QvlError for a device name that is unknown."""
    if device not in DEVICES:
        another = re.fullmatch("cuda:([0-9]+)", str(device))
        remedy = f"; for that GPU set CUDA_VISIBLE_DEVICES={another[1]} and use cuda" if another else ""
        raise QvlError(f"device {device!r} is unknown; choose one of {', '.join(DEVICES)}{remedy}")


def backend(device: str) -> tuple[str, str]:
    """Resolve a device name to a backend ("cpu", "cuda" or "reference"), and the GPU's name or why none is usable.

    Raises
    ------
    QvlError
        For an unknown name.
    DeviceError
        If "cuda" is requested and there is no usable GPU.
    """
    check_device(device)
    if device in ("cpu", "reference"):
        return device, ""
    from qvl_kernels import gpu

    usable, reason = gpu.available()
    if device == "cuda" and not usable:
        raise DeviceError(reason)
    return "cuda" if usable else "cpu", reason


def make_ops(device: str, activations: str = "auto", progress: Callable[[int], None] = lambda nbytes: None) -> Ops:
    """Create the backend of a device. "auto" prefers a usable GPU; if there is none, the reason is logged as a warning.

    `progress` is called with the bytes of every upload to a GPU.

    Raises
    ------
    QvlError
        For an unknown name, or unknown `activations`, also where they have no effect.
    DeviceError
        If "cuda" is requested and there is no usable GPU, or an environment variable has an invalid value.
    """
    if activations not in PRECISIONS:
        raise QvlError(f"activations {activations!r} are unknown; choose one of {', '.join(PRECISIONS)}")
    name, reason = backend(device)
    if name == "reference":
        from qvl_kernels.reference import ReferenceOps

        return ReferenceOps()
    if name == "cuda":
        from qvl_kernels import gpu

        try:
            return gpu.CudaOps(progress=progress)
        except DeviceError as error:
            if device == "cuda":
                raise
            reason = str(error)
    if device == "auto":
        from qvl_kernels import gpu

        if not gpu.absent():
            log.warning("qvl: no usable GPU (%s); running on the CPU", reason)
    from qvl_kernels.cpu import CpuOps

    return CpuOps(activations=activations)


def tune(ops: Ops, blob: Blob) -> None:
    """Let the CPU's kernels be measured once on this machine, if the file is so large that its answers gain by it.

    That takes up to two seconds, which a small model's first answer must not wait for.

    Raises
    ------
    DeviceError
        ``QVL_TUNE`` is invalid.
    """
    if ops.name == "cpu" and sum(blob.part_sizes().values()) >= TUNED_BYTES:
        from qvl_kernels.cpu import tuning

        tuning.tune_once(cast("CpuOps", ops))


def check_fit(ops: Ops, blob: Blob, context: int | None, kv_cache: str, *, vision: bool) -> None:
    """Check before loading that a GPU has enough memory for a model. Other devices are not checked.

    Parameters
    ----------
    context : int, optional
        Tokens to reserve memory for; by default 2048, or the model's window if that is shorter.
    vision : bool
        Whether the vision part is loaded on the same device.

    Raises
    ------
    DeviceError
        If it does not fit; the message has all sizes, and what would fit.
    """
    if ops.name != "cuda":
        return
    from qvl_kernels import gpu

    tokens = min(context or USUAL_CONTEXT, blob.config.max_position_embeddings)
    needed, int8 = (budget(blob, tokens, dtype, "cuda") for dtype in (kv_cache, "int8"))
    seeing = sum(needed.parts.get(part, 0) for part in VISION_PARTS)
    gpu.plan(
        needed.weights - (0 if vision else seeing),
        needed.cache,
        needed.workspace,
        cast("gpu.CudaOps", ops).driver.memory()[0],
        int8_cache_bytes=None if kv_cache == "int8" else int8.cache,
        context=tokens,
        vision_bytes=seeing if vision else 0,
    )


def gpu_facts() -> dict[str, str]:
    """Describe the GPU that "cuda" would use; see `qvl_kernels.gpu.facts`."""
    from qvl_kernels import gpu

    return gpu.facts()


def device_memory(device: str) -> tuple[str, str, int | None]:
    """Return the backend of a device name, its label ("cpu", or the GPU's name), and its free bytes or None.

    Raises
    ------
    QvlError, DeviceError
        As for `backend`.
    """
    name, label = backend(device)
    if name == "cuda":
        from qvl_kernels.gpu.driver import Driver

        return name, label, Driver().memory()[0]
    return name, name, free_memory()


def free_bytes(ops: Ops, blob: Blob) -> int:
    """Return the bytes that remain free on the device of a loaded model, or 0 if unknown.

    The system counts the pages of the mapped model file as free; they are subtracted.
    """
    if ops.name == "cuda":
        from qvl_kernels import gpu

        return cast("gpu.CudaOps", ops).driver.memory()[0]
    free = free_memory()
    return 0 if free is None else max(0, free - sum(blob.part_sizes().values()))


def free_memory() -> int | None:
    """Return the available bytes of main memory, or None if unknown.

    Cached files, such as a mapped blob, count as available. A container's limit counts.
    """
    found = (_machine_memory(), available_memory())
    return min((size for size in found if size is not None), default=None)


def _machine_memory() -> int | None:
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
