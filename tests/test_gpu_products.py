"""Products with packed weights on the GPU, as they ship, in the PTX interpreter, against the reference backend."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("triton")

from gpu_kernels import (
    HALF,
    OnDevice,
    activations,
    ceil,
    close,
    constants,
    flags,
    given,
    launch,
    linear,
    matrix,
    poisoned,
    reference,
    tiles,
)

from qvl_kernels.ops import Norm
from qvl_kernels.reference.functions import silu


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("n, k", [(32, 128), (65, 300), (130, 104), (1, 1)])
def test_a_packed_matrix_arrives_on_the_device(bits, n, k, rng):
    w = OnDevice(matrix(rng, n, k, bits))
    if bits == 16:
        np.testing.assert_array_equal(w.codes[:n, :k], w.matrix.weight)
        np.testing.assert_array_equal(w.codes[:n, k:], 0)
        return
    fields = w.codes.view(np.uint32)[..., None, :] >> (bits * np.arange(32 // bits, dtype=np.uint32))[:, None]
    codes = (fields & ((1 << bits) - 1)).reshape(w.blocks, w.rows, 128)
    np.testing.assert_array_equal(codes.transpose(1, 0, 2).reshape(w.rows, -1)[:n, :k], w.matrix.codes())


LINEAR_CASES = {
    "one row, one group": {"m": 1, "n": 32, "k": 128, "rows": 8},
    "one row, fp16": {"m": 1, "n": 33, "k": 130, "rows": 8, "dtype": HALF},
    "16 rows": {"m": 16, "n": 128, "k": 256, "dtype": HALF},
    "off every tile": {"m": 17, "n": 130, "k": 200, "rows": 32},
    "off every small tile": {"m": 9, "n": 130, "k": 200, "rows": 8},
    "split": {"m": 3, "n": 65, "k": 640, "split": 3, "dtype": HALF, "rows": 8},
    "outlier channel": {"m": 4, "n": 64, "k": 384, "outlier": True},
    "asymmetric, bias": {"m": 5, "n": 40, "k": 256, "asymmetric": True, "bias": True, "dtype": HALF},
    "tile of 64": {"m": 70, "n": 40, "k": 130, "bias": True, "residual": True, "rows": 64},
    "column order, split": {"m": 2, "n": 40, "k": 300, "asymmetric": True, "perm": True, "split": 2},
    "gelu, residual": {"m": 3, "n": 96, "k": 128, "bias": True, "activation": "gelu", "residual": True},
    "tanh gelu": {"m": 2, "n": 33, "k": 172, "bias": True, "activation": "gelu_tanh", "dtype": HALF},
    "quick gelu, few rows of a tile": {
        "m": 20,
        "n": 33,
        "k": 128,
        "bias": True,
        "activation": "quick_gelu",
        "rows": 256,
    },
    "tile of 128": {"m": 130, "n": 65, "k": 256, "rows": 128, "asymmetric": True},
    "tile of 256": {"m": 260, "n": 40, "k": 256, "rows": 256},
    "few rows of a tile of 128": {"m": 33, "n": 65, "k": 256, "rows": 128, "bias": True, "dtype": HALF},
}
KINDS = {"int4": (4, 128), "int4 in 64s": (4, 64), "int4 in 32s": (4, 32), "int8": (8, 128), "int8 in 32s": (8, 32),
         "fp16": (16, 128)}  # fmt: skip
OF_64S = "column order, split", "tile of 128"
"""Groups of 64 have the kernels of groups of 32: a case for each of them."""


def linear_cases():
    for case, kind in itertools.product(LINEAR_CASES, KINDS):
        # an architecture without that tile would repeat the cases of the one of 128
        if (case in OF_64S or kind != "int4 in 64s") and (case != "tile of 256" or 256 in tiles(kind)):
            yield case, kind


@pytest.mark.parametrize(("case", "kind"), [*linear_cases()])
def test_linear(kind, case, rng):
    options, (bits, group) = dict(LINEAR_CASES[case]), KINDS[kind]
    m, n, k = (options.pop(key) for key in ("m", "n", "k"))
    asymmetric, perm = (options.pop(key, False) and bits < 16 for key in ("asymmetric", "perm"))
    w = matrix(rng, n, k, bits, group, asymmetric=asymmetric, perm=perm, bias=options.pop("bias", False))
    x = activations(rng, m, k, outlier=options.pop("outlier", False))
    out, expected = poisoned((m, n), options.pop("dtype", np.float32)), poisoned((m, n))
    if options.pop("residual", False):
        options["residual"] = activations(rng, m, n)
    reference.linear(x, w, out=expected, activation=options.get("activation"), residual=options.get("residual"))
    linear(x, OnDevice(w), out, **options)
    close(out, expected, 4e-3)


@pytest.mark.parametrize("rows", tiles("int4"))
def test_a_gate_is_applied_to_the_sums(rows, rng):
    """In float32, to what the product is without."""
    w, x, gate = OnDevice(matrix(rng, 40, 130, 4, bias=True)), activations(rng, 20, 130), 4 * activations(rng, 20, 40)
    plain, gated = poisoned((20, 40)), poisoned((20, 40), HALF)
    linear(x, w, plain, rows=rows)
    linear(x, w, gated, rows=rows, gate=gate)
    np.testing.assert_allclose(gated, plain * silu(gate), rtol=1e-3, atol=1e-6)


def test_linear_adds_to_its_own_residual(rng):
    w, x, residual = matrix(rng, 40, 128, 4), activations(rng, 3, 128), activations(rng, 3, 40)
    expected = poisoned((3, 40))
    reference.linear(x, w, out=expected, residual=residual)
    linear(x, OnDevice(w), residual, residual=residual, split=1)
    close(residual, expected, 2e-3)


def test_a_split_product_has_the_same_bits_every_time(rng):
    """And those of adding the parts in order: what arrives last must not matter."""
    w, x = OnDevice(matrix(rng, 64, 640, 4)), activations(rng, 2, 640)
    first, second = poisoned((2, 64)), poisoned((2, 64))
    linear(x, w, first, split=5)
    linear(x, w, second, split=5)
    np.testing.assert_array_equal(first, second)


FEW = {1: 8, 3: 8, 8: 8, 9: 16, 16: 16}
MANY = {17: 32, 40: 64, 64: 64, 130: 128, 260: 256}
"""Rows of x, and of a tile."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [FEW, MANY], ids=["few", "many"])
def test_a_row_of_a_product_has_the_same_bits_whatever_the_others(sizes, kind, rng):
    """And wherever it is in its tile."""
    bits, group = KINDS[kind]
    w, found = OnDevice(matrix(rng, 65, 640, bits, group, asymmetric=bits < 16, bias=True)), dict[int, np.ndarray]()
    x = activations(rng, max(sizes) + 1, 640).astype(HALF)
    for first, (m, rows) in enumerate(sizes.items()):
        out = poisoned((m, 65))
        linear(x[first % 2 :][:m].copy(), w, out, rows=rows, split=3 if sizes is FEW else 1)
        for at, row in enumerate(np.array(out)):
            np.testing.assert_array_equal(row, found.setdefault(first % 2 + at, row))


