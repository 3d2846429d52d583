"""What Ray's proxy says by itself comes in the common shape; what a replica says is left alone. Needs no Ray."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from chatglm.errors import RequestError
from chatglm.server.replica_border import CommonShape, middlewares
from chatglm.server.replicas import ReplicaCount, ReplicaModel, check_settings, deployment_options
from chatglm.server.settings import ServerSettings


def answered(status: int | None, media: str, body: bytes, path: str = "/v1/models") -> httpx.Response:
    """The answer of a proxy whose application says this; None says nothing at all."""

    async def app(scope, receive, send):
        if status is not None:
            headers = [(b"content-type", media.encode())]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body[:3], "more_body": True})
            await send({"type": "http.response.body", "body": body[3:]})

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(CommonShape(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(path, headers={"x-request-id": "r-1"})

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("status", "said", "code"),
    [(404, 503, "draining"), (408, 504, "request_timeout"), (429, 503, "overloaded"), (503, 503, "overloaded"),
     (500, 500, "internal_error"), (None, 503, "engine_restarting")],
)  # fmt: skip
def test_rays_own_refusals_become_errors_of_this_server(status, said, code):
    response = answered(status, "text/plain; charset=utf-8", b"Request dropped due to backpressure")
    assert response.status_code == said
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert (error["code"], error["request_id"]) == (code, "r-1") and "backpressure" not in error["message"]
    assert (said == 503) == ("retry-after" in response.headers)


@pytest.mark.parametrize(
    ("status", "media"),
    [(200, "text/plain; version=0.0.4"), (400, "application/json"), (503, "application/json"), (200, "text/html")],
)
def test_what_a_replica_says_passes_as_it_is(status, media):
    body = json.dumps({"error": "its own"}).encode()
    response = answered(status, media, body)
    assert (response.status_code, response.content, response.headers["content-type"]) == (status, body, media)


def test_rays_paths_are_hidden_but_for_its_health():
    hidden = answered(200, "application/json", b'{"/": "chatglm"}', "/-/routes")
    assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "not_found")
    assert answered(200, "text/plain", b"success", "/-/healthz").text == "success"


def test_ray_finds_the_middleware():
    assert [middleware.cls for middleware in middlewares()] == [CommonShape]


def test_a_number_of_replicas_or_bounds_for_auto():
    assert ReplicaCount.parse("3", None, None) == ReplicaCount(3, 3)
    assert ReplicaCount.parse("auto", None, None) == ReplicaCount(1, 4)
    assert ReplicaCount.parse("auto", 6, None) == ReplicaCount(6, 6)
    for bad in (("0", None, None), ("x", None, None), ("2", 1, None), ("auto", 3, 2), ("auto", 0, 2)):
        with pytest.raises(RequestError, match="replicas"):
            ReplicaCount.parse(*bad)


def test_replicas_take_all_that_the_engine_would_queue_and_finish_within_the_drain(tmp_path):
    model = ReplicaModel(tmp_path, "fp32", "cuda", 1, num_gpus=1)
    settings = ServerSettings(max_running=10, max_waiting=20, drain_timeout_s=40)
    fixed = deployment_options(model, settings, ReplicaCount(2, 2))
    assert fixed["num_replicas"] == 2 and fixed["max_ongoing_requests"] >= 30 and fixed["max_queued_requests"] == -1
    assert fixed["graceful_shutdown_timeout_s"] > 40 and fixed["ray_actor_options"]["num_gpus"] == 1
    moving = deployment_options(model, settings, ReplicaCount(1, 4))["autoscaling_config"]
    assert moving == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 7}


def test_the_page_is_refused_with_replicas():
    with pytest.raises(RequestError, match="--web"):
        check_settings(ServerSettings(web=True))
