"""`GET /v1/models` and `/v1/models/{id}`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..backend import Backend
from ..json_answer import JsonAnswer
from ..requests import backend_of

router = APIRouter()


def describe(backend: Backend) -> dict[str, Any]:
    """What is served."""
    bits = backend.loaded.model.config.quantization_bit
    return {
        "id": backend.model_name,
        "object": "model",
        "created": backend.created,
        "owned_by": "chatglm",
        "max_model_len": backend.context,
        "dtype": str(backend.loaded.model.dtype).removeprefix("torch."),
        "quantization": f"int{bits}" if bits else None,
        "adapters": [],
    }


@router.get("/v1/models", response_model=None)
async def list_models(request: Request) -> Response:
    """The models that requests may name."""
    return JsonAnswer({"object": "list", "data": [describe(backend_of(request))]})


@router.get("/v1/models/{model}", response_model=None)
async def one_model(request: Request, model: str) -> Response:
    """One of them."""
    backend = backend_of(request)
    backend.check_model(model)
    return JsonAnswer(describe(backend))
