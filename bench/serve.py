"""Throughput and time to first token of `qvl serve` by number of clients.

    python bench/serve.py [MODEL.qvl] [--clients 1 2 4 8 16] [--tokens 32] [--requests 32] [--device cpu]
    python bench/serve.py [MODEL.qvl] --crowd 1000 [--waiting 64] [--device cpu]

Every client asks its own questions, one after the other. `--crowd` starts that many clients at the same time; some of
them read slowly and some disconnect. Without a model the demo model is served.
"""

from __future__ import annotations

import asyncio
import collections
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import harness
import httpx
from served import Process, body, running

from qvl_runtime.openai.limits import Limits


async def one(client: httpx.AsyncClient, request: dict[str, Any]) -> tuple[float, float, int]:
    """Ask once: seconds to the first token and to the end, and the number of tokens."""
    began, first, tokens = time.perf_counter(), 0.0, 0
    options = {"stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/chat/completions", json={**request, **options}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not first and '"delta":{"content":"' in line:
                first = time.perf_counter() - began
            if line.startswith("data: {") and '"choices":[]' in line:
                tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    return first, time.perf_counter() - began, tokens


async def measure(url: str, clients: int, requests: list[dict[str, Any]]) -> dict[str, float]:
    """Send all requests with this number of clients."""
    left = collections.deque(requests)
    results: list[tuple[float, float, int]] = []

    async def client(http: httpx.AsyncClient) -> None:
        while left:
            results.append(await one(http, left.popleft()))

    async with httpx.AsyncClient(base_url=url, timeout=3600) as http:
        began = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        seconds = time.perf_counter() - began
    firsts = sorted(result[0] for result in results)
    return {
        "tokens_per_second": sum(result[2] for result in results) / seconds,
        "requests_per_second": len(results) / seconds,
        "first_token_median": statistics.median(firsts),
        "first_token_worst": firsts[-1],
        "whole_median": statistics.median(result[1] for result in results),
    }


def throughput(process: Process, counts: list[int], number: int, tokens: int) -> list[dict[str, Any]]:
    """A row for each number of clients, with text and with pictures; every request is a new one."""
    rows, asked = [], 0
    asyncio.run(measure(process.url, 1, [body(10**6, picture, tokens) for picture in (False, True)]))
    for picture in (False, True):
        for clients in counts:
            requests = [body(asked + i, picture, tokens) for i in range(number)]
            asked += number
            rows.append(
                {"what": "pictures" if picture else "text", "clients": clients}
                | asyncio.run(measure(process.url, clients, requests))
            )
            row = rows[-1]
            print(
                f"{row['what']:9s}{clients:4d} clients {row['tokens_per_second']:8.1f} tokens/s "
                f"{row['requests_per_second']:7.2f} requests/s   first token {row['first_token_median']:6.2f} s, "
                f"at worst {row['first_token_worst']:6.2f} s",
                flush=True,
            )
    return rows


KINDS = {"whole": 0.5, "stream": 0.2, "picture": 0.05, "slow": 0.1, "drops early": 0.05, "drops late": 0.1}
"""Kinds of clients with `--crowd`, and their shares."""


async def crowd_client(port: int, kind: str, content: bytes) -> str:
    """Run one client; how it ended."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    try:
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + content)
        await writer.drain()
        if kind == "drops early":
            await asyncio.sleep(random.random())
            return "dropped"
        received = b""
        while chunk := await reader.read(256 if kind == "slow" else 65536):
            received += chunk
            if kind == "slow":
                await asyncio.sleep(0.05)
            if kind == "drops late" and b'"delta":{"content":"' in received:
                return "dropped"
        status = received[9:12].decode()
        complete = b"data: [DONE]" in received or (kind == "whole" and received.endswith(b"}"))
        if status == "429" and b"retry-after" in received:
            return "429"
        return "200" if status == "200" and complete else f"{status}, cut off"
    finally:
        writer.close()


async def crowd(process: Process, count: int, tokens: int) -> dict[str, Any]:
    """Run clients that all connect at the same time."""
    kinds = random.Random(0).choices(list(KINDS), list(KINDS.values()), k=count)
    asked = [body(i, kind == "picture", tokens) | {"stream": kind != "whole"} for i, kind in enumerate(kinds)]
    contents = [json.dumps(request).encode() for request in asked]
    asking = [crowd_client(process.port, kind, content) for kind, content in zip(kinds, contents)]
    began = time.perf_counter()
    results = await asyncio.gather(*asking, return_exceptions=True)
    seconds = time.perf_counter() - began
    ends = collections.Counter(result if isinstance(result, str) else type(result).__name__ for result in results)
    return {"clients": count, "seconds": seconds, "ends": dict(ends)}


def settled(process: Process) -> dict[str, Any]:
    """The state of the server when no request is left."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        shown = httpx.get(f"{process.url}/metrics", timeout=60).text
        if "qvl:num_requests_running 0.0" in shown and "qvl:num_requests_waiting 0.0" in shown:
            break
        time.sleep(0.2)
    time.sleep(7)  # uvicorn closes connections that are kept alive after 5 s
    return process.state()


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--crowd", type=int)
    parser.add_argument("--waiting", type=int, default=Limits.waiting)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    with running(arguments.model, "--device", arguments.device, "--waiting", str(arguments.waiting)) as process:
        if arguments.crowd:
            asyncio.run(crowd(process, 16, arguments.tokens))  # loads everything before the first reading
            before = settled(process)
            results = asyncio.run(crowd(process, arguments.crowd, arguments.tokens))
            results |= {"before": before, "at the end": process.state(), "after": settled(process)}
            for name, value in results.items():
                print(f"{name:12s}{value}")
        else:
            results = {"rows": throughput(process, arguments.clients, arguments.requests, arguments.tokens)}
    what = "demo" if arguments.model is None else arguments.model.name
    harness.print_document(model=what, device=arguments.device, **results)


if __name__ == "__main__":
    main()
