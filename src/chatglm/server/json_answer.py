"""JSON answers: compact, UTF-8 as it is."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response


def json_bytes(content: Any) -> bytes:
    """One line."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


class JsonAnswer(Response):
    """A whole answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json_bytes(content)
