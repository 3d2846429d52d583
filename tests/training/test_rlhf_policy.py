"""Answers as samples, log-probabilities in the training forward, and roll-outs through the engine."""

from __future__ import annotations

import pytest
import torch

from chatglm.errors import TrainingError
from chatglm.model.batch import left_padded
from chatglm.tokenizer import Tokenizer
from chatglm.training.rlhf.answers import answer_numbers, answer_sample, closed_sample, last_tokens, one_a_row
from chatglm.training.rlhf.policy import action_logprobs, by_tokens, score_actions
from chatglm.training.rlhf.rollout import RolloutEngine, make_prompt, places_of
from chatglm.training.samples import IGNORE, collate
from tiny_policies import prompts_of, tiny_config, tiny_policy, tiny_tokenizer

__all__ = ["tiny_tokenizer"]


def test_an_answer_is_trained_from_sop_to_its_end_and_the_context_never(tiny_tokenizer: Tokenizer) -> None:
    config = tiny_config(tiny_tokenizer)
    context, answer = [340, 341, config.gmask_token_id], [350, 351]
    sample = answer_sample(context, answer, config)
    assert sample.ids.tolist() == [*context, config.bos_token_id, *answer]
    assert sample.targets.tolist() == [IGNORE] * 3 + [350, 351, config.eos_token_id]
    assert sample.positions.tolist() == [[0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]]
    assert sample.context_length == 3
    cut = answer_sample(context, answer, config, is_finished=False)
    assert cut.targets.tolist() == [IGNORE] * 3 + [350, 351]


def test_a_context_without_its_mask_and_one_that_is_too_long_are_refused(tiny_tokenizer: Tokenizer) -> None:
    config = tiny_config(tiny_tokenizer)
    with pytest.raises(TrainingError, match="does not end in"):
        answer_sample([340], [350], config)
    with pytest.raises(TrainingError, match="67 tokens, the model holds 64"):
        answer_sample([340] * 63 + [config.gmask_token_id], [350, 351], config)


def test_scores_are_taken_at_the_last_real_token_of_each_answer(tiny_tokenizer: Tokenizer) -> None:
    config = tiny_config(tiny_tokenizer)
    short = closed_sample([config.gmask_token_id], [350], config)
    long = closed_sample([340, config.gmask_token_id], [350, 351], config)
    batch = collate([[short, long], [short]])
    rows, columns = last_tokens(batch)
    assert rows.tolist() == [0, 0, 1]
    assert columns.tolist() == [3, 9, 3]
    assert (batch.ids[rows, columns] == config.eos_token_id).all()
    assert answer_numbers(batch)[1].tolist() == [2] * 4 + [-1] * 6


@pytest.mark.parametrize("changes", [{}, {"position_encoding": "rotary_1d"}], ids=["2d", "1d"])
def test_log_probabilities_equal_those_of_a_plain_pass(tiny_tokenizer: Tokenizer, changes: dict[str, object]) -> None:
    policy = tiny_policy(tiny_tokenizer, **changes)
    contexts = [list(prompt.context) for prompt in prompts_of(tiny_tokenizer)]
    answers = [[350, 351, 352], [353], [354, 355], [356] * 5]
    samples = [answer_sample(c, a, policy.config) for c, a in zip(contexts, answers, strict=True)]
    scored = score_actions(policy, one_a_row(samples), chunk_elements=2 * policy.config.vocab_size)
    ended = [[*answer, policy.config.eos_token_id] for answer in answers]
    ids, positions, blocked = left_padded(contexts, [e[:-1] for e in ended], policy.config, torch.device("cpu"))
    logits = policy(ids, positions, blocked)
    expected = torch.cat(
        [logits[k, -len(e) :].log_softmax(-1).gather(1, torch.tensor(e)[:, None])[:, 0] for k, e in enumerate(ended)]
    )
    torch.testing.assert_close(scored.logprobs, expected, rtol=0, atol=1e-4)
    assert scored.lengths.tolist() == [4, 2, 3, 6]
    torch.testing.assert_close(scored.sums[1], expected[4:6].sum(), rtol=0, atol=1e-4)
    packed = score_actions(policy, collate([samples[:3], samples[3:]]))
    torch.testing.assert_close(packed.logprobs, expected, rtol=0, atol=1e-4)


