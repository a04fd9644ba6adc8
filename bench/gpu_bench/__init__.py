"""Sections of ``bench/gpu.py``. Each prints a table and returns its results as JSON types."""
