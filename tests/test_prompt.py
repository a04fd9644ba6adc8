"""Prompts of every form: the golden chat contexts and list texts, and what must be refused."""

import base64
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from text_golden import TINY, TINY_RANKS, expand, pad_slots, read, real_ranks

from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen_vl.prompt import DEFAULT_SYSTEM, QwenPrompts
from qvl_runtime.families.qwen_vl.tokenizer import QwenTokenizer
from qvl_runtime.inputs.image_tags import split_images
from qvl_runtime.inputs.images import is_url, refuse_url
from qvl_runtime.inputs.pictures import Access, Picture
from qvl_runtime.inputs.prompt import ChatPrompt, Prompt, Window, count_places, is_messages

CHAT = read("chat.json")
LISTS = read("listformat.json")
TINY_TEXT_ONLY = QwenTokenizer.from_ranks(TINY_RANKS, image_tags=False)
PIL_IMAGE = Image.new("RGB", (4, 4))
ARRAY = np.zeros((4, 4, 3), np.uint8)


class Made(NamedTuple):
    """A prompt with the sources of its pictures."""

    ids: list[int]
    images: list


def _made(prompt: Prompt) -> Made:
    return Made(prompt.ids, [slot.picture.content for slot in prompt.slots])


def _read(source, access: Access) -> Picture:
    if is_url(source) and not access.urls:
        refuse_url(source)
    return Picture(b"key", source, 256, (256, 1), (1, 1), (1, 1))


def _prompts(tokenizer: QwenTokenizer, *, chat: bool) -> QwenPrompts:
    return QwenPrompts(tokenizer, chat, _read if tokenizer.has_image_tags else None)


def build_prompt(prompt, images, tokenizer, *, chat, access=Access()):  # noqa: B008
    return _made(_prompts(tokenizer, chat=chat).build(prompt, images, access))


def build_chat(tokenizer, query, history=None, images=None, *, system=None, max_window_size=6144):
    window = Window(max_window_size)
    made: ChatPrompt = _prompts(tokenizer, chat=True).chat(query, history, images, system=system, window=window)
    return _made(made.prompt), made.query


def raw(prompt, images=None, **options):
    return build_prompt(prompt, images, TINY, chat=is_messages(prompt), **options)


def check_contexts(tokenizer: QwenTokenizer, cases: list[dict]) -> None:
    for case in cases:
        if "error" in case:  # the original's Qwen-7B cannot have an open turn in its history
            continue
        prompt, query = build_chat(
            tokenizer,
            case["query"],
            case["history"],
            system=case["system"],
            max_window_size=case["max_window_size"],
        )
        expected = expand(case["tokens"])
        assert prompt.ids == pad_slots(expected, tokenizer), case["raw_text"]
        assert query == case["query"]
        paths = split_images(case["raw_text"])[1::2] if tokenizer.has_image_tags else []
        assert prompt.images == paths


def test_golden_contexts_tiny():
    check_contexts(TINY, CHAT["cases"][1]["make_context"])


def test_golden_contexts_full():
    ranks = real_ranks()
    check_contexts(QwenTokenizer.from_ranks(ranks, image_tags=True), CHAT["cases"][0]["make_context"])
    check_contexts(QwenTokenizer.from_ranks(ranks, image_tags=False), CHAT["q7_make_context"])


@pytest.mark.parametrize("case", LISTS["from_list"], ids=lambda case: str(case["list"])[:40])
def test_golden_lists(case):
    if isinstance(case["text_space"], dict):
        with pytest.raises(QvlError, match="needs 'text'"):
            raw(case["list"])
    else:
        assert raw(case["list"]).ids == TINY.encode(case["text_space"])
        assert raw(case["list"]).images == split_images(case["text_space"])[1::2]


