"""Launches that become one while a step is recorded, on a fake driver.

What they compute is tested in tests/test_gpu_attention.py.
"""

from __future__ import annotations

import numpy as np
import pytest

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
