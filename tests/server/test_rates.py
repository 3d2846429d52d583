"""Rates by a clock of their own (test 34): windows move, budgets refill, keys do not touch each other."""

from __future__ import annotations

import pytest

from chatglm.server.api_errors import APIError
from chatglm.server.rate_limits import RateLimits
from chatglm.server.settings import Rate


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def refusal(rates: RateLimits, owner: str) -> APIError:
    with pytest.raises(APIError) as caught:
        rates.admit(owner)
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    return caught.value


def test_a_window_of_requests_moves_and_other_keys_have_their_own():
    clock = Clock()
    rates = RateLimits(Rate(2, 60), None, clock)
    assert rates.admit("ann")["x-ratelimit-remaining-requests"] == "1"
    clock.now += 20
    rates.admit("ann")
    error = refusal(rates, "ann")
    assert error.headers["Retry-After"] == "40" and error.headers["x-ratelimit-remaining-requests"] == "0"
    rates.admit("bob")
    clock.now += 39
    refusal(rates, "ann")
    clock.now += 1  # the first request leaves the window, the second stays
    assert rates.admit("ann")["x-ratelimit-remaining-requests"] == "0"
    refusal(rates, "ann")
    clock.now += 60
    assert rates.admit("ann")["x-ratelimit-limit-requests"] == "2"


def test_a_budget_of_tokens_is_charged_by_use_and_refills():
    clock = Clock()
    rates = RateLimits(None, Rate(100, 50), clock)
    assert rates.admit("ann")["x-ratelimit-remaining-tokens"] == "100"
    rates.charge("ann", 120)
    error = refusal(rates, "ann")
    assert error.headers["x-ratelimit-remaining-tokens"] == "0" and 10 <= int(error.headers["Retry-After"]) <= 11
    rates.admit("bob")
    clock.now += 11
    assert rates.admit("ann")["x-ratelimit-remaining-tokens"] == "2"


def test_without_a_rate_nothing_is_counted_or_told():
    rates = RateLimits(None, None, Clock())
    assert [rates.admit("ann") for _ in range(100)] == [{}] * 100