def test_window_is_strict():
    history = [("first", "a"), ("second", "b")]
    whole = build_chat(TINY, "q", history)[0].ids
    alone = build_chat(TINY, "q", [])[0].ids
    newest = build_chat(TINY, "q", history[1:])[0].ids
    system = TINY.encode(f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>")
    limit = len(system) + len(whole) - len(alone)
    assert build_chat(TINY, "q", history, max_window_size=limit + 1)[0].ids == whole
    assert build_chat(TINY, "q", history, max_window_size=limit)[0].ids == newest
    assert build_chat(TINY, "q", history, max_window_size=0)[0].ids == alone


def test_raw_text():
    prompt = raw("a<img>x y.png</img>b<|im_end|>")
    assert prompt.ids == TINY.encode("a<img></img>b<|im_end|>")
    assert prompt.images == ["x y.png"]
    assert TINY.im_end_id in prompt.ids


def test_path_is_not_normalized():
    assert raw("<img>cafe\u0301.png</img>").images == ["cafe\u0301.png"]


def test_images_go_before_a_text_without_tags():
    prompt = raw("compare", [PIL_IMAGE, "b.png"])
    assert prompt.ids == TINY.encode("Picture 1: <img></img>\nPicture 2: <img></img>\ncompare")
    assert prompt.images == [PIL_IMAGE, "b.png"]
    assert raw([{"text": "compare"}], [PIL_IMAGE, "b.png"]) == prompt


def test_empty_slots_are_filled_in_order():
    prompt = raw("<img></img> <img>in.png</img> <img></img>", [PIL_IMAGE, b"bytes"])
    assert prompt.images == [PIL_IMAGE, "in.png", b"bytes"]
    pieces = [{"image": ""}, {"image": Path("p.png")}, {"image": None}, {"text": "?"}]
    assert raw(pieces, [PIL_IMAGE, b"bytes"]).images == [PIL_IMAGE, Path("p.png"), b"bytes"]


def test_none_is_nothing_in_a_part():
    """As data sets write parts that have one schema."""
    parts = [{"image": "a.png", "text": None, "video": None}, {"text": "?", "box": None, "ref": None}]
    assert raw(parts) == raw([{"image": "a.png"}, {"text": "?"}])


def test_a_part_with_two_things_is_warned_of(caplog):
    """The published code takes the first, too."""
    assert raw([{"image": "a.png", "text": "lost"}, {"text": "?", "box": [1, 2, 3, 4]}]).images == ["a.png"]
    assert "has a picture and a text: only the first is used; write a part for each" in caplog.text
    assert "has a text and a box" in caplog.text


def test_any_source_in_the_list_format():
    prompt = raw([{"image": ARRAY}, {"image": "odd</img>name"}, {"text": "?"}])
    assert prompt.images[0] is ARRAY
    assert prompt.images[1] == "odd</img>name"
    assert prompt.ids == TINY.encode("Picture 1: <img></img>\nPicture 2: <img></img>\n?")


def test_a_tag_split_over_two_parts_opens_nothing():
    """Splitting a tag between parts must not bypass the filter."""
    parts = [{"text": "<im"}, {"text": "g>a.png</img>"}]
    for prompt in (parts, [{"role": "user", "content": parts}]):
        made = raw(prompt)
        assert made.images == [] and TINY.img_start_id not in made.ids
        assert "<img>a.png</img>" in TINY.decode(made.ids)


def test_an_answer_is_text_whose_tags_open_nothing():
    answer = "<img>/etc/passwd</img> and <imgpad> <img>unclosed <ref>dog</ref><box>(1,2),(3,4)</box>"
    asked, _ = build_chat(TINY, "q", [("first", answer)])
    assert asked.images == [] and not {TINY.img_start_id, TINY.img_end_id, TINY.img_pad_id} & set(asked.ids)
    assert TINY.special["<box>"] in asked.ids, "boxes stay what they are"
    messages = [{"role": "user", "content": "first"}, {"role": "assistant", "content": answer}]
    assert raw([*messages, {"role": "user", "content": "q"}]) == asked


def test_without_paths_tags_are_text():
    closed = Access(paths=False)
    for prompt in ("<img>a.png</img>?", "<img>unclosed", [{"role": "user", "content": "<img>a.png</img><imgpad>"}]):
        made = raw(prompt, access=closed)
        assert made.images == []
        assert not {TINY.img_start_id, TINY.img_end_id, TINY.img_pad_id} & set(made.ids)
    assert raw([{"image": b"bytes"}, {"text": "?"}], access=closed).images == [b"bytes"]


def test_a_message_without_content_is_refused():
    with pytest.raises(QvlError, match="message 1 has no content"):
        raw([{"role": "user"}])


def test_a_ref_without_boxes():
    assert raw([{"ref": "r", "box": []}]) == raw("<ref>r</ref>")


def test_the_list_format_is_a_chat_models_turn():
    parts = [{"image": "a.png"}, {"text": "?"}]
    assert build_prompt(parts, None, TINY, chat=True) == raw([{"role": "user", "content": parts}])


@pytest.mark.parametrize("part", [{"type": "image", "url": "a.png"}, {"type": "image_url", "image_url": "a.png"}])
def test_other_libraries_image_parts(part):
    assert raw([part, {"text": "?"}]) == raw([{"image": "a.png"}, {"text": "?"}])


def test_single_box():
    text = "<ref>dog</ref><box>(1,2),(3,4)</box>"
    assert raw([{"ref": "dog", "box": [1, 2, 3, 4]}]) == raw(text)
    assert raw([{"ref": "dog", "box": np.array([1, 2, 3, 4])}]) == raw(text)


@pytest.mark.parametrize(
    "box",
    [[1, 2, 3], [[1, 2, 3, 4], [1, 2]], [1, 2, 3, 1001], [-1, 0, 1, 1], "box", [1, 2, 3, None], 7, None, [10**400] * 4],
)
def test_bad_boxes(box):
    with pytest.raises(QvlError, match="x1, y1, x2, y2"):
        raw([{"box": box}])


def test_messages():
    url = "data:image/png;base64," + base64.b64encode(b"x").decode()
    messages = [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}],
        },
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": [{"image": "b.png"}, {"text": "and <|im_end|> this?"}]},
    ]
    prompt = raw(messages)
    history = [(f"Picture 1: <img>{url}</img>\nwhat?", "a dog")]
    assert prompt == build_chat(TINY, "Picture 2: <img>b.png</img>\nand <|im_end|> this?", history)[0]
    assert prompt.images == [url, "b.png"]
    assert raw([{"role": "system", "content": DEFAULT_SYSTEM}, *messages]) == prompt
    assert raw([{"role": "system", "content": "Short."}, *messages]).ids != prompt.ids


