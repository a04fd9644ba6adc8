"""The NVIDIA driver through cuda-core: the one place that talks to it.

`Driver` is the seam: the modules above it use nothing else, and a test can put another object in its place.
Memory comes from plain `cuMemAlloc`, whose sizes are exactly those asked for, so that a plan made beforehand holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import inspect
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from qvl_kernels.ops import DeviceError

MINIMUM_DRIVER = (12, 0)
"""The CUDA version a driver must support: that of the format of the kernels we ship."""

MINIMUM_CAPABILITY = (7, 5)
"""Turing: the oldest GPUs with the matrix instructions the kernels use."""

STICKY = (700, 702, 709, 714, 715, 716, 717, 718, 719)
"""Errors after which the driver refuses everything in this process: faults of kernels (CUDA driver API, CUresult)."""

STATIC_SHARED_LIMIT = 48 * 1024
"""Shared memory a kernel may use without asking (CUDA C programming guide, dynamic shared memory)."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel on the device: what a launch needs to know of it."""

    handle: Any
    name: str
    threads: int
    shared: int


class Mark:
    """A point in a stream, as `Driver.mark` makes it."""

    __slots__ = ("__weakref__", "event")

    def __init__(self, event: Any, destroy: Callable[[Any], Any]):
        self.event = event
        weakref.finalize(self, destroy, event).atexit = False


class Graph:
    """A captured graph, ready to be launched."""

    __slots__ = ("__weakref__", "handle")

    def __init__(self, handle: Any, destroy: Callable[[Any], Any]):
        self.handle = handle
        weakref.finalize(self, destroy, handle).atexit = False


class _EntryPoints:
    """cuda-bindings' functions, where one that the installed driver lacks is an error like the others."""

    def __init__(self, module: Any):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if inspect.isclass(found):
            return found

        @functools.wraps(found)
        def call(*arguments: Any) -> Any:
            try:
                return found(*arguments)
            except RuntimeError as e:  # cuda-bindings' own class for it is private
                raise DeviceError(f"the NVIDIA driver has no {name} ({e}): update it, or use the CPU") from e

        setattr(self, name, call)
        return call


