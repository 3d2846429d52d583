"""`POST /v1/embeddings`: the mean of the last hidden states, of unit length.

The model was not trained as an encoder; these vectors are for demonstrations (docs/serving.md).
"""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

import torch
from fastapi import APIRouter, Request
from starlette.responses import Response

from ...engine.pooling import mean_hidden
from ...tokenizer.vocabulary import LONGEST_BLANK
from ..api_errors import APIError
from ..backend import Backend
from ..fitting import context_exceeded
from ..json_answer import JsonAnswer
from ..requests import backend_of, note, read_body
from ..schemas import EmbeddingBody

router = APIRouter()

MAX_INPUTS = 256


@router.post("/v1/embeddings", response_model=None)
async def embeddings(request: Request) -> Response:
    """One vector for each text."""
    backend = backend_of(request)
    body = await read_body(request, EmbeddingBody)
    adapter = backend.check_model(body.model)
    inputs = await asyncio.to_thread(read_inputs, backend, body.input)
    data = []
    for number, ids in enumerate(inputs):
        vector = await backend.in_engine(
            lambda engine, ids=ids: mean_hidden(engine.runners[adapter], ids, backend.tokenizer)  # type: ignore[misc]
        )
        data.append({"object": "embedding", "index": number, "embedding": encode(vector, body.encoding_format)})
    tokens = sum(len(ids) + 1 for ids in inputs)
    note(request, model=body.model, prompt_tokens=tokens)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JsonAnswer({"object": "list", "data": data, "model": body.model, "usage": usage})


def encode(vector: torch.Tensor, form: str) -> Any:
    """A list of numbers, or base64 of little-endian fp32."""
    numbers: list[float] = vector.tolist()
    if form == "float":
        return numbers
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode("ascii")


def read_inputs(backend: Backend, given: Any) -> list[list[int]]:
    """Ids of each input, without special ids. Raises APIError."""
    if isinstance(given, str) or (isinstance(given, list) and given and all(type(item) is int for item in given)):
        given = [given]
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_INPUTS:
        raise APIError(
            400, "invalid_type", f"`input` must be a string, 1 to {MAX_INPUTS} strings, or arrays of ids", param="input"
        )
    found = []
    for number, item in enumerate(given):
        if isinstance(item, str):
            if len(item) // LONGEST_BLANK >= backend.context:
                raise context_exceeded(backend.context, len(item) // LONGEST_BLANK, 0, at_least=True)
            ids = backend.tokenizer.encode(item)
        elif isinstance(item, list) and all(type(token) is int for token in item):
            ids = item
        else:
            raise APIError(400, "invalid_type", f"`input[{number}]` must be a string or an array of ids", param="input")
        for token in ids:
            if backend.tokenizer.has_no_piece(token) or backend.tokenizer.is_special(token):
                raise APIError(400, "invalid_value", f"`input[{number}]` has the id {token}", param="input")
        if not ids:
            raise APIError(400, "invalid_value", f"`input[{number}]` is empty", param="input")
        if len(ids) + 1 > backend.context:
            raise context_exceeded(backend.context, len(ids) + 1, 0)
        found.append(ids)
    return found
