"""The page at ``/``: three files of the package, and no other."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
}

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy: nothing from elsewhere, and no script but the page's file."""


def page_routes() -> list[Route]:
    """A route for each file of the page; they are read once."""
    return [_route(path, name, kind) for path, (name, kind) in FILES.items()]


def _route(path: str, name: str, kind: str) -> Route:
    content = files(__package__).joinpath("page", name).read_bytes()
    headers = {"Content-Type": kind, "Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}

    async def file(request: Request) -> Response:
        return Response(content, headers=headers)

    return Route(path, file, methods=["GET"])
