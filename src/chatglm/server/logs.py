"""One line for each request: who, which model, tokens, times, how it ended. No prompt or answer, but on request."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import sys
import time
from typing import Any, TextIO

logger = logging.getLogger("chatglm.server")


PAGE_FILES = ("/assets/", "/static/", "/svelte/", "/gradio_api/", "/theme.css", "/config")
"""Routes of the chat page; its answers have lines of their own."""


class RequestLog:
    """Writes lines to stderr, as text or as JSON."""

    def __init__(self, *, as_json: bool, stream: TextIO | None = None) -> None:
        self._as_json = as_json
        self._stream = stream or sys.stderr

    def write(
        self, request_id: str, method: str, route: str, status: int, seconds: float, fields: dict[str, Any]
    ) -> None:
        """A request has ended."""
        if status == 200 and (route in ("/health", "/ready", "/metrics") or route.startswith(PAGE_FILES)):
            return  # probes and a page's files would drown the rest
        record = {"request_id": request_id, "method": method, "route": route, "status": status}
        self.event("request", **record, ms=round(seconds * 1000), **fields)

    def event(self, kind: str, **fields: Any) -> None:
        """Anything else that an operator should know."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        if self._as_json:
            line = json.dumps({"time": now, "event": kind, **fields}, ensure_ascii=True)
        else:
            line = f"{time.strftime('%H:%M:%S')} {kind} " + " ".join(f"{k}={_plain(v)}" for k, v in fields.items())
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone; serving goes on
            print(line, file=self._stream, flush=True)


def _plain(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)


def set_up_logging(log: RequestLog) -> None:
    """Warnings and errors of the engine and the server through the same lines."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            fields = {"level": record.levelname.lower(), "message": record.getMessage()}
            if record.exc_info and record.exc_info[0] is not None:
                fields["error"] = f"{record.exc_info[0].__name__}: {record.exc_info[1]}"
            log.event("log", **fields)

    root = logging.getLogger("chatglm")
    root.handlers = [Handler(level=logging.WARNING)]
    root.propagate = False
