"""Pre-training and fine-tuning from prepared data to a model that answers; run files, examples, plots."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import chatglm
from chatglm.errors import TrainingError
from chatglm.training import pretrain, sft
from chatglm.training.data import Preparation, prepare
from chatglm.training.plotting import plot
from chatglm.training.run_config import read_run
from chatglm.training.text_stage import look_ahead

EXAMPLES = Path(__file__).parents[2] / "examples" / "training"
EMBEDDED = Path(chatglm.__file__).parent / "assets" / "mini"
COLOURS = {"snow": "white", "grass": "green", "the sky": "blue", "coal": "black"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text` and `chat`, prepared: a bilingual text of four facts, and questions about them."""
    folder = tmp_path_factory.mktemp("data")
    facts = [f"{thing} is {colour}." for thing, colour in COLOURS.items()]
    chinese = ["雪是白的。", "草是绿的。", "天空是蓝的。", "煤是黑的。"]
    text = "\n\n".join(f"{number}: {facts[number % 4]} {chinese[number % 4]}" for number in range(400))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    asked = [
        {"prompt": f"{number}. What colour is {thing}?", "response": colour}
        for number in range(40)
        for thing, colour in COLOURS.items()
    ]
    lines = [json.dumps(pair, ensure_ascii=False) for pair in asked]
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, file in (("text", "text.txt"), ("chat", "chat.jsonl")):
        prepare(Preparation((str(folder / file),), EMBEDDED), folder / name, workers=1)
    return folder


