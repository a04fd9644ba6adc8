"""Many requests at once: every answer is the one it would have been alone."""

from __future__ import annotations

import pytest

import qvl_runtime as qvl
from qvl_runtime.inputs.pictures import LOCAL


@pytest.fixture
def make(blob):
    """``make(**options)``: a small chat model."""
    return lambda **options: qvl.load(blob("tiny-vl", bits=16), device="cpu", **options)


# the facade


def test_a_batch_gives_results_in_order_and_errors_in_their_place(make, in_golden):
    model, seen = make(), {}
    requests = [
        {"prompt": "What is this?", "max_new_tokens": 6, "seed": 1, "temperature": 1.0},
        {"prompt": ""},
        {"query": "<img>images/rgba.png</img>Hello", "history": [("a", "b")], "temperature": 0, "max_new_tokens": 5},
        {"prompt": "x", "n": 2, "max_new_tokens": 3},
        {"prompt": "x", "temprature": 1},
        "no dict",
    ]
    results = model.generate_batch(iter(requests), max_batch=3, on_result=seen.__setitem__)
    assert [seen[i] for i in range(len(requests))] == results
    alone = make(conversations=0)
    assert results[0].token_ids == alone.generate(**requests[0]).token_ids
    assert results[2].token_ids == alone.chat(**requests[2]).token_ids and len(results[2].history) == 2
    assert [r.token_ids for r in results[3]] == [alone.generate("x", max_new_tokens=3).token_ids] * 2
    for i, said in ((1, "empty"), (4, "temperature"), (5, "no dict")):
        assert isinstance(results[i], qvl.QvlError) and said in str(results[i])
    with pytest.raises(qvl.QvlError, match="max_batch is 0"):
        model.generate_batch([], max_batch=0)


def test_what_is_cached_is_used_only_with_its_salt(make, in_golden):
    model = make(conversations=4)
    prompt = "<img>images/rgba.png</img>What is this?"

    def cached(salt):
        timings = model.generate(prompt, max_new_tokens=2, cache_salt=salt).timings
        return timings.cached_tokens, timings.cached_images

    length = len(model.prompts.build(prompt, None, LOCAL).ids)
    for salt in ("a", None, "b"):
        assert cached(salt) == (0, 0)
    for salt in ("a", None, "b"):
        assert cached(salt) == (length, 1)
    model.forget()
    assert cached("a") == (0, 1), "the picture is still known to the same user"
    with pytest.raises(qvl.QvlError, match="cache_salt is 3"):
        model.generate("x", cache_salt=3)


def test_a_cancelled_answer_has_no_result(make):
    model = make()
    stream = model.stream("What is this?", max_new_tokens=200)
    next(stream)
    stream.cancel()
    stream.cancel()
    with pytest.raises(qvl.QvlError, match="cancelled"):
        stream.result()
    assert model.generate("What is this?", max_new_tokens=3).token_ids
