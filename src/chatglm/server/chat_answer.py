"""The shapes of chat answers: whole, and in chunks."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from ..engine.stream import Group, TokenInfo
from ..tokenizer import Tokenizer
from .exchange import Exchange, News
from .grammar import piece_bytes


def usage_of(groups: list[Group]) -> dict[str, Any]:
    """Prompt tokens once a group, answer tokens over all choices with their end tokens."""
    prompt = sum(group.num_prompt_tokens for group in groups)
    answer = sum(stream.num_sampled for group in groups for stream in group.streams)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(group.cached_tokens for group in groups)},
    }


def logprob_entries(tokenizer: Tokenizer, infos: list[TokenInfo]) -> list[dict[str, Any]]:
    """OpenAI's shape; `bytes` is exact where a token is part of a character."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = piece_bytes(tokenizer, token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    return [
        {**entry(info.token, info.logprob), "top_logprobs": [entry(token, value) for token, value in info.top]}
        for info in infos
    ]


def read_call(text: str) -> dict[str, Any] | None:
    """A tool call in an answer, or None where it is plain or unfinished text."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or set(found) != {"name", "arguments"}:
        return None
    arguments = json.dumps(found["arguments"], ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": found["name"], "arguments": arguments},
    }


@dataclass
class ChatAnswer:
    """Everything that chunks and the whole answer share.

    with_tools   texts are held until it is certain whether they are calls
    """

    exchange: Exchange
    tokenizer: Tokenizer
    model: str
    fingerprint: str
    wants_logprobs: bool
    with_tools: bool
    dropped_rounds: int
    include_usage: bool = False
    continuous_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        count = len(self.exchange.group.streams)
        self._held = [""] * count
        self._is_plain = [not self.with_tools] * count
        self._infos: list[list[TokenInfo]] = [[] for _ in range(count)]

    # Whole

    async def whole(self) -> dict[str, Any]:
        """Wait for the end. Raises APIError."""
        group = self.exchange.group
        texts = [""] * len(group.streams)
        finishes = [""] * len(group.streams)
        async for news in self.exchange.all():
            texts[news.choice] += news.text
            self._infos[news.choice] += news.infos
            finishes[news.choice] = news.finish or finishes[news.choice]
        choices = []
        for index, (text, finish) in enumerate(zip(texts, finishes, strict=True)):
            call = read_call(text) if self.with_tools else None
            message: dict[str, Any] = {"role": "assistant", "content": None if call else text, "refusal": None}
            if call:
                message["tool_calls"] = [call]
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(self._infos[index]),
                    "finish_reason": "tool_calls" if call else finish,
                }
            )
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            "usage": usage_of([group]),
            "chatglm": self._facts(),
        }

    def _facts(self) -> dict[str, Any]:
        group = self.exchange.group
        queued = (group.admitted or group.arrived) - group.arrived
        first = (group.first_token or group.arrived) - group.arrived
        seed = group.streams[0].seed
        return {
            "dropped_rounds": self.dropped_rounds,
            "queue_ms": round(queued * 1000),
            "ttft_ms": round(first * 1000),
            "seed": seed,
        }

    def _logprobs(self, infos: list[TokenInfo]) -> dict[str, Any] | None:
        return {"content": logprob_entries(self.tokenizer, infos), "refusal": None} if self.wants_logprobs else None

    # Chunks

    def first(self) -> list[dict[str, Any]]:
        """The opening chunk of each choice."""
        count = len(self.exchange.group.streams)
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(count)]

    def chunks(self, _: int, news: News) -> list[dict[str, Any]]:
        """The chunks for one piece of news."""
        index, found = news.choice, []
        self._infos[index] += news.infos
        text = self._held[index] + news.text
        self._held[index] = ""
        if not self._is_plain[index]:
            if text and not text.lstrip().startswith("{"):
                self._is_plain[index] = True
            elif news.finish is None:
                self._held[index] = text
                return []
        call = read_call(text) if not self._is_plain[index] else None
        infos, self._infos[index] = self._infos[index], []
        if call:
            found.append(self._chunk(index, {"tool_calls": [{"index": 0, **call}]}, infos))
        elif text or (infos and self.wants_logprobs):
            found.append(self._chunk(index, {"content": text}, infos))
        if news.finish is not None:
            found.append(self._chunk(index, {}, finish="tool_calls" if call else news.finish))
        return found

    def last(self) -> list[dict[str, Any]]:
        """After all choices: usage, where it was asked for."""
        if not self.include_usage:
            return []
        facts = {"usage": usage_of([self.exchange.group]), "chatglm": self._facts()}
        return [{**self._frame(), "choices": [], **facts}]

    def _frame(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _chunk(
        self, index: int, delta: dict[str, Any], infos: list[TokenInfo] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        if infos:
            choice["logprobs"] = self._logprobs(infos)
        chunk = {**self._frame(), "choices": [choice]}
        if self.continuous_usage:
            chunk["usage"] = usage_of([self.exchange.group])
        elif self.include_usage:
            chunk["usage"] = None
        return chunk
