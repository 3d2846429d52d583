"""Whole passes in native code against the model in plain PyTorch, over the same cache slots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("llvmlite")

from chatglm.config import ModelConfig
from chatglm.engine import KVCache, Runner, SamplingParams, Sequence
from chatglm.engine.cpu_runner import CpuRunner, native_runner
from chatglm.engine.graph_runner import make_runner
from chatglm.kernels.cpu import kernel_kit, worker_threads
from chatglm.kernels.cpu.jit import host_targets
from chatglm.kernels.cpu.network import CpuNetwork
from chatglm.kernels.cpu.weights import Unsupported
from chatglm.model import GLM, initialize
from chatglm.quantization import swap_linears

CONFIG = ModelConfig(
    vocab_size=500,
    hidden_size=128,
    num_layers=3,
    num_heads=4,
    inner_hidden_size=512,
    max_sequence_length=128,
    bos_token_id=490,
    gmask_token_id=491,
    mask_token_id=492,
    eos_token_id=493,
    pad_token_id=3,
)
LENGTHS = (17, 5, 30, 9, 21, 3)
TARGETS = [target.name for target in host_targets()]

EXACT = 2e-6
"""Relative error of fp32 sums in another order."""

FP16_CACHE = 2e-3
ROUNDED = 2e-2
"""Activations rounded to INT8 before each of twelve linears and the head."""


def model_of(config: ModelConfig = CONFIG, bits: int = 0, group: int = 0) -> GLM:
    model = GLM(config)
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.requires_grad_(False)
    return swap_linears(model.eval(), bits, embeddings=True, group_size=group)


def poisoned_cache(config: ModelConfig, dtype: torch.dtype = torch.float32) -> KVCache:
    cache = KVCache(config, 400, dtype, torch.device("cpu"))
    cache.keys[:, 16:] = torch.nan
    cache.values[:, 16:] = torch.nan
    return cache


def contexts(config: ModelConfig, count: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(count)
    made = []
    for length in LENGTHS[:count]:
        ids = torch.randint(10, 480, (length,), generator=generator).tolist()
        prompt = [*ids, config.gmask_token_id, config.bos_token_id]
        params = SamplingParams(temperature=0)
        made.append(
            Sequence.from_prompt_ids(
                prompt,
                params,
                max_new=16,
                sop_id=config.bos_token_id,
                gmask_id=config.gmask_token_id,
                mask_id=config.mask_token_id,
            )
        )
    return made


def with_slots(runner: Runner, sequences: list[Sequence]) -> list[Sequence]:
    for sequence in sequences:
        sequence.slots = runner.cache.allocate(runner.slots_needed(sequence))
    return sequences


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def compare(model: GLM, count: int, dtype: torch.dtype, bound: float, target: str | None = None) -> None:
    """A first pass and some steps of both runners, fed with the plain runner's tokens."""
    plain = Runner(model, poisoned_cache(model.config))
    cache = poisoned_cache(model.config, dtype)
    network = CpuNetwork(model, cache.keys, cache.values, kernel_kit(target), worker_threads(2))
    fast = CpuRunner(model, cache, network)
    first, second = (with_slots(runner, contexts(model.config, count)) for runner in (plain, fast))
    wanted, found = plain.prefill(first), fast.prefill(second)
    for _ in range(4):
        assert error(found, wanted) < bound
        for one, other, token in zip(first, second, wanted.argmax(dim=-1).tolist(), strict=True):
            one.generated_ids.append(token)
            other.generated_ids.append(token)
        wanted, found = plain.decode(first), fast.decode(second)
    assert error(found, wanted) < bound


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("count", [1, 3, 6])
def test_floating_weights_give_the_logits_of_the_model(target: str, count: int) -> None:
    compare(model_of(), count, torch.float32, EXACT, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("count", [1, 3, 6])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64), (4, 0), (8, 0)])
