"""Many clients: their order, slow clients, disconnects, and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import io
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import httpx
import pytest
from serving import Served, image_part, picture, png, serving

from qvl_runtime.cli.main import main
from qvl_runtime.engine.sampling import Sampler
from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.prepared import PreparedPictures
from qvl_runtime.openai.errors import ApiError
from qvl_runtime.openai.formats import ChatFormat
from qvl_runtime.server import Limits, json_text, listening
from qvl_runtime.server.admission import Admission
from qvl_runtime.server.metrics import Watch

LONG = {
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "array", "minItems": 10**6, "items": {"type": "integer"}}},
    },
    "max_tokens": 4000,
}
"""Fields of a request whose answer does not end before its limit."""
USER = {"role": "user", "content": "Hi"}


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def loop_thread_of(served: Served) -> threading.Thread:
    found: list[threading.Thread] = []
    served.loop.call_soon_threadsafe(lambda: found.append(threading.current_thread()))
    wait_for(lambda: bool(found))
    return found[0]


def request(content: str = "hi", **fields) -> bytes:
    body = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


@pytest.fixture
def small(demo_model):
    """A server that computes one answer at a time, and lets four wait."""
    with serving(demo_model, limits=Limits(running=1, waiting=4, ping_seconds=0.02)) as server:
        yield server


class Blocked:
    """Keeps the only place of a small server until it is released."""

    def __init__(self, server: Served):
        self._channel = server.connect()
        self._channel.sendall(request(stream=True, **LONG))
        wait_for(lambda: server.service.admission.running == 1)

    def release(self) -> None:
        self._channel.close()


def test_who_waits_is_served_in_order_and_others_are_refused(small, demo_model, monkeypatch):
    blocked, order, threads = Blocked(small), [], []
    stream = demo_model.stream
    monkeypatch.setattr(
        demo_model, "stream", lambda prompt, **options: order.append(prompt) or stream(prompt, **options)
    )
    for number in range(4):

        def ask(number: int = number) -> None:
            assert small.chat(f"number {number}").status_code == 200

        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        wait_for(lambda number=number: small.service.admission.waiting == number + 1)
    refused = small.chat("one too many")
    assert refused.status_code == 429 and refused.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert small.http.get("/health").status_code == 200
    shown = small.http.get("/metrics").text
    assert "qvl:num_requests_running 1.0" in shown and "qvl:num_requests_waiting 4.0" in shown
    blocked.release()
    for thread in threads:
        thread.join(60)
    assert [prompt[0]["content"][0]["text"] for prompt in order][-4:] == [f"number {i}" for i in range(4)]
    wait_for(lambda: small.service.admission.inside == small.service.admission.running == 0)


@pytest.mark.parametrize("stream, n", [(False, 1), (True, 1), (True, 3)])
def test_nothing_is_computed_for_a_client_that_has_gone(small, demo_model, monkeypatch, stream, n):
    steps = []
    choose = Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda self, *given: steps.append(1) or choose(self, *given))
    channel = small.connect()
    channel.sendall(request(stream=stream, n=n, temperature=1.0, **LONG))
    wait_for(lambda: len(steps) > 3)
    channel.close()
    wait_for(lambda: small.service.admission.running == 0, 10)
    wait_for(lambda: demo_model._scheduler.load == (0, 0), 10)  # the step in which it went
    after = len(steps)
    time.sleep(0.3)
    assert len(steps) == after < 1000
    assert small.service.admission.inside == 0


def test_one_of_several_answers_that_fails_ends_the_others(small, monkeypatch):
    sampled, choose = [], Sampler.__call__

    def failing(self: Sampler, *given):
        sampled.append(self)
        if len(sampled) > 20 and self is sampled[1]:
            raise QvlError("broken")
        return choose(self, *given)

    monkeypatch.setattr(Sampler, "__call__", failing)
    response = small.chat("Count", n=3, seed=1, temperature=1.0, **LONG)
    assert response.status_code == 400 and response.json()["error"]["message"] == "broken"
    wait_for(lambda: small.service.admission.running == 0)
    assert len(sampled) < 1000


def test_a_thread_that_cannot_be_started_keeps_no_place(demo_model, monkeypatch):
    left, start = [1], threading.Thread.start

    def starting(thread: threading.Thread) -> None:
        if thread.name.startswith("qvl-answer") and left and left.pop():
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starting)
    with serving(demo_model, limits=Limits(running=1, seconds=2.0)) as server:
        assert server.chat().status_code == 500
        assert server.chat().status_code == 200


def test_who_goes_while_waiting_leaves_the_line(small):
    blocked = Blocked(small)
    waiting = [small.connect() for _ in range(3)]
    for channel in waiting:
        channel.sendall(request())
    wait_for(lambda: small.service.admission.waiting == 3)
    for channel in waiting:
        channel.close()
    wait_for(lambda: small.service.admission.waiting == 0)
    assert small.service.admission.inside == 1
    blocked.release()
    wait_for(lambda: small.service.admission.running == 0)
    assert small.chat().status_code == 200


def test_a_slow_reader_holds_nobody_up(small):
    slow = small.connect()
    slow.sendall(request("Describe yourself", stream=True, max_tokens=30))
    for number in range(3):
        assert small.chat(f"beside {number}").status_code == 200
    received = b""
    while chunk := slow.recv(100):
        received += chunk
    slow.close()
    assert received.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in received


def test_a_stream_says_that_it_is_alive(small, monkeypatch):
    piece = Watch.piece
    monkeypatch.setattr(Watch, "piece", lambda *args: time.sleep(0.1) or piece(*args))
    text = small.chat("?", stream=True).text
    assert text.startswith("data: ") and ": ping\n\n" in text and text.endswith("data: [DONE]\n\n")


def test_a_stream_says_that_it_is_alive_while_a_call_is_not_complete(demo_model, monkeypatch):
    """Its parts come, each before the time is over, and nothing is sent."""
    piece = Watch.piece
    monkeypatch.setattr(Watch, "piece", lambda *args: time.sleep(0.02) or piece(*args))
    monkeypatch.setattr(ChatFormat, "part", lambda *args: None)
    with serving(demo_model, limits=Limits(ping_seconds=0.1)) as server:
        text = server.chat(stream=True, **{**LONG, "max_tokens": 20}).text
    assert ": ping\n\n" in text and text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_ended(demo_model, stream):
    with serving(demo_model, limits=Limits(seconds=1.0)) as server:
        response = server.chat(stream=stream, **LONG)
        if stream:
            last, done = [line for line in response.text.split("\n\n") if line][-2:]
            assert response.status_code == 200 and done == "data: [DONE]"
            error = json.loads(last.removeprefix("data: "))["error"]
        else:
            assert response.status_code == 504
            error = response.json()["error"]
        assert error["type"] == "timeout_error" and "1 seconds" in error["message"]
        wait_for(lambda: server.service.admission.running == 0)


@pytest.mark.parametrize("failure", [QvlError("the model's logits hold nan"), RuntimeError("broken"), MemoryError()])
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_in_an_answer_is_told_in_openais_form(served, monkeypatch, caplog, stream, failure):
    def fail(self, *given):
        raise failure

    monkeypatch.setattr(Sampler, "__call__", fail)
    response = served.chat("my secret", stream=stream, temperature=1.0)
    status = 503 if isinstance(failure, MemoryError) else 500
    if stream:
        *_, last, done = [line for line in response.text.split("\n\n") if line]
        assert done == "data: [DONE]"
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert response.status_code == status
        error = response.json()["error"]
    assert error["type"] == ("unavailable_error" if status == 503 else "server_error")
    assert ("broken" in error["message"]) is False and "Traceback" not in response.text
    assert "my secret" not in caplog.text
    monkeypatch.undo()
    assert served.chat().status_code == 200


def test_a_refused_client_reads_why_though_its_body_was_not(demo_model):
    """Closing with unread bytes resets a connection, and the client never sees the status."""
    with serving(demo_model, limits=Limits(running=1, waiting=0)) as server:
        blocked = Blocked(server)
        large = request("x" * 5_000_000)
        for _ in range(3):
            with server.connect() as channel:
                channel.sendall(large)
                received = b""
                while chunk := channel.recv(65536):
                    received += chunk
            assert received.startswith(b"HTTP/1.1 429") and received.endswith(b"}")
        blocked.release()


def test_two_requests_in_one_connection_are_answered_in_order(served):
    first, second = request("one").replace(b"close", b"keep-alive", 1), request("two")
    with served.connect() as channel:
        channel.sendall(first + second)
        received = b""
        while chunk := channel.recv(65536):
            received += chunk
    assert received.count(b"HTTP/1.1 200") == 2


class _Transport:
    def __init__(self) -> None:
        self.unread = 0

    def get_write_buffer_size(self) -> int:
        return self.unread


@pytest.mark.parametrize(
    ("route", "fields"),
    [("/v1/chat/completions", {}), ("/v1/responses", {}), ("/v1/responses", {"stream": True}), ("/v1/tokenize", {})],
)
def test_a_long_answer_is_written_beside_the_event_loop(served, monkeypatch, route, fields):
    """The log probabilities of 8,000 tokens kept it from all other clients for six seconds."""
    lengths: dict[bool, list[int]] = {True: [], False: []}

    def longest(value) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return max([len(value) if isinstance(value, list) else 0, *map(longest, inner)])

    def dumps(value, **options) -> str:
        lengths[threading.current_thread() is loop_thread].append(longest(value))
        return json.dumps(value, **options)

    loop_thread = loop_thread_of(served)
    monkeypatch.setattr(json_text, "json", SimpleNamespace(**{**vars(json), "dumps": dumps}))
    asked = {**LONG, "logprobs": True, "include": ["message.output_text.logprobs"], **fields}
    asked |= {"max_tokens": 100, "max_output_tokens": 100}
    asked["text"] = {"format": {**asked["response_format"]["json_schema"], "type": "json_schema"}}
    asked |= {"prompt": "word " * 100} if route == "/v1/tokenize" else {"messages": [USER], "input": "Hi"}
    response = served.http.post(route, json=asked)
    assert response.status_code == 200, response.text
    assert max(lengths[True], default=0) < 10 and max(lengths[False]) == json_text.PIECE


def test_json_in_pieces_is_json():
    for value in (5, "ä\ud800", [], {}, [[]], {"": {}}, [{"a": list(range(n))} for n in (63, 64, 65, 128, 129)] * 40,
                  {"a": {"b": [{"c": [[[[[[["d"] * 70]]]]]]}] * 65, "e": None}}):  # fmt: skip
        assert json_text.to_json_in_pieces(value) == json_text.to_json(value)


def test_a_connection_is_stuck_when_nothing_is_sent_or_read():
    connection = object.__new__(listening.Connection)
    connection.transport, connection.cycle = _Transport(), None
    assert not connection.is_stuck(0) and not connection.is_stuck(listening.HEAD_SECONDS)
    assert connection.is_stuck(listening.HEAD_SECONDS + 1)  # no request came
    connection.cycle = type("Cycle", (), {"response_complete": False})()
    assert not connection.is_stuck(1000) and not connection.is_stuck(2000)  # it is being answered
    connection.transport.unread = 500
    assert not connection.is_stuck(2001)
    connection.transport.unread = 400  # some of it was read
    assert not connection.is_stuck(2001 + listening.WRITE_SECONDS)
    assert connection.is_stuck(2002 + 2 * listening.WRITE_SECONDS)  # nothing was
    connection.transport.unread = 0
    assert not connection.is_stuck(5000)
    for second in range(0, 2000, 50):  # a byte now and then
        connection.transport.unread = 10_000 - second
        assert connection.is_stuck(5001 + second) == (second > listening.SLOW_SECONDS)


def test_a_connection_with_short_requests_is_not_silent():
    """Each look finds it between two requests."""
    connection = object.__new__(listening.Connection)
    connection.transport = _Transport()
    for second in range(100):
        connection.cycle = type("Cycle", (), {"response_complete": True})()
        assert not connection.is_stuck(second)
    assert not connection.is_stuck(99 + listening.HEAD_SECONDS)
    assert connection.is_stuck(100 + listening.HEAD_SECONDS)


def test_a_piece_does_not_wait_for_the_one_before(served):
    """With Nagle's algorithm every answer, and most pieces of a stream, came 40 ms late."""
    assert served.http.get("/health").status_code == 200
    (connection, *_) = served.listener.server_state.connections
    assert connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_silent_connection_is_closed(demo_model, monkeypatch):
    monkeypatch.setattr(listening, "HEAD_SECONDS", 0.2)
    with serving(demo_model) as server:
        for sent in (b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: local"):
            with server.connect() as channel:
                channel.sendall(sent)
                with contextlib.suppress(ConnectionResetError):
                    assert channel.recv(1000) == b""


def test_an_idle_connection_is_kept_as_long_as_the_documentation_says(served):
    """Uvicorn's default is that of many clients: both would close it, or use it, in the same moment."""
    assert served.listener.config.timeout_keep_alive == listening.HEAD_SECONDS == 20


def test_no_thread_and_no_task_is_left(demo_model):
    before = threading.active_count()
    with serving(demo_model, limits=Limits(running=4, waiting=4, stop_seconds=0.3)) as server:
        channels = [server.connect() for _ in range(3)]
        for channel in channels:
            channel.sendall(request(stream=True, **LONG))
        wait_for(lambda: server.service.admission.running == 3)
        assert server.chat().status_code == 200
    # The server was stopped while three answers were computed: each was told so, and ended.
    for channel in channels:
        received = b""
        while chunk := channel.recv(65536):
            received += chunk
        channel.close()
        assert b"the server is stopping" in received and received.rstrip().endswith(b"0")
    wait_for(lambda: threading.active_count() <= before)


def test_an_upload_does_not_hold_up_the_end_of_the_server(demo_model, monkeypatch):
    monkeypatch.setattr("qvl_runtime.server.body.DROP_SECONDS", 0.1)
    with serving(demo_model, limits=Limits(body_seconds=5)) as server:
        channel = server.connect()
        channel.sendall(request()[:-5])
        wait_for(lambda: server.service.admission.inside == 1)
    with channel:
        assert channel.recv(65536).startswith(b"HTTP/1.1 503")


def test_a_server_needs_no_temporary_folder_and_no_reader_of_its_address(demo_model, monkeypatch, capsys):
    """A read-only container, and a service manager that has closed the pipe."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def no_folder(**options: str) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    def serve(app, bound: socket.socket, listening: Callable[[], None]) -> None:
        with contextlib.closing(bound), monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Closed())
            listening()
        served.append(app.state.service.name)

    served: list[str] = []
    monkeypatch.setattr(listening, "serve", serve)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", no_folder)
    with pytest.raises(SystemExit) as left:
        main(["serve", str(demo_model.blob.path), "--port", "0", "--device", "cpu"])
    assert (left.value.code, served) == (0, ["demo"]), capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["serve", "--demo", "--port", "0", "--device", "cpu"])
    assert left.value.code == 1 and capsys.readouterr().err == "qvl: No usable temporary directory found\n"


def test_terminating_the_server_finishes_running_answers(demo_model, tmp_path):
    command = [sys.executable, "-m", "qvl_runtime", "serve", str(demo_model.blob.path), "--port", "0", "--running", "1"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        url = re.search(r"http://\S+", server.stdout.readline())[0]
        body = {"messages": [{"role": "user", "content": "hi"}], **LONG, "max_tokens": 1500}
        told: list = []

        def wait_in_line() -> None:
            told.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code)

        waiting = threading.Thread(target=wait_in_line)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=60) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            waiting.start()
            wait_for(lambda: "qvl:num_requests_waiting 1.0" in httpx.get(f"{url}/metrics").text)
            server.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx.get(f"{url}/health").status_code == 503)
            refused = httpx.get(f"{url}/v1/models", timeout=60)
            late = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
            rest = [line for line in lines if line.startswith("data: ")]
        waiting.join(60)
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        assert refused.status_code == 200 and late.status_code == 503 and told == [503]
        assert late.json()["error"]["type"] == "unavailable_error"
        assert server.wait(30) == 0
        assert "Traceback" not in server.stderr.read()


def test_a_second_signal_ends_running_answers(demo_model, caplog):
    """They are told so: their connections are not cut, and no traceback is logged."""
    with serving(demo_model) as server, server.connect() as whole, server.connect() as stream:
        whole.sendall(request(**LONG))
        stream.sendall(request(stream=True, **LONG))
        assert stream.recv(65536).startswith(b"HTTP/1.1 200")
        wait_for(lambda: server.service.admission.running == 2)
        for _ in range(2):
            server.listener.handle_exit(signal.SIGTERM, None)
        told, rest = (b"".join(iter(partial(channel.recv, 65536), b"")) for channel in (whole, stream))
    assert told.startswith(b"HTTP/1.1 503") and b"the server is stopping" in told
    assert b"the server is stopping" in rest and rest.endswith(b"0\r\n\r\n")
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("ending", ["done", "stop"])
def test_a_client_that_leaves_as_its_turn_comes_passes_it_on(ending):
    async def scene() -> Admission:
        admission = Admission(Limits(running=1))
        began = await admission.turn()
        leaving, staying = (asyncio.ensure_future(admission.turn()) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        if ending == "stop":
            admission.stop()
        admission.done(began)
        with pytest.raises(asyncio.CancelledError):
            await leaving
        if ending == "stop":
            with pytest.raises(ApiError, match="stopping"):
                await staying
        else:
            admission.done(await staying)
        return admission

    admission = asyncio.run(scene())
    assert (admission.running, admission.waiting) == (0, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
@pytest.mark.parametrize(
    ("now", "most", "wanted"),
    [(1024, 1 << 20, 8192), (1024, 4096, 4096), (1 << 20, 1 << 20, None), (1024, -1, 8192), (-1, -1, None)],
)
def test_the_limit_of_open_files_is_raised_and_never_lowered(now, most, wanted, monkeypatch):
    limits = []
    monkeypatch.setattr(listening.resource, "getrlimit", lambda kind: (now, most))
    monkeypatch.setattr(listening.resource, "setrlimit", lambda kind, pair: limits.append(pair))
    listening.allow_connections()
    assert limits == ([] if wanted is None else [(wanted, most)])


def test_a_refused_request_leaves_no_pictures(demo_model, monkeypatch):
    """Not even until Python's next collection."""
    held = PreparedPictures.hold
    seen: list = []

    def hold(pictures, values):
        made = held(pictures, values)
        seen.append(weakref.ref(made))
        return made

    monkeypatch.setattr(PreparedPictures, "hold", hold)
    with serving(demo_model) as served:
        gc.disable()
        try:
            content = [image_part(png(picture(9))), {"type": "text", "text": "x " * demo_model.window}]
            assert served.chat(content).status_code == 400
            until = time.monotonic() + 10
            while any(made() is not None for made in seen) and time.monotonic() < until:
                time.sleep(0.01)
            assert seen and not any(made() is not None for made in seen)
        finally:
            gc.enable()


def test_freed_memory_is_returned_when_no_request_is_left(demo_model, monkeypatch):
    returned = threading.Event()
    monkeypatch.setattr(listening, "return_freed_memory", returned.set)
    with serving(demo_model) as served:
        assert not returned.wait(1.5)
        served.chat()
        assert returned.wait(20)
        returned.clear()
        assert not returned.wait(1.5), "once only"


FREED = """
import ctypes
from qvl_runtime.server.listening import return_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
blocks = [libc.malloc(1 << 16) for _ in range(512)]  # too small to be mapped one by one
last = libc.malloc(1 << 16)  # keeps the heap from shrinking
for block in blocks:
    ctypes.memset(block, 1, 1 << 16)
    libc.free(block)
before = resident()
return_freed_memory()
print(before - resident())
"""


LARGE = """
import numpy as np
from qvl_runtime.server.listening import map_large_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
map_large_memory()
np.ones(30 << 20, np.uint8)  # once one is freed, glibc would keep all that are as large
blocks = [np.ones(30 << 20, np.uint8) for _ in range(4)]
kept = np.ones(1 << 16, np.uint8)
before = resident()
del blocks
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")
@pytest.mark.parametrize("code", ["FREED", "LARGE"])
def test_freed_memory_goes_to_the_system(code):
    ran = subprocess.run([sys.executable, "-c", globals()[code]], capture_output=True, text=True, check=True)
    assert int(ran.stdout) > 16 << 20
