"""Prompt lookup changes how many passes an answer takes, never the answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatglm.engine import SamplingParams
from chatglm.engine.speculation import LONGEST_MATCH, PAUSE, DraftRecord, lookup, propose
from engine_parts import GREEDY, engine_of, sequence_of
from golden_vectors import assert_close, plain_model

PROMPTS = [[7, 8, 201, 204], [9, 201, 204], [5, 6, 7, 8, 9, 10, 201, 204]]
SETTINGS = [
    GREEDY,
    SamplingParams(seed=1, temperature=1, top_k=0, top_p=1),
    SamplingParams(seed=2, repetition_penalty=1.3, temperature=0.7),
    SamplingParams(temperature=0, no_repeat_ngram_size=2, min_new_tokens=20),
]


def passes(engine, sequence) -> int:
    engine.add(sequence)
    count = 0
    while engine.has_work:
        engine.step()
        count += 1
    return count


@pytest.mark.parametrize("params", SETTINGS, ids=["greedy", "sampled", "penalised", "n-grams"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize("name", ["base-fp32", "oned-fp32", "ptuning"])
def test_answer_is_the_same_with_and_without(name, prompt, params):
    model = plain_model(name)
    plain = sequence_of(model, prompt, params, 40)
    ahead = sequence_of(model, prompt, replace(params, prompt_lookup=5), 40)
    engine_of(model).run([plain])
    engine_of(model).run([ahead])
    assert (ahead.generated_ids, ahead.finish_reason) == (plain.generated_ids, plain.finish_reason)


def test_repetitive_answer_takes_fewer_passes(base):
    plain, ahead = (sequence_of(base, PROMPTS[0], replace(GREEDY, prompt_lookup=n), 60) for n in (0, 8))
    slow, fast = passes(engine_of(base), plain), passes(engine_of(base), ahead)
    assert ahead.generated_ids == plain.generated_ids
    assert ahead.drafts.accepted > 0 and fast == slow - ahead.drafts.accepted
    assert 0 < ahead.drafts.acceptance_rate <= 1


def test_all_slots_come_back_after_drafts(base):
    engine = engine_of(base, 128)
    for number in range(3):
        engine.run([sequence_of(base, PROMPTS[0], replace(GREEDY, prompt_lookup=7), 30 + number)])
    assert engine.runner.cache.num_free_tokens == engine.runner.cache.capacity


def test_verified_rows_equal_single_steps(base):
    engine = engine_of(base)
    one, many = (sequence_of(base, PROMPTS[2], max_new=20) for _ in "ab")
    for sequence in (one, many):
        sequence.slots = engine.runner.cache.allocate(64)
        engine.runner.prefill([sequence])
        sequence.generated_ids.append(40)
    draft = [41, 42, 43]
    rows = engine.runner.verify(many, draft)
    for row, token in enumerate([*draft, None]):
        assert_close(rows[row], engine.runner.decode([one])[0])
        if token is not None:
            one.generated_ids.append(token)


def test_a_non_finite_row_ends_the_sequence_after_the_good_ones(base, monkeypatch):
    engine = engine_of(base)
    sequence = sequence_of(base, PROMPTS[0], replace(GREEDY, prompt_lookup=4), 40)
    verify = engine.runner.verify

    def damaged(owner, draft):
        logits = verify(owner, draft).clone()
        logits[-1] = torch.nan
        return logits

    monkeypatch.setattr(engine.runner, "verify", damaged)
    engine.run([sequence])
    assert sequence.finish_reason in ("error", "length", "stop")
    assert engine.runner.cache.num_free_tokens == engine.runner.cache.capacity


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 5))
def test_draft_is_what_followed_the_latest_longest_match(ids, count):
    draft = lookup(ids, count)
    matches = [
        (size, start)
        for size in range(1, min(LONGEST_MATCH, len(ids) - 1) + 1)
        for start in range(len(ids) - size)
        if ids[start : start + size] == ids[-size:]
    ]
    if not matches:
        assert draft == []
    else:
        size, start = max(matches)
        assert draft == ids[start + size : start + size + count] and len(draft) >= 1


def test_wrong_drafts_pause_drafting(base):
    sequence = sequence_of(base, PROMPTS[0], replace(GREEDY, prompt_lookup=3), 40)
    sequence.generated_ids = [7]
    assert propose(sequence) == [8, 201, 204]
    sequence.drafts.record(3, accepted=0)
    assert [propose(sequence) for _ in range(PAUSE + 1)] == [[]] * PAUSE + [[8, 201, 204]]
    assert DraftRecord().acceptance_rate == 0


def test_draft_never_outruns_the_token_limit(base):
    sequence = sequence_of(base, PROMPTS[0], replace(GREEDY, prompt_lookup=9), 3)
    sequence.generated_ids = [7]
    assert len(propose(sequence)) == 1
    sequence.generated_ids = [7, 7]
    assert propose(sequence) == []
