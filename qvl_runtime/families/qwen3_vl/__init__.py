"""Qwen3-VL (2025): Qwen2-VL with learned ViT positions, deepstack features, and normalized queries and keys."""
