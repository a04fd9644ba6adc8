"""Published quantized linears of the newer families: AWQ and AutoGPTQ of 4 and 8 bits, stacked and lossless."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from families import GOLDEN
from shards import changed_copy

from qvl_convert.convert import convert
from qvl_convert.fp8 import dequantize
from qvl_runtime.blob import Blob
from qvl_runtime.errors import QvlError
from qvl_runtime.families.specs import MatrixSpec

GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(values: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Pack values into int32 words along an axis, lowest bits first."""
    pack = 32 // bits
    last = np.moveaxis(values, axis, -1).astype(np.uint32)
    groups = last.reshape(*last.shape[:-1], -1, pack)
    packed = sum(groups[..., i] << np.uint32(bits * i) for i in range(pack))
    return np.moveaxis(packed.astype(np.uint32).view(np.int32), -1, axis)


def awq(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    """AWQ's tensors of codes ``[n, k]``, zeros and scales ``[n, groups]``."""

    def turned(values: np.ndarray) -> np.ndarray:
        columns = np.ascontiguousarray(values.T)
        return words(columns.reshape(len(columns), -1, 8)[:, :, AWQ_ORDER].reshape(columns.shape), 4, 1)

    return {"qweight": turned(codes), "qzeros": turned(zeros), "scales": np.ascontiguousarray(scales.T)}


def autogptq(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int, order: np.ndarray) -> dict:
    """AutoGPTQ's tensors of the same; `order` tells the group of each column."""
    return {
        "qweight": words(np.ascontiguousarray(codes.T), bits, 0),
        "qzeros": words(np.ascontiguousarray(zeros.T) - 1, bits, 1),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": order.astype(np.int32),
    }


def quantized(tensors: dict, *, kind: str, bits: int, shuffle: bool = False) -> dict[str, np.ndarray]:
    """Replace the decoder's linears by random quantized ones; returns the weights ``[n, k]`` they stand for."""
    rng, truth = np.random.default_rng(0), {}
    for name in [n for n in tensors if ".layers." in n and n.endswith("_proj.weight")]:
        n, k = tensors.pop(name).shape
        order = np.arange(k) // GROUP
        if shuffle:
            order = np.random.default_rng(k).permutation(order)  # the same for q, k and v, which have one input
        codes = rng.integers(0, 2**bits, (n, k))
        zeros = rng.integers(1, 2**bits, (n, k // GROUP))
        scales = (rng.random((n, k // GROUP)) * 0.01 + 1e-3).astype(np.float16)
        truth[name] = scales.astype(np.float32)[:, order] * (codes - zeros[:, order]).astype(np.float32)
        base = name.removesuffix(".weight")
        made = awq(codes, zeros, scales) if kind == "awq" else autogptq(codes, zeros, scales, bits, order)
        tensors |= {f"{base}.{suffix}": array for suffix, array in made.items()}
    return truth


def settings(kind: str, bits: int) -> dict:
    if kind == "awq":
        return {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True}
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, "sym": False}


@pytest.mark.parametrize(("kind", "bits", "shuffle"), [("awq", 4, False), ("gptq", 4, True), ("gptq", 8, False)])
@pytest.mark.parametrize("name", ["q2-tied", "q25-untied"])
def test_lossless(name, kind, bits, shuffle, tmp_path):
    truth: dict[str, np.ndarray] = {}
    folder = changed_copy(
        GOLDEN / "ckpt" / name,
        tmp_path / "source",
        lambda tensors: truth.update(quantized(tensors, kind=kind, bits=bits, shuffle=shuffle)),
        config={"quantization_config": settings(kind, bits)},
    )
    out = tmp_path / "x.qvl"
    convert(folder, out, bits=bits)
    blob = Blob(out)
    specs = [spec for spec in blob.family.tensors(blob.config) if isinstance(spec, MatrixSpec)]
    decoder = [spec for spec in specs if spec.part == "decoder"]
    for spec in decoder:
        matrix = blob.matrix(spec.name)
        expected = np.concatenate([truth[source] for source in spec.sources])
        np.testing.assert_array_equal(matrix.dequantize(), expected)
        assert matrix.bits == bits
        assert (matrix.bias is not None) == spec.bias
        assert (matrix.perm is not None) == shuffle
    assert sum(len(spec.sources) for spec in decoder) == len(truth)
    assert blob.metadata["quantization"]["decoder"]["method"] == ("awq" if kind == "awq" else "autogptq")
    sixteen = tmp_path / "y.qvl"
    convert(folder, sixteen, bits=16)
    made = Blob(sixteen).matrix(decoder[0].name)
    half = np.concatenate([truth[source] for source in decoder[0].sources]).astype(np.float16)
    np.testing.assert_array_equal(made.weight, half)


def test_orders_that_differ(tmp_path):
    """Queries, keys and values are one matrix here, so their columns must be grouped alike."""

    def change(tensors: dict) -> None:
        quantized(tensors, kind="gptq", bits=4)
        name = next(name for name in tensors if name.endswith("k_proj.g_idx"))
        tensors[name] = tensors[name][::-1].copy()

    folder = changed_copy(
        GOLDEN / "ckpt" / "q2-tied",
        tmp_path / "source",
        change,
        config={"quantization_config": settings("gptq", 4)},
    )
    with pytest.raises(QvlError, match="in different orders"):
        convert(folder, tmp_path / "x.qvl")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("awq", {"version": "gemv"}, "'version' is 'gemv'"),
        ("awq", {"bits": 8}, "'bits' is '8'"),
        ("awq", {"group_size": 48}, "'group_size' is '48'"),
        ("gptq", {"bits": 3}, "'bits' is '3', only 4 or 8"),
        ("gptq", {"checkpoint_format": "gptq_v2"}, "checkpoint_format"),
        ("gptq", {"quant_method": "bitsandbytes"}, "quant_method"),
    ],
)
def test_refused(kind, values, message, tmp_path):
    folder = tmp_path / "source"
    changed_copy(
        GOLDEN / "ckpt" / "q2-tied",
        folder,
        lambda tensors: quantized(tensors, kind=kind, bits=4),
        config={"quantization_config": settings(kind, 4) | values},
    )
    with pytest.raises(QvlError, match=message):
        convert(folder, tmp_path / "x.qvl")


BLOCK = (16, 32)


def in_fp8(tensors: dict) -> dict[str, np.ndarray]:
    """Store the decoder's linears in FP8; returns the weights they stand for."""
    truth = {}
    for name in [n for n in tensors if ".layers." in n and n.endswith("_proj.weight")]:
        weight = tensors[name].astype(np.float32)
        n, k = weight.shape
        scales = (np.random.default_rng(n).random((-(-n // BLOCK[0]), -(-k // BLOCK[1]))) + 0.5).astype(np.float32)
        grown = np.kron(scales, np.ones(BLOCK, np.float32))[:n, :k]
        tensors[name] = (weight / grown).astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales.astype(ml_dtypes.bfloat16)
        grown = np.kron(tensors[f"{name}_scale_inv"].astype(np.float32), np.ones(BLOCK, np.float32))[:n, :k]
        truth[name] = tensors[name].astype(np.float32) * grown
    return truth


def fp8_copy(folder, change=lambda tensors: None, **settings):
    truth: dict[str, np.ndarray] = {}

    def both(tensors: dict) -> None:
        truth.update(in_fp8(tensors))
        change(tensors)

    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK), **settings}
    changed_copy(GOLDEN / "ckpt" / "q3-tied", folder, both, config={"quantization_config": config})
    return truth


def with_scales(tensors: dict, dtype: type) -> None:
    """Store all scales in another type."""
    tensors |= {name: array.astype(dtype) for name, array in tensors.items() if name.endswith("_scale_inv")}


@pytest.mark.parametrize("side", [160, 1 << 62, 10**30])
def test_a_block_of_fp8_may_be_larger_than_the_matrix(side):
    weight = np.ones((96, 160), ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(dequantize(weight, np.full((1, 1), 3, np.float32), (side, side)), 3)


def test_fp8_is_turned_back_into_numbers(tmp_path):
    truth = fp8_copy(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "x.qvl", bits=16)
    blob = Blob(tmp_path / "x.qvl")
    for spec in blob.family.tensors(blob.config):
        if isinstance(spec, MatrixSpec) and spec.part == "decoder":
            expected = np.concatenate([truth.pop(source) for source in spec.sources]).astype(np.float16)
            np.testing.assert_array_equal(blob.matrix(spec.name).weight, expected)
    assert not truth
    convert(tmp_path / "source", tmp_path / "y.qvl", bits=4)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda t: t.pop(next(n for n in t if n.endswith("scale_inv"))), {}, "is missing or not of shape"),
        (lambda t: with_scales(t, ml_dtypes.float8_e4m3fn), {}, "is float8_e4m3fn, expected 16 or 32 bits"),
        (lambda t: with_scales(t, np.uint8), {}, "is uint8, expected 16 or 32 bits"),
        (lambda t: None, {"weight_block_size": [16, 16]}, "is missing or not of shape"),
        (lambda t: None, {"weight_block_size": None}, "'weight_block_size' is 'None'"),
        (lambda t: None, {"fmt": "e5m2"}, "'fmt' is 'e5m2'"),
        (lambda t: None, {"quant_method": None}, "quant_method"),
    ],
)
def test_fp8_that_is_refused(change, settings, message, tmp_path):
    fp8_copy(tmp_path / "source", change, **settings)
    with pytest.raises(QvlError, match=message):
        convert(tmp_path / "source", tmp_path / "x.qvl")
