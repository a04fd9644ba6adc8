"""Jobs over many rows: `qvl batch`.

The input is cut into blocks of equal length, and each becomes one file of the output, written aside and renamed. That
the file is there is the only record of what is done: a job that was killed goes on where it was, and ends with the same
bytes as one that ran through.
"""