class Driver:
    """One GPU, one stream.

    Attributes
    ----------
    name : str
        As the driver calls the GPU.
    capability : tuple of int
        Compute capability, (major, minor).
    shared_limit : int
        Most bytes of shared memory a block may use.
    multiprocessors : int

    Raises
    ------
    DeviceError
        There is no driver, no GPU, or one that is too old; or the packages that talk to it are not installed.
    """

    name = "NVIDIA driver"

    def __init__(self, index: int = 0):
        module, core = _import()
        self._api = api = _EntryPoints(module)
        try:
            status = api.cuInit(0)[0]
        except RuntimeError as e:  # cuda-pathfinder's DynamicLibNotFoundError
            raise DeviceError("no NVIDIA driver found: install one from nvidia.com/drivers, or use the CPU") from e
        if status != 0:
            raise DeviceError(f"no usable NVIDIA GPU: the driver says {self._error(status)}; use the CPU")
        self.driver_version = divmod(self._ok(api.cuDriverGetVersion()) // 10, 100)
        if self.driver_version < MINIMUM_DRIVER:
            raise DeviceError(
                f"the NVIDIA driver supports CUDA {_dots(self.driver_version)} and {_dots(MINIMUM_DRIVER)} is needed: "
                "update it from nvidia.com/drivers, or use the CPU"
            )
        if index >= self._ok(api.cuDeviceGetCount()):
            raise DeviceError("no NVIDIA GPU found: use the CPU")
        self._device = core.Device(index)
        self.name = str(self._device.name)
        major, minor = self._device.compute_capability
        self.capability = int(major), int(minor)
        if self.capability < MINIMUM_CAPABILITY:
            raise DeviceError(
                f"{self.name} has compute capability {_dots(self.capability)} and {_dots(MINIMUM_CAPABILITY)} "
                "(Turing, 2018) is the oldest supported: use the CPU"
            )
        self._core = core
        self._context, self._pid = 0, os.getpid()
        with self._errors("cannot be used"):
            self._enter()
            self._stream = self._device.create_stream()
        self._raw_stream = api.CUstream(int(self._stream.handle))
        properties = self._device.properties
        self.shared_limit = properties.max_shared_memory_per_block_optin
        self.multiprocessors = properties.multiprocessor_count
        self._configs: dict[tuple, Any] = {}
        self._capturing = False
        self._freed: list[int] = []

    # memory

    def memory(self) -> tuple[int, int]:
        """Bytes free and bytes there are."""
        self._enter()
        free, total = self._ok(self._api.cuMemGetInfo())
        return int(free), int(total)

    def allocate(self, nbytes: int) -> int:
        """The address of `nbytes` bytes of device memory."""
        self._enter()
        status, address = self._api.cuMemAlloc(nbytes)
        if status == self._api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise DeviceError(
                f"{self.name} is out of memory: {nbytes / 1e9:.2f} GB asked for, {self.memory()[0] / 1e9:.2f} GB free; "
                "close other programs that use it, or take an int8 KV cache or a shorter context"
            )
        return int(self._ok((status, address)))

    def free(self, address: int) -> None:
        """Give memory back; waits until nothing uses it. A forked process has none to give."""
        if self._pid != os.getpid():
            return
        self._enter()
        if self._capturing:  # the collector does not wait, and a capture does not survive it
            self._freed.append(address)
        else:
            self._ok(self._api.cuMemFree(address))

    def pinned(self, nbytes: int) -> np.ndarray:
        """Page-locked host memory, uint8 [nbytes], which the device reads while the host goes on. Never freed."""
        self._enter()
        address = int(self._ok(self._api.cuMemHostAlloc(nbytes, 0)))
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def to_device(self, address: int, values: np.ndarray) -> None:
        """Copy contiguous `values` to the device, in order with everything else.

        They may be changed or go away only after `wait` on a later `mark`, or `synchronize`: some systems let the GPU
        read pageable memory, too, in its own time.
        """
        self._enter()
        self._ok(self._api.cuMemcpyHtoDAsync(address, values.ctypes.data, values.nbytes, self._raw_stream))

    def to_host(self, target: np.ndarray, address: int) -> None:
        """Fill contiguous `target` from the device; returns when it is there."""
        self._enter()
        self._ok(self._api.cuMemcpyDtoHAsync(target.ctypes.data, address, target.nbytes, self._raw_stream))
        self.synchronize()

    def move(self, target: int, source: int, nbytes: int) -> None:
        """Copy within the device."""
        self._enter()
        self._ok(self._api.cuMemcpyDtoDAsync(target, source, nbytes, self._raw_stream))

    def fill(self, address: int, value: int, nbytes: int) -> None:
        """Set every byte."""
        self._enter()
        self._ok(self._api.cuMemsetD8Async(address, value, nbytes, self._raw_stream))

    # kernels

    def load(self, image: bytes, kind: str, name: str, threads: int, shared: int) -> Kernel:
        """Load kernel `name` from a cubin or from PTX (`kind`), which the driver compiles."""
        self._enter()
        with self._errors(f"does not take kernel {name}"):
            if kind == "cubin":
                code = self._core.ObjectCode.from_cubin(image)
            else:
                code = self._core.ObjectCode.from_ptx(image.rstrip(b"\0") + b"\0")
            handle = code.get_kernel(name)
        if shared > STATIC_SHARED_LIMIT:
            attribute = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            kernel = self._api.CUkernel(int(handle.handle))
            device = self._ok(self._api.cuDeviceGet(self._device.device_id))
            self._ok(self._api.cuKernelSetAttribute(attribute, shared, kernel, device))
        # a kernel that is first touched while a stream is captured cannot be loaded then
        self._ok(self._api.cuKernelGetFunction(self._api.CUkernel(int(handle.handle))))
        return Kernel(handle, name, threads, shared)

    def spilled(self, kernel: Kernel) -> int:
        """Bytes a thread keeps in memory because it has too few registers."""
        attribute = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
        device = self._ok(self._api.cuDeviceGet(self._device.device_id))
        handle = self._api.CUkernel(int(kernel.handle.handle))
        return int(self._ok(self._api.cuKernelGetAttribute(attribute, handle, device)))

    def launch(self, kernel: Kernel, grid: tuple[int, int, int], args: Sequence[np.generic]) -> None:
        """Run `kernel` over `grid`; `args` are numpy scalars of the widths it declares, pointers uint64."""
        self._enter()
        key = (grid, kernel.threads, kernel.shared)
        config = self._configs.get(key)
        if config is None:
            config = self._core.LaunchConfig(grid=grid, block=(kernel.threads, 1, 1), shmem_size=kernel.shared)
            self._configs[key] = config
        with self._errors(f"does not run kernel {kernel.name}"):
            self._core.launch(self._stream, config, kernel.handle, *args)

    # order and time

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._enter()
        self._ok(self._api.cuStreamSynchronize(self._raw_stream))

    def mark(self) -> Mark:
        """A point in the stream."""
        self._enter()
        mark = Mark(self._ok(self._api.cuEventCreate(0)), self._api.cuEventDestroy)
        self._ok(self._api.cuEventRecord(mark.event, self._raw_stream))
        return mark

    def wait(self, mark: Mark) -> None:
        """Wait until the stream has passed `mark`."""
        self._enter()
        self._ok(self._api.cuEventSynchronize(mark.event))

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Time the device took from one mark to another."""
        self.wait(end)
        milliseconds = ctypes.c_float()
        status = self._elapsed(ctypes.byref(milliseconds), int(begin.event), int(end.event))
        self._ok((self._api.CUresult(status),))
        return milliseconds.value * 1e-3

    @functools.cached_property
    def _elapsed(self) -> Callable:
        """`cuEventElapsedTime` as CUDA 12.0 has it: what cuda-bindings 13 calls came with 12.8."""
        address, _ = self._ok(self._api.cuGetProcAddress(b"cuEventElapsedTime", 12000, 0))
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_float), ctypes.c_void_p, ctypes.c_void_p)
        return kind(int(address))

    def capture(self, work: Callable[[], None]) -> Graph:
        """A graph of what `work` asks of the stream, which is not carried out.

        Plain driver calls: cuda-core's graphs need entry points that came with CUDA 12.3.
        """
        self._enter()
        api = self._api
        self._ok(api.cuStreamBeginCapture(self._raw_stream, api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))
        self._capturing = True
        try:
            work()
        finally:
            recorded = api.cuStreamEndCapture(self._raw_stream)
            self._capturing = False
            while self._freed:
                self.free(self._freed.pop())
        graph = self._ok(recorded)
        try:
            return Graph(self._ok(api.cuGraphInstantiate(graph, 0)), api.cuGraphExecDestroy)
        finally:
            api.cuGraphDestroy(graph)

    def replay(self, graph: Graph) -> None:
        """Carry out a captured graph."""
        self._enter()
        self._ok(self._api.cuGraphLaunch(graph.handle, self._raw_stream))

    def _enter(self) -> None:
        """Make the GPU current in this thread, where another library may have made another one current."""
        if self._pid != os.getpid():
            raise DeviceError(
                f"{self.name} cannot be used in a forked process: load the model there, or start it with 'spawn'"
            )
        if self._context == 0 or int(self._ok(self._api.cuCtxGetCurrent())) != self._context:
            self._device.set_current()
            self._context = int(self._ok(self._api.cuCtxGetCurrent()))

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """cuda-core's errors as ours."""
        try:
            yield
        except DeviceError:
            raise
        except Exception as e:
            raise DeviceError(f"{self.name} {what}: {str(e).partition(chr(10))[0]}") from e

    def _ok(self, result: tuple) -> Any:
        status, *values = result
        if status != 0:
            remedy = "; start the program again" if int(status) in STICKY else ""
            raise DeviceError(f"{self.name}: the driver reports {self._error(status)}{remedy}")
        return values[0] if len(values) == 1 else tuple(values)

    def _error(self, status: Any) -> str:
        text = self._api.cuGetErrorString(status)[1]
        return f"{getattr(status, 'name', status)} ({text.decode() if text else 'unknown'})"


def _dots(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _import() -> tuple[Any, Any]:
    # cuda-core warns of drivers older than its bindings; `Driver` checks for what is used here
    os.environ.setdefault("CUDA_PYTHON_DISABLE_MAJOR_VERSION_WARNING", "1")
    try:
        import cuda.core as core
        from cuda.bindings import driver as api
    except ImportError as e:
        raise DeviceError(f"the GPU packages are not installed ({e}): pip install 'qvl-runtime[gpu]'") from e
    return api, core
