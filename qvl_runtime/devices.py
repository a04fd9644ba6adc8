"""Choosing a backend by name."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable

from qvl_kernels.ops import DeviceError, Ops
from qvl_runtime.architecture import MatrixSpec, tensors
from qvl_runtime.blob import Blob
from qvl_runtime.budget import KV_CACHES, VISION_PARTS, workspace_bytes
from qvl_runtime.errors import QvlError

USUAL_CONTEXT = 2048
"""Tokens a GPU must have room for: a picture, a question, and a long answer."""

DEVICES = ("auto", "cpu", "cuda", "reference")


def make_ops(device: str, activations: str = "auto", progress: Callable[[int], None] = lambda nbytes: None) -> Ops:
    """The backend `device` names; "auto" is a usable GPU, or else the CPU, and says why on standard error.

    `progress` is told the bytes of every upload to a GPU.

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
            return gpu.CudaOps(progress=progress)
        if device == "cuda":
            raise DeviceError(reason)
        if not gpu.absent():
            print(f"qvl: no usable GPU ({reason}); running on the CPU", file=sys.stderr)
    from qvl_kernels.cpu import CpuOps

    return CpuOps(activations=activations)


def check_fit(ops: Ops, blob: Blob, context: int | None, kv_cache: str, *, vision: bool) -> None:
    """Make sure before loading that a GPU has room for a model; other devices are left to their system.

    Parameters
    ----------
    context : int, optional
        Tokens to make room for; 2048 if not given, or the model's window if that is shorter.
    vision : bool
        Whether the vision part goes to the same device.

    Raises
    ------
    DeviceError
        With all sizes, and what would fit.
    """
    if ops.name != "cuda":
        return
    from qvl_kernels import gpu

    c = blob.config
    tokens = min(context or USUAL_CONTEXT, c.max_position_embeddings)
    fp16, int8 = (
        gpu.cache_bytes(c.num_hidden_layers, c.num_attention_heads, c.head_dim, tokens, dtype) for dtype in KV_CACHES
    )
    sizes = _gpu_sizes(blob)
    seeing = sum(sizes.get(part, 0) for part in VISION_PARTS)
    gpu.plan(
        sum(sizes.values()) - (0 if vision else seeing),
        int8 if kv_cache == "int8" else fp16,
        workspace_bytes(c),
        ops.driver.memory()[0],
        int8_cache_bytes=None if kv_cache == "int8" else int8,
        context=tokens,
        vision_bytes=seeing if vision else 0,
    )


def _gpu_sizes(blob: Blob) -> dict[str, int]:
    """Bytes of the weights by part, as they lie on a GPU."""
    from qvl_kernels import gpu

    sizes: dict[str, int] = {}
    for spec in tensors(blob.config):
        if isinstance(spec, MatrixSpec):
            nbytes = gpu.device_bytes(spec.n, spec.k, *blob.bits(spec.name)) + (4 * spec.n if spec.bias else 0)
        else:
            nbytes = 4 * math.prod(spec.shape)
        sizes[spec.part] = sizes.get(spec.part, 0) + nbytes
    return sizes


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
