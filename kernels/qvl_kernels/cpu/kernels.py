"""The modules that hold the kernels."""

MODULES = tuple(f"qvl_kernels.cpu.{name}" for name in ("sync", "small", "quantize", "gemv", "half", "cached", "full"))
