"""`generate` and `stream_generate` of the transformers classes.

transformers drives the loop; here it is told where the context ends, once for every call, and each step's mask and
positions follow from that. So nothing that is generated can move the border, and a cached step has the positions of a
whole pass (spec/chatglm-6b.md §4.2, §13.5). transformers itself accepts only masks [batch, tokens] here and numbers
positions its own way, so both travel under names of ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationMixin, LogitsProcessorList
from transformers.utils import logging

from ..config import ModelConfig
from ..errors import ChatGLMError
from ..model.positions import Layout, find_layout, generation_positions
from .beams import beam_search
from .cache import ChatGLMCache, held_tokens
from .inputs import blocked_mask, left_padding, padded_blocked
from .stepwise import stepwise

logger = logging.get_logger("transformers.chatglm")

_PREPARING = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters

CACHE_KEY = "cache" if "cache" in _PREPARING else "past_key_values"
"""What this version of transformers calls the KV cache."""


if TYPE_CHECKING:
    _Mixin: Any = GenerationMixin
else:
    _Mixin = object  # transformers looks for GenerationMixin among the direct bases of the model


class ScoreGuard:
    """Scores that are not finite end their sequence instead of becoming `▁` for ever (spec/chatglm-6b.md §13.4).

    The sequence gets `<eop>`, one error naming it is logged, and the others go on. Where that cannot be said in
    transformers' terms (one sequence, all of them, beams) ChatGLMError is raised.
    """

    def __init__(self, eop_id: int, *, has_beams: bool) -> None:
        self._eop_id = eop_id
        self._has_beams = has_beams
        self._ended: set[int] = set()

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores [batch, tokens, vocab], checked at the last token."""
        is_bad = ~torch.isfinite(logits[:, -1]).all(dim=-1)
        if not bool(is_bad.any()):
            return logits
        rows = [row for row, bad in enumerate(is_bad.tolist()) if bad]
        new = sorted(set(rows) - self._ended)
        self._ended.update(rows)
        message = f"the scores of sequence {', '.join(map(str, new or rows))} are not finite (NaN or infinity)"
        if self._has_beams or len(self._ended) == len(logits):
            raise ChatGLMError(
                message,
                cure="use float32 or bfloat16 instead of float16; `chatglm verify --deep` finds damaged weights",
            )
        if new:
            logger.error(f"{message}; it ends here, the others go on")
        ended = torch.full_like(logits[:, -1:], torch.finfo(logits.dtype).min)
        ended[..., self._eop_id] = 0
        return torch.where(is_bad[:, None, None], torch.cat((torch.zeros_like(logits[:, :-1]), ended), dim=1), logits)


