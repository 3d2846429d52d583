"""One answer for the page: the checks, limits and submission of the API's chat route, without HTTP in between."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ...tokenizer.template import default_max_new_tokens
from ..api_errors import APIError
from ..backend import Backend, Owner
from ..conversation import read_messages
from ..exchange import Exchange, error_of
from ..feedback.prompt_hash import hash_ids
from ..fitting import fit_conversation
from ..sampling import check_limits, sampling_params, shared_choices
from ..schemas import ChatBody
from ..validation import check_body
from .talk import Variant

SHOWN_EVERY_S = 0.08
"""A page shows news so often; each time costs a diff of the text."""


@dataclass
class LiveAnswers:
    """Exchanges by page session, so that a stop button or a page that has gone ends them within one step."""

    exchanges: dict[str, set[Exchange]] = field(default_factory=dict)
    busy: set[str] = field(default_factory=set)
    """Sessions whose conversation is being changed by an event: another one that would change it is refused."""

    @contextmanager
    def working(self, session: str) -> Iterator[None]:
        """While an event that takes its time has this session's conversation."""
        self.busy.add(session)
        try:
            yield
        finally:
            self.busy.discard(session)

    def add(self, session: str, exchange: Exchange) -> None:
        self.exchanges.setdefault(session, set()).add(exchange)

    def discard(self, session: str, exchange: Exchange) -> None:
        alive = self.exchanges.get(session, set())
        alive.discard(exchange)
        if not alive:
            self.exchanges.pop(session, None)

    def cancel(self, session: str) -> None:
        """Whatever this session is being answered."""
        for exchange in self.exchanges.get(session, ()):
            exchange.cancel()


async def answer(
    backend: Backend,
    live: LiveAnswers,
    owner: Owner,
    session: str,
    model: str,
    messages: list[dict[str, str]],
    settings: dict[str, Any],
) -> AsyncIterator[Variant]:
    """The answer so far, again and again until it is whole. A stopped one ends with finish `cancelled`.

    model: as the API names it, the base or `base:adapter`. Raises APIError, as the API would answer.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    body = check_body(ChatBody, {"model": model, "messages": messages, **given})
    adapter = backend.check_model(model)
    try:
        backend.rates.admit(owner.bucket)
    except APIError:
        backend.metrics.count(backend.metrics.rate_limited)
        raise
    answer_tokens = body.answer_tokens or default_max_new_tokens(backend.context)
    check_limits(body, backend, answer_tokens)
    fitted = await fit_conversation(backend, read_messages(body.messages), answer_tokens, may_drop=True)
    exchange = backend.submit(
        owner,
        fitted.ids,
        sampling_params(body),
        max_new=answer_tokens,
        n=1,
        seed=body.seed,
        shared=shared_choices(body, backend.tokenizer, normalize=True),
        adapter=adapter,
    )
    stream = exchange.group.streams[0]
    found = Variant(
        request_id=exchange.group.id,
        model=model,
        fingerprint=backend.fingerprint,
        prompt_hash=hash_ids(fitted.ids),
        prompt_tokens=len(fitted.ids),
        dropped_rounds=fitted.dropped_rounds,
        created_at=time.time_ns() // 1_000_000,
        sampling={"max_tokens": answer_tokens, **given, "seed": stream.seed},
    )
    began = time.monotonic()
    live.add(session, exchange)
    try:
        shown = 0.0
        while not exchange.is_over:
            for news in await exchange.next():
                if news.finish not in (None, "stop", "length", "cancelled"):
                    raise error_of(news)
                found.text += news.text
                found.finish = news.finish or ""
            now = time.monotonic()
            found.completion_tokens = stream.num_sampled
            found.latency_ms = round((now - began) * 1000)
            found.tokens_per_s = rate(stream.num_sampled, now - (exchange.group.first_token or now))
            if exchange.is_over or now - shown >= SHOWN_EVERY_S:
                shown = now
                yield found
    finally:
        live.discard(session, exchange)
        backend.release(owner, exchange)


def rate(tokens: int, seconds: float) -> float:
    """Tokens a second after the first one; 0 before there is anything to measure."""
    return round((tokens - 1) / seconds, 1) if tokens > 1 and seconds > 0 else 0.0


def no_owner() -> APIError:
    """An event that did not come through the server's border."""
    return APIError(401, "invalid_api_key", "this request did not pass the server's border")
