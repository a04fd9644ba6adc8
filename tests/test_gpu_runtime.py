"""The GPU runtime without a GPU: launches, graphs and whole steps on a fake driver.

Kernels are only recorded here; tests/test_gpu_model.py runs them, in the PTX interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import subprocess
import sys
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
from fakes.gpu import Images, matrix

from qvl_kernels.gpu import attention as gpu_attention
from qvl_kernels.gpu import ops as gpu_ops
from qvl_kernels.gpu import signatures
from qvl_kernels.gpu.graph import Replay
from qvl_kernels.gpu.ops import CudaOps
from qvl_kernels.ops import Attended, DeviceError, Norm
from qvl_kernels.packing import pack

TESTS = Path(__file__).parent


# launches


def test_a_launch_is_what_the_signature_says(ops, driver):
    x, out = ops.upload(np.ones((3, 200), np.float32)), ops.empty((3, 70))
    w = ops.weight(matrix(70, 200, 4, 64, bias=np.zeros(70)))
    driver.launches.clear()
    ops.linear(x, w, out=out, residual=out)
    gather, linear = driver.launches
    assert gather.name == "gather.any" and gather.grid == (1, 3, 1)
    assert (gather.args["k"], gather.args["padded"]) == (200, 256)
    assert linear.name == "linear.int4_fine.rows16"
    assert linear.args["residual"] == linear.args["out"] == out.address
    assert linear.args["codes"] == w.codes.address and linear.args["bias"] == w.bias.address
    sizes = {"m": 3, "n": 70, "rows": 128, "blocks": 2, "group_shift": 1}
    assert sizes.items() <= linear.args.items()
    assert linear.args["flags"] == signatures.BIAS | signatures.RESIDUAL
    tiles, split, _ = linear.grid
    assert tiles == 128 // Images()["linear.int4_fine.rows16"].constants["BN"] and 1 <= split <= 2


def test_activations_are_prepared_only_where_they_must(ops, driver):
    half, w = ops.empty((4, 256), np.float16), ops.weight(matrix(64, 256, 4))
    driver.launches.clear()
    ops.linear(half, w, out=ops.empty((4, 64)))
    assert [launch.name for launch in driver.launches] == ["linear.int4.rows8"]
    assert driver.launches[0].args["x"] == half.address
    permuted = ops.weight(matrix(64, 256, 4, perm=np.arange(256)[::-1]))
    driver.launches.clear()
    ops.linear(half, permuted, out=ops.empty((4, 64), np.float16))
    assert [launch.name for launch in driver.launches] == ["gather.any", "linear.int4.rows8"]
    assert driver.launches[0].args["perm"] == permuted.perm.address
    assert driver.launches[1].args["flags"] == signatures.OUT_HALF


@pytest.mark.parametrize(("rows", "tile"), [
    (1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64), (65, 128), (1000, 128),
])  # fmt: skip
def test_the_tile_follows_the_number_of_rows(ops, driver, rows, tile):
    w = ops.weight(matrix(1024, 256, 8))
    ops.linear(ops.empty((rows, 256), np.float16), w, out=ops.empty((rows, 1024)))
    assert driver.launches[-1].name == f"linear.int8.rows{tile}"


def test_tile_and_split_keep_the_multiprocessors_busy(driver, monkeypatch):
    """As measured on an H100: 104 tiles of 128 rows are better than 52 of 256; few rows share their columns."""
    monkeypatch.setattr(driver, "multiprocessors", 132)
    ops = CudaOps(driver, Images(90))
    picture, w = ops.weight(matrix(1664, 1664, 8)), ops.weight(matrix(1664, 8192, 8))
    assert ops.tiles("linear", picture, 1024) == ("linear.int8.rows128", 104, 1)
    assert ops.tiles("linear", picture, 4096) == ("linear.int8.rows256", 208, 1)
    _, tiles, split = ops.tiles("linear", w, 1)
    assert split > 1 and tiles < 132 <= 2 * tiles * split


@pytest.mark.parametrize("architecture", signatures.ARCHITECTURES)
@pytest.mark.parametrize("multiprocessors", [10, 28, 132])
def test_the_number_of_parts_of_a_sum_does_not_depend_on_the_rows(driver, monkeypatch, architecture, multiprocessors):
    """Among few rows, and among many: a row's result would."""
    monkeypatch.setattr(driver, "multiprocessors", multiprocessors)
    tiles = CudaOps(driver, Images(architecture)).tiles
    for (rows, blocks), kind in itertools.product(
        ((128, 2), (1536, 20), (70_016, 8)), ("int4", "int4_fine", "int8", "int8_fine", "fp16")
    ):
        w = types.SimpleNamespace(kind=kind, rows=rows, blocks=blocks)
        for family in ("linear", "gate_up") if kind == "int4" else ("linear",):
            assert len({tiles(family, w, m)[2] for m in range(1, 17)}) == 1
        assert {tiles("linear", w, m)[2] for m in (17, 32, 33, 64, 65, 200, 512, 4096)} == {1}


