"""The serving engine: any schedule of joins, cancels and preemptions gives each request its solo tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatglm.engine.kv_cache import BLOCK_SIZE, KVCache
from chatglm.engine.row_runner import RowRunner
from chatglm.engine.sampling import SamplingParams
from chatglm.engine.serving import ServingEngine
from chatglm.engine.serving_sampler import ServingSampler
from chatglm.engine.serving_state import EngineLimits
from chatglm.engine.stream import Choices, Group, Stream
from chatglm.errors import RequestError


class Words:
    """In place of AnswerText: the golden model has no tokenizer."""

    is_stopped = False

    def push(self, token: int) -> str:
        return f"{token} "

    def finish(self) -> str:
        return ""


def group_of(base, number: int, length: int, max_new: int, n: int = 1, temperature: float = 0.0) -> Group:
    config = base.config
    context = [5 + (number * 7 + i) % 180 for i in range(length)] + [config.gmask_token_id]
    params = SamplingParams(temperature=temperature, top_k=0, seed=number)
    streams = []
    for choice in range(n):
        stream = Stream(context, config.bos_token_id, length, True, max_new, params)
        stream.choice, stream.text, stream.shared = choice, Words(), Choices(ignore_eos=True)  # type: ignore[assignment]
        streams.append(stream)
    return Group(f"g{number}", f"key{number % 3}", streams, float(number))


def engine_of(base, blocks: int, rows: int = 4, budget: int = 20, cache_s: float = 0.0, **more) -> ServingEngine:
    cache = KVCache(base.config, blocks * BLOCK_SIZE, base.dtype, base.device)
    cache.keys[:, BLOCK_SIZE:] = torch.nan  # reading a slot that nobody wrote shows
    cache.values[:, BLOCK_SIZE:] = torch.nan
    limits = EngineLimits(
        max_running=8, decode_rows=rows, prefill_budget=budget, context_cache_s=cache_s,
        queue_timeout_s=1e9, request_timeout_s=1e9, **more,
    )  # fmt: skip
    return ServingEngine(
        RowRunner(base, cache), ServingSampler(None, base.config.eos_token_id), limits, clock=lambda: 0.0
    )


def tokens(group: Group) -> list[list[int]]:
    return [stream.generated_ids for stream in group.streams]


def run(engine: ServingEngine) -> None:
    while engine.has_work:
        engine.step()


def solo(base, *shape) -> list[list[int]]:
    engine, group = engine_of(base, 64), group_of(base, *shape)
    engine.submit(group)
    run(engine)
    return tokens(group)


SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 24), st.integers(1, 3), st.sampled_from([0.0, 1.5]))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=8),
    waits=st.lists(st.integers(0, 5), min_size=8, max_size=8),
    cancelled=st.sets(st.integers(0, 7), max_size=2),
    blocks=st.integers(15, 40),
    rows=st.integers(1, 8),
    preempt=st.sampled_from(["recompute", "swap"]),
    early=st.booleans(),
)
def test_every_schedule_gives_solo_tokens_and_returns_all_blocks(
    base, shapes, waits, cancelled, blocks, rows, preempt, early
):
    engine = engine_of(base, blocks, rows, preempt=preempt)
    engine.launches_early = early
    groups = [group_of(base, number, *shape) for number, shape in enumerate(shapes)]
    accepted = []
    endings: dict[Stream, int] = {}

    def step() -> None:
        for event in engine.step():
            if event.finish is not None:
                endings[event.stream] = endings.get(event.stream, 0) + 1
        held = sum(len(set(stream.blocks)) for group in engine.groups.values() for stream in group.streams)
        spare = sum(len(group.spare) for group in engine.groups.values())
        assert engine.pool.num_used <= min(held + spare, blocks)

    for group, wait in zip(groups, waits, strict=False):
        try:
            engine.check(group)
        except RequestError:
            continue
        engine.submit(group)
        accepted.append(group)
        for _ in range(wait):
            step()
    gone = [group for number, group in enumerate(groups) if number in cancelled and group in accepted]
    for group in gone:
        engine.cancel(group.id)
    before = [tokens(group) for group in gone]
    while engine.has_work:
        step()
    for event in engine.take_events():
        if event.finish is not None:
            endings[event.stream] = endings.get(event.stream, 0) + 1
    assert [tokens(group) for group in gone] == before  # not one token after the cancel
    assert endings.keys() == {stream for group in accepted for stream in group.streams}
    assert engine.pool.num_used == 0 and not engine.running and not engine.pending and not len(engine.waiting)
    assert set(endings.values()) <= {1}
    for number, group in enumerate(groups):
        if group in accepted and group not in gone:
            assert tokens(group) == solo(base, number, *shapes[number])


@pytest.mark.parametrize("early", [False, True])
def test_preemption_happens_and_changes_nothing(base, early):
    shapes = [(20, 24, 1, 0.0)] * 6
    engine = engine_of(base, 8)
    engine.launches_early = early
    groups = [group_of(base, number, *shape) for number, shape in enumerate(shapes)]
    for group in groups:
        engine.submit(group)
    run(engine)
    assert engine.counters.preemptions > 0
    assert [tokens(group) for group in groups] == [solo(base, n, *shape) for n, shape in enumerate(shapes)]


def test_the_next_step_has_begun_before_tokens_are_told(base):
    engine, group = engine_of(base, 16), group_of(base, 0, 5, 6)
    engine.launches_early = True
    engine.submit(group)
    decoded: list[int] = []
    decode = engine.runner.decode
    engine.runner.decode = lambda streams: decoded.append(len(group.streams[0].generated_ids)) or decode(streams)
    told = 0
    while engine.has_work:
        told += sum(bool(event.text) for event in engine.step())
        if 1 < told < 5:
            assert decoded[-1] == told  # the step that is fed the newest token is under way
    assert decoded == [1, 2, 3, 4, 5] and tokens(group) == solo(base, 0, 5, 6)


def test_what_ends_while_a_step_is_under_way_takes_no_token_of_it(base):
    engine, group, other = engine_of(base, 16), group_of(base, 0, 5, 20), group_of(base, 1, 5, 8)
    engine.launches_early = True
    for each in (group, other):
        engine.submit(each)
    while len(group.streams[0].generated_ids) < 3:
        engine.step()
    engine.cancel(group.id)
    before = tokens(group)
    run(engine)
    assert tokens(group) == before and tokens(other) == solo(base, 1, 5, 8) and engine.pool.num_used == 0


@pytest.mark.parametrize("n", [1, 3])
def test_choices_that_end_in_one_step_are_all_told(base, n):
    engine, group = engine_of(base, 16), group_of(base, 0, 5, 1, n=n)
    engine.submit(group)
    ends = [event.stream for _ in range(3) for event in engine.step() if event.finish == "length"]
    assert ends == group.streams and not engine.has_work


def test_a_paused_first_pass_equals_one_that_is_not(base):
    found = []
    for budget in (1, 10_000):
        engine, group = engine_of(base, 64, budget=budget), group_of(base, 3, 37, 8)
        engine.submit(group)
        run(engine)
        found.append(tokens(group))
    assert found[0] == found[1]


def test_a_repeat_of_a_context_needs_no_pass_and_other_keys_never_share(base):
    engine = engine_of(base, 64, cache_s=60)
    for number, key in enumerate(("a", "a", "b")):
        group = group_of(base, 0, 20, 5)
        group.id, group.key = f"r{number}", key
        engine.submit(group)
        run(engine)
        assert group.cached_tokens == (22 if number == 1 else 0)
        assert tokens(group) == solo(base, 0, 20, 5)
    engine.contexts.clear()
    assert engine.pool.num_used == 0


def test_a_short_prompt_overtakes_a_long_one_at_a_slice(base):
    engine = engine_of(base, 64, budget=1)
    long, short = group_of(base, 0, 40, 4), group_of(base, 1, 2, 4)
    engine.submit(long)
    engine.step()
    engine.submit(short)
    first = next(event.group for _ in range(100) for event in engine.step())
    assert first is short
    run(engine)
    assert tokens(long) == solo(base, 0, 40, 4)


def test_a_key_with_many_requests_does_not_delay_another_key(base):
    engine = engine_of(base, 64)
    crowd = [group_of(base, 3 * number, 10, 8) for number in range(20)]  # all of one key
    for group in crowd:
        engine.submit(group)
    for _ in range(30):
        engine.step()
    other = group_of(base, 1, 10, 2)
    engine.submit(other)
    while other.state == "waiting":
        engine.step()
    assert sum(group.state == "waiting" for group in crowd) > 0


def test_what_can_never_fit_is_refused_with_the_numbers(base):
    with pytest.raises(RequestError, match="the KV cache holds 128"):
        engine_of(base, 8).check(group_of(base, 0, 40, 200))
