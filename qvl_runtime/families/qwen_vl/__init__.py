"""Qwen-VL, Qwen-VL-Chat and Qwen-7B (2023)."""
