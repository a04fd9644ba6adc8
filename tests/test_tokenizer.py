"""The tokenizer against the golden data: real vocabulary, tiny vocabulary, Qwen-7B."""

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_golden import TINY, TINY_RANKS, expand, pad_slots, read, real_ranks

from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen_vl.tokenizer import QwenTokenizer
from qvl_runtime.inputs.image_tags import split_images
from qvl_runtime.inputs.tokenizer import StreamDecoder


@pytest.fixture
def tiny() -> QwenTokenizer:
    return TINY


@pytest.fixture(scope="module")
def full() -> QwenTokenizer:
    return QwenTokenizer.from_ranks(real_ranks(), image_tags=True, vocab_size=151936)


@pytest.fixture(scope="module")
def q7() -> QwenTokenizer:
    return QwenTokenizer.from_ranks(real_ranks(), image_tags=False, vocab_size=151936)


VOCABULARIES = [("full", "vl_full.json"), ("tiny", "vl_tiny.json")]


@pytest.mark.parametrize(("name", "file"), VOCABULARIES)
def test_special_ids(name, file, request):
    tokenizer, data = request.getfixturevalue(name), read(file)
    tags = {"ref_start_id": "<ref>", "ref_end_id": "</ref>", "box_start_id": "<box>", "box_end_id": "</box>"}
    tags |= {"quad_start_id": "<quad>", "quad_end_id": "</quad>"}
    ids = {key: tokenizer.special[tags[key]] if key in tags else getattr(tokenizer, key) for key in data["special"]}
    assert ids == data["special"]
    assert tokenizer.n_vocab == data["vocab_len"]


@pytest.mark.parametrize(("name", "file"), VOCABULARIES)
def test_encode(name, file, request):
    tokenizer, checked = request.getfixturevalue(name), 0
    for case in read(file)["strings"]:
        text = case["text"]
        if isinstance(case["ids"], dict):
            if "too long" in case["ids"]["msg"]:  # the original's limit on paths is not imitated
                assert tokenizer.encode(text).count(tokenizer.img_pad_id) == 256
            elif "<|endoftext|>" not in text:
                with pytest.raises(QvlError):
                    tokenizer.encode(text)
        else:
            expected = expand(case["ids"])
            ordinary = expand(case.get("ids_nospecial", case["ids"]))
            assert tokenizer.encode(text) == pad_slots(expected, tokenizer), text
            assert tokenizer.encode_ordinary(text) == ordinary, text
            checked += 1
    assert checked > 100


@pytest.mark.parametrize(("name", "file"), VOCABULARIES)
def test_decode(name, file, request):
    tokenizer, checked = request.getfixturevalue(name), 0
    data = read(file)
    cases = data["decode"] + [c for c in data["strings"] if isinstance(c["ids"], list)]
    for case in cases:
        if isinstance(case["decode"], str):
            ids = expand(case["ids"])
            assert tokenizer.decode(ids) == case["decode"]
            stream = StreamDecoder(tokenizer)
            pieces = [stream.push(i) for i in ids]
            assert "".join(pieces) + stream.finish() == case["decode"]
            checked += 1
    assert checked > 100


def test_q7(q7):
    data = read("q7_full_diff.json")
    differ = {case["text"]: case for case in data["strings"]}
    for case in read("vl_full.json")["strings"]:
        expected = differ.get(case["text"], case)
        assert q7.encode(case["text"]) == expand(expected["ids"])
    for case in data["decode"]:
        assert q7.decode(expand(case["ids"])) == case["decode"]
    assert (q7.n_vocab, q7.img_start_id) == (data["vocab_len"], None)


def test_slot_length_follows_n_queries():
    tokenizer = QwenTokenizer.from_ranks(TINY_RANKS, image_tags=True, n_queries=3)
    pad = tokenizer.img_pad_id
    assert tokenizer.encode("<img>x</img>") == [tokenizer.img_start_id, pad, pad, pad, tokenizer.img_end_id]


