"""Run files: values, ranges, unknown keys, flags over the file; and what changes with time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from chatglm.errors import TrainingError
from chatglm.training.pretrain import PretrainRun
from chatglm.training.run_config import BatchSettings, RunConfig, ScheduleSettings, read_run
from chatglm.training.schedules import learning_rate_factor, on_lines, rows_at, steps_for
from chatglm.training.settings import as_mapping, as_yaml, build
from chatglm.training.sft import SFTRun


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_values_come_from_flags_then_changes_then_the_file_then_the_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, "out: runs/a\nsteps: 10\noptimizer:\n  lr: 1e-4\n  clip: 2\nbatch: {rows: 4}\n")
    run = read_run(
        path, RunConfig, changes=["optimizer.clip=3", "batch.rows=8"], flags={"batch.rows": 16, "seed": None}
    )
    assert (run.optimizer.lr, run.optimizer.clip, run.batch.rows, run.seed) == (1e-4, 3.0, 16, 0)
    assert run.out == Path("runs/a")


def test_sections_that_are_given_in_part_keep_the_defaults_of_their_stage(tmp_path: Path) -> None:
    path = written(tmp_path, "out: a\nsteps: 1\nstability: {window: 7}\n")
    assert read_run(path, SFTRun).stability.loss_factor == 0.0
    assert read_run(path, SFTRun).stability.window == 7
    assert read_run(path, PretrainRun).stability.embedding_shrink == 0.1
    assert read_run(path, PretrainRun).stability.loss_factor == 1.5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimzer: {lr: 1}", r"unknown key `optimzer`\n  cure: did you mean `optimizer`\?"),
        ("optimizer: {learning: 1}", r"unknown key `optimizer.learning`\n  cure: known here: lr, betas"),
        (
            "optimizer: {weight_deacy: 0}",
            r"unknown key `optimizer.weight_deacy`\n  cure: did you mean `optimizer.weight_decay`",
        ),
        ("optimizer: 3", r"`optimizer` is 3; it must be a section of keys"),
        ("optimizer: {lr: fast}", r"`optimizer.lr` is 'fast'; it must be a number"),
        ("optimizer: {lr: -1}", r"`optimizer.lr` is -1.0; allowed: at least 0"),
        ("optimizer: {lr: .nan}", r"`optimizer.lr` is nan"),
        ("optimizer: {betas: [0.9]}", r"`optimizer.betas` has 1 values, not 2"),
        ("optimizer: {betas: [0.9, 1.5]}", r"`optimizer.betas` is 1.5; allowed: 0 to 1"),
        ("batch: {rows: 2.5}", r"`batch.rows` is 2.5; it must be a whole number"),
        ("batch: {rows: true}", r"`batch.rows` is True; it must be a whole number"),
        ("batch: {rows: 4, ramp_from: 8}", r"`batch.ramp_from` is 8, above `batch.rows` 4"),
        ("schedule: {kind: cosin}", r"`schedule.kind` is 'cosin'; allowed: cosine, .*\n  cure: did you mean cosine\?"),
        ("compute: {compile: 1}", r"`compute.compile` is 1; it must be true or false"),
        ("epochs: 2", r"give `steps` or `epochs`, one of them"),
    ],
)
def test_wrong_values_are_refused_by_file_key_and_value(text: str, said: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"out: a\nsteps: 10\n{text}\n")
    with pytest.raises(TrainingError, match=said):
        read_run(path, RunConfig)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("out: a\n  steps: 1\n", "run.yaml, line 2"),
        ("- out\n", "holds no `key: value` lines"),
        ("steps: 1\n", "run.yaml: `out` is missing"),
    ],
)
def test_files_that_are_no_run_are_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=said):
        read_run(written(tmp_path, text), RunConfig)
    with pytest.raises(TrainingError, match=r"none.yaml cannot be read"):
        read_run(tmp_path / "none.yaml", RunConfig)


@pytest.mark.parametrize("change", ["optimizer.lr", "=3", "steps.deep=1"])
def test_changes_that_are_no_change_are_refused(change: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError):
        read_run(written(tmp_path, "out: a\nsteps: 1\n"), RunConfig, changes=[change])


def test_steps_on_the_command_line_win_over_epochs_in_the_file(tmp_path: Path) -> None:
    run = read_run(written(tmp_path, "out: a\nepochs: 3\n"), RunConfig, flags={"steps": 7})
    assert (run.steps, run.epochs) == (7, None)


def test_resolved_values_written_as_a_file_read_back_the_same(tmp_path: Path) -> None:
    run = build(
        PretrainRun,
        {
            "out": "a",
            "epochs": 2,
            "data": {"train": ["x", {"set": "y"}]},
            "stability": {"shrink_points": [[0, 0.1], [9, 1]]},
        },
        "test",
    )
    again = read_run(written(tmp_path, as_yaml(run)), PretrainRun)
    assert as_mapping(again) == as_mapping(run)
    assert again.stability.shrink_points == ((0.0, 0.1), (9.0, 1.0))


# what changes with time


def factors(total: int = 100, **values: Any) -> list[float]:
    schedule = ScheduleSettings(**values)
    return [learning_rate_factor(step, schedule, total) for step in range(total + 20)]


def test_warm_up_is_a_line_that_ends_at_one() -> None:
    found = factors(warmup=10, warmup_from=0.5)
    assert found[:10] == pytest.approx([0.5 + 0.05 * step for step in range(1, 11)])
    assert factors(total=50)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])  # a tenth of the run by default


def test_cosine_falls_as_the_formula_says_and_stays_at_its_floor() -> None:
    found = factors(warmup=20, floor=0.1)
    for step in (20, 35, 60, 99):
        part = (step - 20) / 80
        assert found[step] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2)
    assert found[100:] == pytest.approx([0.1] * 20)


def test_linear_constant_and_constant_then_decay() -> None:
    assert factors(kind="linear", warmup=0, floor=0.0)[50] == pytest.approx(0.5)
    assert set(factors(kind="constant", warmup=0)) == {1.0}
    late = factors(kind="constant_decay", warmup=10, decay=0.2, floor=0.0)
    assert set(late[10:81]) == {1.0} and late[90] == pytest.approx(0.5) and late[100] == 0.0


def test_the_batch_grows_in_steps_with_the_rows_that_were_read() -> None:
    batch = BatchSettings(rows=32, ramp_from=8, ramp_rows=240, ramp_step=8)
    assert [rows_at(position, batch) for position in (0, 79, 80, 159, 160, 239, 240, 10_000)] == [
        8,
        8,
        16,
        16,
        24,
        24,
        32,
        32,
    ]
    assert rows_at(80, batch, unit=3) == 15  # every process reads as many
    assert rows_at(0, BatchSettings(rows=2), unit=4) == 4


def test_steps_for_a_number_of_rows_count_the_ramp() -> None:
    batch = BatchSettings(rows=32, ramp_from=8, ramp_rows=240, ramp_step=8)
    position = steps = 0
    while position < 1000:
        position += rows_at(position, batch)
        steps += 1
    assert steps_for(1000, batch) == steps
    assert steps_for(65, BatchSettings(rows=8)) == 9


def test_values_between_points_lie_on_lines() -> None:
    points = [(100, 0.1), (200, 1.0), (300, 0.5)]
    assert [on_lines(step, points, 9.0) for step in (0, 100, 150, 200, 250, 400)] == pytest.approx(
        [0.1, 0.1, 0.55, 1.0, 0.75, 0.5]
    )
    assert on_lines(5, [], 0.3) == 0.3
