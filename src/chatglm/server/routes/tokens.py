"""`POST /tokenize` and `/detokenize`."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...tokenizer import template
from ..api_errors import APIError
from ..conversation import read_messages
from ..json_answer import JsonAnswer
from ..requests import backend_of, read_body
from ..schemas import DetokenizeBody, TokenizeBody

router = APIRouter()


@router.post("/tokenize", response_model=None)
async def tokenize(request: Request) -> Response:
    """Ids and pieces of a text, or of messages as the chat template writes them."""
    backend = backend_of(request)
    body = await read_body(request, TokenizeBody)
    if body.model is not None:
        backend.check_model(body.model)
    tokenizer = backend.tokenizer
    if body.messages is not None:
        conversation = read_messages(body.messages)
        text = template.render(conversation.question, conversation.rounds, conversation.system)
    else:
        text = body.text or ""
    encode = tokenizer.encode_context if body.add_special else tokenizer.encode
    ids = await asyncio.to_thread(encode, text)
    pieces = [tokenizer.id_to_piece(token) for token in ids]
    return JsonAnswer({"tokens": ids, "pieces": pieces, "count": len(ids), "max_model_len": backend.context})


@router.post("/detokenize", response_model=None)
async def detokenize(request: Request) -> Response:
    """The text of ids."""
    backend = backend_of(request)
    body = await read_body(request, DetokenizeBody)
    if body.model is not None:
        backend.check_model(body.model)
    tokenizer = backend.tokenizer
    for token in body.tokens:
        if tokenizer.has_no_piece(token):
            most = tokenizer.vocab_size - 1
            raise APIError(
                400,
                "invalid_value",
                f"`tokens` has the id {token}; ids are {tokenizer.offset} to {most}",
                param="tokens",
            )
    return JsonAnswer({"text": await asyncio.to_thread(tokenizer.decode, body.tokens)})
