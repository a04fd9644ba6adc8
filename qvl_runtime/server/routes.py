"""The routes that tell about the server: models, tokens, health, metrics."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qvl_runtime.server.admission import STOPPING
from qvl_runtime.server.body import parsed, with_body
from qvl_runtime.server.errors import json_response, of_exception, refused, unavailable
from qvl_runtime.server.messages import read_messages
from qvl_runtime.server.requests import check_model, read_prompt
from qvl_runtime.server.service import Service


class ModelsRoute:
    """``/v1/models``: the one model that is served."""

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
                "title": model.blob.family.title(model.config, model.generation_config),
                "chat": model.is_chat,
                "pictures": model.pictures is not None,
                "window": model.window,
                "device": model.ops.name,
            },
        }

    async def all(self, request: Request) -> Response:
        """All models: a list of one."""
        return json_response({"object": "list", "data": [self._listed]})

    async def one(self, request: Request) -> Response:
        """The model of this name."""
        check_model({"model": request.path_params["name"]}, self._name)
        return json_response(self._listed)


class TokenizeRoute:
    """``/v1/tokenize``: the token ids of a text or of messages, pictures among them, as an ASGI application."""

    def __init__(self, service: Service):
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service

        async def handle(body: bytearray) -> None:
            async with service.parsing:
                try:
                    response = json_response(await asyncio.to_thread(self._tokenized, body))
                except Exception as error:
                    raise of_exception(error) from error
            await response(scope, receive, send)

        await with_body(service.admission, service.limits, scope, receive, send, handle)

    def _tokenized(self, body: bytearray) -> dict[str, Any]:
        service, data = self._service, parsed(body, self._service.limits)
        check_model(data, service.name)
        if (data.get("messages") is None) == (data.get("prompt") is None):
            raise refused("give either messages or prompt")
        if data.get("messages") is not None:
            ids = service.answerer.token_ids(read_messages(data["messages"], service.limits, service.allow_urls))
        else:
            ids = service.answerer.token_ids(read_prompt(data["prompt"], service.limits))
        return {"count": len(ids), "max_model_len": service.model.window, "tokens": ids}


class HealthRoute:
    """``/health``: whether requests are taken."""

    def __init__(self, service: Service):
        self._service = service

    async def show(self, request: Request) -> Response:
        """Status 200, or 503 while the server stops."""
        if self._service.admission.stopping:
            raise unavailable(STOPPING)
        return json_response({"status": "ok"})


class MetricsRoute:
    """``/metrics``, for Prometheus."""

    def __init__(self, service: Service):
        self._service = service

    async def show(self, request: Request) -> Response:
        """All metrics; no text of anybody is in them."""
        return Response(self._service.metrics.shown(), media_type=CONTENT_TYPE_LATEST)
