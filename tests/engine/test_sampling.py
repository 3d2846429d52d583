"""SamplingParams are validated once, and every field has its effect."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatglm.engine import Sampler, SamplingParams
from chatglm.engine.sampler import banned_by_ngrams, penalize
from chatglm.errors import RequestError
from engine_parts import GREEDY, engine_of, sequence_of

VOCAB = 50
PROMPT = [7, 8, 201, 204]


def fake_sequence(params: SamplingParams, base, generated=()):
    sequence = sequence_of(base, PROMPT, params)
    sequence.generated_ids = list(generated)
    return sequence


def draws(base, logits: torch.Tensor, params: SamplingParams, count: int = 4000) -> numpy.ndarray:
    """Share of each token over many seeds."""
    sampler = Sampler(None, end_id=VOCAB - 1)
    sequences = [fake_sequence(replace(params, seed=seed), base) for seed in range(count)]
    tokens = sampler(logits.expand(count, -1), sequences).tokens
    return numpy.bincount(tokens, minlength=VOCAB) / count


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)) * 2


def expected_shares(logits: torch.Tensor, params: SamplingParams) -> numpy.ndarray:
    """Temperature, top-k, top-p, min-p by their definitions, one token at a time."""
    scores = logits[0].double().numpy() / params.temperature
    order = numpy.argsort(-scores)
    if params.top_k:
        order = order[: params.top_k]
    weights = numpy.exp(scores[order] - scores[order].max())
    weights /= weights.sum()
    kept, total = [], 0.0
    for rank, weight in enumerate(weights):
        if rank and (total >= params.top_p or weight < params.min_p * weights[0]):
            break
        kept.append(rank)
        total += weight
    shares = numpy.zeros(VOCAB)
    shares[order[kept]] = weights[kept] / weights[kept].sum()
    return shares


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1, top_k=0, top_p=1),
        SamplingParams(temperature=2, top_k=5, top_p=1),
        SamplingParams(temperature=0.5, top_k=0, top_p=0.9),
        SamplingParams(temperature=1, top_k=0, top_p=1, min_p=0.2),
        SamplingParams(temperature=1, top_k=10, top_p=0.8, min_p=0.1),
        SamplingParams(temperature=1, top_k=0, top_p=0),
    ],
    ids=["card", "plain", "top-k", "top-p", "min-p", "all", "top-p-zero"],
)
def test_tokens_are_drawn_with_the_defined_probabilities(base, logits, params):
    shares, expected = draws(base, logits, params), expected_shares(logits, params)
    assert not shares[expected == 0].any()
    # five standard errors of a share estimated from 4,000 draws
    assert (numpy.abs(shares - expected) <= 5 * numpy.sqrt(expected * (1 - expected) / 4000) + 1e-9).all()


def test_temperature_zero_takes_the_best_token_and_draws_nothing(base, logits):
    shares = draws(base, logits, GREEDY, count=10)
    assert shares[logits.argmax()] == 1


def test_rows_with_their_own_settings_do_not_change_each_other(base, logits):
    sampler = Sampler(None, end_id=VOCAB - 1)
    rows = [
        SamplingParams(seed=3, temperature=1, top_k=0, top_p=1),
        GREEDY,
        SamplingParams(seed=4, top_k=3, temperature=5, top_p=1),
        SamplingParams(seed=5, repetition_penalty=3.0, temperature=1),
        SamplingParams(seed=6, min_new_tokens=4, no_repeat_ngram_size=1),
    ]
    together = sampler(
        torch.cat([logits.roll(i) for i in range(5)]), [fake_sequence(p, base, [1, 2]) for p in rows]
    ).tokens
    alone = [sampler(logits.roll(i), [fake_sequence(p, base, [1, 2])]).tokens[0] for i, p in enumerate(rows)]
    assert together == alone


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_reported_and_others_are_sampled(base, logits, bad):
    rows = logits.repeat(3, 1)
    rows[1, 4] = bad
    samples = Sampler(None, end_id=VOCAB - 1)(rows, [fake_sequence(GREEDY, base) for _ in range(3)])
    assert samples.is_finite == [True, False, True]
    assert samples.tokens[0] == samples.tokens[2] == int(logits.argmax())


def test_rows_without_a_piece_are_never_chosen(base, logits):
    best = int(logits.argmax())
    no_piece = torch.zeros(VOCAB, dtype=torch.bool)
    no_piece[best] = True
    assert Sampler(no_piece, end_id=VOCAB - 1)(logits, [fake_sequence(GREEDY, base)]).tokens[0] != best
    assert int(logits.argmax()) == best  # the caller's scores are left alone


def test_penalties_follow_their_definitions(base):
    scores = torch.tensor([2.0, -2.0, 1.0, 0.5])
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    penalize(scores, fake_sequence(params, base, [0, 1, 1]))
    assert scores.tolist() == [2.0 / 2 - 0.25 - 0.5, -2.0 * 2 - 0.25 - 1.0, 1.0, 0.5]


def test_penalties_look_at_the_context_only_when_asked(base):
    scores = torch.ones(300)
    penalize(scores, fake_sequence(SamplingParams(presence_penalty=1.0), base))
    assert (scores == 1).all()
    penalize(scores, fake_sequence(SamplingParams(presence_penalty=1.0, penalize_context=True), base))
    assert [i for i, score in enumerate(scores.tolist()) if score == 0] == sorted(PROMPT)


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4))
def test_banned_tokens_are_those_that_would_repeat_an_ngram(ids, size):
    def grams(row):
        return [tuple(row[i : i + size]) for i in range(len(row) - size + 1)]

    for token in range(4):
        repeats = tuple([*ids, token][-size:]) in grams(ids) and len(ids) + 1 >= size
        assert (token in banned_by_ngrams(ids, size)) is repeats


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be a number from 0 to 100"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be a number from 0 to 1"),
        ({"top_k": 0.5}, "top_k is 0.5; it must be a whole number"),
        ({"top_k": True}, "top_k is True"),
        ({"seed": -1}, "seed is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": [""]}, "stop is"),
        ({"stop": 3}, "stop is 3"),
        ({"stop": ["x"] * 17}, "stop has 17 strings; at most 16"),
        ({"num_beams": 2, "stop": "x"}, "exclude each other"),
        ({"temprature": 1}, "did you mean `temperature`"),
        ({"max_tokens": 1}, "did you mean `max_new_tokens`"),
        ({"zzz": 1}, "unknown setting `zzz`$"),
    ],
)
def test_values_out_of_range_are_refused_by_name(change, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams.from_mapping(change)


def test_one_stop_string_or_a_list_are_the_same():
    assert SamplingParams(stop="x") == SamplingParams(stop=["x"]) == SamplingParams(stop=("x",))  # type: ignore[arg-type]


def run(base, params: SamplingParams, max_new: int = 24) -> list[int]:
    sequence = sequence_of(base, PROMPT, params, max_new)
    engine_of(base).run([sequence])
    return sequence.generated_ids


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 1.5},
        {"top_k": 2},
        {"top_p": 0.05},
        {"min_p": 0.9},
        {"repetition_penalty": 4.0},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"no_repeat_ngram_size": 1},
        {"seed": 2},
        {"penalize_context": True, "repetition_penalty": 4.0},
    ],
    ids=str,
)
def test_every_field_has_its_effect(base, change):
    plain = SamplingParams(seed=1, temperature=4, top_k=0, top_p=1)
    assert run(base, plain, 12) != run(base, replace(plain, **change), 12)


def test_same_seed_gives_the_same_answer_alone_or_in_a_batch(base):
    params = SamplingParams(seed=11, temperature=1, top_k=0, top_p=1)
    alone = run(base, params)
    engine = engine_of(base)
    target = sequence_of(base, PROMPT, params, 24)
    others = [sequence_of(base, [9, *PROMPT], SamplingParams(seed=i), 5 + i) for i in range(3)]
    engine.run([others[0], target, *others[1:]])
    assert target.generated_ids == alone
    assert run(base, replace(params, seed=12)) != alone


def test_without_a_seed_two_runs_differ_and_the_seed_repeats_them(base):
    params = SamplingParams(temperature=1, top_k=0, top_p=1)
    first, second = (sequence_of(base, PROMPT, params, 24) for _ in "ab")
    engine_of(base).run([first, second])
    assert first.generated_ids != second.generated_ids
    assert run(base, replace(params, seed=first.seed)) == first.generated_ids
