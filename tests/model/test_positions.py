"""Masks and positions follow from lengths; checked against the specification's examples and a direct rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatglm.config import ModelConfig
from chatglm.model.positions import Layout, find_layout, generation_positions, positions, prefix_blocked

CONFIG = ModelConfig()
ONE_D = ModelConfig(position_encoding="rotary_1d")
RUNNING = ModelConfig(position_encoding="rotary_1d", answer_positions="running")


def ids(*row: int) -> torch.Tensor:
    return torch.tensor([row])


def test_worked_example_of_the_specification():
    row = ids(5, 74874, 130001, 130004, 5, 9)
    layout = find_layout(row, CONFIG)
    assert positions(layout, 6, CONFIG).tolist() == [[[0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]]]
    assert positions(layout, 6, ONE_D).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert prefix_blocked(layout, 6).int()[0, 0].tolist() == [
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0],
    ]


def test_a_mask_inside_the_context_keeps_its_place():
    layout = find_layout(ids(5, 130000, 74874, 130004, 5, 9), CONFIG)
    assert positions(layout, 6, CONFIG).tolist() == [[[0, 1, 2, 1, 1, 1], [0, 0, 0, 1, 2, 3]]]
    assert positions(layout, 6, ONE_D).tolist() == [[0, 1, 2, 1, 1, 1]]


def test_left_padded_batch_of_the_specification():
    rows = torch.tensor([[3, 5, 74874, 130001, 130004], [14833, 5, 74874, 130001, 130004]])
    layout = Layout.of_contexts([3, 4], total=5)
    assert positions(layout, 5, CONFIG).tolist() == [
        [[0, 0, 1, 2, 2], [0, 0, 0, 0, 1]],
        [[0, 1, 2, 3, 3], [0, 0, 0, 0, 1]],
    ]
    blocked = prefix_blocked(layout, 5)
    assert blocked[:, 0, -1].int().tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert blocked[0, 0, 0].all()
    assert find_layout(rows, CONFIG, torch.tensor([1, 0])).mask_places.tolist() == [2, 3]


def test_gmask_wins_over_mask():
    layout = find_layout(ids(130000, 5, 63882, 130001, 130004), CONFIG)
    assert layout.mask_places.item() == 3 and layout.is_gmask.item()


@pytest.mark.parametrize(
    ("row", "message"), [((5, 130001), r"no <sop> \(id 130004\)"), ((5, 130004), r"neither \[gMASK\] \(id 130001\)")]
)
def test_missing_marks_name_row_and_id(row, message):
    with pytest.raises(ValueError, match="row 0 .*" + message):
        find_layout(ids(*row), CONFIG)


def test_one_dimensional_answers_stand_at_the_mask_while_generating():
    layout = find_layout(ids(5, 6, 130001, 130004, 7, 8), ONE_D)
    assert generation_positions(layout, 6, ONE_D).tolist() == [[0, 1, 2, 3, 2, 2]]
    assert generation_positions(layout, 6, RUNNING).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert torch.equal(generation_positions(layout, 6, CONFIG), positions(layout, 6, CONFIG))


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[bool], int]:
    rows = draw(st.integers(1, 4))
    contexts = draw(st.lists(st.integers(1, 6), min_size=rows, max_size=rows))
    answers = draw(st.lists(st.integers(1, 5), min_size=rows, max_size=rows))
    places = [draw(st.integers(0, context - 1)) for context in contexts]
    gmasks = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    return contexts, answers, places, gmasks, draw(st.integers(0, 3))


@given(batches())
def test_every_place_follows_the_rule(batch):
    contexts, answers, places, gmasks, extra = batch
    lengths = [context + answer for context, answer in zip(contexts, answers, strict=True)]
    total = max(lengths) + extra
    padding = [total - length for length in lengths]
    layout = Layout(torch.tensor(contexts), torch.tensor(places), torch.tensor(gmasks), torch.tensor(padding))
    blocked = prefix_blocked(layout, total)
    two_d, one_d = positions(layout, total, CONFIG), positions(layout, total, ONE_D)
    for row, (context, place, pad) in enumerate(zip(contexts, places, padding, strict=True)):
        for query in range(total):
            at = query - pad
            if at >= 0:
                assert two_d[row, :, query].tolist() == ([at, 0] if at < context else [place, at - context + 1])
                held = at >= context and not gmasks[row]
                assert one_d[row, query].item() == (place if held else at)
            for key in range(total):
                sees = at >= 0 and key >= pad and (key - pad < context or key <= query)
                assert blocked[row, 0, query, key].item() is not sees


@given(batches(), st.integers(0, 5))
def test_later_positions_are_the_end_of_all_positions(batch, start):
    contexts, answers, places, gmasks, extra = batch
    total = max(c + a for c, a in zip(contexts, answers, strict=True)) + extra
    start = min(start, total - 1)
    layout = Layout(
        torch.tensor(contexts),
        torch.tensor(places),
        torch.tensor(gmasks),
        torch.zeros(len(contexts), dtype=torch.int64),
    )
    for config in (CONFIG, ONE_D, RUNNING):
        whole = generation_positions(layout, total, config)
        assert torch.equal(generation_positions(layout, total, config, start=start), whole[..., start:])
