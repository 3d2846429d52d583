"""Whether a tokenizer file and a model's config belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import TokenizerError
from .vocabulary import EOP, GMASK, MASK, PAD, SOP, appended_pieces

if TYPE_CHECKING:
    from ..config import ModelConfig
    from .tokenizer import Tokenizer


def needed_pieces(config: ModelConfig) -> int:
    """Pieces of the tokenizer file that a config describes: 130,344 for the slim era, 130,000 for the first release.

    `<sop>` is the fifth of the 344 special, layout and byte pieces at the end, which the first release does not store.
    """
    before = config.bos_token_id - config.image_tokens - 4
    return before if config.image_tokens else before + len(appended_pieces())


def check_fitness(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise TokenizerError when special ids differ, eras are mixed, or the embedding has too few rows."""
    # Early pre-slim configs left `<pad>` at the class default of 0; nothing looks at it there.
    pad_id = tokenizer.pad_id if config.image_tokens and config.pad_token_id == 0 else config.pad_token_id
    wanted = (
        (SOP, tokenizer.sop_id, config.bos_token_id),
        (EOP, tokenizer.eop_id, config.eos_token_id),
        (MASK, tokenizer.mask_id, config.mask_token_id),
        (GMASK, tokenizer.gmask_id, config.gmask_token_id),
        (PAD, tokenizer.pad_id, pad_id),
    )
    wrong = [f"{piece} is {ours}, not {theirs}" for piece, ours, theirs in wanted if ours != theirs]
    if tokenizer.vocab_size > config.vocab_size:
        wrong.append(f"ids go to {tokenizer.vocab_size - 1:,}, the embedding has {config.vocab_size:,} rows")
    if not wrong:
        return
    file = tokenizer.file
    era = "pre-slim" if tokenizer.offset else "slim"
    raise TokenizerError(
        f"{file.path} does not belong to the config: {file.size:,} bytes, {file.stored_pieces:,} pieces ({era} ids), "
        f"the config needs {needed_pieces(config):,} pieces ({config.era} ids)\n  {'; '.join(wrong)}",
        cure=_cure(tokenizer, config),
    )


def _cure(tokenizer: Tokenizer, config: ModelConfig) -> str:
    if not tokenizer.offset and config.image_tokens:
        return (
            "take ice_text.model from the checkpoint's own revision; to use this later file with pre-slim weights "
            'on purpose, write "num_image_tokens": 20000 into tokenizer_config.json'
        )
    if tokenizer.offset and not config.image_tokens:
        return "take ice_text.model from a revision since 2023-04-06, where the ids of these weights come from"
    return "take ice_text.model and config.json from the same checkpoint"
