"""Qwen3-VL's notation of calls: a JSON object with name and arguments between <tool_call> tags."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from qvl_runtime.engine.constraints import NOTATION, AtLeast, Form, JsonSchema, Lark, schema_grammar
from qvl_runtime.engine.generation import overlap
from qvl_runtime.engine.schemas import check_together
from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen2_vl.prompt import Prompts
from qvl_runtime.families.qwen3_vl.template import CALL, CALLED, Qwen3Template
from qvl_runtime.inputs.tools import Function, ToolCall, Tools

SPACED = {**NOTATION, "item_separator": ", ", "key_separator": ": "}
"""How constrained calls are written: with the blanks of the template, as the model writes them by itself."""

BEGIN = re.compile(rf"{CALL}\s*(?:\{{|\Z)")
"""Where a call may begin; a tag before anything else is text, which need not be held."""
STRING_END = re.compile(r'["\x00-\x1f]')
"""What may end a string of JSON: its quote, or a control character, which is an error."""
SPARE = 100
"""Levels that a call may be nested less deeply than JSON that can be read: an answer's JSON holds its arguments."""


class Calling:
    """`qvl_runtime.families.base.Calling`."""

    def prompts(self, prompts: Prompts, tools: Tools) -> Prompts:
        assert isinstance(prompts.template, Qwen3Template)
        if missing := [tag for tag in (CALL, CALLED) if tag not in prompts.tokenizer.special]:
            raise QvlError(f"this model takes no tools: its tokenizer has no {missing[0]}; use a published Qwen3-VL")
        template = dataclasses.replace(prompts.template, tools=tools.given)
        return dataclasses.replace(prompts, template=template)

    def reader(self) -> Reader:
        return Reader()

    def form(self, tools: Tools, form: Form | None) -> Form | None:
        schema = form if isinstance(form, JsonSchema) else None
        if form is not None and (tools.must_call or not isinstance(form, JsonSchema | AtLeast)):
            raise QvlError("calls of tools are their own form; leave out the constraint, and min_new_tokens")
        is_free = not tools.must_call and tools.parallel and not any(f.strict for f in tools.functions)
        if schema is None and is_free:
            return form
        if isinstance(form, AtLeast):
            raise QvlError("min_new_tokens and strict or single calls may contradict each other; leave out one")
        return Lark(_grammar(tools, schema), "grammar of the tools")


def _grammar(tools: Tools, schema: JsonSchema | None) -> str:
    """Write the grammar of answers with calls; if none is demanded, also of text, or of JSON that matches `schema`."""
    single = not tools.parallel or tools.choice == tools.possible[0].name
    lines = [
        "start: calls" if tools.must_call else "start: TEXT? calls?" if schema is None else "start: calls | answer",
        "calls: call" if single else 'calls: call ("\\n" call)*',
        f'call: {CALL} "\\n" function "\\n" {CALLED}',
        "function: " + " | ".join(f"f{i}" for i in range(len(tools.possible))),
        # A tag in plain letters would begin a call, too, but one that no grammar holds.
        rf"TEXT: /(.|\n)+/ & ~/(.|\n)*{CALL}(.|\n)*/",
    ]
    held = [own if strict or tools.must_call else {"type": "object"} for _, own, strict in tools.possible]
    # All that is quick before llguidance computes the first.
    texts = [_named(function, JsonSchema(own).text) for function, own in zip(tools.possible, held)]
    answer = None if schema is None else schema.text()
    check_together(texts if answer is None else [*texts, answer])
    for i, (function, text) in enumerate(zip(tools.possible, texts)):
        _named(function, functools.partial(schema_grammar, text))
        head = json.dumps(f'{{"name": "{function.name}", "arguments": ', ensure_ascii=False)
        lines += [f'f{i}: {head} a{i} "}}"', f"a{i}: {_json(held[i], SPACED)}"]
    if answer is not None:
        schema_grammar(answer)
        lines.append(f"answer: {_json(json.loads(answer), NOTATION)}")
    return "\n".join(lines)


