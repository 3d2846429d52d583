"""Sequences join and leave at every step; the cache is accounted for to the slot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatglm.engine import KVCache, SamplingParams, Sequence, beam_search
from chatglm.engine.kv_cache import BLOCK_SIZE
from chatglm.engine.scheduler import MAX_PREFILL_TOKENS
from chatglm.errors import DeviceError, PromptTooLongError
from chatglm.model import sdpa_attention
from engine_parts import GREEDY, engine_of, sequence_of

PROMPTS = [[7, 8, 201, 204], [9, 201, 204], [5, 6, 7, 8, 9, 10, 201, 204], [11, 12, 201, 204]]


def alone(base, prompt, max_new):
    sequence = sequence_of(base, prompt, max_new=max_new)
    engine_of(base).run([sequence])
    return sequence.generated_ids, sequence.finish_reason


@pytest.mark.parametrize("capacity", [32, 64, 1024])
def test_answers_do_not_depend_on_when_sequences_join(base, capacity):
    engine = engine_of(base, capacity)
    limits = [9, 14, 3, 20]
    sequences = [sequence_of(base, prompt, max_new=limit) for prompt, limit in zip(PROMPTS, limits, strict=True)]
    for sequence in sequences:  # one more each step
        engine.add(sequence)
        engine.step()
    while engine.has_work:
        engine.step()
    for sequence, prompt, limit in zip(sequences, PROMPTS, limits, strict=True):
        assert (sequence.generated_ids, sequence.finish_reason) == alone(base, prompt, limit)
    assert engine.runner.cache.num_free_tokens == engine.runner.cache.capacity


def test_scattered_slots_give_the_same_answer_as_neighbouring_ones(base):
    engine = engine_of(base, 160)
    cache = engine.runner.cache
    held = [cache.allocate(16) for _ in range(10)]
    for number in (1, 3, 5):
        cache.release(held[number])
    sequence = sequence_of(base, PROMPTS[2], max_new=30)
    engine.run([sequence])
    assert sequence.generated_ids == alone(base, PROMPTS[2], 30)[0]


def test_fused_attention_gives_the_same_greedy_answers(base):
    engine = engine_of(base, attend=sdpa_attention)
    sequences = [sequence_of(base, prompt, max_new=20) for prompt in PROMPTS]
    engine.run(sequences)
    assert [s.generated_ids for s in sequences] == [alone(base, prompt, 20)[0] for prompt in PROMPTS]


def test_resumed_sequence_continues_as_if_never_interrupted(base):
    expected, _ = alone(base, PROMPTS[0], 12)
    engine = engine_of(base)
    sequence = sequence_of(base, PROMPTS[0], max_new=12)
    sequence.generated_ids = expected[:5]
    engine.run([sequence])
    assert sequence.generated_ids == expected


def test_cancelled_sequence_ends_at_the_next_step_and_keeps_its_tokens(base):
    engine = engine_of(base)
    stays, goes = (sequence_of(base, prompt, max_new=15) for prompt in PROMPTS[:2])
    for sequence in (stays, goes):
        engine.add(sequence)
    engine.step()
    engine.step()
    goes.cancel()
    outputs = engine.step()
    assert [o.token for o in outputs if o.sequence is goes] == [None]
    assert goes.finish_reason == "cancelled" and len(goes.generated_ids) == 2
    assert not goes.slots
    while engine.has_work:
        engine.step()
    assert stays.generated_ids == alone(base, PROMPTS[0], 15)[0]


def test_cancelled_waiting_sequence_never_runs(base):
    engine = engine_of(base, 32)
    first, second = (sequence_of(base, prompt, max_new=20) for prompt in PROMPTS[:2])
    engine.add(first)
    engine.add(second)
    engine.step()
    second.cancel()
    while engine.has_work:
        engine.step()
    assert second.generated_ids == [] and second.finish_reason == "cancelled"


def test_finishing_by_end_token_or_by_limit_is_told_apart(base):
    eos = base.config.eos_token_id
    sequence = sequence_of(base, PROMPTS[0], max_new=2)
    sequence.append(5, eos)
    assert not sequence.is_finished
    sequence.append(eos, eos)
    assert sequence.finish_reason == "stop" and sequence.generated_ids == [5]
    other = sequence_of(base, PROMPTS[0], max_new=1)
    other.append(5, eos)
    assert other.finish_reason == "length"


def test_non_finite_scores_end_one_sequence_only(base, monkeypatch):
    engine = engine_of(base)
    good, bad = (sequence_of(base, prompt, max_new=8) for prompt in PROMPTS[:2])
    decode = engine.runner.decode

    def damaged(sequences):
        logits = decode(sequences).clone()
        for row, sequence in enumerate(sequences):
            if sequence is bad and len(sequence.generated_ids) == 3:
                logits[row, 0] = torch.nan
        return logits

    monkeypatch.setattr(engine.runner, "decode", damaged)
    engine.run([good, bad])
    assert bad.finish_reason == "error" and "NaN" in bad.error and len(bad.generated_ids) == 3
    assert good.generated_ids == alone(base, PROMPTS[0], 8)[0]
    assert engine.runner.cache.num_free_tokens == engine.runner.cache.capacity


def test_beam_search_fails_on_non_finite_scores_and_frees_its_slots(base, monkeypatch):
    engine = engine_of(base)
    sequence = sequence_of(base, PROMPTS[0], SamplingParams(num_beams=2), 8)
    monkeypatch.setattr(engine.runner, "step", lambda *_: torch.full((2, base.config.vocab_size), torch.nan))
    assert beam_search(engine.runner, engine.sampler, sequence) == []
    assert sequence.finish_reason == "error"
    assert engine.runner.cache.num_free_tokens == engine.runner.cache.capacity


def test_one_beam_equals_greedy(base):
    engine = engine_of(base)
    sequence = sequence_of(base, PROMPTS[0], SamplingParams(num_beams=1), 12)
    beam_search(engine.runner, engine.sampler, sequence)
    assert sequence.generated_ids == alone(base, PROMPTS[0], 12)[0]


def test_sequence_larger_than_the_cache_is_refused_with_both_numbers(base):
    engine = engine_of(base, 32)
    with pytest.raises(DeviceError, match="needs 53 cache tokens, the KV cache holds 32"):
        engine.add(sequence_of(base, PROMPTS[0], max_new=50))


def test_failing_network_leaves_no_sequence_behind(base, monkeypatch):
    engine = engine_of(base)
    sequence = sequence_of(base, PROMPTS[0])
    engine.add(sequence)
    engine.step()
    monkeypatch.setattr(engine.runner, "decode", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert not engine.has_work and sequence.finish_reason == "cancelled"
    assert engine.runner.cache.num_free_tokens == engine.runner.cache.capacity


def test_prefill_batches_stay_below_the_token_bound(base):
    engine = engine_of(base, 1 << 16)
    long = [7] * (MAX_PREFILL_TOKENS // 3) + [201, 204]
    for _ in range(4):
        engine.add(sequence_of(base, long, max_new=2))
    assert [len(engine.scheduler.admit()) for _ in range(3)] == [2, 2, 0]


def test_prompt_that_is_no_context_is_refused(base):
    for ids in ([], [5, 204], [5, 201]):
        with pytest.raises(PromptTooLongError, match="must hold"):
            sequence_of(base, ids)


@given(st.lists(st.one_of(st.integers(1, 70), st.just(None)), max_size=40))
def test_slots_are_handed_out_once_and_come_back(actions):
    from golden_vectors import plain_model

    cache = KVCache(plain_model("base-fp32").config, 200, torch.float32, torch.device("cpu"))
    held: list[list[int]] = []
    for action in actions:
        if action is None:
            if held:
                cache.release(held.pop(len(held) // 2))
        elif -(-action // BLOCK_SIZE) * BLOCK_SIZE > cache.num_free_tokens:
            with pytest.raises(DeviceError, match=f"{action} are needed"):
                cache.allocate(action)
        else:
            slots = cache.allocate(action)
            assert len(slots) >= action and min(slots) >= BLOCK_SIZE
            held.append(slots)
        used = [slot for slots in held for slot in slots]
        assert len(used) == len(set(used))
        assert cache.num_free_tokens + len(used) == cache.capacity


def test_random_number_depends_on_seed_and_step_only(base):
    first, second = (sequence_of(base, PROMPTS[i], SamplingParams(seed=9)) for i in range(2))
    assert first.uniform() == second.uniform()
    first.generated_ids.append(1)
    assert first.uniform() != second.uniform()
    assert isinstance(first, Sequence) and GREEDY.is_greedy
