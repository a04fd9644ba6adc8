"""Starting the threads that compute, on the CPU or in a conversion."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from qvl_kernels.ops import DeviceError


def start_thread(target: Callable[..., Any], args: tuple[Any, ...], name: str) -> threading.Thread:
    """Start a thread that does not keep the process alive.

    Raises
    ------
    DeviceError
        If the system grants no further thread.
    """
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as e:
        raise no_thread(e) from None
    return thread


def no_thread(error: RuntimeError) -> DeviceError:
    """Return the error for a thread that the system does not grant."""
    return DeviceError(
        f"no thread can be started ({error}): raise the limits of memory and of processes (ulimit -v, ulimit -u)"
    )
