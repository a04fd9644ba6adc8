"""Device memory of the GPU runtime, on a fake driver: arrays, blocks, uploads, and the plan made before loading."""

from __future__ import annotations

import gc
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from fakes.addresses import AddressDriver
from fakes.gpu import FakeDriver, Images, matrix

from qvl_kernels.gpu import memory as gpu_memory
from qvl_kernels.gpu.cache import cache_bytes
from qvl_kernels.gpu.memory import Memory, Plan, Uploader, plan
from qvl_kernels.gpu.ops import CudaOps
from qvl_kernels.gpu.weights import device_bytes
from qvl_kernels.ops import DeviceError
from qvl_runtime.engine.decoder import Captured
from qvl_runtime.engine.sequence import SequenceState
from qvl_runtime.families.rope import TableRotary

GB = 1_000_000_000


# arrays and memory


def test_slices_of_the_leading_dimension_share_memory(ops):
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    array = ops.upload(values)
    part = array[1:3]
    assert (part.shape, part.dtype, part.nbytes) == ((2, 6), np.float32, 48)
    np.testing.assert_array_equal(ops.download(part), values[1:3])
    ops.write(part[1:], np.full((1, 6), 7))
    np.testing.assert_array_equal(ops.download(array)[2], 7)
    assert array[3:9].shape == (1, 6) and array[4:].shape == array[3:1].shape == (0, 6)
    assert ops.download(array[4:]).shape == (0, 6)
    for index in (0, slice(None, None, 2)):
        with pytest.raises(TypeError, match="slices"):
            array[index]


def test_values_are_copied_and_shapes_checked(ops):
    values = np.arange(6, dtype=np.int32)
    array = ops.upload(values)
    values[:] = 0
    np.testing.assert_array_equal(ops.download(array), np.arange(6))
    with pytest.raises(ValueError, match=r"\[6\] and \[5\]"):
        ops.write(array, np.zeros(5, np.int32))
    other = ops.empty((6,), np.int32)
    ops.copy(array, other)
    np.testing.assert_array_equal(ops.download(other), np.arange(6))


def test_memory_comes_back_when_its_last_array_goes(driver):
    memory = Memory(driver)
    free = driver.memory()[0]
    array = memory.array((1000,), np.float32)
    part = array[10:20]
    del array
    assert memory.in_use == memory.peak == 4096 and driver.memory()[0] == free - 4096
    address = part.owner.address
    del part
    assert (memory.in_use, memory.peak) == (0, 4096)
    again = memory.array((1010,), np.float32)
    assert again.address == address, "a block of the same size is used again"
    assert driver.allocations == 1
    del again
    memory.trim()
    assert driver.memory()[0] == free


def test_what_was_freed_long_ago_makes_room_for_what_is_used_again(driver, monkeypatch):
    """The buffers of a model's upload do not keep the arrays of its prompts out of the pool."""
    monkeypatch.setattr(gpu_memory, "POOL_LIMIT", 1 << 16)
    memory = Memory(driver)
    free = driver.memory()[0]
    for nbytes in (40 << 10, 24 << 10):
        memory.array((nbytes,), np.uint8)
    for _ in range(3):
        for nbytes in (8 << 10, 16 << 10):
            memory.array((nbytes,), np.uint8)
    assert driver.allocations == 4, "each size once"
    assert free - driver.memory()[0] == 48 << 10, "the block of 40 KiB went"


def test_a_deleted_backend_leaves_nothing_on_the_device(driver):
    def use():
        ops = CudaOps(driver, Images())
        x, w, out = ops.empty((4, 1000), np.float16), ops.weight(matrix(256, 1000, 4)), ops.empty((4, 256))
        ops.capture(lambda: ops.linear(x, w, out=out))()

    use()
    for _ in range(2):  # the memory goes after its last block
        gc.collect()
    assert not driver.buffers


