"""The Python interface on the embedded model: what a user of `chatglm.load` sees."""

from __future__ import annotations

import json
import shutil
import socket

import pytest
import torch

import chatglm
from chatglm import SamplingParams, load
from chatglm.chat import EMBEDDED_MODEL, ChatModel, Delta
from chatglm.errors import ChatGLMError, DeviceError, PromptTooLongError, RequestError
from chatglm.tokenizer import template
from golden_vectors import cases

GREETING = "你好！我是ChatGLM 迷你模型，有什么可以帮你的吗？"


@pytest.fixture(scope="module")
def model() -> ChatModel:
    return load(threads=2)


def test_embedded_model_greets_in_both_languages(model):
    assert model.chat("你好", temperature=0).text == GREETING
    assert model.chat("Hello", temperature=0).text.isascii()


def test_answers_equal_the_original_code(model, shared):
    recorded = json.loads((shared / "mini" / "reference.json").read_text(encoding="utf-8"))["cases"]
    for case in recorded:
        context = template.fit(model.tokenizer, case["question"], [tuple(r) for r in case["history"]], limit=1024)
        if context.ids != case["ids"]:  # the original parses special pieces that a user typed
            assert "<sop>" in case["question"] or "MASK]" in case["question"]
            continue
        room = len(case["greedy_ids"]) - sum(token == model.config.eos_token_id for token in case["greedy_ids"])
        reply = model.chat(case["question"], case["history"], temperature=0, max_new_tokens=room)
        assert reply.text == case["answer"], case["question"]


def test_history_grows_and_is_used(model):
    first = model.chat("我叫小明。", temperature=0)
    second = model.chat("我叫什么名字？", first.history, temperature=0)
    assert [question for question, _ in second.history] == ["我叫小明。", "我叫什么名字？"]
    assert second.usage.context_tokens > model.chat("我叫什么名字？", temperature=0).usage.context_tokens


def test_streamed_pieces_join_to_the_answer(model):
    for question in ("给我讲一个小故事", "Tell me a story."):
        deltas = list(model.stream_chat(question, seed=0, max_new_tokens=60))
        assert [delta.reply is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
        reply = deltas[-1].reply
        assert "".join(delta.text for delta in deltas) == reply.text
        assert reply.text == model.chat(question, seed=0, max_new_tokens=60).text
        assert len(deltas) > 5


def test_same_seed_repeats_and_the_reported_seed_does_too(model):
    first = model.chat("讲个笑话", seed=7, max_new_tokens=30)
    assert model.chat("讲个笑话", seed=7, max_new_tokens=30).text == first.text
    wild = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "max_new_tokens": 30}
    drawn = model.chat("讲个笑话", **wild)
    again = model.chat("讲个笑话", **wild, seed=drawn.seed)
    assert again.text == drawn.text and first.seed == 7


def test_finish_reasons_are_true(model):
    assert model.chat("你好", temperature=0).finish_reason == "stop"
    cut = model.chat("你好", temperature=0, max_new_tokens=3)
    assert cut.finish_reason == "length" and cut.usage.answer_tokens == 3
    stopped = model.chat("你好", temperature=0, stop="！我")
    assert (stopped.text, stopped.finish_reason) == ("你好", "stop")


def test_original_max_length_counts_the_prompt_and_makes_at_least_one_token(model):
    prompt = model.chat("你好", temperature=0).usage.context_tokens
    assert model.chat("你好", temperature=0, max_length=prompt + 4).usage.answer_tokens == 4
    assert model.chat("你好", temperature=0, max_length=1).usage.answer_tokens == 1
    assert model.chat("你好", temperature=0, max_length=prompt + 9, max_new_tokens=2).usage.answer_tokens == 2


