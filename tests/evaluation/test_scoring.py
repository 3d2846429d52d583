"""Scores against a plain pass over each example alone, and against arithmetic by hand."""

from __future__ import annotations

import math

import pytest
import torch

from chatglm.evaluation.scoring import Score, answer_hidden, make_reference, score
from chatglm.model import GLM
from chatglm.model.positions import find_layout, generation_positions, prefix_blocked
from chatglm.quantization import dequantize_model, swap_linears
from chatglm.tokenizer.examples import Example
from golden_vectors import plain_model


@pytest.fixture(scope="module")
def model() -> GLM:
    return plain_model("base-fp32")


@pytest.fixture(scope="module")
def examples(model: GLM) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    gmask, eop = model.config.gmask_token_id, model.config.eos_token_id

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 100, (count,), generator=generator).tolist())

    return [
        Example((*ids(6), gmask), (*ids(4), eop), 9),
        Example((gmask,), ids(11), 20),
        Example((*ids(30), gmask), (*ids(2), eop), 5),
        Example((*ids(2), gmask), ids(1), 1),
    ]


def alone(model: GLM, example: Example) -> torch.Tensor:
    """Log-probabilities [answer tokens, vocab] by the whole row without any padding."""
    ids = torch.tensor([[*example.context_ids, model.config.bos_token_id, *example.answer_ids]])
    layout = find_layout(ids, model.config)
    total = ids.shape[1]
    logits = model(ids, generation_positions(layout, total, model.config), prefix_blocked(layout, total))
    return logits[0, len(example.context_ids) : -1].log_softmax(-1)


def test_each_answer_token_is_scored_from_what_stands_before_it(model: GLM, examples: list[Example]) -> None:
    found = score(model, examples)
    expected = torch.cat(
        [-alone(model, e).gather(1, torch.tensor(e.answer_ids)[:, None])[:, 0] for e in examples]
    ).double()
    torch.testing.assert_close(found.nats, expected, rtol=1e-4, atol=1e-4)
    assert found.best.tolist() == torch.cat([alone(model, e).argmax(-1) for e in examples]).tolist()
    assert (found.tokens, found.bytes) == (20, 35)


def test_scores_repeat_exactly(model: GLM, examples: list[Example]) -> None:
    assert torch.equal(score(model, examples).nats, score(model, examples).nats)


def test_small_pieces_of_logits_give_the_same(
    model: GLM, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = score(model, examples)
    monkeypatch.setattr("chatglm.evaluation.scoring.LOGITS_ELEMENTS", 3 * model.config.vocab_size)
    monkeypatch.setattr("chatglm.evaluation.scoring.BATCH_TOKENS", 20)
    torch.testing.assert_close(score(model, examples).nats, whole.nats, rtol=1e-4, atol=1e-4)


def test_padding_and_neighbours_change_nothing(model: GLM, examples: list[Example]) -> None:
    together = answer_hidden(model, examples[:2])
    single = torch.cat([answer_hidden(model, [e]) for e in examples[:2]])
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-4)


def test_perplexity_and_bits_are_what_they_are_called() -> None:
    even = Score(torch.full((4,), math.log(8)).double(), torch.tensor([1, 2, 3, 4]).int(), 6)
    assert even.perplexity == pytest.approx(8) and even.bits_per_byte == pytest.approx(4 * 3 / 6)
    other = Score(even.nats, torch.tensor([1, 2, 0, 4]).int(), 6)
    assert even.agreement(other) == 0.75


def test_the_reference_does_not_differ_from_itself(model: GLM, examples: list[Example]) -> None:
    found = score(model, examples, reference=make_reference(model, examples))
    assert found.divergence is not None and found.divergence.abs().max() < 1e-5


def test_divergence_is_from_the_reference_to_the_other(model: GLM, examples: list[Example]) -> None:
    reference = make_reference(model, examples)
    other = dequantize_model(swap_linears(plain_model("base-fp32"), 4, True), torch.float32)
    found = score(other, examples, reference=reference)
    expected = []
    for example in examples:
        true, guess = alone(model, example).double(), alone(other, example).double()
        expected.append((true.exp() * (true - guess)).sum(-1))
    assert found.divergence is not None and found.divergence.mean() > 1e-3
    torch.testing.assert_close(found.divergence, torch.cat(expected), rtol=1e-3, atol=1e-5)
