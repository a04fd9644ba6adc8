"""Validation of requests: OpenAI's fields as options of `Model.stream`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from qvl_runtime.batching import SEEDS
from qvl_runtime.engine.constraints import Form, Grounding, JsonSchema
from qvl_runtime.families.generation_config import GenerationConfig
from qvl_runtime.inputs.tools import Tools
from qvl_runtime.openai.errors import ApiError, refused
from qvl_runtime.openai.fields import Fields, array, text, wrong
from qvl_runtime.openai.limits import Limits
from qvl_runtime.openai.messages import Messages, read_messages
from qvl_runtime.openai.tools import read_tools

COMPLETION_TOKENS = 16
"""OpenAI's default for completions."""

UNKNOWN = (
    "echo", "suffix", "logit_bias", "min_tokens", "ignore_eos", "stop_token_ids", "allowed_token_ids", "bad_words",
    "use_beam_search", "continue_final_message", "mm_processor_kwargs",
)  # fmt: skip
"""Fields of OpenAI and vLLM without which an answer would be another one; null, 0, false and empty do not change it."""

FOREIGN = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar")
"""Other servers' fields that restrict an answer. Without them it would be another one."""

OBJECT = '{"type":"object"}'
"""Schema of ``json_object`` without a schema."""


@dataclasses.dataclass
class Asked:
    """A validated request.

    Attributes
    ----------
    prompt : Messages, str, or list of int
    options : dict
        Options of `Model.stream`, without the seed.
    seed : int or None
        Seed of the first answer, from 0 to 2**64 - 1; see `one_each` for further answers.
    n : int
        Number of answers.
    stream, usage : bool
        Whether to stream the answer, and whether the stream ends with the usage.
    logprobs : int or None
        Alternatives of each token, if log probabilities are requested.
    limit_field : str
        The request's name of `max_new_tokens`.
    """

    limit_field: ClassVar[str] = "max_tokens"
    prompt: Messages | str | list[int]
    options: dict[str, Any]
    seed: int | None
    n: int
    stream: bool
    usage: bool
    logprobs: int | None


def read_chat(data: Mapping[str, Any], limits: Limits, own: GenerationConfig, allow_urls: bool) -> Asked:
    """Validate a request for ``/v1/chat/completions``; `own` has the model's defaults.

    Raises
    ------
    ApiError
        Names the invalid field.
    """
    fields = Fields(data)
    logprobs = None
    top = fields.integer("top_logprobs", 0, limits.top_logprobs)
    if fields.flag("logprobs"):
        logprobs = top or 0
    elif top:
        raise refused("top_logprobs needs logprobs to be true", "top_logprobs")
    options = read_sampling(fields, limits, own) | {"max_new_tokens": _most(fields) or own.max_new_tokens}
    options |= read_forms(fields, _chat_form(fields, limits), read_tools(fields, limits))
    messages = read_messages(fields.get("messages"), limits, allow_urls)
    return Asked(prompt=messages, **read_common(fields, limits, options, logprobs))


def read_completion(data: Mapping[str, Any], limits: Limits, own: GenerationConfig) -> Asked:
    """Validate a request for ``/v1/completions``: raw text or token ids, without pictures.

    Raises
    ------
    ApiError
        Names the invalid field.
    """
    fields = Fields(data)
    options = read_sampling(fields, limits, own) | {"max_new_tokens": _most(fields) or COMPLETION_TOKENS}
    options |= {"constraint": read_forms(fields, _chat_form(fields, limits), None)["constraint"]}
    logprobs = fields.integer("logprobs", 0, limits.top_logprobs)
    prompt = read_prompt(fields.get("prompt"), limits)
    return Asked(prompt=prompt, **read_common(fields, limits, options, logprobs))


