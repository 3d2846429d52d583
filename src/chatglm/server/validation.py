"""From parsed JSON to a checked body: pydantic's findings in this server's words and codes."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from .api_errors import CODES, APIError, shown

B = TypeVar("B", bound=BaseModel)

REFUSED = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "this model writes text only",
    "prediction": "not offered",
    "web_search_options": "this server fetches nothing",
    "moderation": "not offered",
    "prompt_cache_options": "not offered",
    "prompt_cache_retention": "not offered",
    "best_of": "use n",
    "use_beam_search": "not offered here; `chatglm generate --num-beams` has it",
    "dimensions": "vectors have the model's width",
}

NO_EFFECT: dict[str, tuple[object, ...] | None] = {
    "metadata": None,
    "store": (False,),
    "service_tier": ("auto", "default"),
    "prompt_cache_key": None,
    "safety_identifier": None,
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "modalities": (["text"],),
    "chatglm": None,
}
"""Accepted without effect, with the values that may be sent (None: any)."""


def take_ignored(body: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The body without nulls and without fields that have no effect, and the names of the latter.

    Raises APIError for fields that are refused by name.
    """
    kept: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in body.items():
        if value is None:
            continue
        if name in REFUSED:
            raise APIError(400, "unsupported_value", f"`{name}` is not supported: {REFUSED[name]}", param=name)
        if name in NO_EFFECT:
            allowed = NO_EFFECT[name]
            if allowed is not None and not any(value == known and type(value) is type(known) for known in allowed):
                known = " or ".join(map(repr, allowed))
                raise APIError(400, "unsupported_value", f"`{name}` is {shown(value)}; only {known} is", param=name)
            ignored.append(name)
            continue
        kept[name] = value
    return kept, ignored


def check_body(kind: type[B], body: dict[str, Any]) -> B:
    """A body of this kind. Raises APIError 400 for the first thing that is wrong."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _translate(kind, error.errors(include_url=False)) from None


def _translate(kind: type[BaseModel], errors: list[Any]) -> APIError:
    found = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    place = _path(found["loc"])
    sort, value = found["type"], found.get("input")
    if sort == "extra_forbidden":
        name = str(found["loc"][-1])
        known = [field.alias or key for key, field in kind.model_fields.items()] if len(found["loc"]) == 1 else []
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return APIError(400, "unknown_field", f"unknown field {shown(place)}{hint}", param=place[:128])
    if sort == "missing":
        return APIError(400, "missing_field", f"`{place}` is missing", param=place)
    if sort in CODES:
        text = found["ctx"]["text"]
        param = f"{place}.{text.split()[0]}" if place.endswith("]") else place or text.split()[0]
        return APIError(400, sort, f"`{place}` {text}" if place else text, param=param)
    code = "invalid_type" if sort.endswith("_type") or sort == "int_from_float" else "invalid_value"
    hint = "; use temperature 0 for greedy" if place == "top_p" and not value else ""
    allowed = _range(kind, found["loc"]) or f"{found['msg'][:1].lower()}{found['msg'][1:]}"
    message = f"`{place}` is {shown(value)}: {allowed}{hint}"
    return APIError(400, code, message, param=place)


def _range(kind: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """The range of a number, in words; nothing for other fields."""
    field = kind.model_fields.get(str(loc[0])) if len(loc) == 1 else None
    bounds = {
        name: getattr(part, name)
        for part in (field.metadata if field else ())
        for name in _BOUNDS
        if hasattr(part, name)
    }
    if not bounds or any(isinstance(part, str) for part in bounds.values()):
        return ""
    words = [f"{_BOUNDS[name]} {bound:,}" for name, bound in bounds.items()]
    return f"it must be a number {' and '.join(words)}"


_BOUNDS = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path
