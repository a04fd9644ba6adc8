"""Run a server in its own process for the benchmarks, and build their requests."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qvl_runtime.cli.demo import fresh_scene
from qvl_runtime.demo.scenes import draw


class Process:
    """A running server."""

    def __init__(self, url: str, process: subprocess.Popen):
        self.url, self.process = url, process
        self.port = int(url.rpartition(":")[2])

    def state(self) -> dict[str, int]:
        """Memory in MiB, threads, and open files, from /proc."""
        folder = Path(f"/proc/{self.process.pid}")
        status = (folder / "status").read_text()

        def number(name: str) -> int:
            return int(re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[1])

        return {
            "rss_mib": number("VmRSS") >> 10,
            "peak_mib": number("VmHWM") >> 10,
            "threads": number("Threads"),
            "files": len(list((folder / "fd").iterdir())),
        }


@contextlib.contextmanager
def running(model: Path | None, *options: str) -> Iterator[Process]:
    """Run a server of `model`, or of the demo model, until the end of the block; its log is discarded."""
    what = ["--demo"] if model is None else [str(model)]
    command = [sys.executable, "-m", "qvl_runtime", "serve", *what, "--port", "0", *options]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise SystemExit("the server did not start; run: qvl serve")
            yield Process(found[0], process)
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(90)
            process.kill()


def picture_uri(seed: int, side: int = 448) -> str:
    """A picture as a ``data:`` URI."""
    out = io.BytesIO()
    draw(fresh_scene(np.random.default_rng(seed)), side).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def body(number: int, picture: bool, tokens: int) -> dict[str, Any]:
    """A client's request, with its own text or its own picture."""
    content: Any = f"Question {number}: describe what a picture may show."
    if picture:
        url = {"type": "image_url", "image_url": {"url": picture_uri(number)}}
        content = [url, {"type": "text", "text": "Describe the picture with boxes."}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "stream": True}
