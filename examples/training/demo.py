"""A tiny model through every stage, from a text that a program writes to a policy that learned from rewards.

    make train-demo                                   # or:
    python examples/training/demo.py --out out/train-demo

Pre-training → fine-tuning → reward model → bootstrap, and from the same fine-tuned model DPO and PPO. Each stage is the
function behind `chatglm train <stage>`, with the example file beside this one and sizes for a toy; every folder that it
leaves opens with `chatglm chat`. Ends with a table: what each stage took, and what its answers are worth.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import toy_world

import chatglm
from chatglm.evaluation.judges import judge_of, judged_rate
from chatglm.tokenizer import Tokenizer
from chatglm.tokenizer.making import make_tokenizer_file
from chatglm.training import pretrain, sft
from chatglm.training.data.encoding import Reading
from chatglm.training.data.preparing import Preparation, prepare
from chatglm.training.data.problems import Allowance
from chatglm.training.loop import Report
from chatglm.training.rlhf import bootstrap_stage, dpo_stage, online_stage, reward_stage
from chatglm.training.run_config import RunConfig, read_run

HERE = Path(__file__).parent
NUMBERS = 40
"""Questions are numbered up to this."""
LENGTH = 96
MAX_NEW = 24
JUDGE = judge_of(toy_world.WANTED)
SIZES = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "inner_hidden_size": 256, "max_sequence_length": 128}


@dataclass
class Line:
    """A row of the table at the end."""

    stage: str
    seconds: float
    said: str
    judged: float | None = None
    facts: float | None = None
    answers: list[str] = field(default_factory=list)


class Demo:
    """The files of a run, and what is known of its stages."""

    def __init__(self, out: Path, scale: float) -> None:
        self.out, self.scale = out, scale
        self.lines: list[Line] = []
        self.gold = {fact.question: fact.answer for fact in toy_world.facts()}
        draw = random.Random(5)
        self.asked = [toy_world.numbered(question, draw.randint(1, NUMBERS)) for question in toy_world.questions()]

    def steps(self, count: int) -> int:
        return max(2, round(count * self.scale))

    def make_data(self) -> None:
        """Texts, dialogues, pairs, prompts; a tokenizer of their own; the first two prepared."""
        began = time.monotonic()
        folder = self.out / "data"
        folder.mkdir(parents=True, exist_ok=True)
        texts = list(dict.fromkeys(toy_world.texts(2_000, seed=1)))
        chats = list(toy_world.dialogues(4_000, seed=2, numbers=NUMBERS))
        (folder / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
        write_lines(folder / "chats.jsonl", [{"prompt": asked, "response": said} for asked, said in chats])
        write_lines(folder / "pairs.jsonl", list(self._pairs(700)))
        draw = random.Random(3)
        prompts = {toy_world.numbered(draw.choice(list(self.gold)), draw.randint(1, NUMBERS)) for _ in range(600)}
        write_lines(folder / "prompts.jsonl", [{"prompt": text} for text in sorted(prompts - set(self.asked))])
        write_lines(folder / "asked.jsonl", [{"prompt": text} for text in self.asked])
        lines = texts[:600] + [text for pair in chats[:600] for text in pair]
        tokenizer = make_tokenizer_file(lines, self.out / "tokenizer", pieces=560)
        found = []
        for name, file in (("text", "texts.txt"), ("chat", "chats.jsonl")):
            how = Preparation(
                (str(folder / file),),
                tokenizer,
                reading=Reading(separation="line"),
                end_of_text="<eop>",
                allowance=Allowance.parse(["all"]),
            )
            found.append(prepare(how, folder / name, workers=1, overwrite=True))
        said = f"{len(texts):,} texts, {len(chats):,} dialogues, 700 pairs, {len(prompts):,} prompts"
        self.lines.append(Line("data", time.monotonic() - began, said))
        print(f"data: {said}", flush=True)

    def _pairs(self, count: int) -> Any:
        """Two manners of one answer, one of which the judge wants."""
        draw, known, made = random.Random(4), toy_world.facts(), set()
        while len(made) < count:
            fact, number = draw.choice(known), draw.randint(1, NUMBERS)
            one, other = toy_world.told(fact, draw), toy_world.told(fact, draw)
            passes = JUDGE("", one), JUDGE("", other)
            asked = toy_world.numbered(fact.question, number)
            if passes[0] != passes[1] and (asked, one, other) not in made and (asked, other, one) not in made:
                made.add((asked, one, other))
                chosen, rejected = (one, other) if passes[0] else (other, one)
                yield {"prompt": asked, "chosen": chosen, "rejected": rejected, "source": "rule"}

    def stage(
        self, name: str, kind: type[RunConfig], run: Callable[..., Report], said: Callable[[Report], str], **flags: Any
    ) -> Report:
        """Run a stage with its example file and these settings over it; ask the model that it left."""
        print(f"\n{name}", flush=True)
        began = time.monotonic()
        own = {
            "out": str(self.out / name),
            "batch.length": LENGTH,
            "batch.micro_rows": 1_000,
            "save.every": 0,
            "log.every": 50,
            "log.tensorboard": False,
            "optimizer.weight_decay": 0.0,
            "compute.device": "cpu",
        }
        settings = read_run(HERE / f"{name}.yaml", kind, flags={**own, **flags})
        report = run(settings, progress=lambda line: print("  " + line, flush=True), restart=True)
        line = Line(name, time.monotonic() - began, said(report))
        if name not in ("pretrain", "reward"):
            self.ask(report.model, line)
        self.lines.append(line)
        return report

    def ask(self, folder: Path | None, line: Line) -> None:
        """Answers at temperature 1, as the card would not, but so that the whole distribution is judged."""
        assert folder is not None
        model = chatglm.load(folder, dtype="fp32", device="cpu", threads=torch.get_num_threads())
        drawn = [
            chatglm.SamplingParams(temperature=1, top_k=0, top_p=1, seed=seed, max_new_tokens=MAX_NEW)
            for seed in range(len(self.asked))
        ]
        texts = [reply.text for reply in model.generate(self.asked, drawn)]
        line.judged = judged_rate(JUDGE, self.asked, texts)
        truths = [self.gold[asked.split(". ", 1)[1]] for asked in self.asked]
        line.facts = sum(truth in text for truth, text in zip(truths, texts, strict=True)) / len(texts)
        line.answers = [
            f"{asked} → {reply.text}"
            for asked, reply in zip(
                self.asked, model.generate(self.asked[:2], temperature=0, max_new_tokens=MAX_NEW), strict=False
            )
        ]

    def run(self) -> None:
        """All stages."""
        self.make_data()
        data = self.out / "data"
        tokenizer = Tokenizer.from_folder(self.out / "tokenizer")
        ids = {"bos_token_id": tokenizer.sop_id, "eos_token_id": tokenizer.eop_id, "mask_token_id": tokenizer.mask_id}
        ids |= {"gmask_token_id": tokenizer.gmask_id, "pad_token_id": tokenizer.pad_id}
        sizes = {f"model.config.{k}": v for k, v in {**SIZES, **ids, "vocab_size": tokenizer.vocab_size}.items()}
        first = self.stage(
            "pretrain", pretrain.PretrainRun, pretrain.run,
            lambda r: f"{fall(r)}, held out {r.evaluation['evaluation_loss']:.2f}",
            **sizes, **{
                "model.tokenizer": str(self.out / "tokenizer"), "data.train": str(data / "text"),
                "data.held_out_rows": 8, "batch.rows": 16, "steps": self.steps(300), "optimizer.lr": 4e-3,
                "schedule.warmup": 10, "stability.embedding_shrink": 1.0, "stability.loss_factor": 0.0,
                "evaluate.rows": 8,
            },
        )  # fmt: skip
        tuned = self.stage(
            "sft", sft.SFTRun, sft.run,
            fall,
            **{
                "model.source": str(first.model), "data.train": [str(data / "chat"), str(data / "text")],
                "data.held_out_rows": 8, "batch.rows": 16, "steps": self.steps(1_200), "optimizer.lr": 3e-3,
                "schedule.warmup": 10, "schedule.floor": 0.05, "evaluate.every": 0,
            },
        )  # fmt: skip
        source = str(tuned.model)
        pairs = {"model.source": source, "data.train": str(data / "pairs.jsonl"), "schedule.warmup": 0}
        reward = self.stage(
            "reward", reward_stage.RewardRun, reward_stage.run,
            lambda r: f"held-out accuracy {r.evaluation['held_out_accuracy']:.3f}",
            **pairs, **{
                "epochs": 3 * self.scale, "batch.rows": 16, "optimizer.lr": 1e-3, "reward.bin_tokens": 2,
                "reward.balance": False, "evaluate.every": 20, "log.every": 20,
            },
        )  # fmt: skip
        learned = {
            "model.source": source, "reward.model": str(reward.model), "data.train": str(data / "prompts.jsonl"),
            "data.held_out": str(data / "asked.jsonl"), "data.held_out_prompts": 48,
            "data.general": [str(data / "chat"), str(data / "text")], "judge": toy_world.WANTED, "schedule.warmup": 0,
        }  # fmt: skip
        self.stage(
            "bootstrap", bootstrap_stage.BootstrapRun, bootstrap_stage.run,
            lambda r: f"kept {r.evaluation['kept']:.0f} answers, KL {r.evaluation['eval_kl_k3']:.2f} nats",
            **learned, **{
                "bootstrap.rounds": 2, "bootstrap.prompts": 200, "bootstrap.max_new": MAX_NEW, "bootstrap.margin": 0.05,
                "steps": self.steps(20), "batch.rows": 8, "optimizer.lr": 5e-4,
            },
        )  # fmt: skip
        self.stage(
            "dpo", dpo_stage.DPORun, dpo_stage.run,
            lambda r: f"pairs preferred rightly: {last_metric(r, 'accuracy'):.2f}",
            **pairs, **{
                "epochs": 2 * self.scale, "batch.rows": 16, "optimizer.lr": 2e-4, "dpo.sft": 0.2,
                "evaluate.every": 0, "evaluate.rows": 32, "log.every": 10,
            },
        )  # fmt: skip
        self.stage(
            "ppo", online_stage.PPORun, online_stage.run_ppo,
            lambda r: (
                f"reward {last_metric(r, 'reward'):+.2f}, KL {r.evaluation['eval_kl_k3']:.2f} nats, "
                f"general loss {100 * r.evaluation['general_loss_up']:+.1f}%"
            ),
            **learned, **{
                "steps": self.steps(96), "batch.rows": 32, "online.prompts": 64, "online.max_new": MAX_NEW,
                "online.sft": 0.5, "optimizer.lr": 3e-4, "ppo.value_warmup": 8, "ppo.whiten": True,
                "reward.baseline": "none", "evaluate.every": self.steps(32), "log.every": 16,
                "guards.canaries": [self.asked[0]],
            },
        )  # fmt: skip

    def report(self) -> str:
        """The table."""
        made = ["", f"{'stage':<10} {'seconds':>8} {'wanted':>7} {'true':>6}  what it came to"]
        for line in self.lines:
            judged = "" if line.judged is None else f"{line.judged:.2f}"
            true = "" if line.facts is None else f"{line.facts:.2f}"
            made.append(f"{line.stage:<10} {line.seconds:>8.1f} {judged:>7} {true:>6}  {line.said}")
            made += [f"{'':>36}{answer}" for answer in line.answers]
        total = sum(line.seconds for line in self.lines)
        used = resource.getrusage(resource.RUSAGE_SELF)
        made.append(f"{'all':<10} {total:>8.1f}{'':>16}{used.ru_utime + used.ru_stime:.0f} s of one processor")
        made.append("wanted: share of answers at temperature 1 that the judge passes; true: share that tell the fact")
        made.append(f"Try: chatglm chat {self.out / 'ppo' / 'model'}    chatglm train plot {self.out / 'ppo'}")
        return "\n".join(made)


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), encoding="utf-8")


def fall(report: Report) -> str:
    return f"loss {report.losses[0][1]:.2f} → {report.losses[-1][1]:.2f}"


def last_metric(report: Report, name: str) -> float:
    lines = (report.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return float(json.loads(lines[-1])[name])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/train-demo"))
    parser.add_argument("--scale", type=float, default=1.0, help="steps of every stage times this")
    parser.add_argument("--threads", type=int, default=1, help="a model so small has nothing to share out")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    demo = Demo(given.out, given.scale)
    demo.run()
    text = demo.report()
    (given.out / "report.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
