"""``/openapi.json``: the OpenAPI 3.1 description of the routes."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from qvl_runtime.anthropic.messages import ROLES as ANTHROPIC_ROLES
from qvl_runtime.anthropic.requests import CHOICES as ANTHROPIC_CHOICES
from qvl_runtime.inputs.resolution import KEYS
from qvl_runtime.inputs.tools import CHOICES, NAME
from qvl_runtime.openai.limits import Limits
from qvl_runtime.openai.messages import ROLES
from qvl_runtime.server.responses import MESSAGES, json_response
from qvl_runtime.server.security import KEY_HEADER

Schema = dict[str, Any]


def openapi_route(limits: Limits) -> Route:
    """Return the route of the description, which is created once."""
    described = description(limits)

    async def show(request: Request) -> Response:
        return json_response(described)

    return Route("/openapi.json", show, methods=["GET"])


def description(limits: Limits) -> Schema:
    """Return the OpenAPI document of a server with these limits."""
    chat = _body(
        {**_options(limits), **_messages(limits), **_number("top_logprobs", 0, limits.top_logprobs, "integer")}
        | {"logprobs": _or_null({"type": "boolean"}), **_tools(limits)},
        ["messages"],
    )
    completion = _body(
        {**_options(limits), "prompt": _prompt(), **_number("logprobs", 0, limits.top_logprobs, "integer")}, ["prompt"]
    )
    response = _body(
        {**_common(limits), **_input(limits), **_number("top_logprobs", 0, limits.top_logprobs, "integer")}
        | {"max_output_tokens": _or_null({"type": "integer", "minimum": 1, "maximum": 1 << 31})}
        | {"text": _or_null({"type": "object", "properties": {"format": _or_null(_form(flat=True))}})}
        | {"include": _or_null(_list(_TEXT)), **_tools(limits, flat=True)},
        ["input"],
    )
    asked = {**_common(limits), **_blocks(limits), **_custom_tools(limits)}
    asked |= {"stop_sequences": asked.pop("stop"), "max_tokens": {"type": "integer", "minimum": 1, "maximum": 1 << 31}}
    asked |= {"output_config": _or_null({"type": "object", "properties": {"format": _or_null(_form(flat=True))}})}
    counted = _body({key: asked[key] for key in ("model", "system", "messages", *_custom_tools(limits))}, ["messages"])
    message = _body(asked, ["messages", "max_tokens"])
    either = {"prompt": _or_null(_prompt()), "messages": _or_null(_messages(limits)["messages"])}
    tokenize = {"type": "object", "properties": {"model": _or_null(_TEXT), **either, **_tools(limits)}}
    one = _answer("the model", _ref("Model"))
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    paths = {
        "/v1/chat/completions": {"post": _asking("Answer messages", chat, _ref("Chat"), streams=True)},
        "/v1/responses": {"post": _asking("Answer items", response, _ref("Response"), streams=True)},
        MESSAGES: {"post": _asking("Answer messages", message, _ref("Message"), streams=True, error="MessageError")},
        f"{MESSAGES}/count_tokens": {
            "post": _asking("Count tokens", counted, _object(input_tokens=_COUNT), error="MessageError")
        },
        "/v1/completions": {"post": _asking("Continue a text", completion, _ref("Completion"), streams=True)},
        "/v1/tokenize": {"post": _asking("Count tokens", tokenize, _ref("Tokens"))},
        "/v1/models": {"get": _operation("List the model", _answer("a list of one", _ref("Models")))},
        "/v1/models/{name}": {"get": _operation("Describe a model", one) | {"parameters": [name]}},
        "/health": {"get": _operation("Check the server's state", _answer("the state", _object(status=_TEXT)))},
        "/metrics": {"get": _operation("Metrics for Prometheus", _content("metrics", "text/plain", _TEXT))},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "qvl", "version": "1", "description": "Null counts as an absent field."},
        "paths": paths,
        "components": {
            "schemas": _RESULTS,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": KEY_HEADER},
            },
        },
        "security": [{}, {"key": []}, {"header": []}],
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(**properties: Schema) -> Schema:
    """Return the schema of an object that requires all of these properties."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}


_DETAIL = {"detail": _or_null({"enum": ["auto", "low", "high"]})}
_RESOLUTION = {key: _or_null({"type": "integer", "minimum": 1}) for key in KEYS}
"""Fields of a picture's part."""