@pytest.mark.parametrize("family", ["linear", "gate_up"])
def test_every_part_of_a_split_product_has_columns(driver, monkeypatch, family):
    """The kernels rely on it."""
    monkeypatch.setattr(driver, "multiprocessors", 132)
    ops = CudaOps(driver, Images(90))
    for blocks in range(1, 90):
        w = ops.weight(matrix(64, 128 * blocks, 4))
        for m in (1, 16, 17, 200) if family == "linear" else (1, 16):
            split = ops.tiles(family, w, m)[2]
            assert (split - 1) * -(-blocks // split) < blocks


def test_gate_and_up_share_a_kernel_only_when_alike(ops, driver):
    norm = Norm(ops.upload(np.ones(128, np.float32)), None, 1e-6)
    x, out = ops.empty((2, 128)), ops.empty((2, 64), np.float16)
    order = np.random.default_rng(0).permutation(128)
    for gate, up, names in (
        (matrix(64, 128, 4), matrix(64, 128, 4), ["few_norm.any", "gate_up.int4.rows8"]),
        (matrix(64, 128, 4, perm=order), matrix(64, 128, 4, perm=order), ["few_norm.any", "gate_up.int4.rows8"]),
        (matrix(64, 128, 4, perm=order), matrix(64, 128, 4), ["few_norm.any", "linear.int4.rows8"] * 2),
        (
            matrix(64, 128, 4),
            matrix(64, 128, 4, 32),
            ["few_norm.any", "linear.int4.rows8", "few_norm.any", "linear.int4_fine.rows16"],
        ),
        (matrix(64, 128, 8), matrix(64, 128, 8), ["few_norm.any", "linear.int8.rows8", "linear.int8.rows8"]),
    ):
        weights = ops.weight(gate), ops.weight(up)
        driver.launches.clear()
        ops.gate_up(x, *weights, out=out, norm=norm)
        assert [launch.name for launch in driver.launches] == names
        if names[-1].startswith("linear"):
            gate, up = (launch.args for launch in driver.launches if launch.name.startswith("linear"))
            assert up["flags"] == signatures.GATE | signatures.OUT_HALF and up["residual"] == gate["out"]


def test_the_counters_of_split_products_begin_at_zero(ops, driver):
    w = ops.weight(matrix(32, 2048, 4))
    ops.linear(ops.empty((1, 2048), np.float16), w, out=ops.empty((1, 32)))
    launch = driver.launches[-1]
    assert launch.grid[1] > 1
    counters = np.frombuffer((ctypes.c_int32 * launch.grid[0]).from_address(launch.args["counters"]), np.int32)
    assert not counters.any()


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize(("rows", "heads"), [(1, 3), (5, 12), (20, 3)])
def test_attention_gets_the_layer_it_asked_for(ops, driver, dtype, rows, heads):
    kv_heads, d, layer = 3, 16, 1
    cache = ops.kv_cache(2, kv_heads, d, 100, dtype)
    qkv, out, start = (
        ops.empty((rows, (heads + 2 * kv_heads) * d), np.float16),
        ops.empty((rows, heads * d), np.float16),
        ops.empty((1,), np.int32),
    )
    norm = Norm(ops.empty((d,)), None, 1e-6)
    ops.rope_append(
        qkv, rope=ops.empty((200, d)), logn=None, cache=cache, layer=layer, start=start, q_norm=norm, k_norm=norm
    )
    ops.cached_attention(qkv, cache, layer, start, out=out)
    append, attend = driver.launches
    assert append.name == f"rope_append.{dtype}" and append.grid == (rows, -(-(heads + kv_heads) // 8), 1)
    assert append.args["flags"] == signatures.Q_NORM | signatures.K_NORM and append.args["logn"] == 0
    few = rows <= signatures.FEW_ROWS
    assert attend.name == f"{'decode' if few else 'cached'}_attention.{dtype}.any"
    assert attend.grid == ((kv_heads * -(-rows * heads // kv_heads // 16), 4, 1) if few else (1, heads, 1))
    both, *both_scales = cache.arrays[layer]
    for launch in (append, attend):
        assert [launch.args[name] - both.address for name in ("k", "v")] == [0, both.nbytes // 2]
        for scales in both_scales:
            found = [launch.args[name] - scales.address for name in ("k_scale", "v_scale")]
            assert found == [0, kv_heads * 128 * 2]
        assert len(both_scales) == (dtype == "int8")
        expected = {"heads": heads, "kv_heads": kv_heads, "capacity": 128, "d": d, "start": start.address}
        assert expected.items() <= launch.args.items()
    assert attend.args["scale"] == 0.25


def _sequence(ops, capacity: int, rows: int, layer: int = 0) -> Attended:
    tables = ops.empty((capacity, 16)), ops.empty((capacity,))
    return Attended(rows, *tables, ops.kv_cache(2, 3, 16, capacity, "int8"), layer, ops.upload(np.zeros(1, np.int32)))


def _arrays(sequences) -> list:
    """As the engine lists them."""
    return [array for one in sequences for array in (one.cache, one.rope, one.logn, one.start)]


def _attention(ops, sequences, layers=2):
    """A step that attends to all layers of some sequences, with 6 heads of 16."""
    rows = sum(one.rows for one in sequences)
    qkv, out, x = ops.empty((rows, 12 * 16), np.float16), ops.empty((rows, 6 * 16), np.float16), ops.empty((4,))

    def step():
        for layer in range(layers):
            ops.add(x, x, out=x)
            ops.attend(qkv, [one._replace(layer=layer) for one in sequences], out=out)

    return step


def _attended(driver, replay) -> list:
    driver.launches.clear()
    replay()
    return [launch for launch in driver.launches if launch.name.startswith("decode_attention")]


def _entries(launches) -> list[list[int]]:
    """Of the sequences of all launches: as many as there are tiles of lone rows, or one."""
    found = []
    for launch in launches:
        count = launch.grid[0] // 3 if launch.args["t"] == 1 else 1
        values = (ctypes.c_int64 * (8 * count)).from_address(launch.args["entry"])
        found += np.ctypeslib.as_array(values).reshape(count, 8).tolist()
    return found


def _expected(sequences) -> list[list[int]]:
    """The entries of every layer."""
    return [
        [*(a.address for a in (*one.cache.layer(layer), one.start, one.rope, one.logn)), one.cache.stride]
        for layer in range(2)
        for one in sequences
    ]


def test_sequences_of_a_step_are_attended_to_in_branches_that_share_nothing(ops, driver):
    """Those with one row in one branch."""
    counts = 5, 2, 1, 1
    sequences = [_sequence(ops, 100, rows) for rows in counts]
    attended = _attended(driver, ops.capture(_attention(ops, sequences)))
    assert [(launch.branch, launch.args["t"]) for launch in attended] == [(0, 5), (1, 2), (2, 1)] * 2
    assert all(launch.branch is None for launch in driver.launches if launch.name == "add.any")
    assert [launch.branch for launch in driver.launches if launch.name == "rope_append.int8"] == [0, 1] * 2
    for layer, name in itertools.product((attended[:3], attended[3:]), ("partials", "counters")):
        end = 0
        for launch, rows in sorted(zip(layer, (5, 2, 2)), key=lambda pair: pair[0].args[name]):
            assert launch.args[name] >= end
            end = launch.args[name] + 4 * (rows * 6 * launch.grid[1] * 129 if name == "partials" else launch.grid[0])
    scratch = [{launch.args["partials"] for launch in layer} for layer in (attended[:3], attended[3:])]
    assert scratch[0] == scratch[1], "the next layer's is the same"
    driver.launches.clear()
    _attention(ops, sequences)()
    assert {launch.branch for launch in driver.launches} == {None}
    assert not any(launch.args.get("entry") for launch in driver.launches)


@pytest.mark.parametrize("counts", [(1, 1), (3, 1), (2, 2), (1,) * 16])
def test_a_step_of_several_sequences_serves_others(ops, driver, counts):
    first, others = ([_sequence(ops, n, rows) for n, rows in zip(itertools.cycle(pair), counts)]
                     for pair in ((100, 300), (500, 100)))  # fmt: skip
    replay = ops.capture(_attention(ops, first))
    attended = _attended(driver, replay)
    assert all(launch.args["k"] == launch.args["start"] == launch.args["rope"] == 0 for launch in attended)
    assert all(launch.args["flags"] & signatures.LISTED for launch in attended)
    rotated = [x for x in driver.launches if x.name.startswith("rope_append") or x.args.get("t") == 1]
    assert len(rotated) == len(attended) and all(launch.args["flags"] & signatures.LOGN for launch in rotated)
    assert len(attended) == 2 * (1 if counts[0] == 1 else 2) and _entries(attended) == _expected(first)

    inputs, cache = _arrays(first), weakref.ref(first[0].cache)
    assert ops.movable(replay, inputs[1:]) is None and ops.movable(replay, inputs[:4] + inputs[:4]) is None
    move = ops.movable(replay, inputs)
    first.clear()
    inputs.clear()
    gc.collect()
    assert cache() is None, "a movable step keeps its arrays alive"
    other = _arrays(others)
    assert move(other) and _entries(_attended(driver, replay)) == _expected(others)
    assert not move([*other[:2], None, *other[3:]]) and not move([ops.kv_cache(2, 3, 16, 100, "fp16"), *other[1:]])
    assert _entries(_attended(driver, replay)) == _expected(others), "a refused move changes nothing"


def test_a_step_that_cannot_be_captured_keeps_no_memory(ops):
    sequences, before = [_sequence(ops, 100, 1) for _ in range(2)], ops.memory.in_use

    def step():
        _attention(ops, sequences)()
        raise DeviceError("out of memory")

    with pytest.raises(DeviceError):
        ops.capture(step)
    held = sum(one.cache.nbytes for one in sequences)
    sequences.clear()
    gc.collect()
    assert ops.memory.in_use <= before - held


def test_entries_of_a_launch_follow_each_other(ops, driver):
    """In tables of 256 entries, too: 37 layers of 7 sequences."""
    sequences = [_sequence(ops, 100, 1) for _ in range(7)]
    sequences = [one._replace(cache=ops.kv_cache(37, 3, 16, 100, "fp16")) for one in sequences]
    replay = ops.capture(_attention(ops, sequences, layers=37))
    keys = [entry[0] for entry in _entries(_attended(driver, replay))]
    assert keys == [one.cache.layer(layer)[0].address for layer in range(37) for one in sequences]
    others = [one._replace(cache=ops.kv_cache(37, 3, 16, 64, "fp16")) for one in reversed(sequences)]
    assert ops.movable(replay, _arrays(sequences))(_arrays(others))
    keys = [entry[0] for entry in _entries(_attended(driver, replay))]
    assert keys == [one.cache.layer(layer)[0].address for layer in range(37) for one in others]


def test_a_step_of_one_sequence_stays_with_it(ops):
    sequence = _sequence(ops, 100, 1)
    assert ops.movable(ops.capture(_attention(ops, [sequence])), _arrays([sequence])) is None


def test_segments_are_uploaded_once_and_outlive_what_was_captured(ops, driver):
    qkv, out = ops.empty((7, 3 * 16), np.float16), ops.empty((7, 16), np.float16)
    before = ops.memory.in_use
    replay = ops.capture(lambda: [ops.vision_attention(qkv, 1, out=out, segments=[0, 3, 3, 7]) for _ in range(3)])
    replay()
    bounds = {launch.args["bounds"] for launch in driver.launches}
    assert len(driver.launches) == 3 and len(bounds) == 1
    values = np.frombuffer((ctypes.c_int32 * 14).from_address(bounds.pop()), np.int32)
    assert values.tolist() == [0, 0, 0, 3, 3, 3, 3, 3, 3, 3, 7, 7, 7, 7]
    assert ops.memory.in_use == before + 256
    for i in range(30):  # of other pictures
        ops.vision_attention(qkv, 1, out=out, segments=[0, *[0] * i, 7])
    assert ops.memory.in_use == before + (8 + 1) * 256
    with pytest.raises(ValueError, match="segments"):
        ops.vision_attention(qkv, 1, out=out, segments=[0, 8])


def test_arrays_in_another_shape_share_memory(ops):
    array = ops.upload(np.arange(24, dtype=np.float32).reshape(4, 6))
    np.testing.assert_array_equal(ops.download(array.reshape((2, 12))[1:]), [np.arange(12, 24)])
    with pytest.raises(ValueError, match=r"\[5, 5\]"):
        array.reshape((5, 5))


def test_zero_points_are_used_where_there_are_any(ops, driver):
    zeros = np.full((64, 1), 3, np.uint8)
    for weight, flags, zero in (
        (matrix(64, 128, 4), 0, 8),
        (matrix(64, 128, 8), 0, 128),
        (matrix(64, 128, 4, zeros=zeros), signatures.HAS_ZEROS, 8),
    ):
        ops.weight(weight)
        packed = driver.launches[-1]
        assert packed.name == "pack_scales.any" and (packed.args["flags"], packed.args["zero"]) == (flags, zero)
        assert bool(packed.args["zeros"]) == bool(flags)


def test_3_bits_arrive_as_4(ops, driver, monkeypatch):
    codes, scales = np.random.default_rng(3).integers(0, 8, (70, 200)).astype(np.uint8), np.ones((70, 2))
    sent, to_device = [], driver.to_device
    monkeypatch.setattr(driver, "to_device", lambda at, part: (sent.append(bytes(part)), to_device(at, part)))
    uploads, launches = [], []
    for bits in (3, 4):
        driver.launches.clear()
        weight = ops.weight(pack(codes, scales, bits, 128))
        ops.synchronize()
        launches.append([(launch.name, launch.grid) for launch in driver.launches])
        uploads.append((weight.kind, weight.codes.shape, b"".join(sent)))
        assert driver.launches[-1].args["zero"] == {3: 4, 4: 8}[bits]
        sent.clear()
    assert uploads[0][:2] == uploads[1][:2] and launches[0] == launches[1] and launches[0]
    differing = np.frombuffer(uploads[0][2], np.uint8) ^ np.frombuffer(uploads[1][2], np.uint8)
    assert len(differing) > 70 * 100 and set(differing) == {0, 0xC0, 0xCC}  # padding: 4 is not 8


def test_matrices_are_uploaded_in_pieces(driver, monkeypatch):
    from qvl_kernels.gpu import weights

    ops = CudaOps(driver, Images())
    monkeypatch.setattr(weights, "STAGE", 3 * 2 * 2048)  # three blocks of 32 rows and 256 columns
    ops.weight(matrix(250, 256, 4))
    pieces = [launch for launch in driver.launches if launch.name == "reorder.int4"]
    assert [(piece.args["first"], piece.grid) for piece in pieces] == [(0, (2, 3, 1)), (3, (2, 3, 1)), (6, (2, 2, 1))]


def test_more_rows_than_a_grid_has_are_launched_in_pieces(ops, driver):
    """A picture of Qwen2-VL may have 65,536 patches, and each is a row."""
    rows, step = 70_000, 32_768
    x, w = ops.empty((rows, 8)), ops.weight(matrix(64, 8, 16))
    index, half = ops.empty((rows,), np.int32), ops.empty((rows, 64), np.float16)
    out = ops.empty((rows, 8))
    driver.launches.clear()
    ops.gather(x, index, out=out)
    ops.linear(x, w, out=half)
    ops.embed(index, w, out=out)
    gathers, products, embeds = (
        [launch for launch in driver.launches if launch.name.startswith(name)] for name in ("gather", "linear", "embed")
    )
    for launches in (gathers[:3], gathers[3:], embeds):
        assert [launch.grid[1] for launch in launches] == [step, step, rows - 2 * step]
    assert [launch.args["x"] for launch in gathers] == 3 * [x.address] + [x[i * step :].address for i in range(3)]
    assert [launch.args["out"] for launch in embeds] == [out[i * step :].address for i in range(3)]
    assert len(products) == 1


def test_a_product_of_more_values_than_offsets_reach_is_launched_in_pieces(ops, driver, monkeypatch):
    """As of the logits of 80,000 tokens with Qwen3-VL-32B, whose rows have 25,600 values."""
    monkeypatch.setattr(gpu_ops, "MOST_VALUES", 128 * 40)
    x, w = ops.empty((70, 100)), ops.weight(matrix(64, 100, 4))
    out, norm = ops.empty((70, 64)), Norm(ops.empty((100,)), None, 1e-6)
    driver.launches.clear()
    ops.linear(x, w, out=out, norm=norm, residual=out, activation="gelu")
    rows, *pieces = driver.launches
    assert rows.grid[0] == 70 and [piece.args["m"] for piece in pieces] == [32, 32, 6]
    for i, piece in enumerate(pieces):
        at = out[32 * i :].address
        assert piece.args["x"] == rows.args["out"] + 32 * i * 128 * 2
        assert piece.args["out"] == piece.args["residual"] == at
        assert piece.args["flags"] == signatures.RESIDUAL | signatures.GELU


def test_a_picture_whose_offsets_are_too_large_is_refused(ops, driver, monkeypatch):
    """Of 621,379 patches with Qwen3-VL, which only a lower limit of 159 million pixels makes."""
    monkeypatch.setattr(gpu_attention, "MOST_VALUES", 40 * 3 * 2 * 16)
    for rows in (40, 41):
        qkv, out = ops.empty((rows, 3 * 2 * 16), np.float16), ops.empty((rows, 2 * 16), np.float16)
        with contextlib.nullcontext() if rows == 40 else pytest.raises(DeviceError, match="41 patches is too large"):
            ops.vision_attention(qkv, 2, out=out)
    assert len(driver.launches) == 1


def test_wrong_calls_are_refused(ops):
    with pytest.raises(ValueError, match="17 rows of a sequence"):
        ops.capture(_attention(ops, [_sequence(ops, 100, 17), _sequence(ops, 100, 1)]))
    w = ops.weight(matrix(64, 128, 4))
    with pytest.raises(ValueError, match="128 columns"):
        ops.linear(ops.empty((2, 64)), w, out=ops.empty((2, 64)))
    with pytest.raises(ValueError, match="expected"):
        ops.linear(ops.empty((2, 128)), w, out=ops.empty((2, 60)))
    with pytest.raises(ValueError, match="head_dim 130"):
        ops.kv_cache(1, 1, 130, 64, "fp16")
    with pytest.raises(ValueError, match="fp32"):
        ops.kv_cache(1, 1, 128, 64, "fp32")
    with pytest.raises(TypeError, match="takes"):
        ops.launch("gather.any", (1,), ops.empty((1,)))
    with pytest.raises(ValueError, match="aligned"):
        ops.add(ops.empty((2, 3))[1:], ops.empty((1, 3)), out=ops.empty((1, 3)))


def test_a_kernel_too_large_for_the_gpu_is_an_error(driver):
    images = Images()
    driver.shared_limit = images["add.any"].shared - 1
    ops = CudaOps(driver, images)
    with pytest.raises(DeviceError, match="shared memory"):
        ops.add(ops.empty((4,)), ops.empty((4,)), out=ops.empty((4,)))


def test_a_resized_cache_moves_what_is_filled(ops, driver):
    cache = ops.kv_cache(2, 3, 16, 64, "int8")
    driver.launches.clear()
    other = cache.resized(200, 10)
    assert other.capacity == 200 and other.layers == len(other.arrays) == 2
    for layer, (values, scales) in enumerate(zip(driver.launches[::2], driver.launches[1::2], strict=True)):
        expected = {"size": 10 * 16 // 2, "source_stride": 64 * 8, "target_stride": 256 * 8}
        assert expected.items() <= values.args.items() and values.grid == (1, 2 * 3, 1)
        assert values.args["target"] == other.arrays[layer][0].address
        assert {"size": 10, "source_stride": 64, "target_stride": 256}.items() <= scales.args.items()


def _captured_attention(ops, cache) -> Replay:
    qkv, out, start = ops.empty((1, 6 * 128), np.float16), ops.empty((1, 256), np.float16), ops.empty((1,), np.int32)
    return ops.capture(
        lambda: [ops.cached_attention(qkv, cache, layer, start, out=out) for layer in range(cache.layers)]
    )


def test_there_are_never_two_caches(ops, driver):
    """Even while a captured step refers to the old one."""
    cache = ops.kv_cache(8, 2, 128, 4096, "fp16")  # 4 MiB a layer
    replay = _captured_attention(ops, cache)
    before = ops.memory.in_use
    ops.memory.peak = 0
    other = cache.resized(6144, 100)
    grown = other.nbytes - cache.nbytes
    assert ops.memory.in_use == before + grown == before + (16 << 20)
    assert ops.memory.peak == before + grown + (4 << 20)
    kept = other.resized(6144, 100, keep=True)
    assert ops.memory.in_use == before + grown + kept.nbytes
    del cache, replay, kept
    gc.collect()
    assert before <= ops.memory.in_use + (4 << 20) and other.saved(7, 100)[0].shape == (2, 2, 100, 128)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_a_saved_cache_comes_back(ops, dtype):
    rng = np.random.default_rng(0)
    cache, other = ops.kv_cache(2, 3, 16, 64, dtype), ops.kv_cache(2, 3, 16, 200, dtype)
    for array in itertools.chain(*cache.arrays):
        ops.write(array, rng.integers(-99, 99, array.shape).astype(array.dtype))
    for layer in range(2):
        saved = cache.saved(layer, 37)
        assert saved[0].shape == (2, 3, 37, 16) and saved[0].any()
        other.restore(layer, 37, saved)
        for a, b in zip(saved, other.saved(layer, 37), strict=True):
            assert a.dtype == b.dtype and np.array_equal(a, b)
        assert not np.array_equal(saved[0], cache.saved(1 - layer, 37)[0])
    with pytest.raises(ValueError, match="not of this cache"):
        other.restore(0, 36, saved)


# graphs


def test_a_captured_step_runs_when_replayed_only(ops, driver):
    x, y = ops.upload(np.zeros(4, np.float32)), ops.upload(np.ones(4, np.float32))

    def step():
        ops.copy(y, x)
        ops.add(x, y, out=y)

    replay = ops.capture(step)
    assert not driver.launches and not ops.download(x).any()
    for _ in range(3):
        replay()
    assert [launch.name for launch in driver.launches] == ["add.any"] * 3
    assert ops.download(x).all()


def _captured_product(ops) -> Replay:
    """A step with the only references to its arrays; with 64 columns its program pads the row into scratch."""
    x, w, out = ops.empty((1, 64), np.float16), ops.weight(matrix(32, 64, 8)), ops.empty((1, 32))
    return ops.capture(lambda: ops.linear(x, w, out=out))


def test_a_captured_step_keeps_its_memory(ops, driver):
    before = ops.memory.in_use
    replay = _captured_product(ops)
    gc.collect()
    ops.memory.trim()
    driver.launches.clear()
    replay()
    assert [launch.name for launch in driver.launches] == ["linear.int8.rows8"]
    for launch in driver.launches:
        for name, kind in signatures.types(launch.name).items():
            if kind.startswith("*") and launch.args[name]:
                driver.check(launch.args[name], 1)
    del replay
    gc.collect()
    assert ops.memory.in_use == before


def test_captured_steps_share_their_temporaries(ops):
    """Ten products take the scratch of one, and so do the steps of ten sessions."""
    w = ops.weight(matrix(256, 1000, 4))
    x, out = ops.empty((1, 1000), np.float16), ops.empty((1, 256))

    def step(products):
        for _ in range(products):
            ops.linear(x, w, out=out)

    before = ops.memory.in_use
    one = ops.capture(lambda: step(1))
    taken = ops.memory.in_use - before
    assert taken > 0
    replays = [ops.capture(lambda: step(10)) for _ in range(10)]
    assert ops.memory.in_use == before + taken
    del one
    assert ops.memory.in_use == before + taken, "the others still use it"
    del replays
    gc.collect()
    assert ops.memory.in_use == before


def test_a_step_that_fails_leaves_no_scratch(ops):
    before = ops.memory.in_use

    def step():
        ops.empty((1000,))
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            ops.capture(step)
    gc.collect()
    assert ops.memory.in_use == before


def test_what_cannot_be_replayed_is_refused(ops):
    x = ops.empty((4,))
    for step in (
        lambda: ops.upload(np.zeros(4)),
        lambda: ops.write(x, np.zeros(4)),
        lambda: ops.download(x),
        lambda: ops.weight(matrix(32, 128, 4)),
        lambda: ops.capture(lambda: None),
    ):
        with pytest.raises(RuntimeError, match="captured step"):
            ops.capture(step)
    ops.write(x, np.zeros(4))


# a whole decode step, with neither torch nor triton


def test_a_decode_step_needs_neither_torch_nor_triton(blob):
    path = blob("tiny-vl-gptq", bits=4, vision_bits=8, head_bits=16)
    command = [sys.executable, str(TESTS / "fakes" / "decode_run.py"), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.stdout == "decoded\n", result.stderr