def _named(function: Function, check: Callable[[], str]) -> str:
    """Return the result of a check of a function's schema; its errors name the function."""
    try:
        return check()
    except QvlError as error:
        raise QvlError(f"the function {function.name!r}: {error}") from None


def _json(schema: Mapping[str, Any], notation: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": notation})


class Reader:
    """`qvl_runtime.inputs.tools.CallReader`. A call that is not well-formed remains text.

    Text is held from the first tag on that may begin a call. At each end tag what is held is parsed, from the first tag
    to the end tag: it is a call; or it ends within a string, to which the end tag belongs, and another one is waited
    for; or the same is tried from the next tag. If none begins a call, all of it is text.

    Complete texts are parsed, not what has arrived: errors of `JSONDecoder.raw_decode` do not tell a wrong call from
    one that goes on, and it would parse a long call again with every piece.
    """

    def __init__(self) -> None:
        self._held = ""
        self._called = False  # whether there was a call
        self._in_string = 0  # end of the last end tag in what is held that belongs to a string of a call, or 0

    def push(self, text: str) -> list[str | ToolCall]:
        self._held += text
        found: list[str | ToolCall] = []
        while (end := self._held.find(CALLED, self._in_string)) >= 0:
            # Parsed again for every tag in one string, a call would take time with their square.
            goes_on = self._in_string > 0 and not STRING_END.search(self._held, self._in_string, end)
            begin, call = (0, None) if goes_on else self._find(end)
            if call is None and begin is not None:
                self._in_string = end + len(CALLED)
                found += self._release(begin)  # its tags begin no call; kept, they would be tried again at each end
            else:
                found += self._take(begin, call, end + len(CALLED))
        first = BEGIN.search(self._held)
        return found + self._release(len(self._held) - overlap(self._held, CALL) if first is None else first.start())

    def finish(self) -> list[str | ToolCall]:
        begin, call = self._find(len(self._held))
        found = self._take(begin, call, len(self._held))
        # Line ends after the last call separate nothing.
        return [item for item in found if isinstance(item, ToolCall) or not self._called or item.strip("\n")]

    def _find(self, end: int) -> tuple[int | None, ToolCall | None]:
        """Return the first tag with a call up to `end`, and the call: None if its text ends within a string."""
        for match in BEGIN.finditer(self._held, 0, end):
            call, in_string = _call(self._held[match.start() + len(CALL) : end])
            if call is not None or in_string:
                return match.start(), call
        return None, None

    def _take(self, begin: int | None, call: ToolCall | None, rest: int) -> list[str | ToolCall]:
        """Take what is held up to `rest`: the text before `begin` and the call there, or text alone without a call."""
        held, self._held, self._in_string = self._held, self._held[rest:], 0
        text = held[:rest] if call is None else held[:begin].rstrip("\n")
        self._called |= call is not None
        return [item for item in (text, call) if item]

    def _release(self, count: int) -> list[str | ToolCall]:
        """Return the first `count` characters of what is held, without the line ends that may precede a call."""
        text = self._held[:count].rstrip("\n")
        self._held, self._in_string = self._held[len(text) :], max(0, self._in_string - len(text))
        return [text] if text else []


def _call(text: str) -> tuple[ToolCall | None, bool]:
    """Parse a call; None if it has no name, no object of arguments, or what JSON cannot hold.

    The second value is whether the text ends within a string: a tag after it belongs to the string.
    """
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        within = functools.reduce(lambda inner, _: [inner], range(SPARE), value)
        json.dumps(within, ensure_ascii=False).encode()  # half a character
    except json.JSONDecodeError as error:
        return None, error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        return None, False
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None, False
    arguments = value.get("arguments")
    return ToolCall(value["name"], arguments) if isinstance(arguments, dict) else None, False


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _finite(number: str) -> float:
    if math.isinf(value := float(number)):
        raise ValueError(number)
    return value


CALLING = Calling()
