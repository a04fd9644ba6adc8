"""Launches that become one while a step is recorded, on a fake driver.

What they compute is tested in tests/test_gpu_attention.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from fakes.gpu import matrix

from qvl_kernels.gpu import signatures
from qvl_kernels.ops import Norm


@pytest.mark.parametrize(("case", "names"), [
    ("one token", ["decode_attention.int8.128"]),
    ("two tokens", ["rope_append.int8", "decode_attention.int8.128"]),
    ("another layer", ["rope_append.int8", "decode_attention.int8.128"]),
    ("many heads", ["rope_append.int8", "decode_attention.int8.128"]),
    ("another row", ["rope_append.int8", "decode_attention.int8.128"]),
])  # fmt: skip
def test_the_attention_of_a_recorded_token_rotates_and_appends(ops, driver, case, names):
    rows, heads = 2 if case == "two tokens" else 1, 16 if case == "many heads" else 4
    cache = ops.kv_cache(2, 1, 128, 64, "int8")
    qkv, other = (ops.empty((rows, (heads + 2) * 128), np.float16) for _ in range(2))
    rope, start, weight = ops.empty((64, 128)), ops.empty((1,), np.int32), ops.empty((128,))
    out, norm = ops.empty((rows, heads * 128), np.float16), Norm(weight, None, 1e-6)

    def step():
        ops.rope_append(qkv, rope=rope, logn=None, cache=cache, layer=0, start=start, k_norm=norm)
        row = other if case == "another row" else qkv
        ops.cached_attention(row, cache, 1 if case == "another layer" else 0, start, out=out)

    replay = ops.capture(step)
    driver.launches.clear()
    replay()
    assert [launch.name for launch in driver.launches] == names
    args = driver.launches[-1].args
    if case == "one token":
        assert args["flags"] == signatures.ROPE | signatures.K_NORM and args["k_eps"] == np.float32(1e-6)
        assert (args["rope"], args["k_norm"], args["q_norm"]) == (rope.address, weight.address, 0)
    else:
        assert args["flags"] == 0


@pytest.mark.parametrize(("case", "names", "flags"), [
    ("norm", ["linear.int4.rows8"], signatures.NORM),
    ("norm, in order", ["linear.int4.rows8"], signatures.NORM | signatures.ORDERED),
    ("in order", ["linear.int4.rows8"], signatures.GATHER | signatures.ORDERED),
    ("as it is", ["linear.int4.rows8"], 0),
    ("two rows", ["few_norm.any", "linear.int4.rows8"], 0),
    ("17 rows", ["norm.1024", "linear.int4.rows32"], 0),
    ("unaligned", ["norm.1024", "linear.int4.rows8"], 0),
    ("mean", ["norm.1024", "linear.int4.rows8"], 0),
    ("other numbers", ["gather.any", "linear.int4.rows8"], 0),
])  # fmt: skip
def test_a_lone_row_is_prepared_by_the_product(ops, driver, case, names, flags):
    rows, k = {"two rows": 2, "17 rows": 17}.get(case, 1), 250 if case == "unaligned" else 256
    w = ops.weight(matrix(128, k, 4, perm=np.arange(k, dtype=np.int32)[::-1].copy() if "order" in case else None))
    normed = case in ("norm", "norm, in order", "two rows", "17 rows", "unaligned", "mean")
    x = ops.empty((rows, k), np.float32 if normed or case == "other numbers" else np.float16)
    norm = Norm(ops.empty((k,)), ops.empty((k,)) if case == "mean" else None, 1e-6) if normed else None
    driver.launches.clear()
    ops.linear(x, w, out=ops.empty((rows, 128)), norm=norm)
    assert [launch.name for launch in driver.launches] == names
    assert driver.launches[-1].args["flags"] == flags and bool(driver.launches[-1].args["prepared"]) == bool(flags)


@pytest.mark.parametrize(("k", "names"), [
    (1024, ["gate_up.int4.rows8"]),
    (16384, ["few_norm.any", "gate_up.int4.rows8"]),
])  # fmt: skip
def test_programs_of_gate_and_up_prepare_few_columns(ops, driver, k, names):
    gate, up = (ops.weight(matrix(128, k, 4)) for _ in range(2))
    x, norm = ops.empty((1, k)), Norm(ops.empty((k,)), None, 1e-6)
    driver.launches.clear()
    ops.gate_up(x, gate, up, out=ops.empty((1, 128), np.float16), norm=norm)
    assert [launch.name for launch in driver.launches] == names
