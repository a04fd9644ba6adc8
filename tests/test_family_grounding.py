"""Boxes of the newer families: three notations, and answers constrained to them."""

import functools
import random

import pytest
from families import GOLDEN, config, read

from qvl_runtime.batch.parquet import to_parquet
from qvl_runtime.boxes import Box
from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen2_5_vl.grounding import JsonGrounding
from qvl_runtime.families.qwen2_vl.grounding import GROUNDING
from qvl_runtime.families.qwen2_vl.vocabulary import read_vocabulary
from qvl_runtime.families.qwen3_vl.grounding import RelativeGrounding
from qvl_runtime.inputs.pictures import Picture
from qvl_runtime.inputs.tokenizer import Tokenizer
from qvl_runtime.openai.answers import box_fields

KINDS = {"q2": GROUNDING, "q25": JsonGrounding(), "q3": RelativeGrounding()}
CASES = read("grounding.json")


def picture(resized=(700, 350)) -> Picture:
    return Picture(b"", b"", 1, (1, 1), (1, 1), tuple(resized))


@functools.cache
def tokenizer(family: str) -> Tokenizer:
    name = f"{family}-tied"
    return Tokenizer(*read_vocabulary(GOLDEN / "ckpt" / name), config(name).vocab_size)


@pytest.mark.parametrize("case", CASES, ids=[f"{c['family']}-{len(c['boxes'])}" for c in CASES])
def test_golden_answers(case):
    boxes = KINDS[case["family"]].parse(case["text"], [picture((1, 1)), picture(case["resized"])])
    assert [box.ref for box in boxes] == [box["label"] for box in case["boxes"]]
    pixels = [box.to_pixels(*case["picture"]) for box in boxes]
    assert pixels == [tuple(map(int, box["pixels"])) for box in case["boxes"]]


def test_broken_json_answers():
    kind = RelativeGrounding()
    one = '{"bbox_2d": [1, 2, 3, 4], "label": "a"}'
    for text, boxes in [
        (f"Here: ```json\n[{one}, {one[:-5]}", [Box("a", 1, 2, 3, 4)]),
        (f"{one} and more {one}", [Box("a", 1, 2, 3, 4)] * 2),
        ('{"bbox_2d": [1, 2, 3, 4], "label": "a {b} \\" c", "sub_label": 1}', [Box('a {b} " c', 1, 2, 3, 4)]),
        ('{"bbox_2d": [1, 2, 3, 4]}', [Box(None, 1, 2, 3, 4)]),
        ('{"bbox_2d": [1.5, 2, 3, 4], "label": 3}', [Box(None, 1.5, 2, 3, 4)]),
        (f'{{"objects": [{one}]}}', [Box("a", 1, 2, 3, 4)]),
        (f'{{"objects": [{one}, {{"bbox_2d": [1 2]}}]}}', [Box("a", 1, 2, 3, 4)]),
        (f'[{one[:-1]}, "attributes": {{"color": "red"}}}}, {one}]', [Box("a", 1, 2, 3, 4)] * 2),
        (f'{{"all": [{one[:-1]}, "more": {{}}}}, {one}]}}', [Box("a", 1, 2, 3, 4)] * 2),
        ('{"point_2d": [1, 2], "label": "a"}', []),
        ('{"bbox_2d": [1, 2, 3], "label": "a"}', []),
        ('{"bbox_2d": [1, 2, 3, 1001], "label": "a"}', []),
        ('{"bbox_2d": [1, 2, 3, -1], "label": "a"}', []),
        ('{"bbox_2d": [1, 2, 3, NaN], "label": "a"}', []),
        ('{"bbox_2d": [1, 2, 3, -Infinity], "label": "a"}', []),
        ('{"bbox_2d": [1, 2, 3, 1%s], "label": "a"}' % ("0" * 400), []),
        ('{"bbox_2d": [1, 2, 3, true], "label": "a"}', []),
        ('{"bbox_2d": "1, 2, 3, 4"}', []),
        ("{" * 100_000, []),
        ('{"a": ' * 20_000, []),
        ("{{},{}" * 20_000, []),
        ("[" * 100_000 + one, [Box("a", 1, 2, 3, 4)]),
    ]:
        assert kind.parse(text, []) == boxes, text[:80]
    assert JsonGrounding().parse(one, []) == []


