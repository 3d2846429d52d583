"""The original's `POST /`, behind `--legacy-api`: same fields, defaults and answer; on the engine, so many at once."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...engine.sampling import SamplingParams
from ...engine.stream import Choices
from ...tokenizer import template
from ..api_errors import APIError
from ..event_stream import wait_for_answer
from ..fitting import context_exceeded
from ..json_answer import JsonAnswer
from ..json_body import parse_body
from ..requests import backend_of, note, note_texts, owner_of, request_id_of
from ..schemas import LegacyBody
from ..validation import check_body

router = APIRouter()


def stamp() -> str:
    """Local time as the original wrote it."""
    return time.strftime("%Y-%m-%d %H:%M:%S")


@router.post("/", response_model=None)
async def legacy(request: Request) -> Response:
    """One question with its history."""
    history: Any = []
    try:
        raw = parse_body(await request.body())
        history = raw.get("history") or []
        return await _answer(request, raw)
    except APIError as error:
        if error.status != 400:
            raise
        answer = {"response": "", "history": history, "status": 400, "time": stamp()}
        return JsonAnswer({**answer, **error.body(request_id_of(request))}, 400)


async def _answer(request: Request, raw: dict[str, Any]) -> Response:
    backend, owner = backend_of(request), owner_of(request)
    body = check_body(LegacyBody, {name: value for name, value in raw.items() if value is not None})
    prompt = template.render(body.prompt, body.history)
    ids = backend.tokenizer.encode_context(prompt)
    most = min(body.max_length, backend.context)
    if len(ids) >= most:
        raise context_exceeded(most, len(ids), 1)
    exchange = backend.submit(
        owner,
        ids,
        SamplingParams(temperature=body.temperature, top_p=body.top_p),
        max_new=most - len(ids),
        n=1,
        seed=None,
        shared=Choices(),
    )

    async def whole() -> Response:
        text = "".join([news.text async for news in exchange.all()])
        history = [[asked, answered] for asked, answered in body.history] + [[body.prompt, text]]
        return JsonAnswer({"response": text, "history": history, "status": 200, "time": stamp()})

    try:
        return await wait_for_answer(request, whole, [exchange])
    finally:
        backend.release(owner, exchange)
        tokens = exchange.group.streams[0].num_sampled
        note(request, prompt_tokens=len(ids), completion_tokens=tokens, finish=exchange.finish or "cancelled")
        note_texts(request, [exchange.group])
