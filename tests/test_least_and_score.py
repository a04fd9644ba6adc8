"""Minimum lengths of answers, and the likelihood of a given continuation."""

from __future__ import annotations

import numpy as np
import pytest

import qvl_runtime as qvl

IMAGE = "images/rgb_odd.png"
PROMPT = f"<img>{IMAGE}</img>What is this? Answer:"


@pytest.fixture
def tiny(model, in_golden):
    return model("tiny-vl", device="cpu", bits=16)


@pytest.fixture
def stopping(tiny, monkeypatch):
    """A model that would end its answer with the fourth token, and its answer without that end."""
    free = tiny.generate(PROMPT, max_new_tokens=12).token_ids
    assert len(free) == 12 and free[3] not in free[:3], "the golden model's answer has changed: choose another prompt"
    monkeypatch.setattr(tiny._engine, "_stop_ids", frozenset({free[3]}))
    return tiny, free


def test_no_answer_is_shorter_than_its_minimum(stopping):
    model, free = stopping
    assert model.generate(PROMPT, max_new_tokens=12).token_ids == free[:3]
    assert model.generate(PROMPT, max_new_tokens=12, min_new_tokens=3).token_ids == free[:3], "it may end right after"
    longer = model.generate(PROMPT, max_new_tokens=12, min_new_tokens=6)
    assert longer.token_ids[:3] == free[:3] and len(longer.token_ids) >= 6
    assert free[3] not in longer.token_ids


def test_a_forbidden_end_gives_way_to_the_next_best_token(stopping):
    model, free = stopping
    ids = model.tokenizer.encode(PROMPT) + free[:3]
    logits = model.logits(ids, [IMAGE])[-1].copy()
    logits[free[3]] = -np.inf
    assert model.generate(PROMPT, max_new_tokens=4, min_new_tokens=4).token_ids[3] == int(logits.argmax())


@pytest.mark.parametrize("least", [-1, 1.5, True])
def test_a_minimum_is_a_whole_number(tiny, least):
    with pytest.raises(qvl.QvlError, match="min_new_tokens"):
        tiny.generate(PROMPT, min_new_tokens=least)


def test_a_minimum_and_a_constraint_exclude_each_other(tiny):
    with pytest.raises(qvl.QvlError, match="min_new_tokens and constraint"):
        tiny.generate(PROMPT, min_new_tokens=2, constraint=qvl.Regex("yes|no"))


def test_the_score_of_a_continuation_is_that_of_its_logits(tiny):
    options = [" A", " B", " a cat on a mat", " yes"]
    found = tiny.score(PROMPT, options)
    before = tiny.tokenizer.encode(PROMPT)
    for option, scores in zip(options, found, strict=True):
        ids = tiny.tokenizer.encode_ordinary(option)
        logits = tiny.logits(before + ids, [IMAGE])[len(before) - 1 : -1].astype(np.float64)
        wanted = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert len(scores) == len(ids)
        # The cache of an answer holds fp16 keys and values, that of `logits` more precise ones.
        assert np.allclose(scores, wanted[np.arange(len(ids)), ids], atol=2e-3)


def test_scores_do_not_depend_on_each_other(tiny):
    options = [" a cat on a mat", " A", " the dog"]
    together = tiny.score(PROMPT, options)
    assert together == [tiny.score(PROMPT, [option])[0] for option in options]
    assert together[::-1] == tiny.score(PROMPT, options[::-1])


def test_a_continuation_must_fit_the_window(tiny):
    with pytest.raises(qvl.QvlError, match="window"):
        tiny.score(PROMPT, [[5] * tiny.window])


@pytest.mark.parametrize("wrong", [5, "A", [5], [[0.5]], [[10**9]], [None]])
def test_what_is_no_list_of_continuations_is_refused(tiny, wrong):
    with pytest.raises(qvl.QvlError, match=r"continuation|1000000000"):
        tiny.score(PROMPT, wrong)