def test_fractions_are_kept_as_the_model_wrote_them():
    [box] = RelativeGrounding().parse('{"bbox_2d": [1.5, 2, 3.25, 999.75], "label": "a"}', [])
    fields = box_fields(box, (1000, 1000))
    assert fields == {"ref": "a", "numbers": [1.5, 2, 3.25, 999.75], "pixels": [1, 2, 3, 999]}
    arrow = pytest.importorskip("pyarrow")
    table = to_parquet([{"boxes": [fields]}])
    assert arrow.parquet.read_table(arrow.BufferReader(table)).to_pylist()[0]["boxes"] == [fields]


def test_tags():
    kind = GROUNDING
    ref, box = "<|object_ref_start|>dog<|object_ref_end|>", "<|box_start|>(1,2),(3,4)<|box_end|>"
    for text, boxes in [
        (ref + box + box, [Box("dog", 1, 2, 3, 4), Box(None, 1, 2, 3, 4)]),
        (f"{ref} at {box}", [Box(None, 1, 2, 3, 4)]),
        (f"<|box_start|>(9,9{box}", [Box(None, 1, 2, 3, 4)]),
        ("<|box_start|>(1,2),(3,1001)<|box_end|>", []),
        ("<|box_start|>(1,2)<|box_end|><ref>dog</ref><box>(1,2),(3,4)</box>", []),
    ]:
        assert kind.parse(text, []) == boxes, text


@pytest.mark.parametrize("family", KINDS)
def test_constrained_answers(family):
    """Random choices of a constraint's tokens give complete answers, which are parsed to boxes."""
    kind, tokens, stop = KINDS[family], tokenizer(family), frozenset({tokenizer(family).im_end_id})
    for seed in range(8):
        limit = 40 if family == "q2" else 150 + 60 * seed
        constraint, ids, choice = kind.constraint(tokens, stop, limit, ""), [], random.Random(seed)
        while len(ids) <= limit:
            token = choice.choice(constraint.allowed().nonzero()[0].tolist())
            if token in stop:
                break
            ids.append(token)
            constraint.advance(token)
        assert len(ids) <= limit
        boxes = kind.parse(tokens.decode(ids), [picture()])
        assert boxes and all(box.ref is not None for box in boxes)


@pytest.mark.parametrize(("family", "needed"), [("q2", 24), ("q25", 135), ("q3", 131)])
def test_no_room_for_a_box(family, needed):
    """The message states the least number of tokens that is accepted."""
    for limit in (1, 20, needed - 1):
        with pytest.raises(QvlError, match=f"max_new_tokens is {limit}; .* needs {needed}$"):
            KINDS[family].constraint(tokenizer(family), frozenset({0}), limit, "")
    KINDS[family].constraint(tokenizer(family), frozenset({0}), needed, "")


def test_opened_box():
    tokens = tokenizer("q2")
    opened = "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(10,"
    constraint = KINDS["q2"].constraint(tokens, frozenset({tokens.im_end_id}), 40, opened)
    assert tokens.special["<|object_ref_start|>"] not in constraint.allowed().nonzero()[0]
    with pytest.raises(QvlError, match="opens the box"):
        KINDS["q2"].constraint(tokens, frozenset({0}), 40, opened + "x")


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("q2", "<|box_start|>(100,400),(500,999)<|box_end|>"),
        ("q25", '{"bbox_2d": [28, 84, 140, 210]}'),
        ("q3", '{"bbox_2d": [100, 400, 500, 1000]}'),
    ],
)
def test_a_box_of_the_users_picture_is_marked_and_read_back(family, text):
    """Pixels of the original picture become the family's numbers, and these the same pixels again."""
    kind, seen = KINDS[family], Picture(b"", b"", 1, (1, 1), (700, 500), (280, 210))
    assert kind.mark((70, 200, 350, 600), seen) == text
    [again] = kind.parse(text, [seen])
    assert again.to_pixels(700, 500)[:3] == (70, 200, 350)


def test_a_box_upside_down_keeps_its_numbers():
    """As the models write it; drawing sorts the corners."""
    [box] = RelativeGrounding().parse('{"bbox_2d": [500, 600, 100, 200], "label": "a"}', [])
    assert (box.x1, box.x2, box.to_pixels(100, 100)) == (500, 100, (50, 60, 10, 20))
