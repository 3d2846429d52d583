"""The application: routes, errors in one shape, an OpenAPI document with the ranges that are enforced."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import Response

from .. import __version__
from .api_errors import APIError
from .backend import Backend
from .border import Border, ClientGone
from .feedback.body import FeedbackBody
from .json_answer import JsonAnswer
from .logs import RequestLog
from .requests import request_id_of
from .routes import chat, completions, embeddings, feedback, health, legacy, models, tokens
from .schemas import ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, LegacyBody, TokenizeBody

logger = logging.getLogger(__name__)

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/embeddings": EmbeddingBody,
    "/v1/feedback": FeedbackBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/": LegacyBody,
}


def build_app(backend: Backend, log: RequestLog) -> Border:
    """The whole server as an ASGI application."""
    app = FastAPI(title="chatglm", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.backend = backend
    routers = [chat.router, completions.router, models.router, embeddings.router, tokens.router, health.router]
    routers.append(feedback.router)
    for router in routers:
        app.include_router(router)
    if backend.settings.legacy_api:
        app.include_router(legacy.router)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(APIError, _api_error)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(Exception, _internal_error)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    if backend.settings.web:
        from .page.access import PageAccess
        from .page.mounting import mount_page  # gradio is another extra

        access = PageAccess(backend.settings.api_keys, backend.settings.web_path)
        return Border(mount_page(app, backend, access, log), backend, log, access)
    return Border(app, backend, log)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return JsonAnswer(error.body(request_id_of(request)), error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "internal_error")
    message = {404: "there is nothing at this path", 405: "this path takes another method"}
    found = APIError(error.status_code, code, message.get(error.status_code, str(error.detail)))
    found.headers |= dict(error.headers or {})
    return await _api_error(request, found)


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # for the log; nobody reads it


async def _internal_error(request: Request, error: Exception) -> Response:
    logger.error("request %s: %s", request_id_of(request), type(error).__name__)
    return await _api_error(request, APIError(500, "internal_error", "something broke in the server; see its log"))


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that routes read themselves."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        references, definitions = models_json_schema(
            [(kind, "validation") for kind in BODIES.values()], ref_template="#/components/schemas/{model}"
        )
        document.setdefault("components", {}).setdefault("schemas", {}).update(definitions.get("$defs", {}))
        for path, kind in BODIES.items():
            operation = document["paths"].get(path, {}).get("post")
            if operation is not None:
                schema = references[(kind, "validation")]
                operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                for status in ("400", "401", "404", "413", "415", "429", "503"):
                    operation["responses"][status] = {"description": "an error in the common shape"}
        app.openapi_schema = document
    return app.openapi_schema
