"""GPTQ against a plain float64 implementation of the paper, and its guarantees."""

import numpy as np
import pytest
from helpers import dequantize, output_error

from qvl_convert import gptq, hessian
from qvl_convert.hessian import Hessian, factorize
from qvl_runtime.errors import QvlError


def problem(n=70, k=200, tokens=2000, seed=0):
    """Weights and correlated inputs with a few strong channels."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, k)) @ (np.eye(k) + 0.3 * rng.standard_normal((k, k)) / np.sqrt(k) * 3)
    x *= np.exp(rng.standard_normal(k))
    h = Hessian(k)
    for part in np.array_split(x, 3):
        h.add(part.reshape(1, -1, k))
    return (rng.standard_normal((n, k)) * 0.05).astype(np.float32), h.mean(), x


def round_to_nearest(w, scales, zeros, bits, group_size):
    group = np.arange(w.shape[1]) // group_size
    return np.clip(np.rint(w / scales[:, group]) + zeros[:, group], 0, 2**bits - 1).astype(np.uint8)


def paper_gptq(w, hessian, scales, zeros, bits, group_size, order):
    """Algorithm 1 of Frantar et al. 2022, column by column, float64, with the inverse Hessian."""
    upper = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)].astype(np.float64))).T
    w = w[:, order].astype(np.float64)
    codes = np.empty(w.shape, np.uint8)
    for i, column in enumerate(order):
        s, z = scales[:, column // group_size].astype(np.float64), zeros[:, column // group_size]
        codes[:, column] = np.clip(np.rint(w[:, i] / s) + z, 0, 2**bits - 1)
        error = (w[:, i] - s * (codes[:, column].astype(np.float64) - z)) / upper[i, i]
        w[:, i:] -= np.outer(error, upper[i, i:])
    return codes


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_pass_chooses_what_the_papers_algorithm_chooses(bits, sym, monkeypatch):
    monkeypatch.setattr(gptq, "TURNS", 0)
    w, h, _ = problem()
    factor = factorize(h)
    scales, zeros = gptq.search_scales(w, factor.price, bits, 64, sym)
    want = paper_gptq(w, factor.hessian, scales, zeros, bits, 64, factor.order)
    codes, got_scales, got_zeros = gptq.gptq(w, factor, bits=bits, group_size=64, sym=sym, sweeps=0)
    np.testing.assert_array_equal(got_scales, scales.astype(np.float16))
    if not sym:
        np.testing.assert_array_equal(got_zeros, zeros)
    # float32 against float64: a value on the edge between two integers may fall to either side and move later ones
    assert (codes == want).mean() > 0.995


def settled(w, factor, scales, zeros, bits, group_size):
    """Round and settle block after block, float64: each cost is that of the block, if later columns may be reals."""
    unit = factor.upper.astype(np.float64) + np.eye(w.shape[1])
    order, width, lost = factor.order, gptq.WIDTH, np.zeros(w.shape)
    codes = np.empty(w.shape, np.uint8)
    for start in range(0, w.shape[1], width):
        columns = order[start : start + width]
        block = slice(start, start + len(columns))
        upper, price = unit[block, block], factor.price[columns].astype(np.float64)
        s, z = scales[:, columns // group_size].astype(np.float64), zeros[:, columns // group_size]
        x, ahead, q = w[:, columns].astype(np.float64), lost[:, :start] @ unit[:start, block], np.zeros(s.shape)
        for i in range(len(columns)):
            q[:, i] = np.clip(
                np.rint((x + ahead + (x - s * q)[:, :i] @ upper[:i])[:, i] / s[:, i]), -z[:, i], 2**bits - 1 - z[:, i]
            )
        hessian = (upper * price) @ upper.T
        for turn in range(gptq.TURNS):
            for i in range(len(columns))[:: 1 if turn % 2 else -1]:
                slope = (((x - s * q) @ upper + ahead) * price) @ upper[i]
                q[:, i] = np.clip(np.rint(q[:, i] + slope / hessian[i, i] / s[:, i]), -z[:, i], 2**bits - 1 - z[:, i])
        lost[:, block], codes[:, columns] = x - s * q, q + z
    return codes


@pytest.mark.parametrize(
    ("bits", "sym", "n", "k", "group_size"),
    [(4, True, 70, 200, 64), (4, False, 9, 300, 32), (8, True, 1, 130, 128), (4, True, 5, gptq.SPAN + 150, 128)],
)
def test_a_block_is_settled_as_in_double_precision(bits, sym, n, k, group_size):
    w, h, _ = problem(n, k)
    w[:, 3] *= 30
    factor = factorize(h)
    scales, zeros = gptq.search_scales(w, factor.price, bits, group_size, sym)
    want = settled(w, factor, scales, zeros, bits, group_size)
    codes, _, _ = gptq.gptq(w, factor, bits=bits, group_size=group_size, sym=sym, sweeps=0)
    # a value on the edge between two integers may fall to either side and move others
    assert (codes == want).mean() > 0.97

    def error(codes):
        return output_error(w, dequantize(codes, scales, zeros, group_size), factor.hessian)

    assert error(codes) < 1.01 * error(want)


def test_settling_and_a_sweep_lower_the_error(monkeypatch):
    w, h, _ = problem()
    factor = factorize(h)
    errors = {}
    for turns, sweeps in ((0, 0), (4, 0), (4, 1)):
        monkeypatch.setattr(gptq, "TURNS", turns)
        codes, scales, _ = gptq.gptq(w, factor, sweeps=sweeps)
        errors[turns, sweeps] = output_error(w, dequantize(codes, scales, 8, 128), h)
    assert errors[4, 1] < errors[4, 0] < 0.98 * errors[0, 0]


def test_a_factor_of_nearly_equal_inputs_is_right():
    """Two inputs a million times larger than the rest, and all but equal: their difference is lost in float32."""
    _, h, _ = problem(1, 60)
    big = h.astype(np.float64) * np.outer(np.r_[1e3, 1e3, np.ones(58)], np.r_[1e3, 1e3, np.ones(58)])
    big[1], big[:, 1] = big[0], big[:, 0]
    factor = factorize(big.astype(np.float32), damp=1e-7)
    unit = factor.upper.astype(np.float64) + np.eye(60)
    price = factor.price[factor.order].astype(np.float64)
    want = factor.hessian[np.ix_(factor.order, factor.order)].astype(np.float64)
    got = (unit * price) @ unit.T
    assert np.abs(got - want).max() < 1e-6 * want.max() and price.min() > 0


def test_a_factor_whose_pivots_are_too_small_is_computed_again_in_double_precision(monkeypatch):
    _, h, _ = problem(1, 60)
    used = []
    cholesky = hessian.cholesky
    monkeypatch.setattr(hessian, "cholesky", lambda a: (used.append(a.dtype), cholesky(a)))
    single = factorize(h)
    assert used == [np.float32]
    monkeypatch.setattr(hessian, "TRUSTED", np.inf)
    double = factorize(h)
    assert used == [np.float32, np.float32, np.float64] and double.damp == single.damp
    np.testing.assert_allclose(double.price, single.price, rtol=1e-3)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("n", "k", "group_size"), [(1, 32, 32), (70, 200, 64), (33, 129, 128), (40, 300, 32)])
def test_each_step_lowers_the_output_error(n, k, group_size, sym):
    w, h, x = problem(n, k)
    factor = factorize(h)
    scales, zeros = gptq.search_scales(w, factor.price, 4, group_size, sym)
    nearest = dequantize(round_to_nearest(w, scales, zeros, 4, group_size), scales, zeros, group_size)
    errors = [np.square((w - nearest) @ x.T).sum()]
    for sweeps in (0, 1, 4):
        codes, scales, zeros = gptq.gptq(w, factor, group_size=group_size, sym=sym, sweeps=sweeps)
        q = dequantize(codes, scales, 8 if sym else zeros, group_size)
        errors.append(np.square((w - q) @ x.T).sum())
        assert scales.shape == (n, -(-k // group_size)) and scales.dtype == np.float16
        assert codes.max() <= 15 and (sym or (zeros.min() >= 1 and zeros.max() <= 15))
    # one row is one draw of luck: only the sum over rows must fall at the first step
    assert errors[1] < 0.8 * errors[0] or n == 1
    assert errors[2] < errors[1] and errors[3] <= errors[2] * 1.001


def test_a_scale_is_fitted_to_its_integers(rng):
    """Weights that the integers express exactly with another scale: refining finds it."""
    codes = rng.integers(0, 16, (3, 64)).astype(np.uint8)
    zeros, right = np.full((3, 2), 8, np.int32), np.full((3, 2), 0.125, np.float32)
    w = dequantize(codes, right, zeros, 32)
    scales = right * np.float32(1.015625)
    _, hessian, _ = problem(3, 64)
    gptq.refine(w, codes, scales, zeros, np.asarray(hessian, np.float32), bits=4, group_size=32, sweeps=3)
    np.testing.assert_allclose(scales, right, rtol=2e-3)


def test_columns_are_visited_by_falling_energy():
    _, hessian, _ = problem(3, 64)
    energy = np.diagonal(hessian)[factorize(hessian).order]
    assert (np.diff(energy) <= 0).all() and energy[0] > energy[-1]


def test_rows_do_not_depend_on_their_neighbours(monkeypatch):
    w, h, _ = problem(100, 200)
    factor = factorize(h)
    whole = gptq.gptq(w, factor, group_size=64)
    monkeypatch.setattr(gptq, "CHUNK", 32)
    parts = gptq.gptq(w, factor, group_size=64)
    assert (whole[0] == parts[0]).mean() > 0.999


def test_the_last_column_of_a_group_counts_in_its_scale(rng):
    """A far larger weight there, whose error costs most: a scale for the other weights only would clip it."""
    w = (rng.standard_normal((4, 64)) * 0.02).astype(np.float32)
    w[:, [31, 63]] = 1
    price = np.ones(64, np.float32)
    price[[31, 63]] = 1e6
    for sym in (True, False):
        scales, zeros = gptq.search_scales(w, price, 4, 32, sym)
        codes = np.clip(np.rint(w[:, [31, 63]] / scales) + zeros, 0, 15)
        assert np.abs((codes - zeros) * scales - 1).max() < 0.01


@pytest.mark.parametrize("bits", [4, 8])
def test_dead_columns_and_zero_rows_stay_finite_and_are_rounded_to_nearest(bits):
    w, h, _ = problem()
    w[3] = 0
    h[:, 5] = h[5] = 0
    factor = factorize(h)
    assert factor.dead == 1
    codes, scales, _ = gptq.gptq(w, factor, bits=bits, group_size=64)
    q = dequantize(codes, scales, 2 ** (bits - 1), 64)
    assert np.isfinite(q).all() and not q[3].any()
    step = np.abs(scales[:, 0].astype(np.float32))
    inside = np.abs(w[:, 5]) < step * (2 ** (bits - 1) - 1)
    assert inside.sum() > 50 and (np.abs(w[:, 5] - q[:, 5])[inside] <= step[inside] * 0.501).all()


def test_outlier_channels_survive():
    w, h, x = problem()
    x[:, 7] *= 1000
    h = (x.T @ x / len(x)).astype(np.float32)
    codes, scales, _ = gptq.gptq(w, factorize(h), group_size=64)
    q = dequantize(codes, scales, 8, 64)
    assert np.isfinite(q).all() and output_error(w, q, h) < 1e-4


def test_a_singular_hessian_is_damped_more_and_said(caplog):
    w, _, x = problem()
    few = x[:20]
    h = few.T @ few / 20
    factor = factorize(h - 2e-3 * np.diagonal(h).mean() * np.eye(len(h)), damp=1e-6, name="h.0.mlp.w1")
    assert factor.damp > 1e-6 and "h.0.mlp.w1" in caplog.text
    codes, scales, _ = gptq.gptq(w, factor, group_size=64)
    assert output_error(w, dequantize(codes, scales, 8, 64), h) < 0.01


def test_an_unusable_hessian_is_an_error_that_names_the_matrix():
    with pytest.raises(QvlError, match=r"h\.0\.attn.*finite"):
        factorize(np.full((4, 4), np.nan), name="h.0.attn")
    with pytest.raises(QvlError, match=r"h\.0\.attn.*singular"):
        factorize(np.array([[1.0, 9.0], [9.0, 1.0]]), name="h.0.attn")


def test_no_activation_at_all_means_round_to_nearest():
    w, h, _ = problem()
    factor = factorize(np.zeros_like(h))
    codes, scales, _ = gptq.gptq(w, factor, group_size=64, sweeps=0)
    zeros = np.full(scales.shape, 8)
    np.testing.assert_array_equal(codes, round_to_nearest(w, scales.astype(np.float32), zeros, 4, 64))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e6, -1e30])
def test_weights_that_cannot_be_stored_are_refused_by_name(value, monkeypatch):
    monkeypatch.setattr(gptq, "CHUNK", 32)
    w, h, _ = problem(40, 64)
    w[37, 5] = value
    with pytest.raises(QvlError, match="lm_head holds a weight that is not finite or too large for an fp16 scale"):
        gptq.gptq(w, factorize(h), group_size=64, name="lm_head")


def test_a_scale_beyond_fp16_is_refused(monkeypatch):
    """The fit of a scale may pass what the largest weight asks for."""
    w, h, _ = problem(4, 64)

    def grow(w, codes, scales, *rest, **options):
        scales[2, 0] = 1e5

    monkeypatch.setattr(gptq, "refine", grow)
    with pytest.raises(QvlError, match="lm_head holds a weight"):
        gptq.gptq(w, factorize(h), group_size=64, name="lm_head")
