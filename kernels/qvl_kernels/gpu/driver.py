"""The interface to the NVIDIA driver, through cuda-core.

Other modules only use `Driver`, which tests replace. Memory is allocated with `cuMemAlloc`, whose sizes are
predictable, so that the memory plan is exact.
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

from qvl_kernels.gpu.streams import Streams
from qvl_kernels.ops import DeviceError

MINIMUM_DRIVER = (12, 0)
"""The CUDA version that a driver must support: that of the compiled kernels' format."""

MINIMUM_CAPABILITY = (7, 5)
"""Turing: the oldest GPUs with the matrix instructions of the kernels."""

STICKY = (700, 702, 709, 714, 715, 716, 717, 718, 719)
"""Errors that make the driver unusable in this process: faults of kernels (CUDA driver API, CUresult)."""

STATIC_SHARED_LIMIT = 48 * 1024
"""Shared memory that needs no opt-in (CUDA C programming guide, dynamic shared memory)."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A loaded kernel with its launch parameters."""

    handle: Any
    name: str
    threads: int
    shared: int


class Mark:
    """A point in a stream, created by `Driver.mark`."""

    __slots__ = ("__weakref__", "event")

    def __init__(self, event: Any, destroy: Callable[[Any], Any]):
        self.event = event
        weakref.finalize(self, destroy, event).atexit = False


class Graph:
    """A captured graph that can be launched."""

    __slots__ = ("__weakref__", "handle")

    def __init__(self, handle: Any, destroy: Callable[[Any], Any]):
        self.handle = handle
        weakref.finalize(self, destroy, handle).atexit = False


class _EntryPoints:
    """Functions of cuda-bindings; a function missing in the installed driver raises a DeviceError."""

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
            except RuntimeError as e:  # cuda-bindings' exception class is private
                raise DeviceError(f"the NVIDIA driver has no {name} ({e}): update it, or use the CPU") from e

        setattr(self, name, call)
        return call


