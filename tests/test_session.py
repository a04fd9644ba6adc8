"""State that is kept between calls changes no answer: each equals that of a model without it."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import threading

import numpy as np
import pytest
from helpers import Failing, linked

import qvl_runtime as qvl
from qvl_convert.convert import convert
from qvl_kernels.cpu.arrays import CpuCache
from qvl_runtime.engine.prefix_cache import PrefixCache
from qvl_runtime.inputs.prompt import Prompt, Window
from qvl_runtime.results import collected

CONVERSATIONS = int(os.environ.get("QVL_TEST_CONVERSATIONS", "12"))
IMAGES = ("images/rgb_odd.png", "images/rgba.png")
WORDS = ["Where", "is", "the", "dog,", "and", "what", "colour", "has", "it?", "图中有什么", "框出", "42", "(1,2)", "\n"]


@pytest.fixture(scope="module")
def pair(blob):
    """``pair(kv_cache, variant)``: a model that remembers, and one that does not."""

    def make(kv_cache="fp16", variant="base", device="cpu", bits=16, **options):
        path = blob("tiny-vl", variant, bits=bits)
        options |= {"device": device, "kv_cache": kv_cache}
        return qvl.load(path, **options), qvl.load(path, **options | {"conversations": 0})

    return make


def _same(answer, fresh) -> None:
    """Equal token for token and, where they were asked for, logits to the last bit."""
    assert answer.token_ids == fresh.token_ids
    assert (answer.text, answer.finish_reason) == (fresh.text, fresh.finish_reason)
    assert answer.logprobs == fresh.logprobs


def _converse(model, fresh, random: random.Random) -> None:
    """One random conversation."""
    history, query = [], "Hello"
    for _ in range(random.randint(3, 7)):
        action = random.random()
        if action < 0.15 and history:
            history = history[: random.randrange(len(history))]
        if action < 0.85:  # else the question is asked again
            query = " ".join(random.choices(WORDS, k=random.randint(1, 12)))
        if action > 0.9 and history:
            query = history.pop()[0] + query  # the last question, edited
        if 0.3 < action < 0.5:
            query = f"<img>{random.choice(IMAGES)}</img>{query}"
        options = {"temperature": 0, "max_new_tokens": random.randint(0, 12), "max_window_size": 700}
        options["logprobs"] = random.choice([None, 2])
        if action > 0.95:
            stream = model.stream([{"role": "user", "content": query}], max_new_tokens=8)
            next(stream)  # and nobody asks for the rest
        answer = model.chat(query, history, speculate=random.random() < 0.8, **options)
        wanted = fresh.chat(query, history, speculate=False, **options)
        assert answer.left_out == wanted.left_out
        _same(answer, wanted)
        history = wanted.history


@pytest.mark.parametrize(  # every pair of values once
    ("bits", "kv_cache", "variant"),
    [(4, "fp16", "base"), (4, "int8", "long"), (16, "fp16", "long"), (16, "int8", "base")],
)
def test_random_conversations_equal_fresh_runs(bits, kv_cache, variant, pair, in_golden):
    """Turns, edits, undone turns, pictures, abandoned streams; "long" often crosses limits of dynamic NTK."""
    model, fresh = pair(kv_cache, variant, bits=bits)
    for seed in range(CONVERSATIONS):
        _converse(model, fresh, random.Random(seed))


def test_only_what_is_new_is_computed(pair, in_golden):
    model, _ = pair()
    first = model.chat(f"<img>{IMAGES[0]}</img>What is this?", temperature=0, max_new_tokens=8)
    second = model.chat("And where?", first.history, temperature=0, max_new_tokens=8)
    assert first.timings.cached_tokens == 0 and first.timings.cached_images == 0
    # The answer's text may be cut into other tokens than the model chose; all before it is kept in any case.
    assert second.timings.cached_tokens >= first.prompt_tokens - 1
    assert second.timings.cached_images == 1
    edited = model.chat("And where not?", first.history, temperature=0, max_new_tokens=8)
    assert edited.timings.cached_tokens > second.prompt_tokens - 16


def test_another_picture_under_the_same_name_is_another_prompt(pair, tmp_path, golden):
    model, fresh = pair()
    path = tmp_path / "picture.png"
    answers = []
    for image in IMAGES:
        path.write_bytes((golden / image).read_bytes())
        answer = model.generate(f"<img>{path}</img>What is this?", max_new_tokens=4, logprobs=1)
        wanted = fresh.generate(f"<img>{path}</img>What is this?", max_new_tokens=4, logprobs=1)
        assert answer.logprobs[0].logprob == pytest.approx(wanted.logprobs[0].logprob, abs=1e-4)
        assert answer.timings.cached_images == 0
        answers.append(answer.logprobs[0].logprob)
    assert abs(answers[0] - answers[1]) > 1e-3
    again = model.generate("What is this?", [(golden / IMAGES[1]).read_bytes()], max_new_tokens=4)
    assert again.timings.cached_images == 1, "a known picture under another name"


@pytest.mark.parametrize("kv_cache", ["fp16", "int8"])
def test_borders_of_dynamic_ntk(kv_cache, pair):
    """seq_length is 64: the NTK factor changes at 65, 129 and 257 tokens, also downward, and discards what was kept."""
    model, fresh = pair(kv_cache, "long")
    ids = [int(i) for i in np.random.default_rng(0).integers(32, 127, 300)]
    for before, after in ((60, 64), (64, 65), (65, 128), (128, 129), (256, 257), (257, 64), (100, 60)):
        model.generate(ids[:before], max_new_tokens=8)
        answer = model.generate(ids[:after], max_new_tokens=8)
        crossed = sum(bound < max(before, after) for bound in (64, 128, 256)) != sum(
            bound < min(before, after) for bound in (64, 128, 256)
        )
        assert answer.timings.cached_tokens == (0 if crossed else min(before, after - 1))
        _same(answer, fresh.generate(ids[:after], max_new_tokens=8))


def test_each_session_has_its_own_rotary_table(pair):
    """A prompt with another NTK factor in one session does not affect the next session."""
    model, fresh = pair(variant="long", conversations=2)
    ids = [int(i) for i in np.random.default_rng(0).integers(32, 127, 90)]
    wanted = fresh.generate(ids[:40], max_new_tokens=8)
    stream = model.stream(ids[:40], max_new_tokens=8)
    pieces = [next(stream)]
    fresh.generate(ids, max_new_tokens=2)
    assert collected([*pieces, *stream], lambda text: []).token_ids == wanted.token_ids


def test_only_computed_positions_of_a_running_answer_are_copied(pair):
    """Its session has the keys of an earlier prompt, which another NTK factor made invalid."""
    model, _ = pair(variant="long", conversations=4)
    ids = [int(i) for i in np.random.default_rng(0).integers(32, 127, 150)]
    model.generate([*ids[:40], *[50] * 60], max_new_tokens=1)
    model.generate(ids, max_new_tokens=1)

    def begun(ids):
        with pytest.raises(StopIteration) as end:
            next(model._prefix_cache.begin(Prompt(ids, []), len(ids)))
        return end.value.value

    running, cached = begun(ids[:100])
    assert (cached, running.length) == (0, 0)
    other, cached = begun([*ids[:45], *[51] * 55])
    assert other is not running and (cached, other.length) == (0, 0)


def test_a_prompt_that_differs_in_its_last_token_alone_is_computed(pair):
    model, fresh = pair()
    ids = model.tokenizer.encode("What is this")
    for last in model.tokenizer.encode("?!"):
        answer = model.generate([*ids, last], max_new_tokens=4, logprobs=1)
        _same(answer, fresh.generate([*ids, last], max_new_tokens=4, logprobs=1))
    assert answer.timings.cached_tokens == len(ids)


def test_the_same_prompt_again_is_not_computed(pair):
    model, _ = pair()
    one = model.generate("What is this?", max_new_tokens=8, temperature=1, seed=3)
    two = model.generate("What is this?", max_new_tokens=8, temperature=1, seed=3)
    assert two.token_ids == one.token_ids
    assert two.timings.cached_tokens == two.prompt_tokens
    model.generate("What", max_new_tokens=8)
    assert model.generate("What is this?", max_new_tokens=8).timings.cached_tokens < two.prompt_tokens


def test_n_answers_share_the_prompt(pair):
    model, _ = pair()
    options = {"temperature": 1.0, "max_new_tokens": 8}
    answers = model.generate("What is this?", n=3, seed=5, **options)
    assert [a.timings.cached_tokens == a.prompt_tokens for a in answers] == [False, True, True]
    alone = [model.generate("What is this?", seed=5 + i, **options) for i in range(3)]
    assert [a.token_ids for a in answers] == [a.token_ids for a in alone]
    assert len({tuple(a.token_ids) for a in answers}) == 3
    with pytest.raises(qvl.QvlError, match="n is 0"):
        model.generate("x", n=0)


def test_interleaved_streams_do_not_mix(pair):
    model, fresh = pair()
    prompts = ["What is this?", "Where is the dog?"]
    wanted = [fresh.generate(p, max_new_tokens=12) for p in prompts]
    streams = [model.stream(p, max_new_tokens=12) for p in prompts]
    pieces = [[], []]
    for i in [0, 1, 1, 0, 0, 1] * 3:
        pieces[i] += [piece for _, piece in zip(range(1), streams[i])]
    for i, stream in enumerate(streams):
        pieces[i] += stream
        _same(collected(pieces[i], lambda text: []), wanted[i])


def test_threads_do_not_mix(pair):
    model, fresh = pair(conversations=2)
    prompts = [f"Question {i}: {' '.join(WORDS[i:])}" for i in range(6)]
    wanted = [fresh.generate(p, max_new_tokens=16) for p in prompts]
    failures = []

    def ask(order):
        try:
            for i in order:
                _same(model.generate(prompts[i], max_new_tokens=16), wanted[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(order,)) for order in ([0, 1, 2] * 3, [3, 4, 5] * 3, [2, 3, 0] * 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.fixture(params=[4, 16])
def coarse(request, pair):
    """``coarse(**options)``: as `pair`, where prompts of more than 16 tokens are computed with other arithmetic.

    In the products of int4 weights and in attention, or in attention alone.
    """

    def make(**options):
        first, second = pair(bits=request.param, activations="int8", **options)
        assert first.decoder.coarse and second.decoder.coarse
        return first, second

    return make


def _short_and_long() -> list[list[int]]:
    """Prompts of up to 16 tokens and of more, with common prefixes."""
    ids = [int(i) for i in np.random.default_rng(4).integers(32, 127, 60)]
    return [ids, ids[:40] + [50] * 20, ids[:17], ids[:16], ids[:9], ids[:3] + [50] * 6, ids[:9] + [50] * 9]


@pytest.mark.parametrize("conversations", [1, 2])
def test_short_and_long_prompts_in_any_order(coarse, conversations):
    """Each has had an answer before the next."""
    model, fresh = coarse(conversations=conversations)
    prompts = _short_and_long()
    wanted = [fresh.generate(ids, max_new_tokens=3, logprobs=2) for ids in prompts]
    for order in itertools.permutations(range(len(prompts)), 2):
        for i in order:
            _same(model.generate(prompts[i], max_new_tokens=3, logprobs=2), wanted[i])
    for i in (0, 3):
        for again in (False, True):
            answer = model.generate(prompts[i], max_new_tokens=3, logprobs=2)
            _same(answer, wanted[i])
            assert (answer.timings.cached_tokens == len(prompts[i])) >= again, "a whole match is kept"


@pytest.mark.parametrize("length", [9, 16])
def test_what_follows_the_answer_to_a_short_prompt(coarse, length):
    """It is kept with its answer, but for no other prompt that begins alike, whatever came between."""
    model, fresh = coarse(conversations=1)
    ids, options = _short_and_long()[0][:length], {"max_new_tokens": 3, "logprobs": 2}
    said = model.generate(ids, max_new_tokens=20).token_ids
    following = [*ids, *said, *[60] * 30]
    assert model.generate(following, **options).timings.cached_tokens >= length + len(said) - 1
    others = [[*ids, *[61] * 40], [*ids[:5], *[61] * 40], ids[:7], [*ids, *said[:2], *[60] * 3][:16], ids]
    for other in others:
        model.forget()
        model.generate(ids, max_new_tokens=20)
        model.generate(following, **options)
        if len(other) <= 16 or other[: length + 1] != following[: length + 1]:
            _same(model.generate(other, **options), fresh.generate(other, **options))


def test_short_and_long_prompts_side_by_side(coarse):
    model, fresh = coarse(conversations=0)
    for first, second in itertools.permutations(_short_and_long(), 2):
        wanted = fresh.generate(second, max_new_tokens=3, logprobs=2)
        stream = model.stream(first, max_new_tokens=40)
        next(stream)
        _same(model.generate(second, max_new_tokens=3, logprobs=2), wanted)
        stream.cancel()


def test_n_answers_share_a_short_prompt(coarse):
    model, _ = coarse(conversations=4)
    ids = _short_and_long()[4]
    answers = model.generate(ids, n=3, seed=5, temperature=1.0, max_new_tokens=4)
    assert [a.timings.cached_tokens for a in answers] == [0, len(ids), len(ids)]


def test_a_saved_prompt_and_shorter_ones(coarse, tmp_path):
    model, fresh = coarse()
    prompts, path = _short_and_long(), tmp_path / "past"
    model.generate(prompts[4], max_new_tokens=20)
    assert model._prefix_cache.save(path, prompts[4], "") == len(prompts[4])
    options = {"max_new_tokens": 3, "logprobs": 2}
    for count, known in ((9, prompts[4]), (40, prompts[1])):
        if count == 40:
            model.forget()
            model.generate(prompts[0], max_new_tokens=3)
            assert model._prefix_cache.save(path, known, "") == count
        for ids in prompts:
            model.forget()
            assert model._prefix_cache.load(path, "", model.window) == count
            _same(model.generate(ids, **options), fresh.generate(ids, **options))


def test_two_conversations_take_turns(pair):
    model, _ = pair(conversations=2)
    dogs, cats = ([i] * 40 for i in (70, 80))
    for ids in (dogs, cats):
        model.generate(ids, max_new_tokens=2)
    for ids in (dogs, cats, dogs):
        assert model.generate([*ids, 90], max_new_tokens=2).timings.cached_tokens >= 40
    model.forget()
    assert model.generate(dogs, max_new_tokens=2).timings.cached_tokens == 0


@pytest.mark.parametrize("operation", ["embed", "linear", "rope_append", "argmax", "write", "download"])
def test_an_error_at_any_point_leaves_a_sound_session(operation, pair, monkeypatch):
    """The operation fails at its n-th call, for growing n, during a conversation; the next turn is correct."""
    model, fresh = pair(variant="long")
    rng = np.random.default_rng(1)
    right = getattr(model.ops, operation)
    for attempt in range(10):
        calls = iter(range(10**6))
        fails_at = attempt**2 // 3

        def failing(*args, calls=calls, fails_at=fails_at, **kwargs):
            result = right(*args, **kwargs)
            if next(calls) == fails_at:
                raise KeyboardInterrupt
            return result

        ids = [int(i) for i in rng.integers(32, 127, 40)] * int(rng.integers(1, 4))
        monkeypatch.setattr(model.ops, operation, failing)
        said = []
        with contextlib.suppress(KeyboardInterrupt):
            for piece in model.stream(ids, max_new_tokens=8):
                said += piece.token_ids
        monkeypatch.setattr(model.ops, operation, right)
        # Another token where the answer broke off, or a prompt of the NTK factor before.
        ids = ids[:30] if attempt % 2 else [*ids, *said[:-1], 50, 51, 52]
        answer = model.generate(ids, max_new_tokens=8)
        _same(answer, fresh.generate(ids, max_new_tokens=8))


@pytest.mark.parametrize("moved", [False, True])
def test_an_error_while_the_cache_grows_leaves_a_sound_session(pair, monkeypatch, moved):
    model, fresh = pair()
    ids = [int(i) for i in np.random.default_rng(2).integers(32, 127, 700)]
    model.generate(ids[:200], max_new_tokens=8)
    right = CpuCache.resized

    def failing(self, *arguments):
        if moved:
            right(self, *arguments)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(CpuCache, "resized", failing)
        with pytest.raises(MemoryError):
            model.generate(ids, max_new_tokens=8)
    for count in (200, 700):
        _same(model.generate(ids[:count], max_new_tokens=8), fresh.generate(ids[:count], max_new_tokens=8))


def test_a_constraint_that_fails_ends_only_its_answer(pair):
    model, fresh = pair()

    with pytest.raises(RuntimeError, match="no way on"):
        model.generate("What is this?", max_new_tokens=8, constraint=Failing(model.config.vocab_size))
    wanted = fresh.generate("What is this? No.", max_new_tokens=8)
    _same(model.generate("What is this? No.", max_new_tokens=8), wanted)


def test_memory_is_bounded(pair):
    model, _ = pair(conversations=2)
    for i in range(6):
        model.generate([40 + i] * 30, max_new_tokens=2)
    assert len(model._prefix_cache._idle) == 2
    silent, _ = pair(conversations=0)
    silent.generate("x", max_new_tokens=2)
    assert not silent._prefix_cache._idle
    assert silent.generate("x", max_new_tokens=2).timings.cached_tokens == 0


def test_an_idle_session_waits_for_its_conversation(monkeypatch):
    class Idle:
        def __init__(self, keys):
            self.keys, self.length, self.salt = keys, len(keys), None

        def shared(self, keys):
            return next((i for i, (a, b) in enumerate(zip(self.keys, keys)) if a != b), min(len(self.keys), len(keys)))

    sessions = PrefixCache(None, "fp16", 2)
    old, new = Idle([1, 2, 3, 4]), Idle([1, 7, 8, 9])
    sessions.give(old)
    sessions.give(new)
    assert sessions.take([1, 7, 8, 9, 5], 8) is new
    sessions.give(new)
    assert sessions.take([1, 2, 3, 4, 5], 8) is old
    sessions.give(old)
    assert sessions.take([6, 6, 6], 8) is new, "nobody's: the one used longest ago goes"
    sessions.give(new)
    sessions._limit = 3
    made = Idle([])
    monkeypatch.setattr("qvl_runtime.engine.prefix_cache.Session", lambda *arguments: made)
    assert sessions.take([1, 6, 6], 8) is made, "as long as there may be another, both wait"


@pytest.fixture
def short_window(checkpoint, tmp_path):
    """A chat model with a window of 120 tokens."""
    folder = linked(checkpoint("tiny-vl"), tmp_path / "short", max_position_embeddings=120)
    convert(folder, tmp_path / "short.qvl", bits=16)
    return qvl.load(tmp_path / "short.qvl", device="cpu")


def test_oldest_turns_leave_a_full_window_and_it_is_said(short_window):
    history, left_out = [], []
    for i in range(8):
        answer = short_window.chat(f"Question {i}?", history, temperature=0, max_new_tokens=16)
        assert answer.prompt_tokens + 15 <= 120, "room for an answer is kept"
        assert answer.prompt_tokens + len(answer.token_ids) <= 120
        assert len(answer.history) == i + 1
        history = answer.history
        left_out.append(answer.left_out)
    assert left_out[0] == 0 < left_out[-1] and left_out == sorted(left_out)
    few, many = (short_window.chat("And?", history, block=block, max_new_tokens=1).left_out for block in (1, 100))
    assert few < many == 7, "the last turn stays"
    with pytest.raises(qvl.QvlError, match="window is 120"):
        short_window.chat("Too long. " * 40, history)


def test_logprobs_are_the_models_own(pair):
    model, _ = pair()
    answer = model.generate("What is this?", max_new_tokens=6, logprobs=3, temperature=1.5, seed=1)
    ids = model.tokenizer.encode("What is this?") + answer.token_ids
    logits = model.logits(ids)[-1 - len(answer.token_ids) : -1].astype(np.float64)
    wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
    for entry, row in zip(answer.logprobs, wanted):
        assert entry.logprob == pytest.approx(row[entry.token_id], abs=5e-3)
        assert [i for i, _ in entry.top] == np.argsort(-row)[:3].tolist()
        assert [p for _, p in entry.top] == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=5e-3)
    pieces = list(model.stream("What is this?", max_new_tokens=6, logprobs=0))
    assert all(len(p.logprobs) == len(p.token_ids) and all(e.top == [] for e in p.logprobs) for p in pieces)
    assert not model.generate("What is this?", max_new_tokens=2).logprobs


def test_turns_leave_in_blocks():
    def leaving(turns, block):
        return Window(100, 1000, block).left_out(5, [10] * turns, 0)

    assert [leaving(n, 1) for n in range(8, 15)] == [0, 0, 1, 2, 3, 4, 5], "the published rule"
    assert [leaving(n, 30) for n in range(8, 15)] == [0, 0, 3, 3, 3, 6, 6]
    assert leaving(1, 30) == 0
    assert Window(100, 1000, 30).left_out(5, [200], 0) == 1, "not even the last turn fits"
    assert Window(1000, 50, 300).left_out(5, [10, 200, 10], 0) == 2, "the last turn that fits stays"
