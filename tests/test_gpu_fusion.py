"""Launches that become one while a step is recorded, on a fake driver.

What they compute is tested in tests/test_gpu_products.py and tests/test_gpu_attention.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from fakes.gpu import matrix

from qvl_kernels.gpu import signatures
from qvl_kernels.ops import Norm


@pytest.mark.parametrize(("case", "names"), [
    ("one row", ["linear.int4.small", "linear.int4.small"]),
    ("two rows", ["linear.int4.small", "norm.any", "linear.int4.small"]),
    ("fp16", ["linear.fp16.small", "norm.any", "linear.int4.small"]),
    ("layer norm", ["linear.int4.small", "norm.any", "linear.int4.small"]),
    ("changed between", ["linear.int4.small", "add.any", "norm.any", "linear.int4.small"]),
    ("another array", ["linear.int4.small", "norm.any", "linear.int4.small"]),
])  # fmt: skip
def test_a_recorded_product_normalizes_what_the_next_one_reads(ops, driver, case, names):
    """Where it is one row, in RMSNorm, and nothing happens to it in between."""
    rows, weight = 2 if case == "two rows" else 1, ops.upload(np.ones(128, np.float32))
    first, second = ops.weight(matrix(128, 256, 16 if case == "fp16" else 4)), ops.weight(matrix(64, 128, 4))
    x, y, hidden = ops.empty((rows, 128)), ops.empty((rows, 128)), ops.empty((rows, 256), np.float16)
    out, norm = ops.empty((rows, 64)), Norm(weight, weight if case == "layer norm" else None, 1e-5)

    def step():
        ops.linear(hidden, first, out=x, residual=x)
        if case == "changed between":
            ops.add(x, y, out=x)
        ops.linear(y if case == "another array" else x, second, out=out, norm=norm)

    replay = ops.capture(step)
    driver.launches.clear()
    replay()
    assert [launch.name for launch in driver.launches] == names
    product, last = driver.launches[0], driver.launches[-1]
    if case == "one row":
        assert product.args["normed"] == last.args["x"] and product.args["norm_weight"] == weight.address
        assert product.args["norm_flags"] == signatures.OUT_HALF and product.args["padded"] == 128
        assert product.args["eps"] == np.float32(1e-5) and product.args["out"] == x.address
    else:
        assert product.args["norm_flags"] == 0


def test_a_product_that_is_not_recorded_normalizes_nothing(ops, driver):
    x, hidden, w = ops.empty((1, 128)), ops.empty((1, 128), np.float16), ops.weight(matrix(128, 128, 4))
    driver.launches.clear()
    ops.linear(hidden, w, out=x, residual=x)
    ops.linear(x, w, out=ops.empty((1, 128)), norm=Norm(ops.upload(np.ones(128, np.float32)), None, 1e-6))
    assert [launch.name for launch in driver.launches] == ["linear.int4.small", "norm.any", "linear.int4.small"]


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
