"""Invalid requests: each gets status 400 in OpenAI's format, with the field's name."""

from __future__ import annotations

import sys

import pytest
from serving import events, image_part, picture, png, serving
from starlette.testclient import TestClient

from qvl_runtime.engine.generation import Logprob, Piece
from qvl_runtime.openai.answers import Part
from qvl_runtime.openai.formats import TextFormat
from qvl_runtime.server import create_app

USER = [{"role": "user", "content": "hi"}]
PNG = png(picture(side=56))


def says(content) -> list[dict]:
    return [{"role": "user", "content": content}]


def schema(value) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


def box(**fields) -> list[dict]:
    return says([image_part(PNG), {"type": "box", "image": 0, "pixels": [1, 1, 9, 9], **fields}])


def nested(depth: int) -> dict:
    value: dict = {"type": "string"}
    for _ in range(depth):
        value = {"type": "array", "items": value}
    return value


WRONG = {
    "no messages": ({"messages": None}, "messages"),
    "messages a string": ({"messages": "hi"}, "messages"),
    "messages an object": ({"messages": {}}, "messages"),
    "messages empty": ({"messages": []}, "messages"),
    "message a number": ({"messages": [123]}, "messages[0]"),
    "message empty": ({"messages": [{}]}, "messages[0].role"),
    "role a number": ({"messages": [{"role": 123, "content": "x"}]}, "messages[0].role"),
    "role unknown": ({"messages": [{"role": "root", "content": "x"}]}, "messages[0].role"),
    "content a number": ({"messages": says(1)}, "messages[0].content"),
    "content missing": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "content half a character": ({"messages": says("\ud800")}, "messages[0].content"),
    "part a number": ({"messages": says([1])}, "messages[0].content[0]"),
    "part empty": ({"messages": says([{}])}, "messages[0].content[0].type"),
    "part unknown": ({"messages": says([{"type": "sound"}])}, "messages[0].content[0].type"),
    "video of a model without": (
        {"messages": says([{**image_part(PNG), "type": "video", "video": []}])},
        None,
    ),
    "text a list": ({"messages": says([{"type": "text", "text": []}])}, "messages[0].content[0].text"),
    "image_url a string": (
        {"messages": says([{"type": "image_url", "image_url": "data:image/png;base64,AA=="}])},
        "messages[0].content[0].image_url",
    ),
    "url a number": (
        {"messages": says([{"type": "image_url", "image_url": {"url": 5}}])},
        "messages[0].content[0].image_url.url",
    ),
    "base64 broken": (
        {"messages": says([{"type": "image_url", "image_url": {"url": "data:image/png;base64,!!"}}])},
        "messages[0].content[0].image_url.url",
    ),
    "no picture": ({"messages": says([image_part(b"not a picture")])}, None),
    "picture cut off": ({"messages": says([image_part(PNG[: len(PNG) // 2])])}, None),
    "picture empty": ({"messages": says([image_part(b"")])}, None),
    "picture of the system": (
        {"messages": [{"role": "system", "content": [image_part(PNG)]}]},
        "messages[0].content[0]",
    ),
    "assistant last": ({"messages": [*USER, {"role": "assistant", "content": "x"}]}, None),
    "box without corners": ({"messages": box(pixels=None)}, "messages[0].content[1].pixels"),
    "box of three": ({"messages": box(pixels=[1, 2, 3])}, "messages[0].content[1].pixels"),
    "box of words": ({"messages": box(pixels=[1, 2, 3, "4"])}, "messages[0].content[1].pixels"),
    "box turned around": ({"messages": box(pixels=[9, 9, 1, 1])}, "messages[0].content[1]"),
    "box outside": ({"messages": box(pixels=[1, 1, 57, 9])}, "messages[0].content[1]"),
    "box far outside": ({"messages": box(pixels=[-(10**400), 0, 1, 1])}, "messages[0].content[1].pixels"),
    "box on no picture": ({"messages": box(image=1)}, "messages[0].content[1]"),
    "box on picture -1": ({"messages": box(image=-1)}, "messages[0].content[1].image"),
    "temperature a word": ({"temperature": "hot"}, "temperature"),
    "temperature a flag": ({"temperature": True}, "temperature"),
    "temperature below 0": ({"temperature": -1}, "temperature"),
    "temperature huge": ({"temperature": 10**400}, "temperature"),
    "top_p above 1": ({"top_p": 1.5}, "top_p"),
    "top_k a fraction": ({"top_k": 1.5}, "top_k"),
    "min_p a list": ({"min_p": [0.1]}, "min_p"),
    "repetition_penalty 0": ({"repetition_penalty": 0}, "repetition_penalty"),
    "presence_penalty 3": ({"presence_penalty": 3}, "presence_penalty"),
    "seed a word": ({"seed": "1"}, "seed"),
    "seed huge": ({"seed": 10**30}, "seed"),
    "n 0": ({"n": 0}, "n"),
    "n above its limit": ({"n": 9}, "n"),
    "n huge": ({"n": 10**9}, "n"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens"),
    "max_completion_tokens a word": ({"max_completion_tokens": "all"}, "max_completion_tokens"),
    "stop a number": ({"stop": 1}, "stop"),
    "stop a list of numbers": ({"stop": [1]}, "stop"),
    "stop too many": ({"stop": ["x"] * 17}, "stop"),
    "stop too long": ({"stop": "x" * 257}, "stop"),
    "stream a word": ({"stream": "yes"}, "stream"),
    "stream_options a flag": ({"stream_options": True}, "stream_options"),
    "include_usage a number": ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    "logprobs a number": ({"logprobs": 2}, "logprobs"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs"),
    "top_logprobs 21": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "logit_bias": ({"logit_bias": {"1": 100}}, "logit_bias"),
    "another server's constraint": ({"guided_choice": ["yes", "no"]}, "guided_choice"),
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "a tool required": ({"tool_choice": "required"}, "tool_choice"),
    "a tool by name": ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    "a tool with the name of a choice": ({"tool_choice": {"type": "function", "function": {"name": "auto"}}}, "tools"),
    "parallel_tool_calls a word": ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
    "tools of a model without": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, None),
    "calls of a model without": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, *USER]},
        "messages",
    ),
    "result of a model without": ({"messages": [*USER, {"role": "tool", "content": "x"}]}, "messages"),
    "best_of": ({"best_of": 2}, "best_of"),
    **{
        name: ({name: value}, name)
        for name, value in {
            "echo": True,
            "suffix": "x",
            "min_tokens": 1,
            "ignore_eos": True,
            "stop_token_ids": [5],
            "allowed_token_ids": [5],
            "bad_words": ["x"],
            "use_beam_search": True,
            "mm_processor_kwargs": {"max_pixels": 9},
            "continue_final_message": True,
        }.items()
    },
    "response_format a word": ({"response_format": "json"}, "response_format"),
    "response_format without a type": ({"response_format": {"json_schema": {}}}, "response_format.type"),
    "response_format unknown": ({"response_format": {"type": "xml"}}, "response_format.type"),
    "schema missing": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    "schema a number": ({"response_format": schema(123)}, "response_format.json_schema.schema"),
    "schema unknown type": ({"response_format": schema({"type": "elephant"})}, None),
    "schema of json_object a number": (
        {"response_format": {"type": "json_object", "schema": 123}},
        "response_format.schema",
    ),
    "schema too large": ({"response_format": schema({"enum": ["x" * 70_000]})}, "response_format.json_schema.schema"),
    "schema deep": ({"response_format": schema(nested(400))}, None),
    "schema of itself": ({"response_format": schema({"$ref": "#"})}, None),
    "schema elsewhere": ({"response_format": schema({"$ref": "file:///etc/passwd"})}, None),
    "grounding a word": ({"grounding": "yes"}, "grounding"),
    "schema false": ({"response_format": schema(False)}, None),
    "grounding too short": ({"grounding": True, "max_tokens": 2}, "max_tokens"),
    "grounding and a schema": ({"grounding": True, "response_format": {"type": "json_object"}}, "grounding"),
    "model a number": ({"model": 7}, "model"),
    "text too long": ({"messages": says("x" * ((1 << 20) + 1))}, "messages[0].content"),
    "prompt longer than the window": ({"messages": says("星形。" * 9000)}, None),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_refused(served, case):
    fields, param = WRONG[case]
    body = {"messages": USER, "max_tokens": 2, **fields}
    # half a character can be written as JSON, but not as UTF-8
    response = served.http.post(
        "/v1/chat/completions",
        json=body if case != "content half a character" else None,
        content=None if case != "content half a character" else b'{"messages":[{"role":"user","content":"\\ud800"}]}',
    )
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) <= 500
    assert served.service.model.blob.path.name not in error["message"], "a path of the server's machine"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "object"),
        (b"123", "object"),
        (b"\xff", "UTF-8"),
        (b'{"temperature":NaN}', "NaN"),
        (b'{"model":"demo","model":"demo"}', "a key twice"),
        (b'{"messages":[{"role":"user","role":"user"}]}', "a key twice"),
        (b'{"temperature":1' + b"0" * 5000 + b"}", "the body holds a number of too many digits"),
        # Python 3.14 reads this deep, and finds that it does not end.
        (b"[" * 50_000, "nested" if sys.version_info < (3, 14) else "not JSON"),
        (b'{"x":[' + b"[]," * 200_000 + b"1]}", "values"),
        (b"a=1&b=2", "not JSON"),
    ],
)
@pytest.mark.parametrize("route", ["chat/completions", "completions", "tokenize"])
def test_a_body_that_is_no_request_is_refused(served, route, body, says):
    response = served.http.post(f"/v1/{route}", content=body)
    assert response.status_code == 400 and says in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": [2**31 - 1]}, None),
        ({"prompt": ""}, None),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_a_wrong_completion_is_refused(served, fields, param):
    response = served.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, **fields})
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_unknown_fields_and_nulls_are_ignored(served):
    plain = served.chat("How are you?").json()["choices"]
    more = served.chat(
        "How are you?", user="me", store=True, metadata={"a": 1}, seed=None, stop=None, top_p=None,
        logprobs=None, response_format=None, stream=None, tools=[], logit_bias={}, n=None, unheard_of=[{}],
        echo=False, suffix="", best_of=1, min_tokens=0, ignore_eos=False, stop_token_ids=[], allowed_token_ids=None,
        bad_words=[], use_beam_search=False, continue_final_message=False, tool_choice="auto",
        functions=[], function_call="none",
    )  # fmt: skip
    assert more.status_code == 200 and more.json()["choices"] == plain


