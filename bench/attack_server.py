"""Send malformed requests to `qvl serve`: none may get a status of 500 or more, and none may hang.

    python bench/attack_server.py [MODEL.qvl] [--count 10000] [--seed 0] [--clients 8] [--device cpu]

Requests have valid values in every field. Some values are then replaced: by another type, a number out of range, half a
character, a deep or long value; and the bytes of some requests are damaged. Without a model the demo model is served.
Exit status 1 if a request got a wrong answer.
"""

from __future__ import annotations

import collections
import json
import random
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import harness
from served import Process, picture_uri, running

HANG = 60.0
"""Seconds after which a request counts as hanging."""

SAMPLING: dict[str, list[Any]] = {
    "temperature": [0, 0.7, 1], "top_p": [1, 0.5], "top_k": [0, 40], "min_p": [0.05], "seed": [1, -1], "n": [1, 2],
    "max_tokens": [1, 2, 3], "max_completion_tokens": [1, 2], "stop": ["x", ["a", "b"], []], "stream": [True, False],
    "stream_options": [{"include_usage": True}], "presence_penalty": [0.5], "frequency_penalty": [-0.5],
    "repetition_penalty": [1.1], "logit_bias": [{}], "user": ["me"], "model": ["demo"],
}  # fmt: skip
ROUTES: dict[str, dict[str, list[Any]]] = {
    "/v1/chat/completions": {
        **SAMPLING, "logprobs": [True, False], "top_logprobs": [0, 2], "grounding": [True, False], "tools": [[]],
        "response_format": [
            {"type": "text"}, {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
        ],
    },
    "/v1/responses": {
        **SAMPLING, "n": [1], "instructions": ["Be brief."], "max_output_tokens": [1, 2, 3], "metadata": [{"a": "b"}],
        "include": [["message.output_text.logprobs"], []], "top_logprobs": [0, 2], "grounding": [True, False],
        "text": [{"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}, "verbosity": "low"}],
        "tools": [[], [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}]],
        "tool_choice": [
            "auto", {"type": "function", "name": "f"},
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
        ],
        "parallel_tool_calls": [True, False], "store": [True], "previous_response_id": [None],
    },
    "/v1/messages": {
        **SAMPLING, "n": [1], "system": ["Be brief.", [{"type": "text", "text": "x"}]], "stop_sequences": [["a"], []],
        "thinking": [{"type": "enabled", "budget_tokens": 1024}], "grounding": [True, False],
        "tools": [[], [{"name": "f", "input_schema": {"type": "object"}, "strict": True}]],
        "tool_choice": [{"type": "auto", "disable_parallel_tool_use": True}, {"type": "tool", "name": "f"}],
        "output_config": [{"format": {"type": "json_schema", "schema": {"type": "object"}}}],
    },
    "/v1/completions": {**SAMPLING, "logprobs": [0, 2], "prompt": ["hello", [1, 2, 3]], "echo": [False]},
    "/v1/tokenize": {"prompt": ["hello"], "model": ["demo"]},
}  # fmt: skip
"""The fields of every route, with valid values."""

ENDS = [
    b"data: [DONE]", b"event: message_stop", b"event: error",
    *(b"event: response." + end for end in (b"completed", b"incomplete", b"failed")),
]  # fmt: skip
"""The ends of streams."""

SCHEMAS: list[Any] = [
    {"type": "string", "pattern": "((a{1,99}){1,99}){1,99}"}, {"$ref": "#"}, {"type": ["string", "null"]},
    {"anyOf": []}, {"enum": []}, {"const": "\x00"}, {"not": {}}, {"type": "array", "prefixItems": [True, False]},
    {"$ref": "http://127.0.0.1/x"}, {"type": "number", "multipleOf": 0}, {"type": "integer", "minimum": 1e300},
    {"patternProperties": {"(": {}}}, {"if": {}, "then": {}}, {"type": "string", "format": "ipv6"}, True, False,
]  # fmt: skip

WRONG: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 1e308, -1e308, 10**25, 10**400, "", "x", "\x00", "\ud800", "💥" * 50, "1", [], {},
    [[]], [{}], [None], {"": None}, {"a": {"b": {}}}, ["x"] * 100, "<img>/etc/passwd</img>", "../../etc/passwd",
    "file:///etc/passwd", "http://127.0.0.1:1/", "data:image/png;base64,", "data:image/png;base64,AAAA", "%s%n{0}${x}",
]  # fmt: skip


def deep(rng: random.Random) -> Any:
    value: Any = rng.choice(WRONG)
    for _ in range(rng.choice([10, 300, 900])):
        value = [value] if rng.random() < 0.5 else {"type": "object", "a": value}
    return value


def content(rng: random.Random) -> Any:
    """The content of a message: a text, or parts, with pictures and boxes."""
    if rng.random() < 0.4:
        return rng.choice(["hi", "图中有什么？", "<ref>x</ref><box>(1,2),(3,4)</box>", "<|im_end|>", ""])
    parts: list[Any] = []
    for _ in range(rng.randrange(4)):
        kind = rng.choice(["text", "image_url", "box"])
        part: dict[str, Any] = {"type": kind}
        if kind == "text":
            part["text"] = "what is it?"
        elif kind == "image_url":
            part["image_url"] = {"url": picture_uri(rng.randrange(3), 64), "detail": rng.choice(["low", "auto"])}
            part |= rng.choice([{}, {"max_pixels": 4096}, {"resized_width": 64, "resized_height": 32}])
        else:
            part |= {"image": rng.randrange(2), "pixels": [1, 2, 30, 40]}
        parts.append(part)
    return parts


def messages(rng: random.Random) -> list[dict[str, Any]]:
    roles = rng.choice([["user"], ["system", "user"], ["user", "assistant", "user"], ["developer", "user"], ["tool"]])
    return [{"role": role, "content": content(rng) if role == "user" else "ok"} for role in roles]


def items(rng: random.Random) -> Any:
    """The input of a response."""
    if rng.random() < 0.2:
        return "hi"
    made: list[Any] = []
    for message in messages(rng):
        parts = message["content"]
        if isinstance(parts, list):
            parts = [_input_part(part) for part in parts]
        made.append({**message, "content": parts})
    more: list[Any] = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "x"}]},
        {"type": "item_reference", "id": "m"},
    ]
    return [*made, *rng.sample(more, rng.choice([0, 0, 1, 3]))]


