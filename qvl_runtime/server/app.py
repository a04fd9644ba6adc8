"""The server as an ASGI application."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence, Set

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qvl_runtime.anthropic.reply import MessageReply
from qvl_runtime.anthropic.requests import read_message
from qvl_runtime.errors import QvlError
from qvl_runtime.model import Model
from qvl_runtime.openai.answers import call_reader
from qvl_runtime.openai.errors import ApiError, of_exception
from qvl_runtime.openai.formats import ChatFormat, Choices, Reply, TextFormat
from qvl_runtime.openai.limits import Limits
from qvl_runtime.openai.requests import Asked, read_chat, read_completion
from qvl_runtime.openai.response_reply import ResponseReply
from qvl_runtime.openai.response_requests import ResponseAsked, read_response
from qvl_runtime.server.openapi import openapi_route
from qvl_runtime.server.page_files import page_routes
from qvl_runtime.server.responses import MESSAGES, error_response
from qvl_runtime.server.routes import CountTokensRoute, HealthRoute, MetricsRoute, ModelsRoute, TokenizeRoute
from qvl_runtime.server.security import Security, check_names
from qvl_runtime.server.service import Service
from qvl_runtime.server.serving import AnswerRoute, log_error

log = logging.getLogger(__name__)


def create_app(
    model: Model,
    name: str | None = None,
    *,
    api_keys: Sequence[str] = (),
    allow_hosts: Sequence[str] = (),
    allow_origins: Sequence[str] = (),
    allow_urls: bool = False,
    log_content: bool = False,
    limits: Limits | None = None,
) -> Starlette:
    """Create the ASGI application that serves a model.

    Parameters
    ----------
    model : Model
    name : str, optional
        Name of the model for clients; by default the file's name without its extension.
    api_keys : sequence of str
        Accepted keys. If empty, no key is needed.
    allow_hosts : sequence of str
        Accepted names in a request's ``Host``, in addition to ``localhost`` and any IP address.
    allow_origins : sequence of str
        Web origins that may send requests, as ``https://example.org``.
    allow_urls : bool
        Allow pictures from http(s) URLs with public addresses.
    log_content : bool
        Log requests and answers.
    limits : Limits, optional

    Returns
    -------
    Starlette
        ``state.service`` is the `Service`. The end of the lifespan waits for running answers.

    Raises
    ------
    QvlError
        For a str instead of a list of str, or a host or origin that no request can have.
    """
    for option, given in (("api_keys", api_keys), ("allow_hosts", allow_hosts), ("allow_origins", allow_origins)):
        if isinstance(given, str):  # its characters would be the items
            raise QvlError(f"{option} is a str; expected a list of str")
    check_names(allow_hosts, allow_origins)
    service = Service(
        model,
        model.blob.path.stem if name is None else name,
        Limits() if limits is None else limits,
        allow_urls=allow_urls,
        log_content=log_content,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await service.stop()

    page, health = page_routes(), Route("/health", HealthRoute(service).show, methods=["GET"])
    routes = [*_routes(service), health, *page]
    # Routes without a key: they reveal nothing about requests.
    open_paths = frozenset(route.path for route in (health, *page))
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(_Record, service=service, paths={route.path for route in routes}),
            Middleware(Security, open_paths=open_paths, keys=api_keys, hosts=allow_hosts, origins=allow_origins),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


def _routes(service: Service) -> list[Route]:
    own, limits = service.model.generation_config, service.limits
    tokenizer = service.model.tokenizer

    def chat_reply(asked: Asked) -> Reply:
        reader, call = call_reader(service.model, asked), f"call_{secrets.token_hex(12)}"
        form = ChatFormat(tokenizer, asked.logprobs is not None, reader, call)
        return Choices(
            form, asked, service.name, kind="chat.completion", chunk="chat.completion.chunk", prefix="chatcmpl"
        )

    def completion_reply(asked: Asked) -> Reply:
        form = TextFormat(tokenizer, asked.logprobs is not None)
        return Choices(form, asked, service.name, kind="text_completion", chunk="text_completion", prefix="cmpl")

    def response_reply(asked: ResponseAsked) -> Reply:
        reader, number = call_reader(service.model, asked), secrets.token_hex(12)
        return ResponseReply(asked, tokenizer, service.name, reader, number, int(time.time()))

    def message_reply(asked: Asked) -> Reply:
        return MessageReply(service.name, call_reader(service.model, asked), secrets.token_hex(12))

    chat = AnswerRoute(service, lambda data: read_chat(data, limits, own, service.allow_urls), chat_reply)
    completion = AnswerRoute(service, lambda data: read_completion(data, limits, own), completion_reply)
    response = AnswerRoute(service, lambda data: read_response(data, limits, own, service.allow_urls), response_reply)
    message = AnswerRoute(service, lambda data: read_message(data, limits, own, service.allow_urls), message_reply)
    models = ModelsRoute(service)
    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/responses", response, methods=["POST"]),
        Route(MESSAGES, message, methods=["POST"]),
        Route(f"{MESSAGES}/count_tokens", CountTokensRoute(service), methods=["POST"]),
        Route("/v1/completions", completion, methods=["POST"]),
        Route("/v1/tokenize", TokenizeRoute(service), methods=["POST"]),
        Route("/v1/models", models.all, methods=["GET"]),
        Route("/v1/models/{name:path}", models.one, methods=["GET"]),
        Route("/metrics", MetricsRoute(service).show, methods=["GET"]),
        openapi_route(limits),
    ]


class _Record:
    """ASGI middleware that counts and logs responses by route, without contents."""

    def __init__(self, app: ASGIApp, service: Service, paths: Set[str]):
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            # Not propagated: outer layers would log the message, which may contain a prompt.
            log_error(error, self._service.log_content)
            if not status:
                await error_response(of_exception(error), scope["path"])(scope, receive, sending)
        finally:
            route = scope["path"] if scope["path"] in self._paths else "other"
            self._service.metrics.response(route, status)
            log.info("%s %s %d %.3f s", scope["method"], route, status, time.monotonic() - began)


async def _api_error(request: Request, error: Exception) -> Response:
    return error_response(of_exception(error), request.scope["path"])


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = str(error.detail)
    if error.status_code == 404:
        said = "there is no such route; GET /openapi.json lists them"
    elif error.status_code == 405:
        said = f"this route takes no {request.method}; use {(error.headers or {}).get('Allow')}"
    return error_response(ApiError(error.status_code, said), request.scope["path"], error.headers)
