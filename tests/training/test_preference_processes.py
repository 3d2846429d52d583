"""Stages that learn from preferences by two processes, whole or in parts: the losses, reports and models of one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rlhf_stages import folder as files
from test_rlhf_stages import settings_of, tiny_tokenizer

from chatglm.checkpoint import open_checkpoint
from chatglm.checkpoint.reading import read_tensor
from chatglm.training.rlhf import bootstrap_stage, dpo_stage, online_stage, reward_stage
from two_processes import in_two_processes

__all__ = ["files", "tiny_tokenizer"]

TOLERANCE = 1e-6
WAYS = ("reward-fsdp", "reward-ddp", "dpo-fsdp", "dpo-ddp", "rloo-auto", "bootstrap-auto")
RUNS: dict[str, Any] = {
    "reward": reward_stage.run,
    "dpo": dpo_stage.run,
    "rloo": online_stage.run_rloo,
    "bootstrap": bootstrap_stage.run,
}


def run_of(made: Path, stage: str, strategy: str) -> dict[str, Any]:
    out = made / f"two-{stage}-{strategy}"
    flags = {"steps": 3, "batch.micro_rows": 2, "optimizer.lr": 1e-3, "evaluate.every": 2, "export.dtype": "fp32"}
    flags |= {} if strategy == "alone" else {"parallel.strategy": strategy}
    report = RUNS[stage](settings_of(stage, made, out, **flags))
    return {"losses": report.losses, "evaluation": report.evaluation}


def work(rank: int, made: Path) -> None:
    told = {way: run_of(made, *way.split("-")) for way in WAYS}
    (made / f"told-{rank}.json").write_text(json.dumps(told), encoding="utf-8")


@pytest.fixture(scope="module")
def told(files: Path) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    alone = {f"{stage}-alone": run_of(files, stage, "alone") for stage in RUNS}
    in_two_processes(work, files)
    yield alone | json.loads((files / "told-0.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_losses_and_evaluations_of_one(told: dict[str, Any], way: str) -> None:
    alone, together = told[way.split("-")[0] + "-alone"], told[way]
    assert len(alone["losses"]) == 3
    assert not [name for name in together["evaluation"] if name not in alone["evaluation"]]
    for one, two in zip(alone["losses"], together["losses"], strict=True):
        assert one[0] == two[0] and abs(one[1] - two[1]) < TOLERANCE
    for found in (alone["evaluation"], together["evaluation"]):
        found.pop("rollout_tokens_per_s", None)
    assert together["evaluation"] == pytest.approx(alone["evaluation"], abs=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_model_that_they_write_is_whole(files: Path, told: dict[str, Any], way: str) -> None:
    one, two = (
        open_checkpoint(files / f"two-{name}" / "model").tensors for name in (way.split("-")[0] + "-alone", way)
    )
    assert one.keys() == two.keys()
    for name, entry in one.items():
        torch.testing.assert_close(read_tensor(two[name]), read_tensor(entry), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("way", ["reward-fsdp", "reward-ddp"])
def test_the_report_of_a_reward_model_is_that_of_one_process(files: Path, told: dict[str, Any], way: str) -> None:
    one, two = (
        json.loads((files / f"two-{name}" / "reward-report.json").read_text()) for name in ("reward-alone", way)
    )
    assert one["accuracy"] == two["accuracy"] and one["accuracy"]["pairs"] > 3
    assert two["mean"] == pytest.approx(one["mean"], abs=1e-5)


def test_what_a_bootstrap_keeps_is_what_one_process_keeps(files: Path, told: dict[str, Any]) -> None:
    for number in (1, 2):
        one, two = (
            [json.loads(line) for line in (files / name / f"round-{number}" / "kept.jsonl").read_text().splitlines()]
            for name in ("two-bootstrap-alone", "two-bootstrap-auto")
        )
        assert one and [line["response"] for line in one] == [line["response"] for line in two]
    assert (files / "two-bootstrap-auto" / "bootstrap-report.json").exists()


def test_an_online_run_reports_once_with_the_answers_of_one_process(files: Path, told: dict[str, Any]) -> None:
    one, two = (
        json.loads((files / f"two-rloo-{name}" / "online-report.json").read_text()) for name in ("alone", "auto")
    )
    assert one["answers"] == two["answers"] and one["steps"] == two["steps"] == 3
