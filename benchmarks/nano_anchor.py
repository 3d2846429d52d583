"""Is the loop as good as a plain one? A GPT-objective twin against a GPT in plain PyTorch, at equal tokens and size.

    python benchmarks/nano_anchor.py --out benchmarks/results/nano-anchor.json

Characters of a generated bilingual text (stories of a small world; its grammar is below), rows of 128 characters, every
character predicted from those before it. Three networks read the same rows in the same order under the same AdamW,
schedule and clipping:

- reference: `nn.TransformerEncoderLayer` under a causal mask and a loop of its own, nothing of this package
- twin: this package's GLM as GPT-2 is built (pre-norm, learned positions) in this package's loop
- chatglm: the blocks of ChatGLM-6B (scaled post-norm, 2-D rotary) in this package's loop

The anchor: the twin's validation loss within 2% of the reference's.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from chatglm.config import ModelConfig
from chatglm.model import GLM, initialize, sdpa_attention
from chatglm.training.loop import train
from chatglm.training.loss import LossSum, batch_loss
from chatglm.training.run_config import RunConfig
from chatglm.training.samples import IGNORE, Batch, Sample
from chatglm.training.settings import build
from chatglm.training.task import StreamSource, Task

LENGTH = 128
ROWS = 16
CHARACTERS = 400_000
SPECIALS = 5  # pad, mask, gmask, sop, eop before the characters

NAMES = ("Lin", "Mara", "Tom", "Wei", "Ada", "Noor")
ANIMALS = {"cat": "猫", "dog": "狗", "bird": "鸟", "horse": "马", "fish": "鱼"}
COLOURS = {"white": "白", "black": "黑", "red": "红", "green": "绿", "blue": "蓝"}
PLACES = {"river": "河边", "garden": "花园", "market": "市场", "mountain": "山上", "school": "学校"}
VERBS = ("saw", "fed", "followed", "painted", "lost", "found")


def story(draw: random.Random) -> str:
    """A few sentences about one animal, in English and Chinese; later sentences depend on earlier ones."""
    name, animal, colour = draw.choice(NAMES), draw.choice(list(ANIMALS)), draw.choice(list(COLOURS))
    place, verb, count = draw.choice(list(PLACES)), draw.choice(VERBS), draw.randint(2, 9)
    lines = [f"{name} {verb} a {colour} {animal} at the {place}."]
    if draw.random() < 0.5:
        lines.append(f"{PLACES[place]}有一只{COLOURS[colour]}{ANIMALS[animal]}。")
    if draw.random() < 0.5:
        lines.append(f"The {animal} was {colour}, and {count} plus {draw.randint(1, 9)} others were there.")
    if draw.random() < 0.7:
        other = draw.choice([n for n in NAMES if n != name])
        lines.append(f"{other} asked {name}: what colour is the {animal}? {colour.capitalize()}, said {name}.")
    return " ".join(lines) + "\n"


def text_of(seed: int, characters: int) -> str:
    draw, parts, size = random.Random(seed), [], 0
    while size < characters:
        parts.append(story(draw))
        size += len(parts[-1])
    return "".join(parts)[:characters]


@dataclass(frozen=True)
class Characters:
    """Rows of LENGTH characters at random places of a text, a function of (seed, row)."""

    ids: np.ndarray
    seed: int
    length: int = LENGTH + 1

    @property
    def rows_per_epoch(self) -> int:
        return len(self.ids) // LENGTH

    def characters(self, index: int) -> np.ndarray:
        start = int(np.random.default_rng((self.seed, index)).integers(0, len(self.ids) - LENGTH))
        return self.ids[start : start + LENGTH]

    def row(self, index: int) -> list[Sample]:
        text = self.characters(index)
        targets = np.concatenate([[IGNORE], text]).astype(np.int32)
        blocks = np.arange(LENGTH + 1)
        ids = np.concatenate([[2, 3], text[:-1]]).astype(np.int32)  # [gMASK] sop …
        return [Sample(ids, targets, np.stack([blocks * 0, blocks]).astype(np.int32), 1, "document")]


class PlainGPT(nn.Module):
    """GPT-2 of PyTorch's own parts."""

    def __init__(self, vocab: int, hidden: int, layers: int, heads: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, hidden)
        self.places = nn.Embedding(LENGTH, hidden)
        layer = nn.TransformerEncoderLayer(
            hidden, heads, 4 * hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(hidden), enable_nested_tensor=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                is_output = name.endswith(("out_proj.weight", "linear2.weight"))
                nn.init.normal_(parameter, std=0.02 * ((2 * layers) ** -0.5 if is_output else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        hidden = self.table(ids) + self.places(torch.arange(ids.shape[1]))
        output: Tensor = self.layers(hidden, mask=mask, is_causal=True) @ self.table.weight.T
        return output


def rate_at(step: int, steps: int, lr: float, warmup: int) -> float:
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2)


def train_reference(stream: Characters, held_out: Characters, vocab: int, sizes: dict[str, int], o: Any) -> Any:
    torch.manual_seed(o.seed)
    model = PlainGPT(vocab, sizes["hidden_size"], sizes["num_layers"], sizes["num_heads"])
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(0.9, 0.95))

    def loss_of(source: Characters, start: int, rows: int) -> Tensor:
        text = torch.from_numpy(np.stack([source.characters(start + i) for i in range(rows)])).long()
        ids = torch.cat([torch.full((rows, 1), 3), text[:, :-1]], dim=1)  # sop …
        return functional.cross_entropy(model(ids).flatten(0, 1), text.flatten())

    begin = time.monotonic()
    for step in range(o.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, o.steps, o.lr, o.warmup)
        optimizer.zero_grad()
        loss_of(stream, step * ROWS, ROWS).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.monotonic() - begin
    with torch.no_grad():
        score = sum(float(loss_of(held_out, start, ROWS)) for start in range(0, o.held_out, ROWS)) * ROWS / o.held_out
    return {"parameters": sum(p.numel() for p in model.parameters()), "validation": score, "seconds": seconds}


def causal_loss(model: nn.Module, batch: Batch) -> LossSum:
    return batch_loss(model, batch, attend=sdpa_attention)  # type: ignore[arg-type]


def train_ours(config: ModelConfig, stream: Characters, held_out: Characters, o: Any) -> Any:
    model = GLM(config)
    initialize(model, o.seed)
    task = Task(model, causal_loss, StreamSource(stream), held_out=StreamSource(held_out))
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "out": folder,
            "steps": o.steps,
            "seed": o.seed,
            "batch": {"rows": ROWS, "micro_rows": ROWS, "length": LENGTH + 1},
            "optimizer": {"lr": o.lr, "betas": [0.9, 0.95], "weight_decay": 0.1, "clip": 1.0},
            "schedule": {"kind": "cosine", "warmup": o.warmup, "floor": 0.1},
            "save": {"every": 0},
            "evaluate": {"rows": o.held_out},
            "export": {"enabled": False},
            "compute": {"device": "cpu", "threads": o.threads},
            "log": {"every": 100, "tensorboard": False},
        }
        report = train(task, build(RunConfig, values, "anchor"), progress=print)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "validation": report.evaluation["evaluation_loss"], "seconds": report.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    text, unseen = text_of(1, CHARACTERS), text_of(2, CHARACTERS // 10)
    alphabet = sorted(set(text) | set(unseen))
    number = {character: SPECIALS + i for i, character in enumerate(alphabet)}
    stream, held_out = (
        Characters(np.array([number[c] for c in part], dtype=np.int32), seed) for part, seed in ((text, 3), (unseen, 4))
    )
    vocab = SPECIALS + len(alphabet)
    sizes = {"hidden_size": 96, "num_layers": 3, "num_heads": 4}
    chatglm = ModelConfig(
        vocab_size=vocab,
        inner_hidden_size=384,
        max_sequence_length=LENGTH + 2,
        bos_token_id=3,
        eos_token_id=4,
        mask_token_id=1,
        gmask_token_id=2,
        pad_token_id=0,
        residual_scale=math.sqrt(2 * sizes["num_layers"]),
        **sizes,
    )
    twin = replace(chatglm, norm_order="pre", residual_scale=1.0, position_encoding="learned_2d")
    found = {
        "reference": train_reference(stream, held_out, vocab, sizes, o),
        "twin": train_ours(twin, stream, held_out, o),
        "chatglm": train_ours(chatglm, stream, held_out, o),
    }
    for name, figures in found.items():
        off = figures["validation"] / found["reference"]["validation"] - 1
        figures["against_reference"] = off
        print(f"{name:10} {figures['parameters']:>9,} parameters  validation {figures['validation']:.4f}  {off:+.2%}")
    if o.out is not None:
        settings = {name: value for name, value in vars(o).items() if name != "out"}
        settings |= {"rows": ROWS, "length": LENGTH, "characters": CHARACTERS, "vocab": vocab, **sizes}
        about = {"torch": torch.__version__, "settings": settings, "tokens": o.steps * ROWS * LENGTH}
        o.out.write_text(json.dumps({**about, "results": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
