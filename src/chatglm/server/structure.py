"""Which grammar a request asks for, if any."""

from __future__ import annotations

import json
from typing import Any

from . import grammar
from .conversation import usable_tools
from .schemas import ChatBody, Sampling


def grammar_of(body: Sampling) -> str | None:
    """A grammar in llguidance's form. Raises APIError `invalid_grammar`."""
    if isinstance(body, ChatBody):
        if body.forced_tool != "none" and usable_tools(body):
            return tool_grammar(body)
        form = body.response_format
        if form is not None and form.type == "json_object":
            return grammar.from_schema({"type": "object"})
        if form is not None and form.json_schema is not None:
            return grammar.from_schema(form.json_schema.schema_)
    if body.structured_outputs is None:
        return None
    (kind, content), *_ = body.structured_outputs.items()
    if kind == "json":
        return grammar.from_schema(content)
    if kind == "choice":
        return grammar.from_choice(content)
    return grammar.from_regex(content) if kind == "regex" else grammar.from_lark(content)


def tool_grammar(body: ChatBody) -> str:
    """A call of one of the tools; with `auto` also any text that does not begin with a brace."""
    calls: list[str] = []
    for tool in usable_tools(body):
        grammar.check_schema(tool.function.parameters, f"tools.{tool.function.name}.parameters")
        parameters: dict[str, Any] = {"type": "object", **tool.function.parameters}
        schema = {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": _without_ids(parameters)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
            "x-guidance": {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"},
        }
        if "$defs" in parameters:
            schema["$defs"] = parameters["$defs"]
        calls.append(f"%json {json.dumps(schema, ensure_ascii=False)}")
    rules = [f"call{number}: {call}" for number, call in enumerate(calls)]
    names = [f"call{number}" for number in range(len(calls))]
    if body.forced_tool == "auto":
        names.append("text")
        rules.append("text: /[^{](.|\\n)*/")
    return grammar.from_lark("\n".join([f"start: {' | '.join(names)}", *rules]))


def _without_ids(schema: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name not in ("$schema", "$id", "$defs")}
