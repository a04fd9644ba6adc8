"""From tokens to text: stop strings, half characters, and why an answer ended; no model needed."""

from __future__ import annotations

import pytest
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from qvl_runtime.engine.generation import Choice, StopStrings, Timings, stream_generate
from qvl_runtime.families.qwen_vl.tokenizer import QwenTokenizer
from qvl_runtime.results import collected

RANKS = (GOLDEN / "ckpt" / "tiny-vl" / "qwen.tiktoken").read_bytes()
TOKENIZER = QwenTokenizer.from_ranks(RANKS, image_tags=True)


def _stream(tokens, *, stop=(), max_new_tokens=100, stop_ids=()):
    return stream_generate(
        map(Choice, tokens[:max_new_tokens]),
        TOKENIZER,
        stop_ids=frozenset(stop_ids),
        stop=stop,
        timings=Timings(),
    )


def _collected(pieces):
    return collected(list(pieces), lambda text: [])


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_do_not_depend_on_how_text_arrives(pieces, stops):
    watch, out = StopStrings(stops), ""
    for piece in pieces:
        out += watch.push(piece)
        if watch.found:
            break
    out += watch.flush()
    text = "".join(pieces)
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    assert watch.found == (min(ends)[2] if ends else None)
    assert out == (text[: min(ends)[1]] if ends else text)


def test_stop_string_across_tokens_ends_the_answer():
    tokens = TOKENIZER.encode("one two END three")
    result = _collected(_stream(tokens, stop=["three", "END"]))
    assert result.text == "one two "
    assert (result.finish_reason, result.stop_string) == ("stop", "END")
    assert result.timings.new_tokens < len(tokens)


def test_a_stop_string_in_what_a_cut_character_leaves_ends_the_answer():
    cut = TOKENIZER.encode("a \U0001f642")[:-1]
    assert TOKENIZER.decode(cut).endswith("\ufffd")
    result = _collected(_stream(cut, stop=["\ufffd"]))
    assert (result.text, result.finish_reason, result.stop_string) == ("a ", "stop", "\ufffd")


def test_stop_token_is_not_part_of_the_answer():
    tokens = [*TOKENIZER.encode("hello"), TOKENIZER.im_end_id, *TOKENIZER.encode("more")]
    result = _collected(_stream(tokens, stop_ids=[TOKENIZER.im_end_id]))
    assert (result.text, result.finish_reason, result.stop_string) == ("hello", "stop", None)
    assert result.token_ids == TOKENIZER.encode("hello")


def test_length_keeps_every_token():
    tokens = TOKENIZER.encode("hello world")
    result = _collected(_stream(tokens, max_new_tokens=3))
    assert result.finish_reason == "length"
    assert result.token_ids == tokens[:3]
    assert result.text == TOKENIZER.decode(tokens[:3])


def test_no_token_at_all_is_an_empty_answer():
    result = _collected(_stream(TOKENIZER.encode("hello"), max_new_tokens=0))
    assert (result.text, result.token_ids, result.finish_reason) == ("", [], "length")


def test_stream_never_shows_half_a_character():
    text = "框出图中击掌的位置 🐕‍🦺 done"
    pieces = list(_stream(TOKENIZER.encode(text)))
    assert "".join(p.text for p in pieces) == text
    assert all("\ufffd" not in p.text for p in pieces)
    assert len(pieces) > 5
    assert [t for p in pieces for t in p.token_ids] == TOKENIZER.encode(text)


def test_text_held_for_a_stop_string_comes_out_at_the_end():
    result = _collected(_stream(TOKENIZER.encode("wait EN"), stop=["END"]))
    assert (result.text, result.finish_reason) == ("wait EN", "length")


def test_rates_count_the_tokens_after_the_first():
    timings = Timings(prefill=2.0, decode=4.0, prompt_tokens=100, new_tokens=9)
    assert timings.prefill_tokens_per_second == 50
    assert timings.decode_tokens_per_second == pytest.approx(2.0)