def test_padding_and_foreign_ids(tiny):
    assert tiny.decode([39, 617, 639, 39]) == "HH"
    for bad in (640, -1, "a", 1.5, 39.0, None, [39]):
        for before in ([], [tiny.special["<img>"]]):
            with pytest.raises(QvlError, match=re.escape(f"token id {bad} is not in 0..639")):
                tiny.decode([*before, bad])
    for bad in ("a\n", "\x1b[2J", np.zeros((2, 2), int)):
        with pytest.raises(QvlError, match="is not in") as caught:
            tiny.decode([bad])
        assert str(caught.value).isprintable()
    for bad in ("a", b"a", 39, None, np.array(39)):
        with pytest.raises(QvlError, match=f"expected token ids to decode, got {type(bad).__name__}; pass a list"):
            tiny.decode(bad)
    assert tiny.decode(np.array([39, 39], np.int32)) == "HH"


def test_what_only_begins_like_a_slot(tiny):
    start, pad, end = tiny.img_start_id, tiny.img_pad_id, tiny.img_end_id
    one, other = tiny.decode([65]), tiny.decode([300])
    assert tiny.decode([start, 65, 300, 300]) == f"<img>{one}{other}{other}"
    assert tiny.decode([start, pad, 65, pad, end]) == f"<img><imgpad>{one}<imgpad></img>"
    assert tiny.decode([start, start, pad, end, start]) == "<img><img></img><img>"


def test_contractions_are_cut_in_either_case(full):
    for contraction, rest in (("'T", "hree"), ("'t", "hree"), ("'RE", "d")):
        together = full.encode("x" + contraction + rest)
        assert together == full.encode("x") + full.encode(contraction) + full.encode(rest)


def test_crlf_ranks():
    crlf = QwenTokenizer.from_ranks(TINY_RANKS.replace(b"\n", b"\r\n"), image_tags=True)
    lf = QwenTokenizer.from_ranks(TINY_RANKS, image_tags=True)
    text = "Hello, world! 你好 <img>a</img>"
    assert crlf.encode(text) == lf.encode(text)


LINES = TINY_RANKS.splitlines()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b"not a rank file", "line 1"),
        (b"\n".join([*LINES[:300], b"IQ== x"]), "line 301: expected"),
        (b"\n".join([*LINES[:300], b"I!Q== 300"]), "line 301: expected"),
        (b"\n".join([*LINES[:300], LINES[0]]), "twice"),
        (b"\n".join([*LINES[:300], b"AAEC 299"]), "doubled"),
        (b"\n".join(LINES[:300] + LINES[301:]), "missing"),
        (b"\n".join(LINES[:200]), "cut short"),
    ],
)
def test_broken_ranks(data, message):
    with pytest.raises(QvlError, match=message):
        QwenTokenizer.from_ranks(data, image_tags=True)


def test_vocab_size_smaller_than_tokenizer():
    with pytest.raises(QvlError, match="600"):
        QwenTokenizer.from_ranks(TINY_RANKS, image_tags=True, vocab_size=600)


def test_split_images():
    assert split_images("a<img>b</img>c<img></img>") == ["a", "b", "c", "", ""]
    assert split_images("no picture </img>") == ["no picture </img>"]
    for bad, message in [("x<img>y", "unclosed"), ("<img>a<box></img>", "nest"), ("<img>a<img>b</img>", "nest")]:
        with pytest.raises(QvlError, match=message):
            split_images(bad)


def test_not_a_string(tiny):
    with pytest.raises(QvlError, match="bytes"):
        tiny.encode(b"text")


@given(st.text())
def test_round_trip(text):
    assert TINY.decode(TINY.encode_ordinary(text)) == unicodedata.normalize("NFC", text)


@given(st.lists(st.integers(0, 639)))
def test_stream_equals_decode(ids):
    stream = StreamDecoder(TINY)
    assert "".join(map(stream.push, ids)) + stream.finish() == TINY.decode(ids)


def test_stream_never_shows_half_a_character(tiny):
    text = "你好 😀 é"
    stream = StreamDecoder(tiny)
    pieces = [stream.push(i) for i in tiny.encode(text)]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert "" in pieces
    assert stream.finish() == ""
    stream.push(tiny.encode("你")[0])
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("blank", [" ", "\n", " \n\t"])
def test_a_million_blanks_are_an_error_and_no_panic(tiny, blank):
    assert tiny.decode(tiny.encode(blank * 20_000)) == blank * 20_000
    for encode in (tiny.encode, tiny.encode_ordinary):
        with pytest.raises(QvlError, match="blanks in a row"):
            encode(f"a{blank * 1_000_000}b")
