"""A sample of the tests of the GPU kernels on the PTX of the architectures they do not run whole on.

``QVL_TEST_ARCHITECTURE=90 pytest tests/test_gpu_{kernels,products,attention,model}.py`` runs everything on one.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("triton")

import gpu_kernels
import test_gpu_attention as attention
import test_gpu_kernels as rows
import test_gpu_products as products
from fakes.compiled import ARCHITECTURE, CompiledImages
from fakes.ptx_gpu import SHARED_LIMITS, PtxDriver
from ptx import PtxError

from qvl_kernels.gpu.signatures import ARCHITECTURES

SAMPLE = {
    "few rows": lambda rng: products.test_linear("int4", "split", rng),
    "many rows": lambda rng: products.test_linear("int4", "few rows of a tile of 128", rng),
    "some rows": lambda rng: products.test_a_gate_is_applied_to_the_sums(64, rng),
    "bytes": lambda rng: products.test_linear("int8", "asymmetric, bias", rng),
    "halves": lambda rng: products.test_linear("fp16", "gelu, residual", rng),
    "gate and up": lambda rng: products.test_gate_up(5, 65, 640, 8, 3, np.float32, False, False, rng),
    "gate and up of a lone row": lambda rng: products.test_gate_up(1, 65, 1100, 8, 2, np.float32, True, False, rng),
    "any few rows": lambda rng: products.test_a_row_of_a_product_has_the_same_bits_whatever_the_others(
        products.FEW, "int4", rng
    ),
    "any many rows": lambda rng: products.test_a_row_of_a_product_has_the_same_bits_whatever_the_others(
        products.MANY, "int8", rng
    ),
    "norm of few rows": lambda rng: products.test_few_rows_are_normalized_with_the_bits_of_a_lone_one(
        "int4", 2560, True, rng
    ),
    "drafts": lambda rng: attention.test_attention_of_a_token_has_the_same_bits_whatever_comes_after(
        True, 128, 62, rng
    ),
    "lone rows": lambda rng: attention.test_one_launch_attends_for_the_lone_rows_of_several_sequences(
        True, 4, 2, 128, False, rng
    ),
    "cut prompt": lambda rng: attention.test_attention_of_a_prompt_has_the_same_bits_however_it_is_cut(
        False, 128, 70, rng
    ),
    "rope": lambda rng: attention.test_rope_append(True, "norms", rng),
    "decode": lambda rng: attention.test_decode_attention(True, 5, 12, 2, 32, 9, rng),
    "one token": lambda rng: attention.test_decode_attention(False, 1, 7, 1, 128, 40, rng),
    "rotated token": lambda rng: attention.test_attention_of_a_token_rotates_and_appends_as_the_kernel_for_it(
        True, 8, 1, 128, 64, True, rng
    ),
    "prompt": lambda rng: attention.test_cached_attention(False, 3, 2, 2, 128, 70, rng),
    "picture": lambda rng: attention.test_vision_attention("104", 104, 75, rng),
    "windows": lambda rng: attention.test_vision_attention_within_segments("any", 20, [0, 16, 17, 33], rng),
    "greedy": lambda rng: rows.test_argmax(65, rng),
}


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != ARCHITECTURE])
@pytest.mark.parametrize("case", SAMPLE)
def test_the_other_architectures(architecture, case, rng, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "images", CompiledImages(architecture))
    monkeypatch.setattr(PtxDriver, "shared_limit", SHARED_LIMITS[architecture])
    SAMPLE[case](rng)


def test_products_beside_the_program_are_watched(rng, monkeypatch):
    """Without the barrier before its first copies, the loop overwrites what another warpgroup's product may read."""
    images, name = CompiledImages(90), "attention.64"
    monkeypatch.setattr(gpu_kernels, "images", images)
    monkeypatch.setattr(PtxDriver, "shared_limit", SHARED_LIMITS[90])
    before, products, after = images[name].code.decode().partition("wgmma.wait_group.sync.aligned")
    loop, barrier, rest = after.partition("\tbar.sync")
    code = before + products + loop + rest[rest.index("\n") :]
    images[name] = dataclasses.replace(images[name], code=code.encode())
    with pytest.raises(PtxError, match="another thread read since the last barrier"):
        attention.test_vision_attention("64", 64, 200, rng)
    assert barrier and products
