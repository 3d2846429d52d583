"""Greedy answers, and where another model would have left them."""

from __future__ import annotations

import pytest
import torch

from chatglm.evaluation.agreement import divergence, greedy_answers
from chatglm.evaluation.scoring import Score, score
from chatglm.model import GLM
from chatglm.quantization import dequantize_model, swap_linears
from chatglm.tokenizer.examples import Example
from engine_parts import engine_of, sequence_of
from golden_vectors import plain_model


@pytest.fixture(scope="module")
def model() -> GLM:
    return plain_model("base-fp32")


@pytest.fixture(scope="module")
def questions(model: GLM) -> list[Example]:
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randint(5, 100, (7, 5), generator=generator).tolist()
    rows = [Example((*context, model.config.gmask_token_id), (7,), 1) for context in drawn]
    return [*rows, rows[0]]


def greedy(model: GLM, context: tuple[int, ...], count: int) -> list[int]:
    engine, sequence = engine_of(model), sequence_of(model, [*context, model.config.bos_token_id], max_new=count)
    engine.add(sequence)
    while engine.has_work:
        engine.step()
    ended = [model.config.eos_token_id] if sequence.finish_reason == "stop" else []
    return [token for token in sequence.generated_ids if token != model.config.eos_token_id] + ended


def test_answers_are_greedy_and_each_question_is_asked_once(model: GLM, questions: list[Example]) -> None:
    answers = greedy_answers(model, questions, longest=12)
    assert [answer.context_ids for answer in answers] == [question.context_ids for question in questions[:-1]]
    for answer in answers:
        assert list(answer.answer_ids) == greedy(model, answer.context_ids, 12)


def test_the_reference_agrees_with_itself(model: GLM, questions: list[Example]) -> None:
    answers = greedy_answers(model, questions, longest=12)
    found = divergence(score(model, answers), answers)
    assert (found.equal_answers, found.equal_tokens) == (1.0, 1.0)


def test_the_first_difference_is_where_another_models_own_answer_leaves(model: GLM, questions: list[Example]) -> None:
    answers = greedy_answers(model, questions, longest=12)
    other = dequantize_model(swap_linears(plain_model("base-fp32"), 4, True), torch.float32)
    before = []
    for answer in answers:
        own = greedy(other, answer.context_ids, 12)
        same = [a == b for a, b in zip(own, answer.answer_ids, strict=False)]
        before.append(same.index(False) if False in same else len(answer.answer_ids))
    assert min(before) < 12
    found = divergence(score(other, answers), answers)
    assert found.first_difference == sorted(before)[len(before) // 2]
    assert found.equal_tokens == pytest.approx(sum(before) / sum(len(a.answer_ids) for a in answers))


def test_counts_stop_at_the_first_difference() -> None:
    answers = [Example((1,), (5, 6, 7), 0), Example((2,), (8, 9), 0)]
    best = torch.tensor([5, 0, 7, 8, 9]).int()
    found = divergence(Score(torch.zeros(5).double(), best, 1), answers)
    assert (found.equal_answers, found.equal_tokens, found.first_difference) == (0.5, 3 / 5, 2.0)
