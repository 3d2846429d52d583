"""How well a reward model tells chosen from rejected on pairs it has not seen, and whether it only measures length."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model import Attend, sdpa_attention
from .answers import one_a_row
from .policy import by_tokens
from .preferences import Pair, length_bin, reward_row
from .reward import RewardModel

CALIBRATION_EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LENGTH_GAP = 0.2
"""A model whose accuracy differs this much with the sign of the length difference measures length."""


@dataclass(frozen=True)
class Share:
    """How many of so many pairs are scored the right way round; a tie counts half."""

    accuracy: float
    pairs: int


@dataclass(frozen=True)
class RewardReport:
    """What is told of a reward model.

    by_length    by the sign and bin of the length difference: "+0" is a chosen answer that is a little longer
    by_source    by where a pair comes from
    equal_length pairs of exactly the same length: nothing but the content decides
    calibration  [(predicted probability, share that is right, pairs)] by bins of σ(|r_c - r_r|)
    mean, std    of all scores
    """

    accuracy: Share
    by_length: dict[str, Share]
    by_source: dict[str, Share]
    equal_length: Share
    calibration: list[tuple[float, float, int]]
    mean: float
    std: float

    @property
    def length_gap(self) -> float:
        """Accuracy where the chosen answer is longer, less that where it is shorter; 0 where one side is missing."""
        longer, shorter = self._side("+"), self._side("-")
        return longer.accuracy - shorter.accuracy if longer.pairs and shorter.pairs else 0.0

    @property
    def is_length_shortcut(self) -> bool:
        """Whether the model mostly measures length: right where length agrees with the label, wrong where not."""
        return abs(self.length_gap) > LENGTH_GAP

    def _side(self, sign: str) -> Share:
        shares = [share for name, share in self.by_length.items() if name.startswith(sign)]
        pairs = sum(share.pairs for share in shares)
        right = sum(share.accuracy * share.pairs for share in shares)
        return Share(right / max(1, pairs), pairs)

    def lines(self) -> list[str]:
        """For people."""
        made = [f"held-out accuracy {_said(self.accuracy)}; scores {self.mean:+.3f} ± {self.std:.3f}"]
        made += [f"  length difference {name:>5}: {_said(share)}" for name, share in self.by_length.items()]
        made += [f"  same length: {_said(self.equal_length)}"]
        made += [f"  source {name or '(none)'}: {_said(share)}" for name, share in self.by_source.items()]
        made += [
            f"  sure to {sure:.2f}: right in {right:.2f} ({pairs} pairs)" for sure, right, pairs in self.calibration
        ]
        if self.is_length_shortcut:
            made.append(
                f"  WARNING: accuracy differs by {self.length_gap:+.2f} with the sign of the length difference: the "
                "model measures length. Balance the pairs (reward.balance: true) or mend the labels"
            )
        return made


def _said(share: Share) -> str:
    return f"{share.accuracy:.3f} ({share.pairs} pairs)"


@torch.no_grad()
def score_pairs(
    model: RewardModel, pairs: Sequence[Pair], *, attend: Attend = sdpa_attention, most_tokens: int = 16_384
) -> Tensor:
    """Scores fp32 [pairs, 2], chosen first."""
    samples = [sample for pair in pairs for sample in reward_row(pair, model.config)]
    parts = [
        model.scores(one_a_row(samples[n] for n in numbers).to(model.device), attend=attend)
        for numbers in by_tokens([len(sample) for sample in samples], most_tokens)
    ]
    scores: Tensor = torch.cat(parts).cpu().unflatten(0, (-1, 2))
    return scores


def reward_report(pairs: Sequence[Pair], scores: Tensor, *, bin_tokens: int = 8, most_bins: int = 4) -> RewardReport:
    """The report of held-out pairs and their scores [pairs, 2]."""
    difference = scores[:, 0] - scores[:, 1]
    right = (difference > 0).double() + (difference == 0).double() / 2

    def bin_of(pair: Pair) -> str:
        if pair.length_difference == 0:
            return "0"
        sign = "+" if pair.length_difference > 0 else "-"
        return f"{sign}{min(length_bin(pair.length_difference, bin_tokens), most_bins - 1)}"

    by_length = _shares(pairs, right, bin_of)
    return RewardReport(
        accuracy=Share(right.mean().item(), len(pairs)),
        by_length={name: by_length[name] for name in sorted(by_length) if name != "0"},
        by_source=_shares(pairs, right, lambda pair: pair.source),
        equal_length=by_length.get("0", Share(0.0, 0)),
        calibration=_calibration(difference, right),
        mean=scores.mean().item(),
        std=scores.std(correction=0).item(),
    )


def _shares(pairs: Sequence[Pair], right: Tensor, name_of: Callable[[Pair], str]) -> dict[str, Share]:
    groups: dict[str, list[float]] = {}
    for pair, value in zip(pairs, right.tolist(), strict=True):
        groups.setdefault(name_of(pair), []).append(value)
    return {name: Share(sum(values) / len(values), len(values)) for name, values in groups.items()}


def _calibration(difference: Tensor, right: Tensor) -> list[tuple[float, float, int]]:
    """Of pairs that the model is about so sure of, the share that it has right."""
    sure = difference.abs().double().sigmoid()
    made = []
    for low, high in itertools.pairwise(CALIBRATION_EDGES):
        inside = (sure >= low) & ((sure < high) | (high == CALIBRATION_EDGES[-1]))
        if inside.any():
            made.append((sure[inside].mean().item(), right[inside].mean().item(), int(inside.sum())))
    return made