def _number(name: str, low: float, high: float, kind: str = "number") -> Schema:
    return {name: _or_null({"type": kind, "minimum": low, "maximum": high})}


def _content(about: str, kind: str, schema: Schema) -> Schema:
    return {"description": about, "content": {kind: {"schema": schema}}}


def _answer(about: str, schema: Schema) -> Schema:
    return _content(about, "application/json", schema)


def _operation(summary: str, answer: Schema, error: str = "Error") -> Schema:
    return {"summary": summary, "responses": {"200": answer, "default": _answer("an error", _ref(error))}}


def _asking(summary: str, body: Schema, result: Schema, streams: bool = False, error: str = "Error") -> Schema:
    """Describe a route with a body; `streams` if it sends server-sent events when ``stream`` is true."""
    answer = _answer("the result", result)
    if streams:
        answer["content"]["text/event-stream"] = {}
    asked = {"required": True, "content": {"application/json": {"schema": body}}}
    return _operation(summary, answer, error) | {"requestBody": asked}


def _body(properties: Schema, required: list[str]) -> Schema:
    return {"type": "object", "properties": properties, "required": required}


def _prompt() -> Schema:
    ids = {**_list({**_COUNT, "maximum": (1 << 31) - 1}), "minItems": 1}
    return {"anyOf": [_TEXT, ids]}


def _messages(limits: Limits) -> Schema:
    uri = _object(url=_TEXT)
    uri["properties"] |= _DETAIL
    parts = [_object(type={"const": "text"}, text=_TEXT), _object(type={"const": "image_url"}, image_url=uri)]
    parts[1]["properties"] |= _RESOLUTION
    content = {"anyOf": [_TEXT, _list({"anyOf": [*parts, *_own_parts(limits)]})]}
    said = _object(role={"enum": list(ROLES)}, content=content)
    call = _object(function=_object(name=_TEXT, arguments=_TEXT))
    calling = _object(role={"const": "assistant"}, tool_calls={**_list(call), "minItems": 1})
    return {"messages": {**_list({"anyOf": [said, calling]}), "minItems": 1}}


def _input(limits: Limits) -> Schema:
    """Return the fields of a response's input."""
    texts = _object(type={"enum": ["input_text", "output_text"]}, text=_TEXT)
    image = _object(type={"const": "input_image"}, image_url=_TEXT)
    image["properties"] |= _DETAIL | _RESOLUTION
    content = {"anyOf": [_TEXT, _list({"anyOf": [texts, image, *_own_parts(limits)]})]}
    returned = {"anyOf": [_TEXT, _list({"anyOf": [texts, image]})]}
    items = [
        _object(role={"enum": [role for role in ROLES if role != "tool"]}, content=content),
        _object(type={"const": "reasoning"}, summary=_list(_object(text=_TEXT))),
        _object(type={"const": "function_call"}, call_id=_TEXT, name=_TEXT, arguments=_TEXT),
        _object(type={"const": "function_call_output"}, call_id=_TEXT, output=returned),
    ]
    items[0]["properties"]["type"] = {"const": "message"}
    return {
        "input": {"anyOf": [_TEXT, {**_list({"anyOf": items}), "minItems": 1}]},
        "instructions": _or_null(_TEXT),
    }


def _blocks(limits: Limits) -> Schema:
    """Return the fields of Anthropic's messages."""
    said = _object(type={"const": "text"}, text=_TEXT)
    base64 = _object(type={"const": "base64"}, media_type=_TEXT, data=_TEXT)
    image = _object(type={"const": "image"}, source={"anyOf": [base64, _object(type={"const": "url"}, url=_TEXT)]})
    image["properties"] |= _RESOLUTION
    returned = _object(type={"const": "tool_result"}, tool_use_id=_TEXT)
    returned["properties"]["content"] = {"anyOf": [_TEXT, _list({"anyOf": [said, image]})]}
    thought = _object(type={"const": "thinking"}, thinking=_TEXT)
    call = _object(type={"const": "tool_use"}, id=_TEXT, name=_TEXT, input={"type": "object"})
    blocks = [said, image, returned, thought, call, *_own_parts(limits)]
    content = {"anyOf": [_TEXT, _list({"anyOf": blocks})]}
    message = _object(role={"enum": list(ANTHROPIC_ROLES)}, content=content)
    return {
        "messages": {**_list(message), "minItems": 1},
        "system": {"anyOf": [_TEXT, _list(said), {"type": "null"}]},
    }


