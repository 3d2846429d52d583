"""Small experiments that prove each stage of learning from preferences, on one CPU core in minutes.

    python examples/training/minimal_experiments.py --out runs/minimal                  # all, with a table
    python examples/training/minimal_experiments.py --out runs/minimal --only reward,dpo
    python examples/training/minimal_experiments.py --out runs/minimal --record FILE.json --plot FILE.png

A tiny model learns to speak in toy_world.py's manners, about half of which the judge wants. Each stage then starts from
that same model. What counts as a pass stands beside each experiment.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import toy_world
from torch import Tensor

from chatglm.checkpoint import save
from chatglm.config import ModelConfig
from chatglm.evaluation.judges import judge_of
from chatglm.model import GLM, initialize
from chatglm.tokenizer import Tokenizer
from chatglm.tokenizer.making import make_tokenizer_file
from chatglm.training.loop import train
from chatglm.training.loss import batch_loss
from chatglm.training.rlhf.algorithms import PPO, Group, with_value
from chatglm.training.rlhf.answers import answer_sample, one_a_row
from chatglm.training.rlhf.bootstrap import MixedRows, best_of_n_bound, keep_best, packed_rows
from chatglm.training.rlhf.copying import copy_of
from chatglm.training.rlhf.dpo_stage import DPOSettings, dpo_task
from chatglm.training.rlhf.experience import ModelReward, RewardFunction, RewardRules, RuleReward
from chatglm.training.rlhf.guards import Guards
from chatglm.training.rlhf.online import Online, OnlineSettings
from chatglm.training.rlhf.online_evaluation import Evaluation
from chatglm.training.rlhf.online_stage import Sum
from chatglm.training.rlhf.ppo import PPOSettings
from chatglm.training.rlhf.preferences import Pair
from chatglm.training.rlhf.reward import RewardModel
from chatglm.training.rlhf.reward_report import RewardReport
from chatglm.training.rlhf.reward_stage import RewardSettings, held_out_report, reward_task
from chatglm.training.rlhf.rloo import GroupSettings
from chatglm.training.rlhf.rollout import Answer, Prompt, RolloutEngine, make_prompt
from chatglm.training.run_config import RunConfig
from chatglm.training.samples import Batch, Sample
from chatglm.training.settings import build
from chatglm.training.task import ListSource, Task

MAX_NEW = 24
LENGTH = 48
JUDGE = judge_of(toy_world.WANTED)

Say = Callable[[str], None]


@dataclass
class World:
    """The base model, which every experiment copies, and everything that is fixed beside it."""

    out: Path
    tokenizer: Tokenizer
    config: ModelConfig
    base: GLM
    prompts: list[Prompt]
    held_out: list[Prompt]
    general: list[Sample]
    watched: Batch
    say: Say

    def policy(self) -> GLM:
        """A fresh copy of the base."""
        return copy_of(self.base).requires_grad_(True)

    def general_source(self) -> ListSource:
        return ListSource([[sample] for sample in self.general], LENGTH)


def run_of(out: Path, steps: int, lr: float, *, rows: int = 32, **sections: Any) -> RunConfig:
    """A run without checkpoints between, all of whose figures are logged."""
    values: dict[str, Any] = {
        "out": str(out),
        "steps": steps,
        "batch": {"rows": rows, "micro_rows": rows, "length": LENGTH},
        "optimizer": {"lr": lr, "weight_decay": 0.0},
        "schedule": {"kind": "constant", "warmup": min(4, steps)},
        "stability": {"loss_factor": 0, "norm_factor": 0},
        "save": {"every": 0},
        "log": {"every": 10, "tensorboard": False},
        "export": {"enabled": False},
        "evaluate": {"rows": 0},
        "compute": {"device": "cpu"},
    }
    return build(RunConfig, values | sections, "experiment")


def make_world(out: Path, say: Say, *, steps: int = 700, seed: int = 0, hidden: int = 64) -> World:
    """Tokenizer, base model (trained here), prompts, general data."""
    texts = list(toy_world.texts(400, seed=10))
    lines = [text for pair in toy_world.dialogues(400, seed=11) for text in pair]
    tokenizer = Tokenizer.from_file(make_tokenizer_file(lines + texts, out / "tokenizer", pieces=560))
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden,
        num_layers=2,
        num_heads=4,
        inner_hidden_size=4 * hidden,
        max_sequence_length=128,
        residual_scale=2.0,
        bos_token_id=tokenizer.sop_id,
        eos_token_id=tokenizer.eop_id,
        mask_token_id=tokenizer.mask_id,
        gmask_token_id=tokenizer.gmask_id,
        pad_token_id=tokenizer.pad_id,
        torch_dtype="float32",
    )
    base = GLM(config)
    initialize(base, seed)
    general = [continued(tokenizer, text, number, config) for number, text in enumerate(toy_world.texts(640, seed=12))]
    told = [spoken(tokenizer, q, a, config) for q, a in toy_world.dialogues(3_000, seed=13)]
    rows = [[sample] for pair in zip(told, general[64:] * 6, strict=False) for sample in pair]
    weights = out / f"base-{steps}-{seed}-{hidden}.pt"
    if weights.exists():
        base.load_state_dict(torch.load(weights, weights_only=True))
    else:
        task = Task(base, batch_loss, ListSource(rows, LENGTH))
        schedule = {"kind": "cosine", "warmup": 20, "floor": 0.05}
        report = train(task, run_of(out / "base", steps, 4e-3, schedule=schedule), restart=True)
        say(f"base model: {config.num_parameters:,} parameters, loss {report.loss:.3f}, {report.seconds:.0f} s")
        torch.save(base.state_dict(), weights)
    base.eval().requires_grad_(False)
    prompts = [make_prompt(tokenizer, question) for question in toy_world.questions()]
    watched = one_a_row(general[:64])
    return World(out, tokenizer, config, base, prompts[24:], prompts[:24] * 8, general[64:], watched, say)


def spoken(tokenizer: Tokenizer, question: str, answer: str, config: ModelConfig) -> Sample:
    return answer_sample(tokenizer.encode_context(question)[:-1], tokenizer.encode(answer), config)


def continued(tokenizer: Tokenizer, text: str, number: int, config: ModelConfig) -> Sample:
    """A text whose second part is generated: the document objective."""
    ids = tokenizer.encode(text)[: LENGTH - 4]
    border = random.Random(number).randint(len(ids) // 4, len(ids) // 2)
    return answer_sample([*ids[:border], config.gmask_token_id], ids[border:], config)


# Reward model


def judged_pairs(world: World, count: int, seed: int, *, flipped: float = 0.0, by_length: bool = False) -> list[Pair]:
    """Pairs of drawn manners of the same fact, preferred by the judge (or, `by_length`, simply the longer one)."""
    draw = random.Random(seed)
    encode = world.tokenizer.encode
    facts, pairs = toy_world.facts(), []
    while len(pairs) < count:
        fact = draw.choice(facts)
        one, other = toy_world.told(fact, draw), toy_world.told(fact, draw)
        if by_length:
            one, other = sorted((one, other), key=len, reverse=True)
            if len(one) == len(other):
                continue
        else:
            verdicts = JUDGE(fact.question, one), JUDGE(fact.question, other)
            if verdicts[0] == verdicts[1]:
                continue
            if verdicts[1]:
                one, other = other, one
        if draw.random() < flipped:
            one, other = other, one
        context = tuple(world.tokenizer.encode_context(fact.question)[:-1])
        pairs.append(Pair(context, tuple(encode(one)), tuple(encode(other)), source=fact.language))
    return pairs


def train_reward(world: World, name: str, pairs: Sequence[Pair], *, steps: int = 60) -> RewardModel:
    model = RewardModel(world.policy(), seed=1)
    task = reward_task(model, pairs, [], RewardSettings(balance=False), seed=1)
    train(task, run_of(world.out / name, steps, 1e-3), restart=True)
    return model


def reward_report_of(world: World, model: RewardModel, pairs: Sequence[Pair]) -> RewardReport:
    return held_out_report(model.eval(), pairs, RewardSettings(bin_tokens=2))


def reward_experiment(world: World) -> dict[str, Any]:
    """Clean pairs, pairs with a fifth of the labels the wrong way round, and labels that are only length."""
    clean = judged_pairs(world, 400, seed=2)
    result: dict[str, Any] = {}
    for name, pairs in {
        "clean": judged_pairs(world, 2_000, seed=3),
        "flipped": judged_pairs(world, 2_000, seed=4, flipped=0.2),
        "length": judged_pairs(world, 2_000, seed=5, by_length=True),
    }.items():
        report = reward_report_of(world, train_reward(world, f"reward-{name}", pairs), clean)
        world.say("\n".join([f"reward, {name}:", *report.lines()]))
        result[f"{name}_accuracy"] = report.accuracy.accuracy
        result[f"{name}_length_gap"] = report.length_gap
        result[f"{name}_is_length_shortcut"] = report.is_length_shortcut
    result["passed"] = (
        result["clean_accuracy"] >= 0.95
        and result["flipped_accuracy"] >= 0.75
        and result["length_is_length_shortcut"]
        and not result["clean_is_length_shortcut"]
    )
    return result


# Policies


def evaluation_of(world: World, online: Online, guards: Guards | None = None) -> Evaluation:
    return Evaluation(online, world.held_out, guards or Guards(), JUDGE, general=world.watched, say=world.say)


def online_run(
    world: World,
    name: str,
    *,
    steps: int,
    lr: float,
    beta: float,
    sft: float,
    reward: RewardFunction | None = None,
    guards: Guards | None = None,
    every: int = 10,
    prompts: int = 16,
) -> dict[str, Any]:
    """PPO, RLOO or GRPO from the base, with the judge as reward; the course of what is watched."""
    policy = world.policy()
    algorithm: Any = Group(GroupSettings(kind="grpo" if name == "grpo" else "rloo", answers=4))
    model: torch.nn.Module = policy
    if name.startswith("ppo"):
        algorithm = PPO(PPOSettings(value_warmup=8, whiten=True, decay=0.95))
        model, prompts = with_value(policy, algorithm.settings), 4 * prompts
    online = Online(
        model,
        policy,
        copy_of(world.base),
        world.tokenizer,
        world.prompts,
        reward or RuleReward(JUDGE, world.tokenizer),
        algorithm,
        OnlineSettings(prompts=prompts, epochs=2 if name.startswith("ppo") else 1, max_new=MAX_NEW, beta=beta, sft=sft),
        batch_rows=32,
        rules=RewardRules(baseline="none"),
        general=world.general_source(),
        seed=3,
    )
    evaluation = evaluation_of(world, online, guards)
    first = evaluation.begin()
    task = Task(
        model,
        online.loss,
        online,
        evaluate=evaluation,
        before_step=online.before_step,
        on_checkpoint=online.on_checkpoint,
        on_resume=online.on_resume,
        stops=evaluation.after_step,
    )
    run = run_of(world.out / name, steps, lr, evaluate={"every": every, "rows": 0})
    report = train(task, run, restart=True)
    return course_of(first, evaluation, seconds=report.seconds, stopped=report.stopped)


def course_of(first: dict[str, float], evaluation: Evaluation, **more: Any) -> dict[str, Any]:
    """Before, after, and the course between."""
    kept = ("judged_rate", "reward", "kl_k1", "kl_k3", "answer_length", "share_without_eop", "repetition", "win_rate")
    course = [
        {name: figures[f"eval_{name}"] for name in kept} | {"general_loss_up": figures.get("general_loss_up", 0.0)}
        for figures in evaluation.figures
    ]
    return {"before": first["eval_judged_rate"], "after": course[-1]["judged_rate"], "course": course, **more}


def reaches(result: dict[str, Any]) -> bool:
    """§4.6: from about half to at least 90%, within 10 nats, general loss up less than 5%."""
    last = result["course"][-1]
    is_far = 0.35 <= result["before"] <= 0.65 and last["judged_rate"] >= 0.9
    return is_far and last["kl_k3"] <= 10 and last["general_loss_up"] < 0.05


def ppo_experiment(world: World) -> dict[str, Any]:
    result = online_run(world, "ppo", steps=120, lr=3e-4, beta=0.05, sft=1.0, every=20)
    return {**result, "passed": reaches(result)}


def rloo_experiment(world: World) -> dict[str, Any]:
    result = online_run(world, "rloo", steps=80, lr=3e-4, beta=0.05, sft=1.0)
    return {**result, "passed": reaches(result)}


def grpo_experiment(world: World) -> dict[str, Any]:
    result = online_run(world, "grpo", steps=80, lr=3e-4, beta=0.05, sft=1.0)
    return {**result, "passed": reaches(result)}


def dpo_experiment(world: World, steps: int = 40) -> dict[str, Any]:
    """Pairs of the base's own answers, preferred by the judge."""
    policy = world.policy()
    engine = RolloutEngine(policy, world.tokenizer, MAX_NEW)
    pairs = own_pairs(engine.sample(world.prompts * 2, each=6, seed=5), 6)
    settings = DPOSettings(beta=0.1, sft=0.1)
    task = dpo_task(policy, pairs, [], settings, seed=1)
    online = Online(
        policy,
        policy,
        copy_of(world.base),
        world.tokenizer,
        world.prompts,
        RuleReward(JUDGE, world.tokenizer),
        Group(GroupSettings()),
        OnlineSettings(prompts=1, max_new=MAX_NEW),
        batch_rows=4,
    )
    evaluation = evaluation_of(world, online)
    first = evaluation.begin()
    task.evaluate = evaluation
    report = train(task, run_of(world.out / "dpo", steps, 2e-4, evaluate={"every": 10, "rows": 0}), restart=True)
    result = course_of(first, evaluation, seconds=report.seconds, pairs=len(pairs))
    return {**result, "passed": reaches(result)}


