"""A round of answers as a value, and what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...model import GLM
from .experience import Experience
from .rollout import Answer, Prompt

ROUND_FILE = "round.pt"

KEPT = ("rewards", "scores", "logprobs", "reference", "entropy", "answer", "starts")


@dataclass
class Round:
    """A round that was drawn: what a checkpoint keeps of it."""

    number: int
    experience: Experience
    targets: dict[str, Tensor]
    figures: dict[str, float]


def stored(held: Round, beta: float) -> dict[str, Any]:
    """What `torch.save` writes of a round, and the price of KL in it."""
    experience = held.experience
    return {
        "number": held.number,
        "beta": beta,
        "figures": held.figures,
        "targets": held.targets,
        "answers": [(list(a.ids), a.is_finished, a.text, list(a.logprobs)) for a in experience.answers],
        "experience": {name: getattr(experience, name) for name in KEPT},
    }


def restored(kept: Mapping[str, Any], prompts: Sequence[Prompt], each: int, policy: GLM) -> Round:
    """The round again. prompts: its own, in order; each: answers to every one of them."""
    owners = [prompt for prompt in prompts for _ in range(each)]
    answers = [
        Answer(prompt, tuple(ids), done, text, tuple(logprobs))
        for prompt, (ids, done, text, logprobs) in zip(owners, kept["answers"], strict=True)
    ]
    samples = [answer.sample(policy.config) for answer in answers]
    experience = Experience(answers=answers, samples=samples, **kept["experience"])
    return Round(kept["number"], experience, dict(kept["targets"]), dict(kept["figures"]))
