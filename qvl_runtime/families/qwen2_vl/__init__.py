"""Qwen2-VL (2024), and the code shared with Qwen2.5-VL and Qwen3-VL."""
