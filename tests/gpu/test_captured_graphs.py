"""On a CUDA device: captured graphs equal launches one by one, batches equal single sequences, memory stays put."""

from __future__ import annotations

import pytest
import torch

from chatglm.config import ModelConfig
from chatglm.engine import Engine, KVCache, Runner, Sampler
from chatglm.engine.graph_runner import GraphRunner, make_runner
from chatglm.engine.random_model import random_model
from chatglm.model import GLM
from engine_parts import GREEDY, sequence_of
from golden_vectors import assert_close, cases, plain_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

SMALL = ModelConfig(
    vocab_size=1000, hidden_size=256, num_layers=3, num_heads=4, inner_hidden_size=1024, max_sequence_length=512,
    bos_token_id=904, eos_token_id=905, mask_token_id=900, gmask_token_id=901,
)  # fmt: skip
FORMATS = [(0, 0), (8, 0), (4, 0), (8, 64), (4, 64), (4, 128)]


def small_model(bits: int, group_size: int, dtype: torch.dtype = torch.float16) -> GLM:
    return random_model(SMALL, bits=bits, group_size=group_size, dtype=dtype, device="cuda")


def engine_of(model: GLM, *, use_graphs: bool = True, capacity: int = 2048) -> Engine:
    cache = KVCache(model.config, capacity, model.dtype, model.device)
    return Engine(GraphRunner(model, cache, "triton", use_graphs=use_graphs), Sampler(None, -1))


def prompts(count: int) -> list[list[int]]:
    return [[*range(10 + 7 * n, 15 + 11 * n), SMALL.gmask_token_id, SMALL.bos_token_id] for n in range(count)]


def logits_of(runner: Runner, count: int, steps: int = 3) -> list[torch.Tensor]:
    """Of a first pass and some steps with fixed tokens."""
    sequences = [sequence_of(runner.model, ids, max_new=20) for ids in prompts(count)]
    for sequence in sequences:
        sequence.slots = runner.cache.allocate(runner.slots_needed(sequence))
    found = [runner.prefill(sequences).clone()]
    for step in range(steps):
        for number, sequence in enumerate(sequences):
            sequence.generated_ids.append(50 + 3 * step + number)
        found.append(runner.decode(sequences).clone())
    return found


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_a_captured_step_equals_launches_one_by_one(bits: int, group_size: int, count: int) -> None:
    model = small_model(bits, group_size)
    captured, launched = (logits_of(engine_of(model, use_graphs=use).runner, count) for use in (True, False))
    for one, other in zip(captured, launched, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_logits_are_near_those_of_the_plain_network_in_fp32(bits: int, group_size: int, dtype, count: int) -> None:
    model = small_model(bits, group_size, dtype)
    found = logits_of(engine_of(model).runner, count)
    truth = small_model(bits, group_size, dtype).float()
    expected = logits_of(Runner(truth, KVCache(SMALL, 2048, torch.float32, truth.device)), count)
    for one, other in zip(found, expected, strict=True):
        error = (one - other).norm() / other.norm()
        assert error < (4e-3 if dtype == torch.float16 else 3e-2), f"relative error {error:.1e}"


@pytest.mark.parametrize("case", cases("base-fp16", "generate_fp16"), ids=lambda case: case.id)
def test_fp16_greedy_ids_equal_the_originals_in_fp32(case) -> None:
    model = plain_model("base-fp16", torch.float16).cuda()
    ids = case.inputs["input_ids"][0].tolist()
    sequence = sequence_of(model, ids, GREEDY, case.raw["generate_kwargs"]["max_length"] - len(ids))
    cache = KVCache(model.config, 256, model.dtype, model.device)
    engine = Engine(make_runner(model, cache, kernels="triton"), Sampler(None, model.config.eos_token_id))
    engine.run([sequence])
    ended = [model.config.eos_token_id] if sequence.finish_reason == "stop" else []
    assert [ids + sequence.generated_ids + ended] == case.outputs["fp32_ids"]


def test_steps_that_run_ahead_give_the_best_tokens_of_the_logits() -> None:
    model = small_model(4, 64)
    ahead, plain = engine_of(model).runner, engine_of(model).runner
    pairs = [[sequence_of(model, ids, max_new=60) for ids in prompts(2)] for _ in "ab"]
    for runner, sequences in zip((ahead, plain), pairs, strict=True):
        for sequence in sequences:
            sequence.slots = runner.cache.allocate(runner.slots_needed(sequence))
        first = runner.prefill(sequences).argmax(dim=-1).tolist()
        for sequence, token in zip(sequences, first, strict=True):
            sequence.append(token, -1)
    for step in range(40):
        count = 1 if 10 <= step < 20 else 2
        samples = ahead.decode_greedy(pairs[0][:count])
        expected = plain.decode(pairs[1][:count]).argmax(dim=-1).tolist()
        assert samples.tokens == expected
        for sequences in pairs:
            for sequence, token in zip(sequences, expected, strict=False):
                sequence.append(token, -1)


def test_every_bucket_gives_the_logits_of_a_single_sequence() -> None:
    model = small_model(0, 0)
    (single, *_), many = logits_of(engine_of(model).runner, 1, 0), logits_of(engine_of(model, capacity=8192).runner, 20)
    assert_close(many[0][:1], single, 5e-3)
    for step in many:
        assert torch.isfinite(step).all()


def test_a_second_run_takes_no_more_memory() -> None:
    model = small_model(4, 64)
    engine = engine_of(model)
    engine.run([sequence_of(model, ids, max_new=100) for ids in prompts(4)])
    torch.cuda.synchronize()
    held = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    for _ in range(3):
        engine.run([sequence_of(model, ids, max_new=100) for ids in prompts(4)])
    torch.cuda.synchronize()
    assert (torch.cuda.memory_reserved(), torch.cuda.memory_allocated()) == held
