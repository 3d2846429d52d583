"""Samples of the objective: the worked example to the id, and what holds for every text."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from chatglm.config import ModelConfig
from chatglm.errors import TrainingError
from chatglm.tokenizer import Tokenizer
from chatglm.training.objective import (
    MIXTURES,
    Mixture,
    Objective,
    SpecialIds,
    continue_text,
    fill_spans,
    generator,
    named_mixture,
    prompt_sample,
)
from chatglm.training.objective.continuation import Encoding
from chatglm.training.objective.spans import Span
from chatglm.training.samples import IGNORE, Sample

IDS = SpecialIds.of_config(ModelConfig())
TEXT = np.arange(11, 21, dtype=np.int32)


def worked_example() -> Sample:
    return fill_spans(TEXT, [Span(2, 3), Span(5, 8)], [1, 0], IDS, mask=IDS.mask, objective="token")


def test_the_worked_example_to_the_id() -> None:
    sample = worked_example()
    assert sample.ids.tolist() == [11, 12, 130000, 14, 15, 130000, 19, 20, 130004, 16, 17, 18, 130004, 13]
    assert sample.targets.tolist() == [IGNORE] * 8 + [16, 17, 18, 130005, 13, 130005]
    assert sample.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5, 5, 5, 5, 2, 2]
    assert sample.positions[1].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 1, 2]
    assert (sample.context_length, sample.loss_tokens, len(sample), sample.cut_targets) == (8, 6, 14, 0)


def test_special_ids_of_the_config_are_those_of_the_tokenizer(tokenizer_file) -> None:
    assert SpecialIds.of_tokenizer(Tokenizer.from_file(tokenizer_file)) == IDS
    assert (IDS.end_of_text, IDS.hidden) == (2, 130007)
    pre_slim = ModelConfig(
        vocab_size=150_528, bos_token_id=150_004, eos_token_id=150_005, mask_token_id=150_000, gmask_token_id=150_001
    )
    early = Tokenizer.from_file(tokenizer_file, image_tokens=20_000)
    assert SpecialIds.of_tokenizer(early) == SpecialIds.of_config(pre_slim)


def reconstructed(sample: Sample, mask: int) -> list[int]:
    """The text of parts A and B: every piece of B goes to the mask that stands at its position."""
    context = sample.ids[: sample.context_length].tolist()
    pieces: dict[int, list[int]] = {}
    for place, token, block in zip(
        sample.positions[0, sample.context_length :].tolist(),
        sample.targets[sample.context_length :].tolist(),
        sample.positions[1, sample.context_length :].tolist(),
        strict=True,
    ):
        piece = pieces.setdefault(place, [])
        assert block == len(piece) + 1
        piece.append(token)
    out: list[int] = []
    for place, token in enumerate(context):
        if token != mask:
            out.append(token)
            continue
        *tokens, end = pieces.pop(place)
        assert end == IDS.eop
        out += tokens
    assert not pieces
    return out


@given(tokens=st.integers(1, 600), seed=st.integers(0, 2**32), mode=st.sampled_from(["token", "sentence"]))
def test_parts_a_and_b_spell_the_text_and_inputs_are_the_targets_one_later(tokens: int, seed: int, mode: str) -> None:
    random = np.random.default_rng(seed)
    text = random.integers(1000, 2000, size=tokens).astype(np.int32)
    ends = np.arange(3000) % 7 == 0
    objective = Objective(IDS, Mixture(token=0.5, sentence=0.5, document=0), ends_sentence=ends)
    sample = objective.sample(text, mode, random)
    if sample.objective == "document":  # too short for spans
        assert tokens < 45
        return
    assert reconstructed(sample, IDS.mask if mode == "token" else IDS.smask) == text.tolist()
    assert len(sample) == tokens + 2 * int((sample.ids == IDS.sop).sum())
    after_sop = sample.ids[sample.context_length :]
    starts = np.flatnonzero(after_sop == IDS.sop)
    for start, stop in zip(starts, [*starts[1:], len(after_sop)], strict=True):
        part = slice(sample.context_length + start, sample.context_length + stop)
        assert sample.ids[part][1:].tolist() == sample.targets[part][:-1].tolist()


@given(tokens=st.integers(45, 600), seed=st.integers(0, 2**32), single=st.booleans())
def test_spans_never_touch_and_are_as_long_as_drawn(tokens: int, seed: int, single: bool) -> None:
    from chatglm.training.objective.spans import draw_lengths, token_spans

    spans = token_spans(tokens, np.random.default_rng(seed), single=single)
    assert spans
    assert spans[0].start >= 0 and spans[-1].stop <= tokens
    assert all(later.start > earlier.stop for earlier, later in itertools.pairwise(spans))
    lengths = draw_lengths(tokens, np.random.default_rng(seed), single=single)
    assert sorted(stop - start for start, stop in spans) == sorted(lengths.tolist())
    if not single:
        assert sum(lengths) >= int(0.15 * tokens) > sum(lengths[:-1])


@given(
    lengths=st.lists(st.integers(0, 120), min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
)
def test_spans_of_glm_stay_inside_their_documents(lengths: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    documents = [np.append(random.integers(1000, 2000, size=length), IDS.end_of_text) for length in lengths]
    text = np.concatenate(documents).astype(np.int32)
    sample = Objective(IDS, MIXTURES["glm-base"]).sample(text, "token", random)
    assert sample.ids[0] == IDS.start_of_text
    assert sample.positions[:, 0].tolist() == [0, 0]
    if sample.objective == "token":
        kept = sample.ids[1 : sample.context_length]
        assert (kept == IDS.end_of_text).sum() == len(lengths)
        assert IDS.end_of_text not in sample.targets


def test_a_document_sample_generates_the_end_of_the_text() -> None:
    sample = continue_text(TEXT, 4, IDS)
    assert sample.ids.tolist() == [11, 12, 13, 14, 15, 16, 130001, 130004, 17, 18, 19]
    assert sample.targets.tolist() == [IGNORE] * 7 + [17, 18, 19, 20]
    assert sample.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 6], [0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4]]
    assert sample.context_length == 7
    running = continue_text(TEXT, 4, IDS, encoding="1d")
    assert running.positions[0].tolist() == list(range(11))


def test_a_document_sample_may_generate_everything() -> None:
    sample = continue_text(TEXT, 10, IDS)
    assert sample.ids[:2].tolist() == [IDS.gmask, IDS.sop]
    assert sample.targets[1:].tolist() == TEXT.tolist()


@given(tokens=st.integers(1, 300), seed=st.integers(0, 2**32), encoding=st.sampled_from(["1d", "2d"]))
def test_a_document_sample_spells_the_text(tokens: int, seed: int, encoding: Encoding) -> None:
    random = np.random.default_rng(seed)
    text = random.integers(1000, 2000, size=tokens).astype(np.int32)
    sample = Objective(IDS, encoding=encoding).sample(text, "document", random)
    context, generated = sample.ids[: sample.context_length - 1], sample.targets[sample.context_length :]
    whole = np.concatenate([context, generated])
    assert whole.tolist() == text[: len(whole)].tolist() and len(whole) >= min(2, tokens)
    assert len(generated) >= int(0.2 * len(whole))
    assert sample.ids[sample.context_length - 1 :].tolist() == [IDS.gmask, IDS.sop, *generated[:-1]]


def test_gpt_mixture_generates_every_token() -> None:
    sample = Objective(IDS, MIXTURES["gpt"]).sample(TEXT, "document", generator(0, 0, 0))
    assert (sample.context_length, sample.loss_tokens) == (1, 10)


def test_half_of_glms_single_documents_cut_a_span_anywhere_with_an_end() -> None:
    objective = Objective(IDS, MIXTURES["glm-10b"])
    text = np.arange(1000, 1100, dtype=np.int32)
    samples = [objective.sample(text, "document", generator(1, 0, index)) for index in range(400)]
    with_end = [sample for sample in samples if sample.targets[-1] == IDS.eop]
    assert 160 < len(with_end) < 240
    assert any(sample.ids[sample.context_length - 1] != IDS.gmask for sample in with_end)
    two = np.append(text, [IDS.end_of_text, *text])
    assert all(objective.sample(two, "document", generator(1, 0, index)).targets[-1] != IDS.eop for index in range(50))


def test_denoising_hides_a_tenth_of_part_b_in_the_input_only() -> None:
    objective = Objective(IDS, Mixture(token=1, document=0, hide_tokens=True))
    samples = [objective.sample(np.arange(5000, 5450), "token", generator(0, 0, index)) for index in range(60)]
    hidden = sum(int((sample.ids == IDS.hidden).sum()) for sample in samples)
    tokens = sum(int((sample.targets >= 5000).sum() - (sample.targets >= 130000).sum()) for sample in samples)
    assert abs(hidden / tokens - 0.1) < 0.015
    assert not any(IDS.hidden in sample.targets for sample in samples)
    assert not any(IDS.hidden in sample.ids[: sample.context_length] for sample in samples)


def test_a_limit_counts_every_target_it_takes() -> None:
    whole = worked_example()
    cut = fill_spans(TEXT, [Span(2, 3), Span(5, 8)], [1, 0], IDS, mask=IDS.mask, objective="token", limit=11)
    assert (len(cut), cut.loss_tokens, cut.cut_targets) == (11, 3, 3)
    assert cut.ids.tolist() == whole.ids[:11].tolist()


def test_an_instruction_loses_the_end_of_its_prompt_first_and_of_its_answer_last() -> None:
    prompt, answer = np.arange(100, 130, dtype=np.int32), np.arange(200, 210, dtype=np.int32)
    whole = prompt_sample(prompt, answer, IDS, mask=IDS.mask, window=64)
    assert whole.ids.tolist() == [*prompt, IDS.mask, IDS.sop, *answer]
    assert whole.targets.tolist() == [IGNORE] * 31 + [*answer, IDS.eop]
    assert whole.positions[0, 30:].tolist() == [30] * 12
    shorter = prompt_sample(prompt, answer, IDS, mask=IDS.mask, window=24)
    assert (len(shorter), shorter.context_length, shorter.cut_targets) == (24, 13, 0)
    tight = prompt_sample(prompt, answer, IDS, mask=IDS.mask, window=12)
    assert (len(tight), tight.context_length, tight.cut_targets) == (12, 4, 3)


def test_mixtures_are_those_of_the_publications() -> None:
    chatglm = named_mixture("chatglm-6b")
    assert (chatglm.token, chatglm.sentence, chatglm.document, chatglm.instruction) == (0.3, 0, 0.7, 0.05)
    assert (chatglm.r_min, chatglm.parts, chatglm.sequence_length) == (0.2, 4, 2048)
    assert (chatglm.short_seq_prob, chatglm.single_span_prob) == (0.02, 0.02)
    ten = named_mixture("glm-10b-1024")
    assert (ten.token, ten.sentence, ten.document, ten.short_seq_prob, ten.single_span_prob) == (
        0.4,
        0.3,
        0.3,
        0.5,
        0.05,
    )
    with pytest.raises(TrainingError, match="no mixture is called `glm-130`") as error:
        named_mixture("glm-130")
    assert error.value.cure == "did you mean `glm-130b`?"
    with pytest.raises(TrainingError, match=r"is 1\.2"):
        Mixture(token=0.5, document=0.7)
