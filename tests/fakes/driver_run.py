"""What the runtime does through the real cuda-core, on the driver library built from libcuda.c.

driver_run.py LIBRARY seam | interrupted | model BLOB | refused | full | foreign | forked
"""

import ctypes
import gc
import itertools
import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fakes.absent  # noqa: F401
import numpy as np
from fakes.gpu import choose

from qvl_kernels import gpu
from qvl_kernels.gpu.driver import Driver
from qvl_kernels.gpu.memory import POOL_LIMIT, Memory
from qvl_kernels.ops import DeviceError
from qvl_runtime.backends import make_ops

RUN, STORE, REPLAY = 0, 1, 2

Callback = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
)


def raises(message: str, call) -> None:
    try:
        call()
    except DeviceError as error:
        assert message in str(error) and "\n" not in str(error), error
    else:
        raise AssertionError(f"no error: {message}")


def memory(driver: Driver, library: ctypes.CDLL) -> None:
    free, total = driver.memory()
    assert free == total == 1 << 33
    a, b = driver.allocate(1000), driver.allocate(1000)
    assert driver.memory() == (total - 2000, total)
    values, result = np.arange(250, dtype=np.float32), np.empty(250, np.float32)
    driver.to_device(a, values)
    driver.move(b, a, 1000)
    driver.to_host(result, b)
    assert (result == values).all()
    stage = driver.pinned(1000)
    stage[:] = 7
    driver.to_device(b, stage)
    driver.wait(driver.mark())
    driver.to_host(result, b)
    assert (result.view(np.uint8) == 7).all()
    part = stage[10:].view(np.int8)
    del stage
    assert library.fake_pinned() == 1 and (part == 7).all()
    del part
    assert library.fake_pinned() == 0
    assert driver.seconds(driver.mark(), driver.mark()) == 0.001
    raises("out of memory: 1099.512 GB requested, 8.590 GB free", lambda: driver.allocate(1 << 40))
    raises("the driver reports", lambda: driver.free(12345))
    driver.free(a)
    driver.free(b)
    assert driver.memory() == (total, total)
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(driver.allocate(10)))
    thread.start()
    thread.join()
    assert elsewhere, "every thread can use the device"
    driver.free(*elsewhere)


def launches(driver: Driver, library: ctypes.CDLL) -> None:
    seen, a = [], driver.allocate(1000)

    @Callback
    def on_launch(mode, stored, name, dims, params):
        if mode == REPLAY:
            seen.append(("replayed", stored))
            return 0
        kinds = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_float, ctypes.c_uint64, ctypes.c_uint64)
        seen.append((mode, name, dims[:7], [kind.from_address(params[i]).value for i, kind in enumerate(kinds)]))
        return len(seen)

    library.fake_on_launch(on_launch)
    kernel = driver.load(b"\x7fELF...", "cubin", "a_kernel", 128, 60000)
    arguments = [a, np.int32(-4), np.float32(0.5), 0, 0]
    assert driver.spilled(kernel) == 0
    driver.launch(kernel, (3, 2, 1), arguments)
    expected = (b"a_kernel", [3, 2, 1, 128, 1, 1, 60000], [a, -4, 0.5, 0, 0])
    assert seen == [(RUN, *expected)], seen

    result = np.empty(250, np.float32)
    driver.fill(a, 1, 1000)
    graph = driver.capture(lambda: (driver.launch(kernel, (3, 2, 1), arguments), driver.fill(a, 0, 1000)))
    assert seen[1:] == [(STORE, *expected)]
    driver.to_host(result, a)
    assert result.all(), "a capture carries nothing out"
    driver.replay(graph)
    driver.replay(graph)
    assert seen[2:] == [("replayed", 2)] * 2
    driver.to_host(result, a)
    assert not result.any()

    def branches() -> None:
        driver.streams.fork()
        for i in range(3):
            driver.streams.branch(i)
            driver.launch(kernel, (3, 2, 1), arguments)
        driver.streams.join(3)

    del seen[:]
    first = driver.streams.stream
    driver.replay(driver.capture(branches))
    assert seen == [(STORE, *expected)] * 3 + [("replayed", i) for i in (1, 2, 3)], seen
    assert driver.streams.stream is first, "later work is ordered after all branches"
    assert driver.load(b"// PTX", "ptx", "other", 32, 0).name == "other"
    raises("does not take kernel x", lambda: driver.load(b"nonsense", "cubin", "x", 32, 0))


