"""The sampler against its definitions: shares, lengths, places, cut targets. Fixed seeds, so never a matter of luck."""

from __future__ import annotations

import math

import numpy as np
import pytest

from chatglm.config import ModelConfig
from chatglm.training.objective import CHATGLM, Objective, SpecialIds, generator
from chatglm.training.objective.sampling import text_tokens
from chatglm.training.objective.spans import draw_lengths, place_spans, token_spans

IDS = SpecialIds.of_config(ModelConfig())
ROWS = 6_000


@pytest.fixture(scope="module")
def lengths() -> list[np.ndarray]:
    return [draw_lengths(450, np.random.default_rng((7, index))) for index in range(ROWS)]


def expected_masked_tokens(wanted: int) -> float:
    """E[sum when it first reaches `wanted`], by dynamic programming over the truncated Poisson: no sampler involved."""
    weights = [3**k / math.factorial(k) for k in range(1, 40)]
    weights = [weight / sum(weights) for weight in weights]
    reached = np.zeros(wanted + 40)
    reached[0] = 1.0
    total = 0.0
    for so_far in range(wanted):
        for length, weight in enumerate(weights, start=1):
            if so_far + length >= wanted:
                total += reached[so_far] * weight * (so_far + length)
            else:
                reached[so_far + length] += reached[so_far] * weight
    return total


def test_share_of_masked_tokens_is_as_defined(lengths: list[np.ndarray]) -> None:
    share = np.mean([part.sum() for part in lengths]) / 450
    assert share == pytest.approx(expected_masked_tokens(67) / 450, rel=0.01)
    assert share >= 67 / 450


def test_span_lengths_are_a_poisson_of_three_without_zero() -> None:
    drawn = np.concatenate([draw_lengths(2_000_000, np.random.default_rng(3))])
    frequencies = np.bincount(drawn, minlength=40) / len(drawn)
    expected = np.array([0.0] + [3**k / math.factorial(k) * math.exp(-3) for k in range(1, 40)]) / (1 - math.exp(-3))
    assert np.abs(frequencies - expected).max() < 0.01
    assert drawn.mean() == pytest.approx(3 / (1 - math.exp(-3)), rel=0.01)
    assert frequencies[1:7] == pytest.approx(expected[1:7], rel=0.03)


def test_every_place_of_the_text_is_cut_about_equally_often() -> None:
    hits = np.zeros(450)
    for index in range(ROWS):
        for start, stop in token_spans(450, np.random.default_rng((5, index))) or []:
            hits[start:stop] += 1
    middle = hits[30:-30].reshape(-1, 30).mean(axis=1) / ROWS
    assert np.abs(middle / middle.mean() - 1).max() < 0.03


def test_single_places_are_uniform_to_the_last_one() -> None:
    starts = [
        place_spans(np.array([3]), 12, np.random.default_rng((1, index)))[0].start  # type: ignore[index]
        for index in range(ROWS)
    ]
    counts = np.bincount(starts)
    assert len(counts) == 10 and counts.min() > 0.85 * ROWS / 10


def test_no_target_is_cut_at_the_default_and_many_with_glm_130bs_rows() -> None:
    objective = Objective(IDS, CHATGLM)
    assert (text_tokens(512), objective.text_length("token", 2048)) == (450, 1800)
    text = np.arange(1000, 2800, dtype=np.int32)
    rows = [objective.samples(text, "token", 2048, generator(0, 0, index)) for index in range(ROWS // 4)]
    assert all(len(row) == 4 and sum(map(len, row)) <= 2048 for row in rows)
    cut = sum(sample.cut_targets for row in rows for sample in row)
    targets = sum(sample.loss_tokens for row in rows for sample in row)
    assert cut == 0
    spans_and_ends = (1 + 0.3167) * expected_masked_tokens(67) / 450  # a span has 3.157 tokens
    assert targets / (ROWS * 450) == pytest.approx(
        0.98 * 0.99 * spans_and_ends, rel=0.01
    )  # a few single and short ones
    long = np.arange(1000, 1500, dtype=np.int32)
    samples = [objective.sample(long, "token", generator(0, 0, index), limit=512) for index in range(1000)]
    lost = sum(sample.cut_targets for sample in samples)
    assert 0.3 < lost / (lost + sum(sample.loss_tokens for sample in samples)) < 0.4


def test_modes_are_drawn_in_their_shares() -> None:
    objective = Objective(IDS, CHATGLM)
    modes = [objective.draw_mode(generator(11, 0, index)) for index in range(ROWS)]
    assert modes.count("token") / ROWS == pytest.approx(0.3, abs=0.01)
    assert modes.count("sentence") == 0


def test_generated_share_of_documents_is_uniform_from_r_min() -> None:
    objective = Objective(IDS, CHATGLM)
    text = np.arange(1000, 3000, dtype=np.int32)
    rows = [objective.samples(text, "document", 2048, generator(2, 0, index))[0] for index in range(3000)]
    shares = np.array([row.loss_tokens / (len(row) - 1) for row in rows])
    assert shares.mean() == pytest.approx(0.6, rel=0.01)
    assert 0.2 <= shares.min() < 0.21 and 0.99 < shares.max() <= 1


def test_a_sample_depends_on_seed_epoch_and_index_alone() -> None:
    objective = Objective(IDS, CHATGLM)
    text = np.arange(1000, 2800, dtype=np.int32)

    def ids(*key: int) -> list[list[int]]:
        return [sample.ids.tolist() for sample in objective.samples(text, "token", 2048, generator(*key))]

    forward = [ids(0, 1, index) for index in range(5)]
    assert [ids(0, 1, index) for index in reversed(range(5))] == forward[::-1]
    assert ids(0, 1, 0) != ids(0, 2, 0) != ids(1, 2, 0) != ids(0, 1, 1)
