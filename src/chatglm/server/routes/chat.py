"""`POST /v1/chat/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...tokenizer.template import default_max_new_tokens
from ..chat_answer import ChatAnswer
from ..conversation import read_messages, tool_text, usable_tools
from ..event_stream import EventStream, wait_for_answer
from ..fitting import fit_conversation
from ..json_answer import JsonAnswer
from ..requests import backend_of, note, note_texts, owner_of, read_body, request_id_of
from ..sampling import check_limits, sampling_params, shared_choices
from ..schemas import ChatBody
from ..structure import grammar_of

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation, whole or as server-sent events."""
    backend, owner = backend_of(request), owner_of(request)
    body = await read_body(request, ChatBody)
    adapter = backend.check_model(body.model)
    answer_tokens = body.answer_tokens or default_max_new_tokens(backend.context)
    check_limits(body, backend, answer_tokens)
    usable_tools(body)
    shared = shared_choices(body, backend.tokenizer, normalize=True)
    source = grammar_of(body)
    matchers = await backend.grammars.matchers(source, body.n) if source is not None else None
    if matchers is not None:
        shared = shared_choices(body, backend.tokenizer, normalize=False)
    conversation = read_messages(body.messages, tool_text(body))
    fitted = await fit_conversation(backend, conversation, answer_tokens, may_drop=body.truncation == "auto")
    exchange = backend.submit(
        owner,
        fitted.ids,
        sampling_params(body),
        max_new=answer_tokens,
        n=body.n,
        seed=body.seed,
        shared=shared,
        matchers=matchers,
        adapter=adapter,
    )
    options = body.stream_options
    answer = ChatAnswer(
        exchange,
        backend.tokenizer,
        body.model,
        backend.fingerprint,
        wants_logprobs=body.logprobs,
        with_tools=bool(body.tools) and body.forced_tool != "none",
        dropped_rounds=fitted.dropped_rounds,
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
    )

    def close() -> None:
        backend.release(owner, exchange)
        group = exchange.group
        tokens = sum(stream.num_sampled for stream in group.streams)
        note(request, model=body.model, prompt_tokens=group.num_prompt_tokens, completion_tokens=tokens)
        note(request, finish=exchange.finish or "cancelled", seed=group.streams[0].seed)
        note_texts(request, [group])

    if body.stream:
        return EventStream(request_id_of(request), [exchange], answer.chunks, answer.last, answer.first, close)

    async def whole() -> Response:
        return JsonAnswer(await answer.whole())

    try:
        return await wait_for_answer(request, whole, [exchange])
    finally:
        close()
