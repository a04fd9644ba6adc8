"""AutoGPTQ's layout: imported without loss, in every group size and order, or refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import GOLDEN
from helpers import conversion_refused, sha256
from shards import changed_copy

from qvl_convert.convert import convert
from qvl_convert.rtn import quantize
from qvl_runtime.blob import Blob

CKPT = GOLDEN / "ckpt"
INDEX = json.loads((GOLDEN / "gptq/index.json").read_text())
ASYM = CKPT / "tiny-q7-gptq-asym"
MODULE = "transformer.h.0.mlp.c_proj"


@pytest.mark.parametrize("name", INDEX)
def test_golden_matrices_are_bit_for_bit_the_published_ones(blob, name):
    four, sixteen = Blob(blob(name, bits=4)), Blob(blob(name, bits=16))
    modules = INDEX[name]["modules"]
    for module, golden in modules.items():
        weight = four.matrix(module).dequantize().T
        assert list(weight.shape) == golden["shape_KN"]
        assert sha256(weight) == golden["deq_fp32_sha256"]
        assert sha256(weight.astype(np.float16)) == golden["deq_fp16_sha256"]
        assert sha256(sixteen.matrix(module).weight.T) == golden["deq_fp16_sha256"]
        assert sixteen.matrix(module).bits == 16
    assert len(modules) == 5 * four.config.num_hidden_layers


def test_golden_checkpoints_cover_the_three_kinds(blob):
    kinds = {}
    for name in INDEX:
        matrix = Blob(blob(name, bits=4)).matrix(MODULE)
        kinds[name] = (matrix.zeros is not None, matrix.perm is not None, matrix.group_size)
    assert kinds == {
        "tiny-vl-gptq": (False, False, 128),
        "tiny-q7-gptq-actorder": (False, True, 128),
        "tiny-q7-gptq-asym": (True, False, 64),
    }


@pytest.mark.parametrize("bits", [4, 16])
def test_bias_of_every_quantized_linear_is_kept(blob, bits):
    made = Blob(blob(ASYM.name, bits=bits))
    for module in INDEX[ASYM.name]["modules"]:
        assert made.matrix(module).bias.any()
    assert made.matrix("lm_head").bias is None


def pack_words(values: np.ndarray, axis: int) -> np.ndarray:
    """Eight 4-bit values to an int32 along an axis, lowest bits first."""
    values = np.moveaxis(values, axis, -1).astype(np.uint32)
    octets = values.reshape(*values.shape[:-1], -1, 8)
    words = sum(octets[..., i] << np.uint32(4 * i) for i in range(8))
    return np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis)


def quantized(rng, tensors: dict, group_size: int, *, zeros: bool, shuffle: bool) -> dict[str, np.ndarray]:
    """Replace every quantized matrix by a random one; returns the weights ``[k, n]`` they stand for."""
    truth = {}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        k, n = tensors[f"{name}.qweight"].shape[0] * 8, tensors[f"{name}.qweight"].shape[1]
        groups = 1 if group_size == -1 else -(-k // group_size)
        g_idx = (np.arange(k) // (k if group_size == -1 else group_size)).astype(np.int32)
        if shuffle:
            g_idx = rng.permutation(g_idx)
        codes = rng.integers(0, 16, (k, n))
        stored = rng.integers(0, 16, (groups, n)) if zeros else np.full((groups, n), 7)
        scales = (rng.random((groups, n)) * 0.01 + 1e-3).astype(np.float16)
        truth[name] = scales.astype(np.float32)[g_idx] * (codes - (stored[g_idx] + 1)).astype(np.float32)
        tensors[f"{name}.qweight"] = pack_words(codes, 0)
        tensors[f"{name}.qzeros"] = pack_words(stored, 1)
        tensors[f"{name}.scales"], tensors[f"{name}.g_idx"] = scales, g_idx
    return truth


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("group_size", "stored"), [(32, 32), (64, 64), (96, 32), (128, 128), (192, 64), (256, 128), (1024, 128), (-1, 128)]
)
def test_every_layout_is_lossless(tmp_path, rng, group_size, stored, zeros, shuffle):
    truth = {}
    folder = changed_copy(
        ASYM,
        tmp_path / "source",
        lambda tensors: truth.update(quantized(rng, tensors, group_size, zeros=zeros, shuffle=shuffle)),
        quantize_config={"group_size": group_size, "desc_act": shuffle, "sym": not zeros},
    )
    convert(folder, tmp_path / "x.qvl")
    made = Blob(tmp_path / "x.qvl")
    for name, weight in truth.items():
        matrix = made.matrix(name)
        np.testing.assert_array_equal(matrix.dequantize().T, weight)
        assert matrix.group_size == stored
        assert (matrix.zeros is not None) == zeros
        one_group = group_size == -1 or group_size >= len(weight)
        assert (matrix.perm is not None) == (shuffle and not one_group)
    if zeros:
        assert max(made.matrix(name).zeros.max() for name in truth) == 16


def test_other_parts_follow_their_own_bits(blob):
    made = Blob(blob("tiny-vl-gptq", bits=4, vision_bits=4, head_bits=16))
    assert made.matrix("transformer.visual.conv1").bits == 4
    assert made.matrix("lm_head").bits == 16
    assert made.metadata["quantization"]["decoder"] == {"bits": 4, "group_size": 128, "method": "autogptq"}


def test_settings_in_config_json_alone_are_enough(tmp_path):
    settings = json.loads((ASYM / "quantize_config.json").read_text()) | {"quant_method": "gptq"}
    folder = changed_copy(ASYM, tmp_path / "source", config={"quantization_config": settings})
    (folder / "quantize_config.json").unlink()
    convert(folder, tmp_path / "x.qvl")
    golden = INDEX[ASYM.name]["modules"][MODULE]
    assert sha256(Blob(tmp_path / "x.qvl").matrix(MODULE).dequantize().T) == golden["deq_fp32_sha256"]


def test_a_linear_left_at_16_bits_is_rounded(tmp_path, rng):
    weight = rng.standard_normal((256, 384), np.float32).astype(np.float16)

    def restore(tensors):
        for suffix in ("qweight", "qzeros", "scales", "g_idx", "bias"):
            del tensors[f"{MODULE}.{suffix}"]
        tensors[f"{MODULE}.weight"] = weight

    convert(changed_copy(ASYM, tmp_path / "source", restore), tmp_path / "x.qvl")
    matrix = Blob(tmp_path / "x.qvl").matrix(MODULE)
    assert matrix.zeros is None
    np.testing.assert_array_equal(matrix.dequantize(), quantize(weight, 4, 128).dequantize())


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"bits": 3}, ["quantize_config.json", "'bits' is '3'"]),
        ({"quant_method": "awq"}, ["'quant_method' is 'awq'"]),
        ({"checkpoint_format": "gptq_v2"}, ["gptq_v2"]),
        ({"is_marlin_format": True}, ["is_marlin_format"]),
        ({"group_size": 100}, ["'group_size' is '100'"]),
        ({"group_size": "128"}, ["'group_size'"]),
        ({"group_size": 0}, ["'group_size'"]),
        ({"group_size": 32}, ["qzeros", "shape"]),
        ({"group_size": 1 << 63}, ["'group_size'", "multiple of 32"]),
    ],
)
def test_other_settings_are_conversion_refused(tmp_path, settings, parts):
    folder = changed_copy(ASYM, tmp_path / "source", quantize_config=settings)
    conversion_refused(folder, tmp_path / "x.qvl", *parts)


def test_8_bits_of_a_4_bit_model_are_refused_with_the_remedy(tmp_path):
    conversion_refused(ASYM, tmp_path / "x.qvl", "quantize_config.json", "cannot become 8", "--bits 4", bits=8)


def test_weights_beyond_fp16_are_refused_at_16_bits(tmp_path):
    folder = changed_copy(ASYM, tmp_path / "source", lambda t: t[f"{MODULE}.scales"].__setitem__((0, 3), 60000))
    conversion_refused(folder, tmp_path / "x.qvl", f"{MODULE}.qweight", "beyond fp16's range", "--bits 4", bits=16)
    convert(folder, tmp_path / "x.qvl")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t[f"{MODULE}.scales"].__setitem__((0, 3), np.inf), [f"{MODULE}.scales", "not finite"]),
        (lambda t: t[f"{MODULE}.bias"].__setitem__(3, np.nan), [f"{MODULE}.bias", "not finite"]),
        (lambda t: t[f"{MODULE}.g_idx"].__setitem__(5, 1), [f"{MODULE}.g_idx", "groups of 64"]),
        (lambda t: t[f"{MODULE}.g_idx"].__setitem__(5, -1), [f"{MODULE}.g_idx", "groups of 64"]),
        (lambda t: t.pop(f"{MODULE}.qzeros"), [f"{MODULE}.qzeros", "has no tensor"]),
        (lambda t: t.update({f"{MODULE}.g_idx": t[f"{MODULE}.g_idx"].astype(np.int64)}), ["g_idx", "int64", "int32"]),
        (lambda t: t.update({f"{MODULE}.qweight": t[f"{MODULE}.qweight"][1:]}), [f"{MODULE}.qweight", "shape"]),
    ],
)
def test_damaged_matrices_are_refused_by_name(tmp_path, change, parts):
    conversion_refused(changed_copy(ASYM, tmp_path / "source", change), tmp_path / "x.qvl", *parts)