def _sequence(ops: CudaOps) -> SequenceState:
    """Of 512 positions, filled, with a captured step; each of 8 layers takes 2 MiB."""

    def rotary(capacity):
        return TableRotary(ops, capacity, lambda count, _: np.zeros((count, 128), np.float32))

    shape = SimpleNamespace(num_hidden_layers=8, max_position_embeddings=4096, num_key_value_heads=8, head_dim=128)
    state = SequenceState(ops, shape, rotary, "fp16", 512)
    state.length = 512
    qkv, out = ops.empty((1, 24 * 128), np.float16), ops.empty((1, 8 * 128), np.float16)
    step = ops.capture(lambda: ops.cached_attention(qkv, state.store, 7, state.start, out=out))
    state.captured[None] = Captured(state.arrays, {1: step})
    return state


@pytest.mark.parametrize("room", [5 << 20, 15 << 20])
@pytest.mark.parametrize("copied", [False, True])
def test_a_cache_without_room_to_grow_goes_whole(room, copied):
    """A part of it that stayed would belong to nobody, or be used though it is freed."""
    driver = AddressDriver(1 << 40)
    ops = CudaOps(driver, Images())
    state, other = _sequence(ops), _sequence(ops)
    ops.memory.trim()
    driver.total = driver.held + room
    before = ops.memory.in_use
    with pytest.raises(DeviceError, match="out of memory"):
        state.take_over(other, 500, 4096) if copied else state.reserve(4096)
    gc.collect()
    assert state.length == 0
    assert ops.memory.in_use <= before - cache_bytes(8, 8, 128, 512, "fp16")
    state.reserve(512)
    assert state.store.capacity == 512 and all(array.owner.release.alive for (array,) in state.store.arrays)


def test_large_blocks_are_not_kept(driver):
    memory = Memory(driver)
    free = driver.memory()[0]
    memory.array((gpu_memory.POOL_LIMIT + 1,), np.uint8)
    assert driver.memory()[0] == free and memory.in_use == 0


def test_kept_blocks_make_room_before_memory_runs_out():
    memory = Memory(FakeDriver(total=10_000))
    memory.array((6000,), np.uint8)
    block = memory.array((8000,), np.uint8)
    with pytest.raises(DeviceError, match="out of memory"):
        memory.array((4000,), np.uint8)
    assert memory.in_use == 8192 and block.nbytes == 8000


