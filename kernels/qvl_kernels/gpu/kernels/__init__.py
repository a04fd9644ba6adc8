"""Triton sources, one file a subject. `qvl_kernels.gpu.signatures` lists their arguments and variants."""
