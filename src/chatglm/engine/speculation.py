"""Prompt lookup: guess the next tokens from what the context and the answer already said, and verify them in one pass.

Lossless: every token is sampled from the model's own scores with the sequence's own random number; a guess only saves
the pass that would have produced it. Source: prompt-lookup decoding; Leviathan et al. (ICML 2023) for verification.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sequence import Sequence

LONGEST_MATCH = 3
"""Tokens of the answer's end that are looked for earlier; shorter ends are tried next."""

PAUSE = 8
"""Steps without a draft after drafts that were all wrong: on text that does not repeat, verifying only costs."""


@dataclass
class DraftRecord:
    """How the drafts of one sequence fared."""

    proposed: int = 0
    accepted: int = 0
    passes: int = 0
    pause: int = 0

    def record(self, proposed: int, accepted: int) -> None:
        """Count one verified draft; a wholly wrong one pauses drafting."""
        self.proposed += proposed
        self.accepted += accepted
        self.passes += 1
        self.pause = 0 if accepted else PAUSE

    @property
    def acceptance_rate(self) -> float:
        """Share of guessed tokens that the model chose too."""
        return self.accepted / self.proposed if self.proposed else 0.0


def propose(sequence: Sequence) -> list[int]:
    """A draft for the next tokens, empty when there is none or drafting is off."""
    room = min(sequence.params.prompt_lookup, sequence.max_new - len(sequence.generated_ids) - 1)
    if room < 1 or not sequence.generated_ids:
        return []
    if sequence.drafts.pause:
        sequence.drafts.pause -= 1
        return []
    return lookup([*sequence.context_ids, sequence.start_id, *sequence.generated_ids], room)


def lookup(ids: list[int], count: int) -> list[int]:
    """Up to `count` tokens that followed the latest earlier occurrence of the end of `ids`, longest end first."""
    for size in range(min(LONGEST_MATCH, len(ids) - 1), 0, -1):
        end = ids[-size:]
        for start in range(len(ids) - size - 1, -1, -1):
            if ids[start : start + size] == end:
                return ids[start + size : start + size + count]
    return []
