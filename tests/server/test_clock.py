"""A wall clock that is set back and forward changes nothing (test 39): durations are of the monotonic clock."""

from __future__ import annotations

import asyncio
import io
import json
import time

import httpx
import pytest

from chatglm.chat import EMBEDDED_MODEL
from chatglm.engine.loading import load_model
from chatglm.server.app import build_app
from chatglm.server.backend import Backend
from chatglm.server.logs import RequestLog
from chatglm.server.settings import Rate, ServerSettings
from server_process import QUESTION


def test_a_clock_set_back_and_forward_leaves_ids_durations_and_limits_right(monkeypatch):
    loaded = load_model(EMBEDDED_MODEL, "fp32", "cpu")
    settings = ServerSettings(rate_limit=Rate(7, 60), kv_memory=100_000_000, context_cache_s=0)
    backend, log = Backend(loaded, settings), io.StringIO()
    app = build_app(backend, RequestLog(as_json=True, stream=log))
    real, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + shift[0])

    async def ask() -> list[httpx.Response]:
        await backend.open()
        transport = httpx.ASGITransport(app)
        answers = []
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            for hours in (0, -1, 1, -1, 0, 1, -1, 1, -1):
                shift[0] = 3600.0 * hours
                answers.append(await client.post("/v1/chat/completions", json={**QUESTION, "max_tokens": 3}))
            metrics = (await client.get("/metrics")).text
        await backend.close()
        negative = [line for line in metrics.splitlines() if "_sum{" in line and " -" in line]
        assert negative == []
        return answers

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [200] * 7 + [429] * 2  # no window ended an hour early
    assert len({answer.json()["id"] for answer in answers[:7]}) == 7
    for answer in answers[:7]:
        assert answer.json()["chatglm"]["ttft_ms"] >= 0 and answer.json()["chatglm"]["queue_ms"] >= 0
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    times = [record["ms"] for record in map(json.loads, log.getvalue().splitlines()) if record["event"] == "request"]
    assert len(times) == 9 and min(times) >= 0 and max(times) < 3_000_000


@pytest.fixture(autouse=True)
def _threads():
    """One thread for the model, as beside other tests."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