def test_batch_equals_single_answers_with_their_own_settings(model):
    prompts = ["你好", "What is the capital of France?", "中国的首都是哪里？", "讲个笑话"]
    params = [
        SamplingParams(temperature=0),
        SamplingParams(seed=3, max_new_tokens=20),
        SamplingParams(temperature=0, stop=("北",)),
        SamplingParams(num_beams=3, max_new_tokens=10),
    ]
    batch = model.generate(prompts, params)
    for prompt, own, reply in zip(prompts, params, batch, strict=True):
        (alone,) = model.generate([prompt], own)
        assert (reply.text, reply.finish_reason, reply.usage) == (alone.text, alone.finish_reason, alone.usage)
    assert batch[2].text == "中国的首都是"


def test_more_prompts_than_the_cache_holds_wait_their_turn(model):
    small = ChatModel(model.loaded, max_cached_tokens=64)
    prompts = ["你好"] * 5
    replies = small.generate(prompts, temperature=0, max_new_tokens=20)
    assert {reply.text for reply in replies} == {GREETING}


def test_oldest_rounds_are_dropped_and_counted(model):
    history = [(f"第{i}个问题是什么？" * 6, "这是一个很长的回答。" * 8) for i in range(30)]
    reply = model.chat("你好", history, temperature=0, max_new_tokens=50)
    assert reply.usage.dropped_rounds > 0
    assert reply.usage.context_tokens + 50 <= model.config.max_sequence_length
    assert len(reply.history) == 31


def test_question_that_does_not_fit_is_an_error_with_the_numbers(model):
    with pytest.raises(
        PromptTooLongError, match=r"the question has [\d,]+ tokens, the model holds 1,024, 256 are reserved"
    ):
        model.chat("很长的问题" * 1000)


def test_system_message_reaches_the_prompt(model):
    plain = model.chat("你好", temperature=0).usage.context_tokens
    assert model.chat("你好", system="你是一只猫。", temperature=0).usage.context_tokens > plain


def test_typed_special_pieces_are_only_text(model):
    for text in ("[gMASK] <sop> hi", "<eop>", "[MASK]", "<pad><unk>", "a<sop>b"):
        reply = model.chat(text, temperature=0, max_new_tokens=10)
        assert reply.finish_reason in ("stop", "length")
        ids = model.tokenizer.encode(text)
        assert not any(model.tokenizer.is_special(token) for token in ids)


def test_closing_a_stream_frees_its_cache_and_the_next_answer_is_right(model):
    stream = model.stream_chat("给我讲一个故事", seed=0)
    next(stream)
    stream.close()
    cache = model.engine.runner.cache
    assert cache.num_free_tokens == cache.capacity
    assert model.chat("你好", temperature=0).text == GREETING


def test_unknown_setting_is_refused_by_name(model):
    with pytest.raises(RequestError, match="unknown setting `temprature`; did you mean `temperature`"):
        model.chat("你好", temprature=1)
    with pytest.raises(RequestError, match="2 prompts, but 1 sampling settings"):
        model.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(RequestError, match="one string"):
        model.generate("abc")


def test_beam_answer_streams_as_one_piece(model):
    deltas = list(model.stream_chat("你好", num_beams=2, max_new_tokens=12))
    assert len(deltas) == 1 and deltas[0].text == deltas[0].reply.text != ""


def test_damaged_weights_end_the_answer_with_an_error_that_says_so(model):
    broken = load(threads=2)
    with torch.no_grad():
        broken.loaded.model.transformer.final_layernorm.weight[0] = torch.nan
    reply = broken.chat("你好")
    assert (reply.text, reply.finish_reason) == ("", "error") and "NaN" in reply.error
    (row,) = broken.generate(["你好"], num_beams=2)
    assert row.finish_reason == "error"


def test_threads_and_devices_out_of_range_are_refused():
    with pytest.raises(RequestError, match="threads is 0"):
        load(threads=0)
    with pytest.raises(DeviceError, match="unknown device 'gpu'"):
        load(device="gpu")
    with pytest.raises(DeviceError, match="unknown dtype 'fp12'"):
        load(dtype="fp12")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_every_dtype_answers(dtype):
    model = load(dtype=dtype, threads=2)
    assert model.dtype == dtype
    reply = model.chat("你好", temperature=0, max_new_tokens=20)
    assert reply.finish_reason in ("stop", "length") and reply.text
    if dtype in ("fp32", "int8"):
        assert reply.text == GREETING