@pytest.mark.parametrize("lone", [False, True])
def test_a_row_of_gate_and_up_has_the_same_bits_whatever_the_others(lone, rng):
    gate, up = (OnDevice(matrix(rng, 40, 640, 4)) for _ in range(2))
    norm = Norm(rng.uniform(0.5, 2, 640).astype(np.float32), None, 1e-6)
    x, found = activations(rng, 16, 640), []
    for m in (1, 8, 16):
        out, name = poisoned((m, 40)), f"gate_up.int4.rows{8 if m <= 8 else 16}"
        shape = constants(name)
        count = gate.rows // shape["BN"]
        partials, counters = poisoned((count, 4, shape["BM"] * shape["BN"])), np.zeros(count, np.int32)
        source, eps, known = given(x[:1], gate, 4 * count, 2, norm, True) if m == 1 and lone else (
            (gate.prepare_few(x[:m], norm), None, None, None), 0.0, 0)  # fmt: skip
        launch(name, (count, 4), *source, gate.codes, gate.scales, None, up.codes, up.scales, None, out, partials,
               counters, m, 40, gate.rows, gate.blocks, gate.shift, 640, eps, known)  # fmt: skip
        found.append(np.array(out))
    np.testing.assert_array_equal(found[0], found[1][:1])
    np.testing.assert_array_equal(found[1], found[2][:8])


def test_products_beyond_fp16_saturate(rng):
    """Infinity would become NaN in the next norm; the float32 residual stream keeps the true value."""
    w, x = matrix(rng, 32, 128, 4), activations(rng, 2, 128) * 6e4
    half, full, expected = poisoned((2, 32), HALF), poisoned((2, 32)), poisoned((2, 32))
    reference.linear(x.clip(-65504, 65504), w, out=expected)
    assert np.abs(expected).max() > 65504
    linear(x, OnDevice(w), half)
    linear(x, OnDevice(w), full)
    close(full, expected, 4e-3)
    close(half, expected.clip(-65504, 65504), 4e-3)


def test_a_norm_tames_what_fp16_could_not_hold(rng):
    x = activations(rng, 3, 256, outlier=True) * 1e4
    norm = Norm(rng.uniform(0.5, 2, 256).astype(np.float32), None, 1e-6)
    w, out, expected = matrix(rng, 64, 256, 4), poisoned((3, 64)), poisoned((3, 64))
    reference.linear(x, w, out=expected, norm=norm)
    linear(x, OnDevice(w), out, norm=norm)
    close(out, expected, 4e-3)


LONE_CASES = {
    "gathered": {"n": 33, "k": 130, "rows": 8},
    "gathered in order": {"n": 40, "k": 1100, "perm": True},
    "one block": {"n": 32, "k": 128, "norm": True, "rows": 8},
    "off the block": {"n": 33, "k": 200, "norm": True, "outlier": True},
    "programs of several chunks": {"n": 40, "k": 2600, "norm": True, "rows": 8, "split": 2},
    "a smaller last part": {"n": 40, "k": 640, "norm": True, "split": 3, "dtype": HALF},
    "in order": {"n": 40, "k": 1100, "norm": True, "perm": True, "rows": 8},
}
OF_ALL_KINDS = "gathered", "off the block"


