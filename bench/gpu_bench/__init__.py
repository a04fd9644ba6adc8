"""Sections of ``bench/gpu.py``. Each takes nothing, prints a table, and returns what it found as plain data."""
