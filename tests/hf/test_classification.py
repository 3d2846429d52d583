"""ChatGLMForSequenceClassification: the reward model under transformers' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import chatglm.hf
from chatglm.errors import ChatGLMError
from chatglm.tokenizer import Tokenizer
from chatglm.training.rlhf.answers import closed_sample, one_a_row
from chatglm.training.rlhf.reward import RewardModel, load_reward_model, reward_tensors, save_reward_model
from golden_vectors import GOLDEN
from tiny_policies import prompts_of, tiny_policy, tiny_tokenizer

__all__ = ["tiny_tokenizer"]


@pytest.fixture(scope="module")
def reward(tiny_tokenizer: Tokenizer) -> RewardModel:
    return RewardModel(tiny_policy(tiny_tokenizer), seed=2)


@pytest.fixture(scope="module")
def folder(reward: RewardModel, tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "model"
    return save_reward_model(path, reward.config, reward_tensors(reward), tokenizer_file=tiny_tokenizer.path)


def padded(reward: RewardModel, tokenizer: Tokenizer, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [[*p.context, reward.config.bos_token_id, 350, 351, tokenizer.eop_id] for p in prompts_of(tokenizer)]
    width = max(map(len, rows))
    fill = [[tokenizer.pad_id] * (width - len(row)) for row in rows]
    marks = [[0] * len(gap) for gap in fill]
    ones = [[1] * len(row) for row in rows]
    if side == "left":
        return (
            torch.tensor([gap + row for gap, row in zip(fill, rows, strict=True)]),
            torch.tensor([gap + row for gap, row in zip(marks, ones, strict=True)]),
        )
    return (
        torch.tensor([row + gap for gap, row in zip(fill, rows, strict=True)]),
        torch.tensor([row + gap for gap, row in zip(marks, ones, strict=True)]),
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_the_project_trained_opens_under_transformers_with_the_same_scores(
    side: str, reward: RewardModel, folder: Path, tiny_tokenizer: Tokenizer
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    assert type(model) is chatglm.hf.ChatGLMForSequenceClassification and model.num_labels == 1
    ids, mask = padded(reward, tiny_tokenizer, side)
    samples = [closed_sample(p.context, [350, 351], reward.config) for p in prompts_of(tiny_tokenizer)]
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert logits.shape == (len(samples), 1)
    torch.testing.assert_close(logits[:, 0], reward.scores(one_a_row(samples)), rtol=0, atol=1e-4)


def test_what_transformers_saved_opens_in_the_project(folder: Path, tmp_path: Path, reward: RewardModel) -> None:
    model: Any = AutoModelForSequenceClassification.from_pretrained(str(folder))
    with torch.no_grad():
        model.score.bias.fill_(0.5)
    model.save_pretrained(tmp_path / "saved")
    again = load_reward_model(tmp_path / "saved")
    assert again.score.bias.item() == 0.5
    assert torch.equal(again.transformer.word_embeddings.weight, reward.transformer.word_embeddings.weight)


def test_a_language_model_gets_a_new_head_and_learns_a_preference() -> None:
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        str(GOLDEN / "models" / "base-fp32"), num_labels=1
    ).float()
    config = model.config
    assert model.score.bias.item() == 0 and model.score.weight.std() < 0.1
    context = [11, 12, config.gmask_token_id, config.bos_token_id]
    chosen, rejected = (torch.tensor([[*context, token, config.eos_token_id]]) for token in (21, 22))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        loss = -torch.nn.functional.logsigmoid(model(chosen).logits - model(rejected).logits).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model(chosen).logits - model(rejected).logits).item() > 0.1


def test_the_squared_error_and_classes_have_a_loss() -> None:
    path = str(GOLDEN / "models" / "base-fp32")
    single: Any = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).float()
    three: Any = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3).float()
    config = single.config
    ids = torch.tensor([[11, config.gmask_token_id, config.bos_token_id, 21, config.eos_token_id]])
    output = single(ids, labels=torch.tensor([2.0]))
    assert output.loss.item() == pytest.approx((output.logits.item() - 2) ** 2, rel=1e-5)
    classes = three(ids, labels=torch.tensor([1]))
    assert classes.loss.item() == pytest.approx(-classes.logits.log_softmax(-1)[0, 1].item(), rel=1e-5)


def test_a_damaged_reward_folder_is_refused_before_loading(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ChatGLMError, match=r"model\.safetensors"):
        AutoModelForSequenceClassification.from_pretrained(str(broken))
