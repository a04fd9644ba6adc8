"""Models of unusual shapes, quantized in every way: the CPU computes what the reference does."""

from __future__ import annotations

import numpy as np
import pytest
from random_checkpoint import write_checkpoint

import qvl_runtime as qvl
from qvl_convert.convert import convert

IMAGE = "images/rgb_odd.png"
PROMPT = f"Picture 1: <img>{IMAGE}</img>\n what is this thing? 这是什么"
EXACT = {"bits": 16}
FOUR = {"bits": 4, "group_size": 32, "vision_bits": 4, "head_bits": 4}
MIXED = {"bits": 8, "group_size": 64, "vision_bits": 16, "head_bits": 4}
SHAPES = [
    {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "kv_channels": 64,
        "intermediate_size": 1000,
        "visual": {"width": 96, "heads": 3, "layers": 2, "image_size": 126},
    },
    {
        "hidden_size": 384,
        "num_attention_heads": 3,
        "kv_channels": 96,
        "intermediate_size": 700,
        "num_hidden_layers": 2,
        "visual": {"width": 120, "heads": 5, "layers": 1, "image_size": 84, "n_queries": 49, "mlp_ratio": 2.7},
    },
    {
        "hidden_size": 128,
        "num_attention_heads": 5,
        "kv_channels": 20,
        "intermediate_size": 262,
        "num_hidden_layers": 2,
        "visual": {"width": 128, "heads": 4, "layers": 1, "image_size": 112, "n_queries": 16},
    },
]


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("bits", [EXACT, FOUR, MIXED], ids=["16", "4g32", "mixed"])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_cpu_equals_reference(shape, bits, tmp_path, in_golden):
    path = tmp_path / "model.qvl"
    convert(write_checkpoint(tmp_path / "source", shape, **SHAPES[shape]), path, **bits)
    limit = 5e-6 if bits is EXACT else 2e-4
    for kv_cache in ("fp16", "int8"):
        reference, cpu = (qvl.load(path, device=device, kv_cache=kv_cache) for device in ("reference", "cpu"))
        assert _difference(cpu.encode_image(IMAGE), reference.encode_image(IMAGE)) < limit
        assert _difference(cpu.logits(PROMPT), reference.logits(PROMPT)) < limit
        answers = [m.generate(PROMPT, max_new_tokens=8).token_ids for m in (cpu, reference)]
        assert answers[0] == answers[1]


def test_eight_bit_activations_stay_within_their_limit(tmp_path, in_golden):
    """Used everywhere, they change logits by a percent or two; "auto" uses them for large products only."""
    path = tmp_path / "model.qvl"
    convert(write_checkpoint(tmp_path / "source", 7, **SHAPES[0]), path, **FOUR)
    wanted = qvl.load(path, device="reference").logits(PROMPT)
    errors = {
        a: _difference(qvl.load(path, device="cpu", activations=a).logits(PROMPT), wanted) for a in ("int8", "auto")
    }
    assert 1e-3 < errors["int8"] < 3e-2
    assert errors["auto"] < 2e-4
