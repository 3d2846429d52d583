"""`GET /v1/models` and `/v1/models/{id}`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..backend import Backend
from ..json_answer import JsonAnswer
from ..requests import backend_of

router = APIRouter()


def describe(backend: Backend, identity: str) -> dict[str, Any]:
    """What is served under a name: the base, or the base with an adapter."""
    is_base = identity == backend.model_name
    bits = backend.loaded.model.config.quantization_bit
    return {
        "id": identity,
        "object": "model",
        "created": backend.created,
        "owned_by": "chatglm",
        "max_model_len": backend.context,
        "dtype": str(backend.loaded.model.dtype).removeprefix("torch."),
        "quantization": f"int{bits}" if bits else None,
        **({"adapters": list(backend.adapters)} if is_base else {"parent": backend.model_name}),
    }


@router.get("/v1/models", response_model=None)
async def list_models(request: Request) -> Response:
    """The models that requests may name."""
    backend = backend_of(request)
    return JsonAnswer({"object": "list", "data": [describe(backend, identity) for identity in backend.model_ids]})


@router.get("/v1/models/{model}", response_model=None)
async def one_model(request: Request, model: str) -> Response:
    """One of them."""
    backend = backend_of(request)
    backend.check_model(model)
    return JsonAnswer(describe(backend, model))
