"""Learning from one's own answers by two processes: the same answers, losses and verdicts as by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rlhf_online import online_task, run_of

from chatglm.errors import TrainingError
from chatglm.tokenizer import Tokenizer
from chatglm.tokenizer.making import make_tokenizer_file
from chatglm.training.loop import train
from chatglm.training.rlhf.guards import Guards
from chatglm.training.rlhf.online import Online
from chatglm.training.rlhf.online_evaluation import Evaluation
from chatglm.training.rlhf.sharing import from_all, own_stretch
from tiny_policies import TEXTS, prompts_of
from two_processes import in_two_processes

TOLERANCE = 1e-6
"""On losses and rewards in fp32: two processes cut the batches elsewhere, so sums are rounded elsewhere."""

KINDS = ("ppo", "rloo", "grpo")
STEPS = 6
"""A round has four."""


def run_all(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Losses, evaluations and all answers of a run of each kind."""
    told: dict[str, Any] = {}
    for kind in KINDS:
        task, online = online_task(tokenizer, kind, sft=0.5)
        drawn = _kept(online)
        evaluation = Evaluation(online, prompts_of(tokenizer)[:3], Guards(), judge=lambda _, answer: len(answer) > 10)
        first = evaluation.begin()
        task.evaluate = evaluation
        batch = {"rows": 8, "micro_rows": 2, "length": 32}
        report = train(task, run_of(folder / kind, steps=STEPS, batch=batch, parallel={"strategy": "ddp"}))
        told[kind] = {"losses": report.losses, "first": first, "last": report.evaluation, "drawn": drawn}
    return told


def _kept(online: Online) -> list[Any]:
    """Every round that is drawn: ids, rewards and targets."""
    drawn: list[Any] = []
    draw = online.draw

    def noted(number: int) -> Any:
        held = draw(number)
        experience = held.experience
        targets = {name: values.tolist() for name, values in held.targets.items()}
        drawn.append([[list(a.ids) for a in experience.answers], experience.rewards.tolist(), targets])
        return held

    online.draw = noted  # type: ignore[method-assign]
    return drawn


def work(rank: int, folder: Path) -> None:
    tokenizer = Tokenizer.from_file(folder / "ice_text.model")
    told = run_all(folder, tokenizer)
    told["stretches"] = from_all(lambda: list(own_stretch(5)))

    def only_one() -> None:
        if rank == 1:
            raise TrainingError("process 1 gave up", cure="wait for nobody")

    with pytest.raises(TrainingError, match="process 1 gave up") as raised:
        from_all(only_one)
    told["cure"] = raised.value.cure
    (folder / f"told-{rank}.json").write_text(json.dumps(told), encoding="utf-8")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the runs came to: `alone`, and on each of the `two` processes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("online")
    tokenizer = Tokenizer.from_file(make_tokenizer_file(TEXTS, folder, pieces=440))
    alone = json.loads(json.dumps(run_all(folder / "alone", tokenizer)))
    in_two_processes(work, folder)
    two = [json.loads((folder / f"told-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    yield {"alone": alone, "two": two}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_draw_the_answers_of_one_and_both_know_all_of_them(told: dict[str, Any], kind: str) -> None:
    alone, two = told["alone"][kind]["drawn"], [process[kind]["drawn"] for process in told["two"]]
    assert len(alone) == 2 and two[0] == two[1]
    for (ids, rewards, targets), (other_ids, other_rewards, other_targets) in zip(alone, two[0], strict=True):
        assert ids == other_ids and len(ids) == 16
        assert rewards == pytest.approx(other_rewards, abs=TOLERANCE)
        for name, values in targets.items():
            assert values == pytest.approx(other_targets[name], abs=2e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_losses_of_one(told: dict[str, Any], kind: str) -> None:
    alone, together = dict(told["alone"][kind]["losses"]), dict(told["two"][0][kind]["losses"])
    assert list(alone) == list(together) == list(range(1, STEPS + 1))
    assert max(abs(alone[step] - together[step]) for step in alone) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_and_so_the_guards_are_the_same_on_every_process(told: dict[str, Any], kind: str) -> None:
    first, second = (process[kind] for process in told["two"])
    assert (first["first"], first["last"]) == (second["first"], second["last"])
    alone = told["alone"][kind]
    for name in ("first", "last"):
        assert first[name] == pytest.approx(alone[name], abs=1e-4)
        assert "eval_judged_rate" in first[name]


def test_stretches_cover_everything_once_and_an_error_reaches_all(told: dict[str, Any]) -> None:
    for process in told["two"]:
        assert process["stretches"] == [[0, 1], [2, 3, 4]]
        assert process["cure"] == "wait for nobody"