def test_another_model_is_not_found(served):
    response = served.chat(model="gpt-4")
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"
    assert "'demo'" in response.json()["error"]["message"]
    assert served.chat(model="demo").status_code == 200


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/v1/chat/completions", 405), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405),
    ("GET", "/v1/responses/resp_1", 404), ("GET", "/slots", 404), ("GET", "/v1/streams", 404),
    ("GET", "/page/app.js", 404),
    ("GET", "/../../etc/passwd", 404), ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404), ("POST", "/health", 405),
])  # fmt: skip
def test_there_are_no_other_routes(served, method, path, status):
    response = served.http.request(method, path)
    said = response.json()["error"]["message"]
    assert response.status_code == status and ("use POST" if "completions" in path else "") in said


@pytest.mark.parametrize(("route", "body", "says"), [
    ("chat/completions", {"prompt": "x"}, "messages is missing"),
    ("completions", {"messages": USER}, "prompt is missing"),
    ("chat/completions", {"messages": USER, "max_tokens": 0}, "max_tokens must be from 1 to 2147483648"),
])  # fmt: skip
def test_errors_say_what_to_give(served, route, body, says):
    assert says in served.http.post(f"/v1/{route}", json=body).json()["error"]["message"]


def test_stop_strings_and_lengths_end_an_answer(served):
    whole = served.chat("Describe yourself", max_tokens=6, temperature=0)
    text, usage = whole.json()["choices"][0]["message"]["content"], whole.json()["usage"]
    assert usage["completion_tokens"] <= 6
    stopped = served.chat("Describe yourself", max_tokens=6, temperature=0, stop=[text[1:3], ""])
    choice = stopped.json()["choices"][0]
    assert choice["message"]["content"] == text[:1] and choice["finish_reason"] == "stop"


