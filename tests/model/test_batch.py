"""Left-padded batches of contexts and answers."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given

from chatglm.model.batch import by_length, left_padded
from chatglm.model.positions import find_layout, generation_positions, prefix_blocked
from checkpoint_folders import SMALL


def test_rows_stand_at_the_right_with_the_masks_and_positions_of_a_search() -> None:
    contexts = [[5, 6, 7, SMALL.gmask_token_id], [9, SMALL.gmask_token_id]]
    answers = [[11, 12], [13, 14, 15]]
    ids, positions, blocked = left_padded(contexts, answers, SMALL, torch.device("cpu"))
    pad, sop = SMALL.pad_token_id, SMALL.bos_token_id
    assert ids.tolist() == [[*contexts[0], sop, 11, 12], [pad, *contexts[1], sop, 13, 14, 15]]
    layout = find_layout(ids, SMALL, left_padding=torch.tensor([0, 1]))
    assert torch.equal(positions, generation_positions(layout, 7, SMALL))
    assert torch.equal(blocked, prefix_blocked(layout, 7))


@given(lengths=st.lists(st.integers(1, 50), max_size=40), most=st.integers(1, 200))
def test_every_row_is_in_one_batch_and_no_batch_is_too_large(lengths: list[int], most: int) -> None:
    batches = list(by_length(lengths, most))
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[number] for number in batch)
        assert longest * len(batch) <= most or len(batch) == 1
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts == sorted(firsts, reverse=True)