def test_chunked_scores_have_the_gradients_of_whole_ones(tiny_tokenizer: Tokenizer) -> None:
    policy = tiny_policy(tiny_tokenizer)
    samples = [answer_sample(p.context, [350, 351], policy.config) for p in prompts_of(tiny_tokenizer)]
    gradients = []
    for chunk in (1 << 26, 3 * policy.config.vocab_size):
        policy.zero_grad()
        score_actions(policy, one_a_row(samples), chunk_elements=chunk).sums.sum().backward()
        gradients.append([parameter.grad.clone() for parameter in policy.parameters()])
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)


def test_samples_that_run_together_stay_within_their_tokens() -> None:
    assert by_tokens([3, 5, 2, 9, 1], 10) == [[0, 1], [2], [3], [4]]
    assert by_tokens([20], 10) == [[0]]


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_the_engine_and_the_training_forward_agree_on_what_was_drawn(tiny_tokenizer: Tokenizer, kernels: str) -> None:
    policy = tiny_policy(tiny_tokenizer)
    engine = RolloutEngine(policy, tiny_tokenizer, max_new=12, batch=6, kernels=kernels)
    answers = engine.sample(prompts_of(tiny_tokenizer), each=3, seed=5)
    assert [answer.prompt for answer in answers[:4]] == [prompts_of(tiny_tokenizer)[n] for n in (0, 0, 0, 1)]
    assert len({answer.ids for answer in answers}) > 6
    logprobs, _ = action_logprobs(policy, [answer.sample(policy.config) for answer in answers], most_tokens=100)
    drawn = torch.tensor([value for answer in answers for value in answer.logprobs])
    ratio = (logprobs - drawn).exp()
    assert (ratio - 1).abs().max() < 1e-3
    assert engine.rate.tokens == len(drawn)


def test_an_answer_is_the_same_however_the_batch_is_cut(tiny_tokenizer: Tokenizer) -> None:
    policy = tiny_policy(tiny_tokenizer)
    prompts = prompts_of(tiny_tokenizer)
    whole = RolloutEngine(policy, tiny_tokenizer, max_new=8).sample(prompts, each=2, seed=1)
    cut = RolloutEngine(policy, tiny_tokenizer, max_new=8, batch=3).sample(prompts, each=2, seed=1)
    assert [answer.ids for answer in whole] == [answer.ids for answer in cut]
    other = RolloutEngine(policy, tiny_tokenizer, max_new=8).sample(prompts, each=2, seed=2)
    assert [answer.ids for answer in whole] != [answer.ids for answer in other]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_step_of_the_optimiser_is_seen_by_the_next_roll_out(tiny_tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    policy, other = tiny_policy(tiny_tokenizer).to(dtype), tiny_policy(tiny_tokenizer, seed=1).to(dtype)
    policy.tie_head()
    prompts = prompts_of(tiny_tokenizer)
    engine = RolloutEngine(policy, tiny_tokenizer, max_new=8)
    before = engine.sample(prompts, seed=1)
    with torch.no_grad():
        for mine, theirs in zip(policy.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)  # in place, as an optimiser does
            if mine.ndim == 1:
                mine.add_(0.1)  # norms and biases too
                theirs.add_(0.1)
    after = engine.sample(prompts, seed=1)
    fresh = RolloutEngine(other, tiny_tokenizer, max_new=8).sample(prompts, seed=1)
    assert [answer.ids for answer in after] == [answer.ids for answer in fresh]
    assert [answer.ids for answer in after] != [answer.ids for answer in before]


def test_a_prompt_without_room_for_an_answer_is_refused(tiny_tokenizer: Tokenizer) -> None:
    engine = RolloutEngine(tiny_policy(tiny_tokenizer), tiny_tokenizer, max_new=8)
    with pytest.raises(TrainingError, match="the model holds 64"):
        engine.sample([make_prompt(tiny_tokenizer, "sky sea " * 40)])


def test_draws_follow_the_distribution_and_never_take_what_has_no_probability() -> None:
    """Against one cumulative sum; more tokens than a block, blocks without any probability."""
    random = torch.Generator().manual_seed(2)
    scores = torch.randn(40, 1300, generator=random) * 3
    scores[:, 512:1024] = -torch.inf
    scores[::2, :300] = -torch.inf
    scores[3:, 1250:] = -torch.inf
    scores = scores.log_softmax(dim=-1)
    uniform = torch.rand(40, 1, generator=random, dtype=torch.float64)
    uniform[:3, 0] = torch.tensor([0.0, 1 - 2**-53, 0.5])
    cumulative = scores.double().exp().cumsum(dim=-1)
    expected = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp(max=1299)
    found = places_of(scores, uniform)
    assert (scores.gather(1, found) > -torch.inf).all()
    assert torch.equal(found[2:], expected[2:])
