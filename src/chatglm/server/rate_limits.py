"""Rates a key: a moving window of requests, and a budget of tokens that refills. Held in this process."""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from .api_errors import APIError
from .settings import Rate

MAX_OWNERS = 100_000


@dataclass
class _Usage:
    times: deque[float] = field(default_factory=deque)
    tokens: float = 0.0
    since: float = 0.0


class RateLimits:
    """Used by the loop's thread only. Times are of the monotonic clock."""

    def __init__(self, requests: Rate | None, tokens: Rate | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.requests = requests
        self.tokens = tokens
        self._clock = clock
        self._usage: OrderedDict[str, _Usage] = OrderedDict()

    def admit(self, owner: str) -> dict[str, str]:
        """Count a request; headers for its answer. Raises APIError 429."""
        if self.requests is None and self.tokens is None:
            return {}
        usage, now = self._get(owner), self._clock()
        wait = 0.0
        if self.requests is not None and len(usage.times) >= self.requests.count:
            wait = usage.times[0] + self.requests.period_s - now
        if self.tokens is not None and usage.tokens >= self.tokens.count:
            wait = max(wait, (usage.tokens - self.tokens.count + 1) * self.tokens.period_s / self.tokens.count)
        if wait > 0:
            which = "requests" if self.requests and len(usage.times) >= self.requests.count else "tokens"
            rate = self.requests if which == "requests" else self.tokens
            assert rate is not None
            raise APIError(
                429,
                "rate_limit_exceeded",
                f"more than {rate.count:,} {which} in {rate.period_s} s; try again in {math.ceil(wait)} s",
                headers={"Retry-After": str(max(1, math.ceil(wait))), **self.headers(owner)},
            )
        usage.times.append(now)
        return self.headers(owner)

    def charge(self, owner: str, tokens: int) -> None:
        """Tokens that a request cost."""
        if self.tokens is not None:
            self._get(owner).tokens += tokens

    def headers(self, owner: str) -> dict[str, str]:
        """What is left, as OpenAI names it."""
        usage, now = self._get(owner), self._clock()
        found: dict[str, str] = {}
        if self.requests is not None:
            reset = max(0.0, usage.times[0] + self.requests.period_s - now) if usage.times else 0.0
            found |= _headers("requests", self.requests.count, self.requests.count - len(usage.times), reset)
        if self.tokens is not None:
            left = self.tokens.count - usage.tokens
            reset = usage.tokens * self.tokens.period_s / self.tokens.count
            found |= _headers("tokens", self.tokens.count, max(0, int(left)), reset)
        return found

    def _get(self, owner: str) -> _Usage:
        now = self._clock()
        usage = self._usage.setdefault(owner, _Usage(since=now))
        self._usage.move_to_end(owner)
        if self.requests is not None:
            while usage.times and usage.times[0] + self.requests.period_s <= now:
                usage.times.popleft()
        if self.tokens is not None:
            usage.tokens = max(0.0, usage.tokens - (now - usage.since) * self.tokens.count / self.tokens.period_s)
            usage.since = now
        if len(self._usage) > MAX_OWNERS:
            self._usage.popitem(last=False)
        return usage


def _headers(what: str, limit: int, left: int, reset: float) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{what}": str(limit),
        f"x-ratelimit-remaining-{what}": str(left),
        f"x-ratelimit-reset-{what}": f"{reset:.0f}s",
    }
