"""JSON as this server takes it: UTF-8, no duplicate keys, finite numbers of sane length, bounded depth."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from .api_errors import APIError, shown

MAX_DEPTH = 64
MAX_DIGITS = 32

_TOKENS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_body(raw: bytes) -> dict[str, Any]:
    """The object in a request body. Raises APIError 400 with the place."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise APIError(400, "invalid_unicode", f"the body is not UTF-8: byte {error.start}") from None
    check_depth(text)
    try:
        found = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_whole,
            parse_float=_finite,
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise APIError(400, "invalid_json", f"the body is not JSON: {error.msg} at {place}") from None
    if not isinstance(found, dict):
        raise APIError(400, "invalid_json", f"the body is a JSON {_kind(found)}; it must be an object (position 0)")
    if _SURROGATE.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise APIError(
                400, "invalid_unicode", "the body escapes half a character (a surrogate such as \\ud800 on its own)"
            ) from None
    return found


def check_depth(text: str) -> None:
    """Raises APIError for nesting beyond the limit, without recursion."""
    depth = 0
    for token in _TOKENS.finditer(text):
        first = text[token.start()]
        if first in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise APIError(
                    400, "invalid_json", f"the JSON is nested deeper than {MAX_DEPTH} at position {token.start()}"
                )
        elif first in "]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise APIError(400, "duplicate_key", f"the key {shown(key)} is there twice in one object", param=key[:64])
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise APIError(400, "invalid_json", f"{name} is not JSON; numbers must be finite")


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise APIError(400, "invalid_value", f"a number has {len(digits):,} digits; at most {MAX_DIGITS} are read")
    return int(digits)


def _finite(digits: str) -> float:
    if len(digits) > MAX_DIGITS:
        raise APIError(400, "invalid_value", f"a number has {len(digits):,} digits; at most {MAX_DIGITS} are read")
    value = float(digits)
    if not math.isfinite(value):
        raise APIError(400, "invalid_value", f"the number {digits} is too large")
    return value


def _kind(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
