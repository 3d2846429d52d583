"""Flags of an operator that change how the engine runs or what is written down."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server_process import QUESTION, error_of, until

SECRET = "长颈鹿的秘密"

METRICS = """
num_requests_running num_requests_waiting kv_cache_usage_perc num_preemptions_total prompt_tokens_total
generation_tokens_total request_success_total time_to_first_token_seconds_count inter_token_latency_seconds_count
e2e_request_latency_seconds_count request_queue_time_seconds_count request_prompt_tokens_count
request_generation_tokens_count iteration_tokens_total_count http_requests_total engine_restarts_total
context_cache_hits_total build_info weights_bytes kv_cache_bytes kv_used_bytes kv_contexts_bytes host_swap_bytes
activation_peak_bytes
"""


def text(response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_prompts_are_logged_only_where_asked_for_and_control_characters_never_raw(server, start):
    body = {**QUESTION, "messages": [{"role": "user", "content": f"{SECRET}\x1b[31m\x00"}]}
    quiet, telling = server, start("--log-prompts", "--log-json")
    answers = [text(each.post("/v1/chat/completions", body)) for each in (quiet, telling)]
    assert answers[0] == answers[1]
    until(lambda: "finish=" in quiet.log and '"finish"' in telling.log, "the log lines")
    escaped = SECRET.encode("unicode_escape").decode()
    assert SECRET not in quiet.log and escaped not in quiet.log and "--log-prompts" not in quiet.log
    assert escaped in telling.log and "--log-prompts: every prompt" in telling.log
    assert "\x1b" not in telling.log and "\x00" not in telling.log
    telling.audit()


def test_deterministic_and_swapped_answers_are_those_of_the_default(server, start):
    other = start("--deterministic", "--preempt", "swap", "--prefill-budget", "200", "--context-cache", "0")
    for fields in ({"max_tokens": 24}, {"max_tokens": 12, "temperature": 1.1, "seed": 3, "n": 2}):
        found = [each.chat(**fields).json()["choices"] for each in (server, other)]
        assert found[0] == found[1]
    other.audit()


@pytest.mark.parametrize(
    ("options", "word"),
    [(("--preempt", "kill"), "recompute or swap"), (("--prefill-budget", "0"), "--prefill-budget")],
    ids=["preempt", "budget"],
)
def test_a_flag_out_of_range_is_refused_by_name(start, options, word):
    server = start(*options, wait=False)
    assert server.process.wait(60) == 2
    assert word in " ".join(server.log.replace("\u2502", " ").split())


def test_every_documented_metric_is_there(server):
    assert server.chat(max_tokens=3).status_code == 200
    refused = server.chat(max_tokens=-1)
    assert error_of(refused)["code"] == "invalid_value"
    page = server.client.get("/metrics").text
    assert [name for name in METRICS.split() if f"\nchatglm:{name}{{" not in page] == []
    for declared in ("rejected", "rate_limited"):  # counted only once it happened
        assert f"# TYPE chatglm:{declared}_total counter" in page
    assert server.metric("inter_token_latency_seconds_count") >= 2


def test_the_table_of_the_forty_tests_names_tests_that_exist():
    folder = Path(__file__).parent
    document = folder.parents[1] / "docs" / "serving.md"
    if not document.is_file():
        pytest.skip("docs/ is not beside the tests")
    lines = document.read_text(encoding="utf-8").split("## The forty tests")[1].splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if re.match(r"\| \d", line)]
    assert [int(cell[0]) for cell in cells] == list(range(1, 41))
    for _, _, named in cells:
        for file, name in re.findall(r"`(\w+)::(\w+)`", named):
            assert f"\ndef test_{name}(" in (folder / f"test_{file}.py").read_text(encoding="utf-8"), name
