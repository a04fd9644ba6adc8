"""Captured steps of several sequences, which are reused when the sequences change."""

import ctypes
import gc
import weakref

import numpy as np
import pytest
from fakes.gpu import FakeDriver, Images

import qvl_runtime as qvl
from qvl_kernels import gpu
from qvl_kernels.cpu import CpuOps
from qvl_kernels.cpu.runner import WORDS, Address, Program
from qvl_kernels.gpu.ops import CudaOps
from qvl_runtime.engine.decoder import DecodeStep


@pytest.fixture(scope="module")
def ops():
    return CpuOps(threads=2)


class Attention:
    """A step that appends to a cache and attends to it, as a decoder layer does."""

    def __init__(self, ops, capacity=64, dtype="fp16", seed=0):
        self.ops, rng = ops, np.random.default_rng(seed)
        self.cache = ops.kv_cache(2, 2, 32, capacity, dtype)
        self.rope, self.logn = ops.upload(rng.random((capacity, 32), np.float32)), ops.empty((capacity,))
        self.logn[...] = rng.random(capacity, np.float32)
        self.start = ops.upload(np.zeros(1, np.int32))

    @property
    def inputs(self):
        return [self.cache, self.rope, self.logn, None, self.start]

    def run(self, qkv, out):
        for layer in range(2):
            self.ops.rope_append(qkv, rope=self.rope, logn=self.logn, cache=self.cache, layer=layer, start=self.start)
            self.ops.cached_attention(qkv, self.cache, layer, self.start, out=out)


@pytest.mark.parametrize("dtype", ["fp16", "int8", "fp32"])
def test_a_moved_step_uses_the_other_arrays_only(ops, dtype):
    new = Attention(ops, dtype=dtype, seed=2)
    qkv, out, want = ops.empty((1, 192)), ops.empty((1, 64)), ops.empty((1, 64))

    def captured():
        old = Attention(ops, dtype=dtype, seed=1)
        replay = ops.capture(lambda: old.run(qkv, out))
        return replay, ops.movable(replay, old.inputs), weakref.ref(old.cache)

    replay, move, gone = captured()
    gc.collect()
    assert gone() is None, "a movable step keeps its arrays alive"
    same = Attention(ops, dtype=dtype, seed=2)
    assert move(new.inputs)
    for position in range(3):
        values = np.random.default_rng(position).random((1, 192), np.float32)
        for one in (new, same):
            ops.write(one.start, np.array([position], np.int32))
        ops.write(qkv, values)
        replay()
        moved = ops.download(out)
        ops.write(qkv, values)
        same.run(qkv, want)
        np.testing.assert_array_equal(moved, want)
    for layer in range(2):
        for a, b in zip(new.cache.saved(layer, 3), same.cache.saved(layer, 3)):
            np.testing.assert_array_equal(a, b)


def test_a_number_like_an_address_stays():
    """Addresses may be small: the heap of a Python without PIE lies below 4 GB."""
    program = Program()
    program.add("copy", Address(4096), 4096, 64, Address(64))
    program.add("copy", 64, Address(4096))
    places, index = program.find([Address(64), Address(4096)])
    assert places.tolist() == [1, 4, WORDS + 2] and index.tolist() == [1, 0, 1]
    assert (program.words().reshape(-1)[places] == np.array([64, 4096])[index]).all()


def test_a_step_is_not_moved_to_other_shapes_nor_where_inputs_share_memory(ops):
    old, qkv, out = Attention(ops), ops.empty((1, 192)), ops.empty((1, 64))
    replay = ops.capture(lambda: old.run(qkv, out))
    move, words = ops.movable(replay, old.inputs), replay.program.words().copy()
    assert not move(Attention(ops, capacity=128).inputs)
    assert not move(Attention(ops, dtype="int8").inputs)
    assert not move([*old.inputs[:2], None, None, old.start])
    np.testing.assert_array_equal(replay.program.words(), words)
    assert ops.movable(replay, [old.cache, old.rope, old.rope]) is None


def test_steps_of_other_sequences_are_not_captured_again(blob, monkeypatch):
    model = qvl.load(blob("tiny-vl", bits=16), device="cpu")
    decoder, captures = model.decoder, []
    capture = model.ops.capture
    monkeypatch.setattr(model.ops, "capture", lambda step: captures.append(1) or capture(step))
    run, alone = DecodeStep(decoder), DecodeStep(decoder)

    def begun(count):
        return [decoder.sequence("fp16", 16) for _ in range(count)]

    def step(members, tokens):
        outcome = run([(sequence, [token]) for sequence, token in zip(members, tokens)])
        return [outcome.logits(row) for row in range(len(members))]

    members, twins = begun(4), begun(4)
    for turn in range(6):
        tokens = [turn + 3 * i for i in range(len(members))]
        for logits, twin, token in zip(step(members, tokens), twins, tokens):
            np.testing.assert_array_equal(logits, alone([(twin, [token])]).logits(0))
        leaving = turn % len(members)  # one ends, and another begins
        ended = weakref.ref(members[leaving].store)
        members, twins = (one[:leaving] + one[leaving + 1 :] + begun(1) for one in (members, twins))
    captures.clear()
    members = begun(4)
    step(members, [1, 2, 3, 4])
    assert not captures
    gc.collect()
    assert ended() is None, "the memory of an ended sequence is still held"
    longer = decoder.sequence("fp16", 300)
    step([*members[:3], longer], [1, 2, 3, 4])
    assert captures == [1], "another capacity is another step"
    run.forget()
    last = weakref.ref(longer.store)
    del longer
    gc.collect()
    assert last() is None


def test_on_a_gpu_a_step_serves_sequences_of_any_capacity(blob, monkeypatch):
    driver = FakeDriver()
    monkeypatch.setattr(gpu, "available", lambda: (True, driver.name))
    monkeypatch.setattr(gpu, "CudaOps", lambda **options: CudaOps(driver, Images(), **options), raising=False)
    decoder = qvl.load(blob("tiny-vl-gptq", bits=4, vision_bits=8, head_bits=16), device="cuda").decoder
    captures, capture = [], decoder.ops.capture
    monkeypatch.setattr(decoder.ops, "capture", lambda step: captures.append(1) or capture(step))
    run = DecodeStep(decoder)
    for capacities in ((16, 300, 16), (300, 16, 16), (600, 600, 300)):
        members = [decoder.sequence("int8", capacity) for capacity in capacities]
        driver.launches.clear()
        run([(sequence, [1]) for sequence in members])
        reached = [x.args["entry"] for x in driver.launches if x.name.startswith("decode_attention")]
        found = [ctypes.c_int64.from_address(entry + 64 * i).value for entry in reached for i in range(3)]
        assert found[:6] == [sequence.store.layer(layer)[0].address for layer in range(2) for sequence in members]
    assert captures == [1]
