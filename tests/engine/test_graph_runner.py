"""The runner over kernels keeps the Runner's contract: same ids, same logits, same accounting.

Here with the kernels' slow twins on a CPU, and with Triton's interpreter where Triton is installed; tests/gpu has the
captured graphs.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from test_golden_generation import CASES, answer, settings

from chatglm.engine import Engine, KVCache, Runner, Sampler, beam_search
from chatglm.engine.fast_network import FastNetwork, Unsupported
from chatglm.engine.fast_prefill import prefix_lm_attention
from chatglm.engine.graph_runner import GraphRunner, make_runner
from chatglm.kernels.gpu import operations
from chatglm.model import GLM, plain_attention
from chatglm.quantization import swap_linears
from engine_parts import GREEDY, sequence_of
from golden_vectors import assert_close, cases, plain_model

HAS_TRITON = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
if HAS_TRITON:
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = pytest.mark.skipif(not HAS_TRITON, reason="no interpreted Triton here")

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # Triton's interpreter in a sigmoid


def graph_engine(model: GLM, kind: str = "torch", capacity: int = 1024) -> Engine:
    """An engine over kernels; spare cache slots are poisoned."""
    cache = KVCache(model.config, capacity, model.dtype, model.device)
    cache.keys[:, 16:] = torch.nan
    cache.values[:, 16:] = torch.nan
    return Engine(GraphRunner(model, cache, kind, attend=plain_attention), Sampler(None, model.config.eos_token_id))


@pytest.mark.parametrize("key", CASES, ids="/".join)
def test_ids_equal_the_original(key):
    case = CASES[key]
    model = plain_model(key[0])
    ids = case.inputs["input_ids"][0].tolist()
    params, max_new = settings(case, len(ids))
    sequence = sequence_of(model, ids, params, max_new)
    engine = graph_engine(model)
    expected = case.outputs["ids"]
    expected = expected.tolist() if isinstance(expected, torch.Tensor) else expected
    if params.num_beams > 1:
        found = beam_search(engine.runner, engine.sampler, sequence)
        ended = [a.ids + ([model.config.eos_token_id] if a.finish_reason == "stop" else []) for a in found]
        ours = [ids + row for row in ended][: len(expected)]
    else:
        engine.run([sequence])
        ours = [ids + answer(sequence, model.config.eos_token_id)]
    width = max(map(len, expected))
    assert [row + [model.config.pad_token_id] * (width - len(row)) for row in ours] == expected
    assert engine.runner.cache.num_free_tokens == engine.runner.cache.capacity


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "torch") for name in ("base-fp32", "oned-fp32", "ptuning", "int8", "int4-group", "int8-group")),
        *(pytest.param(name, "triton", marks=INTERPRETED) for name in ("oned-fp32", "int4-group")),
    ],
)
def test_logits_equal_the_plain_runners_step_by_step(name: str, kind: str) -> None:
    model = plain_model(name if "int" not in name else "base-fp16")
    if "int" in name:
        swap_linears(model, int(name[3]), embeddings=True, group_size=16 if "group" in name else 0)
    config = model.config
    contexts = [[11, 25, 36], [7], [40, 41, 42, 43, 44, 45, 46, 47, 48]]
    runs = []
    for engine in (graph_engine(model, kind), graph_engine(model, "torch")):
        runner = engine.runner if not runs else Runner(model, engine.runner.cache, plain_attention)
        sequences = [
            sequence_of(model, [*ids, config.gmask_token_id, config.bos_token_id], max_new=20) for ids in contexts
        ]
        for sequence in sequences:
            sequence.slots = runner.cache.allocate(64)
        logits = [runner.prefill(sequences).clone()]
        for step in range(2):
            for number, sequence in enumerate(sequences):
                sequence.generated_ids.append(50 + 3 * step + number)
            logits.append(runner.decode(sequences).clone())
        runs.append(logits)
    for actual, expected in zip(*runs, strict=True):
        assert_close(actual, expected, 1e-4)


def test_answer_tokens_after_a_preemption_see_only_what_stands_before_them() -> None:
    model = plain_model("base-fp32")
    config = model.config
    ids = [11, 25, 36, config.gmask_token_id, config.bos_token_id]
    made = []
    for runner_of in (GraphRunner, Runner):
        cache = KVCache(config, 256, model.dtype, model.device)
        runner = runner_of(model, cache, "torch") if runner_of is GraphRunner else Runner(model, cache, plain_attention)
        sequence = sequence_of(model, ids, max_new=20)
        sequence.generated_ids = [40, 41, 42]
        sequence.slots = cache.allocate(64)
        made.append(runner.prefill([sequence]))
    assert_close(*made)


def test_sequences_that_join_and_leave_do_not_change_each_other() -> None:
    model = plain_model("base-fp32")
    prompts = [case.inputs["input_ids"][0].tolist() for case in cases("base-fp32-generate", "generate")][:5]
    prompts = [ids for ids in prompts if ids[-1] == model.config.bos_token_id]
    alone = []
    for number, ids in enumerate(prompts):
        sequence = sequence_of(model, ids, GREEDY, 4 + 5 * number)
        graph_engine(model).run([sequence])
        alone.append(sequence.generated_ids)
    engine = graph_engine(model)
    together = [sequence_of(model, ids, GREEDY, 4 + 5 * number) for number, ids in enumerate(prompts)]
    for sequence in together:
        engine.add(sequence)
        engine.step()
        engine.step()
    engine.run([])
    assert [sequence.generated_ids for sequence in together] == alone


def test_more_sequences_than_the_largest_bucket_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatglm.engine.graph_runner.BUCKETS", (1, 2))
    model = plain_model("base-fp32")
    ids = [11, 25, model.config.gmask_token_id, model.config.bos_token_id]
    alone, *many = (sequence_of(model, ids, GREEDY, 6) for _ in range(6))
    graph_engine(model).run([alone])
    graph_engine(model).run(many)
    assert {tuple(sequence.generated_ids) for sequence in many} == {tuple(alone.generated_ids)}


def test_a_sequence_longer_than_the_buffers_runs_plainly() -> None:
    model = plain_model("base-fp32")
    engine = graph_engine(model)
    engine.runner.buffers.room = 8
    ids = [11, 25, 36, model.config.gmask_token_id, model.config.bos_token_id]
    short, plain = (sequence_of(model, ids, GREEDY, 12) for _ in "ab")
    engine.run([short])
    graph_engine(model).run([plain])
    assert short.generated_ids == plain.generated_ids


def start(engine: Engine, ids: list[int], max_new: int = 20):
    """A sequence after its first pass and first token."""
    config = engine.runner.model.config
    sequence = sequence_of(engine.runner.model, [*ids, config.gmask_token_id, config.bos_token_id], max_new=max_new)
    sequence.slots = engine.runner.cache.allocate(engine.runner.slots_needed(sequence))
    sequence.append(int(engine.runner.prefill([sequence]).argmax()), -1)
    return sequence


def test_steps_that_run_ahead_give_the_tokens_of_the_logits() -> None:
    model = plain_model("base-fp32")
    ahead, plain = graph_engine(model), graph_engine(model)
    contexts = [[11, 25, 36], [7], [9, 8]]
    ours, theirs = ([start(engine, ids) for ids in contexts] for engine in (ahead, plain))
    for step in range(12):
        count = 2 if 4 <= step < 7 else 3  # one leaves, and comes back
        samples = ahead.runner.decode_greedy(ours[:count])
        expected = plain.runner.decode(theirs[:count]).argmax(dim=-1).tolist()
        assert samples.tokens == expected and samples.is_finite == [True] * count
        if step == 8:
            expected[1] = 77  # the caller takes another token than the best
        for sequence, other, token in zip(ours, theirs, expected, strict=False):
            sequence.append(token, -1)
            other.append(token, -1)
        assert [s.cached for s in ours] == [s.cached for s in theirs]


def test_a_step_that_ran_ahead_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = graph_engine(plain_model("base-fp32"))
    sequence = start(engine, [11, 25])
    runs: list[int] = []
    inner = engine.runner.network.decode
    monkeypatch.setattr(engine.runner.network, "decode", lambda *a, **k: (runs.append(1), inner(*a, **k)))
    for step in range(5):
        sequence.append(engine.runner.decode_greedy([sequence]).tokens[0], -1)
        assert len(runs) == step + 2


def test_the_last_step_of_the_room_is_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = graph_engine(plain_model("base-fp32"))
    sequence = start(engine, [11, 25], max_new=40)
    engine.runner.buffers.room = sequence.cached + 3
    twin_engine = graph_engine(plain_model("base-fp32"))
    twin = start(twin_engine, [11, 25], max_new=40)
    for _ in range(8):  # beyond the room the plain runner goes on
        sequence.append(engine.runner.decode_greedy([sequence]).tokens[0], -1)
        twin.append(int(twin_engine.runner.decode([twin]).argmax()), -1)
    assert sequence.generated_ids == twin.generated_ids


def test_a_table_that_grew_is_sent_again() -> None:
    model = plain_model("base-fp32")
    engine, twin_engine = graph_engine(model), graph_engine(model)
    sequence, twin = start(engine, [11, 25], max_new=40), start(twin_engine, [11, 25], max_new=40)
    whole = list(sequence.slots)
    del sequence.slots[16:]
    for _ in range(24):
        if sequence.cached + 1 >= len(sequence.slots):
            sequence.slots += whole[len(sequence.slots) :][:16]
        sequence.append(engine.runner.decode_greedy([sequence]).tokens[0], -1)
        twin.append(int(twin_engine.runner.decode([twin]).argmax()), -1)
    assert sequence.generated_ids == twin.generated_ids


def test_contexts_see_themselves_and_answers_what_stands_before() -> None:
    heads = torch.randn(3, 9, 2, 4, generator=torch.Generator().manual_seed(0))
    mixed = prefix_lm_attention(heads, [(5, 3), (4, 3)]).unflatten(1, (2, 4))
    for start, total, context in ((0, 5, 3), (5, 4, 3)):
        query, key, value = (part[start : start + total].transpose(0, 1)[None] for part in heads)
        place = torch.arange(total)
        blocked = ~((place < context) | (place <= place[:, None]))[None, None]
        expected = plain_attention(query, key, value, blocked)[0].transpose(0, 1)
        assert_close(mixed[start : start + total], expected, 1e-5)


def test_models_without_kernels_say_so_and_get_the_plain_runner(caplog, monkeypatch) -> None:
    model = plain_model("base-fp32")
    swap_linears(model, 4, group_size=24)
    with pytest.raises(Unsupported, match="layer 0"):
        FastNetwork(model, operations("torch"))
    cache = KVCache(model.config, 64, model.dtype, model.device)
    monkeypatch.setattr("chatglm.engine.graph_runner.choose_kernels", lambda *_: "triton")
    monkeypatch.setattr("chatglm.engine.graph_runner.operations", lambda _: operations("torch"))
    with caplog.at_level("INFO"):
        assert type(make_runner(model, cache)) is Runner
    assert "layer 0" in caplog.text
    monkeypatch.undo()
    assert type(make_runner(model, cache)) is Runner  # a CPU


def test_weight_bytes_are_what_a_step_reads() -> None:
    model = plain_model("base-fp32")
    network = FastNetwork(model, operations("torch"))
    parameters = sum(p.numel() * p.itemsize for p in model.parameters())
    assert network.num_bytes == parameters


def test_a_first_pass_in_slices_gives_the_bits_of_one_at_once():
    model = plain_model(next(iter(CASES))[0])
    end = [model.config.gmask_token_id, model.config.bos_token_id]
    logits = []
    for budget in (1, 10_000):
        runner = graph_engine(model).runner
        sequences = [sequence_of(model, [5, 6, 7 + number, *end]) for number in range(2)]
        for sequence in sequences:
            sequence.slots = runner.cache.allocate(16)
        pending, made, slices = runner.begin(sequences), None, 0
        while made is None:
            made, slices = pending.advance(budget), slices + 1
        assert slices == (model.config.num_layers if budget == 1 else 1) and pending.work_left == 0
        assert [sequence.cached for sequence in sequences] == [5, 5]
        logits.append(made)
    assert torch.equal(*logits)
