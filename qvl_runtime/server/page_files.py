"""The page at ``/``: the files of the package's folder `page`."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy: only the page's own files, no inline script."""


def page_routes() -> list[Route]:
    """Return a route for each file of the page. Files are read now: no request names a file."""
    found = sorted(files(__package__).joinpath("page").iterdir(), key=lambda file: file.name)
    return [_route(file.name, file.read_bytes()) for file in found if file.name.rpartition(".")[2] in KINDS]


def _route(name: str, content: bytes) -> Route:
    kind = f"{KINDS[name.rpartition('.')[2]]}; charset=utf-8"
    headers = {"Content-Type": kind, "Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}

    async def file(request: Request) -> Response:
        return Response(content, headers=headers)

    return Route("/" if name == "index.html" else f"/{name}", file, methods=["GET"])