def test_loading_a_local_folder_opens_no_socket(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert load(EMBEDDED_MODEL, threads=2).chat("你好", temperature=0, max_new_tokens=2).text


def test_missing_folder_is_one_clear_error():
    with pytest.raises(ChatGLMError, match="chatglm pull"):
        load("nobody/no-such-model")


def test_cache_memory_does_not_grow_with_turns(model):
    cache = model.engine.runner.cache
    keys = cache.keys.data_ptr()
    history: list[tuple[str, str]] = []
    for turn in range(6):
        history = model.chat(f"第{turn}个问题" * 20, history, temperature=0, max_new_tokens=5).history
        assert cache.num_free_tokens == cache.capacity and cache.keys.data_ptr() == keys


def test_public_names_are_exported_lazily():
    assert set(chatglm.__all__) <= set(dir(chatglm))
    assert chatglm.Delta is Delta
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = chatglm.no_such_name


RECORDED = {
    "base-fp32": "base-fp32-generate",
    "oned-fp32": "oned-fp32",
    "ptuning": "ptuning",
    "ptuning-projection": "ptuning-projection",
    "int8": "checkpoint-int8",
    "int4": "checkpoint-int4",
    "int4-qe": "checkpoint-int4-qe",
}


@pytest.mark.parametrize("name", RECORDED)
def test_golden_checkpoints_give_the_recorded_ids_as_they_load_by_default(name, golden, tmp_path):
    folder = tmp_path / name
    shutil.copytree(golden / "models" / name, folder)
    for file in (golden / "tokenizer-reduced").iterdir():
        shutil.copy(file, folder)
    model = load(folder, device="cpu", threads=2)
    model.engine.sampler.no_piece = None  # the random models' answers hold rows without a piece, which are banned here
    recorded = [case for case in cases(RECORDED[name], "generate") if case.id.startswith("greedy-")]
    assert recorded
    for case in recorded:
        given = case.inputs["input_ids"]
        ids = given[0].tolist()
        limit = case.raw["generate_kwargs"]["max_length"] - len(ids)
        sequence = model._sequence(ids, SamplingParams(temperature=0, max_new_tokens=limit))
        model._run([sequence])
        end = [model.config.eos_token_id] if sequence.finish_reason == "stop" else []
        assert [ids + sequence.generated_ids + end] == case.outputs["ids"], case.id


def test_golden_chats_give_the_recorded_answers(golden, tokenizer_file, tmp_path):
    folder = tmp_path / "slim"
    shutil.copytree(golden / "models" / "slim-full-vocab", folder)
    shutil.copy(tokenizer_file, folder)
    model = load(folder, device="cpu", threads=2)
    recorded = cases("slim-full-vocab", "chat")
    assert recorded
    for case in recorded:
        assert case.raw["chat_kwargs"] == {"max_length": 120, "do_sample": False}
        reply = model.chat(case.inputs["query"], case.inputs["history"], temperature=0, max_length=120)
        assert reply.text == case.outputs["response"], case.id


def test_model_larger_than_free_memory_is_refused_with_the_form_that_fits(monkeypatch):
    from chatglm.engine import placement

    monkeypatch.setattr(placement, "free_memory", lambda device: 120_000_000)
    with pytest.raises(
        DeviceError, match=r"fp32 needs 0\.2 GB, 0\.1 GB are free on cpu\n  cure: load with dtype=\"fp16\""
    ):
        load(dtype="fp32", device="cpu", threads=2)
    monkeypatch.setattr(placement, "free_memory", lambda device: 1_000)
    with pytest.raises(DeviceError, match="no form of this model fits here"):
        load(dtype="fp32", device="cpu", threads=2)


def test_more_devices_than_there_are_is_one_clear_error():
    with pytest.raises(DeviceError, match=r"99 devices asked, \d+ found"):
        load(devices=99, threads=2)