def _custom_tools(limits: Limits) -> Schema:
    """Return the fields of the functions of Anthropic's messages."""
    tool = _body(
        {
            "type": {"const": "custom"},
            "name": {**_TEXT, "pattern": f"^{NAME.pattern}$"},
            "description": _TEXT,
            "input_schema": {"type": "object"},
            "strict": {"type": "boolean"},
        },
        ["name"],
    )
    chosen = _object(type={"enum": [*ANTHROPIC_CHOICES, "tool"]})
    chosen["properties"] |= {"name": _TEXT, "disable_parallel_tool_use": {"type": "boolean"}}
    return {"tools": _or_null({**_list(tool), "maxItems": limits.tools}), "tool_choice": _or_null(chosen)}


def _own_parts(limits: Limits) -> list[Schema]:
    """Return the parts that are not OpenAI's: boxes and videos."""
    coordinates = {**_list(_NUMBER), "minItems": 4, "maxItems": 4}
    box = _object(type={"const": "box"}, pixels=coordinates)
    video = _object(type={"const": "video"}, video={**_list(_TEXT), "minItems": 1, "maxItems": limits.frames})
    box["properties"]["image"] = _COUNT
    video["properties"] |= {"fps": _or_null(_NUMBER), "times": _or_null(_list(_NUMBER))}
    return [box, video]


def _tools(limits: Limits, *, flat: bool = False) -> Schema:
    """Return the fields of functions that a model may call; those of responses are `flat`."""
    name = {**_TEXT, "pattern": f"^{NAME.pattern}$"}
    function: Schema = {"name": name, "description": _TEXT, "parameters": {"type": "object"}}
    function["strict"] = {"type": "boolean"}
    kind = {"const": "function"}
    if flat:
        tool, chosen = _body({"type": kind, **function}, ["type", "name"]), _object(type=kind, name=_TEXT)
    else:
        tool = _object(type=kind, function=_body(function, ["name"]))
        chosen = _object(type=kind, function=_object(name=_TEXT))
    return {
        "tools": _or_null({**_list(tool), "maxItems": limits.tools}),
        "tool_choice": {"anyOf": [{"enum": list(CHOICES)}, chosen, {"type": "null"}]},
        "parallel_tool_calls": _or_null({"type": "boolean"}),
    }


def _form(*, flat: bool) -> Schema:
    """Return the schema of an answer's form; that of responses is `flat`."""
    schema = {"type": ["object", "boolean"]}
    kinds = {"enum": ["text", "json_object", "json_schema"]}
    more = {} if flat else {"json_schema": {"type": "object", "properties": {"schema": schema}}}
    return {"type": "object", "properties": {"type": kinds, "schema": _or_null(schema), **more}}


def _common(limits: Limits) -> Schema:
    """Return the fields common to all requests."""
    stop = {**_TEXT, "maxLength": limits.stop_text}
    return {
        "model": _or_null(_TEXT),
        **_number("temperature", 0, 100),
        **_number("top_p", 0, 1),
        **_number("min_p", 0, 1),
        **_number("top_k", -1, 1 << 31, "integer"),
        **_number("repetition_penalty", 0.01, 100),
        **_number("presence_penalty", -2, 2),
        **_number("frequency_penalty", -2, 2),
        **_number("seed", -(1 << 63), (1 << 63) - 1, "integer"),
        "stop": {"anyOf": [stop, {**_list(stop), "maxItems": limits.stops}, {"type": "null"}]},
        "grounding": _or_null({"type": "boolean"}),
        "stream": _or_null({"type": "boolean"}),
    }


def _options(limits: Limits) -> Schema:
    """Return the further fields of chat completions and completions."""
    return {
        **_common(limits),
        **_number("n", 1, limits.n, "integer"),
        **_number("max_completion_tokens", 1, 1 << 31, "integer"),
        **_number("max_tokens", 1, 1 << 31, "integer"),
        "response_format": _or_null(_form(flat=False)),
        "stream_options": _or_null({"type": "object", "properties": {"include_usage": {"type": "boolean"}}}),
    }


