"""Qwen3-VL (2025): Qwen2-VL with learned positions in the ViT, deepstack features, and normalized queries and keys."""
