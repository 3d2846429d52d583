"""The gate in front of Gradio: a short list of routes passes, everything else is 404; pages get a strict policy."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from typing import Any

from ..api_errors import APIError
from ..backend import Backend
from ..border import App, Message, Receive, Scope, Send
from ..json_body import parse_body
from .access import PageAccess
from .answering import LiveAnswers
from .words import word

PAGES = frozenset({"", "/"})
READ = re.compile(
    r"/(config|theme\.css|manifest\.json|favicon\.ico|gradio_api/(app_id|info|startup-events|theme\.css|queue/data)"
    r"|gradio_api/heartbeat/[A-Za-z0-9]{1,64}"
    r"|(assets|static|svelte)/[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*){0,6})/?\Z",
    re.ASCII,
)
WRITTEN = re.compile(r"/key\Z|/gradio_api/(queue/join|cancel|reset)/?\Z", re.ASCII)
_REDIRECT: Message = {"type": "http.response.start", "status": 307}
STREAMS = ("/gradio_api/queue/data", "/gradio_api/heartbeat/")

POLL_S = 0.25
DRAINED_POLLS = 3
"""A draining server closes a page's stream so long after the last answer, which is on its way by then."""

_SCRIPT = re.compile(rb"<script(?![^>]*\bsrc=)[^>]*>(.*?)</script>", re.DOTALL | re.IGNORECASE)
_NAMING_OTHERS = re.compile(
    rb"<(?:meta|link)\b[^>]*https?://[^>]*>|<link\b[^>]*\bmanifest\.json[^>]*>|<script\b[^>]*\bsrc=\"https?://[^>]*>\s*</script>",
    re.IGNORECASE,
)


ICON = (
    b'<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns=%22http://www.w3.org/2000/svg%22 viewBox=%220 0 9 9%22%3E'
    b'%3Crect width=%229%22 height=%229%22 rx=%222%22 fill=%22%232563eb%22/%3E%3C/svg%3E">'
)
"""In the page itself, so that no browser asks for one elsewhere."""


