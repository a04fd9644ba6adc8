"""Starting the threads that compute."""

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
        raise DeviceError(
            f"no thread can be started ({e}): raise the limits of memory and of processes (ulimit -v, ulimit -u)"
        ) from None
    return thread