class Generation(_Mixin):
    """Mixed into the language model before GenerationMixin; the model has `transformer.description`."""

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Greedy, sampling, beams, batches, as in transformers; returns ids [batch, tokens], the context first.

        inputs          (or input_ids) int64 [batch, tokens]: contexts that hold a mask token and `<sop>`, padded left
        attention_mask  as for `forward`, or None: a single row has no padding, rows of a batch all `<pad>` in front
        position_ids    as for `forward`, or None
        A `max_length` that the context reaches already gives one token, as in the original.
        Raises ValueError for ids without a context, ChatGLMError for scores that are not finite.
        """
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if ids is None:
            raise ValueError("generate needs input_ids: where the context ends is found in them")
        mask, positions = kwargs.pop("attention_mask", None), kwargs.pop("position_ids", None)
        config: ModelConfig = self.transformer.description
        kwargs.update(_context(ids, mask, positions, config))
        kwargs["attention_mask"] = torch.ones_like(ids)
        _allow_one_token(kwargs, generation_config, ids.shape[1])
        beams = kwargs.get("num_beams") or (generation_config or self.generation_config).num_beams or 1
        kwargs["score_guard"] = ScoreGuard(config.eos_token_id, has_beams=beams > 1)
        return super().generate(ids, generation_config, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cache: Any = None,
        context_lengths: Tensor | None = None,
        mask_places: Tensor | None = None,
        is_gmask: Tensor | None = None,
        padding: Tensor | None = None,
        context_blocked: Tensor | None = None,
        context_positions: Tensor | None = None,
        logits_to_keep: int = 1,
        score_guard: ScoreGuard | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The inputs of one pass: all ids, or those that the cache does not hold yet. Called by transformers."""
        config: ModelConfig = self.transformer.description
        if context_lengths is None:  # a caller of its own loop
            found = _context(input_ids, attention_mask, None, config)
            context_lengths, mask_places = found["context_lengths"], found["mask_places"]
            is_gmask, padding, context_blocked = found["is_gmask"], found["padding"], found["context_blocked"]
        assert context_lengths is not None and mask_places is not None and is_gmask is not None and padding is not None
        layout = Layout(context_lengths, mask_places, is_gmask, padding)
        past = cache if cache is not None else past_key_values
        held = held_tokens(past)
        start = held - (config.pre_seq_len or 0) if held else 0
        total = input_ids.shape[1]
        return {
            "input_ids": input_ids[:, start:],
            "position_ids": _step_positions(layout, context_positions, start, total, config),
            "attention_mask": _step_blocked(layout, context_blocked, start, total),
            CACHE_KEY: past,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "score_guard": score_guard,
            **{key: kwargs[key] for key in ("output_attentions", "output_hidden_states") if key in kwargs},
        }

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """The cache for the next step; everything else follows from the layout."""
        model_kwargs[CACHE_KEY] = outputs.cache
        return model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """A cache that also reads as the original's tuple, unless another kind is asked for."""
        wants_plain = getattr(generation_config, "cache_implementation", None) in (None, "dynamic")
        if generation_config.use_cache and wants_plain and model_kwargs.get(CACHE_KEY) is None:
            model_kwargs[CACHE_KEY] = ChatGLMCache()
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    @staticmethod
    def _reorder_cache(past: Any, beam_idx: Tensor) -> Any:
        """Keep the beams `beam_idx`: the original's tuple has the batch in axis 1."""
        if hasattr(past, "reorder_cache"):
            past.reorder_cache(beam_idx)
            return past
        return tuple(tuple(part.index_select(1, beam_idx.to(part.device)) for part in pair) for pair in past)

    def _beam_search(
        self,
        input_ids: Tensor,
        beam_scorer: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        synced_gpus: bool = False,
        logits_warper: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by transformers for `num_beams` above 1, with other arguments from version to version."""
        processors = LogitsProcessorList([*logits_processor, *(logits_warper or ())])
        return beam_search(self, input_ids, processors, stopping_criteria, generation_config, model_kwargs)

    @torch.no_grad()
    def stream_generate(
        self,
        input_ids: Tensor,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        **kwargs: Any,
    ) -> Iterator[Tensor]:
        """`generate` step by step: yields all ids so far, int64 [batch, tokens], after every token, also the last.

        The ids are those of `generate` with the same arguments and seed. No beams. Closing the iterator ends it.
        """
        steps = stepwise(
            lambda streamer: self.generate(
                input_ids,
                generation_config=generation_config,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                streamer=streamer,
                **kwargs,
            ),
            input_ids.device,
        )
        ids = input_ids
        for tokens in steps:  # [batch]
            ids = torch.cat((ids, tokens.to(ids.device)[:, None]), dim=1)
            yield ids


def _context(
    ids: Tensor, mask: Tensor | None, positions: Tensor | None, config: ModelConfig
) -> dict[str, Tensor | None]:
    """Where the contexts of a batch end, as arguments that transformers passes on and repeats for beams.

    context_blocked    bool [batch, 1, tokens, tokens] where a mask was given or rows are padded
    context_positions  the positions given, where they are 2-D
    """
    if mask is None and len(ids) > 1:
        mask = (ids != config.pad_token_id).long().cumsum(dim=1).clamp(max=1)  # `<pad>` inside a context is a token
    padding = None if mask is None else left_padding(mask).to(ids.device)
    layout = find_layout(ids, config, padding)
    blocked = None
    if mask is not None and mask.dim() > 2:
        blocked = blocked_mask(mask).expand(len(ids), -1, -1, -1)
    elif mask is not None and bool((mask == 0).any()):
        blocked = padded_blocked(layout, ids.shape[1], mask.to(ids.device))
    is_2d = positions is not None and positions.dim() == 3
    return {
        "context_lengths": layout.context_lengths,
        "mask_places": layout.mask_places,
        "is_gmask": layout.is_gmask,
        "padding": layout.left_padding,
        "context_blocked": None if blocked is None else blocked.to(ids.device),
        "context_positions": positions.to(ids.device) if is_2d and positions is not None else None,
    }


def _step_positions(layout: Layout, given: Tensor | None, start: int, total: int, config: ModelConfig) -> Tensor:
    """Positions of tokens start … total - 1. Given ones stay at their last position while the block position counts."""
    if given is None or config.position_encoding != "rotary_2d":
        return generation_positions(layout, total, config, start=start)
    new = torch.arange(1, total - given.shape[-1] + 1, device=given.device)
    last = given[..., -1:]  # [batch, 2, 1]
    added = torch.stack((last[:, 0].expand(-1, len(new)), last[:, 1] + new), dim=1)  # [batch, 2, new]
    return torch.cat((given, added), dim=2)[..., start:]


def _step_blocked(layout: Layout, given: Tensor | None, start: int, total: int) -> Tensor | None:
    """The mask rows of tokens start … total - 1, [batch, 1, query, total]; None where one token may look at everything.

    A mask that was given is continued as in the original: an answer token sees what the last one of the context sees,
    the answer so far and itself.
    """
    if given is None:
        if total - start == 1:
            return None
        return padded_blocked(layout, total, None)[:, :, start:]
    context = given.shape[-1]
    blocked = functional.pad(given, (0, total - context), value=True)  # nobody in the context sees an answer
    answers = functional.pad(given[:, :, -1:], (0, total - context), value=False).expand(-1, -1, total - context, -1)
    later = torch.ones(total - context, total, dtype=torch.bool, device=given.device).triu(context + 1)
    return torch.cat((blocked, answers | later), dim=2)[:, :, start:]


def _allow_one_token(kwargs: dict[str, Any], settings: Any, tokens: int) -> None:
    """Turn a `max_length` that the context reaches into one new token; newer transformers refuse it."""
    limit = kwargs.get("max_length") or (None if settings is None else settings.max_length)
    has_room = limit is None or limit > tokens
    if has_room or kwargs.get("max_new_tokens") or getattr(settings, "max_new_tokens", None):
        return
    logger.info(f"max_length is {limit}, the context has {tokens} tokens: one token is generated")
    kwargs.pop("max_length", None)
    kwargs["max_new_tokens"] = 1
