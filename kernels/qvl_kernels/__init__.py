"""Kernels for quantized transformers: packed matrices and the operations of a model.

This package deals with arrays only; it does not depend on models or files.
"""

import os

# OpenBLAS' idle threads look for more work for 27 ms (2^26 cycles), on the cores that the next kernel wants. Numpy
# reads this when it is loaded.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
