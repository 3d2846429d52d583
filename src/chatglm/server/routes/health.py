"""`GET /health`, `/ready` and `/metrics`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..json_answer import JsonAnswer
from ..requests import backend_of

router = APIRouter()


@router.get("/health", response_model=None)
async def health(request: Request) -> Response:
    """200 while the process and its engine thread live."""
    is_alive = backend_of(request).thread.is_alive
    return JsonAnswer({"status": "ok" if is_alive else "engine is gone"}, 200 if is_alive else 503)


@router.get("/ready", response_model=None)
async def ready(request: Request) -> Response:
    """200 only if a request sent now would be served."""
    reason = backend_of(request).unready_reason()
    if reason is None:
        return JsonAnswer({"status": "ready"})
    return JsonAnswer({"status": "not ready", "reason": reason}, 503, headers={"Retry-After": "1"})


@router.get("/metrics", response_model=None)
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    text = backend_of(request).metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
