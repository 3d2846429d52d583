"""Border: what every request passes before a route sees it, and every answer on its way out.

Order: request id, path, host, origin, key, rate, media type, body (with its size and time limits). Plain ASGI, so that
a refused request's body is never read.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from .api_errors import APIError
from .backend import Backend, Owner
from .json_answer import json_bytes
from .logs import RequestLog
from .settings import ServerSettings, is_loopback

if TYPE_CHECKING:
    from .page.access import PageAccess

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_PATH = 8 << 10
MAX_IN_FLIGHT = 16 << 20
"""Bytes of bodies that one address may have under way."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
OPEN_PATHS = frozenset({"/health", "/ready"})
LIMITED_PREFIXES = ("/v1/chat", "/v1/completions", "/v1/embeddings", "/v1/feedback")
"""Routes that count against rates."""


class Border:
    """Wraps the application."""

    def __init__(self, app: App, backend: Backend, log: RequestLog, page: PageAccess | None = None) -> None:
        self._page = page
        self._app = app
        self._backend = backend
        self._settings: ServerSettings = backend.settings
        self._log = log
        self._keys = [(hashlib.sha256(key.encode()).digest(), name) for key, name in backend.settings.api_keys.items()]
        self._in_flight: dict[str, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        fields: dict[str, Any] = {}
        state["log"] = fields
        outgoing = _Outgoing(send, request_id)
        began = time.monotonic()
        try:
            await self._pass(scope, headers, receive, outgoing)
        except APIError as error:
            await self._refuse(outgoing, error, request_id, headers)
        except ClientGone:
            outgoing.status = outgoing.status or 499
        except asyncio.CancelledError:
            outgoing.status = outgoing.status or 499
            raise
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "") or ("other" if outgoing.status in (404, 414) else scope["path"][:64])
            metrics = self._backend.metrics
            metrics.count(metrics.http, path, str(outgoing.status))
            self._log.write(request_id, scope["method"], path, outgoing.status, time.monotonic() - began, fields)

    async def _pass(self, scope: Scope, headers: dict[str, str], receive: Receive, outgoing: _Outgoing) -> None:
        path = scope["path"]
        if len(scope.get("raw_path") or b"") + len(scope.get("query_string", b"")) > MAX_PATH:
            raise APIError(414, "uri_too_long", f"the path is longer than {MAX_PATH:,} bytes")
        self._check_host(headers)
        origin = headers.get("origin")
        if origin is not None and origin in self._settings.cors_origins:
            outgoing.extra |= {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                outgoing.extra |= {
                    "Access-Control-Allow-Methods": "GET, POST, DELETE",
                    "Access-Control-Allow-Headers": "authorization, content-type, x-request-id",
                    "Access-Control-Max-Age": "600",
                }
                await outgoing.answer(204, b"")
                return
        owner = self._owner(scope, headers)
        scope["state"]["owner"] = owner
        if owner.key_name:
            scope["state"]["log"]["key"] = owner.key_name
        if path.startswith(LIMITED_PREFIXES) and scope["method"] == "POST":
            try:
                outgoing.extra |= self._backend.rates.admit(owner.bucket)
            except APIError:
                metrics = self._backend.metrics
                metrics.count(metrics.rate_limited)
                raise
        if scope["method"] != "POST":
            await self._app(scope, receive, outgoing)
            return
        self._check_media(headers)
        address = self._address(scope, headers)
        body = await self._read(headers, receive, address)
        try:
            await self._app(scope, _replay(body, receive), outgoing)
        finally:
            self._in_flight[address] -= len(body)
            if not self._in_flight[address]:
                del self._in_flight[address]

    # Who, from where

    def _check_host(self, headers: dict[str, str]) -> None:
        """A page of another host that resolves to this machine must not reach a local server."""
        if not self._settings.is_loopback:
            return
        host = re.sub(r":\d+\Z", "", headers.get("host", "localhost")).strip("[]")
        if not is_loopback(host.lower()):
            raise APIError(403, "forbidden", f"the Host header names {host[:64]!r}, this server serves localhost only")

    def _address(self, scope: Scope, headers: dict[str, str]) -> str:
        address = str((scope.get("client") or ("unknown", 0))[0])
        forwarded = headers.get("x-forwarded-for")
        if forwarded and address in self._settings.trusted_proxies:
            return forwarded.rsplit(",", 1)[-1].strip()[:64]
        return address

    def _owner(self, scope: Scope, headers: dict[str, str]) -> Owner:
        """Raises APIError 401. The key is compared as a digest, in constant time."""
        address = self._address(scope, headers)
        path = scope["path"]
        is_open = path in OPEN_PATHS or (path == "/metrics" and self._settings.is_loopback)
        if not self._keys or is_open:
            return Owner(f"address {address}")
        if self._page is not None and self._page.covers(path):
            name = self._page.name_of_cookie(headers.get("cookie", ""))
            if name is not None:
                return Owner(f"key {name}", name)
            if self._page.asks_at(path):
                return Owner(f"address {address}")
        kind, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        found = None
        for known, name in self._keys:
            if hmac.compare_digest(known, digest):
                found = name
        if kind.lower() != "bearer" or found is None:
            what = "no API key" if not key else "a wrong API key"
            raise APIError(
                401,
                "invalid_api_key",
                f"{what}; send `Authorization: Bearer <key>`",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return Owner(f"key {found}", found)

    # The body

    def _check_media(self, headers: dict[str, str]) -> None:
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise APIError(415, "unsupported_media_type", "compressed bodies are not read; send it as it is")
        media = headers.get("content-type", "").split(";")[0].strip().lower()
        if media != "application/json":
            raise APIError(
                415, "unsupported_media_type", f"Content-Type is {media[:64]!r}; it must be application/json"
            )

    async def _read(self, headers: dict[str, str], receive: Receive, address: str) -> bytes:
        """The body, within its limits. Raises APIError 408 or 413, ClientGone."""
        limit = self._settings.max_body
        too_large = APIError(
            413,
            "body_too_large",
            f"the body is larger than {limit:,} bytes (--max-body)",
            headers={"Connection": "close"},
        )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:18]) > limit:
            raise too_large
        deadline = time.monotonic() + self._settings.read_timeout_s
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise APIError(
                    408,
                    "read_timeout",
                    f"the body did not arrive within {self._settings.read_timeout_s:g} s",
                    headers={"Connection": "close"},
                ) from None
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise too_large
            if self._in_flight.get(address, 0) + size > MAX_IN_FLIGHT:
                raise APIError(503, "overloaded", "too many bytes of requests from this address are under way")
            parts.append(part)
            more = message.get("more_body", False)
        self._in_flight[address] = self._in_flight.get(address, 0) + size
        return b"".join(parts)

    async def _refuse(self, outgoing: _Outgoing, error: APIError, request_id: str, headers: dict[str, str]) -> None:
        if outgoing.status:
            raise error  # too late for a status
        body = json_bytes(error.body(request_id))
        outgoing.extra |= error.headers
        if int(headers.get("content-length", "0")[:9] or 0) if headers.get("content-length", "").isdecimal() else True:
            outgoing.extra["Connection"] = "close"  # part of the body may not have been read
        await outgoing.answer(error.status, body)


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


class _Outgoing:
    """`send` that adds this server's headers and remembers the status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.status = 0
        self.extra: dict[str, str] = {
            "X-Request-Id": request_id,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            added = [(name.lower().encode(), value.encode("latin-1")) for name, value in self.extra.items()]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await self._send(message)

    async def answer(self, status: int, body: bytes) -> None:
        """A whole answer."""
        headers = [(b"content-length", str(len(body)).encode())]
        if body:
            headers.append((b"content-type", b"application/json"))
        await self({"type": "http.response.start", "status": status, "headers": headers})
        await self({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives the body that was read, then what comes after it."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed
