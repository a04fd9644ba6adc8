"""The whole model on the GPU backend without a GPU: golden parity, every kernel in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

GOLDEN = Path(__file__).parent / "golden"
RUN = Path(__file__).parent / "fakes" / "golden_run.py"


def _noise(index: str, file: str) -> float:
    """How far the published code itself moves when it runs in fp16."""
    case = next(c for c in json.loads((GOLDEN / index).read_text())["cases"] if c["file"] == file)
    return case.get("noise_max_abs_logit", case.get("noise"))["original_in_fp16_vs_fp32"]


@pytest.fixture(scope="module")
def outcome(blob) -> dict:
    blobs = blob("tiny-vl-gptq", bits=4, vision_bits=8, head_bits=16), blob("tiny-vl-bin", bits=16)
    command = [sys.executable, str(RUN), *map(str, blobs)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_logits_are_within_the_noise_of_fp16(outcome):
    assert 0 < outcome["logits"] < 1.5 * _noise("lm/index_gptq.json", "tiny-vl-gptq_gptq_text.npz")


def test_greedy_tokens_are_those_of_the_published_code(outcome):
    """Through a captured graph, with both kinds of cache."""
    expected = outcome["greedy_expected"]
    assert outcome["greedy"] == expected[: len(outcome["greedy"])] and len(outcome["greedy"]) == 3
    assert outcome["greedy_int8"] == expected[: len(outcome["greedy_int8"])] and len(outcome["greedy_int8"]) == 2


def test_image_features_are_within_the_noise_of_fp16(outcome):
    assert 0 < outcome["features"] < 1.5 * _noise("vis/index.json", "tiny-vl-bin_base.npz")


def test_the_kernels_of_a_model_took_part(outcome):
    families = {name.partition(".")[0] for name in outcome["kernels"]}
    assert families >= {"linear", "gate_up", "embed", "norm", "rope_append", "cached_attention", "decode_attention"}
    assert families >= {"attention", "argmax", "gather", "add", "reorder", "pack_scales", "pad_rows"}
