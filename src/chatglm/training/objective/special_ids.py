"""The ids that the objective puts between the tokens of a text."""

from __future__ import annotations

from dataclasses import dataclass

from chatglm.config import ModelConfig
from chatglm.tokenizer import Tokenizer

END_OF_TEXT = "</s>"
"""What stands behind every document of a corpus, as in GLM-130B (id 20002 there)."""


@dataclass(frozen=True)
class SpecialIds:
    """One model's ids.

    mask, smask, gmask   stand for a short span, a sentence, the rest of a text
    sop, eop             start and end of a piece of part B
    end_of_text          behind every document
    start_of_text        before every row of GLM's own mixtures (its `[CLS]`)
    hidden               what denoising puts in the place of a token of part B (`[dBLOCK]`)
    """

    mask: int
    gmask: int
    smask: int
    sop: int
    eop: int
    end_of_text: int
    start_of_text: int
    hidden: int

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer, *, end_of_text: str = END_OF_TEXT) -> SpecialIds:
        """By piece, so that every era and every tokenizer file of the family fits."""
        return cls(
            mask=tokenizer.mask_id,
            gmask=tokenizer.gmask_id,
            smask=tokenizer.smask_id,
            sop=tokenizer.sop_id,
            eop=tokenizer.eop_id,
            end_of_text=tokenizer.piece_to_id(end_of_text),
            start_of_text=tokenizer.piece_to_id("<ENC>"),
            hidden=tokenizer.piece_to_id("<dBLOCK>"),
        )

    @classmethod
    def of_config(cls, config: ModelConfig) -> SpecialIds:
        """From the config alone: the eight special pieces have ids in a row, `</s>` is the third piece of the file."""
        first = config.bos_token_id - 4
        return cls(
            mask=config.mask_token_id,
            gmask=config.gmask_token_id,
            smask=first + 2,
            sop=config.bos_token_id,
            eop=config.eos_token_id,
            end_of_text=config.image_tokens + 2,
            start_of_text=first + 6,
            hidden=first + 7,
        )
