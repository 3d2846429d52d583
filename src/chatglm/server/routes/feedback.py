"""`POST` and `DELETE /v1/feedback`, and `GET /v1/feedback/export` for a key whose name begins with `admin`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...errors import RequestError
from ...tokenizer import template
from ..api_errors import APIError
from ..backend import Backend, Owner
from ..conversation import read_messages
from ..feedback.body import AnswerBody, FeedbackBody
from ..feedback.export import FORMATS, Filters, export, parse_time
from ..feedback.ids import ID
from ..feedback.keeping import FeedbackKeeper
from ..feedback.prompt_hash import hash_ids
from ..feedback.reading import read_rows
from ..json_answer import JsonAnswer
from ..requests import backend_of, note, owner_of, read_body

router = APIRouter()


def keeper_of(backend: Backend) -> FeedbackKeeper:
    """Raises APIError 404 where none is kept."""
    if backend.feedback is None:
        raise APIError(
            404, "not_found", "this server keeps no feedback; it was started without --feedback-db and --feedback-url"
        )
    return backend.feedback


@router.post("/v1/feedback", response_model=None)
async def give(request: Request) -> Response:
    """Store an opinion, or replace an earlier one by the same rater."""
    backend, owner = backend_of(request), owner_of(request)
    keeper = keeper_of(backend)
    body = await read_body(request, FeedbackBody)
    rater = rater_of(owner, body.rater)
    prompt_hash = body.answer.prompt_ids_sha256 or await asyncio.to_thread(hash_messages, backend, body.answer)
    if not body.answer.model:
        body.answer.model = backend.model_name
    event = body.event(rater=rater, key_name=owner.key_name, prompt_hash=prompt_hash)
    saved = await keeper.save(event)
    note(request, feedback=",".join(event.opinion.kinds))
    return JsonAnswer(
        {
            "id": saved.id,
            "object": "feedback",
            "answer_id": body.answer.id,
            "conversation_id": body.conversation.id,
            "rater": rater,
            "replaced": not saved.is_new,
        }
    )


@router.delete("/v1/feedback/{answer_id}", response_model=None)
async def take_back(request: Request, answer_id: str) -> Response:
    """Delete what this rater said about an answer; `?rater=` where it was given with one."""
    keeper = keeper_of(backend_of(request))
    if not ID.match(answer_id):
        raise APIError(404, "not_found", "there is no such feedback")
    gone = await keeper.delete(answer_id, rater_of(owner_of(request), request.query_params.get("rater")))
    if not gone:
        raise APIError(404, "not_found", "there is no such feedback")
    return JsonAnswer({"object": "feedback.deleted", "answer_id": answer_id, "deleted": True})


@router.get("/v1/feedback/export", response_model=None)
async def give_out(request: Request) -> Response:
    """All of it as `chatglm data feedback` writes it: ?format= &since= &model= &min_rating= &redact=."""
    backend, owner = backend_of(request), owner_of(request)
    keeper = keeper_of(backend)
    if owner.key_name is None or not is_admin(owner.key_name):
        raise APIError(403, "forbidden", "the export needs a key whose name begins with `admin` (--api-key admin:KEY)")
    store = keeper.own
    form, filters = read_query(request.query_params)
    rows = await asyncio.to_thread(read_rows, [store.path])
    exported = await asyncio.to_thread(export, rows, form, filters)
    await keeper.note_export(exported.count)
    media = "text/csv; charset=utf-8" if form == "csv" else "application/jsonl; charset=utf-8"
    return Response(exported.text, media_type=media, headers={"X-Count": str(exported.count)})


def is_admin(key_name: str) -> bool:
    """Whether a key of this name may read everybody's feedback."""
    return key_name == "admin" or key_name.startswith("admin-")


def rater_of(owner: Owner, given: str | None) -> str:
    """Who speaks. Raises APIError 400 where nobody is named."""
    rater = given or owner.key_name
    if rater is None:
        raise APIError(
            400, "missing_field", "`rater` is missing; send any random id that stays the same", param="rater"
        )
    return rater


def hash_messages(backend: Backend, answer: AnswerBody) -> str:
    """The hash of the whole conversation's context, as a client of the API cannot know the ids."""
    talk = read_messages(answer.messages)
    return hash_ids(backend.tokenizer.encode_context(template.render(talk.question, talk.rounds, talk.system)))


def read_query(query: Mapping[str, str]) -> tuple[str, Filters]:
    """Raises APIError 400 naming the parameter."""
    known = {"format", "since", "model", "min_rating", "redact"}
    for name in query:
        if name not in known:
            raise APIError(400, "unknown_field", f"`{name[:64]}` is no parameter; known: {', '.join(sorted(known))}")
    form = query.get("format", "jsonl")
    if form not in FORMATS:
        raise APIError(400, "invalid_value", f"`format` must be one of {', '.join(FORMATS)}", param="format")
    rating = query.get("min_rating")
    if rating is not None and rating not in set("12345"):
        raise APIError(400, "invalid_value", "`min_rating` must be 1 to 5", param="min_rating")
    try:
        since = parse_time(query["since"]) if "since" in query else None
    except RequestError as error:
        raise APIError(400, "invalid_value", error.message, param="since") from None
    redact = query.get("redact", "false")
    if redact not in ("true", "false"):
        raise APIError(400, "invalid_value", "`redact` must be true or false", param="redact")
    return form, Filters(since, query.get("model"), int(rating) if rating else None, redact == "true")
