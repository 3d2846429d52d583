"""`chatglm train reward | dpo | ppo | rloo | bootstrap` from files to a model that loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import chatglm
from chatglm.checkpoint import save
from chatglm.errors import ChatGLMError, TrainingError
from chatglm.tokenizer import Tokenizer
from chatglm.training.data.preparing import Preparation, prepare
from chatglm.training.loop import Report
from chatglm.training.rlhf import bootstrap_stage, dpo_stage, online_stage, reward_stage
from chatglm.training.rlhf.look_ahead import look_at_bootstrap, look_at_pairs, look_at_prompts
from chatglm.training.rlhf.prompts import read_prompts
from chatglm.training.rlhf.reward import load_reward_model
from chatglm.training.run_config import read_run
from tiny_policies import tiny_policy, tiny_tokenizer

__all__ = ["tiny_tokenizer"]

EXAMPLES = Path(__file__).parents[2] / "examples" / "training"
THINGS = ("sky", "sea", "grass", "snow", "coal", "sun")
STAGES: dict[str, tuple[Any, Any, Any]] = {
    "reward": (reward_stage.RewardRun, reward_stage.run, look_at_pairs),
    "dpo": (dpo_stage.DPORun, dpo_stage.run, look_at_pairs),
    "ppo": (online_stage.PPORun, online_stage.run_ppo, look_at_prompts),
    "rloo": (online_stage.RLOORun, online_stage.run_rloo, look_at_prompts),
    "bootstrap": (bootstrap_stage.BootstrapRun, bootstrap_stage.run, look_at_bootstrap),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, pairs, prompts, prepared dialogues, and a trained reward model."""
    made = tmp_path_factory.mktemp("rlhf")
    policy = tiny_policy(tiny_tokenizer, spread=2.0)
    with torch.no_grad():  # every third token or so ends an answer
        end = policy.transformer.word_embeddings.weight[tiny_tokenizer.eop_id]
        policy.transformer.final_layernorm.bias.add_(4 * end / end.square().sum())
    save(made / "policy", policy.state_dict(), policy.config, tokenizer_file=tiny_tokenizer.path)
    questions = [f"What colour is the {a} and the {b}?" for a in THINGS for b in THINGS if a != b]
    pairs = [{"prompt": q, "chosen": "white.", "rejected": "white?", "source": "rule"} for q in questions]
    prompts = [{"prompt": q, "reference": "white."} for q in questions]
    known = [{"prompt": q, "response": "white."} for q in questions]
    for name, lines in {"pairs": pairs, "prompts": prompts, "known": known}.items():
        (made / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    prepare(Preparation((str(made / "known.jsonl"),), tiny_tokenizer.path), made / "known", workers=1)
    run_of("reward", made, made / "reward", **{"optimizer.lr": 3e-3, "epochs": 4, "evaluate.every": 2})
    return made


def settings_of(stage: str, made: Path, out: Path, **flags: Any) -> Any:
    own: dict[str, Any] = {
        "out": str(out),
        "model.source": str(made / "policy"),
        "data.train": str(made / ("pairs.jsonl" if stage in ("reward", "dpo") else "prompts.jsonl")),
        "data.held_out_share": 0.3,
        "batch.length": 48,
        "batch.rows": 4,
        "batch.micro_rows": 4,
        "schedule.warmup": 0,
        "save.every": 0,
        "log.every": 1,
        "log.tensorboard": False,
    }
    if stage not in ("reward", "dpo"):
        own |= {"data.general": [str(made / "known")], "data.general_rows": 1, "data.held_out_prompts": 6}
        own |= {"reward.model": str(made / "reward" / "model"), "steps": 2, "evaluate.every": 1}
        size = "bootstrap" if stage == "bootstrap" else "online"
        own |= {f"{size}.max_new": 6, f"{size}.prompts": 4 if stage != "rloo" else 2}
    if stage == "bootstrap":
        own |= {"bootstrap.rounds": 2, "bootstrap.margin": 0, "bootstrap.prompts": 12}
    return read_run(EXAMPLES / f"{stage}.yaml", STAGES[stage][0], flags=own | flags)


def run_of(stage: str, made: Path, out: Path, **flags: Any) -> Report:
    said: list[str] = []
    report: Report = STAGES[stage][1](settings_of(stage, made, out, **flags), progress=said.append)
    assert report.finished and said
    return report


def test_the_reward_model_learns_the_rule_and_writes_its_report(folder: Path) -> None:
    report = json.loads((folder / "reward" / "reward-report.json").read_text())
    assert report["accuracy"]["accuracy"] == 1 and not report["is_length_shortcut"]
    assert report["by_source"]["rule"]["pairs"] == report["accuracy"]["pairs"] > 3
    assert load_reward_model(folder / "reward" / "model").score.weight.abs().max() > 0


@pytest.mark.parametrize("stage", ["dpo", "ppo", "rloo", "bootstrap"])
def test_a_stage_runs_from_files_to_a_model_that_loads(stage: str, folder: Path, tmp_path: Path) -> None:
    report = run_of(stage, folder, tmp_path, **({"epochs": 1} if stage == "dpo" else {}))
    assert report.model == tmp_path / "model"
    reply = chatglm.load(report.model, dtype="fp32", device="cpu").chat("What colour is the sky?", max_new_tokens=4)
    assert reply.usage.answer_tokens <= 4
    if stage in ("ppo", "rloo"):
        told = json.loads((tmp_path / "online-report.json").read_text())
        assert {"eval_reward", "eval_kl_k3", "eval_judged_rate", "general_loss_up"} <= told["after"].keys()
        assert len(told["answers"]) == 6 and "before" in told["answers"][0]
    if stage == "bootstrap":
        told = json.loads((tmp_path / "bootstrap-report.json").read_text())
        assert len(told["rounds"]) == 2
        kept = [json.loads(line) for line in (tmp_path / "round-1" / "kept.jsonl").read_text().splitlines()]
        assert kept and all(line["score"] > line["median"] for line in kept)
        assert told["rounds"][0]["bound"] == pytest.approx(0.636, abs=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_the_example_of_a_stage_passes_a_dry_run(stage: str, folder: Path, tmp_path: Path) -> None:
    told = STAGES[stage][2](settings_of(stage, folder, tmp_path))
    assert told["forecast"]["memory"] > told["forecast"]["states"] > 0
    assert any(line.startswith("data") for line in told["lines"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stage", "flags", "said"),
    [
        ("reward", {"data.train": []}, "names no file of preferences"),
        ("ppo", {"data.train": []}, "names no file of prompts"),
        ("ppo", {"reward.model": ""}, "nothing gives a reward"),
        ("bootstrap", {"method.name": "lora"}, "train all weights"),
        ("ppo", {"method.name": "lora", "reward.model": "", "reward.judge": {"keyword": "x"}}, "ppo.value: shared"),
        ("rloo", {"parallel.tensor": 2}, "roll-outs need the whole weights"),
        ("ppo", {"parallel.strategy": "fsdp"}, "roll-outs need the whole weights"),
        ("bootstrap", {"parallel.strategy": "fsdp"}, "roll-outs need the whole weights"),
        ("rloo", {"group.kind": "rlo"}, "did you mean rloo"),
        ("bootstrap", {"data.general": []}, "no known data"),
        ("bootstrap", {"bootstrap.known_share": 0.2}, "bootstrap.known_share"),
        ("ppo", {"judge": {"keywrd": "x"}}, "unknown key `keywrd`"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_begins(
    stage: str, flags: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ChatGLMError, match=said):
        STAGES[stage][2](settings_of(stage, folder, tmp_path, **flags))


def test_prompts_are_read_once_each_with_their_reference_and_bad_lines_are_told(
    tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "sky?", "response": "blue."}\n\n{"prompt": "sky?"}\n{"prompt": "sea?"}\n')
    found = read_prompts(path, tiny_tokenizer, most_tokens=40)
    assert [(prompt.text, prompt.reference) for prompt in found] == [("sky?", "blue."), ("sea?", None)]
    path.write_text('{"prompt": "sky?"}\n{"question": "sea?"}\n')
    with pytest.raises(TrainingError, match=r"prompts.jsonl:2: `prompt` is missing"):
        read_prompts(path, tiny_tokenizer, most_tokens=40)
    path.write_text('{"prompt": "%s"}\n' % ("sky " * 60))
    with pytest.raises(TrainingError, match=r"prompts.jsonl:1: the prompt has \d+ tokens, 40 are allowed"):
        read_prompts(path, tiny_tokenizer, most_tokens=40)