def test_images_of_messages():
    messages = [{"role": "user", "content": "<img></img>a"}, {"role": "assistant", "content": None}]
    prompt = raw([*messages, {"role": "user", "content": "q"}], ["1.png", "2.png"])
    assert prompt.images == ["1.png", "2.png"]
    assert TINY.decode(prompt.ids).endswith(
        "user\n<img></img>a<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>user\nPicture 2: <img></img>\nq<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_later_message_of_the_system():
    prompt = raw([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}])
    assert TINY.decode(prompt.ids).endswith(
        "user\na<|im_end|>\n<|im_start|>system\nb<|im_end|>\n<|im_start|>assistant\n"
    )


def test_two_messages_of_the_user_in_a_row():
    prompt = raw([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    assert "user\na<|im_end|>\n<|im_start|>user\nb" in TINY.decode(prompt.ids)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "tool", "content": "x"}], "'tool'"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}], "last message"),
        ([{"role": "user", "content": "x"}, {"content": "x"}], "None"),
        ([{"role": "user", "content": 7}], "int"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "audio"),
        ([{"role": "user", "content": [{"text": 7}]}], "int"),
        ([{"role": "user", "content": ["x"]}], "dict"),
        ([{"role": "assistant", "content": [{"image": "a"}]}, {"role": "user", "content": "x"}], "NoneType"),
        ([{"role": "r" * 100_000, "content": "x"}], "^.{,200}$"),
    ],
)
def test_bad_messages(messages, message):
    with pytest.raises(QvlError, match=message):
        raw(messages)


def test_pictures_of_a_long_conversation_are_counted_once(monkeypatch):
    counted = []

    def count(spoken):
        counted.extend(spoken)
        return count_places(spoken)

    monkeypatch.setattr("qvl_runtime.families.qwen_vl.prompt.count_places", count)
    turn = [{"role": "user", "content": [{"image": "a"}]}, {"role": "assistant", "content": "x"}]
    prompt = raw([*turn * 50, {"role": "user", "content": [{"image": "b"}]}])
    assert "Picture 51: <img></img>" in TINY.decode(prompt.ids) and len(counted) < 300
    counted.clear()
    build_chat(TINY, [{"image": "b"}], [([{"image": "a"}], "x")] * 50)
    assert len(counted) < 300


def test_token_ids():
    ids = TINY.encode("a<img></img>b<img></img>")
    for form in (ids, tuple(ids), np.array(ids)):
        prompt = raw(form, [PIL_IMAGE, "b.png"])
        assert prompt.ids == ids
        assert all(type(i) is int for i in prompt.ids)
        assert prompt.images == [PIL_IMAGE, "b.png"]
    assert raw([39, 40]).images == []
    assert raw([]).ids == []


def test_token_ids_of_the_published_tokenizer_carry_the_path():
    case = next(c for c in read("vl_tiny.json")["strings"] if c["text"] == "<img>目录/图片 一.png</img>x")
    ids = expand(case["ids"])
    assert raw(ids).images == ["目录/图片 一.png"]
    assert raw(ids, [PIL_IMAGE]).images == [PIL_IMAGE]


