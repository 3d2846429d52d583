"""The mask of packed rows: the definition, the dense form and FlexAttention's, one rule."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention.flex_attention import create_block_mask

from chatglm.model.attention import sdpa_attention
from chatglm.model.positions import Layout, prefix_blocked
from chatglm.training.masks import dense_blocked, flex_attend, flex_block_mask
from chatglm.training.samples import Batch, Sample, collate


def sample(tokens: int, context: int) -> Sample:
    empty = np.zeros(tokens, dtype=np.int32)
    return Sample(empty, empty, np.zeros((2, tokens), dtype=np.int32), context, "token")


rows_of_samples = st.lists(
    st.lists(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=4),
    min_size=1,
    max_size=3,
)


def batch_of(rows: list[list[tuple[int, int]]], padding: int = 0) -> Batch:
    packed = [[sample(tokens, context) for tokens, context in row] for row in rows]
    return collate(packed, max(sum(map(len, row)) for row in packed) + padding)


@given(rows=rows_of_samples, padding=st.integers(0, 3))
def test_a_token_sees_its_own_context_and_what_stands_before_it(
    rows: list[list[tuple[int, int]]], padding: int
) -> None:
    batch = batch_of(rows, padding)
    blocked = dense_blocked(batch)
    for number, row in enumerate(rows):
        allowed = torch.eye(batch.ids.shape[1], dtype=torch.bool)  # padding sees itself
        start = 0
        for tokens, context in row:
            for query in range(tokens):
                for key in range(tokens):
                    allowed[start + query, start + key] = key < context or key <= query
            start += tokens
        assert torch.equal(blocked[number, 0], ~allowed)


def test_one_document_has_the_mask_that_the_engine_uses() -> None:
    batch = batch_of([[(7, 3)]])
    assert torch.equal(dense_blocked(batch), prefix_blocked(Layout.of_contexts([3], total=4), 7))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@settings(max_examples=10)
@given(rows=rows_of_samples, padding=st.integers(0, 3))
def test_flex_attention_equals_the_dense_mask(rows: list[list[tuple[int, int]]], padding: int) -> None:
    batch = batch_of(rows, padding)
    random = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(batch.ids.shape[0], 2, batch.ids.shape[1], 16, generator=random) for _ in range(3))
    flex = flex_attend(flex_block_mask(batch, block_size=8), compiled=False)
    expected = sdpa_attention(query, key, value, dense_blocked(batch))
    torch.testing.assert_close(flex(query, key, value, None), expected, rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@settings(max_examples=6)
@given(rows=rows_of_samples, padding=st.integers(0, 3), prefix=st.integers(1, 9))
def test_every_token_sees_a_tuned_prefix_under_both_masks(
    rows: list[list[tuple[int, int]]], padding: int, prefix: int
) -> None:
    batch = batch_of(rows, padding)
    random = torch.Generator().manual_seed(1)
    lines, tokens = batch.ids.shape
    query = torch.randn(lines, 2, tokens, 16, generator=random)
    key, value = (torch.randn(lines, 2, prefix + tokens, 16, generator=random) for _ in range(2))
    flex = flex_attend(flex_block_mask(batch, prefix=prefix, block_size=8), compiled=False)
    blocked = torch.nn.functional.pad(dense_blocked(batch), (prefix, 0), value=False)
    torch.testing.assert_close(
        flex(query, key, value, None), sdpa_attention(query, key, value, blocked), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("prefix", [0, 5, 16])
def test_blocks_are_those_that_the_rule_itself_gives(prefix: int) -> None:
    """Against PyTorch's own way from the rule to blocks, over rows with many borders."""
    random = np.random.default_rng(0)
    for _ in range(8):
        lengths = [[int(n) for n in random.integers(1, 60, int(random.integers(1, 6)))] for _ in range(3)]
        batch = batch_of([[(n, int(random.integers(0, n + 1))) for n in row] for row in lengths], padding=7)
        mask, tokens = flex_block_mask(batch, prefix=prefix, block_size=16), batch.ids.shape[1]
        allowed = torch.nn.functional.pad(~dense_blocked(batch), (prefix, 0), value=True)[:, 0]
        query, key = torch.arange(tokens)[:, None], torch.arange(prefix + tokens)
        found = torch.stack([mask.mask_mod(torch.tensor(row), torch.tensor(0), query, key) for row in range(3)])
        assert torch.equal(found, allowed)
        expected = create_block_mask(
            mask.mask_mod, 3, None, tokens, prefix + tokens, device="cpu", BLOCK_SIZE=16
        )  # fmt: skip
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(mask, name), getattr(expected, name)), name
        assert torch.equal(mask.to_dense(), expected.to_dense())
