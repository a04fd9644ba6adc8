"""Kernels for quantized transformers: packed matrices and the operations a model is made of.

Knows arrays and numbers; no model, no file.
"""
