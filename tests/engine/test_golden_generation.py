"""The engine's ids equal the original's (golden/README.md)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from chatglm.engine import SamplingParams, Sequence, beam_search
from engine_parts import GREEDY, engine_of, sequence_of
from golden_vectors import assert_close, cases, plain_model

SAME = {"length_penalty", "early_stopping", "num_beams", "repetition_penalty", "no_repeat_ngram_size"}


def usable(case) -> bool:
    """Cases of one unpadded sequence; the transformers classes take the others."""
    return case.inputs["input_ids"].shape[0] == 1


MODELS = ["base-fp32", "oned-fp32", "ptuning", "ptuning-projection"]
FILES = {"base-fp32": "base-fp32-generate"}
CASES = {(name, case.id): case for name in MODELS for case in cases(FILES.get(name, name), "generate") if usable(case)}


def settings(case, prompt: int) -> tuple[SamplingParams, int]:
    given = case.raw["generate_kwargs"]
    max_new = given.get("max_new_tokens") or max(1, given["max_length"] - prompt)
    own = {name: given[name] for name in SAME if name in given}
    own["min_new_tokens"] = max(0, given.get("min_length", 0) - prompt)
    return replace(GREEDY, penalize_context=True, **own), max_new


def answer(sequence: Sequence, eos: int) -> list[int]:
    return sequence.generated_ids + ([eos] if sequence.finish_reason == "stop" else [])


@pytest.mark.parametrize("key", CASES, ids="/".join)
def test_ids_equal_the_original(key):
    case = CASES[key]
    model = plain_model(key[0])
    ids = case.inputs["input_ids"][0].tolist()
    params, max_new = settings(case, len(ids))
    sequence = sequence_of(model, ids, params, max_new)
    engine = engine_of(model)
    expected = case.outputs["ids"]
    expected = expected.tolist() if isinstance(expected, torch.Tensor) else expected
    if params.num_beams > 1:
        found = beam_search(engine.runner, engine.sampler, sequence)
        ended = [a.ids + ([model.config.eos_token_id] if a.finish_reason == "stop" else []) for a in found]
        ours = [ids + row for row in ended][: len(expected)]
    else:
        engine.run([sequence])
        ours = [ids + answer(sequence, model.config.eos_token_id)]
    width = max(map(len, expected))
    pad = [row + [model.config.pad_token_id] * (width - len(row)) for row in ours]
    assert pad == expected
    assert engine.runner.cache.num_free_tokens == engine.runner.cache.capacity


@pytest.mark.parametrize("case", cases("base-fp32-generate", "stream_generate"), ids=lambda case: case.id)
def test_streamed_ids_equal_the_original_and_keep_the_last_token(case):
    model = plain_model("base-fp32")
    ids = case.inputs["input_ids"][0].tolist()
    sequence = sequence_of(model, ids, GREEDY, case.raw["generate_kwargs"]["max_length"] - len(ids))
    engine = engine_of(model)
    engine.add(sequence)
    seen: list[list[int]] = []
    while engine.has_work:
        engine.step()
        seen.append(list(sequence.generated_ids))
    recorded = case.outputs["new_ids_per_yield"]
    assert seen[: len(recorded)] == recorded
    assert len(seen) == len(recorded) + 1  # the original drops the step that finishes


def test_padded_batch_gives_the_ids_of_each_row_alone():
    rows = [case for case in cases("base-fp32-generate", "generate") if "row" in case.id]
    model = plain_model("base-fp32")
    sequences = []
    for case in rows:
        ids = case.inputs["input_ids"][0].tolist()
        sequences.append(sequence_of(model, ids, GREEDY, settings(case, len(ids))[1]))
    engine_of(model).run(sequences)
    for case, sequence in zip(rows, sequences, strict=True):
        ids = case.inputs["input_ids"][0].tolist()
        assert [ids + answer(sequence, model.config.eos_token_id)] == case.outputs["ids"], case.id


def test_cached_decode_equals_the_original_step_by_step():
    (case,) = cases("base-fp32", "cached_decode")
    model = plain_model("base-fp32")
    ids, prefill = case.inputs["input_ids"][0].tolist(), case.raw["prefill"]
    start = ids.index(model.config.bos_token_id) + 1
    sequence = sequence_of(model, ids[:start], max_new=len(ids) - start + 1)
    sequence.generated_ids = ids[start:prefill]
    engine = engine_of(model)
    sequence.slots = engine.runner.cache.allocate(64)
    logits = engine.runner.prefill([sequence])
    assert_close(logits[0], case.outputs["prefill.logits"][0, -1])
    for step, token in enumerate(ids[prefill:]):
        sequence.generated_ids.append(token)
        assert_close(engine.runner.decode([sequence])[0], case.outputs[f"step.{step}.logits"][0, -1])


@pytest.mark.parametrize("name", MODELS)
def test_cached_decode_equals_a_full_forward(name):
    model = plain_model(name)
    config = model.config
    context = [11, 25, 36, config.gmask_token_id, config.bos_token_id]
    tokens = [40, 41, 42, 43, 44, 45]
    engine = engine_of(model)
    cached, full = (sequence_of(model, context, max_new=20) for _ in "ab")
    for sequence in (cached, full):
        sequence.slots = engine.runner.cache.allocate(64)
    engine.runner.prefill([cached])
    for token in tokens:
        cached.generated_ids.append(token)
        full.generated_ids.append(token)
        step = engine.runner.decode([cached])
        assert_close(step, engine.runner.prefill([full]))


@pytest.mark.parametrize("case", cases("base-fp16", "generate_fp16"), ids=lambda case: case.id)
def test_fp16_greedy_ids_equal_fp32(case):
    model = plain_model("base-fp16", torch.float16)
    ids = case.inputs["input_ids"][0].tolist()
    sequence = sequence_of(model, ids, GREEDY, case.raw["generate_kwargs"]["max_length"] - len(ids))
    engine_of(model).run([sequence])
    assert [ids + answer(sequence, model.config.eos_token_id)] == case.outputs["fp32_ids"]
