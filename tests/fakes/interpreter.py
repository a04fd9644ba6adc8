"""Runs recorded launches in Triton's interpreter, on host memory.

Needs TRITON_INTERPRET=1 in the environment before triton is imported.
"""

from __future__ import annotations

import importlib

import triton.runtime.interpreter as interpreter

from qvl_kernels.gpu import signatures

from .gpu import ARCHITECTURE, Launch

_DTYPES = {"fp16": "float16", "fp32": "float32", "i32": "int32", "i16": "int16", "i8": "int8", "u8": "uint8"}


def execute(launch: Launch) -> None:
    """Run every program of a launch."""
    family = signatures.KERNELS[launch.name.partition(".")[0]]
    module, function = family.source.split(".")
    kernel = getattr(importlib.import_module(f"qvl_kernels.gpu.kernels.{module}"), function)
    args = [
        _Pointer(launch.args[name], _DTYPES[kind[1:]]) if kind.startswith("*") else launch.args[name]
        for name, kind in signatures.types(launch.name).items()
    ]
    kernel[launch.grid](*args, **signatures.constants(launch.name, ARCHITECTURE))


class _Pointer:
    """What the interpreter asks of a tensor: an address it may read and write where it is."""

    def __init__(self, address: int, dtype: str):
        self.address, self.dtype = address, dtype

    def data_ptr(self):
        return self.address

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def copy_(self, other):
        pass

    def new_empty(self, size, device=None):
        return _Pointer(self.address, self.dtype)

    def set_(self, storage, offset, size, stride):
        return self

    def storage_offset(self):
        return 0

    def size(self):
        return (1,)

    def stride(self):
        return (1,)


def _mend_for_numpy_2_4() -> None:
    """triton 3.6 takes int() of an array of one element, which numpy refuses since 2.4."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


_mend_for_numpy_2_4()
