"""Round-to-nearest against a slow reference, on the edge cases of shapes and dtypes."""

from __future__ import annotations

import threading

import ml_dtypes
import numpy as np
import pytest

from qvl_convert.rtn import quantize
from qvl_kernels.ops import DeviceError
from qvl_kernels.packing import Matrix, packed_shapes, unpack_groups
from qvl_runtime.errors import QvlError

SHAPES = [(1, 1), (1, 128), (5, 40), (32, 128), (33, 129), (64, 588), (70, 300)]


def slow(weight: np.ndarray, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales, group by group, by the formulas."""
    n, k = weight.shape
    groups = -(-k // group_size)
    codes, scales = np.zeros((n, k), np.uint8), np.zeros((n, groups), np.float16)
    top = 2**bits - 1
    for row in range(n):
        for group in range(groups):
            columns = slice(group * group_size, (group + 1) * group_size)
            values = weight[row, columns].astype(np.float32)
            scale = np.float16(np.abs(values).max() / np.float32(top // 2))
            steps = np.rint(values * (np.float32(1) / np.float32(scale))) if scale else np.zeros_like(values)
            codes[row, columns] = np.clip(steps + 2 ** (bits - 1), 0, top)
            scales[row, group] = scale
    return codes, scales


def check(weight: np.ndarray, bits: int, group_size: int) -> Matrix:
    n, k = weight.shape
    codes, scales = slow(weight, bits, group_size)
    matrix = quantize(weight, bits, group_size)
    np.testing.assert_array_equal(unpack_groups(matrix.scales, n, k, group_size), scales)
    np.testing.assert_array_equal(matrix.codes(), codes)
    assert matrix.zeros is None
    shapes = packed_shapes(n, k, bits, group_size)
    assert (matrix.weight.shape, matrix.weight.dtype) == shapes["qweight"]
    return matrix


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_shapes(rng, n, k, bits):
    check(rng.standard_normal((n, k), np.float32), bits, 128)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_dtypes_and_groups(rng, dtype, group_size):
    weight = rng.standard_normal((40, 200), np.float32).astype(dtype)
    weight[:, 17] *= 1000
    weight[3] = 0
    for bits in (4, 8):
        check(weight, bits, group_size)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_error_is_at_most_half_a_step(rng, bits):
    weight = rng.standard_normal((64, 256), np.float32) + np.float32(0.3)
    weight[:, 5] *= 1000
    matrix = check(weight, bits, 64)
    step = np.repeat(unpack_groups(matrix.scales, 64, 256, 64).astype(np.float32), 64, axis=1)
    # A scale rounded to fp16, 11 bits, can move the ends of a group by 2^-11 of its range.
    slack = 2**bits * 2.0**-11
    assert np.all(np.abs(matrix.dequantize() - weight) <= step * (0.5 + slack))


def test_chunks_do_not_show(rng, monkeypatch):
    weight = rng.standard_normal((200, 96), np.float32)
    whole = quantize(weight, 4, 32)
    monkeypatch.setattr("qvl_convert.rtn.CHUNK_VALUES", 1)
    chunked = quantize(weight, 4, 32)
    np.testing.assert_array_equal(whole.weight, chunked.weight)
    np.testing.assert_array_equal(whole.scales, chunked.scales)


def test_padding_is_the_symmetric_zero(rng):
    matrix = quantize(rng.standard_normal((3, 10), np.float32), 4, 128)
    assert np.all(matrix.weight[0, 0, 4:] == 0x88)
    assert np.all(matrix.weight[0, 0, :, 3:] == 0x88)
    assert np.all(matrix.scales[0, 0, 3:] == 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e6])
@pytest.mark.parametrize("place", [(0, 0), (39, 199), (20, 128)])
def test_weights_that_cannot_be_stored_are_refused_by_name(rng, value, place):
    weight = rng.standard_normal((40, 200), np.float32)
    weight[place] = value
    with pytest.raises(QvlError, match=r"^lm_head holds a weight that is not finite or too large"):
        quantize(weight, 4, 128, name="lm_head")


def test_no_thread_to_be_had_is_said_in_one_line(rng, monkeypatch):
    def refused(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(DeviceError, match=r"^no thread can be started \(can't start .*\): raise the limits"):
        quantize(rng.normal(size=(16, 128)), 4, 128)


def test_values_too_small_for_a_scale_become_zero():
    weight = np.full((2, 64), 1e-9, np.float32)
    assert not quantize(weight, 4, 32).dequantize().any()
