"""The responses API: items as messages, OpenAI's client, and what chat completions give to the same request."""

from __future__ import annotations

import json

import pytest
from families import GOLDEN
from serving import QUESTION, data_uri, picture, png, serving

import qvl_runtime as qvl
from qvl_convert.convert import convert
from qvl_runtime.batch.answers import Answerer
from qvl_runtime.batch.jsonl import JsonLines
from qvl_runtime.batch.options import Options
from qvl_runtime.engine.generation import Piece, Timings
from qvl_runtime.families.qwen3_vl.calling import CALLING
from qvl_runtime.openai.answers import Part, Whole
from qvl_runtime.openai.errors import ApiError, refused
from qvl_runtime.openai.items import read_items
from qvl_runtime.openai.limits import Limits
from qvl_runtime.openai.messages import PicturePart
from qvl_runtime.openai.response_reply import ResponseReply
from qvl_runtime.openai.response_requests import ResponseAsked
from qvl_runtime.results import Result

HOUR = {"type": "object", "properties": {"h": {"type": "integer", "maximum": 23}}, "additionalProperties": False}
CLOCK = {"type": "function", "name": "clock", "parameters": HOUR}
CALL = '<tool_call>\n{"name": "clock", "arguments": {"h": 7}}\n</tool_call>'


def turns(items, instructions=None):
    """The messages of items as (role, parts, calls, reasoning)."""
    return [tuple(turn) for turn in read_items(items, instructions, Limits(), allow_urls=False).turns]


# ------------------------------------------------------------------------------------------------------- items
def test_a_text_is_a_users_message():
    assert turns("hello") == [("user", ["hello"], [], None)]
    assert turns("hello", "Be brief.") == [("system", ["Be brief."], [], None), ("user", ["hello"], [], None)]


def test_messages_of_all_roles():
    said = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "b", "annotations": []}, {"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": "c"},
    ]  # fmt: skip
    rest = [("user", ["a"], [], None), ("assistant", ["b", "no"], [], None), ("user", ["c"], [], None)]
    assert turns(said) == [("system", ["Be brief."], [], None), *rest]
    assert turns(said, "You are X.") == [("system", ["You are X.", "\n\n", "Be brief."], [], None), *rest]


def test_the_items_of_a_turn_are_one_message():
    first = {"name": "clock", "arguments": "{}"}
    items = [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "1", **first},
        {"type": "function_call", "call_id": "2", "name": "weather", "arguments": '{"d": 1}'},
        {"type": "function_call_output", "call_id": "1", "output": "12:00"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "Rain."}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Now"}, {"text": "I know."}]},
        {"role": "assistant", "content": "Noon."},
        {"role": "assistant", "content": "And wet."},
        {"type": "reasoning", "summary": [], "encrypted_content": "xx"},
    ]
    assert turns(items) == [
        ("user", ["a"], [], None),
        ("assistant", ["I look."], [first, {"name": "weather", "arguments": '{"d": 1}'}], "Hm."),
        ("tool", ["12:00"], [], None),
        ("tool", ["Rain."], [], None),
        ("assistant", ["Noon."], [], "Now\nI know."),
        ("assistant", ["And wet."], [], None),
    ]


def test_pictures_boxes_and_videos_are_parts():
    uri = data_uri(b"x")
    content = [
        {"type": "input_image", "image_url": uri, "detail": "auto"},
        {"type": "box", "pixels": [1, 2, 3, 4]},
        {"type": "video", "video": [uri, uri], "fps": 2},
        {"type": "input_image", "image_url": uri},
    ]
    read = read_items([{"role": "user", "content": content}], None, Limits(), allow_urls=False)
    first, box, video, last = read.turns[0].parts
    assert (first, box.corners, video.numbers, last) == (PicturePart(0), (1, 2, 3, 4), range(1, 3), PicturePart(3))
    assert len(read.sources) == 4


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,eA=="}


