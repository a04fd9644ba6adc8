"""Work that needs no launch of its own, on a fake driver.

What they compute is tested in tests/test_gpu_attention.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from fakes.gpu import matrix

from qvl_kernels.gpu import signatures
from qvl_kernels.ops import Attended, Norm


@pytest.mark.parametrize(("case", "names"), [
    ("one token", ["decode_attention.int8.128"]),
    ("two tokens", ["rope_append.int8", "decode_attention.int8.128"]),
    ("17 tokens", ["rope_append.int8", "cached_attention.int8.128"]),
    ("many heads", ["rope_append.int8", "decode_attention.int8.128"]),
])  # fmt: skip
@pytest.mark.parametrize("recorded", [False, True])
def test_the_attention_of_a_token_rotates_and_appends(ops, driver, case, names, recorded):
    rows, heads = {"two tokens": 2, "17 tokens": 17}.get(case, 1), 16 if case == "many heads" else 4
    cache, qkv = ops.kv_cache(2, 1, 128, 64, "int8"), ops.empty((rows, (heads + 2) * 128), np.float16)
    rope, start, weight = ops.empty((64, 128)), ops.empty((1,), np.int32), ops.empty((128,))
    out, sequence = ops.empty((rows, heads * 128), np.float16), Attended(rows, rope, None, cache, 1, start)

    def step():
        ops.attend(qkv, [sequence], out=out, k_norm=Norm(weight, None, 1e-6))

    driver.launches.clear()
    (ops.capture(step) if recorded else step)()
    assert [launch.name for launch in driver.launches] == names
    args = driver.launches[0].args
    fused = signatures.ROPE if case == "one token" else 0
    assert args["flags"] == signatures.K_NORM | fused and args["k_eps"] == np.float32(1e-6)
    assert (args["rope"], args["k_norm"], args["q_norm"]) == (rope.address, weight.address, 0)
    assert fused or driver.launches[1].args.get("flags", 0) == 0


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
