"""Every metric against values that the published evaluation, or a second formulation, computed."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from qvl_runtime.errors import QvlError
from qvl_runtime.evaluation import scores
from qvl_runtime.evaluation.comparison import compare, resampled
from qvl_runtime.evaluation.data import Sample
from qvl_runtime.evaluation.metrics import boxes, cider, text, tokens, vqa
from qvl_runtime.evaluation.scores import Scores

GOLDEN = Path(__file__).parent / "golden" / "evaluation" / "metrics.json"


@functools.cache
def golden() -> dict:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_vqa_accuracy():
    cases = golden()["vqa"]
    assert len(cases) > 50 and len({case["accuracy"] for case in cases}) > 4
    for case in cases:
        assert vqa.vqa_accuracy(case["answer"], case["people"]) == case["accuracy"], case


def test_vqa_accuracy_by_hand():
    people = [{"answer": text, "answer_id": i} for i, text in enumerate(["cat"] * 2 + ["dog"] * 8)]
    # Two who said cat find one other each, eight others find two.
    assert vqa.vqa_accuracy("The cat.", people) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa.vqa_accuracy("DOG", people) == 1
    assert vqa.vqa_accuracy("two", [{"answer": "2", "answer_id": i} for i in range(10)]) == 1


def test_anls():
    for case in golden()["anls"]:
        assert text.anls(case["answer"], case["right"]) == case["anls"], case
    assert text.anls("abcd", ["abce"]) == 0.75 and text.anls("abcd", ["xyzd"]) == 0


def test_relaxed_accuracy():
    for case in golden()["relaxed"]:
        assert text.relaxed_match(case["answer"], case["right"]) == case["relaxed"], case


def test_gqa_keeps_the_core_of_an_answer():
    for case in golden()["gqa"]:
        assert text.short_answer(case["answer"]) == case["short"]


def test_iou_of_the_first_box_in_steps_of_999():
    for case in golden()["iou"]:
        found = boxes.first_box(case["answer"], *case["size"])
        assert boxes.iou(found, case["box"]) == pytest.approx(case["iou"], abs=2e-6), case


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setattr(tokens.shutil, "which", lambda name: None)


def test_cider_with_our_own_words(no_java):
    cases = golden()["cider"]
    found, tokenizer = cider.cider([c["answer"] for c in cases], [c["references"] for c in cases])
    assert tokenizer == "qvl"
    assert np.allclose(found, [c["cider"] for c in cases], atol=1e-12, rtol=0)


def test_our_own_words_are_stanfords():
    for case in golden()["cider"]:
        assert tokens.own_tokens([case["answer"], *case["references"]]) == case["words"]


@pytest.mark.skipif(shutil.which("java") is None, reason="without Java our own tokenizer takes its place")
def test_stanfords_words_where_java_is():
    cases = golden()["cider"]
    texts = [text for case in cases for text in (case["answer"], *case["references"])]
    assert tokens.java_tokens(texts) == [word for case in cases for word in case["words"]]


@pytest.fixture
def java(monkeypatch):
    """A program in place of Java that ends a line, as Stanford's does, at every separator of lines."""

    class Program:
        more = ""

        def run(self, command, *, input, **options):
            lines = re.split("\r\n|[\n\r\v\f\x85\u2028\u2029]", input.decode())
            return subprocess.CompletedProcess(command, 0, ("\n".join(lines) + self.more).encode(), b"")

    program = Program()
    monkeypatch.setattr(tokens.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(tokens, "_jar", lambda: Path("words.jar"))
    monkeypatch.setattr(tokens.subprocess, "run", program.run)
    return program


@pytest.mark.parametrize("separator", ["\n", "\r", "\r\n", "\f", "\v", "\x85", "\u2028", "\u2029"])
def test_a_caption_of_several_lines_stays_one(java, separator):
    assert tokens.java_tokens([f"a{separator}cat", "", "two dogs"]) == ["a cat", "", "two dogs"]
    assert tokens.java_tokens(["a cat", ""]) == ["a cat", ""]


@pytest.mark.parametrize(("more", "lines"), [("\nx", 3), ("\n\n", 4)])
def test_a_wrong_number_of_lines_is_refused(java, more, lines):
    java.more = "\n"
    assert tokens.java_tokens(["a cat", "two dogs"]) == ["a cat", "two dogs"]
    java.more = more
    with pytest.raises(QvlError, match=f"gave {lines} lines for 2 captions; take java off the PATH"):
        tokens.java_tokens(["a cat", "two dogs"])


def sample(key: str, truth, unit: str = "", group: str = "") -> Sample:
    return Sample(key, key, (), {}, truth, ("A", "B", "C"), unit, group)


def test_mme_counts_questions_and_pictures():
    asked = [("p", "yes", "Yes, it is"), ("p", "no", "no"), ("q", "yes", "no"), ("q", "no", "No."), ("r", "yes", "yes")]
    asked += [("r", "no", "maybe"), ("s", "yes", "Hyes"), ("s", "no", "I say no")]
    samples = [sample(str(i), truth, unit, "a" if unit < "r" else "b") for i, (unit, truth, _) in enumerate(asked)]
    found = scores.both_questions(samples, [{"text": text} for *_, text in asked])
    # a: 3 of 4 questions, 1 of 2 pictures; b: 2 of 4 ("yes" within the first four, "no" beyond them), 0 of 2.
    assert found.parts == {"a": 125.0, "b": 50.0} and found.total == 175.0


def test_mmbench_wants_every_turn_of_a_question():
    samples = [sample(str(i), truth, unit) for i, (truth, unit) in enumerate([("A", "1"), ("B", "1"), ("C", "2")])]
    right = [{"likelihoods": [-1, -2, -3]}, {"likelihoods": [-2, -1, -3]}, {"likelihoods": [-3, -2, -1]}]
    assert scores.every_turn(samples, right).total == 100
    assert scores.every_turn(samples, [right[0], right[0], right[2]]).total == 50
    assert scores.option({"likelihoods": [-1, -1, -2]}, "A") == 1, "the first of equals, as argmin gives it"


def test_chartqa_is_the_mean_of_its_halves():
    samples = [sample(str(i), ["1"], group="human" if i < 1 else "augmented") for i in range(4)]
    found = scores.each(scores.relaxed, "mean of groups")(samples, [{"text": t} for t in ("1", "1", "2", "2")])
    assert found.parts == {"augmented": pytest.approx(100 / 3), "human": 100}
    assert found.total == pytest.approx((100 + 100 / 3) / 2)


def test_boxes_of_other_families_are_shares_of_the_sides():
    truth = {"box": [64, 48, 320, 240], "size": [640, 480]}
    assert scores.box({"text": "", "boxes": [[0.1, 0.1, 0.5, 0.5]]}, truth) == 1
    assert scores.box({"text": "(100,100),(500,500)", "boxes": []}, truth) == 0
    assert scores.box({"text": "(100,100),(500,500)"}, truth) == 1


def plain(values: np.ndarray) -> Scores:
    return Scores(np.asarray(values, float), np.zeros(len(values), int), [""], "mean")


def test_the_bootstrap_has_the_spread_of_a_mean(rng):
    first, second = (100.0 * rng.integers(0, 2, 400) for _ in range(2))
    rows = compare(["a", "b"], [plain(first), plain(second)], [1.0, 2.0], [None, 5], [10, 20])
    spread = 1.96 * np.sqrt(first.var() / 400)
    assert rows[0].interval == pytest.approx((rows[0].score - spread, rows[0].score + spread), abs=1)
    paired = 1.96 * np.sqrt((second - first).var() / 400)
    assert rows[1].difference == pytest.approx(second.mean() - first.mean())
    low, high = rows[1].difference_interval
    assert (high - low) / 2 == pytest.approx(paired, rel=0.15)


def test_the_bootstrap_is_paired_and_keeps_groups(rng):
    values = rng.normal(size=60)
    drawn = resampled([plain(values), plain(values + 3)], draws=50)
    assert np.allclose(drawn[1] - drawn[0], 3), "the same questions are drawn for both"
    groups = np.repeat([0, 1], 30)
    constant = Scores(np.where(groups, 7.0, 1.0), groups, ["x", "y"], "sum of groups")
    assert np.array_equal(resampled([constant], draws=20), np.full((1, 20), 8.0))
