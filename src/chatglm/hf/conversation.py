"""`chat` and `stream_chat` under the original's signatures.

The question and history are encoded by the package's own tokenizer, so nothing in them becomes a special id; the answer
is decoded by the compatible one, as the original did. Source: spec/chatglm-6b.md §5.7, §5.8, §7.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.utils import logging

from ..config import ModelConfig
from ..errors import RequestError
from ..tokenizer import Tokenizer, normalize_answer, template

logger = logging.get_logger("transformers.chatglm")

History = Sequence[tuple[str, str]]

TOP_K = 50
"""In force in every call of the original, which never named it: the default of its transformers (spec §13.9)."""

_REPLACEMENT = "\ufffd"


class OnlyPieces(LogitsProcessor):
    """Bars the embedding rows that belong to no piece of the tokenizer."""

    def __init__(self, first: int, beyond: int) -> None:
        self.first, self.beyond = first, beyond

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.beyond :] = -torch.inf
        scores[:, : self.first] = -torch.inf
        return scores


class Conversation:
    """Mixed into the language model, which has `generate`, `stream_generate`, `device` and `transformer.description`.

    dropped_rounds   rounds of the history that the last `chat` or `stream_chat` left out because they did not fit
    """

    dropped_rounds: int = 0
    transformer: Any
    device: torch.device
    generate: Any
    stream_generate: Any

    @torch.no_grad()
    def chat(
        self,
        tokenizer: Any,
        query: str,
        history: History | None = None,
        max_length: int = 2048,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: Any = None,
        *,
        top_k: int = TOP_K,
        **kwargs: Any,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Answer one question; returns the answer and the history with it.

        history     earlier rounds (question, answer), oldest first; the oldest are left out when the context is full
        max_length  tokens of context and answer together; never more than the model's `max_sequence_length`
        temperature 0 is greedy. `kwargs` go to `generate`.
        Raises PromptTooLongError when the question alone leaves no room, RequestError for a value out of its range.
        """
        ids, limit = self._context_ids(tokenizer, query, history, max_length, kwargs)
        sampling = _sampling(do_sample, top_p, top_k, temperature)
        outputs = self.generate(
            input_ids=ids,
            max_length=limit,
            num_beams=num_beams,
            logits_processor=self._processors(tokenizer, logits_processor),
            **sampling,
            **kwargs,
        )
        response = self.process_response(tokenizer.decode(outputs[0, ids.shape[1] :].tolist()))
        return response, [*_rounds(history), (query, response)]

    @torch.no_grad()
    def stream_chat(
        self,
        tokenizer: Any,
        query: str,
        history: History | None = None,
        max_length: int = 2048,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: Any = None,
        *,
        top_k: int = TOP_K,
        **kwargs: Any,
    ) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """The same after every token: (answer so far, history with it); the last one is what `chat` returns.

        Half a character at the end is held back until it is whole or the answer ends.
        """
        ids, limit = self._context_ids(tokenizer, query, history, max_length, kwargs)
        sampling = _sampling(do_sample, top_p, top_k, temperature)
        steps = self.stream_generate(
            input_ids=ids,
            max_length=limit,
            logits_processor=self._processors(tokenizer, logits_processor),
            **sampling,
            **kwargs,
        )
        answer: list[int] = []
        shown = None
        for outputs in steps:
            answer = outputs[0, ids.shape[1] :].tolist()
            whole = tokenizer.decode(answer)
            shown = whole.rstrip(_REPLACEMENT)
            yield self._streamed(shown, query, history)
        if shown is not None and whole != shown:
            yield self._streamed(whole, query, history)

    def _streamed(self, text: str, query: str, history: History | None) -> tuple[str, list[tuple[str, str]]]:
        response = self.process_response(text)
        return response, [*_rounds(history), (query, response)]

    @staticmethod
    def process_response(response: str) -> str:
        """The text of an answer as it is shown: edge blanks, the training-time mark, punctuation beside Chinese."""
        return normalize_answer(response)

    def _context_ids(
        self, tokenizer: Any, query: str, history: History | None, max_length: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, int | None]:
        """The fitted context, int64 [1, tokens], and the `max_length` for `generate` (None beside max_new_tokens).

        Rounds are dropped so that the answer has its room in the model's context window: `max_new_tokens`, or the usual
        512 (a quarter of a small window). A `max_length` below the window is the caller's own budget, of which at
        least one token must be left.
        """
        native = native_tokenizer(tokenizer)
        config: ModelConfig = self.transformer.description
        native.check_against(config)
        new_tokens = kwargs.get("max_new_tokens")
        limit = min(max_length, config.max_sequence_length)
        room = new_tokens
        if room is None:
            is_whole_window = limit == config.max_sequence_length
            room = template.default_max_new_tokens(limit) if is_whole_window else 1
        fitted = template.fit(native, query, _rounds(history), limit=limit, max_new_tokens=room)
        self.dropped_rounds = fitted.dropped_rounds
        if fitted.dropped_rounds:
            logger.info(f"the oldest {fitted.dropped_rounds} rounds of the history did not fit and were left out")
        ids = torch.tensor([fitted.ids], dtype=torch.int64, device=self.device)
        return ids, limit if new_tokens is None else None

    def _processors(self, tokenizer: Any, given: Any) -> LogitsProcessorList:
        """A new list: the caller's processors, which is not changed, and ours."""
        native = native_tokenizer(tokenizer)
        return LogitsProcessorList([*(given or ()), OnlyPieces(native.offset, native.vocab_size)])


def native_tokenizer(tokenizer: Any) -> Tokenizer:
    """The package's tokenizer of a ChatGLMTokenizer, or itself. Raises RequestError for another tokenizer."""
    native = getattr(tokenizer, "native", tokenizer)
    if not isinstance(native, Tokenizer):
        raise RequestError(
            f"chat needs the tokenizer of the checkpoint, not {type(tokenizer).__name__}",
            cure="tokenizer = AutoTokenizer.from_pretrained(DIR) after `import chatglm.hf`",
        )
    return native


def _rounds(history: History | None) -> list[tuple[str, str]]:
    return [(str(asked), str(answered)) for asked, answered in history or ()]


def _sampling(do_sample: bool, top_p: float, top_k: int, temperature: float) -> dict[str, Any]:
    """Sampling arguments for `generate`, which warns of any that greedy decoding would not use."""
    if not 0 < top_p <= 1:
        raise RequestError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if temperature < 0:
        raise RequestError(f"temperature is {temperature}; it must be 0 (greedy) or above")
    if top_k < 0:
        raise RequestError(f"top_k is {top_k}; it must be 0 (off) or above")
    if not do_sample or temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "top_p": top_p, "top_k": top_k, "temperature": temperature}