@pytest.mark.parametrize(
    ("case", "kind"),
    [(c, k) for c in LONE_CASES for k in KINDS if k == "int4" or (c in OF_ALL_KINDS and k != "int4 in 64s")],
)
def test_programs_prepare_a_lone_row(kind, case, rng):
    """As `norm` or `gather` would."""
    options, (bits, group) = dict(LONE_CASES[case]), KINDS[kind]
    n, k, perm = options.pop("n"), options.pop("k"), options.pop("perm", False) and bits < 16
    w = matrix(rng, n, k, bits, group, perm=perm)
    x = activations(rng, 1, k, outlier=options.pop("outlier", False))
    norm = Norm(rng.uniform(0.5, 2, k).astype(np.float32), None, 0.5) if options.pop("norm", False) else None
    out, expected = poisoned((1, n), options.pop("dtype", np.float32)), poisoned((1, n))
    reference.linear(x if norm else x.astype(HALF).astype(np.float32), w, out=expected, norm=norm)
    linear(x, OnDevice(w), out, norm=norm, lone=True, **options)
    close(out, expected, 4e-3)


@pytest.mark.parametrize("k, perm", [(16, False), (1040, False), (2560, True), (3584, False), (5120, False)])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp16"])
def test_few_rows_are_normalized_with_the_bits_of_a_lone_one(kind, k, perm, rng):
    """The sum of squares has an order; the programs of a product keep what they normalize in `prepared`."""
    bits = KINDS[kind][0]
    w = OnDevice(matrix(rng, 33, k, bits, perm=perm and bits < 16))
    norm = Norm(rng.uniform(0.5, 2, k).astype(np.float32), None, 1e-6)
    x, expected = activations(rng, 5, k, outlier=True), poisoned((5, k))
    few = w.prepare_few(x, norm)
    reference.normalize(x, norm, out=expected)
    close(few[:, :k], expected if w.matrix.perm is None else expected[:, w.matrix.perm], 1e-3)
    np.testing.assert_array_equal(few[:, k:], 0)
    for row, rows in ((0, 8), (1, 16), (4, 8)):
        prepared = linear(x[row : row + 1], w, poisoned((1, 33)), rows=rows, norm=norm, lone=True)
        np.testing.assert_array_equal(prepared[0], few[row])


@pytest.mark.parametrize("m, n, k, rows, split, dtype, lone", [
    (1, 32, 128, 8, 1, HALF, False),
    (1, 65, 1100, 8, 2, HALF, True),
    (5, 65, 640, 8, 3, np.float32, False),
    (16, 130, 256, 16, 1, HALF, False),
    (17, 40, 300, 16, 2, HALF, False),
])  # fmt: skip
@pytest.mark.parametrize("biased", [False, True])
def test_gate_up(m, n, k, rows, split, dtype, lone, biased, rng):
    gate, up = (matrix(rng, n, k, 4, asymmetric=biased, bias=biased) for _ in range(2))
    norm = Norm(rng.uniform(0.5, 2, k).astype(np.float32), None, 1e-6)
    x, expected, out = activations(rng, m, k, outlier=True), poisoned((m, n)), poisoned((m, n), dtype)
    reference.gate_up(x, gate, up, out=expected, norm=norm)
    g, u, name = OnDevice(gate), OnDevice(up), f"gate_up.int4.rows{rows}"
    shape = constants(name)
    count = ceil(m, shape["BM"]) * (g.rows // shape["BN"])
    partials, counters = poisoned((count, 2 * split, shape["BM"] * shape["BN"])), np.zeros(count, np.int32)
    source, eps, known = given(x, g, count * 2 * split, split, norm, lone)
    launch(name, (count, 2 * split), *source, g.codes, g.scales, gate.bias, u.codes, u.scales, up.bias, out,
           partials, counters, m, n, g.rows, g.blocks, g.shift, k, eps,
           known | flags(BIAS=biased, BIAS_UP=biased, OUT_HALF=dtype == HALF))  # fmt: skip
    assert not counters.any()
    close(out, expected, 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_embed(kind, rng):
    bits, group = KINDS[kind]
    table = matrix(rng, 70, 200, bits, group, asymmetric=bits < 16, perm=bits == 8)
    w, ids, out, expected = (
        OnDevice(table),
        np.array([0, 69, 33, 33, 64], np.int32),
        poisoned((5, 200)),
        poisoned((5, 200)),
    )
    reference.embed(ids, table, out=expected)
    launch(f"embed.{w.kind.removesuffix('_fine')}", (w.blocks, 5), ids, w.codes, w.scales, table.perm, out, 200, w.rows,
           w.blocks, w.shift, flags(PERMUTED=table.perm is not None))  # fmt: skip
    np.testing.assert_allclose(out, expected, rtol=1e-6)
