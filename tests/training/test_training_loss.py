"""The loss: by hand, in chunks, packed or not, and its gradient against finite differences in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from chatglm.config import ModelConfig
from chatglm.model import GLM
from chatglm.model.initialization import initialize
from chatglm.quantization import swap_linears
from chatglm.training.head_loss import has_plain_head, plain_head_losses
from chatglm.training.loss import batch_loss, loss_positions, token_losses
from chatglm.training.masks import dense_blocked, flex_attend, flex_block_mask
from chatglm.training.objective import Objective, SpecialIds, fill_spans, generator
from chatglm.training.objective.spans import Span
from chatglm.training.samples import IGNORE, Sample, collate

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    inner_hidden_size=96,
    max_sequence_length=64,
    residual_scale=2.0,
    bos_token_id=54,
    eos_token_id=55,
    mask_token_id=50,
    gmask_token_id=51,
)
IDS = SpecialIds.of_config(CONFIG)


@pytest.fixture
def model() -> GLM:
    model = GLM(CONFIG)
    initialize(model, seed=3)
    return model


def worked_example() -> Sample:
    text = np.arange(11, 21, dtype=np.int32)
    return fill_spans(text, [Span(2, 3), Span(5, 8)], [1, 0], IDS, mask=IDS.mask, objective="token")


def samples(count: int) -> list[Sample]:
    objective = Objective(IDS)
    text = np.arange(5, 45, dtype=np.int32)
    return [
        objective.sample(text[: 20 + 3 * i], ("token", "document")[i % 2], generator(0, 0, i)) for i in range(count)
    ]


def test_losses_are_the_cross_entropy_of_unshifted_targets(model: GLM) -> None:
    batch = collate([[worked_example()]])
    logits = model(batch.ids, batch.positions, dense_blocked(batch))
    expected = -logits.log_softmax(-1)[0, range(8, 14), [16, 17, 18, 55, 13, 55]]
    losses = token_losses(model, batch)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected)
    total = batch_loss(model, batch)
    assert total.count == 6
    torch.testing.assert_close(total.mean(), functional.cross_entropy(logits[0], batch.targets[0], ignore_index=IGNORE))


def test_chunks_change_neither_losses_nor_gradients(model: GLM) -> None:
    batch = collate([samples(3), samples(2)])
    results = []
    for chunk_bytes in (1 << 28, 64 * 4, 64 * 5 * 4):
        model.zero_grad()
        losses = token_losses(model, batch, chunk_bytes=chunk_bytes)
        losses.sum().backward()
        results.append((losses.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
    for losses, gradients in results[1:]:
        torch.testing.assert_close(losses, results[0][0])
        torch.testing.assert_close(gradients, results[0][1], rtol=1e-4, atol=1e-6)


def test_chunked_head_keeps_no_more_logits_than_a_chunk(model: GLM) -> None:
    batch = collate([samples(4)])
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1:] == (CONFIG.vocab_size,) and tensor.dim() == 2:
            kept.append(tensor.shape[0])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        token_losses(model, batch, chunk_bytes=CONFIG.vocab_size * 4 * 4)
    assert not kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_head_has_the_losses_and_gradients_of_autograd(model: GLM, dtype: torch.dtype) -> None:
    """bf16: the weight's gradient is summed in fp32, so it is no further from fp32's than autograd's is."""
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(40, CONFIG.hidden_size, generator=random)
    targets = torch.randint(CONFIG.vocab_size, (40,), generator=random)
    upstream = torch.rand(40, generator=random)

    def made(head: Callable[[torch.Tensor], torch.Tensor], of: torch.dtype) -> list[torch.Tensor]:
        states = hidden.to(of, copy=True).requires_grad_()
        model.zero_grad()
        losses = head(states)
        (losses * upstream).sum().backward()
        return [losses.detach(), states.grad.float(), model.lm_head.weight.grad.clone()]

    def by_autograd(states: torch.Tensor) -> torch.Tensor:
        parts = zip(states.split(7), targets.split(7), strict=True)
        return torch.cat([functional.cross_entropy(model.logits(part), by, reduction="none") for part, by in parts])

    def ours(states: torch.Tensor) -> torch.Tensor:
        return plain_head_losses(states, model.lm_head.weight, targets, rows=7)

    expected = made(by_autograd, torch.float32)
    found = made(ours, dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected)
        return
    theirs = made(by_autograd, dtype)
    for own, other, true in zip(found, theirs, expected, strict=True):
        assert torch.linalg.vector_norm(own - true) <= 1.05 * torch.linalg.vector_norm(other - true)


