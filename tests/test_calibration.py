"""Calibration data: every source, what is skipped, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from qvl_convert import calibration
from qvl_convert.checkpoint import Checkpoint
from qvl_runtime.errors import QvlError


@pytest.fixture(scope="module")
def chat(golden):
    return Checkpoint(golden / "ckpt" / "tiny-vl")


@pytest.fixture(scope="module")
def base(golden):
    """The same model, said to know no chat turns."""
    checkpoint = Checkpoint(golden / "ckpt" / "tiny-vl")
    checkpoint.generation_config = dataclasses.replace(checkpoint.generation_config, chat_format="raw")
    return checkpoint


@pytest.fixture(scope="module")
def tokenizer(chat):
    return chat.tokenizer


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        Image.fromarray(np.full((20, 30, 3), 7 * ord(name) % 256, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("A grey square.\n")
    return tmp_path


def conversation(question="Picture 1: <img>a.png</img>\nWhat is it?", answer="Grey.", user="user", other="assistant"):
    return {"id": "x", "conversations": [{"from": user, "value": question}, {"from": other, "value": answer}]}


def test_fine_tuning_json_becomes_chat_turns_with_paths_from_its_folder(folder, tokenizer, chat):
    (folder / "data.json").write_text(json.dumps([conversation()]))
    (sample,) = calibration.load(folder / "data.json", chat)
    assert tokenizer.decode(sample.ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nPicture 1: <img></img>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\nGrey.<|im_end|>"
    )
    assert sample.images == [(folder / "a.png").read_bytes()]


def test_a_base_model_gets_plain_text(folder, tokenizer, base):
    (folder / "data.json").write_text(json.dumps([conversation()]))
    (sample,) = calibration.load(folder / "data.json", base)
    assert tokenizer.decode(sample.ids) == "Picture 1: <img></img>\nWhat is it?\nGrey."


def test_json_lines_hold_conversations_and_texts(folder, tokenizer, chat):
    lines = [conversation(user="human", other="gpt"), {"text": "Only words."}]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    samples = calibration.load(folder / "data.jsonl", chat)
    assert sorted(len(s.images) for s in samples) == [0, 1]
    assert "Only words." in {tokenizer.decode(s.ids) for s in samples}


def test_json_lines_end_at_line_feeds_only(folder, tokenizer, chat):
    said = ["one\u2028two \u0085 three", "next"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in said)
    (folder / "data.jsonl").write_bytes(f"{lines}\r\n".encode())
    samples = calibration.load(folder / "data.jsonl", chat)
    assert {tokenizer.decode(s.ids) for s in samples} == set(said)


def test_a_folder_gives_its_pictures_with_their_captions(folder, tokenizer, chat):
    samples = calibration.load(folder, chat)
    texts = sorted(tokenizer.decode(s.ids) for s in samples)
    assert len(texts) == 2 and sum("A grey square.<|im_end|>" in t for t in texts) == 1
    contents = {(folder / name).read_bytes() for name in ("a.png", "b.png")}
    assert {s.images[0] for s in samples} == contents


@pytest.mark.parametrize("is_chat", [True, False])
def test_the_builtin_set_is_bilingual_has_pictures_and_is_always_the_same(tokenizer, is_chat, chat, base):
    samples = calibration.load("builtin", chat if is_chat else base, count=12)
    assert len(samples) == 12 and sum(len(s.images) for s in samples) >= 8
    text = "".join(tokenizer.decode(s.ids) for s in samples)
    assert sum("一" <= c <= "鿿" for c in text) > 200 and sum(c.isascii() for c in text) > 2000
    assert calibration.digest(samples) == calibration.digest(
        calibration.load("builtin", chat if is_chat else base, count=12)
    )
    assert calibration.digest(samples) != calibration.digest(
        calibration.load("builtin", chat if is_chat else base, count=12, seed=1)
    )
    assert all(s.ids.count(tokenizer.img_start_id) == len(s.images) for s in samples)


def test_boxes_of_the_builtin_set_are_qwen_vls_own(chat):
    reader = chat.reader.read(np.zeros((448, 448, 3), np.uint8))
    said = "<ref>a cat</ref><box>(10,20),(370,990)</box><ref>it</ref><box>(0,0),(520,510)</box>"
    for text in (said, "Is <ref>it</ref> in <box>(120,70),(990,980)</box>?", "nothing"):
        assert calibration._with_boxes(text, chat.grounding, reader) == text


def test_a_model_without_eyes_gets_text_alone(golden):
    ckpt = Checkpoint(golden / "ckpt" / "tiny-q7-gptq-asym")
    samples = calibration.load("builtin", ckpt, count=4)
    assert len(samples) == 4 and not any(s.images for s in samples)


def test_a_folder_gives_pictures_of_all_formats_and_names_others(folder, caplog, chat):
    Image.new("L", (9, 9)).save(folder / "c.tiff")
    (folder / "d.heic").write_bytes(b"x")
    assert len(calibration.load(folder, chat)) == 3
    assert "d.heic: skipped: " in caplog.text and "no image in a known format" in caplog.text


def test_bad_samples_are_named_and_skipped_up_to_a_limit(folder, caplog, chat):
    good, lost = conversation(), conversation("Picture 1: <img>gone.png</img>\n?")
    strange = {"id": "odd", "conversations": [{"from": "cat", "value": "meow"}]}
    (folder / "data.json").write_text(json.dumps([lost, strange, good, {"id": "none"}]))
    samples = calibration.load(folder / "data.json", chat)
    assert len(samples) == 1
    assert "gone.png" in caplog.text and "odd" in caplog.text and "cat" in caplog.text and "none" in caplog.text
    (folder / "data.json").write_text(json.dumps([lost] * (calibration.MAX_BAD + 1)))
    with pytest.raises(QvlError, match=r"more than 10 bad samples.*gone\.png"):
        calibration.load(folder / "data.json", chat)


def test_a_warning_about_a_sample_is_one_short_line(folder, caplog, chat):
    """A file must not be able to write lines of its own, or to a terminal's controls."""
    odd = {"id": "x\x1b[2J\nqvl: done" + "y" * 300, "conversations": [{"from": "\x1b" * 300, "value": "Hello"}]}
    (folder / "data.json").write_text(json.dumps([odd, conversation()]))
    assert len(calibration.load(folder / "data.json", chat)) == 1
    (said,) = caplog.messages
    assert said.isprintable() and len(said) < len(str(folder)) + 250
    (folder / "c\x1b.png").write_bytes(b"no picture")
    calibration.load(folder, chat)
    assert caplog.messages[-1].isprintable()


