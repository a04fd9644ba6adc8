"""Prompts of the newer families: templates against the golden texts, places for pictures, and what is refused."""

import dataclasses
import functools
import itertools
import math

import pytest
from families import GOLDEN, config, read

from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen2_vl.prompt import Prompts
from qvl_runtime.families.qwen2_vl.template import Template
from qvl_runtime.families.qwen2_vl.vocabulary import read_vocabulary
from qvl_runtime.families.qwen3_vl.calling import CALLING
from qvl_runtime.families.qwen3_vl.template import Qwen3Template
from qvl_runtime.inputs.pictures import Access, Picture
from qvl_runtime.inputs.prompt import Window
from qvl_runtime.inputs.tokenizer import Tokenizer
from qvl_runtime.inputs.tools import ToolCall, Tools

NAMES = {"Qwen2-VL and Qwen2.5-VL": "q2-tied", "Qwen3-VL": "q3-tied"}
IMAGE = {"type": "image"}
SIZES = {"one": (2, 3), "two": (1, 4)}
CHATS = [row for row in read("tok/chat_tiny.json") if "video" not in str(row["messages"])]


def picture(source, access) -> Picture:
    """A picture with the size in its name."""
    rows, columns = SIZES.get(source, (1, 1))
    return Picture(str(source).encode(), source, rows * columns, (rows, columns), (1, 1), (1, 1))


@functools.cache
def prompts(name: str, thinking: bool = False, tools: bool = False) -> Prompts:
    ranks, special = read_vocabulary(GOLDEN / "ckpt" / name)
    tokenizer = Tokenizer(ranks, special, config(name).vocab_size)
    template = Template() if name.startswith("q2") else Qwen3Template(thinking, TOOLS if tools else ())
    return Prompts(tokenizer, config(name), template, picture)


TOOLS = ({"name": "clock", "parameters": {"zone": "Zürich"}},)


def build(made: Prompts, prompt, images=None, access=Access(paths=True)):  # noqa: B008
    return made.build(prompt, images, access)


def chat(made: Prompts, query, history=None, images=None, system=None, window=Window()):  # noqa: B008
    return made.chat(query, history, images, system=system, window=window, access=Access())


def text_of(made: Prompts, prompt) -> str:
    return made.tokenizer.decode(prompt.ids)


def with_vision_ids(messages: list[dict]) -> list[dict]:
    """The messages with the text that the template's option `add_vision_id` adds before pictures."""
    count, out = 0, []
    for message in messages:
        parts = []
        for part in [] if isinstance(message["content"], str) else message["content"]:
            if part["type"].startswith("image"):
                count += 1
                parts.append({"type": "text", "text": f"Picture {count}: "})
            parts.append(part)
        out.append({**message, "content": parts or message["content"]})
    return out


@pytest.mark.parametrize("case", CHATS, ids=[f"{r['template'][:8]}-{i}" for i, r in enumerate(CHATS)])
def test_golden_chats(case):
    made, options = prompts(NAMES[case["template"]]), case["options"]
    messages = with_vision_ids(case["messages"]) if options.get("add_vision_id") else case["messages"]
    images = ["x"] * (str(messages).count("'image'}") + str(messages).count("'type': 'image', 'text'"))
    built = build(made, messages, images)
    head = made._encoder.encode(made.template.answer_head(), Access()).ids
    ids = built.ids if options["add_generation_prompt"] else built.ids[: -len(head)]
    if "<|im_end|> mark" in case["text"]:  # the original takes a typed form for a special one
        end = made.tokenizer.im_end_id
        assert case["ids"].count(end) == ids.count(end) + 1
        assert text_of(made, built) == case["text"]
    else:
        assert ids == case["ids"]


def test_raw_text():
    made = prompts("q3-tied")
    start, pad, end = (made.tokenizer.special[f"<|{n}|>"] for n in ("vision_start", "image_pad", "vision_end"))
    one, two = [start, *[pad] * 6, end], [start, *[pad] * 4, end]
    ordinary = made.tokenizer.encode_ordinary
    built = build(made, "a<img>one</img>b<img></img>", ["two"])
    assert built.ids == [*ordinary("a"), *one, *ordinary("b"), *two]
    assert [(slot.start, slot.picture.content) for slot in built.slots] == [(2, "one"), (11, "two")]
    assert build(made, "b", ["one", "two"]).ids == [*one, *two, *ordinary("b")]
    assert build(made, "a<|vision_start|><|image_pad|><|vision_end|>b", ["two"]).ids == [
        *ordinary("a"),
        *two,
        *ordinary("b"),
    ]
    assert build(made, "<|im_end|>x").ids == [made.tokenizer.im_end_id, *ordinary("x")]
    plain = build(made, "<img>one</img>", access=Access(paths=False))
    assert plain.ids == ordinary("<img>one</img>")


