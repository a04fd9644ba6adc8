"""Prompts of several requests in the same products: each has the same logits as alone."""

import numpy as np
import pytest

import qvl_runtime as qvl
from qvl_runtime.engine import scheduler
from qvl_runtime.engine.prefill import Unread, compute_slices, mixes
from qvl_runtime.engine.session import Session, SliceLimits
from qvl_runtime.inputs.pictures import LOCAL
from qvl_runtime.inputs.prompt import Prompt
from qvl_runtime.slices import at_once
from qvl_runtime.trace import no_trace


@pytest.fixture
def make(blob, in_golden):
    """``make(**options)``: a small chat model."""
    return lambda **options: qvl.load(blob("tiny-vl", bits=16), device="cpu", **options)


def test_a_picture_keeps_to_its_own_prompt(make):
    """One prompt continues within its picture, in the same products as the start of another."""
    model = make()

    def begun(text):
        prompt = model.prompts.build(text, None, LOCAL)
        features = model._engine.features_at_once(prompt)
        session = Session(model.decoder, "fp16", 512)
        session.keep(prompt)
        return session, session.prefill(prompt, features, 512)

    texts = "One <img>images/rgba.png</img>What is this?", "Three words more <img>images/rgba.png</img>And this?"
    alone = []
    for text in texts:
        session, work = begun(text)
        at_once(work)
        alone.append(session.logits(0))
    (first, begins), (second, continues) = map(begun, texts)
    next(begins)
    next(continues)
    continues.send(SliceLimits(64))
    assert (first.length, second.length) == (0, 64)
    compute_slices([first, second], 512, no_trace)
    for session, work, logits in zip((first, second), (begins, continues), alone):
        assert next(work, None) is None and session.unread is None
        np.testing.assert_array_equal(session.logits(0), logits)


@pytest.mark.parametrize("activations", ["int16", "int8"])
def test_prompts_side_by_side_are_computed_to_their_ends(make, activations):
    """One continues before a multiple of the slice's length."""
    decoder = make(activations=activations).decoder
    ids = [int(i) for i in np.random.default_rng(0).integers(32, 127, 150)]
    prompts = [Prompt(ids, []), Prompt(ids[::-1][:40], [])]

    def begun(prompt, cached):
        session = Session(decoder, "fp16", 256)
        for each in (Prompt([*prompt.ids[:cached], *[7] * 20], []), prompt) if cached else (prompt,):
            session.keep(each)
            work = session.prefill(each, [], 256)
            if each is not prompt:
                at_once(work)
        assert session.length == cached
        return session, work

    alone = []
    for prompt in prompts:
        session, work = begun(prompt, 0)
        at_once(work)
        alone.append(session.logits(0))
    (first, continues), (second, begins) = begun(prompts[0], 100), begun(prompts[1], 0)
    next(continues)
    next(begins)
    compute_slices([first, second], 128, no_trace)
    for session, work, logits in zip((first, second), (continues, begins), alone):
        assert next(work, None) is None and session.unread is None
        np.testing.assert_array_equal(session.logits(0), logits)


def test_waiting_prompts_are_computed_together(make, monkeypatch):
    model, together = make(conversations=0, prompts_first=True), []

    def computing(sessions, *arguments):
        together.append(len(sessions))
        compute_slices(sessions, *arguments)

    monkeypatch.setattr(scheduler, "compute_slices", computing)
    words = ["a", "b c", "d e f g h i j k l m n o p q r s t", "u"]
    requests = [{"prompt": word, "max_new_tokens": 4} for word in words]
    requests += [{"prompt": f"{word} <img>images/rgba.png</img>?", "max_new_tokens": 4} for word in words]
    with model._scheduler.gate, model._scheduler.device:  # nothing is computed meanwhile
        streams = [model.stream(**request) for request in requests]
    found = [stream.result() for stream in streams]
    assert sum(together) >= len(words)
    alone = make(conversations=0)
    assert [result.token_ids for result in found] == [alone.generate(**request).token_ids for request in requests]


def test_a_cancelled_prompt_does_not_end_those_beside_it(make, monkeypatch):
    model, streams = make(conversations=0, prompts_first=True), []
    forward = type(model.decoder).forward

    def cancelling(self, work, spans, *arguments):
        if len(spans) > 1 and streams:
            streams[1].cancel()
        forward(self, work, spans, *arguments)

    with model._scheduler.gate, model._scheduler.device:
        streams += [model.stream(f"{word} " * 9, max_new_tokens=3) for word in "abc"]
        monkeypatch.setattr(type(model.decoder), "forward", cancelling)
    found = [streams[i].result().token_ids for i in (0, 2)]
    with pytest.raises(qvl.QvlError, match="cancelled"):
        streams[1].result()
    monkeypatch.undo()
    alone = make(conversations=0)
    assert found == [alone.generate(f"{word} " * 9, max_new_tokens=3).token_ids for word in "ac"]


def test_a_prompt_with_other_arithmetic_beside_others_is_computed_alone(make):
    session = Session(make().decoder, "fp16", 256)
    assert not mixes(session)
    for coarse, length, expected in ((False, 1, True), (True, 16, False), (True, 17, True)):
        session.decoder.coarse = coarse
        session.unread = Unread([0] * length, [0] * length, [], 256)
        assert mixes(session) == expected