def test_an_empty_text_is_a_bad_sample(folder, tokenizer, caplog, chat):
    (folder / "data.jsonl").write_text('{"text": ""}\n{"text": "Only words."}\n')
    (sample,) = calibration.load(folder / "data.jsonl", chat)
    assert tokenizer.decode(sample.ids) == "Only words."
    assert "line 1: skipped: its text is empty" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.jsonl", '{"text": ""}', "no usable sample"),
        ("d.json", "{", "not readable as JSON"),
        ("d.json", "{}", "no list of conversations"),
        ("d.json", "[]", "no usable sample"),
        ("d.jsonl", "{'a': 1}", "line 1: is not readable"),
    ],
)
def test_what_is_no_calibration_data_is_an_error_that_names_the_file(tmp_path, name, text, message, chat):
    (tmp_path / name).write_text(text)
    with pytest.raises(QvlError, match=message) as raised:
        calibration.load(tmp_path / name, chat)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_missing_files_and_folders_without_pictures_are_errors(tmp_path, chat):
    with pytest.raises(QvlError, match="no such file; give a JSON file"):
        calibration.load(tmp_path / "gone.json", chat)
    with pytest.raises(QvlError, match="no pictures"):
        calibration.load(tmp_path, chat)


@pytest.mark.parametrize("limit", [600, 300, 20])
def test_long_samples_are_cut_before_a_picture_not_inside(folder, tokenizer, limit, base):
    text = "one " * 15 + "<img>a.png</img> two " * 2
    (folder / "data.jsonl").write_text(json.dumps({"text": text}))
    (sample,) = calibration.load(folder / "data.jsonl", base, max_tokens=limit)
    pads = sample.ids.count(tokenizer.img_pad_id)
    assert len(sample.ids) <= limit and pads == tokenizer.n_queries * len(sample.images)
    assert len(sample.images) == sample.ids.count(tokenizer.img_start_id)