def pretraining(data: Path, out: Path, **flags: Any) -> pretrain.PretrainRun:
    sizes = {
        "model.config.hidden_size": 64,
        "model.config.num_layers": 2,
        "model.config.inner_hidden_size": 128,
        "batch.rows": 8,
        "batch.micro_rows": 8,
        "batch.length": 96,
        "optimizer.lr": 4e-3,
        "schedule.warmup": 5,
        "stability.embedding_shrink": 1.0,
        "data.train": str(data / "text"),
        "data.held_out_rows": 8,
        "evaluate.rows": 8,
        "log.tensorboard": False,
        "steps": 60,
        "out": str(out),
    }
    return read_run(EXAMPLES / "pretrain.yaml", pretrain.PretrainRun, flags=sizes | flags)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """Reports of a pre-training and of a fine-tuning on top of it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("stages")
    first = pretrain.run(pretraining(data, folder / "pretrain"))
    flags = {
        "out": str(folder / "sft"),
        "model.source": str(first.model),
        "data.train": str(data / "chat"),
        "data.held_out_rows": 2,
        "batch.length": 96,
        "batch.rows": 8,
        "batch.micro_rows": 8,
        "optimizer.lr": 4e-3,
        "steps": 90,
        "evaluate.rows": 2,
        "evaluate.every": 30,
        "log.tensorboard": True,
    }
    yield first, sft.run(read_run(EXAMPLES / "sft.yaml", sft.SFTRun, flags=flags))


def test_pre_training_learns_the_text_and_says_the_loss_of_each_objective(trained: Any) -> None:
    report, _ = trained
    assert report.evaluation["evaluation_loss"] < 0.5 * report.losses[0][1]
    assert report.evaluation.keys() == {"evaluation_loss", "evaluation_loss_token", "evaluation_loss_document"}
    line = json.loads((report.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert 0 < line["loss_document"] < 6 and 0 < line["padding"] < 1
    assert "loss_dialogue" not in line


def test_the_fine_tuned_model_answers_when_it_is_loaded(trained: Any) -> None:
    _, report = trained
    model = chatglm.load(report.model, dtype="fp32", device="cpu")
    answers = {
        thing: model.chat(f"7. What colour is {thing}?", temperature=0, max_new_tokens=4).text for thing in COLOURS
    }
    assert answers == COLOURS


def test_transformers_open_the_exported_model(trained: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("chatglm.hf")  # registers the classes

    _, report = trained
    model = transformers.AutoModel.from_pretrained(report.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(report.model)
    answer, _ = model.eval().chat(tokenizer, "7. What colour is coal?", do_sample=False)
    assert answer == "black"


def test_the_run_folder_holds_what_a_run_leaves(trained: Any) -> None:
    _, report = trained
    names = {path.name for path in report.out.iterdir()}
    assert {"metrics.jsonl", "run.yaml", "model", "step-000090", "tensorboard"} <= names
    assert list((report.out / "tensorboard").glob("events.*"))
    again = read_run(report.out / "run.yaml", sft.SFTRun)
    assert again.optimizer.lr == 4e-3 and again.steps == 90 and again.epochs is None


def test_plot_draws_both_runs_into_one_picture(trained: Any, tmp_path: Path) -> None:
    panels = plot([report.out for report in trained], tmp_path / "curves.png")
    assert panels[:4] == ["loss", "loss by objective", "gradient norm", "learning rate"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(TrainingError, match="there is no"):
        plot([tmp_path], tmp_path / "none.png")


def test_a_pre_training_run_is_bitwise_repeated_and_resumed(data: Path, tmp_path: Path) -> None:
    run = pretraining(data, tmp_path / "whole", steps=8, **{"save.every": 4})
    whole = pretrain.run(run)
    shutil.copytree(tmp_path / "whole" / "step-000004", tmp_path / "part" / "step-000004")
    part = pretrain.run(pretraining(data, tmp_path / "part", steps=8, **{"save.every": 4}))
    assert part.evaluation == whole.evaluation
    one, two = (report.model / "model.safetensors" for report in (whole, part))
    assert one.read_bytes() == two.read_bytes()


def test_held_out_rows_are_never_trained_on(data: Path, tmp_path: Path) -> None:
    from chatglm.training.text_stage import text_task

    task = text_task(pretraining(data, tmp_path))
    assert task.held_out is not None
    rows_per_epoch = task.source.rows_per_epoch
    assert rows_per_epoch is not None
    training, held_out = task.source.stream, task.held_out.stream  # type: ignore[attr-defined]
    assert 7 <= held_out.rows_per_epoch <= 9
    read = [training._place(epoch, row)[1:] for epoch in range(3) for row in range(rows_per_epoch)]
    assert max(start + size for start, size in read) <= held_out.first  # in no epoch


@pytest.mark.parametrize("name", sorted(p.name for kind in ("pretrain", "sft") for p in EXAMPLES.glob(f"{kind}*.yaml")))
def test_every_example_passes_a_dry_run(name: str, data: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    stage = name.removesuffix(".yaml").split("-")[0]
    kinds: dict[str, type[Any]] = {"pretrain": pretrain.PretrainRun, "sft": sft.SFTRun}
    flags: dict[str, Any] = {
        "out": str(tmp_path),
        "data.train": str(data / ("text" if stage == "pretrain" else "chat")),
    }
    flags |= {"data.held_out_rows": 1, "compute.precision": "fp32", "compute.compile": False, "data.held_out": []}
    if name == "pretrain-6b.yaml":
        flags |= {"model.tokenizer": str(tokenizer_file)}
        run = read_run(EXAMPLES / name, kinds[stage], flags=flags)
        with pytest.raises(TrainingError, match="was prepared with another tokenizer"):
            look_ahead(run)  # this data is the embedded tokenizer's
        return
    if stage == "sft":
        flags |= {"model.source": "embedded"}
    told = look_ahead(read_run(EXAMPLES / name, kinds[stage], flags=flags))
    assert told["forecast"]["memory"] > told["forecast"]["states"] > 0
    assert any(line.startswith("memory") for line in told["lines"])


def test_data_that_is_not_named_and_models_that_do_not_fit_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"`data.train` names no data"):
        pretrain.run(pretraining(data, tmp_path, **{"data.train": []}))
    with pytest.raises(TrainingError, match=r"prepared with another tokenizer.*mask is 12000 in the data, 11000"):
        pretrain.run(pretraining(data, tmp_path, **{"model.config.mask_token_id": 11000}))
    with pytest.raises(
        TrainingError, match=r"unknown key `model.config.hiden_size`\n  cure: did you mean `hidden_size`"
    ):
        pretrain.run(pretraining(data, tmp_path, **{"model.config.hiden_size": 64}))
    with pytest.raises(TrainingError, match=r"`method.name` is 'ful'"):
        pretrain.run(pretraining(data, tmp_path, **{"method.name": "ful"}))