class Gate:
    """Wraps the application; concerns itself with the paths at and below `path` only."""

    def __init__(
        self, app: App, path: str, backend: Backend, live: LiveAnswers, *, access: PageAccess, script: str, asking: str
    ) -> None:
        """script: put into the page's head; asking: the page that asks for a key (asking.html)."""
        self._access, self._asking = access, asking
        self._script = ICON + b"<script>" + script.encode() + b"</script></head>"
        self._app, self._path, self._backend, self._live = app, path, backend, live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or not (path == self._path or path.startswith(self._path + "/")):
            await self._app(scope, receive, send)
            return
        below = self._checked(scope, path)
        self._check_origin(scope)
        if below == "/key":
            await self._let_in(scope, receive, send)
            return
        if scope["method"] == "POST":
            receive = await self._checked_body(receive)
        if below == "":  # the page's own addresses are relative
            await send({**_REDIRECT, "headers": [(b"location", f"{self._path}/".encode()), (b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
        elif below == "/" and not self._access.is_open and scope["state"]["owner"].key_name is None:
            await self._ask(scope, send)
        elif below == "/":
            await self._page(scope, receive, send)
        elif below.startswith(STREAMS):
            await self._stream(scope, receive, send)
        else:
            await self._app(scope, receive, _Outgoing(send))

    def _checked(self, scope: Scope, path: str) -> str:
        """The path below the page's. Raises APIError 404 for what is not on the list."""
        below = path[len(self._path) :]
        raw = scope.get("raw_path") or path.encode()
        is_plain = raw == path.encode("ascii", "replace") and ".." not in path and "//" not in path
        allowed = {"GET": below in PAGES or READ.match(below), "POST": WRITTEN.match(below)}.get(scope["method"])
        if not is_plain or not allowed:
            raise APIError(404, "not_found", "there is nothing at this path")
        return below

    def _check_origin(self, scope: Scope) -> None:
        """Another site's page may not use this one. Raises APIError 403."""
        headers = dict(scope["headers"])
        origin, host = headers.get(b"origin"), headers.get(b"host", b"")
        if origin is not None and origin.split(b"://")[-1] != host:
            raise APIError(403, "forbidden", "the page's routes answer the page's own origin only")

    async def _checked_body(self, receive: Receive) -> Receive:
        """The border has read the body already. Raises APIError 400 for one that is no JSON or names a file."""
        message = await receive()
        if names_file(parse_body(message.get("body", b""))):
            raise APIError(400, "unsupported_value", "the page takes no files")
        given = [message]

        async def replayed() -> Message:
            return given.pop() if given else await receive()

        return replayed

    async def _ask(self, scope: Scope, send: Send) -> None:
        """The page that asks for a key, in the browser's language."""
        accepted = dict(scope["headers"]).get(b"accept-language", b"").decode("latin-1")
        body = asking_page(self._asking, f"{self._path}/key", "zh" if accepted.lower().startswith("zh") else "en")
        await _send_page(send, 401, body)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A key for a cookie. Raises APIError 401."""
        key = parse_body((await receive()).get("body", b"")).get("key")
        number = self._access.number_of_key(key) if isinstance(key, str) else None
        if number is None:
            await asyncio.sleep(0.5)  # guessing is slow
            raise APIError(401, "invalid_api_key", "this is not a key of this server")
        headers, client = dict(scope["headers"]), (scope.get("client") or ("",))[0]
        is_proxied = client in self._backend.settings.trusted_proxies
        is_secure = scope.get("scheme") == "https" or (is_proxied and headers.get(b"x-forwarded-proto") == b"https")
        cookie = self._access.cookie(number, is_secure=is_secure)
        await send({"type": "http.response.start", "status": 204, "headers": [(b"set-cookie", cookie.encode())]})
        await send({"type": "http.response.body", "body": b""})

    async def _page(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message = {}
        body = b""

        async def collect(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
            else:
                body += message.get("body", b"")

        scope = {**scope, "headers": [(k, v) for k, v in scope["headers"] if k != b"accept-encoding"]}
        await self._app(scope, receive, collect)
        await _send_page(send, start["status"], _NAMING_OTHERS.sub(b"", body).replace(b"</head>", self._script, 1))

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A stream ends when the server drains; with it, what its session was being answered."""
        query = re.search(rb"session_hash=([A-Za-z0-9]{1,64})(?:&|\Z)", scope.get("query_string", b""))

        async def listening() -> Message:
            waiting, idle = asyncio.ensure_future(receive()), 0
            try:
                while idle < DRAINED_POLLS:
                    await asyncio.wait({waiting}, timeout=POLL_S)
                    if waiting.done():
                        message = waiting.result()
                        if message["type"] == "http.disconnect" and query:
                            self._live.cancel(query[1].decode())
                        return message
                    is_over = self._backend.is_draining and not self._backend.num_live
                    idle = idle + 1 if is_over else 0
                return {"type": "http.disconnect"}
            finally:
                waiting.cancel()

        await self._app(scope, listening, _Outgoing(send))


async def _send_page(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"text/html; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    headers += [(b"content-security-policy", policy(body).encode()), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def asking_page(text: str, key_path: str, language: str) -> bytes:
    """The page that asks for a key, with its words."""
    values = {"LANGUAGE": language, "KEY_PATH": key_path}
    values |= {"PROMPT": "ask_key", "SEND": "send", "WRONG": "wrong_key", "FAILED": "unreachable"}
    for mark, value in values.items():
        text = text.replace(mark, value if mark in ("LANGUAGE", "KEY_PATH") else word(value, language))
    return text.encode()


class _Outgoing:
    """`send` without what Gradio allows other origins."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [(k, v) for k, v in message.get("headers", []) if not k.lower().startswith(b"access-control-")]
            message = {**message, "headers": [*kept, (b"content-security-policy", b"default-src 'none'")]}
        await self._send(message)


def names_file(value: Any) -> bool:
    """Whether JSON holds what Gradio would take for a file of this machine or of another."""
    if isinstance(value, dict):
        return "path" in value or "_type" in value or any(map(names_file, value.values()))
    return isinstance(value, list) and any(map(names_file, value))


def policy(page: bytes) -> str:
    """Content-Security-Policy of a page: its own inline scripts by their digests, nothing from or to another host.

    Gradio makes functions of the events' scripts (`unsafe-eval`) and sets styles inline.
    """
    digests = sorted({base64.b64encode(hashlib.sha256(script).digest()).decode() for script in _SCRIPT.findall(page)})
    scripts = " ".join(["'self'", "'unsafe-eval'", *(f"'sha256-{digest}'" for digest in digests)])
    return "; ".join(
        [
            "default-src 'self'",
            f"script-src {scripts}",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "connect-src 'self'",
            "object-src 'none'",
            "base-uri 'self'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        ]
    )
