"""A real server in a thread of the tests, and a client for it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
from PIL import Image

from qvl_runtime.cli.demo import fresh_scene
from qvl_runtime.demo.scenes import draw
from qvl_runtime.server import create_app
from qvl_runtime.server.listening import Listener, bind

QUESTION = "Describe the picture with boxes."


class Served:
    """A running server: its address, and its internal objects."""

    def __init__(self, app: Any, url: str, listener: Listener, loop: asyncio.AbstractEventLoop):
        self.app, self.url, self.listener, self.loop = app, url, listener, loop
        self.service = app.state.service
        self.port = int(url.rpartition(":")[2])
        self.http = httpx.Client(base_url=url, timeout=60)

    def openai(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def chat(self, content: Any = "hello", **fields: Any) -> httpx.Response:
        """One user's message."""
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def connect(self) -> socket.socket:
        """A raw connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def raw(self, head: str, body: bytes = b"") -> bytes:
        """Send bytes, and read until the server closes."""
        with self.connect() as channel:
            channel.sendall(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body)
            received = b""
            while chunk := channel.recv(65536):
                received += chunk
        return received


@contextlib.contextmanager
def serving(model: Any, **options: Any) -> Iterator[Served]:
    """A server of `model`, with the options of `create_app`."""
    app, bound, ready = create_app(model, "demo", **options), bind("127.0.0.1", 0), threading.Event()
    listener = Listener(app, ready.set)
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await listener.serve([bound])

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert ready.wait(30)
    served = Served(app, f"http://127.0.0.1:{bound.getsockname()[1]}", listener, loops[0])
    try:
        yield served
    finally:
        served.http.close()
        with contextlib.suppress(RuntimeError):
            loops[0].call_soon_threadsafe(listener.stop)
        thread.join(30)
        assert not thread.is_alive()


def picture(seed: int = 3, side: int = 448) -> Image.Image:
    """A picture with text that the demo model can read."""
    return draw(fresh_scene(np.random.default_rng(seed)), side)


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image_part(content: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(content)}}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end as OpenAI's do."""
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
