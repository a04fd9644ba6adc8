"""`qvl serve`: serve a model with OpenAI's API."""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import re
import sys
import tempfile
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated

import typer

from qvl_convert.convert import convert
from qvl_runtime.cli.loading import (
    Activations,
    AllowUrls,
    ContextTokens,
    Device,
    KVCache,
    MaxPixels,
    VisionDevice,
    load_shown,
)
from qvl_runtime.cli.text import one_line
from qvl_runtime.demo import checkpoint_folder
from qvl_runtime.engine.scheduler import MAX_BATCH
from qvl_runtime.errors import QvlError
from qvl_runtime.file.opening import read_regular

KEY_VARIABLE = "QVL_API_KEY"
KEY_FILE_BYTES = 64 << 10
SHORTEST_KEY = 16
CONVERSATIONS = 4
"""Number of cached conversations: each may take a gigabyte."""


def serve(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", help="A .qvl file.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Serve the small model that comes with the package.")] = False,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8080,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"A file of keys, one a line; or set {KEY_VARIABLE} to one key.")
    ] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Serve other machines without a key.")] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A host name of this server; repeat for several.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A web origin that may send requests; repeat for several.")
    ] = None,
    running: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Requests to compute concurrently.")] = 16,
    waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; others are refused.")] = 64,
    log_content: Annotated[bool, typer.Option("--log-content", help="Log requests and answers.")] = False,
    allow_urls: AllowUrls = False,
    device: Device = "auto",
    kv_cache: KVCache = "fp16",
    activations: Activations = "auto",
    context: ContextTokens = None,
    vision_device: VisionDevice = None,
    max_pixels: MaxPixels = None,
) -> None:
    """Serve a .qvl file over HTTP: OpenAI's API, and a page at /.

    By default only this machine has access. With another --host clients need a key. Ctrl+C waits for running
    answers.

    \b
    Examples:
      qvl serve qwen-vl-chat.qvl
      qvl serve --demo
      QVL_API_KEY=... qvl serve qwen-vl-chat.qvl --host 0.0.0.0
    """
    if (model is None) != demo:
        raise typer.BadParameter("give either a .qvl file or --demo")
    for name in ("starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise QvlError(f"qvl serve needs the package {name}; install it with: pip install 'qvl-runtime[serve]'")
    from qvl_runtime.server import Limits, create_app
    from qvl_runtime.server.listening import bind, serve

    keys = _keys(api_key_file)
    _check_address(host, keys, no_key)
    bind(host, port).close()  # an error before the model is loaded; nobody is kept waiting meanwhile
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("qvl_runtime.server").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="qvl-demo-") if model is None else nullcontext(model) as place:
        path = _demo(Path(place)) if model is None else model
        loaded = load_shown(
            path,
            device,
            kv_cache,
            activations=activations,
            context=context,
            vision_device=vision_device,
            max_pixels=max_pixels,
            conversations=CONVERSATIONS,
            max_batch=running,
        )
        app = create_app(
            loaded,
            api_keys=keys,
            allow_hosts=allow_host or (),
            allow_origins=allow_origin or (),
            allow_urls=allow_urls,
            log_content=log_content,
            limits=Limits(running=running, waiting=waiting),
        )
        bound = bind(host, port)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{bound.getsockname()[1]}"
        serve(app, bound, lambda: _tell(one_line(f"qvl: serving {app.state.service.name} at {address}")))


def _tell(line: str) -> None:
    """Print a line. If nobody reads it, as with a service manager that closed the pipe, requests are still answered."""
    with suppress(OSError):
        print(line, flush=True)


def _demo(folder: Path) -> Path:
    """Convert the model of the package."""
    blob = folder / "demo.qvl"
    convert(checkpoint_folder(), blob)
    return blob


def _keys(path: Path | None) -> list[str]:
    """Return the keys of a file and of the environment."""
    keys = []
    if path is not None:
        try:
            text = read_regular(path, limit=KEY_FILE_BYTES).decode("ascii")
        except UnicodeDecodeError:
            raise QvlError(f"{path}: a key must be ASCII; write one key a line") from None
        keys = [line.strip() for line in text.splitlines() if line.strip()]
        if not keys:
            raise QvlError(f"{path}: has no key; write one key a line")
    if os.environ.get(KEY_VARIABLE):
        keys.append(os.environ[KEY_VARIABLE].strip())
    if any(len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        places = " and ".join([str(path)] * (path is not None) + [KEY_VARIABLE] * (KEY_VARIABLE in os.environ))
        raise QvlError(
            f"{places}: a key must be {SHORTEST_KEY} or more ASCII characters without blanks; make one longer"
        )
    return keys


def _check_address(host: str, keys: list[str], no_key: bool) -> None:
    if found := re.fullmatch(r"\[(.*)\](?::(\d+))?|([^:]*):(\d+)", host):
        name, port = found[1] or found[3], found[2] or found[4]
        raise QvlError(f"--host {host}: give the address alone, --host {name}" + (f" --port {port}" if port else ""))
    if keys or no_key or _is_loopback(host):
        return
    raise QvlError(
        f"--host {host}: other machines could ask without a key; set {KEY_VARIABLE} or --api-key-file, or use --no-key"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