def test_quantised_weights_give_them_but_for_rounded_activations(
    target: str, count: int, bits: int, group: int
) -> None:
    compare(model_of(bits=bits, group=group), count, torch.float16, ROUNDED, target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cache_of_half_the_size_costs_its_rounding(dtype: torch.dtype) -> None:
    compare(model_of(), 3, dtype, FP16_CACHE if dtype == torch.float16 else 8 * FP16_CACHE)


@pytest.mark.parametrize(
    "changes",
    [
        {"position_encoding": "rotary_1d", "norm_order": "pre", "qkv_layout": "block"},
        {"position_encoding": "learned_2d", "norm_order": "pre", "qkv_layout": "block"},
        {"pre_seq_len": 7},
        {"tied_head": False},
    ],
    ids=str,
)
def test_every_member_of_the_family(changes: dict) -> None:
    config = replace(CONFIG, **changes)
    compare(model_of(config), 3, torch.float32, EXACT)
    compare(model_of(config, 8, 32), 3, torch.float32, ROUNDED)
    compare(model_of(config, 8, 32), 6, torch.float32, ROUNDED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_the_size_are_read_as_stored(dtype: torch.dtype) -> None:
    model = model_of().to(dtype)
    cache = poisoned_cache(CONFIG)
    fast = native_runner(model, cache)
    wide = Runner(model_of().to(dtype).float(), poisoned_cache(CONFIG))
    first, second = (with_slots(runner, contexts(CONFIG, 2)) for runner in (wide, fast))
    wide.prefill(first)
    fast.prefill(second)
    cache.keys.copy_(wide.cache.keys)
    cache.values.copy_(wide.cache.values)
    for sequence in [*first, *second]:
        sequence.generated_ids.append(77)
    assert error(fast.decode(second), wide.decode(first)) < EXACT


@pytest.mark.parametrize(("bits", "group"), [(0, 0), (4, 32)])
def test_a_step_gives_the_same_bits_alone_and_in_a_batch(bits: int, group: int) -> None:
    model = model_of(bits=bits, group=group)
    count = 4

    def logits(lots: list[list[int]]) -> torch.Tensor:
        fast = native_runner(model, poisoned_cache(CONFIG))
        sequences = with_slots(fast, contexts(CONFIG, count))
        for sequence in sequences:
            fast.prefill([sequence])
            sequence.generated_ids.append(33)
        return torch.cat([fast.decode([sequences[number] for number in lot]).clone() for lot in lots])

    assert torch.equal(logits([[0, 1, 2, 3]]), logits([[0], [1], [2], [3]]))
    assert torch.equal(logits([[0, 1, 2, 3]]), logits([[0, 1], [2, 3]]))


@pytest.mark.parametrize(("bits", "group"), [(0, 0), (4, 32)])
def test_verifying_a_draft_gives_the_bits_of_single_steps(bits: int, group: int) -> None:
    model = model_of(bits=bits, group=group)
    draft = [5, 6, 7, 8, 9, 10]
    verified, stepped = (native_runner(model, poisoned_cache(CONFIG)) for _ in "ab")
    (one,), (other,) = (with_slots(runner, contexts(CONFIG, 1)) for runner in (verified, stepped))
    verified.prefill([one])
    stepped.prefill([other])
    one.generated_ids.append(4)
    found = verified.verify(one, draft)
    rows = []
    for token in [4, *draft]:
        other.generated_ids.append(token)
        rows.append(stepped.decode([other]).clone())
    assert torch.equal(found, torch.cat(rows))
    assert one.cached == other.cached - len(draft)


def test_a_first_pass_in_slices_gives_the_bits_of_one_at_once() -> None:
    model = model_of(bits=4, group=32)
    whole, sliced = (native_runner(model, poisoned_cache(CONFIG)) for _ in "ab")
    first, second = (with_slots(runner, contexts(CONFIG, 3)) for runner in (whole, sliced))
    pending = sliced.begin(second)
    tokens = sum(sequence.num_prompt_tokens for sequence in second)
    left = [pending.work_left]
    while (logits := pending.advance(tokens // 2)) is None:
        left.append(pending.work_left)
    assert left == [3 * tokens, 2 * tokens, tokens]
    assert torch.equal(logits, whole.prefill(first))
    assert [sequence.cached for sequence in second] == [sequence.cached for sequence in first]


def test_a_long_line_of_contexts_is_cut_into_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatglm.engine.cpu_runner.MOST_PREFILL_TOKENS", 24)
    compare(model_of(bits=8, group=32), 6, torch.float32, ROUNDED)


def test_a_feed_forward_in_several_blocks_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatglm.kernels.cpu.network.PREFILL_BLOCK", 13)
    compare(model_of(bits=8, group=32), 6, torch.float32, ROUNDED)


def test_a_gated_feed_forward_has_no_kernels_and_runs_plain() -> None:
    model = model_of(replace(CONFIG, mlp="geglu"))
    cache = poisoned_cache(CONFIG)
    with pytest.raises(Unsupported, match="geglu"):
        CpuNetwork(model, cache.keys, cache.values, kernel_kit(), worker_threads(1))
    assert type(make_runner(model, cache, kernels="native")) is Runner


def test_the_choice_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = model_of(), poisoned_cache(CONFIG)
    assert isinstance(make_runner(model, cache, kernels="auto"), CpuRunner)
    assert type(make_runner(model, cache, kernels="torch")) is Runner
    monkeypatch.setenv("CHATGLM_KERNELS", "torch")
    assert type(make_runner(model, cache)) is Runner
