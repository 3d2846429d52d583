"""What Ray Serve's proxy answers by itself, in the common shape: no replica, no room, a replica that died.

Ray calls `middlewares` in its proxy (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, which server.replicas sets).
"""

from __future__ import annotations

import uuid

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api_errors import APIError
from .json_answer import json_bytes

RAYS_HEALTH = "/-/healthz"
"""Left as it is, for load balancers; Ray's other paths are not shown."""

REFUSALS = {
    404: APIError(503, "draining", "no replica serves at present: the server is starting or shutting down"),
    408: APIError(504, "request_timeout", "the request ran into the server's time limit"),
    429: APIError(503, "overloaded", "all replicas are at their limit"),
    503: APIError(503, "overloaded", "all replicas are at their limit, or none is healthy at present"),
}
"""By the status of an answer in plain text, which replicas never give for an error."""

DIED = APIError(503, "engine_restarting", "the replica that had this request is gone; another is being started")


def middlewares() -> list[Middleware]:
    """For Ray's proxy."""
    return [Middleware(CommonShape)]


class CommonShape:
    """Turns Ray's own answers into errors of this server. What a replica says passes as it is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == RAYS_HEALTH:
            await self._app(scope, receive, send)
            return
        given = {name.lower(): value for name, value in scope["headers"]}.get(b"x-request-id", b"")
        request_id = given.decode("latin-1") if 0 < len(given) <= 128 else uuid.uuid4().hex
        if scope["path"].startswith("/-/"):
            await _refuse(send, APIError(404, "not_found", "there is nothing at this path"), request_id)
            return
        started = replaced = False

        async def pass_on(message: Message) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start":
                started = True
                replaced = message["status"] >= 400 and _is_plain(message)
                if replaced:
                    error = REFUSALS.get(message["status"], APIError(500, "internal_error", "something broke"))
                    await _refuse(send, error, request_id)
            if not replaced:
                await send(message)

        await self._app(scope, receive, pass_on)
        if not started:  # the replica died before it said anything; a stream that had begun just breaks off
            await _refuse(send, DIED, request_id)


def _is_plain(message: Message) -> bool:
    headers = {name.lower(): value for name, value in message.get("headers", [])}
    return bytes(headers.get(b"content-type", b"")).startswith(b"text/plain")


async def _refuse(send: Send, error: APIError, request_id: str) -> None:
    body = json_bytes(error.body(request_id))  # Ray's proxy adds the header with the id
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    headers |= {name.lower(): value for name, value in error.headers.items()}
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