_ENVELOPE: dict[str, Schema] = {"id": _TEXT, "created": _COUNT, "model": _TEXT}
_FINISH = {"enum": ["stop", "length"]}
_CHAT_FINISH = {"enum": [*_FINISH["enum"], "tool_calls"]}
_CALL = _object(id=_TEXT, type={"const": "function"}, function=_object(name=_TEXT, arguments=_TEXT))
_LOGPROBS = _or_null({"type": "object"})
_BOX = _object(
    ref=_or_null(_TEXT),
    numbers={**_list(_NUMBER), "minItems": 4, "maxItems": 4},
    pixels=_or_null(_list({"type": "integer"})),
    image=_or_null(_COUNT),
)
_MESSAGE = _object(role={"const": "assistant"}, content=_or_null(_TEXT), refusal={"type": "null"}, boxes=_list(_BOX))
_MESSAGE["properties"] |= {"reasoning_content": _TEXT, "tool_calls": _list(_CALL)}
_USAGE = _object(
    prompt_tokens=_COUNT,
    completion_tokens=_COUNT,
    total_tokens=_COUNT,
    prompt_tokens_details=_object(cached_tokens=_COUNT),
    completion_tokens_details=_object(reasoning_tokens=_COUNT),
)
_SAID = _object(type={"const": "output_text"}, text=_TEXT, annotations=_list({}), boxes=_list(_BOX))
_THOUGHT = _object(type={"const": "reasoning_text"}, text=_TEXT)
_ITEM = {"id": _TEXT, "status": {"enum": ["completed", "incomplete"]}}
_ITEMS = [
    _object(**_ITEM, type={"const": "message"}, role={"const": "assistant"}, content=_list(_SAID)),
    _object(**_ITEM, type={"const": "reasoning"}, summary=_list({}), content=_list(_THOUGHT)),
    _object(**_ITEM, type={"const": "function_call"}, call_id=_TEXT, name=_TEXT, arguments=_TEXT),
]
_WRITTEN = [
    _object(type={"const": "thinking"}, thinking=_TEXT, signature=_TEXT),
    _object(type={"const": "text"}, text=_TEXT),
    _object(type={"const": "tool_use"}, id=_TEXT, name=_TEXT, input={"type": "object"}),
]
_MODEL = _object(
    id=_TEXT,
    object={"const": "model"},
    created=_COUNT,
    owned_by=_TEXT,
    max_model_len=_COUNT,
    qvl=_object(title=_TEXT, chat={"type": "boolean"}, pictures={"type": "boolean"}, window=_COUNT, device=_TEXT),
)
_RESULTS = {
    "Error": _object(error=_object(message=_TEXT, type=_TEXT, param=_or_null(_TEXT), code=_or_null(_TEXT))),
    "Chat": _object(
        **_ENVELOPE,
        object={"const": "chat.completion"},
        choices=_list(_object(index=_COUNT, message=_MESSAGE, logprobs=_LOGPROBS, finish_reason=_CHAT_FINISH)),
        usage=_USAGE,
    ),
    "Response": _object(
        id=_TEXT,
        object={"const": "response"},
        created_at=_COUNT,
        model=_TEXT,
        status=_ITEM["status"],
        output=_list({"anyOf": _ITEMS}),
        usage=_object(input_tokens=_COUNT, output_tokens=_COUNT, total_tokens=_COUNT),
    ),
    "Message": _object(
        id=_TEXT,
        type={"const": "message"},
        role={"const": "assistant"},
        model=_TEXT,
        content=_list({"anyOf": _WRITTEN}),
        stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
        stop_sequence=_or_null(_TEXT),
        boxes=_list(_BOX),
        usage=_object(
            input_tokens=_COUNT,
            cache_creation_input_tokens=_COUNT,
            cache_read_input_tokens=_COUNT,
            output_tokens=_COUNT,
        ),
    ),
    "MessageError": _object(type={"const": "error"}, error=_object(type=_TEXT, message=_TEXT)),
    "Completion": _object(
        **_ENVELOPE,
        object={"const": "text_completion"},
        choices=_list(_object(index=_COUNT, text=_TEXT, logprobs=_LOGPROBS, finish_reason=_FINISH)),
        usage=_USAGE,
    ),
    "Tokens": _object(count=_COUNT, max_model_len=_COUNT, tokens=_list(_COUNT)),
    "Model": _MODEL,
    "Models": _object(object={"const": "list"}, data={**_list(_ref("Model")), "minItems": 1, "maxItems": 1}),
}
