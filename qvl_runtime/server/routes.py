"""Informational routes: models, tokens, health, metrics."""

from __future__ import annotations

import asyncio
import functools
import time
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qvl_runtime.anthropic.requests import read_count
from qvl_runtime.inputs.tools import Tools
from qvl_runtime.openai.errors import refused, unavailable
from qvl_runtime.openai.fields import Fields
from qvl_runtime.openai.messages import Messages, read_messages
from qvl_runtime.openai.requests import check_model, read_prompt
from qvl_runtime.openai.tools import read_tools
from qvl_runtime.server.admission import STOPPING
from qvl_runtime.server.body import with_body
from qvl_runtime.server.json_text import to_json_in_pieces
from qvl_runtime.server.responses import json_response, written_response
from qvl_runtime.server.service import Service
from qvl_runtime.server.serving import next_event, problem_of, until_gone


class ModelsRoute:
    """``/v1/models``: the served model."""

    def __init__(self, service: Service):
        model = service.model
        self._name = service.name
        self._listed = {
            "id": service.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "qvl",
            "max_model_len": model.window,
            "qvl": {
                "title": model.blob.title,
                "chat": model.is_chat,
                "pictures": model.pictures is not None,
                "window": model.window,
                "device": model.ops.name,
            },
        }

    async def all(self, request: Request) -> Response:
        """List the model."""
        return json_response({"object": "list", "data": [self._listed]})

    async def one(self, request: Request) -> Response:
        """Describe the model with this name, which may have slashes; without one as `all`."""
        if not request.path_params["name"]:
            return await self.all(request)
        check_model({"model": request.path_params["name"]}, self._name)
        return json_response(self._listed)


class TokenizeRoute:
    """``/v1/tokenize``: the token ids of text or of messages with pictures, as an ASGI application."""

    def __init__(self, service: Service):
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service

        async def respond(prompt: Messages | str | list[int], tools: Tools | None) -> None:
            try:
                async with asyncio.timeout(service.limits.seconds):
                    job = functools.partial(service.answerer.tokenize, prompt, tools)
                    async with service.runner.run(job) as events:
                        ids = await next_event(events)
            except Exception as error:
                raise problem_of(error, service) from None
            written = await asyncio.to_thread(to_json_in_pieces, self._found(ids))
            await written_response(written)(scope, receive, send)

        async def handle(body: bytearray) -> None:
            await until_gone(receive, respond(*await service.checked(body, self._prompt)))

        await with_body(service.admission, service.limits, scope, receive, send, handle)

    def _found(self, ids: list[int]) -> dict[str, Any]:
        return {"count": len(ids), "max_model_len": self._service.model.window, "tokens": ids}

    def _prompt(self, data: dict[str, Any]) -> tuple[Messages | str | list[int], Tools | None]:
        limits = self._service.limits
        if (data.get("messages") is None) == (data.get("prompt") is None):
            raise refused("give either messages or prompt")
        if data.get("messages") is not None:
            messages = read_messages(data["messages"], limits, self._service.allow_urls)
            return messages, read_tools(Fields(data), limits)
        return read_prompt(data["prompt"], limits), None


class CountTokensRoute(TokenizeRoute):
    """``/v1/messages/count_tokens``: the number of tokens of a request for ``/v1/messages``."""

    def _found(self, ids: list[int]) -> dict[str, Any]:
        return {"input_tokens": len(ids)}

    def _prompt(self, data: dict[str, Any]) -> tuple[Messages, Tools | None]:
        return read_count(data, self._service.limits, self._service.allow_urls)


class HealthRoute:
    """``/health``: whether requests are accepted."""

    def __init__(self, service: Service):
        self._service = service

    async def show(self, request: Request) -> Response:
        """Respond with 200, or 503 while the server stops."""
        if self._service.admission.stopping:
            raise unavailable(STOPPING)
        return json_response({"status": "ok"})


class MetricsRoute:
    """``/metrics``, for Prometheus."""

    def __init__(self, service: Service):
        self._service = service

    async def show(self, request: Request) -> Response:
        """Return all metrics; they contain no request text."""
        return Response(self._service.metrics.shown(), media_type=CONTENT_TYPE_LATEST)
