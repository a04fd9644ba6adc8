"""Converts a published checkpoint to a `.qvl` file."""
