"""Messages → what the chat template takes: a system text, earlier rounds, the question."""

from __future__ import annotations

import json
from dataclasses import dataclass

from .api_errors import APIError
from .schemas import ChatBody, Message, Tool


@dataclass(frozen=True)
class Conversation:
    """Rounds oldest first."""

    system: str | None
    rounds: list[tuple[str, str]]
    question: str


def read_messages(messages: list[Message], extra_system: str = "") -> Conversation:
    """Neighbours of one role are joined by a newline. Raises APIError when no question comes last."""
    if messages[-1].role not in ("user", "tool"):
        raise APIError(400, "invalid_value", "the last message must be of role user or tool", param="messages")
    systems = [extra_system] if extra_system else []
    turns: list[tuple[str, str]] = []  # (user or assistant, text)
    for message in messages:
        text = message.content or ""
        if message.role in ("system", "developer"):
            systems.append(text)
            continue
        side = "assistant" if message.role == "assistant" else "user"
        if message.tool_calls:
            calls = [{"name": c.function.name, "arguments": _json(c.function.arguments)} for c in message.tool_calls]
            text = "\n".join(part for part in [text, *(json.dumps(call, ensure_ascii=False) for call in calls)] if part)
        if message.role == "tool":
            text = f"Result of the tool: {text}"
        if turns and turns[-1][0] == side:
            turns[-1] = side, f"{turns[-1][1]}\n{text}"
        else:
            turns.append((side, text))
    if turns[0][0] == "assistant":
        turns.insert(0, ("user", ""))
    texts = [text for _, text in turns]
    rounds = list(zip(texts[0:-1:2], texts[1:-1:2], strict=True))
    return Conversation("\n".join(systems) or None, rounds, texts[-1])


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def tool_text(body: ChatBody) -> str:
    """The documented prompt about tools; empty where none may be called."""
    if not body.tools or body.forced_tool == "none":
        return ""
    lines = ['You can call these tools. To call one, answer only with JSON: {"name": …, "arguments": {…}}.']
    for tool in usable_tools(body):
        function = tool.function
        parameters = json.dumps(function.parameters, ensure_ascii=False)
        lines.append(f"- {function.name}: {function.description} Arguments: {parameters}")
    return "\n".join(lines)


def usable_tools(body: ChatBody) -> list[Tool]:
    """The tools that this request may call. Raises APIError for a tool_choice that names none of them."""
    tools = body.tools or []
    if body.forced_tool.startswith(":"):
        tools = [tool for tool in tools if tool.function.name == body.forced_tool[1:]]
        if not tools:
            raise APIError(
                400,
                "invalid_value",
                f"tool_choice names {body.forced_tool[1:65]!r}, which is not among tools",
                param="tool_choice",
            )
    elif body.forced_tool == "required" and not tools:
        raise APIError(400, "invalid_value", "tool_choice is required, and tools is empty", param="tool_choice")
    return tools