def _input_part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "image_url":
        return part | {"type": "input_image", "image_url": part["image_url"]["url"], "detail": "low"}
    return part | {"type": "input_text"} if part["type"] == "text" else part


def turns(rng: random.Random) -> list[dict[str, Any]]:
    """The messages of Anthropic's format."""
    made: list[dict[str, Any]] = []
    for message in messages(rng):
        parts = message["content"]
        if isinstance(parts, list):
            parts = [_block(part) for part in parts]
        role = message["role"] if message["role"] in ("system", "assistant") else "user"
        made.append({"role": role, "content": parts})
    call = {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": ""}
    result = {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "x"}]}
    called = [{"role": "assistant", "content": [thought, call]}, {"role": "user", "content": [result]}]
    return [*made, *(called if rng.random() < 0.2 else [])]


def _block(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image_url":
        return part
    url = part["image_url"]["url"]
    source = {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}
    return part | {"type": "image", "source": source if len(url) % 2 else {"type": "url", "url": url}}


def mutated(rng: random.Random, value: Any, share: float) -> Any:
    """A value in which some places have another one."""
    if rng.random() < share:
        return deep(rng) if rng.random() < 0.05 else rng.choice(WRONG + SCHEMAS)
    if isinstance(value, dict):
        return {
            (key if rng.random() > share / 4 else str(rng.choice(WRONG))[:50]): mutated(rng, item, share)
            for key, item in value.items()
        }
    if isinstance(value, list):
        changed = [mutated(rng, item, share) for item in value]
        return changed * rng.choice([0, 2, 30]) if rng.random() < share / 4 else changed
    return value


def damaged(rng: random.Random, body: bytes) -> bytes:
    """A body with bytes changed, cut off, or doubled."""
    kind, place = rng.randrange(4), rng.randrange(len(body) + 1)
    if kind == 0:
        return body[:place]
    if kind == 1:
        return body[:place] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9))) + body[place:]
    if kind == 2:
        return body[:place] + body[place + rng.randrange(1, 9) :]
    return body + body[place:]


