"""Reading files that may be hostile, and what goes wrong in writing others."""
