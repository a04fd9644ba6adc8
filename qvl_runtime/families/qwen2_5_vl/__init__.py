"""Qwen2.5-VL (2025): Qwen2-VL with windowed attention in the ViT."""
