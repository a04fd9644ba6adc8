"""The GPU backend: Triton kernels compiled ahead of time and launched with cuda-core, without PyTorch and Triton.

signatures.py  kernels/  build.py     the kernels: signatures, sources, compilation
driver.py                             the only interface to the NVIDIA driver
arrays.py  memory.py  weights.py  cache.py     data on the device
launcher.py  graph.py  loader.py  bundle.py     compiled kernels, and their execution
tiles.py  ops.py                      the choice of a product's kernel, and the `Ops` protocol
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl_kernels.gpu.memory import plan
from qvl_kernels.gpu.sizes import SIZES
from qvl_kernels.ops import DeviceError

if TYPE_CHECKING:
    from qvl_kernels.gpu.ops import CudaOps


def available() -> tuple[bool, str]:
    """Return whether there is a usable GPU, and its name or the reason in one line."""
    from qvl_kernels.gpu import loader
    from qvl_kernels.gpu.driver import Driver

    try:
        driver = Driver()
        if loader.locate(driver.capability) is None:
            loader.check_compiler()
    except DeviceError as error:
        return False, str(error)
    return True, driver.name


def facts() -> dict[str, str]:
    """Describe the GPU: `gpu`, `capability`, CUDA version of the `driver`, and `kernels`, as text.

    Raises
    ------
    DeviceError
        If there is no usable GPU, or there are no kernels for it.
    """
    from qvl_kernels.gpu import loader
    from qvl_kernels.gpu.driver import Driver

    driver = Driver()
    architecture, kind = loader.choose(driver.capability)
    bundle = loader.locate(driver.capability)
    if bundle is None:
        loader.check_compiler()
    made = "to be compiled when first used" if bundle is None else f"from {bundle.path}"
    code = f"sm_{architecture}" if kind == "cubin" else f"PTX of sm_{architecture}, which the driver compiles"
    capability, version = (".".join(map(str, numbers)) for numbers in (driver.capability, driver.driver_version))
    return {"gpu": driver.name, "capability": capability, "driver": version, "kernels": f"{code}, {made}"}


def absent() -> bool:
    """Whether this computer has no NVIDIA driver, so that no GPU is expected."""
    import ctypes
    import sys

    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return True
    return False


def __getattr__(name: str) -> object:
    if name == "CudaOps":
        from qvl_kernels.gpu.ops import CudaOps

        return CudaOps
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["SIZES", "CudaOps", "absent", "available", "facts", "plan"]