@pytest.mark.parametrize(("items", "param", "message"), [
    (None, "input", "missing"),
    (3, "input", "a string or an array"),
    ([], "input", "empty"),
    (["x"], "input[0]", "an object"),
    ([{"type": "item_reference", "id": "msg_1"}], "input[0].type", "'item_reference'"),
    ([{"type": 1}], "input[0].type", "a string"),
    ([{"role": "tool", "content": "x"}], "input[0].role", "'tool'"),
    ([{"content": "x"}], "input[0].role", "missing"),
    ([{"role": "user"}], "input[0].content", "missing"),
    ([{"role": "user", "content": [{"type": "input_file"}]}], "input[0].content[0].type", "'input_file'"),
    ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0].content[0].text", "missing"),
    ([{"role": "user", "content": [{"type": "input_image"}]}], "input[0].content[0].image_url", "missing"),
    ([{"role": "user", "content": [{"type": "input_image", "image_url": {"url": "x"}}]}],
     "input[0].content[0].image_url", "a string"),
    ([{"role": "user", "content": [{"type": "input_image", "image_url": "/etc/passwd"}]}],
     "input[0].content[0].image_url", "data:"),
    ([{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}], "input[0].content[0].file_id", "files"),
    ([{"role": "user", "content": [IMAGE] * 65}], "input[0].content[64]", "more than 64 pictures"),
    ([{"role": "assistant", "content": [IMAGE]}], "input[0].content[0]", "only messages of a user or tool"),
    ([{"type": "function_call_output", "output": [{"type": "box", "pixels": [1, 2, 3, 4]}]}], "input[0].output[0]",
     "only a user's"),
    ([{"type": "function_call_output"}], "input[0].output", "missing"),
    ([{"type": "function_call", "name": "f"}], "input[0].arguments", "missing"),
    ([{"type": "reasoning", "content": [{}]}], "input[0].content[0].text", "missing"),
    ([{"type": "reasoning", "content": "x"}], "input[0].content", "an array"),
    (["x" * (1 << 20), "x"], "input[1].content", "characters"),
    ([{"role": "user", "content": "\ud800"}], "input[0].content", "surrogate"),
])  # fmt: skip
def test_wrong_items(items, param, message):
    if param == "input[1].content":
        items = [{"role": "user", "content": text} for text in items]
    with pytest.raises(ApiError) as caught:
        read_items(items, None, Limits(), allow_urls=False)
    assert caught.value.status == 400 and caught.value.param == param and message in caught.value.message


# ------------------------------------------------------------------------------------------------------ replies
def reply(demo_model, *, tools=False, logprobs=None):
    asked = ResponseAsked("", {}, None, 1, True, False, logprobs, {"instructions": "Be brief."})
    return ResponseReply(asked, demo_model.tokenizer, "m", CALLING.reader if tools else None, "n", 5)


def result(text, finish="stop", **more):
    return Result(text, [1, 2, 3], finish, [], 9, Timings(prompt_tokens=9, new_tokens=3, cached_tokens=4), **more)


