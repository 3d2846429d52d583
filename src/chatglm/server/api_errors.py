"""APIError: what a client is told when something is wrong, in one shape for everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "server_error",
}

CODES = frozenset(
    {
        "invalid_json",
        "duplicate_key",
        "missing_field",
        "unknown_field",
        "invalid_type",
        "invalid_value",
        "unsupported_value",
        "context_length_exceeded",
        "exceeds_kv_memory",
        "invalid_grammar",
        "invalid_unicode",
    }
)
"""Codes of status 400."""


class APIError(Exception):
    """An answer other than 200. `param` names the field, as `messages[2].content`."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        if status == 503:
            self.headers.setdefault("Retry-After", "1")

    def body(self, request_id: str) -> dict[str, Any]:
        """The JSON of the answer."""
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
                "request_id": request_id,
            }
        }


ENDINGS: dict[str, tuple[int, str]] = {
    "queue_timeout": (503, "the request waited too long for its turn"),
    "request_timeout": (504, "the request ran into the server's time limit"),
    "draining": (503, "the server is shutting down"),
    "engine_restarting": (503, "the engine is being restarted"),
    "non_finite_logits": (
        500,
        "the model's scores became NaN or infinite (damaged weights, or a dtype that overflows)",
    ),
    "grammar": (500, "the grammar could not be followed"),
    "slow_client": (500, "the answer was not read fast enough"),
    "overloaded": (503, "the server is at its limit"),
    "internal_error": (500, "something broke in the server; its log has more under this request id"),
}
"""Status and words for requests that the engine ended."""


def ending_error(code: str | None) -> APIError:
    """The error for a request that ended for this reason."""
    status, message = ENDINGS.get(code or "", ENDINGS["internal_error"])
    return APIError(status, code if code in ENDINGS else "internal_error", message)


def shown(value: object) -> str:
    """User data in a message: at most 64 characters, control characters escaped."""
    text = repr(value)
    return text if len(text) <= 64 else text[:61] + "..."
