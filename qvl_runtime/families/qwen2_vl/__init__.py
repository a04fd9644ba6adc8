"""Qwen2-VL (2024), and what it shares with Qwen2.5-VL and Qwen3-VL."""