def streamed(made, pieces, whole):
    """All events of a stream."""
    told = made.begin()
    for text, reasoning in pieces:
        told += made.part(Part(0, Piece(text, (1,), reasoning=reasoning)))
    return [*told, *made.complete(whole), *made.end([whole])]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(("text", "expected"), [
    ("Noon.", [("message", "Noon.")]),
    ("", [("message", "")]),
    ("\n\n", [("message", "\n\n")]),
    (f"I look.\n{CALL}", [("message", "I look."), ("function_call", "clock")]),
    (f"\n{CALL}\n{CALL}\n", [("function_call", "clock"), ("function_call", "clock")]),
    (f"{CALL}\nDone. {CALL}", [("function_call", "clock"), ("message", "\nDone. "), ("function_call", "clock")]),
])  # fmt: skip
def test_a_stream_ends_with_the_response_that_is_given_whole(demo_model, text, expected, size):
    whole = Whole(0, result(text, reasoning="Hm.", reasoning_tokens=1), [{"ref": "x"}])
    pieces = [("Hm.", True), *((text[i : i + size], False) for i in range(0, len(text), size))]
    told = streamed(reply(demo_model, tools=True), pieces, whole)
    last = told[-1]["response"]
    assert last == reply(demo_model, tools=True).body([whole])
    kinds = [(item["type"], item["name"] if "name" in item else item["content"][0]["text"]) for item in last["output"]]
    assert kinds == [("reasoning", "Hm."), *expected]
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    # A client that follows the events has the items of the end.
    texts: dict = {}
    for event in told:
        if event["type"].endswith((".delta",)):
            texts[event["item_id"]] = texts.get(event["item_id"], "") + event["delta"]
        if event["type"] == "response.output_item.done":
            item = event["item"]
            assert last["output"][event["output_index"]] == item
            assert texts.get(item["id"], "") == (item.get("arguments") or item["content"][0]["text"])
    opened = [event["item"]["id"] for event in told if event["type"] == "response.output_item.added"]
    assert opened == [item["id"] for item in last["output"]] and len(set(opened)) == len(opened)
    if last["output"][-1]["type"] == "message":
        assert last["output"][-1]["content"][0]["boxes"] == [{"ref": "x"}]


def test_the_status_of_an_answer_that_was_cut(demo_model):
    body = reply(demo_model).body([Whole(0, result("one two", "length"), [])])
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"
    thinking = Whole(0, result("", "length", reasoning="Hm.", reasoning_tokens=3), [])
    (item,) = reply(demo_model).body([thinking])["output"]
    assert (item["type"], item["status"]) == ("reasoning", "incomplete")
    assert body["usage"] == {
        "input_tokens": 9, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 12,
    }  # fmt: skip


def test_a_stream_that_fails(demo_model):
    made = reply(demo_model)
    made.begin()
    made.part(Part(0, Piece("one")))
    *_, item, event = made.failed(refused("no memory"))
    assert event["response"]["output"] == [item["item"]] and item["item"]["status"] == "incomplete"
    assert item["item"]["content"][0]["text"] == "one"
    assert event["type"] == "response.failed" and event["response"]["status"] == "failed"
    assert event["response"]["error"] == {"code": "invalid_request_error", "message": "no memory"}


# ---------------------------------------------------------------------------------------------------- over HTTP
def test_openais_client_sees_what_a_chat_completion_says(served):
    client, image = served.openai(), data_uri(png(picture()))
    chat = client.chat.completions.create(
        model="demo",
        max_tokens=200,
        messages=[{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": QUESTION}
        ]}],
    )  # fmt: skip
    content = [{"type": "input_image", "image_url": image}, {"type": "input_text", "text": QUESTION}]
    options = {"model": "demo", "input": [{"role": "user", "content": content}], "max_output_tokens": 200}
    made = client.responses.create(**options, metadata={"a": "b"})
    said = chat.choices[0].message
    assert made.output_text == said.content and made.status == "completed" and made.error is None
    assert made.output[0].content[0].boxes == said.boxes and len(said.boxes) == 3
    assert made.usage.input_tokens == chat.usage.prompt_tokens
    assert made.usage.output_tokens == chat.usage.completion_tokens
    assert made.metadata == {"a": "b"} and made.store is False and made.id.startswith("resp_")

    with client.responses.stream(**options) as stream:
        told = list(stream)
        assert stream.get_final_response().output_text == said.content
    assert "".join(event.delta for event in told if event.type == "response.output_text.delta") == said.content
    assert told[-1].response.output[0].content[0].boxes == said.boxes
    other = client.responses.create(
        **options, temperature=1, extra_body={"seed": 3}, include=["message.output_text.logprobs"]
    )
    listed = other.output[0].content[0].logprobs
    assert "".join(entry.token for entry in listed) == other.output_text != said.content
    assert len(listed) == other.usage.output_tokens


