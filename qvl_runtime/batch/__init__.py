"""Jobs over many rows: `qvl batch`.

The input is split into blocks of equal length. Each block becomes one output file, written atomically. The existing
files are the only record of progress: a job that was killed resumes, and its output is the same, byte for byte.
"""
