"""Files: reading what may be hostile, the blob, and replacing a file as a whole."""
