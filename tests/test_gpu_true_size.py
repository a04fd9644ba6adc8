"""The announced GPU memory is enough at true sizes, with the driver's rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fakes.addresses import AddressDriver, TrueSizes
from fakes.gpu import Images

from qvl_kernels.gpu.ops import CudaOps
from qvl_runtime.budget import budget
from qvl_runtime.engine.decoder import DecodeStep
from qvl_runtime.engine.session import Session, step
from qvl_runtime.families.layers import Decoder
from qvl_runtime.families.weights import Weights
from qvl_runtime.inputs.prompt import Prompt
from qvl_runtime.slices import at_once

CONTEXT = 8192


@pytest.fixture
def true_sizes(monkeypatch):
    """``true_sizes(name)``: the tensors of a published size."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import published_vl

    return lambda name: TrueSizes(published_vl.config(name))


@pytest.mark.parametrize(("name", "kv_cache"), [("qwen2.5-vl-7b", "fp16"), ("qwen3-vl-4b", "int8")])
def test_the_announced_memory_is_enough(name, kv_cache, true_sizes):
    """A picture, a prompt, steps of every number of rows, and a cache that grows to the whole context."""
    sizes = true_sizes(name)
    told = budget(sizes, CONTEXT, kv_cache, "cuda")
    driver = AddressDriver(told.total)
    ops = CudaOps(driver, Images())
    ops.uploader = lambda values, target: None
    weights = Weights(sizes, ops)
    decoder = Decoder(weights, sizes.family.decoder_names(sizes.config), sizes.family.rotary, CONTEXT)
    vision = sizes.family.vision(weights)
    ops.memory.trim()
    assert told.weights <= driver.held < 1.03 * told.weights, "what rounding and arenas waste"

    visual, grid = sizes.config.visual, (40, 32)
    features = vision.encode(np.zeros((4 * grid[0] * grid[1], visual.patch_dim), np.float32), grid)
    session = Session(decoder, kv_cache, 256)
    run = DecodeStep(decoder)
    for length in (1000, 5632, CONTEXT - 16):
        ids = [1] * length
        at_once(session.prefill(Prompt(ids, []), [], length + 16))
        for rows in range(1, 17):
            session.feed(*[1] * rows)
            step(run, [session])
            session.truncate(length)
    assert session.state.store.capacity == CONTEXT and features.nbytes
    assert driver.most <= told.total
