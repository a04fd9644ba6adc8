"""Drafts change the speed of an answer, never the answer."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

import qvl_runtime as qvl
from qvl_runtime.engine.drafts import MATCHED, MAX_DRAFT, PRIOR, PromptLookup
from qvl_runtime.engine.generation import Timings, TokenSelector, generate_step
from qvl_runtime.engine.sampling import Sampler, softmax

MIXED = np.random.default_rng(2).integers(0, 4, 120).tolist()


class Chain:
    """A session whose logits depend on the last two tokens only: a toy that can be enumerated."""

    room, spare, beside = 10**6, MAX_DRAFT, 0

    def __init__(self, start: list[int]):
        self.logits_after = np.random.default_rng(4).normal(0, 1.5, (4, 4, 4)).astype(np.float32)
        self.tokens, self.rows, self.batches = list(start), [], []
        self.feed(self.tokens.pop())

    @property
    def length(self) -> int:
        return len(self.tokens)

    def feed(self, *tokens: int) -> None:
        self.batches.append(len(tokens))
        self.rows = []
        for token in tokens:
            self.tokens.append(token)
            self.rows.append(self.logits_after[tuple(self.tokens[-2:])])

    def truncate(self, length: int) -> None:
        del self.tokens[length:]

    def logits(self, row: int) -> np.ndarray:
        return self.rows[row]

    def best(self, row: int) -> int:
        return int(np.argmax(self.rows[row]))


def _tokens(chain: Chain, choose: TokenSelector, drafts: PromptLookup | None, limit: int) -> list[int]:
    steps = generate_step(chain, choose, drafts, limit, Timings())
    return [choice.token for choice in steps if choice is not chain]


def _toy(seed: int, drafts: PromptLookup | None, temperature: float) -> list[int]:
    choose = TokenSelector(Sampler(temperature, seed=seed), list(MIXED))
    return _tokens(Chain(MIXED), choose, drafts, 30)


def test_sampling_keeps_its_distribution():
    """All 4^3 continuations, each with its exact probability, against 10000 answers made with drafts (chi-square)."""
    draws, seen, batches = 10_000, Counter(), Counter()
    for seed in range(draws):
        chain, choose = Chain(MIXED), TokenSelector(Sampler(1.0, seed=seed), list(MIXED))
        answer = _tokens(chain, choose, PromptLookup(MIXED, 0.0), 4)
        seen[tuple(answer[:3])] += 1
        batches[max(chain.batches)] += 1
    after, statistic = Chain(MIXED).logits_after, 0.0
    x, y = MIXED[-2:]
    for a, b, c in itertools.product(range(4), repeat=3):
        chances = [softmax(after[pair])[token] for pair, token in (((x, y), a), ((y, a), b), ((a, b), c))]
        expected = draws * float(np.prod(chances))
        statistic += (seen[a, b, c] - expected) ** 2 / expected
    assert statistic < 63 + 4 * np.sqrt(2 * 63)
    assert batches[1] < draws / 10, "nearly all answers had drafts"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_no_token(temperature):
    """Every token uses one random number with and without drafts, so that a seed gives the same answer."""
    for seed in range(200):
        plain = _toy(seed, None, temperature)
        assert _toy(seed, PromptLookup(MIXED, 0.0), temperature) == plain
        assert len(plain) == 30


def test_what_was_not_chosen_is_forgotten():
    for seed in range(50):
        chain, choose = Chain(MIXED), TokenSelector(Sampler(1.0, seed=seed), list(MIXED))
        answer = []
        for choice in generate_step(chain, choose, PromptLookup(MIXED, 0.0), 20, Timings()):
            if choice is chain:
                continue  # it was fed at once
            fed = MIXED + answer
            assert chain.tokens[: len(fed)] == fed
            answer.append(choice.token)


def test_drafts_stay_within_the_window_and_the_limit():
    start = [1, 2, 3] * 4
    chain, choose = Chain(start), TokenSelector(Sampler(), list(start))
    chain.logits_after[:] = 0
    for a, b, c in ((1, 2, 3), (2, 3, 1), (3, 1, 2)):
        chain.logits_after[a, b, c] = 9
    chain.rows = [chain.logits_after[2, 3]]
    chain.room = 3
    assert len(_tokens(chain, choose, PromptLookup(start, 0.0), 9)) == 9
    assert max(chain.batches) == 3, "one token and two drafts"
    chain.room = 100
    chain.batches.clear()
    assert len(_tokens(chain, choose, PromptLookup(start, 0.0), 4)) == 4
    assert sum(chain.batches) == 3, "the last token is not computed on"
    chain.spare = 1
    chain.batches.clear()
    assert len(_tokens(chain, choose, PromptLookup(start, 0.0), 9)) == 9
    assert max(chain.batches) == 2, "a step has room for one draft"


def test_a_draft_is_what_followed_last_time():
    lookup = PromptLookup([1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 9, 1, 2], 0.0)
    assert lookup.draft(7) == [], f"{MATCHED} tokens must agree"
    lookup.append(3)
    assert lookup.draft(4) == [6, 7, 8, 9]
    assert lookup.draft(0) == []
    lookup.append(5)
    assert lookup.draft(7) == []
    loop = PromptLookup([1, 2, 1, 2, 1, 2], 0.0)
    assert loop.draft(100) == ([1, 2] * 8)[:MAX_DRAFT], "a loop goes on"


def test_drafts_that_fail_become_rare():
    lookup = PromptLookup([1, 2, 3] * 3, 0.45)
    tried = 0
    for _ in range(300):
        drafted = lookup.draft(7)
        tried += len(drafted)
        if drafted:
            lookup.learn(len(drafted), 0)
        for token in (1, 2, 3):
            lookup.append(token)
    assert 1 < tried < 60
    for _ in range(20):
        lookup.learn(7, 7)
    assert len(lookup.draft(7)) == 7
    assert 0 < PRIOR < 1


class FewWords:
    """Lets an answer use four tokens only, so that it repeats itself; a form and its constraint."""

    def start(self, *asked):
        return self

    def allowed(self) -> np.ndarray:
        return np.isin(np.arange(640), range(60, 64))

    def advance(self, token: int) -> None:
        pass


@pytest.mark.parametrize("kv_cache", ["fp16", "int8"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "seed": 3}, {"repetition_penalty": 1.1, "logprobs": 2}])
def test_the_models_answer_is_the_same(kv_cache, options, blob):
    """On the CPU a token's result does not depend on how many are computed with it, so answers agree exactly."""
    model = qvl.load(blob("tiny-vl", bits=4), device="cpu", kv_cache=kv_cache, conversations=0)
    prompt = [60 + token for token in MIXED]
    for constraint in (None, FewWords()):
        plain = model.generate(prompt, max_new_tokens=100, constraint=constraint, speculate=False, **options)
        drafted = model.generate(prompt, max_new_tokens=100, constraint=constraint, **options)
        assert drafted.token_ids == plain.token_ids
        assert drafted.logprobs == plain.logprobs
    assert drafted.timings.draft_tokens > drafted.timings.accepted_drafts > 5
    assert len(drafted.token_ids) == 100


def test_drafts_in_a_batch_change_no_answer(blob):
    path = blob("tiny-vl", bits=4)
    together, alone = (qvl.load(path, device="cpu", conversations=0) for _ in range(2))
    together.ops.row_cost = 0.05
    prompt = [60 + token for token in MIXED]
    asked = [
        {"prompt": prompt[3 * i :], "temperature": 0.5 * (i % 2), "seed": i, "constraint": FewWords()} for i in range(3)
    ]
    results = together.generate_batch([{**one, "max_new_tokens": 24} for one in asked])
    for one, result in zip(asked, results):
        assert result.token_ids == alone.generate(**one, max_new_tokens=24, speculate=False).token_ids
    accepted = sum(result.timings.accepted_drafts for result in results)
    assert sum(result.timings.draft_tokens for result in results) > accepted > 5
    assert together._scheduler.steps < 24, "several tokens a step"


def test_drafts_pay_less_beside_other_answers():
    lookup = PromptLookup([1, 2, 3] * 3, 0.4)
    lengths = [len(lookup.draft(15, beside)) for beside in (0, 1, 3, 12)]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[1] > 0 == lengths[3]