def test_log_probabilities_spell_the_answer(served, demo_model):
    options = {"logprobs": True, "top_logprobs": 3, "max_tokens": 6}
    content = served.chat("描述这张图", **options).json()["choices"][0]
    entries = content["logprobs"]["content"]
    assert (
        b"".join(bytes(entry["bytes"]) for entry in entries).decode("utf-8", "replace") == content["message"]["content"]
    )
    result = demo_model.generate([{"role": "user", "content": "描述这张图"}], logprobs=3, max_new_tokens=6)
    assert [entry["logprob"] for entry in entries] == [entry.logprob for entry in result.logprobs]
    assert all(len(entry["top_logprobs"]) == 3 for entry in entries)
    streamed = [
        entry
        for chunk in events(served.chat("描述这张图", stream=True, **options))
        for entry in (chunk["choices"][0].get("logprobs") or {}).get("content", [])
    ]
    assert streamed == entries


def test_a_completion_is_of_the_raw_text(served, demo_model):
    expected = demo_model.generate("one two", max_new_tokens=6, top_p=0.3, logprobs=2)
    body = {"prompt": "one two", "max_tokens": 6, "logprobs": 2}
    choice = served.http.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["text"] == expected.text
    assert choice["logprobs"]["token_logprobs"] == [entry.logprob for entry in expected.logprobs]
    assert "".join(choice["logprobs"]["tokens"]) == expected.text
    chunks = events(served.http.post("/v1/completions", json={**body, "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.text
    assert chunks[-1]["choices"][0]["finish_reason"] == expected.finish_reason
    ids = demo_model.tokenizer.encode("one two")
    by_ids = served.http.post("/v1/completions", json={**body, "prompt": ids}).json()["choices"][0]
    assert by_ids["text"] == expected.text
    newer = {"prompt": "x", "max_completion_tokens": 5, "response_format": schema({"enum": [[1, 2, 3, 4, 5, 6, 7]]})}
    assert served.http.post("/v1/completions", json=newer).json()["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("parts", [1, 99])
def test_offsets_of_tokens_count_characters_of_the_text(demo_model, parts):
    """Also after a character of several tokens."""
    text = "ab𠜎é𠜎 cd"
    ids = demo_model.tokenizer.encode(text)
    assert len(ids) > len(text), "no character takes several tokens"
    form, entries = TextFormat(demo_model.tokenizer, True), [Logprob(token, -1.0, ()) for token in ids]
    pieces = [Piece("x", logprobs=tuple(entries[i : i + parts])) for i in range(0, len(ids), parts)]
    offsets = [offset for piece in pieces for offset in form.part(Part(0, piece))["logprobs"]["text_offset"]]
    assert offsets == [len(demo_model.tokenizer.decode(ids[:i]).rstrip("\ufffd")) for i in range(len(ids))]


def test_a_prompt_longer_than_the_window_has_openais_code(served, demo_model):
    error = served.chat("word " * demo_model.window)
    assert error.status_code == 400 and error.json()["error"]["code"] == "context_length_exceeded"
    message = error.json()["error"]["message"]
    assert message.startswith("this model's maximum context length is exceeded: ")
    assert f"the window is {demo_model.window}" in message


def test_forms_hold_the_answer(served):
    one = schema(
        {"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"], "additionalProperties": False}
    )
    for form in (one, {"type": "json_object", "schema": one["json_schema"]["schema"]}):
        answer = served.chat("hi", response_format=form, max_tokens=40).json()["choices"][0]["message"]["content"]
        assert answer == '{"a":7}'
    assert served.chat("hi", response_format={"type": "json_object", "schema": None}, max_tokens=2).status_code == 200
    assert served.chat("hi", response_format=schema(True), max_tokens=2).status_code == 200
    answer = served.chat("hi", response_format={"type": "json_object"}, max_tokens=2).json()["choices"][0]
    assert answer["message"]["content"].startswith("{")
    found = served.chat([image_part(PNG), {"type": "text", "text": "2+2?"}], grounding=True, max_tokens=60).json()
    message = found["choices"][0]["message"]
    assert message["content"].startswith("<ref>") and len(message["boxes"]) >= 1


def test_tokenize_counts_what_a_prompt_takes(served, demo_model):
    messages = says([image_part(PNG), {"type": "text", "text": "What is this?"}])
    counted = served.http.post("/v1/tokenize", json={"messages": messages}).json()
    answered = served.chat(messages[0]["content"], max_tokens=1).json()["usage"]
    assert counted["count"] == len(counted["tokens"]) == answered["prompt_tokens"]
    assert counted["max_model_len"] == demo_model.window
    text = served.http.post("/v1/tokenize", json={"prompt": "one two"}).json()
    assert text["tokens"] == demo_model.tokenizer.encode("one two")
    for wrong in ({}, {"prompt": "x", "messages": messages}, {"prompt": 1}, {"messages": 1}):
        assert served.http.post("/v1/tokenize", json=wrong).status_code == 400


def test_a_box_is_written_in_the_models_notation(served):
    content = [image_part(PNG), {"type": "text", "text": "What is in "}]
    asked = [*content, {"type": "box", "image": 0, "pixels": [0, 14, 28, 55.9]}, {"type": "text", "text": "?"}]
    written = [*content, {"type": "text", "text": "<box>(0,250),(500,998)</box>?"}]
    ids = [served.http.post("/v1/tokenize", json={"messages": says(c)}).json()["tokens"] for c in (asked, written)]
    assert ids[0] == ids[1]


def test_models_tells_what_the_page_needs(served, demo_model):
    models = served.openai().models.list().data
    assert [model.id for model in models] == ["demo"]
    assert models[0].qvl == {
        "title": "Demo model", "chat": True, "pictures": True, "window": demo_model.window, "device": "cpu"
    }  # fmt: skip
    assert served.openai().models.retrieve("demo").id == "demo"
    assert served.http.get("/v1/models/").json()["data"][0]["id"] == "demo"


@pytest.mark.parametrize("path", ["other", "org/other", "org%2Fother", "demo/"])
def test_a_model_of_another_name_is_not_found(served, path):
    response = served.http.get(f"/v1/models/{path}")
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


def test_the_name_of_a_model_may_have_slashes(demo_model):
    client = TestClient(create_app(demo_model, "org/demo"), base_url="http://localhost")
    for path in ("org/demo", "org%2Fdemo"):
        assert client.get(f"/v1/models/{path}").json()["id"] == "org/demo"


@pytest.mark.parametrize("content", [box()[0]["content"], [image_part(PNG)]])
def test_a_model_without_a_vision_part_takes_no_pictures(model, content):
    with serving(model("tiny-q7-gptq-asym", device="cpu")) as server:
        response = server.chat(content)
    assert response.status_code == 400 and "takes no pictures" in response.json()["error"]["message"]
