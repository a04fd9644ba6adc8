"""The demo's pictures and questions: reproducible, with correct answers."""

from __future__ import annotations

import numpy as np
import pytest

from qvl_runtime.demo.conversations import LANGUAGES, SINGLE, ask, box_text, compare, indefinite, kind
from qvl_runtime.demo.scenes import COLORS, SHAPES, Scene, Thing, draw, place_text, random_scene, random_text
from qvl_runtime.demo.scenes import Text as Printed
from qvl_runtime.families.qwen_vl.grounding import GROUNDING

CIRCLE = Thing("circle", "red", "small", (0.1, 0.1, 0.3, 0.3))
STAR = Thing("star", "blue", "large", (0.5, 0.6, 0.9, 1.0))
TWO = Scene((CIRCLE, STAR))


def scenes(count: int):
    rng = np.random.default_rng(5)
    return [random_scene(rng) for _ in range(count)]


def test_same_seed_same_picture():
    first, again = (draw(random_scene(np.random.default_rng(3)), 112) for _ in range(2))
    other = draw(random_scene(np.random.default_rng(4)), 112)
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_everything_lies_inside_the_picture():
    for scene in scenes(200):
        boxes = [t.box for t in scene.things] + ([scene.text.box] if scene.text else [])
        assert all(0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 for x1, y1, x2, y2 in boxes)


@pytest.mark.parametrize("shape", SHAPES)
def test_box_is_where_the_shape_was_painted(shape):
    empty = np.asarray(draw(Scene(()), 400), int)
    thing = Thing(shape, "blue", "large", (0.2, 0.3, 0.55, 0.7), angle=8.0)
    changed = np.abs(np.asarray(draw(Scene((thing,)), 400), int) - empty).sum(-1) > 30
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert np.abs(found - np.array(thing.box) * 400).max() <= 3


def test_printed_text_lies_in_its_box():
    rng = np.random.default_rng(9)
    for _ in range(20):
        text = random_text(rng)
        changed = np.asarray(draw(Scene((), text), 400), int) != np.asarray(draw(Scene(()), 400), int)
        rows, columns = np.flatnonzero(changed.any((1, 2))), np.flatnonzero(changed.any((0, 2)))
        x1, y1, x2, y2 = np.array(text.box) * 400
        assert columns[0] >= x1 - 4 and columns[-1] <= x2 + 4 and rows[0] >= y1 - 4 and rows[-1] <= y2 + 4


def test_characters_are_marked_in_reading_order():
    text = place_text(Printed(("12", "345"), (0.5, 0.5), 0.2))
    assert [char for char, _, _ in text.marks] == list("12345")
    xs, ys = [m[1] for m in text.marks], [m[2] for m in text.marks]
    assert xs[0] < xs[1] and xs[2] < xs[3] < xs[4] and ys[1] < ys[2]


def test_boxes_are_tens_of_thousandths():
    assert box_text((0.104, 0.2, 0.996, 1.0)) == "<box>(100,200),(990,990)</box>"


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_follow_from_the_scene(language):
    rng = np.random.default_rng(1)
    truths = {
        "count": {"en": {"0", "1", "2"}, "zh": {"0", "1", "2"}},
        "color": {"en": {"red", "blue"}, "zh": {"红色", "蓝色"}},
        "shape": {"en": {"circle", "star"}, "zh": {"圆形", "星形"}},
        "name": {"en": {"a small red circle", "a large blue star"}, "zh": {"小的红色圆形", "大的蓝色星形"}},
    }
    for skill, allowed in truths.items():
        said = {SINGLE[skill][0](rng, language, TWO).turns[0][1] for _ in range(60)}
        assert said == allowed[language]


def test_positions_and_places_agree():
    rng = np.random.default_rng(2)
    for _ in range(300):
        found = SINGLE["position"][0](rng, "en", TWO)
        if found and found.turns[0][0].startswith("Is"):
            question, answer = found.turns[0]
            subject = question.split(" or ")[0]
            circle = "circle" in subject or "red" in subject
            words = ("left", "right") if "left or right" in question else ("above", "below")
            assert answer == words[0 if circle else 1]
        found = SINGLE["find"][0](rng, "en", TWO)
        wanted = CIRCLE if "circle" in found.turns[0][0] or "red" in found.turns[0][0] else STAR
        assert box_text(wanted.box) in found.turns[0][1]


def test_absent_things_are_absent_and_present_ones_present():
    rng = np.random.default_rng(3)
    for scene in scenes(100):
        question, answer = SINGLE["present"][0](rng, "en", scene).turns[0]
        phrases = {
            f"Is there {indefinite(kind('en', **attributes), 'en')}?"
            for t in scene.things
            for attributes in ({"shape": t.shape}, {"shape": t.shape, "color": t.color})
        }
        assert answer == ("yes" if question in phrases else "no")
        missing = SINGLE["absent"][0](rng, "en", scene).turns[0][1].removeprefix("There is no ").rstrip(".")
        assert not any(missing in (t.shape, f"{t.color} {t.shape}") for t in scene.things)


def test_comparison_names_the_picture():
    rng = np.random.default_rng(4)
    asked = {}
    for _ in range(200):
        found = compare(rng, "en", Scene((CIRCLE,)), TWO)
        if found:
            asked.update(found.turns)
    assert asked["Which picture has the most objects?"] == "2"
    assert asked["Which picture has a star?"] == "2"
    assert "Which picture has a circle?" not in asked


def test_every_answer_with_a_box_parses():
    rng = np.random.default_rng(6)
    for scene in scenes(100):
        found = ask(rng, [scene])
        for _, answer in found.turns if found else ():
            assert answer.count("<box>") == len(GROUNDING.parse(answer))


def test_names_are_distinct():
    assert len({kind("zh", shape=s) for s in SHAPES}) == len(SHAPES)
    assert len({kind("zh", color=c) for c in COLORS}) == len(COLORS)