@pytest.mark.parametrize(
    ("ids", "images", "message"),
    [
        ([39, 640], None, "640"),
        ([-1], None, "-1"),
        (TINY.encode("<img></img>"), None, "1 image slots, but images has 0"),
        (TINY.encode("<img></img>"), ["a", "b"], "1 image slots, but images has 2"),
        ([39], ["a"], "0 image slots, but images has 1"),
        (TINY.encode("a<img></img>")[:-1], ["a"], "position 1"),
        (TINY.encode("a<img></img>")[:5], ["a"], "position 1"),
        ([614, *[616] * 100, 615, *[616] * 155, 615], ["a"], "position 0"),
        (np.zeros((1, 3), np.int64), None, "1-D"),
        (np.zeros(3), None, "float64"),
    ],
)
def test_bad_token_ids(ids, images, message):
    with pytest.raises(QvlError, match=message):
        raw(ids, images)


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ("<img></img>", None, r"empty image slots .*: 1, images: 0;"),
        ("<img></img>", ["a", "b"], r"empty image slots .*: 1, images: 2;"),
        ("<img>a.png</img>", ["b"], r"empty image slots .*: 0, images: 1;"),
        ("<img>a.png", None, "unclosed"),
        ("x", "a.png", r"images=\[image\]"),
        ("x", ARRAY, r"images=\[image\]"),
        (7, None, "int"),
        ([{"image": "a"}, 7], None, "dict"),
        ("<img>https://x.org/a.png</img>", None, "unless you allow it"),
        ("x", ["http://x.org/a.png"], "unless you allow it"),
        ("x", [None], "None in place of an image"),
    ],
)
def test_bad_prompts(prompt, images, message):
    with pytest.raises(QvlError, match=message):
        raw(prompt, images)


@pytest.mark.parametrize("images", [None, ["a.png"]])
def test_an_empty_turn(images):
    with pytest.raises(QvlError, match="the prompt is empty"):
        build_prompt([], images, TINY, chat=True)


def test_a_million_tags_that_never_end():
    with pytest.raises(QvlError, match="unclosed"):
        raw("<img>" * 1_000_000)


def test_urls_when_allowed():
    assert raw("<img>https://x.org/a.png</img>", access=Access(urls=True)).images == ["https://x.org/a.png"]


def test_messages_for_a_base_model():
    with pytest.raises(QvlError, match=r"base model.*one str"):
        build_prompt([{"role": "user", "content": "x"}], None, TINY, chat=False)


def test_a_model_without_vision():
    tokenizer = TINY_TEXT_ONLY
    text = "<img>plain text</img> <box>"
    assert build_prompt(text, None, tokenizer, chat=True).ids == tokenizer.encode_ordinary(text)
    for prompt, images in (("x", ["a.png"]), ([{"image": "a.png"}], None), ([39], ["a.png"])):
        with pytest.raises(QvlError, match="no vision"):
            build_prompt(prompt, images, tokenizer, chat=True)


def test_chat_history_keeps_the_pictures():
    _, query = build_chat(TINY, "what?", images=["a.png"])
    assert query == "Picture 1: <img>a.png</img>\nwhat?"
    _, query = build_chat(TINY, "<img></img>what?", images=[Path("a.png")])
    assert query == "<img>a.png</img>what?"
    first, query = build_chat(TINY, "what?", images=[PIL_IMAGE])
    second, _ = build_chat(TINY, "and?", [(query, "x")])
    assert first.images == second.images == [PIL_IMAGE]
    _, query = build_chat(TINY, [{"image": ARRAY}, {"text": "what?"}])
    assert build_chat(TINY, "and?", [(query, "x")])[0].images[0] is ARRAY


def test_pictures_are_numbered_through_the_conversation():
    history = [("Picture 1: <img>a.png</img>\nwhat?", "x")]
    prompt, query = build_chat(TINY, "and this?", history, ["b.png"])
    assert query == "Picture 2: <img>b.png</img>\nand this?"
    assert prompt.images == ["a.png", "b.png"]
    assert build_chat(TINY, [{"image": "b.png"}, {"text": "and this?"}], history)[1] == query


def test_pictures_of_a_dropped_turn_are_dropped():
    prompt, _ = build_chat(TINY, "q", [("<img></img>", "x"), ("<img></img>", "y")], ["a", "b"], max_window_size=400)
    assert prompt.images == ["b"]


@pytest.mark.parametrize("history", [["question"], [("a", "b", "c")], [7]])
def test_bad_history(history):
    with pytest.raises(QvlError, match="pair"):
        build_chat(TINY, "q", history)