def own_pairs(answers: Sequence[Answer], each: int) -> list[Pair]:
    """From each prompt's answers, one that passes against one that does not, as many pairs as both sides allow."""
    pairs: dict[tuple[Any, ...], Pair] = {}
    for first in range(0, len(answers), each):
        own = [answer for answer in answers[first : first + each] if answer.is_finished]
        good = [answer for answer in own if JUDGE("", answer.text)]
        bad = [answer for answer in own if not JUDGE("", answer.text)]
        for one, other in zip(good, bad, strict=False):
            pairs[one.prompt.context, one.ids, other.ids] = Pair(one.prompt.context, one.ids, other.ids)
    return list(pairs.values())


def bootstrap_experiment(world: World) -> dict[str, Any]:
    """Three rounds of best of four, scored by a reward model and by the rule together."""
    policy = world.policy()
    model = train_reward(world, "reward-for-bootstrap", judged_pairs(world, 2_000, seed=7)).eval()
    reward = Sum([(1.0, ModelReward(model)), (1.0, RuleReward(JUDGE, world.tokenizer))])
    online = Online(
        policy,
        policy,
        copy_of(world.base),
        world.tokenizer,
        world.prompts,
        reward,
        Group(GroupSettings()),
        OnlineSettings(prompts=1, max_new=MAX_NEW),
        batch_rows=4,
    )
    evaluation = evaluation_of(world, online)
    first, rounds, began = evaluation.begin(), [], time.monotonic()
    known = Rows([[sample] for sample in world.general])
    for number in range(1, 4):
        start = copy_of(policy)
        answers = RolloutEngine(policy, world.tokenizer, MAX_NEW).sample(world.prompts * 4, each=4, seed=number)
        scores = reward([answer.prompt for answer in answers], [answer.ids for answer in answers])
        kept = keep_best(answers, scores, 4, 0.2)
        rows = packed_rows([one.answer.sample(world.config) for one in kept], LENGTH)
        source = MixedRows(rows, known, LENGTH, seed=number)
        task = Task(policy, batch_loss, source)
        train(task, run_of(world.out / f"bootstrap-{number}", 12, 3e-4), restart=True)
        found = evaluation()
        rounds.append(
            {
                "kept": len(kept),
                "judged_rate": found["eval_judged_rate"],
                "kl_of_round": evaluation.kl(start),
                "kl_k3": found["eval_kl_k3"],
                "general_loss_up": found["general_loss_up"],
            }
        )
        world.say(f"bootstrap, round {number}: " + ", ".join(f"{k} {v:.3f}" for k, v in rounds[-1].items()))
    rates = [first["eval_judged_rate"], *(one["judged_rate"] for one in rounds)]
    bound = best_of_n_bound(4)
    rises = all(after > before for before, after in itertools.pairwise(rates))
    return {
        "before": rates[0],
        "after": rates[-1],
        "rounds": rounds,
        "bound": bound,
        "seconds": time.monotonic() - began,
        "passed": rises and all(one["kl_of_round"] <= bound + 0.3 for one in rounds),
    }


