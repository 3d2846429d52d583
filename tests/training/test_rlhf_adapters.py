"""PPO and RLOO of an adapter over a frozen base: no copy of the model, and a reference that is the base itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_rlhf_stages import folder, one_thread, run_of, settings_of, tiny_tokenizer

import chatglm
from chatglm.checkpoint import open_checkpoint
from chatglm.checkpoint.reading import read_tensor
from chatglm.training.methods import tuned
from chatglm.training.rlhf import online_stage
from chatglm.training.rlhf.look_ahead import look_at_prompts
from chatglm.training.rlhf.online import Online
from chatglm.training.rlhf.reference import FirstValues, standing
from chatglm.training.run_config import RunConfig

__all__ = ["folder", "one_thread", "tiny_tokenizer"]

pytest.importorskip("peft")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo-lora": ("ppo", {"method.name": "lora", "ppo.value": "shared", "ppo.value_warmup": 0}),
    "rloo-lora": ("rloo", {"method.name": "lora"}),
    "rloo-qlora": ("rloo", {"method.name": "qlora", "method.bits": 8}),
    "rloo-ptuning": ("rloo", {"method.name": "ptuning", "method.pre_seq_len": 3, "optimizer.lr": 0.5}),
}
FLAGS: dict[str, Any] = {"steps": 6, "optimizer.lr": 0.05, "evaluate.every": 0, "online.beta": 0.0}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_learns_from_rewards_and_its_folder_opens_over_the_base(
    case: str, folder: Path, tmp_path: Path
) -> None:
    stage, method = CASES[case]
    report = run_of(stage, folder, tmp_path, **(FLAGS | method))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert abs(lines[0]["kl_k1"]) < 1e-5 and lines[-1]["kl_k3"] > 1e-4  # from the base, as it still is
    assert all(line["engine_ratio_error"] < 1e-3 for line in lines)  # what is drawn knows the adapter
    assert all(abs(line["ratio"] - 1) < 1e-3 for line in lines[::2])  # first of a round: nothing was dropped
    written = {path.name for path in (tmp_path / "model").iterdir()}
    assert ("adapter_model.safetensors" in written) == ("lora" in case)
    assert report.model is not None
    model = chatglm.load(folder / "policy", adapter=report.model, dtype="fp32", device="cpu")
    assert model.chat("What colour is the sky?", max_new_tokens=4).usage.answer_tokens <= 4


def test_an_adapter_run_keeps_no_copy_of_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Online] = []
    begin = Online.__init__

    def noted(self: Online, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        held.append(self)

    monkeypatch.setattr(Online, "__init__", noted)
    monkeypatch.setattr(online_stage, "copy_of", lambda model: pytest.fail("the model was copied"))
    run_of("rloo", folder, tmp_path, **(FLAGS | CASES["rloo-lora"][1] | {"steps": 2}))
    (online,) = held
    base = open_checkpoint(folder / "policy").tensors
    for name, parameter in online.policy.named_parameters():
        if name in base:
            assert torch.equal(parameter, read_tensor(base[name])), name
    assert isinstance(online.reference, FirstValues)
    kept = sum(value.numel() for value in online.reference.values.values())
    assert kept == 2 * 8 * (32 + 96)  # two layers, rank 8, beside query_key_value


def test_a_stopped_adapter_run_goes_on_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    stage, method = CASES["ppo-lora"]
    flags = {**FLAGS, **method, "online.epochs": 2, "batch.rows": 2, "batch.micro_rows": 2}
    run_of(stage, folder, tmp_path / "whole", **flags)
    run_of(stage, folder, tmp_path / "parts", **{**flags, "steps": 3})
    run_of(stage, folder, tmp_path / "parts", **flags)
    one, other = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_policy_stands_as_its_own_reference_and_comes_back(folder: Path, tmp_path: Path) -> None:
    run: RunConfig = settings_of("rloo", folder, tmp_path, **{"method.name": "lora"})
    policy = tuned(run).glm
    first = FirstValues.of(policy)
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1)
    moved = [parameter.detach().clone() for parameter in parameters]
    policy.train()
    with standing(first) as outer, standing(first):  # inside itself too
        assert outer is policy and not policy.training
        assert all(torch.equal(p, value) for p, value in zip(parameters, first.values.values(), strict=True))
    assert policy.training
    assert all(torch.equal(p, value) for p, value in zip(parameters, moved, strict=True))


def test_the_forecast_of_an_adapter_run_counts_no_second_model(folder: Path, tmp_path: Path) -> None:
    full = look_at_prompts(settings_of("rloo", folder, tmp_path))["forecast"]
    lora = look_at_prompts(settings_of("rloo", folder, tmp_path, **{"method.name": "lora"}))["forecast"]
    assert lora["trained"] == 2 * 8 * (32 + 96)
    assert lora["memory"] < full["memory"] and lora["frozen"] == full["frozen"]  # base and reward model; two models