def read_prompt(value: Any, limits: Limits) -> str | list[int]:
    """Read the prompt of a completion: text or token ids, alone or in an array of one."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, list):
        if not value or not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 31 for i in value):
            raise refused("prompt must be a string or an array of token ids", "prompt")
        return value
    prompt = text(value, "prompt")
    if len(prompt) > limits.text:
        raise refused(f"prompt has more than {limits.text} characters", "prompt")
    return prompt


def read_common(fields: Fields, limits: Limits, options: dict[str, Any], logprobs: int | None) -> dict[str, Any]:
    """Read what all requests have; return the attributes of `Asked` but its prompt."""
    for name in UNKNOWN:
        if fields.get(name):
            hint = "; set max_pixels in the part of a picture" if name == "mm_processor_kwargs" else ""
            raise refused(f"this server knows no {name}{hint}", name)
    n, best = fields.integer("n", 1, limits.n) or 1, fields.integer("best_of", 1, limits.n)
    if best not in (None, n):
        raise refused("best_of must be as large as n: this server gives all the answers it makes", "best_of")
    seed = fields.integer("seed", -SEEDS // 2, SEEDS // 2 - 1)
    return {
        "options": options | {"logprobs": logprobs},
        "seed": None if seed is None else seed % SEEDS,
        "n": n,
        "stream": fields.flag("stream"),
        "usage": fields.object("stream_options").flag("include_usage"),
        "logprobs": logprobs,
    }


def _most(fields: Fields) -> int | None:
    """Read the largest number of tokens."""
    return fields.integer("max_completion_tokens", 1, 1 << 31) or fields.integer("max_tokens", 1, 1 << 31)


def read_sampling(fields: Fields, limits: Limits, own: GenerationConfig, stop: str = "stop") -> dict[str, Any]:
    """Read the sampling options; defaults are those of the model. `stop` is the name of the field of stop strings."""
    given = {
        "temperature": fields.number("temperature", 0, 100),
        "top_k": _top_k(fields),
        "top_p": fields.number("top_p", 0, 1),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
    }
    defaults = {
        "temperature": own.temperature if own.do_sample else 0.0,
        "top_k": own.top_k,
        "top_p": own.top_p,
        "repetition_penalty": own.repetition_penalty,
    }
    sent = {name: value for name, value in given.items() if value is not None}
    return defaults | sent | {"stop": _stops(fields, limits, stop)}


def _top_k(fields: Fields) -> int | None:
    """Read top_k; 0 and -1 disable it."""
    top_k = fields.integer("top_k", -1, 1 << 31)
    return None if top_k is None else max(0, top_k)


def _stops(fields: Fields, limits: Limits, name: str) -> list[str]:
    value = fields.get(name)
    stops = [] if value is None else [value] if isinstance(value, str) else array(value, name)
    if len(stops) > limits.stops:
        raise refused(f"{name} has more than {limits.stops} strings", name)
    checked = [text(stop, name) for stop in stops]
    if any(len(stop) > limits.stop_text for stop in checked):
        raise refused(f"a string of {name} has more than {limits.stop_text} characters", name)
    return [stop for stop in checked if stop]


def read_forms(fields: Fields, form: JsonSchema | None, tools: Tools | None) -> dict[str, Any]:
    """Return the options "constraint" and "tools" of `Model.stream`; `form` is the one that the request names."""
    for name in FOREIGN:
        if fields.get(name):
            raise refused(f"this server knows no {name}; use a json_schema as the format of the answer", name)
    grounding = fields.flag("grounding")
    if grounding and (form is not None or tools is not None):
        raise refused("grounding excludes tools and another form of the answer", "grounding")
    constraint: Form | None = Grounding() if grounding else form
    if tools is not None and tools.must_call:
        constraint = None  # the form of an answer, but this one is calls
    return {"constraint": constraint, "tools": tools}


def _chat_form(fields: Fields, limits: Limits) -> JsonSchema | None:
    form = fields.object("response_format")
    return read_form(form, form.object("json_schema"), limits) if fields.get("response_format") else None


def read_form(form: Fields, named: Fields, limits: Limits) -> JsonSchema | None:
    """Read the form of an answer.

    Parameters
    ----------
    form : Fields
        Those with the type.
    named : Fields
        Those with the schema, for the type ``json_schema``.
    limits : Limits

    Raises
    ------
    ApiError
        Names the invalid field.
    """
    kind = form.string("type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = form.get("schema")
        return JsonSchema(OBJECT if schema is None else _schema(schema, form.name("schema"), limits))
    if kind != "json_schema":
        raise refused(f"{form.name('type')} must be text, json_object or json_schema", form.name("type"))
    return JsonSchema(_schema(named.get("schema"), named.name("schema"), limits))


def _schema(schema: Any, name: str, limits: Limits) -> str:
    """Check the schema in the field `name`, and return it as JSON."""
    if not isinstance(schema, dict | bool):
        raise wrong(schema, name, "a JSON schema")
    try:
        written = json.dumps(schema)
    except RecursionError:
        raise refused(f"{name} is nested too deeply", name) from None
    if len(written) > limits.schema_bytes:
        raise refused(f"{name} has more than {limits.schema_bytes} bytes", name)
    return written


def check_model(data: Mapping[str, Any], served: str) -> None:
    """Refuse a request for another model. A request without a name is accepted."""
    name = Fields(data).string("model")
    if name not in (None, "", served):
        raise ApiError(
            404,
            f"there is no model {name[:80]!r} here; this server has {served!r}",
            param="model",
            code="model_not_found",
        )
