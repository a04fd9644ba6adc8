"""Kernels for quantized transformers: packed matrices and the operations of a model.

This package deals with arrays only; it does not depend on models or files.
"""
