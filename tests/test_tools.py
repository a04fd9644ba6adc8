"""Tools: calls in answers, free and held to a grammar, and conversations with them, in Python and over HTTP."""

from __future__ import annotations

import json

import pytest
from families import GOLDEN
from serving import events, image_part, picture, png, serving

import qvl_runtime as qvl
from qvl_convert.convert import convert
from qvl_runtime.batch.answers import Answerer
from qvl_runtime.batch.options import Options
from qvl_runtime.batch.rows import Row
from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen3_vl.calling import CALLING, Reader
from qvl_runtime.inputs.pictures import LOCAL
from qvl_runtime.inputs.tools import calls_in
from qvl_runtime.openai.tools import CallWriter

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "day": {"enum": ["today", "明天"]},
                "hour": {"type": "integer", "minimum": 0, "maximum": 23},
            },
            "required": ["day", "hour"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"name": "clock"}
TOOLS = [WEATHER, CLOCK]
ASKED = [{"role": "user", "content": "What time is it?"}]
CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "weather", "arguments": {"day": "明天", "hour": 7}}\n</tool_call>'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tools") / "q3.qvl"
    convert(GOLDEN / "ckpt/q3-tied", path, group_size=32)
    return qvl.load(path, device="cpu")


@pytest.fixture(scope="module")
def served(model):
    with serving(model) as server:
        yield server


def check(call) -> None:
    """The call is one that the schemas allow."""
    name, arguments = call
    if name == "clock":
        assert arguments == {}
    else:
        assert name == "weather" and arguments.keys() == {"day", "hour"}
        assert arguments["day"] in ("today", "明天") and arguments["hour"] in range(24)


# ------------------------------------------------------------------------------------------------ reading answers
@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("It is noon.\n", "It is noon.\n", []),
        (CALL, "", ["clock"]),
        (f"Wait.\n{CALL}\n{OTHER}", "Wait.", ["clock", "weather"]),
        (f"Wait.\n\n{CALL}\n", "Wait.", ["clock"]),
        (f"{CALL} then {OTHER}\nDone.", " then \nDone.", ["clock", "weather"]),
        (CALL.removesuffix("\n</tool_call>"), "", ["clock"]),
        (CALL[:-14], CALL[:-14], []),
        ("<tool_call>\nclock()\n</tool_call>", "<tool_call>\nclock()\n</tool_call>", []),
        (f"<tool_call> or {CALL}", "<tool_call> or ", ["clock"]),
        (f"a</tool_call>{CALL}", "a</tool_call>", ["clock"]),
        ("a <tool\n", "a <tool\n", []),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None, []),
        ('<tool_call>{"name": 1, "arguments": {}}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>", None, []),
        ('<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 100_000 + "</tool_call>", None, []),
        ('<tool_call>{"name": "f", "arguments": {"a": "</tool"}}</tool_call>', "", ["f"]),
        ('<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>', "", ["f"]),
        ('<tool_call>{"name": "f", "arguments": {"a": "<tool_call>"}}</tool_call>', "", ["f"]),
        ('a<tool_call>{"name": "f", "arguments": {"<tool_call></tool_call>": "</tool_call>"}}', "a", ["f"]),
        (f'a\n<tool_call>{{"broken</tool_call>\nb{CALL}', 'a\n<tool_call>{"broken</tool_call>\nb', ["clock"]),
        (f'<tool_call>{{"broken</tool_call>{CALL}', '<tool_call>{"broken</tool_call>', ["clock"]),
        ('<tool_call>{"broken</tool_call> on', None, []),
        ("<tool_call>" + "9" * 5000 + "</tool_call>", None, []),
        ("", "", []),
    ],
)
def test_calls_are_separated_from_text(text, said, calls):
    """The same, whole or in pieces of any size."""
    for size in (1, 2, 7, len(text) or 1) if len(text) < 1000 else (len(text),):
        writer, found, content = CallWriter(Reader(), "x"), [], ""
        for start in range(0, len(text), size):
            part = writer.push(text[start : start + size])
            content += part["content"]
            found += part.get("tool_calls", [])
        rest = writer.finish()
        content += rest["content"]
        found += rest.get("tool_calls", [])
        assert content == (text if said is None else said)
        assert [call["function"]["name"] for call in found] == calls
        assert [(call["index"], call["id"]) for call in found] == [(i, f"x{i}") for i in range(len(found))]
    assert [call.name for call in calls_in(CALLING.reader, text)] == calls


