"""Memory of pictures with thousands of patches grows linearly with the patches."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from families import GOLDEN

import qvl_runtime
from qvl_convert.convert import convert
from qvl_kernels.cpu import CpuOps


def peak(work: Callable[[], object]) -> int:
    """Peak bytes of arrays beyond those that exist already."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("activations", ["int16", "int8"])
@pytest.mark.parametrize("patches", [4096, 16384])
def test_attention(patches, activations):
    ops = CpuOps(threads=2, activations=activations)
    qkv = ops.upload(np.random.default_rng(0).normal(size=(patches, 3 * 16)).astype(ops.activation_dtype))
    out = ops.empty((patches, 16), ops.activation_dtype)
    square = patches * patches * 2
    assert peak(lambda: ops.vision_attention(qkv, 1, out=out)) < min(square, 32 << 20) / 2


@pytest.mark.parametrize("name", ["q25-tied", "q3-tied"])
def test_a_picture_of_4096_patches(name, tmp_path):
    convert(GOLDEN / "ckpt" / name, tmp_path / "x.qvl")
    model = qvl_runtime.load(tmp_path / "x.qvl", device="cpu", max_pixels=1 << 21)
    side = 64 * model.config.visual.patch_size
    pixels = model.pictures.reader.decode(np.full((side, side, 3), 99, np.uint8))
    assert len(pixels.values) == 4096
    taken = peak(lambda: model.pictures.vision.encode(pixels.values, pixels.grid))
    # One array of scores of all heads would be 4096 * 4096 * 4 * 2 bytes at least.
    assert taken < 4 * pixels.values.nbytes < 4096 * 4096 * 8
