"""Preferences from files, the reward model, its report, and its folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import chatglm
from chatglm.checkpoint import verify
from chatglm.errors import CheckpointError, TrainingError
from chatglm.tokenizer import Tokenizer
from chatglm.training.rlhf.answers import closed_sample, one_a_row
from chatglm.training.rlhf.copying import copy_of
from chatglm.training.rlhf.pairs import PairSource
from chatglm.training.rlhf.preferences import (
    Pair,
    balance_lengths,
    read_preferences,
    reward_row,
    split_by_prompt,
    tokenize_pairs,
)
from chatglm.training.rlhf.reward import RewardModel, load_reward_model, reward_tensors, save_reward_model
from chatglm.training.rlhf.reward_report import reward_report
from chatglm.training.run_config import ModelSettings
from chatglm.training.samples import collate
from chatglm.training.starting import starting_model
from tiny_policies import prompts_of, tiny_config, tiny_policy, tiny_tokenizer

__all__ = ["tiny_tokenizer"]

GOOD = {
    "prompt": "sky?",
    "chosen": "blue.",
    "rejected": "blue",
    "history": [["a", "b"]],
    "margin": 0.5,
    "source": "human",
}


def file_of(folder: Path, *lines: Any) -> Path:
    path = folder / "pairs.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_preferences_are_read_with_history_margin_and_source(tmp_path: Path) -> None:
    (found,) = read_preferences(file_of(tmp_path, GOOD, "", GOOD))
    assert (found.prompt, found.chosen, found.rejected) == ("sky?", "blue.", "blue")
    assert (found.history, found.margin, found.source) == ((("a", "b"),), 0.5, "human")
    assert "[Round 1]\n问：sky?" in found.text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "not JSON"),
        ("[]", "a JSON list"),
        ({"prompt": "a", "chosen": "b"}, "`rejected` is missing"),
        ({"prompt": "a", "chosen": " ", "rejected": "c"}, "`chosen` is missing or empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "same text"),
        ({**GOOD, "history": [["a"]]}, "`history` must be"),
        ({**GOOD, "margin": "wide"}, "`margin` is 'wide'"),
        ({**GOOD, "chosen": "blue", "rejected": "blue."}, "contradicts line 1"),
    ],
)
def test_a_bad_line_is_told_with_its_number_and_can_be_left_out(
    line: Any, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = file_of(tmp_path, GOOD, line)
    with pytest.raises(TrainingError, match=said) as caught:
        read_preferences(path)
    assert "pairs.jsonl:2" in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert len(read_preferences(path, skip_bad=True)) == 1
    assert "1 bad lines" in caplog.text


def test_all_pairs_of_a_prompt_fall_on_one_side(tmp_path: Path) -> None:
    lines = [{"prompt": f"p{n % 40}", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(120)]
    train, held = split_by_prompt(read_preferences(file_of(tmp_path, *lines)), 0.25, seed=1)
    assert len(train) + len(held) == 120
    assert 10 <= len(held) <= 50
    assert not {one.prompt for one in train} & {one.prompt for one in held}


def test_pairs_that_do_not_fit_are_left_out_and_told(
    tiny_tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"prompt": "sky?", "chosen": "blue " * 60, "rejected": "no"}
    found = read_preferences(file_of(tmp_path, GOOD, long))
    with caplog.at_level(logging.WARNING):
        pairs = tokenize_pairs(found, tiny_tokenizer, tiny_config(tiny_tokenizer))
    assert len(pairs) == 1 and "1 pairs of 2" in caplog.text
    assert pairs[0].context[-1] == tiny_tokenizer.gmask_id
    assert tiny_tokenizer.decode(list(pairs[0].chosen)) == "blue."


def test_balanced_pairs_let_the_longer_answer_win_half_the_time_in_every_bin() -> None:
    pairs = [Pair((1,), (5,) * chosen, (6,) * 10) for chosen in [11] * 6 + [9] * 2 + [20] * 3 + [10] * 4]
    kept = [pair.length_difference for pair in balance_lengths(pairs, bin_tokens=4)]
    assert sorted(kept) == [-1, -1, 0, 0, 0, 0, 1, 1]
    assert balance_lengths(pairs, bin_tokens=4) == balance_lengths(pairs, bin_tokens=4)


def test_a_new_head_scores_near_zero_and_padding_changes_no_score(tiny_tokenizer: Tokenizer) -> None:
    model = RewardModel(tiny_policy(tiny_tokenizer))
    assert model.score.bias.item() == 0
    samples = [closed_sample(p.context, [350, 351], model.config) for p in prompts_of(tiny_tokenizer)]
    together = model.scores(one_a_row(samples))
    assert together.abs().max() < 0.5
    alone = torch.cat([model.scores(one_a_row([sample])) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    packed = model.scores(collate([samples[:2], samples[2:]], length=64))
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def test_both_answers_of_a_pair_stand_in_one_batch_and_every_epoch_has_all_pairs(tiny_tokenizer: Tokenizer) -> None:
    config = tiny_config(tiny_tokenizer)
    pairs = [Pair((config.gmask_token_id,), (350 + n,), (351, 350 + n), float(n)) for n in range(5)]
    reference = torch.arange(10.0).unflatten(0, (5, 2))
    source = PairSource(pairs, lambda pair: reward_row(pair, config), seed=3, reference=reference)
    batch = source.batch(0, 5)
    order = [int(margin) for margin in batch.margins]
    assert sorted(order) == [0, 1, 2, 3, 4] and order != [0, 1, 2, 3, 4]
    assert batch.batch.ids[0::2, 2].tolist() == [350 + n for n in order]
    assert batch.batch.ids[1::2, 3].tolist() == [350 + n for n in order]
    assert batch.reference is not None and batch.reference.tolist() == [v for n in order for v in (2 * n, 2 * n + 1)]
    again = source.batch(3, 4)
    assert [int(margin) for margin in again.margins[:2]] == order[3:]


def test_a_report_by_hand_catches_a_model_that_measures_length() -> None:
    pairs = [Pair((1,), (5,) * 12, (6,) * 10, source="human")] * 6 + [Pair((1,), (5,) * 9, (6,) * 10)] * 3
    scores = torch.tensor([[float(len(pair.chosen)), float(len(pair.rejected))] for pair in pairs])
    report = reward_report(pairs, scores, bin_tokens=4)
    assert report.accuracy.accuracy == pytest.approx(6 / 9)
    assert {name: share.accuracy for name, share in report.by_length.items()} == {"+0": 1.0, "-0": 0.0}
    assert report.by_source["human"].pairs == 6
    assert report.length_gap == 1 and report.is_length_shortcut
    assert any("measures length" in line for line in report.lines())
    honest = reward_report(pairs, torch.tensor([[1.0, 0.0]] * 9), bin_tokens=4)
    assert honest.accuracy.accuracy == 1 and not honest.is_length_shortcut
    ((sure, right, count),) = honest.calibration
    assert (sure, right, count) == (pytest.approx(torch.tensor(1.0).sigmoid().item()), 1.0, 9)


def test_a_copy_has_its_own_memory_and_the_same_scores(tiny_tokenizer: Tokenizer) -> None:
    policy = tiny_policy(tiny_tokenizer)
    copy = copy_of(policy)
    for mine, theirs in zip(copy.parameters(), policy.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
    assert copy.lm_head.weight is copy.transformer.word_embeddings.weight


def test_a_reward_folder_opens_again_with_the_same_scores(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = RewardModel(tiny_policy(tiny_tokenizer), seed=4)
    with torch.no_grad():
        model.score.bias.fill_(0.25)
    save_reward_model(tmp_path / "reward", model.config, reward_tensors(model), tokenizer_file=tiny_tokenizer.path)
    batch = one_a_row([closed_sample(p.context, [350], model.config) for p in prompts_of(tiny_tokenizer)])
    again = load_reward_model(tmp_path / "reward")
    torch.testing.assert_close(again.scores(batch), model.scores(batch), rtol=0, atol=0)
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    assert config["architectures"] == ["ChatGLMForSequenceClassification"] and config["num_labels"] == 1


def test_a_language_model_starts_a_reward_model_with_a_new_head(golden: Path) -> None:
    model = load_reward_model(golden / "models" / "base-fp32", seed=1)
    assert model.score.bias.item() == 0 and 0 < model.score.weight.std() < 0.1
    with pytest.raises(CheckpointError, match="is quantised"):
        load_reward_model(golden / "models" / "int8")


def test_a_reward_folder_in_the_place_of_a_language_model_is_told_by_name(
    tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = RewardModel(tiny_policy(tiny_tokenizer))
    save_reward_model(tmp_path, model.config, reward_tensors(model), tokenizer_file=tiny_tokenizer.path)
    (problem,) = verify(tmp_path)
    assert "reward model" in problem.what and "load_reward_model" in problem.cure
    with pytest.raises(CheckpointError, match=r"model.safetensors holds a reward model") as raised:
        chatglm.load(tmp_path, device="cpu")
    assert "chatglm train ppo" in (raised.value.cure or "")
    with pytest.raises(CheckpointError, match="holds a reward model"):
        starting_model(ModelSettings(source=str(tmp_path)), seed=0)
