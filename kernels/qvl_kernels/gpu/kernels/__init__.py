"""Triton sources, one file per subject. `qvl_kernels.gpu.signatures` lists arguments and variants."""