def test_events_have_names(served):
    content = [{"type": "input_image", "image_url": data_uri(png(picture()))}, {"type": "input_text", "text": QUESTION}]
    body = {"input": [{"role": "user", "content": content}], "max_output_tokens": 3, "stream": True}
    response = served.http.post("/v1/responses", json=body)
    blocks = response.text.strip().split("\n\n")
    named = [block.split("\n") for block in blocks]
    assert all(name == f"event: {json.loads(data[6:])['type']}" for name, data in named)
    assert [name for name, _ in named[:2]] == ["event: response.created", "event: response.in_progress"]
    assert named[-1][0] == "event: response.incomplete"


def test_a_form_of_the_answer(served):
    schema = {"type": "object", "properties": {"n": {"enum": [5]}}, "required": ["n"], "additionalProperties": False}
    text = {"format": {"type": "json_schema", "name": "x", "strict": True, "schema": schema}, "verbosity": "low"}
    answer = served.openai().responses.create(model="demo", input="a number", text=text, max_output_tokens=40)
    assert json.loads(answer.output_text) == {"n": 5}
    answer = served.http.post("/v1/responses", json={"input": "x", "text": {"format": {"type": "text"}}}).json()
    assert answer["text"] == {"format": {"type": "text"}}


@pytest.mark.parametrize(("fields", "param"), [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "x"}}, "prompt"),
    ({"background": True}, "background"),
    ({"n": 2}, "n"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"grounding": True, "max_output_tokens": 5}, "max_output_tokens"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input"),
    ({"temperature": "hot"}, "temperature"),
    ({"instructions": 3}, "instructions"),
    ({"include": "x"}, "include"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ({"text": "x"}, "text"),
    ({"grounding": True, "text": {"format": {"type": "json_object"}}}, "grounding"),
    ({"guided_regex": "x"}, "guided_regex"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"name": "f"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": [CLOCK], "tool_choice": {"type": "function"}}, "tool_choice.name"),
    ({"tools": [CLOCK], "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
    ({"tools": [CLOCK], "tool_choice": {"type": "allowed_tools", "tools": [1]}}, "tool_choice.tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"model": "other"}, "model"),
])  # fmt: skip
def test_wrong_requests(served, fields, param):
    response = served.http.post("/v1/responses", json={"input": "x", "max_output_tokens": 2, **fields})
    assert response.status_code == (404 if param == "model" else 400)
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize("field", [
    '"metadata": %s', '"text": {"x": %s}',
    '"tools": [{"type": "function", "name": "f", "x": %s}], "tool_choice": "none"',
    '"tool_choice": {"type": "allowed_tools", "tools": [], "x": %s}',
])  # fmt: skip
def test_what_a_response_repeats_can_be_written(served, field, stream):
    statuses = set()
    nested = ['{"a":' * depth + "1" + "}" * depth for depth in (5, 700, 900, 950, 970, 980, 990)]
    for value in [*nested, '{"a": 1e400}']:
        body = f'{{"input": "hi", "max_output_tokens": 1, "stream": {stream}, {field % value}}}'
        response = served.http.post("/v1/responses", content=body)
        statuses.add(response.status_code)
        assert "failed" not in response.text
    assert statuses == {200, 400}


@pytest.mark.parametrize("fields", [
    {"metadata": {"a": "%s"}}, {"user": "%s"}, {"text": {"x": "%s"}},
    {"tool_choice": {"type": "allowed_tools", "tools": [], "x": "%s"}},
    {"tools": [{"type": "function", "name": "f", "x": "%s"}], "tool_choice": "none"},
])  # fmt: skip
def test_what_a_response_repeats_is_bounded(served, fields):
    """A stream writes it three times, and whoever else is answered waited for seconds."""
    body = json.dumps({"input": "hi", "max_output_tokens": 1, "instructions": "Be brief.", **fields})
    few, many = (served.http.post("/v1/responses", content=body.replace("%s", "x" * n)) for n in (1000, 1 << 20))
    assert few.status_code == 200 and many.status_code == 400
    assert "have more than 1048576 characters together" in many.json()["error"]["message"]


def test_a_response_of_a_job_is_the_same_each_time(demo_model, tmp_path):
    line = {"method": "POST", "url": "/v1/responses"}
    bad = {**line, "custom_id": "r", "body": {"input": [{"role": "user", "content": [IMAGE]}]}}
    short = {**line, "custom_id": "t", "body": {"input": "hello", "grounding": True, "max_output_tokens": 5}}
    good = {**line, "custom_id": "s", "body": {"input": "hello", "max_output_tokens": 3}}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(bad)}\n{json.dumps(good)}\n{json.dumps(short)}\n")
    source = JsonLines(tmp_path / "rows.jsonl", tmp_path)
    rows = list(source.rows(0, 3))
    assert [row.picture_count for row in rows] == [1, 0, 0]
    records: list = []
    for _ in range(2):
        answerer = Answerer(demo_model, tmp_path, Options(None, {}, 0, 2, allow_urls=False))
        answerer([rows], lambda number, found: records.append(found))
    assert records[0] == records[1]
    failed, answered, cut = (record["response"] for record in records[0])
    assert failed["status_code"] == 400 and answered["status_code"] == 200
    assert cut["body"]["error"]["param"] == "max_output_tokens"
    alone = demo_model.generate([{"role": "user", "content": "hello"}], max_new_tokens=3)
    assert answered["body"]["output"][0]["content"][0]["text"] == alone.text


# ------------------------------------------------------------------------------------------------------- calls
@pytest.fixture(scope="module")
def calling(tmp_path_factory):
    path = tmp_path_factory.mktemp("responses") / "q3.qvl"
    convert(GOLDEN / "ckpt/q3-tied", path, group_size=32)
    with serving(qvl.load(path, device="cpu")) as server:
        yield server


def test_a_conversation_with_tools(calling):
    client, asked = calling.openai(), [{"role": "user", "content": "What time is it?"}]
    options = {"model": "demo", "tools": [CLOCK], "max_output_tokens": 100, "parallel_tool_calls": False}
    options |= {"temperature": 1.0, "extra_body": {"seed": 5}}
    named = {"type": "function", "name": "clock"}
    made = client.responses.create(input=asked, tool_choice=named, **options)
    (call,) = made.output
    assert (call.type, call.name, made.status) == ("function_call", "clock", "completed")
    assert set(json.loads(call.arguments)) <= {"h"} and call.call_id.startswith("call_")
    chat = calling.chat(
        "What time is it?", max_tokens=100, temperature=1.0, seed=5, parallel_tool_calls=False, tool_choice="required",
        tools=[{"type": "function", "function": {key: CLOCK[key] for key in ("name", "parameters")}}],
    ).json()  # fmt: skip
    assert chat["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == call.arguments
    assert chat["usage"]["prompt_tokens"] == made.usage.input_tokens

    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}
    more = [*options["tools"], {**CLOCK, "name": "other"}]
    events = client.responses.create(input=asked, tool_choice=allowed, stream=True, **{**options, "tools": more})
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [(event.name, event.arguments) for event in done] == [("clock", call.arguments)]

    told = {"type": "function_call_output", "call_id": call.call_id, "output": "Noon."}
    last = client.responses.create(input=[*asked, call.model_dump(), told], **{**options, "temperature": 0})
    seen = {**told, "output": [{"type": "input_image", "image_url": data_uri(png(picture()))}]}
    shown = client.responses.create(input=[*asked, call.model_dump(), seen], **{**options, "temperature": 0})
    assert shown.usage.input_tokens > last.usage.input_tokens
    function = {key: CLOCK[key] for key in ("name", "parameters")}
    messages = [*asked, chat["choices"][0]["message"], {"role": "tool", "tool_call_id": "x", "content": "Noon."}]
    body = {"messages": messages, "tools": [{"type": "function", "function": function}]}
    assert last.usage.input_tokens == calling.http.post("/v1/tokenize", json=body).json()["count"]
