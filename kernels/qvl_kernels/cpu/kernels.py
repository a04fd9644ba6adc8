"""The modules that hold the kernels."""

NAMES = (
    "sync", "elementwise", "quantize", "gemv", "half", "cached_attention", "gemm", "gemm_pack", "attention_prefill",
    "attention_row", "attention_group", "attention_int16", "roofline",
)  # fmt: skip
MODULES = tuple(f"qvl_kernels.cpu.{name}" for name in NAMES)
