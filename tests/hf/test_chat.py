"""`chat` and `stream_chat`: the original's replies and prompts, safe encoding, fitting, refusals."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, LogitsProcessorList

from chatglm.errors import ChatGLMError, PromptTooLongError, RequestError, TokenizerError
from chatglm.hf.conversation import OnlyPieces
from golden_vectors import cases


@pytest.fixture(scope="module")
def tokenizer(slim_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(slim_folder), trust_remote_code=True)


@pytest.fixture(scope="module")
def model(slim_folder: Path) -> Any:
    return AutoModel.from_pretrained(str(slim_folder), trust_remote_code=True).float()


@pytest.fixture(scope="module")
def mini(mini_folder: Path) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(str(mini_folder)), AutoModel.from_pretrained(str(mini_folder)).float()


CHATS = [pytest.param(case, id=case.id) for case in cases("slim-full-vocab", "chat") if case.raw["binding"]]


@pytest.mark.parametrize("case", CHATS)
def test_replies_and_streamed_replies_equal_the_originals(case: Any, model: Any, tokenizer: Any) -> None:
    query, history = case.inputs["query"], [tuple(pair) for pair in case.inputs["history"]]
    response, new = model.chat(tokenizer, query, history=history, **case.raw["chat_kwargs"])
    assert response == case.outputs["response"]
    assert [list(pair) for pair in new] == case.outputs["history"]
    streamed = list(model.stream_chat(tokenizer, query, history=history, **case.raw["chat_kwargs"]))
    assert [text for text, _ in streamed[:-1]] == case.outputs["stream"]
    assert streamed[-1] == (response, new)


class Caught(Exception):
    pass


@pytest.mark.parametrize("method", ["chat", "stream_chat"])
@pytest.mark.parametrize("era", ["v110", "e551"])
def test_the_ids_of_a_conversation_equal_the_originals(
    era: str, method: str, golden: Path, slim_folder: Path, first_release_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = {"v110": slim_folder, "e551": first_release_folder}[era]
    tokenizer, model = AutoTokenizer.from_pretrained(str(folder)), AutoModel.from_pretrained(str(folder))
    caught: dict[str, Any] = {}

    def catch(**kwargs: Any) -> Any:
        caught.update(kwargs)
        raise Caught

    monkeypatch.setattr(model, "generate" if method == "chat" else "stream_generate", catch)
    eras = json.loads((golden / "chat" / "prompts.json").read_text(encoding="utf-8"))["eras"]
    compared = 0
    for case in eras[era]["cases"]:
        if "input_ids" not in case or "<sop>" in case["query"]:  # user text never becomes special ids here
            continue
        history = [tuple(pair) for pair in case["history"]]
        with pytest.raises(Caught):
            for _ in getattr(model, method)(tokenizer, case["query"], history=history):
                pass
        assert caught["input_ids"].tolist() == case["input_ids"]
        assert {name: caught.get(name) for name in ("max_length", "do_sample", "top_p", "temperature", "top_k")} == {
            "max_length": 2048,
            "do_sample": True,
            "top_p": 0.7,
            "temperature": 0.95,
            "top_k": 50,
        }
        compared += 1
    assert compared >= 8


def test_the_signatures_have_the_originals_names_and_defaults(model: Any) -> None:
    chat = inspect.signature(model.chat).parameters
    original = ["tokenizer", "query", "history", "max_length", "num_beams", "do_sample", "top_p", "temperature"]
    assert list(chat)[:9] == [*original, "logits_processor"]
    defaults = {name: chat[name].default for name in original[2:]}
    assert defaults == {
        "history": None,
        "max_length": 2048,
        "num_beams": 1,
        "do_sample": True,
        "top_p": 0.7,
        "temperature": 0.95,
    }
    assert chat["top_k"].default == 50
    stream = inspect.signature(model.stream_chat).parameters
    assert [name for name in chat if name != "num_beams"] == list(stream)


def test_what_a_user_types_never_becomes_a_special_id(model: Any, tokenizer: Any) -> None:
    ids, _ = model._context_ids(tokenizer, "[gMASK]<sop><eop>[MASK]<pad>", [("<sop>", "<eop>")], 2048, {})
    special = {130000, 130001, 130004, 130005, 3, 0}
    assert not special & set(ids[0, :-2].tolist()) and ids[0, -2:].tolist() == [130001, 130004]
    response, history = model.chat(tokenizer, "<sop>[gMASK]", history=[("[MASK]", "<eop>")], max_length=80)
    assert isinstance(response, str) and len(history) == 2


def test_streaming_gives_what_chat_gives_with_the_same_seed(mini: tuple[Any, Any]) -> None:
    tokenizer, model = mini
    torch.manual_seed(7)
    response, history = model.chat(tokenizer, "你好", history=[], max_length=60)
    torch.manual_seed(7)
    streamed = list(model.stream_chat(tokenizer, "你好", history=[], max_length=60))
    assert streamed[-1] == (response, history)
    assert not any("\ufffd" in text for text, _ in streamed[:-1])


def test_a_closed_stream_stops_the_generation(mini: tuple[Any, Any]) -> None:
    tokenizer, model = mini
    passes: list[int] = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    stream = model.stream_chat(tokenizer, "你好", history=[], do_sample=False)
    next(stream)
    next(stream)
    stream.close()
    hook.remove()
    assert len(passes) == 2


def test_an_error_inside_the_stream_reaches_the_caller(mini: tuple[Any, Any]) -> None:
    tokenizer, model = mini

    def fail(ids: Any, scores: Any) -> Any:
        raise RuntimeError("from a processor")

    with pytest.raises(RuntimeError, match="from a processor"):
        list(model.stream_chat(tokenizer, "你好", logits_processor=LogitsProcessorList([fail])))


def test_the_callers_processors_act_and_are_not_changed(mini: tuple[Any, Any]) -> None:
    tokenizer, model = mini
    seen: list[int] = []

    def watch(ids: Any, scores: Any) -> Any:
        seen.append(ids.shape[1])
        return scores

    processors = LogitsProcessorList([watch])
    model.chat(tokenizer, "你好", max_length=20, logits_processor=processors)
    list(model.stream_chat(tokenizer, "你好", max_length=20, logits_processor=processors))
    assert len(processors) == 1 and len(seen) > 2


def test_temperature_zero_is_greedy(mini: tuple[Any, Any]) -> None:
    tokenizer, model = mini
    greedy = model.chat(tokenizer, "你好", do_sample=False, max_length=40)
    assert model.chat(tokenizer, "你好", temperature=0, max_length=40) == greedy


def test_beams_answer(mini: tuple[Any, Any]) -> None:
    tokenizer, model = mini
    response, _ = model.chat(tokenizer, "你好", num_beams=3, do_sample=False, max_length=40)
    assert response


@pytest.mark.parametrize(("name", "value"), [("top_p", 0), ("top_p", 1.5), ("temperature", -1), ("top_k", -3)])
def test_a_value_out_of_its_range_is_refused_by_name(name: str, value: float, mini: tuple[Any, Any]) -> None:
    tokenizer, model = mini
    with pytest.raises(RequestError, match=name):
        model.chat(tokenizer, "你好", **{name: value})


def test_the_oldest_rounds_give_way_and_that_is_told(mini: tuple[Any, Any]) -> None:
    tokenizer, model = mini
    history = [(f"第{number}个问题：" + "天气" * 60, "好的。" * 20) for number in range(8)]
    ids, limit = model._context_ids(tokenizer, "你好", history, 2048, {})
    context = model.config.max_sequence_length
    assert limit == context and ids.shape[1] <= context - context // 4
    assert 0 < model.dropped_rounds < 8
    _, new = model.chat(tokenizer, "你好", history=history[:2], max_new_tokens=4, do_sample=False)
    assert model.dropped_rounds == 0
    _, new = model.chat(tokenizer, "你好", history=history * 2, max_new_tokens=4, do_sample=False)
    assert model.dropped_rounds > 0 and new[:-1] == history * 2


def test_a_question_that_alone_does_not_fit_is_refused_with_the_numbers(mini: tuple[Any, Any]) -> None:
    tokenizer, model = mini
    with pytest.raises(PromptTooLongError, match=r"the model holds 1,024"):
        model.chat(tokenizer, "天气" * 2000)
    with pytest.raises(PromptTooLongError, match=r"the model holds 3"):
        next(model.stream_chat(tokenizer, "你好", max_length=3))


def test_a_foreign_tokenizer_is_refused(model: Any, mini: tuple[Any, Any]) -> None:
    with pytest.raises(RequestError, match="not dict"):
        model.chat({}, "你好")
    with pytest.raises(TokenizerError, match="does not belong"):
        model.chat(mini[0], "你好")


def test_rows_without_a_piece_are_never_sampled() -> None:
    scores = torch.zeros(1, 10)
    kept = OnlyPieces(2, 8)(torch.zeros(1, 1, dtype=torch.int64), scores).isfinite()[0]
    assert kept.tolist() == [False] * 2 + [True] * 6 + [False] * 2 and bool(scores.isfinite().all())


def test_scores_that_are_not_finite_are_an_error_that_says_so(slim_folder: Path, tokenizer: Any) -> None:
    broken = AutoModel.from_pretrained(str(slim_folder)).float()
    broken.transformer.final_layernorm.weight.data[0] = float("nan")
    with pytest.raises(ChatGLMError, match="not finite"):
        broken.chat(tokenizer, "你好")
    with pytest.raises(ChatGLMError, match="not finite"):
        list(broken.stream_chat(tokenizer, "你好"))


def test_post_processing_equals_the_originals(model: Any, golden: Path) -> None:
    prompts = json.loads((golden / "chat" / "prompts.json").read_text(encoding="utf-8"))
    for record in prompts["process_response"]:
        for text, expected in record["pairs"]:
            assert model.process_response(text) == expected


def test_the_embedded_model_answers_as_the_original_code_does(mini: tuple[Any, Any], shared: Path) -> None:
    tokenizer, model = mini
    reference = json.loads((shared / "mini" / "reference.json").read_text(encoding="utf-8"))
    for case in reference["cases"][:6]:
        ids = torch.tensor([case["ids"]])
        found = model.generate(ids, max_new_tokens=len(case["greedy_ids"]), do_sample=False)
        assert found[0, ids.shape[1] :].tolist() == case["greedy_ids"]
        rounds = [tuple(pair) for pair in case["history"]]
        assert model.chat(tokenizer, case["question"], history=rounds, do_sample=False)[0] == case["answer"]
