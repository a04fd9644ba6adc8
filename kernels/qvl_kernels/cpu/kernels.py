"""The modules that hold the kernels."""

NAMES = (
    "sync", "small", "quantize", "gemv", "half", "cached", "gemm", "gemm_pack", "attention_prefill", "attention_row",
    "attention_group", "attention_int16", "limits",
)  # fmt: skip
MODULES = tuple(f"qvl_kernels.cpu.{name}" for name in NAMES)