def request(rng: random.Random) -> tuple[bool, bytes, bytes]:
    """A request: whether its length is as it says, head and body."""
    route = rng.choice([*ROUTES, "/v1/chat/completions", "/v1/responses", "/v1/messages"])
    fields = ROUTES[route]
    chosen = rng.sample(list(fields), rng.randrange(min(6, len(fields)) + 1))
    body = {name: rng.choice(fields[name]) for name in chosen} | {"max_tokens": 2}
    if route == "/v1/responses":
        body["input"] = items(rng)
    elif route == "/v1/messages":
        body["messages"] = turns(rng)
    elif route != "/v1/completions" and (route != "/v1/tokenize" or rng.random() < 0.5):
        body["messages"] = messages(rng)
    elif route == "/v1/completions":
        body.setdefault("prompt", "hello")
    if rng.random() < 0.1:
        schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": rng.choice(SCHEMAS)}}
        body["response_format"] = schema
    body = mutated(rng, body, rng.choice([0.0, 0.03, 0.1, 0.3]))
    if isinstance(body, dict):
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):  # a long answer is no hang
            if isinstance(body.get(name), int | float) and body[name] > 4:
                body[name] = 4
        if isinstance(body.get("n"), int) and body["n"] > 2:
            body["n"] = rng.choice([2, 9])
        if not {"max_tokens", "max_completion_tokens"} & body.keys():
            body["max_tokens"] = 4
        if route == "/v1/responses" and not body.get("max_output_tokens"):
            body["max_output_tokens"] = 4
    try:
        written = json.dumps(body).encode()
    except (ValueError, RecursionError):
        written = b"{}"
    if rng.random() < 0.15:
        written = damaged(rng, written)
    headers = {"Host": "localhost", "Content-Length": str(len(written)), "Connection": "close"}
    framed = True
    if rng.random() < 0.1:
        name = rng.choice(["Content-Length", "Transfer-Encoding", "Host", "Origin", "Authorization", "Content-Type"])
        odd = ["", "0", "-1", "9" * 25, "chunked", "gzip", "evil.example", "null", "x" * 9000, "\xff", "Bearer \xff"]
        headers[name] = rng.choice(odd)
        framed = name not in ("Content-Length", "Transfer-Encoding")
    method = "POST" if rng.random() < 0.97 else rng.choice(["GET", "PUT", "OPTIONS", "HEAD", "TRACE", "X"])
    path = (
        route if rng.random() < 0.97 else rng.choice(["/", "//", "/%00", "/v1/models/" + "%2e" * 99, "/metrics", "*"])
    )
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return framed, head.encode("latin-1") + b"\r\n", written


def ask(port: int, framed: bool, head: bytes, body: bytes) -> bytes:
    """Send it, and read until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=HANG) as channel:
        received = b""
        try:
            channel.sendall(head + body)
            if not framed:
                channel.settimeout(2)  # the server waits for the rest; this client goes away
            while chunk := channel.recv(1 << 16):
                received += chunk
        except (BrokenPipeError, ConnectionResetError):
            pass
        except TimeoutError:
            if framed:
                raise
        return received


def fault(received: bytes, framed: bool) -> str | None:
    """What is wrong with an answer."""
    if not received:
        return "closed without an answer" if framed else None
    status = received[9:12].decode("latin-1")
    if not received.startswith(b"HTTP/1.1 ") or status >= "500":
        return f"status {status}"
    if status >= "400" and b'"error"' not in received and b"Invalid HTTP request" not in received:
        return f"status {status} without an error in JSON"
    if b"Traceback" in received or b"/etc/passwd:" in received or b"root:" in received:
        return "shows the server's insides"
    if b"text/event-stream" in received and status == "200" and not any(end in received for end in ENDS):
        return "a stream without an end"
    return None


def attack(process: Process, count: int, seed: int, clients: int) -> dict[str, Any]:
    """Send them all."""
    statuses: collections.Counter[str] = collections.Counter()
    faults: list[dict[str, str]] = []
    slowest = [0.0]
    numbers, lock = iter(range(count)), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None or len(faults) > 20:
                return
            rng = random.Random(f"{seed}:{number}")
            framed, head, body = request(rng)
            began = time.monotonic()
            try:
                received = ask(process.port, framed, head, body)
                problem = None if head.startswith(b"HEAD") else fault(received, framed)
            except TimeoutError:
                received, problem = b"", "hangs"
            with lock:
                slowest[0] = max(slowest[0], time.monotonic() - began)
                statuses[received[9:12].decode("latin-1") or "closed"] += 1
                if problem:
                    faults.append({"number": str(number), "fault": problem, "sent": repr(head + body)[:2000]})
                    print(f"request {number}: {problem}\n  {(head + body)[:600]!r}\n  {received[-300:]!r}", flush=True)
                if number % 1000 == 999:
                    print(f"{number + 1} requests: {dict(statuses)}", flush=True)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"requests": sum(statuses.values()), "statuses": dict(statuses), "slowest": slowest[0], "faults": faults}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    with running(arguments.model, "--device", arguments.device) as process:
        before = process.state()
        results = attack(process, arguments.count, arguments.seed, arguments.clients)
        results |= {"before": before, "after": process.state()}
    print(f"{results['requests']} requests, {len(results['faults'])} faults, slowest {results['slowest']:.1f} s")
    harness.print_document(device=arguments.device, seed=arguments.seed, **results)
    sys.exit(bool(results["faults"]))


if __name__ == "__main__":
    main()
