"""A tokenizer file of the original's structure, made from texts: for models that are trained from nothing.

Every piece that ChatGLM gives a meaning to is in it, so everything that reads the official file reads this one.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from ..errors import TokenizerError
from .model_file import TOKENIZER_FILE
from .vocabulary import PAD, SPECIAL_PIECES, UNKNOWN, required_pieces, symbols


def make_tokenizer_file(texts: Iterable[str], folder: str | Path, *, pieces: int, threads: int = 1) -> Path:
    """Learn `pieces` pieces (at most; the 347 that must be there counted) and write ice_text.model into `folder`.

    The same texts give the same file. Raises TokenizerError where so few pieces cannot hold the needed ones.
    """
    if pieces <= len(required_pieces()):
        raise TokenizerError(f"{pieces} pieces are asked for; {len(required_pieces())} have a fixed meaning already")
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=out,
            model_type="unigram",
            vocab_size=pieces,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            unk_id=0,
            unk_piece=UNKNOWN,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            pad_piece=PAD,
            control_symbols=list(SPECIAL_PIECES),
            user_defined_symbols=list(symbols()),
            normalization_rule_name="nmt_nfkc",
            remove_extra_whitespaces=False,
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(f"no tokenizer could be made of these texts: {error}") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, temporary = folder / TOKENIZER_FILE, folder / f"{TOKENIZER_FILE}.new"
    temporary.write_bytes(out.getvalue())
    temporary.replace(path)
    return path
