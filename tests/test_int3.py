"""3-bit weights: the layout, products that equal those of 4-bit weights with the same codes bit for bit, and files."""

import numpy as np
import pytest
from conftest import GOLDEN

from qvl_convert.convert import convert
from qvl_convert.export import export
from qvl_kernels.cpu import CpuOps
from qvl_kernels.ops import Norm
from qvl_kernels.packing import Matrix, pack, pack_codes, packed_shapes, unpack_codes, widen
from qvl_runtime.blob import Blob
from qvl_runtime.errors import QvlError

VL = GOLDEN / "ckpt" / "tiny-vl"
THREE = {"bits": 3, "vision_bits": 3, "head_bits": 3, "group_size": 64}


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


def test_a_file_with_3_bits_answers_as_the_reference_backend_does(blob, model):
    path = blob("tiny-vl", **THREE)
    assert {part["bits"] for part in Blob(path).metadata["quantization"].values()} == {3}
    assert path.stat().st_size < blob("tiny-vl", vision_bits=4, head_bits=4, group_size=64).stat().st_size
    prompt = "What is this? 这是什么？"
    want = model("tiny-vl", **THREE).logits(prompt)
    got = model("tiny-vl", device="cpu", activations="int16", **THREE).logits(prompt)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * np.abs(want).max())
    assert model("tiny-vl", device="cpu", **THREE).generate(prompt, max_new_tokens=4).token_ids


def test_a_file_smaller_than_with_4_bits_has_3_where_they_cost_least(tmp_path, blob):
    smallest, four = (blob("tiny-vl", group_size=64, bits=n, vision_bits=n, head_bits=n).stat().st_size for n in (3, 4))
    target = (smallest + four) // 2000
    convert(VL, tmp_path / "x.qvl", target_size=f"{target}KB", group_size=64, device="cpu", calibration_samples=1)
    assert smallest < (tmp_path / "x.qvl").stat().st_size <= target * 1000 < four
    said = str([part["bits"] for part in Blob(tmp_path / "x.qvl").metadata["quantization"].values()])
    assert "3" in said and "4" in said


def test_what_3_bits_cannot_do_is_one_clear_line(tmp_path, blob):
    with pytest.raises(QvlError, match="--group-size 32: with 3 bits choose 64 or 128"):
        convert(VL, tmp_path / "x.qvl", vision_bits=3, group_size=32)
    with pytest.raises(QvlError, match="3 bits, which are not exported; convert with --bits 4, 8 or 16"):
        export(Blob(blob("tiny-vl", **THREE)), tmp_path / "out")
    with pytest.raises(QvlError, match="with 3 bits everywhere and groups of 64"):
        convert(VL, tmp_path / "x.qvl", target_size="10KB", group_size=64)
    assert list(tmp_path.iterdir()) == []
