"""What every route that takes a body does first."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from ..engine.stream import Group
from .backend import Backend, Owner
from .json_body import parse_body
from .validation import check_body, take_ignored

B = TypeVar("B", bound=BaseModel)


def backend_of(request: Request) -> Backend:
    """The application's backend."""
    backend: Backend = request.app.state.backend
    return backend


def owner_of(request: Request) -> Owner:
    """Who asks."""
    owner: Owner = request.state.owner
    return owner


def request_id_of(request: Request) -> str:
    """As in the answer's header."""
    return str(request.state.request_id)


async def read_body(request: Request, kind: type[B]) -> B:
    """The checked body. Raises APIError 400."""
    backend = backend_of(request)
    body, ignored = take_ignored(parse_body(await request.body()))
    for name in ignored:
        backend.metrics.count(backend.metrics.ignored, name)
    return check_body(kind, body)


def note_texts(request: Request, groups: list[Group]) -> None:
    """Prompts and answers for the log line, where --log-prompts asks for them."""
    backend = backend_of(request)
    if backend.settings.log_prompts and groups:
        decode = backend.tokenizer.decode
        note(request, prompts=[decode(group.streams[0].context_ids) for group in groups])
        note(request, answers=[decode(stream.generated_ids) for group in groups for stream in group.streams])


def note(request: Request, **fields: object) -> None:
    """Fields for the request's log line; numbers and names, never text of a conversation."""
    request.state.log.update(fields)
