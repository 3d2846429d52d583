"""Every field that is accepted has its effect."""

from __future__ import annotations

import base64
import json
import math
import re
import struct

import pytest

from server_process import error_of, stream_events

SAMPLED = {"temperature": 2, "top_p": 1.0, "max_tokens": 8, "seed": 7}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "size": {"enum": ["small", "large"]}},
    "required": ["city", "size"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"c": {"enum": ["a", "b"]}},
            "required": ["c"],
            "additionalProperties": False,
        },
    },
}


def text(response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_temperature_zero_repeats_itself(server):
    assert text(server.chat()) == text(server.chat())


def test_a_seed_repeats_itself_and_other_seeds_differ(server):
    same = {text(server.chat(**SAMPLED)) for _ in range(3)}
    others = {text(server.chat(**{**SAMPLED, "seed": seed})) for seed in (-(2**63), -1, 2**63 - 1)}
    assert len(same) == 1 and len(same | others) == 4, same | others


def test_the_seed_that_was_drawn_is_reported_and_repeats_the_answer(server):
    fields = {**SAMPLED, "seed": None}
    first = server.chat(**fields).json()
    seed = first["chatglm"]["seed"]
    assert text(server.chat(**{**fields, "seed": seed})) == first["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.1},
        {"top_p": 0.05},
        {"top_k": 1},
        {"min_p": 0.9},
        {"presence_penalty": 2},
        {"frequency_penalty": 2},
        {"repetition_penalty": 2},
        {"logit_bias": {"5": 100}},
        {"max_tokens": 2},
    ],
    ids=str,
)
def test_a_sampling_field_changes_the_answer(server, change):
    base = {"temperature": 1.2, "top_p": 1.0, "max_tokens": 24, "n": 4, "seed": 3}
    answers = [
        [choice["message"]["content"] for choice in server.chat(**fields).json()["choices"]]
        for fields in (base, {**base, **change})
    ]
    assert answers[0] != answers[1]


def test_no_repeat_ngram_forbids_repeats(server):
    fields = {"logit_bias": {"35": 30}, "max_tokens": 12, "ignore_eos": True, "logprobs": True}
    tokens = [entry["token"] for entry in server.chat(**fields).json()["choices"][0]["logprobs"]["content"]]
    assert len(set(tokens)) < len(tokens)
    found = server.chat(**fields, no_repeat_ngram_size=1).json()["choices"][0]["logprobs"]["content"]
    assert len({str(entry["bytes"]) for entry in found}) == len(found)


def test_ignore_eos_and_min_tokens_go_on(server):
    assert server.chat(ignore_eos=True, max_tokens=40).json()["usage"]["completion_tokens"] == 40
    assert server.chat(min_tokens=30, max_tokens=40).json()["usage"]["completion_tokens"] >= 30


def test_a_banned_token_never_comes_and_a_forced_one_always(server):
    ids = server.post("/tokenize", {"text": "模型"}).json()["tokens"]
    forced = server.chat(logit_bias={str(ids[-1]): 100}, max_tokens=3)
    assert "模型" in text(forced) and forced.json()["choices"][0]["finish_reason"] == "length"
    plain = server.chat(max_tokens=20)
    assert "模型" in text(plain)
    banned = {str(token): -100 for token in ids}
    assert "模型" not in text(server.chat(max_tokens=20, logit_bias=banned))


@pytest.mark.parametrize("stop", ["！", "模型", "GLM 迷", ["nothing like it", "是Chat"]])
def test_a_stop_string_ends_the_answer_before_it(server, stop):
    whole = text(server.chat(max_tokens=32))
    first = [stop] if isinstance(stop, str) else stop
    place = min(whole.index(each) for each in first if each in whole)
    response = server.chat(max_tokens=32, stop=stop)
    assert text(response) == whole[:place]
    assert response.json()["choices"][0]["finish_reason"] == "stop"
    pieces = stream_events(server.chat(max_tokens=32, stop=stop, stream=True))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in pieces) == whole[:place]


def test_logprobs_belong_to_the_tokens_of_the_answer(server):
    choice = server.chat(logprobs=True, top_logprobs=3).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    joined = b"".join(bytes(entry["bytes"]) for entry in entries).decode().strip()
    assert joined.replace(",", "，").replace("!", "！") == choice["message"]["content"]
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        best = entry["top_logprobs"][0]
        assert best["token"] == entry["token"] and best["logprob"] == entry["logprob"] <= 0  # greedy
    assert server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert server.chat().json()["choices"][0]["logprobs"] is None


def test_logprobs_are_those_before_temperature(server):
    cold = server.chat(logprobs=True, max_tokens=1).json()["choices"][0]["logprobs"]["content"][0]
    hot = server.chat(logprobs=True, max_tokens=1, temperature=2, top_k=1, seed=1).json()["choices"][0]["logprobs"][
        "content"
    ][0]
    assert cold == hot


