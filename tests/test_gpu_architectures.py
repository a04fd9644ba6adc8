"""A sample of tests/test_gpu_kernels.py on the PTX of the architectures it does not run whole.

``QVL_TEST_ARCHITECTURE=90 pytest tests/test_gpu_kernels.py tests/test_gpu_model.py`` runs everything on one.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton")

import test_gpu_kernels as table
from fakes.compiled import ARCHITECTURE, CompiledImages
from fakes.ptx_gpu import SHARED_LIMITS, PtxDriver

from qvl_kernels.gpu.signatures import ARCHITECTURES

SAMPLE = {
    "few rows": lambda rng: table.test_linear("int4", "split", rng),
    "many rows": lambda rng: table.test_linear("int4", "large tile, split", rng),
    "bytes": lambda rng: table.test_linear("int8", "asymmetric, bias", rng),
    "halves": lambda rng: table.test_linear("fp16", "gelu, residual", rng),
    "gate and up": lambda rng: table.test_gate_up(5, 65, 640, "small", 3, np.float32, False, rng),
    "rope": lambda rng: table.test_rope_append(True, 5, 9, 64, 0, rng),
    "decode": lambda rng: table.test_decode_attention(True, 2, 128, 63, rng),
    "prompt": lambda rng: table.test_cached_attention(False, 3, 2, 128, 70, rng),
    "picture": lambda rng: table.test_vision_attention("104", 104, 75, rng),
    "greedy": lambda rng: table.test_argmax(65, rng),
}


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != ARCHITECTURE])
@pytest.mark.parametrize("case", SAMPLE)
def test_the_other_architectures(architecture, case, rng, monkeypatch):
    monkeypatch.setattr(table, "ARCHITECTURE", architecture)
    monkeypatch.setattr(table, "images", CompiledImages(architecture))
    monkeypatch.setattr(PtxDriver, "shared_limit", SHARED_LIMITS[architecture])
    SAMPLE[case](rng)
