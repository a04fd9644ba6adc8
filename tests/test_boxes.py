"""Boxes: parsed as the golden data says, never raising, drawn in the right pixels, never as tofu."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from text_golden import read

from qvl_runtime import drawing as module
from qvl_runtime.boxes import Box
from qvl_runtime.drawing import draw_boxes
from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen_vl.grounding import GROUNDING, format_box

LISTS = read("listformat.json")
GREY = Image.new("RGB", (200, 100), "#808080")


@pytest.mark.parametrize("case", LISTS["boxes"], ids=lambda case: case["text"][:40])
def test_golden(case):
    found = [{"box": [b.x1, b.y1, b.x2, b.y2], "ref": b.ref} for b in GROUNDING.parse(case["text"])]
    # Where the original raises, the malformed box is skipped.
    expected = case["boxes"] if isinstance(case["boxes"], list) else []
    assert found == [{"box": b["box"], "ref": b.get("ref")} for b in expected]


@pytest.mark.parametrize("case", LISTS["box_pixels"], ids=str)
def test_golden_pixels(case):
    assert Box(None, *case["box"]).to_pixels(*case["wh"]) == tuple(case["xyxy"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<ref>open <box>(1,2),(3,4)</box> <ref>b</ref><box>(5,6),(7,8)</box>", [(None, 1), ("b", 5)]),
        ("<box>(1,2),(3,4) <box>(5,6),(7,8)</box>", [(None, 5)]),
        ("<ref>a</ref> <box>(1,2),(3,4)</box>", [(None, 1)]),
        ("<ref>a</ref><quad>(1,1),(2,2),(3,3),(4,4)</quad><box>(1,2),(3,4)</box>", [(None, 1)]),
        ("<img><box>(1,2),(3,4)</box></img>", []),
        ("<box>(1,2),(3,1001)</box><box>(1,2),(3,-4)</box><box>(1,2),(3,99999999)</box>", []),
        ("<box>(1,2),(3,4),(5,6)</box><box></box><box>(1_0,2),(3,4)</box><box>(１,2),(3,4)</box>", []),
        ("<box>(9,8),(7,6)</box", []),
        ("<ref>a\nb</ref><box>(1,\n2),(3,4)</box>", [("a\nb", 1)]),
    ],
)
def test_parse(text, expected):
    assert [(b.ref, b.x1) for b in GROUNDING.parse(text)] == expected


pieces = st.sampled_from(
    ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "(", ")", ",", "12", "999", " ", "x"]
)


@given(st.one_of(st.text(), st.lists(pieces | st.text(max_size=3)).map("".join)))
def test_parse_never_raises(text):
    for box in GROUNDING.parse(text):
        assert all(0 <= v <= 1000 for v in (box.x1, box.y1, box.x2, box.y2))


corner = st.integers(0, 999)
refs = st.none() | st.text(st.characters(blacklist_characters="<>")).map(str.strip)


@given(st.lists(st.builds(Box, refs, corner, corner, corner, corner)))
def test_what_is_written_is_read(boxes):
    assert GROUNDING.parse(" and ".join(map(format_box, boxes))) == boxes


def test_parsing_takes_linear_time():
    assert GROUNDING.parse("<ref><box><img><quad>" * 20_000 + "x" * 200_000) == []


def test_outline_in_the_right_pixels():
    box = Box(None, 100, 200, 500, 800)
    pixels = np.asarray(draw_boxes(GREY, [box]).image)
    changed = (pixels != 128).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert (columns[0], rows[0], columns[-1], rows[-1]) == box.to_pixels(200, 100) == (20, 20, 100, 80)
    assert changed[20, 20:101].all()
    assert changed[20:81, 100].all()
    assert not changed[30:70, 30:90].any()


def test_the_picture_given_is_left_alone():
    array = np.full((100, 200, 3), 128, np.uint8)
    for picture in (GREY, array):
        draw_boxes(picture, [Box("x", 100, 200, 500, 800)])
        assert (np.asarray(picture) == 128).all()


def test_boxes_beyond_the_edge_or_upside_down():
    upside_down = draw_boxes(GREY, [Box(None, 1000, 1000, 0, 0)]).image
    np.testing.assert_array_equal(
        np.asarray(upside_down), np.asarray(draw_boxes(GREY, [Box(None, 0, 0, 1000, 1000)])[0])
    )
    changed = (np.asarray(upside_down) != 128).any(axis=2)
    assert changed[0].all() and changed[-1].all() and changed[:, 0].all() and changed[:, -1].all()
    assert not changed[10:-10, 10:-10].any()
    long = draw_boxes(GREY, [Box("a label longer than the picture " * 9, 999, 0, 1000, 1)]).image
    assert (np.asarray(long) != 128).any(axis=2)[:10].mean() > 0.5
    dot = draw_boxes(Image.new("RGB", (1, 1), "#808080"), [Box("x", 0, 0, 999, 999)]).image
    assert dot.size == (1, 1) and (np.asarray(dot) != 128).any()


def test_a_box_at_the_right_edge_is_seen():
    pixels = np.asarray(draw_boxes(GREY, [Box(None, 900, 0, 1000, 1000)]).image)
    changed = (pixels != 128).any(axis=2)
    assert changed[:, 198:].all() and changed[98:, 180:].all() and not changed[:, :180].any()


def without_fonts(monkeypatch, *names):
    monkeypatch.setattr(module, "FONT_FILES", names)
    module._fonts.cache_clear()


@pytest.fixture
def only_latin(monkeypatch):
    without_fonts(monkeypatch, "no-such-font.ttf")
    yield
    module._fonts.cache_clear()


def test_label_without_a_font_becomes_a_number(only_latin):
    boxes = [Box("dog", 100, 300, 300, 800), Box("击掌", 500, 300, 800, 800)]
    drawing = draw_boxes(GREY, boxes)
    assert drawing.legend == {2: "击掌"} and drawing.note.endswith("drawn as numbers: 2 is 击掌")
    numbered = draw_boxes(GREY, [boxes[0], Box("2", 500, 300, 800, 800)])
    assert numbered.legend == {} and numbered.note == ""
    np.testing.assert_array_equal(np.asarray(drawing.image), np.asarray(numbered.image))


@pytest.mark.parametrize("size", [12, 40, 300])
def test_missing_glyphs_are_noticed(only_latin, size):
    (latin,) = module._fonts(size)
    assert module._has_glyphs(latin, "a dog's nose: 100%")
    assert not module._has_glyphs(latin, "dog 击掌")
    assert not module._has_glyphs(latin, "\U0010fffe")


def test_a_chinese_label_is_written_where_a_font_has_it():
    fonts = [f for f in module._fonts(20) if module._has_glyphs(f, "击掌")]
    if not fonts:
        pytest.skip("no font with Chinese on this machine")
    drawing = draw_boxes(GREY, [Box("击掌", 500, 300, 800, 800)])
    assert drawing.legend == {}
    plain = draw_boxes(GREY, [Box(None, 500, 300, 800, 800)])
    assert (np.asarray(drawing.image) != np.asarray(plain.image)).any()
    other = draw_boxes(GREY, [Box("掌击", 500, 300, 800, 800)])
    assert (np.asarray(drawing.image) != np.asarray(other.image)).any()


def test_label_is_one_line():
    for ref in ("a\n  dog", "a\u200b dog\x07", " a dog "):
        drawing = draw_boxes(GREY, [Box(ref, 100, 300, 300, 800)])
        expected = draw_boxes(GREY, [Box("a dog", 100, 300, 300, 800)])
        np.testing.assert_array_equal(np.asarray(drawing.image), np.asarray(expected.image))


def test_saving(tmp_path):
    drawing = draw_boxes(GREY, [Box("dog", 0, 0, 500, 500)], tmp_path / "out.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(drawing.image))
    for name in ("out.xyz", "out", "out.psd", "no/such/folder.png"):
        with pytest.raises(QvlError, match=f"{name}: cannot be written"):
            draw_boxes(GREY, [], tmp_path / name)
    with pytest.raises(QvlError, match=r"wide\.webp: cannot be written"):
        draw_boxes(Image.new("RGB", (20_000, 1)), [], tmp_path / "wide.webp")
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]


def test_a_prompt_may_open_the_box_its_answer_completes():
    assert GROUNDING.opened("<img>a.png</img><ref>the dog</ref><box>") == "<ref>the dog</ref><box>"
    assert GROUNDING.opened("find <box>(1,2),") == "<box>(1,2),"
    assert GROUNDING.opened("<ref>dog</ref><box>(1,2),(3,4)</box> what is it?") == ""
    assert GROUNDING.parse(GROUNDING.opened("<ref>x</ref><box>") + "(1,2),(3,4)</box>") == [Box("x", 1, 2, 3, 4)]
