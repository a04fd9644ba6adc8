"""3-bit weights: the layout, and products that equal those of 4-bit weights with the same codes bit for bit."""

import numpy as np
import pytest

from qvl_kernels.cpu import CpuOps
from qvl_kernels.ops import Norm
from qvl_kernels.packing import Matrix, pack, pack_codes, packed_shapes, unpack_codes, widen


@pytest.fixture(scope="module", params=["int16", "int8"])
def cpu(request):
    return CpuOps(threads=2, activations=request.param)


def pair(rng, n: int, k: int, group: int, *, zeros: bool, perm: bool) -> tuple[Matrix, Matrix]:
    """Return a matrix with 3 bits, and the same with 4."""
    groups = -(-k // group)
    codes, scales = rng.integers(0, 8, (n, k)).astype(np.uint8), rng.uniform(-0.01, 0.02, (n, groups))
    points = rng.integers(0, 9, (n, groups)).astype(np.uint8) if zeros else None
    options = {"perm": rng.permutation(k) if perm else None, "bias": rng.standard_normal(n)}
    four = np.full((n, groups), 4, np.uint8) if points is None else points
    return pack(codes, scales, 3, group, zeros=points, **options), pack(codes, scales, 4, group, zeros=four, **options)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (32, 128), (33, 130), (70, 260)])
def test_every_code_comes_back(rng, n, k):
    codes = rng.integers(0, 8, (n, k)).astype(np.uint8)
    packed = pack_codes(codes, 3)
    assert (packed.shape, packed.dtype) == packed_shapes(n, k, 3)["qweight"]
    np.testing.assert_array_equal(unpack_codes(packed, n, k, 3), codes)


def test_three_lines_are_four_steps_as_documented(rng):
    codes = rng.integers(0, 8, (32, 128)).astype(np.uint8)
    a, b, c = pack_codes(codes, 3).view("<u2").reshape(4, 3, 64).transpose(1, 0, 2).astype(int)
    steps = np.stack([a ^ c << 1, a >> 1, b ^ c >> 1, b >> 1], axis=1) & 0x7777
    np.testing.assert_array_equal(steps.astype("<u2").view(np.uint8).reshape(16, 32, 4), pack_codes(codes, 4)[0, 0])


def test_all_bytes_are_codes(rng):
    packed = rng.integers(0, 256, (2, 3, 12, 32, 4)).astype(np.uint8)
    codes = unpack_codes(packed, 64, 384, 3)
    assert codes.max() == 7
    np.testing.assert_array_equal(pack_codes(codes, 3), packed)
    np.testing.assert_array_equal(widen(packed), pack_codes(codes, 4))


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17])
@pytest.mark.parametrize(
    ("n", "k", "group", "zeros", "perm"),
    [
        (1, 1, 64, False, False),
        (33, 130, 128, True, False),
        (70, 260, 64, False, True),
        (64, 2304, 128, False, False),  # more columns than a piece of a product of many rows
        (96, 384, 64, True, True),
    ],
)
def test_products_equal_those_of_4_bits(cpu, rng, n, k, group, zeros, perm, rows):
    narrow, wide = (cpu.weight(w) for w in pair(rng, n, k, group, zeros=zeros, perm=perm))
    x, residual = (rng.standard_normal((rows, width)).astype(np.float32) for width in (k, n))
    x[:, -1] *= 1000
    norm = Norm(np.ones(k, np.float32), None, 1e-6)
    outs = [np.full((rows, n), np.nan, np.float32) for _ in range(2)]
    for w, out in zip((narrow, wide), outs):
        cpu.linear(x, w, out=out, norm=norm, activation="gelu", residual=residual)
    assert np.isfinite(outs[0]).all()
    np.testing.assert_array_equal(*outs)
    for w, out in zip((narrow, wide), outs):
        cpu.gate_up(x, w, wide, out=out, norm=norm)
    np.testing.assert_array_equal(*outs)


def test_groups_of_32_are_refused():
    with pytest.raises(ValueError, match=r"bits 3 with groups of 32: expected .* groups of \(64, 128\)"):
        packed_shapes(32, 128, 3, 32)