class Driver:
    """One GPU, one stream.

    Attributes
    ----------
    name : str
        The GPU's name.
    capability : tuple of int
        Compute capability, (major, minor).
    shared_limit : int
        Largest shared memory of a block in bytes.
    multiprocessors : int

    Raises
    ------
    DeviceError
        If there is no driver or GPU, one of them is too old, or the GPU packages are not installed.
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
            self.streams = Streams(api, self._device, self._ok)
        properties = self._device.properties
        self.shared_limit = properties.max_shared_memory_per_block_optin
        self.multiprocessors = properties.multiprocessor_count
        self._configs: dict[tuple, Any] = {}
        self._capturing = False
        self._freed: list[int] = []

    # memory

    def memory(self) -> tuple[int, int]:
        """Return the free and the total bytes."""
        self._enter()
        free, total = self._ok(self._api.cuMemGetInfo())
        return int(free), int(total)

    def allocate(self, nbytes: int) -> int:
        """Allocate `nbytes` bytes of device memory; return the address."""
        self._enter()
        status, address = self._api.cuMemAlloc(nbytes)
        if status == self._api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise DeviceError(
                f"{self.name} is out of memory: {nbytes / 1e9:.3f} GB requested, {self.memory()[0] / 1e9:.3f} GB free; "
                "close other programs that use it, or take an int8 KV cache or a shorter context"
            )
        return int(self._ok((status, address)))

    def free(self, address: int) -> None:
        """Free memory after pending work. A forked process owns no memory."""
        if self._pid != os.getpid():
            return
        self._enter()
        if self._capturing:  # the garbage collector may run any time; freeing would invalidate a capture
            self._freed.append(address)
        else:
            self._ok(self._api.cuMemFree(address))

    def pinned(self, nbytes: int) -> np.ndarray:
        """Allocate page-locked host memory, uint8 [nbytes], for asynchronous copies; freed with the last view of it."""
        self._enter()
        address = int(self._ok(self._api.cuMemHostAlloc(nbytes, 0)))
        buffer = (ctypes.c_uint8 * nbytes).from_address(address)
        weakref.finalize(buffer, self._unpin, address).atexit = False
        return np.ctypeslib.as_array(buffer)

    def _unpin(self, address: int) -> None:
        """Free page-locked memory after pending copies. After a fault that fails: see `memory.Memory.give`."""
        if self._pid == os.getpid():
            with contextlib.suppress(DeviceError):
                self.synchronize()
                self._ok(self._api.cuMemFreeHost(address))

    def to_device(self, address: int, values: np.ndarray) -> None:
        """Copy contiguous `values` to the device, in order with everything else.

        Do not change or free them before `wait` on a later `mark`, or `synchronize`: some systems also read pageable
        memory asynchronously.
        """
        self._enter()
        self._leave_capture()
        self._ok(self._api.cuMemcpyHtoDAsync(address, values.ctypes.data, values.nbytes, self.streams.raw))

    def to_host(self, target: np.ndarray, address: int) -> None:
        """Copy from the device to contiguous `target`, synchronously."""
        self._enter()
        self._leave_capture()
        self._ok(self._api.cuMemcpyDtoHAsync(target.ctypes.data, address, target.nbytes, self.streams.raw))
        self.synchronize()

    def move(self, target: int, source: int, nbytes: int) -> None:
        """Copy within the device."""
        self._enter()
        self._ok(self._api.cuMemcpyDtoDAsync(target, source, nbytes, self.streams.raw))

    def fill(self, address: int, value: int, nbytes: int) -> None:
        """Set every byte."""
        self._enter()
        self._ok(self._api.cuMemsetD8Async(address, value, nbytes, self.streams.raw))

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
        # lazy loading is not possible while a stream is captured
        self._ok(self._api.cuKernelGetFunction(self._api.CUkernel(int(handle.handle))))
        return Kernel(handle, name, threads, shared)

    def spilled(self, kernel: Kernel) -> int:
        """Return the bytes of spilled registers per thread."""
        attribute = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
        device = self._ok(self._api.cuDeviceGet(self._device.device_id))
        handle = self._api.CUkernel(int(kernel.handle.handle))
        return int(self._ok(self._api.cuKernelGetAttribute(attribute, handle, device)))

    def launch(self, kernel: Kernel, grid: tuple[int, int, int], args: Sequence[np.generic | int]) -> None:
        """Launch `kernel` on `grid`; `args` are numpy scalars of the declared widths, pointers are int."""
        self._enter()
        key = (grid, kernel.threads, kernel.shared)
        config = self._configs.get(key)
        if config is None:
            config = self._core.LaunchConfig(grid=grid, block=(kernel.threads, 1, 1), shmem_size=kernel.shared)
            self._configs[key] = config
        try:  # a context manager takes half as long as the launch
            self._core.launch(self.streams.stream, config, kernel.handle, *args)
        except Exception as e:
            raise self._error_of(f"does not run kernel {kernel.name}", e) from e

    # synchronization and timing

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._enter()
        self._ok(self._api.cuStreamSynchronize(self.streams.raw))

    def mark(self) -> Mark:
        """Record a point in the stream."""
        self._enter()
        mark = Mark(self._ok(self._api.cuEventCreate(0)), self._api.cuEventDestroy)
        self._ok(self._api.cuEventRecord(mark.event, self.streams.raw))
        return mark

    def wait(self, mark: Mark) -> None:
        """Wait until the stream has passed `mark`."""
        self._enter()
        self._ok(self._api.cuEventSynchronize(mark.event))

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Return the device time between two marks."""
        self.wait(end)
        milliseconds = ctypes.c_float()
        status = self._elapsed(ctypes.byref(milliseconds), int(begin.event), int(end.event))
        self._ok((self._api.CUresult(status),))
        return milliseconds.value * 1e-3

    @functools.cached_property
    def _elapsed(self) -> Callable:
        """`cuEventElapsedTime` of CUDA 12.0; cuda-bindings 13 calls a version that needs 12.8."""
        address, _ = self._ok(self._api.cuGetProcAddress(b"cuEventElapsedTime", 12000, 0))
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_float), ctypes.c_void_p, ctypes.c_void_p)
        return kind(int(address))

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record the stream operations of `work` as a graph, without executing them.

        Uses driver calls, because cuda-core's graphs need CUDA 12.3.
        """
        self._enter()
        self._leave_capture()
        api = self._api
        mode = api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        try:
            self._capturing = True  # before the driver does: a KeyboardInterrupt may come anywhere
            self._ok(api.cuStreamBeginCapture(self.streams.raw, mode))
            work()
            recorded = self._leave_capture()
        except BaseException:
            self._leave_capture()  # again, if that was interrupted: work that follows would be recorded, not done
            raise
        graph = self._ok(recorded)
        try:
            return Graph(self._ok(api.cuGraphInstantiate(graph, 0)), api.cuGraphExecDestroy)
        finally:
            api.cuGraphDestroy(graph)

    def _leave_capture(self) -> tuple:
        """End a capture, if there is one that a KeyboardInterrupt left; return the driver's status, and the graph."""
        self.streams.use(0)
        recorded = self._api.cuStreamEndCapture(self.streams.raw) if self._capturing else ()
        self._capturing = False
        while self._freed:
            self.free(self._freed.pop())
        return recorded

    def replay(self, graph: Graph) -> None:
        """Launch a captured graph."""
        self._enter()
        self._ok(self._api.cuGraphLaunch(graph.handle, self.streams.raw))

    def _enter(self) -> None:
        """Make the GPU current in this thread; another library may have changed it."""
        if self._pid != os.getpid():
            raise DeviceError(
                f"{self.name} cannot be used in a forked process: load the model there, or start it with 'spawn'"
            )
        if self._context == 0 or int(self._ok(self._api.cuCtxGetCurrent())) != self._context:
            self._device.set_current()
            self._context = int(self._ok(self._api.cuCtxGetCurrent()))

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Convert exceptions of cuda-core to DeviceError."""
        try:
            yield
        except DeviceError:
            raise
        except Exception as e:
            raise self._error_of(what, e) from e

    def _error_of(self, what: str, error: Exception) -> DeviceError:
        return DeviceError(f"{self.name} {what}: {str(error).partition(chr(10))[0]}")

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
    # cuda-core warns of drivers older than its bindings; `Driver` checks what is needed
    os.environ.setdefault("CUDA_PYTHON_DISABLE_MAJOR_VERSION_WARNING", "1")
    try:
        import cuda.core as core
        from cuda.bindings import driver as api
    except ImportError as e:
        raise DeviceError(f"the GPU packages are not installed ({e}): pip install 'qvl-runtime[gpu]'") from e
    return api, core
