"""GPU kernels of rows and of choosing, as they ship, in the PTX interpreter, against the reference backend."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton")

from gpu_kernels import HALF, activations, ceil, close, flags, launch, poisoned, reference

from qvl_kernels.gpu import signatures as s
from qvl_kernels.ops import Norm
from qvl_kernels.packing import round_up


@pytest.mark.parametrize("m, k", [(3, 104), (2, 2048), (1, 5000)])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, HALF])
def test_norm(m, k, layer, dtype, rng):
    x = activations(rng, m, k) + 3
    x[0, k // 3] *= 1000
    norm = Norm(rng.uniform(0.5, 2, k).astype(np.float32),
                rng.standard_normal(k).astype(np.float32) if layer else None, 0.5)  # fmt: skip
    perm = rng.permutation(k).astype(np.int32) if dtype == HALF else None
    expected, padded = poisoned((m, k)), round_up(k, 128) if dtype == HALF else k
    reference.normalize(x, norm, out=expected)
    out = poisoned((m, padded), dtype)
    launch(s.norm_kernel(k), (m,), x, norm.weight, norm.bias, perm, out, k, padded, norm.eps,
           flags(LAYER_NORM=layer, PERMUTED=perm is not None, OUT_HALF=dtype == HALF))  # fmt: skip
    close(out[:, :k], expected if perm is None else expected[:, perm], 1e-3 if dtype == HALF else 1e-6)
    np.testing.assert_array_equal(out[:, k:], 0)


@pytest.mark.parametrize("source, target", [(np.float32, HALF), (HALF, np.float32), (HALF, HALF)])
@pytest.mark.parametrize("k, permuted", [(1, False), (1300, False), (1300, True)])
def test_gather(source, target, k, permuted, rng):
    x = activations(rng, 3, k).astype(source)
    perm = rng.permutation(k).astype(np.int32) if permuted else None
    out, padded = poisoned((3, round_up(k, 128)), target), round_up(k, 128)
    launch("gather.any", (ceil(padded, s.ELEMENTS), 3), x, None, perm, out, k, padded,
           flags(PERMUTED=permuted, X_HALF=source == HALF, OUT_HALF=target == HALF))  # fmt: skip
    np.testing.assert_array_equal(out[:, :k], (x[:, perm] if permuted else x).astype(target))
    np.testing.assert_array_equal(out[:, k:], 0)


def test_gather_of_rows(rng):
    x, index, out = activations(rng, 5, 1100), np.array([3, 0, 3, 4], np.int32), poisoned((4, 1100))
    launch("gather.any", (2, 4), x, index, None, out, 1100, 1100, flags(ROWS=True))
    np.testing.assert_array_equal(out, x[index])


@pytest.mark.parametrize("types", [(np.float32, np.float32, np.float32), (HALF, np.float32, HALF), (HALF, HALF, HALF)])
def test_add(types, rng):
    x, y = (activations(rng, 1, 1500)[0].astype(t) for t in types[:2])
    out = poisoned(1500, types[2])
    launch("add.any", (2,), x, y, out, 1500,
           flags(X_HALF=types[0] == HALF, Y_HALF=types[1] == HALF, OUT_HALF=types[2] == HALF))  # fmt: skip
    np.testing.assert_array_equal(out, (x.astype(np.float32) + y).astype(types[2]))


# choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 65, 140000])
def test_argmax(size, rng):
    logits = rng.standard_normal((4, size)).astype(np.float32)
    logits[1] = logits[1].max()  # all tied
    logits[2, size // 2 :] = 9
    logits[3] = -np.inf
    out, counters = poisoned(4, np.int32), np.zeros(4, np.int32)
    values, indices = poisoned((4, s.ARGMAX_PARTS)), poisoned((4, s.ARGMAX_PARTS), np.int32)
    launch("argmax.any", (s.ARGMAX_PARTS, 4), logits, out, values, indices, counters, size)
    np.testing.assert_array_equal(out, [*logits[:3].argmax(-1), -1])
    for value in (np.nan, np.inf, -np.inf):
        logits[:3] = 0
        logits[1, size // 3] = value
        launch("argmax.any", (s.ARGMAX_PARTS, 4), logits, out, values, indices, counters, size)
        np.testing.assert_array_equal(out, [0, -1, 0, -1])
    assert not counters.any()


# moving ----------------------------------------------------------------------------------------------------------


def test_move_rows(rng):
    source = rng.integers(-9, 9, (3, 1500)).astype(np.int16)
    target = poisoned((3, 1400), np.int16)
    launch("move_rows.any", (2, 3), source, target, 1100, 1500, 1400)
    np.testing.assert_array_equal(target[:, :1100], source[:, :1100])
    np.testing.assert_array_equal(target[:, 1100:], 77)
