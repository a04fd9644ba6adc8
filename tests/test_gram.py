"""Hessians summed in integers against float64, at edges of tiles and with values that stress the rounding."""

import numba
import numpy as np
import pytest

from qvl_convert import gram
from qvl_convert.hessian import Hessian

PANEL = gram.PANEL


def inputs(rows, k, seed=0):
    """Correlated inputs with strong channels, one of a single huge value, and one without any."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k)) + rng.standard_normal((rows, 1))
    x *= np.exp(2 * rng.standard_normal(k))
    x[rows // 2, 0] *= 1e4
    x[:, k // 2] = 0 if k > 2 else 1
    return x.astype(np.float32)


def rounded(x):
    """What `gram` multiplies, batch by batch, in float64."""
    for start in range(0, len(x), gram.BATCH):
        part = x[start : start + gram.BATCH]
        step = (np.abs(part).max(axis=0) / gram.LARGEST).astype(np.float32)
        inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0)
        yield np.rint(part * inverse) * step.astype(np.float64)


needs_pairs = pytest.mark.skipif(not gram.FAST, reason="this processor multiplies no pairs of int16")


@needs_pairs
@pytest.mark.parametrize(
    ("rows", "k"),
    [
        (1, 1),
        (1, 5),
        (3, PANEL - 1),
        (64, PANEL),
        (130, PANEL + 1),
        (127, 2 * PANEL + 7),
        (70, (2 * gram.SQUARE + 1) * PANEL + 3),
        (2048, 50),
        (2049, 33),
        (5000, 8),
    ],
)
def test_the_sum_is_that_of_the_rounded_inputs(rows, k, monkeypatch):
    pack = gram._pack
    monkeypatch.setattr(gram, "_pack", lambda x, out, step: (out.fill(0x7B7B), step.fill(7), pack(x, out, step)))
    x = inputs(rows, k)
    hessian = Hessian(k)
    for part in np.array_split(x, 3):
        hessian.add(part[None])
    got = hessian.sum
    want = sum(part.T @ part for part in rounded(x))
    scale = np.sqrt(np.outer(np.diagonal(want), np.diagonal(want)))
    assert (np.abs(got - want) <= 2e-6 * scale).all()
    np.testing.assert_array_equal(got, got.T)
    assert hessian.count == rows


@needs_pairs
def test_rounding_moves_no_input_by_more_than_half_a_step():
    x = inputs(3000, 40)
    moved = np.concatenate(list(rounded(x))) - x
    assert (np.abs(moved) <= 0.501 * np.abs(x).max(axis=0) / gram.LARGEST).all()


def test_a_hessian_is_close_to_the_sum_of_outer_products():
    x = inputs(4000, 200)[:, 1:]
    hessian = Hessian(199)
    hessian.add(x)
    want = x.T.astype(np.float64) @ x
    scale = np.sqrt(np.outer(np.diagonal(want), np.diagonal(want)))
    assert np.abs(hessian.mean() * 4000 - want).max() < 2e-4 * scale.max()


@needs_pairs
def test_the_largest_batch_of_the_largest_values_does_not_overflow():
    x = np.full((gram.BATCH, 3), 7, np.float32)
    x[:, 1] = -7
    hessian = Hessian(3)
    hessian.add(x)
    np.testing.assert_allclose(hessian.sum, np.outer(x[0], x[0]) * gram.BATCH, rtol=1e-6)


@needs_pairs
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_not_hidden(bad):
    x = inputs(20, 60)
    x[7, 55] = bad
    hessian = Hessian(60)
    hessian.add(x)
    sums = hessian.sum
    assert np.isnan(sums[55]).all() and np.isnan(sums[:, 55]).all()
    assert np.isfinite(np.delete(np.delete(sums, 55, 0), 55, 1)).all()


@needs_pairs
def test_the_bits_do_not_depend_on_threads():
    x, sums = inputs(700, 2 * PANEL), []
    for threads in (1, numba.config.NUMBA_NUM_THREADS):
        numba.set_num_threads(threads)
        hessian = Hessian(2 * PANEL)
        hessian.add(x)
        sums.append(hessian.sum)
    np.testing.assert_array_equal(*sums)


def test_without_products_of_pairs_the_sum_is_in_floating_point(monkeypatch):
    monkeypatch.setattr(gram, "FAST", False)
    x = inputs(300, 70)
    hessian = Hessian(70)
    hessian.add(x)
    want = x.T.astype(np.float64) @ x
    np.testing.assert_allclose(hessian.mean(), want / 300, rtol=0, atol=1e-6 * np.abs(want / 300).max())
