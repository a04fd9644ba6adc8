"""Defaults of a model: greedy or sampled, the window, and what it keeps between calls."""

from __future__ import annotations

import dataclasses

import pytest

import qvl_runtime as qvl


@pytest.fixture
def tiny(model, in_golden):
    return model("tiny-vl", device="cpu", bits=16)


def configured(monkeypatch, model, **values) -> None:
    monkeypatch.setattr(model, "generation_config", dataclasses.replace(model.generation_config, **values))


def test_a_generation_config_without_sampling_is_greedy(tiny, monkeypatch):
    options = {"max_new_tokens": 12}
    greedy = tiny.chat("Hello", temperature=0, repetition_penalty=1.0, **options).token_ids
    configured(monkeypatch, tiny, do_sample=False, temperature=50.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    assert tiny.chat("Hello", **options).token_ids == greedy
    configured(monkeypatch, tiny, do_sample=True, temperature=50.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    assert tiny.chat("Hello", seed=1, **options).token_ids != greedy


def test_the_default_window_is_the_models(tiny):
    assert tiny.window == tiny.config.max_position_embeddings


def test_a_chat_keeps_as_much_history_as_the_generation_config_says(tiny, monkeypatch):
    history = [("a question " * 5, "an answer " * 5)] * 6
    assert tiny.chat("Hello", history, max_new_tokens=1).left_out == 0
    configured(monkeypatch, tiny, max_window_size=150)
    few = tiny.chat("Hello", history, max_new_tokens=1)
    assert 0 < few.left_out < 6
    assert tiny.chat("Hello", history, max_window_size=6144, max_new_tokens=1).left_out == 0


def test_the_oldest_conversation_is_forgotten_first(blob):
    model = qvl.load(blob("tiny-vl", bits=16), device="cpu", conversations=2)

    def cached(prompt: str) -> int:
        return model.generate(prompt, max_new_tokens=2).timings.cached_tokens

    first, second, third = (f"{word} {word} {word} {word}" for word in ("alpha", "beta", "gamma"))
    assert cached(first) == cached(second) == 0
    assert cached(first) > 0  # the second is the oldest now
    assert cached(third) == 0
    assert cached(first) > 0
    assert cached(second) == 0


def test_of_answers_that_overlap_the_last_to_end_is_remembered(blob):
    model = qvl.load(blob("tiny-vl", bits=16), device="cpu", conversations=1)
    first, second = "alpha alpha alpha alpha", "beta beta beta beta"
    pieces = model.stream(first, max_new_tokens=8)
    next(pieces)
    model.generate(second, max_new_tokens=2)
    list(pieces)
    assert model.generate(first, max_new_tokens=2).timings.cached_tokens > 0