@pytest.mark.parametrize("nbytes", [1, 1 << 16, (1 << 16) + 1, 3 * (1 << 17), (1 << 18) + 5])
def test_uploads_of_every_size_arrive_and_are_counted(driver, nbytes, monkeypatch):
    monkeypatch.setattr(gpu_memory, "STAGE", 1 << 17)
    counted, waited, sent, values = (
        [],
        [],
        [],
        np.random.default_rng(0).integers(0, 256, (2, nbytes), np.uint8)[:, ::-1],
    )
    monkeypatch.setattr(driver, "wait", waited.append)
    to_device = driver.to_device
    monkeypatch.setattr(driver, "to_device", lambda at, part: (sent.append(part), to_device(at, part)))
    upload, memory = Uploader(driver, counted.append), Memory(driver)
    array = memory.array(values.shape, values.dtype)
    upload(values, array)
    result = np.empty(values.shape, np.uint8)
    driver.to_host(result, array.address)
    np.testing.assert_array_equal(result, values)
    assert sum(counted) == values.nbytes
    stages = -(-values.nbytes // (1 << 17)) if values.nbytes > 1 << 16 else 1
    assert len(sent) == stages and len(waited) == max(stages - 2, 0), "a buffer is filled again only after it was sent"
    assert all(part.base is not None and not np.shares_memory(part, values) for part in sent), "from pinned memory"


# the plan


def test_a_model_that_fits_is_planned():
    result = plan(5 * GB, GB, GB, 12 * GB)
    assert result.fits and result.needed == 7 * GB + gpu_memory.RESERVE
    assert "7.27 GB needed (5.00 GB weights, 1.00 GB KV cache, 1.00 GB workspace, 0.27 GB driver)" in str(result)


@pytest.mark.parametrize(
    ("free", "options", "remedy"),
    [
        (8.0, {"int8_cache_bytes": 2 * GB}, "an int8 KV cache (7.77 GB)"),
        (8.0, {"int8_cache_bytes": 2 * GB, "vision_bytes": 2 * GB}, "an int8 KV cache (7.77 GB)"),
        (8.0, {"vision_bytes": 2 * GB}, "vision on the CPU (7.77 GB)"),
        (6.0, {"int8_cache_bytes": 2 * GB, "vision_bytes": 2 * GB}, "an int8 KV cache and vision on the CPU (5.77 GB)"),
        (8.0, {"context": 8192}, "a context of 4352 tokens instead of 8192"),
        (7.0, {"context": 8192, "int8_cache_bytes": 2 * GB}, "what fits: a context of 2304 tokens instead of 8192"),
        (6.2, {"context": 8192, "int8_cache_bytes": 2 * GB}, "an int8 KV cache with a context of 1536 tokens"),
        (6.0, {"context": 8192, "int8_cache_bytes": 2 * GB}, "an int8 KV cache with a context of 768 tokens"),
        (5.0, {"context": 8192, "int8_cache_bytes": 2 * GB}, "nothing would make it fit"),
        (8.0, {}, "nothing would make it fit"),
    ],
)
def test_too_little_memory_names_the_sizes_and_what_would_fit(free, options, remedy):
    with pytest.raises(DeviceError) as error:
        plan(5 * GB, 4 * GB, GB // 2, int(free * GB), **options)
    message = str(error.value)
    assert "\n" not in message
    assert "9.77 GB needed (5.00 GB weights, 4.00 GB KV cache, 0.50 GB workspace, 0.27 GB driver)" in message
    assert f"{free:.2f} GB free" in message
    assert remedy in message


def test_every_remedy_holds():
    """A context that a plan offers fits, and a slightly larger one does not."""
    cache, context, free = 4 * GB, 8192, 7 * GB
    with pytest.raises(DeviceError) as error:
        plan(5 * GB, cache, 0, free, context=context)
    tokens = int(str(error.value).split("a context of ")[1].split()[0])
    assert Plan(5 * GB, cache * tokens // context, 0, free).fits
    assert not Plan(5 * GB, cache * (tokens + 256) // context, 0, free).fits


@pytest.mark.parametrize(("bits", "group_size"), [(3, 128), (4, 128), (4, 32), (8, 64), (16, 128)])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (130, 588), (256, 256)])
def test_sizes_are_known_beforehand(ops, bits, group_size, n, k):
    weight = ops.weight(matrix(n, k, bits, group_size))
    assert weight.codes.nbytes + (weight.scales.nbytes if weight.scales else 0) == device_bytes(n, k, bits, group_size)
    (arena,) = ops.memory._arenas
    gc.collect()
    assert 0 <= arena.nbytes - arena.room - device_bytes(n, k, bits, group_size) < 2 * 256


def test_weights_share_allocations(driver):
    memory = Memory(driver)
    sizes = [100_000, 3 << 20, 17 << 20, 5_000_000, 40] * 4
    arrays = [memory.weight((size,), np.uint8) for size in sizes]
    places = sorted((array.address, array.nbytes) for array in arrays)
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(places)), "they do not overlap"
    assert not any(address % gpu_memory.ALIGNMENT for address, _ in places)
    for array in arrays:
        driver.check(array.address, array.nbytes)
    assert driver.allocations < 12 and all(len(raw) % (2 << 20) == 0 for raw in driver.buffers.values())
    assert memory.in_use < sum(sizes) + gpu_memory.ARENA + (4 << 20)
    free = driver.memory()[0]
    del arrays[2:], array
    assert free < driver.memory()[0] and memory.in_use >= 2 << 20
    del arrays
    memory.trim()
    assert memory.in_use == 0 and driver.memory()[0] == driver.total


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize("capacity", [100, 5000])
def test_cache_sizes_are_known_beforehand(driver, ops, dtype, capacity):
    before = driver.memory()[0]
    cache = ops.kv_cache(3, 2, 128, capacity, dtype)
    taken = sum(gpu_memory.rounded(array.nbytes) for layer in cache.arrays for array in layer)
    assert taken == cache.nbytes == cache_bytes(3, 2, 128, capacity, dtype) >= before - driver.memory()[0] > 0
    assert cache.capacity == capacity
