"""The experiments of examples/training/minimal_experiments.py, small: each stage does what it is for.

The thresholds are looser than the recorded run's (benchmarks/results/training-minimal.json), which trains longer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples" / "training"


@pytest.fixture(scope="module")
def experiments() -> Iterator[Any]:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import minimal_experiments

        yield minimal_experiments
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def world(experiments: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base model that speaks in the manners of the toy world, about half of which the judge wants."""
    torch.set_num_threads(1)
    return experiments.make_world(tmp_path_factory.mktemp("world"), print, steps=200, hidden=48)


def test_the_reward_model_tells_what_the_judge_wants_and_the_report_sees_through_length(
    experiments: Any, world: Any
) -> None:
    clean = experiments.judged_pairs(world, 200, seed=2)
    honest = experiments.train_reward(world, "honest", experiments.judged_pairs(world, 900, seed=3), steps=50)
    told = experiments.reward_report_of(world, honest, clean)
    assert told.accuracy.accuracy >= 0.95 and not told.is_length_shortcut
    labels = experiments.judged_pairs(world, 700, seed=5, by_length=True)
    shortcut = experiments.reward_report_of(world, experiments.train_reward(world, "length", labels, steps=30), clean)
    assert shortcut.is_length_shortcut and shortcut.accuracy.accuracy < 0.9


def test_answers_learned_from_rewards_pass_the_judge_more_often(experiments: Any, world: Any) -> None:
    result = experiments.online_run(world, "rloo", steps=30, lr=5e-4, beta=0.05, sft=1.0, every=30)
    last = result["course"][-1]
    assert result["after"] > result["before"] + 0.2, result
    assert last["kl_k3"] < 10 and last["general_loss_up"] < 0.1


def test_answers_learned_from_pairs_pass_the_judge_more_often(experiments: Any, world: Any) -> None:
    result = experiments.dpo_experiment(world, steps=20)
    assert result["after"] > result["before"] + 0.2, result
    assert result["course"][-1]["kl_k3"] < 10


def test_two_runs_with_one_seed_are_the_same(experiments: Any, world: Any) -> None:
    first, second = (
        experiments.online_run(world, "rloo", steps=4, lr=5e-4, beta=0.05, sft=1.0, every=4) for _ in range(2)
    )
    assert first["course"] == second["course"]