def test_n_choices_differ_and_each_equals_the_choice_of_another_run(server):
    runs = [[c["message"]["content"] for c in server.chat(**SAMPLED, n=4).json()["choices"]] for _ in range(2)]
    assert runs[0] == runs[1] and len(set(runs[0])) > 1
    assert runs[0][0] == text(server.chat(**SAMPLED))


def test_system_messages_and_roles_reach_the_prompt(server):
    plain = server.chat().json()["usage"]["prompt_tokens"]
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "说英文"}, {"role": "user", "content": "你好"}]
        assert server.chat(messages=messages).json()["usage"]["prompt_tokens"] > plain
    joined = [{"role": "user", "content": "你"}, {"role": "user", "content": "好"}]
    assert server.chat(messages=joined).json()["usage"]["prompt_tokens"] == plain + 1  # the newline


# Structured answers


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_schema_is_satisfied(server, temperature):
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    response = server.chat(response_format=form, max_tokens=60, temperature=temperature, seed=1)
    found = json.loads(text(response))
    assert set(found) == {"city", "size"} and found["size"] in ("small", "large")
    assert response.json()["choices"][0]["finish_reason"] == "stop"


def test_json_object_gives_an_object(server):
    response = server.chat(response_format={"type": "json_object"}, max_tokens=100)
    answer, finish = text(response), response.json()["choices"][0]["finish_reason"]
    assert answer.startswith("{")
    if finish == "stop":
        assert isinstance(json.loads(answer), dict)


@pytest.mark.parametrize("pattern", ["[0-9]{3}-[a-f]{2}", " 你好+!", "(是|否)"])
def test_a_regex_is_matched_to_the_byte(server, pattern):
    response = server.chat(structured_outputs={"regex": pattern}, max_tokens=30, temperature=1, seed=2)
    if response.json()["choices"][0]["finish_reason"] == "stop":
        assert re.fullmatch(pattern, text(response))


def test_a_choice_is_one_of_the_texts(server):
    texts = ["红色", 'a "b"\n', "x|y"]
    assert text(server.chat(structured_outputs={"choice": texts}, max_tokens=30)) in texts


def test_a_lark_grammar_is_followed(server):
    assert text(server.chat(structured_outputs={"grammar": 'start: "yes" | "no"'}, max_tokens=9)) in ("yes", "no")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_required_tool_is_called_with_valid_arguments(server, choice):
    for stream in (False, True):
        response = server.chat(tools=[TOOL], tool_choice=choice, max_tokens=60, stream=stream)
        if stream:
            chunks = [chunk["choices"][0] for chunk in stream_events(response)]
            (call,) = [c for chunk in chunks for c in chunk["delta"].get("tool_calls", [])]
            finish = chunks[-1]["finish_reason"]
        else:
            (call,) = response.json()["choices"][0]["message"]["tool_calls"]
            finish = response.json()["choices"][0]["finish_reason"]
        assert finish == "tool_calls" and call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"])["c"] in ("a", "b")


def test_auto_lets_the_model_answer_in_words_or_call(server):
    choice = server.chat(tools=[TOOL], max_tokens=60).json()["choices"][0]
    message = choice["message"]
    assert bool(message["content"]) != bool(message.get("tool_calls"))
    assert server.chat(tools=[TOOL], tool_choice="none").json()["choices"][0]["message"]["content"]


