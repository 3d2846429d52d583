"""A serving engine short of memory: preemption by copies, passes that run out of memory, engines built again."""

from __future__ import annotations

import pytest
import torch
from test_serving import engine_of, group_of, run, solo, tokens

from chatglm.engine.graph_runner import GraphRunner, make_runner
from chatglm.engine.kv_cache import BLOCK_SIZE, KVCache
from chatglm.engine.runner import Runner
from chatglm.engine.swapping import SwappedBlocks
from chatglm.engine.warm_up import tell, warm_up
from golden_vectors import plain_model


@pytest.mark.parametrize("more", [{"preempt": "swap"}, {"deterministic": True}], ids=["swap", "deterministic"])
def test_a_request_that_was_swapped_out_comes_back_without_a_pass(base, more):
    shapes = [(20, 24, 1, 0.0)] * 6
    engine = engine_of(base, 8, **more)
    begun: list[int] = []
    begin = engine.begin_pass
    engine.begin_pass = lambda streams: begun.append(len(streams)) or begin(streams)
    groups = [group_of(base, number, *shape) for number, shape in enumerate(shapes)]
    for group in groups:
        engine.submit(group)
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.num_swapped_bytes)
    assert engine.counters.preemptions > 0 and most > 0
    assert sum(begun) == len(groups)  # each context once, whatever was preempted
    assert engine.num_swapped_bytes == 0 and engine.pool.num_used == 0
    assert [tokens(group) for group in groups] == [solo(base, n, *shape) for n, shape in enumerate(shapes)]


def test_swapped_blocks_come_back_bit_for_bit_and_are_shared_as_before(base):
    engine = engine_of(base, 32)
    group = group_of(base, 1, 20, 8, n=2)
    engine.submit(group)
    while not engine.running:
        engine.step()
    pool, streams = engine.pool, group.streams
    before = [engine.runner.cache.keys[:, stream.slots].clone() for stream in streams]
    used, cached = pool.num_used, [stream.cached for stream in streams]
    copy = SwappedBlocks.take(pool, streams)
    assert copy.num_blocks < sum(len(stream.blocks) for stream in streams)  # the shared block once
    for stream in streams:
        pool.release(stream.blocks)
    pool.cache.keys[:, BLOCK_SIZE:] = torch.nan
    pool.allocate(3)  # so that other blocks come
    blocks = pool.allocate(copy.num_blocks)
    copy.restore(pool, blocks)
    assert pool.num_used - 3 == used and [stream.cached for stream in streams] == cached
    for stream, keys in zip(streams, before, strict=True):
        found = engine.runner.cache.keys[:, stream.slots]
        assert torch.equal(found[:, : stream.cached], keys[:, : stream.cached])


@pytest.mark.parametrize("preempt", ["recompute", "swap"])
def test_a_request_that_needs_the_whole_pool_comes_back_after_its_preemption(base, preempt):
    engine = engine_of(base, 6, preempt=preempt)
    older, large = group_of(base, 0, 4, 40), group_of(base, 1, 30, 16, 2)  # 6 blocks where nothing is shared
    engine.check(large)
    engine.submit(older)
    for _ in range(20):
        engine.step()
    engine.submit(large)
    for _ in range(500):
        engine.step()
    assert engine.counters.preemptions > 0 and not engine.has_work
    assert tokens(large) == solo(base, 1, 30, 16, 2, 0.0)


def out_of_memory(engine, number: int, times: int) -> None:
    """First passes of one group's context run out of memory."""
    begin = engine.begin_pass
    left = [times]

    def failing(streams):
        if left[0] and any(engine._owners[stream].id == f"g{number}" for stream in streams):
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return begin(streams)

    engine.begin_pass = failing


def endings(engine) -> dict[str, tuple[str | None, str | None]]:
    found = {}
    while engine.has_work:
        for event in engine.step():
            if event.finish is not None:
                found[event.group.id] = event.finish, event.code
    return found


@pytest.mark.parametrize(("times", "ending"), [(1, ("length", None)), (2, ("error", "overloaded"))])
def test_a_pass_without_memory_is_tried_alone_once_and_others_live(base, times, ending):
    engine = engine_of(base, 64, budget=10_000)
    out_of_memory(engine, 1, times)
    groups = [group_of(base, number, 12, 6) for number in range(3)]
    for group in groups:
        engine.submit(group)
    found = endings(engine)
    assert found["g1"] == ending and found["g0"] == found["g2"] == ("length", None)
    assert engine.counters.out_of_memory == times and engine.pool.num_used == 0
    for number in (0, 2) if times == 2 else (0, 1, 2):
        assert tokens(groups[number]) == solo(base, number, 12, 6, 1, 0.0)


def test_another_error_of_a_pass_is_not_taken_for_want_of_memory(base):
    engine = engine_of(base, 64)

    def broken(streams):
        raise RuntimeError("shapes differ")

    engine.begin_pass = broken
    engine.submit(group_of(base, 0, 12, 6))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(engine)


def test_the_warm_up_finds_a_budget_and_that_rows_do_not_depend_on_the_batch(base, caplog):
    engine = engine_of(base, 64)
    found = warm_up(engine.runner, 16, 64)
    layers = base.config.num_layers
    assert found.is_invariant and 32 * layers <= found.prefill_budget <= 512 * layers
    tell(found, engine.runner, deterministic=False)
    assert not caplog.records
    engine.submit(group_of(base, 3, 20, 8))  # and nothing that it wrote is read
    run(engine)


def test_a_machine_whose_rows_depend_on_the_batch_is_told(base, caplog, monkeypatch):
    engine = engine_of(base, 64)
    step = engine.runner.step
    monkeypatch.setattr(engine.runner, "step", lambda ids, tables, owners: step(ids, tables, owners) + len(tables))
    found = warm_up(engine.runner, 16, 64)
    assert not found.is_invariant
    tell(found, engine.runner, deterministic=False)
    assert "size of its batch" in caplog.text


@pytest.mark.parametrize("name", ["ptuning", "ptuning-projection", "oned-fp32", "base-fp16"])
def test_every_kind_of_model_warms_up_alone_and_with_steps_of_one_shape(name):
    model = plain_model(name)
    for least_rows in (1, 8):
        runner = make_runner(model, KVCache(model.config, 40 * BLOCK_SIZE, model.dtype, model.device))
        runner.least_rows, runner.least_length = least_rows, 64
        found = warm_up(runner, 8, 16)
        assert found.is_invariant or least_rows == 1


@pytest.mark.parametrize(
    "kind", [Runner, lambda model, cache: GraphRunner(model, cache, "torch")], ids=["plain", "buckets"]
)
def test_steps_of_one_shape_give_the_same_bits_whoever_else_runs(base, kind):
    def decoded(lengths: list[int], least_rows: int) -> torch.Tensor:
        cache = KVCache(base.config, 40 * BLOCK_SIZE, base.dtype, base.device)
        cache.keys.zero_(), cache.values.zero_()
        runner = kind(base, cache)
        runner.least_rows, runner.least_length = least_rows, 64
        streams = [group_of(base, number, length, 8).streams[0] for number, length in enumerate(lengths)]
        for number, stream in enumerate(streams):
            stream.slots = list(range((1 + 4 * number) * BLOCK_SIZE, (5 + 4 * number) * BLOCK_SIZE))
            runner.prefill([stream])
            stream.generated_ids = [7]
        return runner.decode(streams)[0]

    alone = decoded([20], 8)
    assert torch.equal(alone, decoded([20, 3, 30, 11], 8)) and alone.isfinite().all()
    assert torch.allclose(alone, decoded([20], 1), atol=1e-4)