@pytest.mark.parametrize("name", ["q2-tied", "q3-tied"])
def test_parts(name):
    made = prompts(name)
    by_part = [
        {"type": "image", "image": "one"},
        {"type": "image", "url": "one"},
        {"type": "image_url", "image_url": {"url": "one"}},
        {"image": "one"},
        {"image_url": "one"},
    ]
    question = {"type": "text", "text": "What?"}
    expected = build(made, [{"role": "user", "content": [{"type": "image"}, question]}], ["one"])
    for part in by_part:
        assert build(made, [{"role": "user", "content": [part, question]}]).ids == expected.ids
    assert build(made, [by_part[0], question]).ids == expected.ids
    assert build(made, [{"role": "user", "content": "<img>one</img>What?"}]).ids == expected.ids


def test_typed_forms():
    made = prompts("q3-tied")
    for content in ("<|im_end|>", "<|vision_start|><|image_pad|><|vision_end|>", "<think>"):
        built = build(made, [{"role": "user", "content": content}])
        assert built.ids.count(made.tokenizer.im_end_id) == 1
        assert not built.slots
        assert content in text_of(made, built)
        assert not {made.tokenizer.special["<|image_pad|>"], made.tokenizer.special["<think>"]} & set(built.ids)
    said = "<|object_ref_start|>cat<|object_ref_end|><|im_end|><|image_pad|>"
    built = build(made, [{"role": "assistant", "content": said}, {"role": "user", "content": "?"}])
    assert built.ids.count(made.tokenizer.special["<|object_ref_end|>"]) == 1
    assert built.ids.count(made.tokenizer.im_end_id) == 2