@dataclass(frozen=True)
class Rows:
    """Rows in memory as a stream."""

    rows: Sequence[list[Sample]]
    length: int = LENGTH

    @property
    def rows_per_epoch(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> list[Sample]:
        return self.rows[index % len(self.rows)]


@dataclass(frozen=True)
class KeywordCounter:
    """A reward with a hole: a point for every keyword, however often it is said."""

    tokenizer: Tokenizer

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> Tensor:
        texts = [self.tokenizer.decode(list(ids)) for ids in answers]
        return torch.tensor([float(sum(text.count(word) for word in toy_world.KEYWORDS)) for text in texts])


def hack_experiment(world: World) -> dict[str, Any]:
    """The reward with a hole: with β = 0 the policy falls into it and the guards say so; with β it cannot go far."""
    guards = Guards(kl_limit=1e9, patience=0)
    shared = {"steps": 80, "lr": 5e-4, "sft": 0.0, "reward": KeywordCounter(world.tokenizer)}
    free = online_run(world, "rloo-beta-0", beta=0.0, guards=guards, **shared)
    held = online_run(world, "rloo-beta-1", beta=1.0, guards=guards, **shared)
    guarded = online_run(world, "rloo-guarded", beta=0.0, guards=Guards(kl_limit=10, patience=2), **shared)
    last, kept = free["course"][-1], held["course"][-1]
    return {
        "before": free["before"],
        "beta_0": free["course"],
        "beta_1": held["course"],
        "guarded": guarded["course"],
        "stopped": guarded["stopped"],
        "seconds": free["seconds"] + held["seconds"] + guarded["seconds"],
        "passed": last["judged_rate"] < free["before"] / 2
        and last["reward"] > 2
        and kept["kl_k3"] < last["kl_k3"] / 3
        and guarded["stopped"] is not None,
    }


def model_reward_experiment(world: World) -> dict[str, Any]:
    """RLOO with a trained reward model in the judge's place: the whole of RLHF."""
    model = train_reward(world, "reward-for-rloo", judged_pairs(world, 2_000, seed=6)).requires_grad_(False).eval()
    reward = Sum([(1.0, ModelReward(model))])
    result = online_run(world, "rloo-model", steps=80, lr=3e-4, beta=0.05, sft=1.0, reward=reward)
    return {**result, "passed": reaches(result)}


EXPERIMENTS: dict[str, Callable[[World], dict[str, Any]]] = {
    "reward": reward_experiment,
    "bootstrap": bootstrap_experiment,
    "dpo": dpo_experiment,
    "rloo": rloo_experiment,
    "grpo": grpo_experiment,
    "ppo": ppo_experiment,
    "reward model + rloo": model_reward_experiment,
    "beta 0": hack_experiment,
}


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Judged rate and KL of the policies, and the hack."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rates, hack) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for name in ("dpo", "rloo", "grpo", "ppo", "reward model + rloo", "bootstrap"):
        if name in results:
            course = results[name].get("course") or results[name]["rounds"]
            points = [(0.0, results[name]["before"]), *((one["kl_k3"], one["judged_rate"]) for one in course)]
            rates.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=name)
    rates.axhline(0.9, color="grey", linewidth=0.7, linestyle=":")
    rates.set_xlabel("KL from the start, nats an answer")
    rates.set_ylabel("answers that the judge passes")
    rates.legend(fontsize=7)
    if "beta 0" in results:
        found = results["beta 0"]
        for key, label, colour in (("beta_0", "β = 0", "tab:red"), ("beta_1", "β = 1", "tab:green")):
            reward = [one["reward"] / 5 for one in found[key]]
            judged = [found["before"], *(one["judged_rate"] for one in found[key])]
            hack.plot(range(1, len(reward) + 1), reward, color=colour, linestyle="--", label=f"reward / 5, {label}")
            hack.plot(range(len(judged)), judged, color=colour, label=f"judge, {label}")
        hack.set_xlabel("evaluation (10 steps each)")
        hack.set_title("a reward with a hole", fontsize=9)
        hack.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def record(given: argparse.Namespace, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Write these results over those of the same names that the file holds; returns all of them."""
    if not given.record:
        return results
    held = json.loads(given.record.read_text(encoding="utf-8"))["results"] if given.record.exists() else {}
    facts = {"command": "python examples/training/minimal_experiments.py", "threads": given.threads}
    facts |= {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    text = json.dumps({**facts, "results": {**held, **results}}, indent=1, ensure_ascii=False)
    given.record.write_text(text + "\n", encoding="utf-8")
    return {**held, **results}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/minimal"))
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--record", type=Path, help="write the results as JSON")
    parser.add_argument("--plot", type=Path, help="write a picture")
    parser.add_argument("--save-base", type=Path, help="write the base model as a checkpoint folder")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    names = given.only.split(",") if given.only else list(EXPERIMENTS)
    world = make_world(given.out, print)
    if given.save_base:
        save(
            given.save_base, world.base.state_dict(), world.config, tokenizer_file=world.tokenizer.path, overwrite=True
        )
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        began, worked = time.monotonic(), time.process_time()
        results[name] = EXPERIMENTS[name](world)
        results[name]["seconds"] = round(time.monotonic() - began, 1)
        results[name]["processor_seconds"] = round(time.process_time() - worked, 1)
        print(f"{name}: {'passed' if results[name]['passed'] else 'FAILED'} in {results[name]['seconds']} s")
        record(given, results)
        line = {k: v for k, v in results[name].items() if not isinstance(v, list)}
        print("  " + json.dumps(line, ensure_ascii=False))
        for one in results[name].get("course", [])[-1:]:
            print("  last: " + json.dumps({k: round(v, 3) for k, v in one.items()}))
    if given.plot:
        plot(record(given, results), given.plot)
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
