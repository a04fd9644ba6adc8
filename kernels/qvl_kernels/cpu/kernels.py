"""The modules that hold the kernels."""

NAMES = (
    "attention_int16", "attention_prefill", "attention_row", "attention_group", "gemv", "half", "gemm", "gemm_pack",
    "quantize", "cached_attention", "elementwise", "sync", "roofline",
)  # fmt: skip
"""What takes longest to compile is first, so that the processors finish together."""
MODULES = tuple(f"qvl_kernels.cpu.{name}" for name in NAMES)
