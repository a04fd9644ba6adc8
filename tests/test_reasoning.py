"""Thinking editions: the reasoning before an answer is a separate field in every interface."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from families import GOLDEN
from rich.console import Console
from serving import serving

import qvl_runtime as qvl
from qvl_convert.convert import convert
from qvl_runtime.cli.conversation import Conversation
from qvl_runtime.cli.screen import Screen
from qvl_runtime.engine.generation import Choice, Timings, stream_generate
from qvl_runtime.errors import PromptTooLongError, QvlError
from qvl_runtime.results import collected


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A golden checkpoint whose template begins answers with reasoning."""
    folder = tmp_path_factory.mktemp("thinking")
    shutil.copytree(GOLDEN / "ckpt/q3-tied", folder / "ckpt")
    path = folder / "ckpt/tokenizer_config.json"
    template = {"chat_template": "{{- '<|im_start|>assistant\\n<think>\\n' }}"}
    path.write_text(json.dumps(json.loads(path.read_text()) | template))
    convert(folder / "ckpt", folder / "thinking.qvl", group_size=32)
    return qvl.load(folder / "thinking.qvl", device="cpu")


def pieces_of(model, text: str, stop=(), end: str = "</think>"):
    ids = model.tokenizer.encode(text)
    choices = iter([Choice(i) for i in ids])
    return list(
        stream_generate(
            choices,
            model.tokenizer,
            stop_ids=frozenset({model.tokenizer.im_end_id}),
            stop=list(stop),
            timings=Timings(),
            reasoning_end=model.tokenizer.special[end],
        )
    )


@pytest.mark.parametrize(
    ("tokens", "stop", "reasoning", "text", "finish"),
    [
        ("So, 1.\n</think>\n\nIt is 答案.<|im_end|>", (), "So, 1.", "It is 答案.", "stop"),
        ("</think>x<|im_end|>", (), "", "x", "stop"),
        ("a</think>\n\n\n", (), "a", "", "length"),
        ("never ends", (), "never ends", "", "length"),
        ("ends at once<|im_end|>x", (), "ends at once", "", "stop"),
        ("a\n\nb</think>\n\nc\n\nd", ("\n\n",), "a\n\nb", "c", "stop"),
        ("a</think>b</think>c", (), "a", "b</think>c", "length"),
    ],
)
def test_a_stream_tells_reasoning_from_answer(model, tokens, stop, reasoning, text, finish):
    pieces = pieces_of(model, tokens, stop)
    result = collected(pieces, lambda text: [])
    assert (result.reasoning, result.text, result.finish_reason) == (reasoning, text, finish)
    ids = model.tokenizer.encode(tokens.partition("<|im_end|>")[0])
    assert result.token_ids == ids[: len(result.token_ids)]
    if not stop:
        assert result.token_ids == ids
    flags = [piece.reasoning for piece in pieces if piece.text]
    assert flags == sorted(flags, reverse=True)


def test_a_chat_keeps_the_answer_only(model):
    head = model.prompts.build([{"role": "user", "content": "Hi"}], None, qvl.inputs.pictures.LOCAL)
    assert model.tokenizer.decode(head.ids).endswith("<|im_start|>assistant\n<think>\n")
    assert model.generation_config.thinking and model.generation_config.max_new_tokens == 8192
    seen = []
    options = {"constraint": qvl.Regex("[0-9]{3}"), "max_new_tokens": 16, "temperature": 0}
    result = model.chat("Hi", on_piece=seen.append, **options)
    # The constraint waits for the end of the reasoning, which comes after half of the tokens at the latest.
    assert len(result.text) == 3 and result.text.isdigit()
    end = result.token_ids.index(model.tokenizer.special["</think>"])
    assert 0 < end <= 7
    assert result.reasoning == model.tokenizer.decode(result.token_ids[:end]).strip() != ""
    assert "".join(p.text for p in seen if not p.reasoning) == result.text
    assert result.history == [("Hi", result.text)]
    again = model.prompts.chat(
        "And?",
        [("Hi", f"<think>\nno\n</think>\n\n{result.text}")],
        None,
        system=None,
        window=qvl.inputs.prompt.Window(),
        access=qvl.inputs.pictures.LOCAL,
    )
    plain = model.chat("And?", result.history, max_new_tokens=2)
    assert plain.prompt_tokens == len(again.prompt.ids)
    assert "<think>" not in model.tokenizer.decode(again.prompt.ids).removesuffix("<think>\n")


def test_a_minimum_length_leaves_the_reasoning_as_it_is(model):
    messages = [{"role": "user", "content": "Hi"}]
    free = model.generate(messages, max_new_tokens=24)
    assert model.tokenizer.special["</think>"] not in free.token_ids, "the golden model's answer has changed"
    assert model.generate(messages, max_new_tokens=24, min_new_tokens=1).token_ids == free.token_ids


def test_raw_text_reasons_where_it_opens_the_tag(model):
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert model.generate(text, max_new_tokens=3).reasoning == ""
    result = model.generate(f"{text}<think>\n", max_new_tokens=3)
    assert (result.text, result.finish_reason) == ("", "length") and result.reasoning
    assert model.generate(f"{text}<think>\na</think>\n\n", max_new_tokens=3).reasoning == ""
    ids = model.tokenizer.encode(f"{text}<think>\n")
    assert model.generate(ids, max_new_tokens=3).reasoning == result.reasoning
    with pytest.raises(QvlError, match="max_new_tokens"):
        model.generate(ids, max_new_tokens=1, constraint=qvl.Grounding())


def test_no_room_for_a_box_after_reasoning(model):
    """The message states the number that was given, and the least that is accepted."""
    with pytest.raises(QvlError, match=r"^max_new_tokens is 260; a box with its label needs 261$"):
        model.stream("<think>\n", max_new_tokens=260, constraint=qvl.Grounding())
    model.stream("<think>\n", max_new_tokens=261, constraint=qvl.Grounding()).cancel()
    prompt = model.tokenizer.encode("<think>\n") + [0] * model.window
    with pytest.raises(PromptTooLongError, match=r"the window is \d+; a box with its label needs 261; shorten"):
        model.stream(prompt[: model.window - 260], max_new_tokens=8192, constraint=qvl.Grounding())
    with serving(model) as served:
        error = served.chat("Hi", grounding=True, max_tokens=250).json()["error"]
    assert error["message"] == "max_tokens is 250; a box with its label needs 261" and error["param"] == "max_tokens"


def test_a_terminal_shows_reasoning_apart_and_a_pipe_none(model):
    shown = {}
    for terminal in (True, False):
        screen = Screen(Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system="standard"))
        talk = Conversation(model, screen)
        talk.settings = {"constraint": qvl.Regex("[0-9]{3}"), "max_new_tokens": 16, "temperature": 0}
        talk.take("Hi")
        shown[terminal] = screen.console.file.getvalue()
        assert talk.history[0][1].isdigit()
    answer = talk.history[0][1]
    assert shown[False].strip() == answer
    assert "\x1b[2m" in shown[True] and shown[True].rstrip().endswith(f"\n\n{answer}")
