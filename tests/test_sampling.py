"""Sampling against the golden data, and the guarantees about seeds and values."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from qvl_runtime.engine.sampling import (
    Sampler,
    apply_repetition_penalty,
    apply_temperature,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    most_likely,
    softmax,
)
from qvl_runtime.errors import QvlError

DATA = json.loads((Path(__file__).parent / "golden/sampling.json").read_text(encoding="utf-8"))


def draws(sampler: Sampler, logits: np.ndarray, count: int) -> np.ndarray:
    return np.array([sampler(logits, [0]) for _ in range(count)])


@pytest.mark.parametrize("case", DATA["cases"], ids=lambda c: f"p{c['top_p']}k{c['top_k']}t{c['temperature']}")
def test_golden(case):
    logits = np.array(case["logits"], np.float32)
    out = apply_temperature(logits, case["temperature"])
    if case["top_k"]:
        out = keep_top_k(out, case["top_k"])
    if case["top_p"] < 1:
        out = keep_top_p(out, case["top_p"])
    assert np.flatnonzero(np.isfinite(out)).tolist() == case["kept"]
    np.testing.assert_allclose(softmax(out), case["probs"], atol=1e-6)

    sampler = Sampler(temperature=case["temperature"], top_k=case["top_k"], top_p=case["top_p"], seed=7)
    counts = np.bincount(draws(sampler, logits, 4000), minlength=logits.size)
    assert set(np.flatnonzero(counts)) <= set(case["kept"])
    np.testing.assert_allclose(counts / 4000, case["probs"], atol=0.04)


def test_golden_repetition_penalty():
    case = DATA["repetition_penalty"]
    logits = np.array(case["logits"], np.float32)
    out = apply_repetition_penalty(logits, case["prev"], case["penalty"])
    np.testing.assert_allclose(out, case["out"], rtol=1e-6)
    np.testing.assert_array_equal(logits, np.array(case["logits"], np.float32))


def test_repetition_penalty_comes_before_temperature_and_top_k():
    logits = np.array([1.0, 1.5, -1.0], np.float32)
    assert Sampler(repetition_penalty=2)(logits, [1]) == 0
    assert Sampler(temperature=1, top_k=1, repetition_penalty=2, seed=0)(logits, [1]) == 0


def test_top_k_acts_before_top_p():
    # Of the two that top_k leaves, the first alone has more than 0.6; of all four it has not.
    logits = np.log(np.array([0.4, 0.23, 0.22, 0.15], np.float32))
    assert set(draws(Sampler(temperature=1, top_k=2, top_p=0.6, seed=1), logits, 200)) == {0}
    assert set(draws(Sampler(temperature=1, top_p=0.6, seed=1), logits, 200)) == {0, 1}


def test_greedy():
    logits = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert Sampler()(logits, []) == logits.argmax()
    assert Sampler(temperature=0, top_p=0.1, top_k=3, seed=5)(logits, []) == logits.argmax()


def test_same_seed_same_tokens():
    logits = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    first, second = (draws(Sampler(temperature=1, seed=3), logits, 50) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert (first != draws(Sampler(temperature=1, seed=4), logits, 50)).any()
    assert (draws(Sampler(temperature=1), logits, 50) != draws(Sampler(temperature=1), logits, 50)).any()


@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 0.999])
def test_top_p_of_a_large_vocabulary(scale, p):
    """Sorting only the likely tokens finds what a full sort finds."""
    logits = (np.random.default_rng(1).standard_normal(20_000) * scale).astype(np.float32)
    probabilities = softmax(logits).astype(np.float64)
    order = np.argsort(-probabilities, kind="stable")
    count = int(np.searchsorted(np.cumsum(probabilities[order]), p)) + 1
    kept = np.flatnonzero(np.isfinite(keep_top_p(logits, p)))
    assert len(kept) == count
    assert probabilities[kept].min() == probabilities[order[:count]].min()


@pytest.mark.parametrize("k", [1, 20, 300, 19_999])
@pytest.mark.parametrize("kind", ["normal", "tied", "forbidden"])
def test_the_most_likely_hold_all_that_top_k_keeps(k, kind):
    """A token drawn from these few is the one drawn from all."""
    rng = np.random.default_rng(k)
    logits = (rng.standard_normal(20_000) * 4).astype(np.float32)
    if kind == "tied":
        logits = np.round(logits)
    if kind == "forbidden":
        logits[rng.random(20_000) < 0.999] = -np.inf
    few = most_likely(logits, k)
    kept = np.flatnonzero(np.isfinite(keep_top_k(logits, k)))
    assert set(kept) <= set(few) and (np.diff(few) > 0).all()
    if kind == "normal" and k <= 20:
        assert len(few) < 200
    for seed in range(5):
        sampler = Sampler(temperature=0.7, top_k=k, top_p=0.8, seed=seed)
        expected = keep_top_p(keep_top_k(apply_temperature(logits, 0.7), k), 0.8)
        probabilities = softmax(expected)
        possible = np.flatnonzero(probabilities)
        mass = np.cumsum(probabilities[possible], dtype=np.float64)
        drawn = np.random.default_rng(seed).random() * mass[-1]
        assert sampler(logits, [0]) == possible[np.searchsorted(mass[:-1], drawn, side="right")]


def test_tiny_temperature_is_greedy():
    logits = np.array([1.0, 80.0, 79.0], np.float32)
    assert set(draws(Sampler(temperature=1e-45, seed=0), logits, 50)) == {1}


def test_top_p_that_is_reached_exactly():
    """As transformers has it: what is left out may have exactly 1 - p."""
    assert np.isfinite(keep_top_p(np.zeros(4, np.float32), 0.5)).sum() == 2


def test_top_k_larger_than_the_vocabulary():
    logits = np.array([1, 2, 3], np.float32)
    np.testing.assert_array_equal(keep_top_k(logits, 50), logits)


def test_numpy_scalars_compute_like_numbers():
    logits = np.random.default_rng(3).normal(size=2000).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in (np.int8, np.uint8, np.int64):
            options = {"temperature": np.float16(0.5), "top_k": kind(100), "seed": kind(1)}
            assert (draws(Sampler(**options), logits, 20) == draws(Sampler(0.5, 100, seed=1), logits, 20)).all()
        tiny = Sampler(1, seed=1, min_p=np.longdouble("1e-4000"))  # smaller than any float
        assert tiny(logits, []) == Sampler(1, seed=1)(logits, [])


def test_forbidden_tokens_are_never_drawn():
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf], np.float32)
    assert set(draws(Sampler(temperature=5, top_p=0.99, seed=0), logits, 300)) == {1, 3}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("temperature", 10**40),
        ("temperature", 1e308),
        ("temperature", None),
        ("top_p", "1"),
        ("repetition_penalty", 1e-320),
        ("repetition_penalty", 1e308),
        ("presence_penalty", "x"),
        ("seed", -1),
        ("seed", 0.5),
    ],
)
def test_bad_values(name, value):
    with pytest.raises(QvlError, match=name):
        Sampler(**{name: value})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_broken_logits(bad, temperature):
    logits = np.array([1.0, bad, 2.0], np.float32)
    with pytest.raises(QvlError, match="token 1"):
        Sampler(temperature=temperature, seed=0)(logits, [])


def test_min_p_keeps_what_is_likely_enough():
    logits = np.log(np.array([0.5, 0.26, 0.2, 0.04], np.float32))
    assert np.isfinite(keep_min_p(logits, 0.5)).tolist() == [True, True, False, False]
    assert np.isfinite(keep_min_p(logits, 1.0)).tolist() == [True, False, False, False]


def test_count_penalties_see_the_answer_and_not_the_prompt():
    logits = np.array([1.0, 0.9, 0.0], np.float32)
    sampler = Sampler(frequency_penalty=0.2, presence_penalty=0.1)
    assert sampler(logits, [0, 0, 0]) == 0
    assert sampler(logits, [0, 0, 0, 0]) == 1
    adjusted = sampler.penalize(logits, [0, 0, 0, 0, 1, 1])
    np.testing.assert_allclose(adjusted, [0.7, 0.4, 0.0], atol=1e-6)


@pytest.mark.parametrize("option", [{"min_p": 2}, {"presence_penalty": 3}, {"frequency_penalty": float("nan")}])
def test_further_options_are_checked(option):
    with pytest.raises(QvlError, match=next(iter(option))):
        Sampler(**option)