def seam(library: ctypes.CDLL) -> None:
    driver = Driver()
    assert (driver.name, driver.capability) == ("Fake GPU", (9, 0))
    assert driver.driver_version == divmod(int(os.environ["FAKE_CUDA_DRIVER"]) // 10, 100)
    assert (driver.shared_limit, driver.multiprocessors) == (101376, 20)
    memory(driver, library)
    launches(driver, library)
    assert library.fake_events() > 0
    del driver
    gc.collect()
    assert library.fake_events() == 0, "events outlive the driver"


def interrupted(library: ctypes.CDLL) -> None:
    """A KeyboardInterrupt at any line of a capture leaves neither the stream capturing nor memory that is not freed."""
    driver = Driver()
    a, result, lines = driver.allocate(256), np.empty(256, np.uint8), itertools.count()

    def work() -> None:
        driver.streams.fork()
        driver.streams.branch(1)
        driver.fill(a, 0, 256)
        driver.streams.join(2)

    def trace(frame, event, argument):
        if Path(frame.f_code.co_filename).name not in ("driver.py", "streams.py"):
            return None
        if event == "line" and next(seen) == line:
            raise KeyboardInterrupt
        return trace

    driver.capture(work)
    for line in lines:
        b, seen = driver.allocate(256), itertools.count()
        driver.fill(a, 0, 256)
        free = driver.memory()[0]
        sys.settrace(trace)
        try:
            driver.capture(work)
            break
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        driver.fill(a, 7, 256)
        driver.free(b)
        driver.to_host(result, a)
        assert driver.memory()[0] == free + 256, line
        assert (result == 7).all(), f"line {line}: the stream is still captured"
    assert line > 20


def model(library: ctypes.CDLL, path: str) -> None:
    """The public API on kernels from a bundle; whatever is asked, the answer is token 65."""
    import qvl_runtime as qvl

    seen, chosen = [], []

    @Callback
    def on_launch(mode, stored, name, dims, params):
        if mode != REPLAY and name == b"argmax.any":
            logits, out = (ctypes.c_uint64.from_address(params[i]).value for i in (0, 1))
            rows, size = dims[1], ctypes.c_int32.from_address(params[5]).value
            chosen.append((out, rows, logits, size))
        for arguments in chosen:
            choose(65, *arguments)
        seen.append(mode)
        return len(seen)

    library.fake_on_launch(on_launch)
    loaded = qvl.load(path, device="cuda", kv_cache="int8")
    assert loaded.ops.name == "cuda" and loaded.ops.launch.images.path.name.startswith("gpu-kernels-sm90-")
    assert loaded.generate([1, 2, 3], max_new_tokens=8).token_ids == [65] * 8
    assert STORE in seen and seen[-1] == REPLAY, "steps are replayed"
    memory, used, most = loaded.ops.memory, ctypes.c_int64(), ctypes.c_int64()
    library.fake_memory(ctypes.byref(used), ctypes.byref(most))
    assert memory.in_use <= used.value <= memory.in_use + (128 << 20) and most.value >= memory.peak > 500_000


def refused(library: ctypes.CDLL | None) -> None:
    usable, reason = gpu.available()
    assert not usable and "\n" not in reason
    raises(reason, lambda: make_ops("cuda"))
    assert make_ops("auto").name == "cpu"
    print(reason)


def full(library: ctypes.CDLL) -> None:
    """A GPU without a byte to give: found, and then of no use."""
    gpu.available = lambda: (True, "Fake GPU")
    raises("out of memory", lambda: make_ops("cuda"))
    assert make_ops("auto").name == "cpu"


def foreign(library: ctypes.CDLL) -> None:
    """Another library makes its own context current: ours is again, before the next call."""
    driver = Driver()
    library.fake_forget_context()
    driver.free(driver.allocate(100))
    mark = driver.mark()
    library.fake_forget_context()
    driver.wait(mark)


def forked(library: ctypes.CDLL) -> None:
    """A child of a process that uses a GPU cannot use it, and has nothing of it to free."""
    driver = Driver()
    address = driver.allocate(100)
    child = os.fork()
    if not child:
        status = 1
        try:
            raises("cannot be used in a forked process", lambda: driver.fill(address, 0, 100))
            driver.free(address)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    driver.free(address)


def lacking(library: ctypes.CDLL) -> None:
    """A driver without an entry point that is needed in the middle of the work."""
    driver = Driver()
    raises("the NVIDIA driver has no cuMemHostAlloc", lambda: driver.pinned(100))


def faulty(library: ctypes.CDLL) -> None:
    """After a kernel's fault every call fails: that is said where it is met, and nowhere else."""
    driver = Driver()
    memory = Memory(driver)
    kept = [memory.array((POOL_LIMIT + 1,), np.uint8)]
    raises("start the program again", driver.synchronize)
    raises("start the program again", lambda: driver.free(kept[0].address))
    kept.clear()
    gc.collect()


def collected(library: ctypes.CDLL) -> None:
    """What the collector frees during a capture is freed after it."""
    driver = Driver()
    address = driver.allocate(1000)
    graph = driver.capture(lambda: driver.free(address))
    assert driver.memory()[0] == driver.memory()[1]
    driver.replay(graph)


if __name__ == "__main__":
    path, part, *rest = sys.argv[1:]
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) if path else None
    parts = [seam, interrupted, model, refused, full, foreign, forked, lacking, faulty, collected]
    {function.__name__: function for function in parts}[part](library, *rest)
    assert not {"torch", "triton"} & sys.modules.keys()
    print("done")