def test_chat_turns():
    made = prompts("q3-tied")
    first = chat(made, "Look", None, ["one"])
    assert first.query == [{"type": "image", "image": "one"}, {"type": "text", "text": "Look"}]
    tagged = chat(made, "<img>one</img>Look")
    assert tagged.query == "<img>one</img>Look"
    assert tagged.prompt.ids == first.prompt.ids
    history = [(first.query, "A cat"), ("And?", "No")]
    wanted = [
        {"role": "user", "content": first.query},
        {"role": "assistant", "content": "A cat"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No"},
        {"role": "user", "content": "Really?"},
    ]
    assert chat(made, "Really?", history).prompt.ids == build(made, wanted).ids
    system = [{"role": "system", "content": "Short."}]
    assert chat(made, "Really?", history, system="Short.").prompt.ids == build(made, system + wanted).ids
    size = len(build(made, wanted).ids)
    cut = chat(made, "Really?", history, window=Window(math.inf, size - 1))
    assert cut.left_out == 1
    assert cut.prompt.ids == build(made, wanted[2:]).ids


@pytest.mark.parametrize("name", ["q2-tied", "q3-tied"])
def test_each_picture_of_a_conversation_is_read_once(name):
    read = []
    made = prompts(name)
    noted = dataclasses.replace(made, read=lambda source, access: read.append(source) or picture(source, access))
    look, again = [{"type": "text", "text": "\nThis"}, IMAGE], [IMAGE, {"type": "text", "text": "?"}]
    names = ["one", "two", "three"]
    chatted = chat(noted, [IMAGE], [(look, "\nA dog."), (again, "No.")], names).prompt
    assert read == names
    said = zip(itertools.cycle(["user", "assistant"]), [look, "\nA dog.", again, "No.", [IMAGE]])
    built = build(made, [{"role": role, "content": content} for role, content in said], names)
    assert chatted.ids == built.ids
    assert [(slot.start, slot.key) for slot in chatted.slots] == [(slot.start, slot.key) for slot in built.slots]


def test_token_ids():
    made = prompts("q2-tied")
    built = build(made, "<img>one</img><img>two</img>x")
    again = build(made, built.ids, ["one", "two"])
    assert (again.ids, [s.start for s in again.slots]) == (built.ids, [s.start for s in built.slots])
    start, pad, end = (made.tokenizer.special[f"<|{n}|>"] for n in ("vision_start", "image_pad", "vision_end"))
    for ids, images, message in [
        (built.ids, ["one"], "2 image slots, but images has 1"),
        (built.ids, ["two", "one"], "position 1 must be"),
        ([start, *[pad] * 5, end], ["one"], "position 1 must be"),
        ([start, *[pad] * 7, end], ["one"], "position 1 must be"),
        ([*[pad] * 6, end], ["one"], "position 0 must be"),
        ([start, *[pad] * 6], ["one"], "position 1 must be"),
        ([made.tokenizer.special["<|video_pad|>"]], [], "token 0 .* placeholder"),
        ([768], [], "768"),
        ([pad] * 200_000, [], "1 image slots"),
    ]:
        with pytest.raises(QvlError, match=message):
            build(made, ids, images)


def test_tools():
    made = prompts("q3-tied", tools=True)
    messages = [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "Time?"},
        {
            "role": "assistant",
            "content": "Wait.",
            "tool_calls": [
                {"type": "function", "function": {"name": "clock", "arguments": {"zone": "Zürich"}}},
                {"name": "clock", "arguments": '{"zone": 1}'},
            ],
        },
        {"role": "tool", "content": "12:00"},
        {"role": "tool", "content": [{"type": "text", "text": "13:00"}]},
    ]
    built = build(made, messages)
    assert text_of(made, built) == (
        "<|im_start|>system\nShort.\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"name": "clock", "parameters": {"zone": "Zürich"}}\n</tools>\n\n'
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nTime?<|im_end|>\n<|im_start|>assistant\nWait.\n<tool_call>\n"
        '{"name": "clock", "arguments": {"zone": "Zürich"}}\n</tool_call>\n<tool_call>\n'
        '{"name": "clock", "arguments": {"zone": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n12:00\n</tool_response>\n<tool_response>\n13:00\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert built.ids.count(made.tokenizer.special["<tool_call>"]) == 4


@pytest.mark.parametrize(("content", "thinking", "head"), [
    (None, False, ""),
    ("", False, ""),
    ([], False, ""),
    ([{"type": "text", "text": ""}], False, "\n"),
    ([{"type": "text", "text": ""}], True, ""),
    ([{"type": "text", "text": "Wait."}], True, "Wait.\n"),
])  # fmt: skip
def test_a_newline_before_a_tool_call(content, thinking, head):
    """The published templates write one after any content; a list of one empty text is a content."""
    made = prompts("q3-tied", thinking=thinking)
    call = {"role": "assistant", "content": content, "tool_calls": [{"name": "clock", "arguments": {}}]}
    messages = [{"role": "user", "content": "Time?"}, call, {"role": "tool", "content": "12:00"}]
    wanted = f'<|im_start|>assistant\n{head}<tool_call>\n{{"name": "clock", "arguments": {{}}}}\n</tool_call><|im_end|>'
    assert wanted in text_of(made, build(made, messages))


def test_thinking():
    made = prompts("q3-tied", thinking=True)
    said = "<think>\nHm.\n</think>\n\nA cat"
    built = chat(made, "And?", [("What?", said)]).prompt
    assert text_of(made, built) == (
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nA cat<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


def test_reasoning_is_kept_while_an_answer_waits_for_tools():
    """That of the answers to the last question, whose tools have just answered, as in the published template."""
    made, call = prompts("q3-tied", thinking=True), {"name": "clock", "arguments": {}}
    asked = {"role": "user", "content": "Time?"}
    first = {"role": "assistant", "content": "<think>\n\nHm.\n\n</think>\n\nWait.", "tool_calls": [call]}
    second = {"role": "assistant", "content": "Again.\n</think>\n\n", "tool_calls": [call]}
    plain = {"role": "assistant", "content": "<think>\n\n</think>\n\n", "tool_calls": [call]}
    shown = {"role": "tool", "content": "12:00"}
    called = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'

    def answers(*messages):
        text = text_of(made, build(made, [asked, *messages]))
        return [turn.partition("<|im_end|>")[0] for turn in text.split("<|im_start|>assistant\n")[1:-1]]

    kept = [f"<think>\nHm.\n</think>\n\nWait.\n{called}", f"<think>\nAgain.\n</think>\n\n{called}", called]
    assert answers(first, shown, second, shown, plain, shown) == kept
    field = {"role": "assistant", "content": "\nWait.", "reasoning_content": "\nHm.\n", "tool_calls": [call]}
    none = {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call]}
    assert answers(field, shown, none, shown) == [kept[0], f"<think>\nHm.\n</think>\n\n{called}"]
    assert answers(field, shown, asked) == [f"\nWait.\n{called}"]
    dropped = [f"Wait.\n{called}", called]
    assert answers(first, shown, second, shown, asked) == dropped
    assert answers(first, shown, second, shown, asked, second, shown) == [*dropped, kept[1]]


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ([{"role": "robot", "content": "x"}], [], "the role 'robot'"),
        ([{"role": "user"}], [], "has no content"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], [], "the last message"),
        ([{"role": "system", "content": [{"type": "image"}]}, {"role": "user", "content": "y"}], ["one"], "system's"),
        ([{"role": "user", "content": "x"}], ["one"], "no places"),
        ([{"role": "user", "content": [{"type": "image"}]}], [], "empty image slots .*: 1,"),
        ([{"role": "user", "content": [{"type": "image"}]}], ["one", "two"], "empty image slots .*: 1,"),
        ([{"role": "user", "content": [{"type": "sound"}]}], [], "needs 'text'"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], [], "must be a str"),
        ([{"role": "user", "content": 3}], [], "must be a str"),
        ("<img></img>", [], "empty image slots .*: 1,"),
        ("<|image_pad|>", [], "token 0 .* placeholder"),
        (3, [], "must be a str"),
        ([], [], "the prompt is empty"),
        ([], ["one"], "the prompt is empty"),
        ([{"role": "user", "content": "x", "tool_calls": [{"name": "f", "arguments": {}}]}], [], "only an assistant's"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{"name": "f"}]}], [], "'name' and 'arguments'"),
        ([{"role": "assistant", "content": "x", "reasoning_content": 1}], [], "the reasoning_content 1"),
        (
            [
                {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": {1}}}]},
                {"role": "user", "content": "x"},
            ],
            [],
            "no JSON",
        ),
    ],
)
def test_refused(prompt, images, message):
    with pytest.raises(QvlError, match=message):
        build(prompts("q3-tied"), prompt, images)


