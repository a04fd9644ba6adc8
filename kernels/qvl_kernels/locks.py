"""Locks that are free in a forked child, and locks of files against other processes."""

from __future__ import annotations

import os
import threading
import weakref

_locks: weakref.WeakSet[threading.RLock] = weakref.WeakSet()


def make_lock() -> threading.RLock:
    """Create a re-entrant lock that is free in a forked child, unless the forking thread holds it.

    Other threads do not exist in the child and could never release it. The guarded data must therefore be valid at
    every point of a critical section.
    """
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def lock_file(descriptor: int) -> bool:
    """Lock an open file or folder until it is closed; False if another process has locked it.

    True also where there are no locks: on Windows, and on file systems without them.
    """
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def _free_all() -> None:
    for lock in _locks:
        if not lock._is_owned():  # type: ignore[attr-defined]
            lock._at_fork_reinit()  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_all)
