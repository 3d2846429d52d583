"""`POST /v1/completions`: texts are continued as they are, without the chat template."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...engine.stream import TokenInfo
from ...tokenizer import Tokenizer
from ...tokenizer.vocabulary import LONGEST_BLANK
from ..api_errors import APIError
from ..backend import Backend
from ..chat_answer import usage_of
from ..event_stream import EventStream, wait_for_answer
from ..exchange import Exchange, News
from ..fitting import check_room, context_exceeded
from ..grammar import piece_bytes
from ..json_answer import JsonAnswer
from ..requests import backend_of, note, note_texts, owner_of, read_body, request_id_of
from ..sampling import check_limits, sampling_params, shared_choices
from ..schemas import CompletionBody
from ..structure import grammar_of

router = APIRouter()

MAX_PROMPTS = 64


@router.post("/v1/completions", response_model=None)
async def completions(request: Request) -> Response:
    """Continue one text or several, whole or as server-sent events."""
    backend, owner = backend_of(request), owner_of(request)
    body = await read_body(request, CompletionBody)
    adapter = backend.check_model(body.model)
    answer_tokens = body.max_tokens or 16
    check_limits(body, backend, answer_tokens)
    prompts = await asyncio.to_thread(read_prompts, backend, body, answer_tokens)
    source = grammar_of(body)
    exchanges: list[Exchange] = []

    def close() -> None:
        for exchange in exchanges:
            backend.release(owner, exchange)
        groups = [exchange.group for exchange in exchanges]
        if groups:
            usage = usage_of(groups)
            counts = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
            note(request, model=body.model, finish=exchanges[0].finish or "cancelled", **counts)
            note_texts(request, groups)

    try:
        for prompt in prompts:
            matchers = await backend.grammars.matchers(source, body.n) if source is not None else None
            exchanges.append(
                backend.submit(
                    owner,
                    prompt,
                    sampling_params(body),
                    max_new=answer_tokens,
                    n=body.n,
                    seed=body.seed,
                    shared=shared_choices(body, backend.tokenizer, normalize=False),
                    matchers=matchers,
                    adapter=adapter,
                )
            )
        answer = CompletionAnswer(backend, body, exchanges)
        if body.stream:
            return EventStream(request_id_of(request), exchanges, answer.chunks, answer.last, answer.first, close)

        async def whole() -> Response:
            return JsonAnswer(await answer.whole())

        answered = await wait_for_answer(request, whole, exchanges)
    except BaseException:
        close()
        raise
    close()
    return answered


def read_prompts(backend: Backend, body: CompletionBody, answer_tokens: int) -> list[list[int]]:
    """The contexts, each ending in `<sop>`. Raises APIError."""
    given = body.prompt
    if isinstance(given, str) or (isinstance(given, list) and given and all(type(item) is int for item in given)):
        given = [given]
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_PROMPTS:
        raise APIError(
            400,
            "invalid_type",
            f"`prompt` must be a string, 1 to {MAX_PROMPTS} strings, or arrays of ids",
            param="prompt",
        )
    contexts = []
    for number, prompt in enumerate(given):
        ids = _ids(backend, prompt, body, f"prompt[{number}]", answer_tokens)
        tokenizer = backend.tokenizer
        if body.infill:
            if ids.count(tokenizer.mask_id) != 1:
                raise APIError(400, "invalid_value", "`infill` needs exactly one [MASK] in the prompt", param="prompt")
            context = [*ids, tokenizer.sop_id]
        else:
            context = ids if ids[-1:] == [tokenizer.sop_id] else [*ids, tokenizer.gmask_id, tokenizer.sop_id]
        check_room(backend, context, answer_tokens)
        contexts.append(context)
    return contexts


def _ids(backend: Backend, prompt: Any, body: CompletionBody, place: str, answer_tokens: int) -> list[int]:
    tokenizer = backend.tokenizer
    if isinstance(prompt, str):
        if len(prompt) // LONGEST_BLANK + answer_tokens > backend.context:
            least = len(prompt) // LONGEST_BLANK
            raise context_exceeded(backend.context, least, answer_tokens, at_least=True)
        if not body.infill:
            return tokenizer.encode(prompt)
        before, mask, behind = prompt.partition("[MASK]")
        return [*tokenizer.encode(before), *([tokenizer.mask_id] if mask else []), *tokenizer.encode(behind)]
    if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
        raise APIError(400, "invalid_type", f"`{place}` must be a string or an array of ids", param="prompt")
    for token in prompt:
        if tokenizer.has_no_piece(token):
            most = tokenizer.vocab_size - 1
            raise APIError(
                400,
                "invalid_value",
                f"`{place}` has the id {token}; ids are {tokenizer.offset} to {most}",
                param="prompt",
            )
        if tokenizer.is_special(token) and not body.allow_special:
            raise APIError(
                400,
                "invalid_value",
                f"`{place}` has the special id {token}; allow_special: true lets it in",
                param="prompt",
            )
    return prompt


class CompletionAnswer:
    """The old shape of answers; choices are numbered prompt by prompt."""

    def __init__(self, backend: Backend, body: CompletionBody, exchanges: list[Exchange]) -> None:
        self._tokenizer = backend.tokenizer
        self._backend = backend
        self._body = body
        self._exchanges = exchanges
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._offsets = [0] * (len(exchanges) * body.n)

    def _frame(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._body.model,
            "system_fingerprint": self._backend.fingerprint,
        }

    def _echo(self, number: int) -> str:
        ids = self._exchanges[number].group.streams[0].context_ids
        return self._tokenizer.decode(ids) if self._body.echo else ""

    def _logprobs(self, index: int, infos: Sequence[TokenInfo]) -> dict[str, Any] | None:
        return old_logprobs(self._tokenizer, infos, self._offsets, index) if self._body.logprobs is not None else None

    async def whole(self) -> dict[str, Any]:
        """Wait for the end of all. Raises APIError."""
        choices = []
        for number, exchange in enumerate(self._exchanges):
            count = len(exchange.group.streams)
            texts, finishes = [self._echo(number)] * count, [""] * count
            infos: list[list[TokenInfo]] = [[] for _ in range(count)]
            async for news in exchange.all():
                texts[news.choice] += news.text
                infos[news.choice] += news.infos
                finishes[news.choice] = news.finish or finishes[news.choice]
            for choice in range(count):
                index = number * self._body.n + choice
                choices.append(
                    {
                        "index": index,
                        "text": texts[choice],
                        "logprobs": self._logprobs(index, infos[choice]),
                        "finish_reason": finishes[choice],
                    }
                )
        groups = [exchange.group for exchange in self._exchanges]
        return {**self._frame(), "choices": choices, "usage": usage_of(groups)}

    def first(self) -> list[dict[str, Any]]:
        """The echoed prompts, where asked for."""
        if not self._body.echo:
            return []
        numbers = range(len(self._exchanges) * self._body.n)
        return [self._chunk(index, self._echo(index // self._body.n), None, None) for index in numbers]

    def chunks(self, number: int, news: News) -> list[dict[str, Any]]:
        """The chunk for one piece of news."""
        if not news.text and news.finish is None:
            return []
        index = number * self._body.n + news.choice
        return [self._chunk(index, news.text, self._logprobs(index, news.infos), news.finish)]

    def last(self) -> list[dict[str, Any]]:
        """Usage, where asked for."""
        options = self._body.stream_options
        if not (options and options.include_usage):
            return []
        groups = [exchange.group for exchange in self._exchanges]
        return [{**self._frame(), "choices": [], "usage": usage_of(groups)}]

    def _chunk(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self._frame(), "choices": [choice]}
        options = self._body.stream_options
        if options and (options.include_usage or options.continuous_usage_stats):
            groups = [exchange.group for exchange in self._exchanges]
            chunk["usage"] = usage_of(groups) if options.continuous_usage_stats else None
        return chunk


def old_logprobs(tokenizer: Tokenizer, infos: Sequence[TokenInfo], offsets: list[int], index: int) -> dict[str, Any]:
    """tokens, token_logprobs, top_logprobs, text_offset; `offsets[index]` goes on from chunk to chunk."""

    def text(token: int) -> str:
        return piece_bytes(tokenizer, token).decode("utf-8", "replace")

    places = []
    for info in infos:
        places.append(offsets[index])
        offsets[index] += len(text(info.token))
    return {
        "tokens": [text(info.token) for info in infos],
        "token_logprobs": [info.logprob for info in infos],
        "top_logprobs": [{text(token): value for token, value in info.top} for info in infos],
        "text_offset": places,
    }
