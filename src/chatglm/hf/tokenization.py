"""ChatGLMTokenizer: the original's tokenizer for transformers, on the package's own.

`tokenizer(text)`, `encode` and `decode` follow v1.1.0 case by case: strings such as `<sop>` or `[MASK]` in a text
become their special ids, and decoding tidies blanks before punctuation. `tokenizer.native` is the package's
Tokenizer, which does neither; `model.chat` uses that one. What the base class does differs from version to version of
transformers, so the methods that decide ids and text are all here. Source: spec/chatglm-6b.md §5.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizer

from ..tokenizer import TOKENIZER_FILE, Tokenizer
from .padding import add_mask_and_positions, pad_left

VOCAB_FILES_NAMES = {"vocab_file": TOKENIZER_FILE}

_IMAGE_TOKEN = re.compile(r"<image_(\d+)>")

_NOT_CODE = ("auto_map", "trust_remote_code")
"""Keys of tokenizer_config.json that point to Python files; never kept."""


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Text ↔ ids as ChatGLM-6B v1.1.0 has it; every era's `ice_text.model`.

    vocab_file         the SentencePiece file
    num_image_tokens   added to every id: 0, or 20,000 for a later file beside pre-slim weights (a first-release file
                       always has 20,000)
    do_lower_case, remove_space   the original's switches, off in every release
    clean_up_tokenization_spaces  whether decoding removes blanks before `. , ! ?` and `n't 's …`, as the original does
    Raises TokenizerError for a missing, damaged or foreign file.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str,
        do_lower_case: bool = False,
        remove_space: bool = False,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        end_token: str = "</s>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        padding_side: str = "left",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        num_image_tokens: int = 0,
        clean_up_tokenization_spaces: bool = True,
        **kwargs: Any,
    ) -> None:
        for key in _NOT_CODE:
            kwargs.pop(key, None)
        named = _take_named_tokens(kwargs)
        self.end_token = named.get("end_token", end_token)
        self.gmask_token = named.get("gmask_token", gmask_token)
        eop_token = named.get("eop_token")
        self.vocab_file = str(vocab_file)
        self.do_lower_case = do_lower_case
        self.remove_space = remove_space
        self.native = Tokenizer.from_file(vocab_file, image_tokens=num_image_tokens)
        self.num_image_tokens = self.native.offset
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            mask_token=mask_token,
            pad_token=pad_token,
            unk_token=unk_token,
            padding_side=padding_side,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )
        # What `save_pretrained` writes besides the base class's own.
        stored: dict[str, Any] = {
            "do_lower_case": do_lower_case,
            "remove_space": remove_space,
            "end_token": self.end_token,
            "gmask_token": self.gmask_token,
            "num_image_tokens": num_image_tokens,
        }
        if eop_token is not None:
            self.eop_token = stored["eop_token"] = eop_token
        self.init_kwargs.update(stored)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["native"] = None  # the SentencePiece model is read again where the tokenizer is unpickled
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__["native"] = Tokenizer.from_file(self.vocab_file, image_tokens=self.num_image_tokens)

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        """Ids that have a piece, image tokens of the pre-slim era included."""
        return self.native.vocab_size

    @property
    def gmask_token_id(self) -> int:
        return self.native.piece_to_id(self.gmask_token)

    @property
    def end_token_id(self) -> int:
        return self.native.piece_to_id(self.end_token)

    @property
    def eop_token_id(self) -> int:
        """The id that ends an answer, also where `eos_token` is `</s>` (releases before 2023-04-11)."""
        return self.native.eop_id

    def get_vocab(self) -> dict[str, int]:
        """Piece → id for every id, added tokens included."""
        if not hasattr(self, "_vocab"):
            self._vocab = {self.native.id_to_piece(index): index for index in range(self.native.vocab_size)}
        return {**self._vocab, **getattr(self, "_added_tokens_encoder", {})}

    def _convert_token_to_id(self, token: str) -> int:
        found = self.native.piece_to_id(token)
        image = _IMAGE_TOKEN.fullmatch(token) if found == self.native.unk_id else None
        return int(image[1]) if image else found

    def _convert_id_to_token(self, index: int) -> str:
        """The piece of an id; "" for the embedding rows that have none."""
        return "" if index >= self.native.vocab_size or index < 0 else self.native.id_to_piece(index)

    # Text → ids

    def preprocess_text(self, text: str) -> str:
        """What `remove_space` and `do_lower_case` ask for."""
        if self.remove_space:
            text = " ".join(text.strip().split())
        return text.lower() if self.do_lower_case else text

    def tokenize(self, text: str, pair: str | None = None, **kwargs: Any) -> list[str]:
        """Pieces of a text. Registered special strings are taken out, with the blanks beside them."""
        if pair is not None:
            return self.tokenize(text, **kwargs) + self.tokenize(pair, **kwargs)
        if kwargs.get("split_special_tokens", getattr(self, "split_special_tokens", False)):
            return self._tokenize(text)
        special = frozenset(self.all_special_tokens)
        parts = _splitter(special | frozenset(self.get_added_vocab())).split(text)  # text, string, text, string, text
        tokens: list[str] = []
        for place, part in enumerate(parts):
            if place % 2:
                tokens.append(part)
                continue
            if place > 0 and parts[place - 1] in special:
                part = part.lstrip()
            if place + 1 < len(parts) and parts[place + 1] in special:
                part = part.rstrip()
            tokens += self._tokenize(part) if part else []
        return tokens

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.native.encode_as_pieces(self.preprocess_text(text))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`A [gMASK] <sop>`, or `A [gMASK] <sop> B <eop>` for a pair.

        A tokenizer whose eos is `</s>` (before 2023-04-11) adds `[gMASK]` only to a text without a mask, and `</s>`
        behind a text that does not end in one, as that release did.
        """
        native = self.native
        ids = list(token_ids_0)
        if self.eos_token_id == native.eop_id:
            ids += [native.gmask_id, native.sop_id]
        else:
            masks = (native.mask_id, native.gmask_id)
            if not any(mask in ids for mask in masks):
                ids.append(native.gmask_id)
            ids += [native.sop_id] if ids[-1] in masks else [self.eos_token_id, native.sop_id]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, native.eop_id]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return 3 if pair else 2

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for the ids that `build_inputs_with_special_tokens` adds (or that are special), else 0."""
        if already_has_special_tokens:
            return [int(self.native.is_special(index)) for index in token_ids_0]
        added = len(self.build_inputs_with_special_tokens(token_ids_0)) - len(token_ids_0)
        mask = [0] * len(token_ids_0) + [1] * added
        return mask if token_ids_1 is None else [*mask, *([0] * len(token_ids_1)), 1]

    # Ids → text

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces; image tokens and ids without a piece give nothing."""
        return self.native.decode_pieces(token for token in tokens if token and not _IMAGE_TOKEN.fullmatch(token))

    def _decode(
        self,
        token_ids: int | Iterable[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, (int, np.integer)) else [int(index) for index in token_ids]
        skipped = {self.pad_token_id, *(self.all_special_ids if skip_special_tokens else ())}
        added = self.added_tokens_decoder
        tokens = [
            str(added[index]) if index in added else self._convert_id_to_token(index)
            for index in ids
            if index not in skipped
        ]
        text = self.convert_tokens_to_string(tokens) if tokens else ""
        tidy = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return tidy_blanks(text) if tidy else text

    # Batches

    def _pad(
        self,
        encoded_inputs: Any,
        max_length: int | None = None,
        padding_strategy: Any = "do_not_pad",
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Left padding of one example, with the mask and positions of its unpadded ids.

        Adds `attention_mask`, bool [1, total, total] with True = blocked, and `position_ids`, int64 [2, total].
        """
        side = padding_side or self.padding_side
        if side != "left":
            raise ValueError(f"padding_side is {side!r}; the model continues the last token, so padding stands left")
        strategy = str(getattr(padding_strategy, "value", padding_strategy))
        ids = encoded_inputs["input_ids"]
        total = len(ids) if strategy == "longest" else max_length
        if total is None:
            return encoded_inputs  # not padded and not cut: only ids, as in the original
        if pad_to_multiple_of:
            total = -(-total // pad_to_multiple_of) * pad_to_multiple_of
        add_mask_and_positions(encoded_inputs, self.native, with_mask=return_attention_mask is not False)
        if strategy != "do_not_pad" and total > len(ids):
            pad_left(encoded_inputs, total - len(ids), pad_id=self.pad_token_id)
        return encoded_inputs

    # Files

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy `ice_text.model` as it is into a folder."""
        name = f"{filename_prefix}-{TOKENIZER_FILE}" if filename_prefix else TOKENIZER_FILE
        target = Path(save_directory) / name
        if not target.exists() or not target.samefile(self.vocab_file):
            beside = target.with_name(f".{name}.part")
            shutil.copyfile(self.vocab_file, beside)
            beside.replace(target)
        return (str(target),)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoTokenizer") -> None:
        """Nothing: this class is found by name, and its source is not copied beside saved tokenizers."""


def _take_named_tokens(kwargs: dict[str, Any]) -> dict[str, str]:
    """Take the names that only this tokenizer knows out of what the base class would register as special tokens.

    Releases of transformers from 5.0 on collect every unknown `*_token` key, under one of two names.
    """
    found: dict[str, str] = {}
    for place in (kwargs, kwargs.get("model_specific_special_tokens"), kwargs.get("extra_special_tokens")):
        if isinstance(place, dict):
            found |= {name: str(place.pop(name)) for name in ("end_token", "gmask_token", "eop_token") if name in place}
    return found


_TIDIED = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")),
)


def tidy_blanks(text: str) -> str:
    """Remove the blank before `. ? ! ,` and English contractions, in the order transformers 4.27 did."""
    for found, tidied in _TIDIED:
        text = text.replace(found, tidied)
    return text


@lru_cache(maxsize=64)
def _splitter(strings: frozenset[str]) -> re.Pattern[str]:
    """Splits at any of the strings and keeps them; the longest where several begin at one place."""
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile("(" + "|".join(re.escape(string) for string in longest_first if string) + ")")
