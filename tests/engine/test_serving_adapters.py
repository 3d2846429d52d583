"""Adapters in the serving engine: any mixture of requests gives each the tokens that it would get alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapter_folders import low_rank_folder, prefix_folder
from chatglm.checkpoint.adapter import open_adapter
from chatglm.engine.adapters import with_adapter
from chatglm.engine.kv_cache import BLOCK_SIZE, KVCache
from chatglm.engine.row_runner import RowRunner
from chatglm.engine.runner import Runner
from chatglm.engine.sampling import SamplingParams
from chatglm.engine.serving import ServingEngine
from chatglm.engine.serving_sampler import ServingSampler
from chatglm.engine.serving_state import EngineLimits
from chatglm.engine.stream import Choices, Group, Stream
from chatglm.errors import RequestError

NAMES = (None, "one", "two", "tuned")


class Words:
    """In place of AnswerText: the golden model has no tokenizer."""

    is_stopped = False

    def push(self, token: int) -> str:
        return f"{token} "

    def finish(self) -> str:
        return ""


@pytest.fixture(scope="module")
def folders(base: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("served")
    return {
        "one": low_rank_folder(where / "one", base.config, seed=1, size=0.5),
        "two": low_rank_folder(where / "two", base.config, seed=2, size=0.5),
        "tuned": prefix_folder(where / "tuned", base.config, length=BLOCK_SIZE + 3, size=2.0),
    }


def engine_of(base: Any, folders: dict[str, Path], blocks: int = 64, **limits: Any) -> ServingEngine:
    cache = KVCache(base.config, blocks * BLOCK_SIZE, base.dtype, base.device)
    twins = {name: with_adapter(base, open_adapter(folder)) for name, folder in folders.items()}
    runners = {name: (Runner if twin.config.pre_seq_len else RowRunner)(twin, cache) for name, twin in twins.items()}
    settings = EngineLimits(
        max_running=8, decode_rows=4, prefill_budget=20, queue_timeout_s=1e9, request_timeout_s=1e9, **limits
    )
    sampler = ServingSampler(None, base.config.eos_token_id)
    return ServingEngine(RowRunner(base, cache), sampler, settings, clock=lambda: 0.0, adapters=runners)


def group_of(base: Any, number: int, adapter: str | None, length: int, max_new: int = 6, n: int = 1) -> Group:
    config = base.config
    context = [5 + (length * 7 + i) % 180 for i in range(length)] + [config.gmask_token_id]
    streams = []
    for choice in range(n):
        params = SamplingParams(temperature=0, seed=number)
        stream = Stream(context, config.bos_token_id, length, True, max_new, params)
        stream.choice, stream.text, stream.shared = choice, Words(), Choices(ignore_eos=True)  # type: ignore[assignment]
        streams.append(stream)
    return Group(f"g{number}", f"key{number % 3}", streams, float(number), adapter)


def run(engine: ServingEngine, groups: list[Group]) -> list[list[int]]:
    for group in groups:
        engine.check(group)
        engine.submit(group)
    while engine.has_work:
        engine.step()
    return [stream.generated_ids for group in groups for stream in group.streams]


def alone(base: Any, folders: dict[str, Path], *shape: Any) -> list[list[int]]:
    return run(engine_of(base, folders, context_cache_s=0), [group_of(base, *shape)])


@pytest.mark.parametrize("blocks", [64, 12])
@pytest.mark.parametrize("preempt", ["recompute", "swap"])
def test_requests_of_several_adapters_get_their_solo_tokens(
    base: Any, folders: dict[str, Path], blocks: int, preempt: str
) -> None:
    shapes = [(number, NAMES[number % 4], 5 + 3 * number, 4 + number, 1 + number % 2) for number in range(8)]
    engine = engine_of(base, folders, blocks, context_cache_s=0, preempt=preempt)
    found = run(engine, [group_of(base, *shape) for shape in shapes])
    assert found == [tokens for shape in shapes for tokens in alone(base, folders, *shape)]
    assert engine.pool.num_used == 0
    assert blocks == 64 or engine.counters.preemptions > 0


def test_the_same_context_under_another_adapter_is_another_context(base: Any, folders: dict[str, Path]) -> None:
    engine = engine_of(base, folders, context_cache_s=1e9)
    first = [run(engine, [group_of(base, number, name, 9)]) for number, name in enumerate(NAMES)]
    assert engine.counters.context_hits == 0
    assert len({str(tokens) for tokens in first}) == len(NAMES)
    again = [run(engine, [group_of(base, 30 + number, name, 9)]) for number, name in enumerate(NAMES)]
    assert engine.counters.context_hits == len(NAMES)
    assert again == first


def test_a_step_holds_streams_of_one_adapter_and_every_adapter_has_its_turn(
    base: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(base, folders, context_cache_s=0)
    seen: list[set[str | None]] = []
    for runner in engine.runners.values():
        plain = runner.decode

        def decode(batch: list[Any], plain: Any = plain) -> Any:
            seen.append({engine._owners[stream].adapter for stream in batch})
            return plain(batch)

        monkeypatch.setattr(runner, "decode", decode)
    run(engine, [group_of(base, number, NAMES[number % 4], 5) for number in range(8)])
    assert all(len(adapters) == 1 for adapters in seen)
    assert set().union(*seen[-8:]) == set(NAMES)


def test_an_unknown_adapter_is_refused_before_anything_is_computed(base: Any, folders: dict[str, Path]) -> None:
    with pytest.raises(RequestError, match="no adapter 'three'"):
        engine_of(base, folders).check(group_of(base, 0, "three", 5))


def test_a_prefix_counts_in_what_a_request_needs(base: Any, folders: dict[str, Path]) -> None:
    engine = engine_of(base, folders, blocks=3)
    engine.check(group_of(base, 0, None, 20))
    with pytest.raises(RequestError, match="KV cache holds"):
        engine.check(group_of(base, 1, "tuned", 20))
