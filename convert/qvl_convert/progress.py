"""What long runs report, to show a progress bar."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Receives the name of what is done, and how much is done of how much: bytes of a file, or conversations."""
Report = Callable[[float, float], None]
"""Receives the work of a calibration that is done, and the whole work."""