def test_a_tool_result_goes_back_into_the_conversation(server):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"c": "a"}'}}
    messages = [
        {"role": "user", "content": "天气"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert text(server.chat(messages=messages, tools=[TOOL], tool_choice="none"))


# Streams


def test_pieces_of_a_stream_join_to_the_whole_answer(server):
    fields = {"max_tokens": 40, "n": 2, "temperature": 1.3, "seed": 5, "logprobs": True}
    whole = server.chat(**fields).json()
    response = server.chat(**fields, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = stream_events(response)
    assert len({(event["id"], event["created"]) for event in events}) == 1
    assert [event["choices"][0]["delta"] for event in events[:2]] == [{"role": "assistant", "content": ""}] * 2
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    for choice in whole["choices"]:
        own = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == choice["index"]]
        assert "".join(part["delta"].get("content", "") for part in own) == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"] and own[-1]["delta"] == {}
        entries = [entry for part in own if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert entries == choice["logprobs"]["content"]


def test_continuous_usage_counts_up(server):
    options = {"continuous_usage_stats": True}
    counts = [e["usage"]["completion_tokens"] for e in stream_events(server.chat(stream=True, stream_options=options))]
    assert counts == sorted(counts) and counts[-1] > 0


def test_usage_equals_a_recount(server):
    response = server.chat(max_tokens=40, logprobs=True).json()
    prompt = server.post("/tokenize", {"messages": [{"role": "user", "content": "你好"}], "add_special": True}).json()
    sampled = len(response["choices"][0]["logprobs"]["content"]) + 1  # and the end token
    assert response["usage"]["prompt_tokens"] == prompt["count"]
    assert response["choices"][0]["finish_reason"] == "stop" and response["usage"]["completion_tokens"] == sampled


# Other endpoints


def test_completions_take_texts_ids_and_lists_of_both(server):
    ids = server.post("/tokenize", {"text": "今天天气"}).json()["tokens"]
    base = {"model": "chatglm", "temperature": 0, "max_tokens": 8}
    single = server.post("/v1/completions", {**base, "prompt": "今天天气"}).json()
    assert server.post("/v1/completions", {**base, "prompt": ids}).json()["choices"] == single["choices"]
    both = server.post("/v1/completions", {**base, "prompt": ["今天天气", "你好"], "n": 2}).json()
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert both["choices"][0]["text"] == both["choices"][1]["text"] == single["choices"][0]["text"]
    assert both["usage"]["completion_tokens"] <= 4 * 8


def test_completions_echo_logprobs_and_streams(server):
    base = {"model": "chatglm", "temperature": 0, "max_tokens": 6, "prompt": "今天天气"}
    echoed = server.post("/v1/completions", {**base, "echo": True}).json()["choices"][0]["text"]
    plain = server.post("/v1/completions", {**base, "logprobs": 2}).json()["choices"][0]
    assert echoed == "今天天气" + plain["text"]
    logprobs = plain["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"])
    assert all(
        len(top) <= 2 and math.isclose(max(top.values()), value)
        for top, value in zip(logprobs["top_logprobs"], logprobs["token_logprobs"], strict=True)
    )
    events = stream_events(server.post("/v1/completions", {**base, "stream": True}))
    assert "".join(event["choices"][0]["text"] for event in events) == plain["text"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [12001]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"infill": True}, "prompt"),
    ],
    ids=str,
)
def test_completions_refuse_by_name(server, fields, param):
    response = server.post("/v1/completions", {"model": "chatglm", "prompt": "a", "max_tokens": 1, **fields})
    assert response.status_code == 400 and error_of(response)["param"] == param


def test_a_blank_is_filled_where_asked_for(server):
    body = {"model": "chatglm", "prompt": "今天[MASK]很好", "infill": True, "max_tokens": 4, "temperature": 0}
    assert server.post("/v1/completions", body).status_code == 200


def test_embeddings_are_of_unit_length_and_equal_for_equal_texts(server):
    body = {"model": "chatglm", "input": ["你好", "天气", "你好"]}
    found = server.post("/v1/embeddings", body).json()
    vectors = [entry["embedding"] for entry in found["data"]]
    assert vectors[0] == vectors[2] != vectors[1]
    assert all(math.isclose(sum(x * x for x in vector), 1, rel_tol=1e-5) for vector in vectors)
    coded = server.post("/v1/embeddings", {"model": "chatglm", "input": "你好", "encoding_format": "base64"}).json()
    raw = base64.b64decode(coded["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(vectors[0], abs=1e-7)
    for bad in ({"dimensions": 8}, {"input": ""}, {"input": []}, {"input": "长" * 1100}, {"encoding_format": "hex"}):
        assert server.post("/v1/embeddings", {**body, **bad}).status_code == 400


def test_tokens_and_texts_convert_both_ways(server):
    found = server.post("/tokenize", {"text": "你好  world\n😀"}).json()
    assert len(found["tokens"]) == len(found["pieces"]) == found["count"] and found["max_model_len"] == 1024
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"text": "你好  world\n😀"}
    assert error_of(server.post("/detokenize", {"tokens": [10**6]}))["param"] == "tokens"
    assert error_of(server.post("/tokenize", {}))["code"] == "missing_field"


def test_models_are_listed_with_their_limits(server):
    (model,) = server.client.get("/v1/models").json()["data"]
    assert model["id"] == "chatglm" and model["max_model_len"] == 1024 and model["dtype"] == "float32"
    assert server.client.get("/v1/models/chatglm").json() == model
    assert server.client.get("/v1/models/other").status_code == 404


def test_the_openapi_document_states_the_ranges(server):
    document = server.client.get("/openapi.json").json()
    schema = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    assert (body["properties"]["temperature"]["minimum"], body["properties"]["temperature"]["maximum"]) == (0, 2)
    assert body["additionalProperties"] is False


def test_the_original_api_answers_in_its_shape(server):
    found = server.post("/", {"prompt": "你好", "temperature": 0, "max_length": 40, "other": 1}).json()
    assert set(found) == {"response", "history", "status", "time"} and found["status"] == 200
    assert found["history"] == [["你好", found["response"]]]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", found["time"])
    again = server.post(
        "/", {"prompt": "再说一次", "history": found["history"], "temperature": 0, "max_length": 80}
    ).json()
    assert again["history"][0] == found["history"][0] and len(again["history"]) == 2
    bad = server.post("/", {"prompt": "你好", "history": [["a"]]})
    assert bad.status_code == 400 and bad.json()["status"] == 400 and bad.json()["history"] == [["a"]]
    assert server.post("/", {}).json()["error"]["code"] == "missing_field"
