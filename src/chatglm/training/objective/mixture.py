"""How often which objective is drawn: the published mixtures of the family as named values (spec/training.md §1.6)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from chatglm.errors import TrainingError


@dataclass(frozen=True)
class Mixture:
    """One family member's objective.

    token, sentence, document   shares of the samples; they sum to 1
    instruction                 share of the tokens that prompted data sets should give (a corpus of its own, mixed in)
    short_seq_prob              samples cut to a random shorter length
    single_span_prob            token samples with one span only
    r_min                       least share of a text that the document objective generates
    gpt_infill_prob             document samples that cut one span anywhere instead of the end (GLM)
    hide_tokens                 denoising: part B's input shows `[dBLOCK]` for a tenth of its tokens
    within_documents            spans never cross the end of a document, rows begin with `[CLS]` (GLM)
    parts                       texts that a row of the token objective is cut in, each masked on its own
    sequence_length             tokens of a row
    """

    token: float
    document: float
    sentence: float = 0.0
    instruction: float = 0.0
    short_seq_prob: float = 0.0
    single_span_prob: float = 0.0
    r_min: float = 0.25
    gpt_infill_prob: float = 0.0
    hide_tokens: bool = False
    within_documents: bool = False
    parts: int = 1
    sequence_length: int = 512

    def __post_init__(self) -> None:
        for name in ("token", "sentence", "document", "instruction", "short_seq_prob", "single_span_prob", "r_min"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise TrainingError(f"objective: `{name}` is {value!r}; it must lie between 0 and 1")
        total = self.token + self.sentence + self.document
        if abs(total - 1) > 1e-6:
            raise TrainingError(
                f"objective: token {self.token} + sentence {self.sentence} + document {self.document} is {total:g}",
                cure="make the three shares sum to 1",
            )
        if self.parts < 1:
            raise TrainingError(f"objective: `parts` is {self.parts}; it must be at least 1")


_GLM_10B = Mixture(
    token=0.5,
    sentence=0.3,
    document=0.2,
    short_seq_prob=0.02,
    gpt_infill_prob=0.5,
    hide_tokens=True,
    within_documents=True,
)
GLM_130B = Mixture(
    token=0.3,
    document=0.7,
    instruction=0.05,
    short_seq_prob=0.02,
    single_span_prob=0.02,
    r_min=0.2,
    parts=4,
    sequence_length=2048,
)
CHATGLM = GLM_130B
"""Nothing is published for ChatGLM-6B; its checkpoints answer `[MASK]` and `[gMASK]` prompts as GLM-130B's do."""

MIXTURES: dict[str, Mixture] = {
    "chatglm-6b": CHATGLM,
    "glm-130b": GLM_130B,
    "glm-base": Mixture(token=1.0, document=0.0, within_documents=True),
    "glm-10b": _GLM_10B,
    "glm-10b-1024": Mixture(
        token=0.4,
        sentence=0.3,
        document=0.3,
        short_seq_prob=0.5,
        single_span_prob=0.05,
        gpt_infill_prob=0.5,
        hide_tokens=True,
        within_documents=True,
        sequence_length=1024,
    ),
    "glm-10b-chinese": _GLM_10B,
    "glm-10b-chinese-1024": Mixture(
        token=0.5,
        sentence=0.3,
        document=0.2,
        short_seq_prob=0.5,
        gpt_infill_prob=0.5,
        hide_tokens=True,
        within_documents=True,
        sequence_length=1024,
    ),
    "glm-large-chinese": Mixture(
        token=0.4, sentence=0.3, document=0.3, gpt_infill_prob=0.5, within_documents=True, sequence_length=1024
    ),
    "gpt": Mixture(token=0.0, document=1.0, r_min=1.0),
}
"""By name. `glm-base` is also GLM-Large's and GLM-RoBERTa's; `gpt` generates every token from its own past alone."""


def named_mixture(name: str) -> Mixture:
    """A mixture by name. Raises TrainingError with the nearest name."""
    try:
        return MIXTURES[name]
    except KeyError:
        near = difflib.get_close_matches(name, MIXTURES, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(MIXTURES)}"
        raise TrainingError(f"objective: no mixture is called `{name}`", cure=hint) from None
