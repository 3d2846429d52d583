"""What is watched while a policy is trained: how it moved from its reference, and what its answers look like.

KL estimators over tokens drawn from π (Schulman, "Approximating KL divergence"): k1 = log π - log π_ref, without bias
and noisy; k3 = exp(-k1) - 1 + k1, never negative. Both are summed over an answer: nats an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .answers import sum_by_answer


def k1_of(log_ratio: Tensor) -> Tensor:
    """Log π - log π_ref, [actions]."""
    return log_ratio


def k3_of(log_ratio: Tensor) -> Tensor:
    """exp(-k1) - 1 + k1, [actions]; the same mean as k1, less noise, never negative."""
    return torch.expm1(-log_ratio) + log_ratio


def kl_metrics(log_ratio: Tensor, answer: Tensor, answers: int) -> dict[str, float]:
    """Mean nats an answer, by both estimators."""
    return {
        "kl_k1": sum_by_answer(k1_of(log_ratio), answer, answers).mean().item(),
        "kl_k3": sum_by_answer(k3_of(log_ratio), answer, answers).mean().item(),
    }


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - var(returns - values) / var(returns): 1 is a perfect value model, 0 a constant one."""
    spread = returns.var(correction=0)
    return 0.0 if spread == 0 else (1 - (returns - values).var(correction=0) / spread).item()


def repetition(ids: Sequence[int], size: int = 4) -> float:
    """Share of an answer's n-grams that stood in it before; 0 for an answer shorter than `size`."""
    grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(answers: Sequence[Sequence[int]], size: int) -> float:
    """Different n-grams over all n-grams of these answers together (Li et al. 2016)."""
    grams = [tuple(ids[i : i + size]) for ids in answers for i in range(len(ids) - size + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def answer_metrics(answers: Sequence[Sequence[int]], is_finished: Sequence[bool]) -> dict[str, float]:
    """Length in tokens, share that did not end, repetition within an answer, variety over all of them."""
    count = max(1, len(answers))
    lengths = sorted(map(len, answers))
    return {
        "answer_length": sum(lengths) / count,
        "answer_length_median": float(lengths[len(lengths) // 2]) if lengths else 0.0,
        "share_without_eop": sum(not done for done in is_finished) / count,
        "repetition": sum(map(repetition, answers)) / count,
        "distinct_1": distinct(answers, 1),
        "distinct_2": distinct(answers, 2),
    }


def rises(values: Sequence[float]) -> bool:
    """Whether every value is larger than the one before."""
    return all(b > a for a, b in pairwise(values))