def test_a_call_too_deep_for_an_answer_is_text():
    """What JSON of this depth can just be read cannot be written with more around it."""

    def nested(levels):
        return "[" * levels + "]" * levels

    readable, too_deep = 1, 1 << 20
    while too_deep - readable > 1:
        middle = (readable + too_deep) // 2
        try:
            json.loads(nested(middle))
            readable = middle
        except RecursionError:
            too_deep = middle
    for levels, count in ((readable - 20, 0), (readable // 2, 1)):
        text = '<tool_call>\n{"name": "clock", "arguments": {"a": ' + nested(levels) + "}}\n</tool_call>"
        assert len(calls_in(CALLING.reader, text)) == count


def test_text_is_not_held_longer_than_needed():
    reader = Reader()
    assert reader.push("a\n") == ["a"]
    assert reader.push("b <too") == ["\nb "]
    assert reader.push("k") == ["<took"]
    assert reader.push(" <tool_call>") == [" "], "a call may follow"
    assert reader.push(" is a tag. ") == ["<tool_call> is a tag. "]
    assert reader.push(f" {CALL[:20]}") == [" "]
    assert reader.push(CALL[20:]) == [("clock", {})]
    wrong = '<tool_call>{"a</tool_call>'
    assert reader.push(wrong) == [], "the string may go on"
    assert reader.push(wrong) == [wrong], "it ended, and is tried no more"
    assert reader.finish() == [wrong]


# ------------------------------------------------------------------------------------------------ constrained answers
def test_a_demanded_call_matches_its_schema(model):
    names = set()
    for seed in range(12):
        answer = model.generate(
            ASKED, tools=qvl.Tools(TOOLS, "required"), temperature=2.0, seed=seed, max_new_tokens=400
        )
        for call in answer.tool_calls:
            check(call)
            names.add(call.name)
        assert answer.finish_reason == "length" or answer.tool_calls
        written = "\n".join(
            f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n</tool_call>'
            for name, arguments in answer.tool_calls
        )
        assert answer.text.startswith(written), "held calls look like those of the template"
        assert answer.text == written or answer.finish_reason == "length"
    assert names == {"weather", "clock"}


@pytest.mark.parametrize("speculate", [True, False])
def test_a_function_by_name_is_called_once(model, speculate):
    tools = qvl.Tools(TOOLS, "weather")
    answers = model.generate(ASKED, tools=tools, temperature=1.0, seed=3, n=3, max_new_tokens=100, speculate=speculate)
    for answer in answers:
        (call,) = answer.tool_calls
        check(call)
        assert call.name == "weather" and answer.finish_reason == "stop"


def test_single_calls(model):
    for seed in range(6):
        tools = qvl.Tools(TOOLS, "required", parallel=False)
        answer = model.generate(ASKED, tools=tools, temperature=2.0, seed=seed, max_new_tokens=100)
        assert len(answer.tool_calls) == 1 and answer.finish_reason == "stop"


def test_free_answers_are_those_of_the_prompt_with_tools(model):
    free = model.generate(ASKED, tools=TOOLS, max_new_tokens=8)
    template = CALLING.prompts(model.prompts, qvl.Tools(TOOLS))
    assert free.token_ids == model.generate(template.build(ASKED, None, LOCAL).ids, max_new_tokens=8).token_ids
    assert free.token_ids != model.generate(ASKED, max_new_tokens=8).token_ids
    strict = [{**CLOCK, "strict": True}]
    held = model.generate(ASKED, tools=strict, max_new_tokens=8)
    same = CALLING.prompts(model.prompts, qvl.Tools(strict)).build(ASKED, None, LOCAL)
    plain = model.generate(same.ids, max_new_tokens=8)
    # Free text has neither special tokens nor padding, which the golden model's answers have.
    kept = next(i for i, token in enumerate(plain.token_ids) if token >= model.tokenizer.special["<|endoftext|>"])
    assert kept > 3 and held.token_ids[:kept] == plain.token_ids[:kept], "text before a call is free"


def _follows(model, tools, constraint, text: str, *, typed: bool = False) -> list[bool]:
    """Whether each token of a text, and its end, is allowed; `typed`: its tags are plain text."""
    from qvl_runtime.engine.constraints import Answer

    answer = Answer(model.tokenizer, model.stop_ids, 1000, "", model.grounding.constraint)
    state = CALLING.form(tools, constraint).start(answer)
    allowed, encode = [], model.tokenizer.encode_ordinary if typed else model.tokenizer.encode
    for token in [*encode(text), model.tokenizer.im_end_id]:
        allowed.append(bool(state.allowed()[token]))
        if not allowed[-1]:
            return allowed
        state.advance(token)
    return allowed


def test_what_the_grammar_allows(model):
    strict = qvl.Tools([WEATHER, {**CLOCK, "strict": True}])
    schema = qvl.JsonSchema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    loose = OTHER.replace('"明天"', '"some day"')
    for tools, form, text, fits in [
        (strict, None, "Noon.\n\nOr <later>", True),
        (strict, None, CALL, True),
        (strict, None, f"Wait.\n{loose}\n{CALL}", True),
        (strict, None, CALL.replace("{}}", '{"a": 1}}'), False),
        (strict, None, CALL.replace("clock", "watch"), False),
        (qvl.Tools([WEATHER], parallel=False), None, f"{OTHER}\n{OTHER}", False),
        (qvl.Tools([WEATHER], parallel=False), None, loose, True),
        (qvl.Tools([WEATHER], "required"), None, loose, False),
        (qvl.Tools([WEATHER], "required"), None, f"{OTHER}\n{OTHER}", True),
        (qvl.Tools([WEATHER], "required"), None, f"Hm.{OTHER}", False),
        (qvl.Tools(TOOLS, "weather"), None, f"{OTHER}\n{OTHER}", False),
        (qvl.Tools(TOOLS, "weather"), None, CALL, False),
        (strict, schema, '{"a":5}', True),
        (strict, schema, '{"a": 5}', False),
        (strict, schema, f"{CALL}\n{CALL}", True),
        (strict, schema, "Noon.", False),
        (qvl.Tools(TOOLS), schema, "Noon.", False),
        (qvl.Tools(TOOLS), schema, loose, True),
    ]:
        assert all(_follows(model, tools, form, text)) == fits, (tools, text)


def test_strict_calls_cannot_be_typed_as_text(model):
    """A reader would take them for calls, whose arguments no grammar has held."""
    strict = qvl.Tools([{**CLOCK, "strict": True}])
    assert not all(_follows(model, strict, None, CALL.replace("{}}", '{"a": 1}}'), typed=True))
    assert all(_follows(model, strict, None, "a <tool_call or </tool_call>\n<tool_calls>", typed=True))


@pytest.mark.parametrize(
    ("given", "choice", "message"),
    [
        ([], "auto", "expected a list of functions"),
        ("clock", "auto", "expected a list of functions"),
        ([1], "auto", r"tools\[0\] is 1"),
        ([{"type": "web_search"}], "auto", r"tools\[0\] is"),
        ([{}], "auto", r"tools\[0\] has the name None"),
        ([{"name": 'a"b'}], "auto", "has the name"),
        ([{"name": "a\n"}], "auto", "has the name"),
        ([{"name": "x" * 129}], "auto", "has the name 'x+; use 1 to 128 letters"),
        ([{"name": "auto"}], "auto", r"tools\[0\] has the name 'auto', which is a choice"),
        ([CLOCK, {"name": "required"}], "required", r"tools\[1\] has the name 'required', which is a choice"),
        ([CLOCK, WEATHER, CLOCK], "auto", "two functions named 'clock'"),
        ([{"name": "f", "parameters": []}], "auto", "the parameters of the function 'f'"),
        ([{"name": "f", "parameters": {"type": "string"}}], "auto", "the parameters of the function 'f'"),
        ([{"name": "f", "strict": "yes"}], "auto", "strict of the function 'f'"),
        (TOOLS, "watch", "the choice of tools is 'watch'"),
        (TOOLS, None, "the choice of tools is None"),
    ],
)
def test_unusable_tools(given, choice, message):
    with pytest.raises(QvlError, match=message):
        qvl.Tools(given, choice)


def test_parallel_is_true_or_false():
    with pytest.raises(QvlError, match="parallel of the tools is 'no'; expected True or False"):
        qvl.Tools(TOOLS, parallel="no")


def test_what_excludes_tools(model, demo_model):
    mult = {"type": "object", "properties": {"n": {"type": "integer", "multipleOf": 9973}}}
    far = {"type": "object", "properties": {"n": {"type": "integer", "multipleOf": 9967}}}
    several = [{"name": "f", "parameters": mult}, {"name": "g", "parameters": far}]
    named = {"patternProperties": {f"^{i}{i}": {} for i in range(33)}}
    patterns = [{"name": "f", "parameters": named}, {"name": "g", "parameters": named}]
    for options, message in [
        ({"prompt": "raw text", "tools": TOOLS}, "tools need chat messages"),
        ({"prompt": [1, 2], "tools": TOOLS}, "tools need chat messages"),
        ({"tools": TOOLS, "constraint": qvl.Regex("a")}, "leave out the constraint"),
        ({"tools": qvl.Tools(TOOLS, "required"), "constraint": qvl.JsonSchema({})}, "leave out the constraint"),
        ({"tools": qvl.Tools(TOOLS, "required"), "min_new_tokens": 2}, "min_new_tokens"),
        ({"tools": qvl.Tools(TOOLS, parallel=False), "min_new_tokens": 2}, "min_new_tokens"),
        (
            {"tools": qvl.Tools([{"name": "f", "parameters": {"properties": {"a": {"type": "cow"}}}}], "f")},
            "the function 'f': the json_schema cannot be used",
        ),
        ({"tools": qvl.Tools(several, "required")}, "multipleOf"),
        ({"tools": qvl.Tools(patterns, "required")}, "more than 64 patternProperties"),
        ({"tools": [{"name": "f", "parameters": {"default": {1}}}]}, "no JSON"),
    ]:
        with pytest.raises(QvlError, match=message):
            model.generate(**{"prompt": ASKED, "max_new_tokens": 2, **options})
    assert model.generate(ASKED, tools=several, max_new_tokens=2).token_ids, "free calls need no grammar"
    assert len(model.generate(ASKED, tools=TOOLS, min_new_tokens=4, max_new_tokens=4).token_ids) == 4
    with pytest.raises(QvlError, match="has no tools; use Qwen3-VL"):
        demo_model.generate(ASKED, tools=TOOLS)


# ------------------------------------------------------------------------------------------------ over HTTP
def test_a_conversation_with_the_openai_client(served, model):
    client, tools = served.openai(), [WEATHER, {"type": "function", "function": CLOCK}]
    options = {"model": "demo", "tools": tools, "seed": 5, "temperature": 1.0, "max_tokens": 100}
    named = {"type": "function", "function": {"name": "weather"}}
    answer = client.chat.completions.create(messages=ASKED, tool_choice=named, **options)
    (choice,), message = answer.choices, answer.choices[0].message
    (call,) = message.tool_calls
    assert choice.finish_reason == "tool_calls" and message.content is None and call.type == "function"
    check((call.function.name, json.loads(call.function.arguments)))
    own = model.generate(ASKED, tools=qvl.Tools(tools, "weather"), seed=5, temperature=1.0, max_new_tokens=100)
    assert own.tool_calls == [(call.function.name, json.loads(call.function.arguments))]

    stream = client.chat.completions.create(messages=ASKED, tool_choice=named, stream=True, **options)
    choices = [chunk.choices[0] for chunk in stream]
    (streamed,) = [call for c in choices for call in c.delta.tool_calls or []]
    assert (streamed.index, streamed.function.name) == (0, "weather")
    assert streamed.function.arguments == call.function.arguments
    assert not any(c.delta.content for c in choices)
    assert [c.finish_reason for c in choices if c.finish_reason] == ["tool_calls"]

    told = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
    messages = [*ASKED, message.model_dump(exclude_none=True), told]
    ids = served.http.post("/v1/tokenize", json={"messages": messages, "tools": tools}).json()["tokens"]
    text = model.tokenizer.decode(ids)
    assert text.endswith(
        f"<|im_start|>assistant\n{own.text}<|im_end|>\n<|im_start|>user\n<tool_response>\nRain.\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in text
    last = client.chat.completions.create(messages=messages, **{**options, "temperature": 0})
    assert last.usage.prompt_tokens == len(ids)
    plain = model.generate(ids, max_new_tokens=100)
    assert last.choices[0].message.content == plain.text and not last.choices[0].message.tool_calls
    assert last.usage.prompt_tokens_details.cached_tokens > 0


def test_a_tool_returns_pictures(served, model):
    """As the published template has it: between the tags of the tool's response."""
    image, calls = png(picture(4, 64)), [{"function": {"name": "clock", "arguments": "{}"}}]
    parts = [{"type": "text", "text": "Crop:"}, image_part(image), {"type": "text", "text": "."}]
    messages = [*ASKED, {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": parts}]
    ids = served.http.post("/v1/tokenize", json={"messages": messages}).json()["tokens"]
    own = [*messages[:-1], {"role": "tool", "content": [{"text": "Crop:"}, {"image": image}, {"text": "."}]}]
    assert ids == model.prompts.build(own, None, LOCAL).ids
    text = model.tokenizer.decode(ids).replace("<|image_pad|>", "")
    assert text.endswith(
        "user\n<tool_response>\nCrop:<|vision_start|><|vision_end|>.\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    answer = served.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4, "temperature": 0})
    expected = model.generate(own, max_new_tokens=4)
    assert answer.json()["choices"][0]["message"]["content"] == expected.text


def test_tools_that_must_not_be_called(served):
    fields = {"tools": [WEATHER], "temperature": 0}
    without = served.chat(temperature=0).json()
    assert served.chat(temperature=0, tool_choice="auto").json()["choices"] == without["choices"]
    none = served.chat(tool_choice="none", **fields).json()
    assert none["choices"] == without["choices"]
    counts = [answer["usage"]["prompt_tokens"] for answer in (without, none, served.chat(**fields).json())]
    assert counts[0] == counts[1] < counts[2]


def test_a_demanded_call_comes_before_the_form_of_an_answer(served):
    fields = {"tools": [CLOCK], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 60}
    answers = [served.chat(**fields, **more).json() for more in ({}, {"response_format": {"type": "json_object"}})]
    assert [answer["choices"][0]["finish_reason"] for answer in answers] == ["tool_calls"] * 2


def test_several_answers_with_calls_and_logprobs(served):
    fields = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "n": 3, "seed": 1}
    fields |= {"max_tokens": 100, "temperature": 1.0, "logprobs": True}
    whole = served.chat(**fields).json()["choices"]
    chunks = [c for event in events(served.chat(stream=True, **fields)) for c in event["choices"]]
    ids = set()
    for choice in whole:
        (call,) = choice["message"]["tool_calls"]
        mine = [c for c in chunks if c["index"] == choice["index"]]
        (streamed,) = [call for c in mine for call in c["delta"].get("tool_calls", [])]
        assert streamed["function"] == call["function"] and "index" not in call
        logprobs = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]
        ids |= {call["id"], streamed["id"]}
    assert len(ids) == 6


def test_a_row_of_a_job(model, tmp_path):
    """Its ids are the same in every run."""
    body = {"messages": ASKED, "tools": TOOLS, "tool_choice": "required", "max_tokens": 100, "temperature": 1.0}
    row = Row(0, "r", url="/v1/chat/completions", body=body)
    chosen = Options(prompt=None, generate={}, seed=0, max_batch=2, allow_urls=False)
    records: list = []
    for _ in range(2):
        Answerer(model, tmp_path, chosen)([[row]], lambda number, found: records.extend(found))
    assert records[0] == records[1]
    choice = records[0]["response"]["body"]["choices"][0]
    ids = [call["id"] for call in choice["message"]["tool_calls"]]
    assert ids == [f"call_{records[0]['id']}_0_{i}" for i in range(len(ids))]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [CLOCK] * 2}, "tools"),
        ({"tools": [{"name": f"f{i}"} for i in range(129)]}, "tools"),
        ({"tools": [{"name": "f", "description": "x" * (1 << 20)}]}, "tools"),
        ({"tools": [{"name": "f", "parameters": {"const": "x" * 70_000}}], "tool_choice": "required"}, "tools"),
        ({"tools": [CLOCK], "tool_choice": "clock"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function"}}, "tool_choice.function.name"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [{"name": "none"}], "tool_choice": {"type": "function", "function": {"name": "none"}}}, "tools"),
        ({"tools": [CLOCK], "parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"tools": [CLOCK], "grounding": True}, "grounding"),
        ({"functions": [CLOCK]}, "functions"),
        ({"function_call": {"name": "clock"}}, "function_call"),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function.name"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"messages": [{"role": "user", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}]}, None),
        (
            {"messages": [{"role": "assistant", "content": "x", "reasoning_content": 1}]},
            "messages[0].reasoning_content",
        ),
        ({"messages": [{"role": "tool"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": [image_part(b"")]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "tool", "content": [{"type": "box", "pixels": [1] * 4}]}]}, "messages[0].content[0]"),
    ],
)
def test_wrong_requests(served, fields, param):
    response = served.http.post("/v1/chat/completions", json={"messages": ASKED, "max_tokens": 2, **fields})
    error = response.json()["error"]
    assert response.status_code == 400
    assert param is None or error["param"] == param, error