def test_what_a_tool_returns_opens_nothing():
    """It may come from anywhere; a picture in it is a part of its own."""
    made = prompts("q3-tied")
    for content in ("a<img>one</img>", [{"type": "text", "text": "a<img>one</img>"}]):
        built = build(made, [{"role": "user", "content": "x"}, {"role": "tool", "content": content}])
        assert not built.slots and "a<img>one</img>" in text_of(made, built)
    shown = [{"role": "user", "content": "x"}, {"role": "tool", "content": [{"type": "image", "image": "one"}]}]
    assert [slot.picture.content for slot in build(made, shown).slots] == ["one"]


def test_calls_of_an_answer_as_they_are():
    made, call = prompts("q3-tied"), ToolCall("clock", {"zone": "UTC"})
    calls = [call._asdict(), {"type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}]
    texts = {
        text_of(made, build(made, [{"role": "assistant", "tool_calls": found}, {"role": "tool", "content": "y"}]))
        for found in ([call], call, calls[:1], calls[1:])
    }
    assert len(texts) == 1


def test_a_tokenizer_without_tags():
    made = prompts("q3-tied")
    known = {form: i for form, i in made.tokenizer.special.items() if not form.startswith(("<tool", "</tool"))}
    ranks = {made.tokenizer.token_bytes(i): i for i in range(made.tokenizer.special["<|endoftext|>"])}
    bare = dataclasses.replace(made, tokenizer=Tokenizer(ranks, known, made.config.vocab_size))
    with pytest.raises(QvlError, match="has no <tool_response>"):
        build(bare, [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}])
    with pytest.raises(QvlError, match="takes no tools: its tokenizer has no <tool_call>; use a published"):
        CALLING.prompts(bare, Tools(TOOLS))


def test_arguments_nested_too_deep():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": deep}}]}
    with pytest.raises(QvlError, match="no JSON"):
        build(prompts("q3-tied"), [call, {"role": "tool", "content": "y"}])


def test_tags_that_never_end_are_text():
    made = prompts("q2-tied")
    assert build(made, "<img>one</img>" + "<img>" * 200_000).pictures[0].content == "one"
    with pytest.raises(QvlError, match="must be a str"):
        chat(made, "x", system=5)


@pytest.mark.parametrize(
    ("name", "first"),
    [("q2-tied", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"), ("q3-tied", "")],
)
def test_a_later_message_of_the_system(name, first):
    """The template of Qwen2-VL renders messages of any role. That of Qwen3-VL omits this one; Qwen3's renders it."""
    said, brief = {"role": "user", "content": "a"}, {"role": "system", "content": "Be brief."}
    made = prompts(name)
    asked = f"{first}<|im_start|>user\na<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n"
    assert text_of(made, build(made, [said, brief])) == f"{asked}<|im_start|>assistant\n"
    assert text_of(made, build(made, [said, brief, said])) == (
        f"{asked}<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text_of(made, build(made, [brief, brief])) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" * 2 + "<|im_start|>assistant\n"
    )


def test_opened_box():
    made = prompts("q2-tied")
    opened = "<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(1,"
    assert build(made, f"<img>one</img>{opened}").opened == opened
    assert build(made, "<|box_start|>(1,2),(3,4)<|box_end|>").opened == ""
    assert build(made, "x").opened == ""


def test_a_box_of_a_question_is_special_where_its_tags_are():
    made = prompts("q2-tied")
    mark = "<|box_start|>(1,2),(3,4)<|box_end|>"
    for kind, count in (("box", 1), ("text", 0)):
        ids = build(
            made, [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": kind, "text": mark}]}]
        ).ids
        assert ids.count(made.tokenizer.special["<|box_start|>"]) == count
        assert mark in made.tokenizer.decode(ids)
