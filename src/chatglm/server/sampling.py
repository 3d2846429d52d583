"""From the fields of a body to the engine's settings."""

from __future__ import annotations

from ..engine.sampling import SamplingParams
from ..engine.stream import Choices
from ..tokenizer import Tokenizer
from .api_errors import APIError
from .backend import Backend
from .schemas import ChatBody, CompletionBody, Sampling


def sampling_params(body: Sampling) -> SamplingParams:
    """What each choice samples by. The seed goes with the request, as it may be negative."""
    return SamplingParams(
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        no_repeat_ngram_size=body.no_repeat_ngram_size,
        stop=body.stop or (),
        min_new_tokens=body.min_tokens,
    )


def shared_choices(body: Sampling, tokenizer: Tokenizer, *, normalize: bool) -> Choices:
    """What a request's choices have in common. Raises APIError for ids that may not be biased."""
    logprobs: int | None = None
    if isinstance(body, ChatBody) and body.logprobs:
        logprobs = body.top_logprobs or 0
    elif isinstance(body, CompletionBody):
        logprobs = body.logprobs
    return Choices(
        logit_bias=read_bias(body.logit_bias, tokenizer),
        logprobs=logprobs,
        ignore_eos=body.ignore_eos,
        penalize_repetition=body.repetition_penalty,
        normalize=normalize,
    )


def read_bias(given: dict[str, float], tokenizer: Tokenizer) -> dict[int, float]:
    """Biases by id. Special ids other than the end are refused."""
    found: dict[int, float] = {}
    for key, bias in given.items():
        token = int(key[:12])
        if tokenizer.has_no_piece(token):
            raise APIError(
                400,
                "invalid_value",
                f"`logit_bias` has the id {key[:32]}; ids are {tokenizer.offset} to {tokenizer.vocab_size - 1}",
                param="logit_bias",
            )
        if tokenizer.is_special(token) and token != tokenizer.eop_id:
            name = tokenizer.id_to_piece(token)
            raise APIError(400, "invalid_value", f"`logit_bias` has the special id {key} ({name})", param="logit_bias")
        found[token] = bias
    return found


def check_limits(body: Sampling, backend: Backend, answer_tokens: int) -> None:
    """Raises APIError for numbers beyond this model and server."""
    most = backend.context - 1
    if answer_tokens > most:
        raise APIError(
            400,
            "invalid_value",
            f"`max_tokens` is {answer_tokens:,}; it must be from 1 to {most:,} (the context is {backend.context:,})",
            param="max_tokens",
        )
    if body.n > backend.settings.max_running:
        raise APIError(
            400, "invalid_value", f"`n` is {body.n}; this server runs {backend.settings.max_running} at once", param="n"
        )
    if body.min_tokens > answer_tokens:
        raise APIError(
            400,
            "invalid_value",
            f"`min_tokens` is {body.min_tokens}, more than max_tokens ({answer_tokens})",
            param="min_tokens",
        )