def test_a_cut_at_the_edge_of_a_picture(folder, tokenizer, base):
    (folder / "data.jsonl").write_text(json.dumps({"text": "one " * 15 + "<img>a.png</img> two"}))
    (whole,) = calibration.load(folder / "data.jsonl", base)
    (slot,) = whole.slots
    for limit, kept in ((slot.start - 1, 0), (slot.start, 0), (slot.end, 0), (slot.end + 1, 1)):
        (sample,) = calibration.load(folder / "data.jsonl", base, max_tokens=limit)
        assert len(sample.ids) == (limit if kept else slot.start - 1)
        assert len(sample.slots) == sample.ids.count(tokenizer.img_start_id) == kept


def test_nothing_left_after_cutting_is_a_bad_sample(folder, base):
    (folder / "data.jsonl").write_text(json.dumps({"text": "<img>a.png</img>"}))
    with pytest.raises(QvlError, match="no usable sample"):
        calibration.load(folder / "data.jsonl", base, max_tokens=100)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "url": "a.png"},
        {"type": "image", "image": "a.png"},
        {"image": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image_url", "image": None, "image_url": {"url": "a.png"}, "text": None},
    ],
)
def test_messages_of_parts_as_others_write_them(folder, chat, part):
    asked = [part, {"type": "text", "text": "What is it?"}]
    answered = [{"type": "text", "text": "Grey."}]
    for turns in (
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]},
        {"conversations": [{"from": "user", "value": asked}, {"from": "assistant", "value": "Grey."}]},
    ):
        (folder / "data.json").write_text(json.dumps([turns, conversation()]))
        one, other = calibration.load(folder / "data.json", chat)
        assert one.ids == other.ids and one.asked == other.asked
        assert [slot.picture.key for slot in one.slots] == [slot.picture.key for slot in other.slots]


def test_parts_nobody_knows_are_bad_samples(folder, chat, caplog):
    bad = [[{"type": "video", "video": "a.mp4"}], [1], [{"text": 3}], 7, None, [{"type": "image", "url": "http://x/a"}]]
    entries = [{"messages": [{"role": "user", "content": content}]} for content in bad]
    (folder / "data.json").write_text(json.dumps([*entries, conversation()]))
    assert len(calibration.load(folder / "data.json", chat)) == 1
    assert caplog.text.count("skipped") == len(bad)
    assert """a turn is 'user': "{'type': 'video', 'video': 'a.mp4'}"; expected""" in caplog.text


def test_samples_are_shuffled_before_the_first_are_taken(folder, base, tokenizer):
    lines = [{"text": f"number {i}"} for i in range(50)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    taken = [
        [int(tokenizer.decode(s.ids).split()[1]) for s in calibration.load(folder / "data.jsonl", base, **o)]
        for o in ({"count": 5}, {"count": 5}, {"count": 5, "seed": 1}, {"count": 50})
    ]
    assert taken[0] == taken[1] and taken[0] != taken[2] and max(taken[0]) > 5
    assert taken[3] != sorted(taken[3]) and sorted(taken[3]) == list(range(50))


@pytest.mark.parametrize("options", [{"count": 0}, {"count": "8"}, {"max_tokens": 0}, {"count": True}])
def test_impossible_counts(chat, options):
    with pytest.raises(QvlError, match=r"expected (1 or more|a whole number)"):
        calibration.load("builtin", chat, **options)