def test_a_quantised_head_takes_the_general_way(model: GLM) -> None:
    assert has_plain_head(model)
    swap_linears(model, 8, embeddings=True, group_size=0, embedding_bits=8)
    assert not has_plain_head(model)


def test_packed_documents_have_the_losses_they_have_alone(model: GLM) -> None:
    documents = samples(4)
    packed = token_losses(model, collate([documents], sum(map(len, documents)) + 5))
    alone = torch.cat([token_losses(model, collate([[document]])) for document in documents])
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-6)
    rows = token_losses(model, collate([[document] for document in documents]))
    torch.testing.assert_close(rows, alone, rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_gives_the_same_losses(model: GLM) -> None:
    batch = collate([samples(3), samples(1)])
    attend = flex_attend(flex_block_mask(batch, block_size=16), compiled=False)
    with torch.no_grad():  # on a CPU it has no backward pass
        found, expected = token_losses(model, batch, attend=attend), token_losses(model, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


def test_a_later_token_of_part_b_changes_no_earlier_loss(model: GLM) -> None:
    batch = collate([[worked_example()]])
    changed = replace(batch, ids=batch.ids.clone())
    changed.ids[0, 11] = 33
    before, after = token_losses(model, batch), token_losses(model, changed)
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3:], after[3:])


def test_targets_of_the_context_do_not_exist_for_the_loss(model: GLM) -> None:
    batch = collate([[worked_example()]])
    rows, tokens = loss_positions(batch)
    assert rows.tolist() == [0] * 6 and tokens.tolist() == [8, 9, 10, 11, 12, 13]


def test_a_batch_without_targets_has_no_loss_and_no_gradient(model: GLM) -> None:
    batch = collate([[worked_example()]])
    empty = replace(batch, targets=torch.full_like(batch.targets, IGNORE))
    found = batch_loss(model, empty)
    found.total.backward()
    assert (found.total.item(), found.count) == (0.0, 0)
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_one_dimensional_positions_are_read_by_models_that_have_them() -> None:
    model = GLM(replace(CONFIG, position_encoding="rotary_1d"))
    initialize(model, seed=3)
    batch = collate([[worked_example()]])
    logits = model(batch.ids, batch.positions[:, 0], dense_blocked(batch))
    expected = functional.cross_entropy(logits[0], batch.targets[0], ignore_index=IGNORE)
    torch.testing.assert_close(batch_loss(model, batch).mean(), expected)


@pytest.mark.parametrize("chunk_bytes", [1 << 28, 2 * 64 * 8], ids=["whole", "chunked"])
def test_the_gradient_of_the_whole_loss_equals_finite_differences(
    model: GLM, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worked example in fp64: every parameter tensor along three random directions."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # where the model asks for fp32 it gets fp64
    model.double()
    batch = collate([[worked_example()]])

    def loss() -> torch.Tensor:
        return batch_loss(model, batch, chunk_bytes=chunk_bytes).mean()

    value = loss()
    assert value.dtype == torch.float64
    value.backward()
    random = torch.Generator().manual_seed(5)
    step = 1e-6
    for name, parameter in model.named_parameters():
        for _ in range(3):
            direction = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            with torch.no_grad():
                before = parameter.clone()
                parameter += step * direction
                above = loss()
                parameter.copy_(before - step * direction)
                below = loss()
                parameter.copy_(before)
            numeric = float(above - below) / (2 * step)
            exact = float((parameter.grad * direction).sum())
            assert numeric == pytest.approx(exact, rel=1e-5, abs=1e-8), name
