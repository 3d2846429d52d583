"""Speed and memory of a model on this machine, beside what the machine could do.

One run: load, first passes, decode steps with greedy tokens that reach the host in order, memory, then the kernels
against the plain network, then the limits. What a limit counts: the bytes of weights, scales, biases and norms once a
step, keys and values at the mean context of the timed steps; the operations of a first pass with the head for the last
token only.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import check, open_checkpoint
from ..config import ModelConfig
from ..engine.cpu_runner import CpuRunner, cache_dtype
from ..engine.distributed import LeadingRunner, Team, cache_of, gather_team
from ..engine.graph_runner import GraphRunner, make_runner
from ..engine.kv_cache import KVCache
from ..engine.loading import load_model, wanted_form
from ..engine.placement import DTYPES, choose_device, choose_placement
from ..engine.random_model import random_model
from ..engine.runner import Runner
from ..engine.sampling import SamplingParams
from ..engine.sequence import Sequence
from ..errors import RequestError
from ..model import GLM
from ..parallel import ProcessGroup, shard_model
from ..quantization import swap_as_described
from .limits import Limits, measure_limits, seconds_of, synchronize

RANDOM_SHAPES = {"6b": ModelConfig()}
"""Shapes that can be benchmarked without a checkpoint."""

PARITY_BOUNDS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Relative error of logits, kernels against the plain network in the same dtype."""

ROUNDED_BOUND = 5e-2
"""The same where the kernels round activations to INT8 in front of every linear, which plain PyTorch does not."""

PARITY_TOKENS = 48

Say = Callable[[str], None]


@dataclass(frozen=True)
class SpeedSettings:
    """What is run.

    source      a checkpoint folder, or None for `random_shape`
    dtype       auto, fp32, fp16, bf16, int8, int4
    group_size  of random quantised weights: 0 is the original's row-wise format, None the project's default
    kernels     auto, triton, native, torch; None asks the environment
    cold        also load once with the files' pages out of memory
    devices     processes that hold the model together, in plain PyTorch; times are of them all, memory, bytes,
                operations and limits of the first one
    """

    source: Path | None = None
    random_shape: str = "6b"
    dtype: str = "auto"
    device: str = "auto"
    group_size: int | None = None
    kernels: str | None = None
    prompt_tokens: int = 512
    new_tokens: int = 128
    batch: int = 1
    repeat: int = 5
    cold: bool = False
    devices: int = 1


def measure_speed(settings: SpeedSettings, say: Say = lambda _: None) -> dict[str, Any]:
    """Everything that `chatglm bench --json` prints. Raises RequestError for a prompt that the model cannot hold."""
    config = (
        RANDOM_SHAPES[settings.random_shape] if settings.source is None else open_checkpoint(settings.source).config
    )
    _check(settings, config)
    if settings.devices == 1:
        return _measure(settings, config, None, say)
    if settings.source is not None:
        check(settings.source)  # here, so that an error is one error and not one a process
    say(f"starting {settings.devices - 1} more processes")
    load = partial(_load, settings, config)
    device = choose_device(settings.device)
    team = gather_team(load, device, settings.devices, settings.batch * _slots(settings, config))
    with contextlib.closing(team):
        return _measure(settings, config, team, say)


def _measure(settings: SpeedSettings, config: ModelConfig, team: Team | None, say: Say) -> dict[str, Any]:
    busy_before = _busy_share()
    load_cold_s = _cold_load(settings, config, say) if settings.cold else None
    say("loading the model")
    began = time.perf_counter()
    model = _load(settings, config, team.device, team.group) if team else _load(settings, config, settings.device)
    runner = _runner(model, settings, team)
    device = model.device
    synchronize(device)
    load_s = time.perf_counter() - began
    first = make_sequences(settings, model.config)[0]
    _start(runner, [first])
    synchronize(device)
    first_token_s = time.perf_counter() - began
    runner.cache.release(first.slots)
    say("first passes")
    prefill = _time_prefill(runner, settings)
    say("decode steps")
    decode, answers = _time_decode(runner, settings)
    memory = _memory(model, runner)
    say("the same by the plain network")
    parity = _parity(model, runner)
    say("the limits of this machine")
    limits = measure_limits(device, torch.float32 if model.dtype == torch.float64 else model.dtype)
    if isinstance(runner, CpuRunner) and _rounds_activations(runner):
        from ..kernels.cpu.rate import dot_operations_per_s

        integers = dot_operations_per_s(runner.network.kit, runner.network.workers)
        limits = replace(limits, matmul_flops_per_s=max(limits.matmul_flops_per_s, integers))
    result = _report(settings, model, runner, prefill, decode, limits)
    result |= {"load_s": load_s, "load_cold_s": load_cold_s, "first_token_s": first_token_s}
    result |= {"memory": memory, "peak_memory_bytes": memory["peak"]}
    result |= {"parity": parity, "finite": answers, "quiet": max(busy_before, _busy_share()) <= 0.05}
    return result


def _cold_load(settings: SpeedSettings, config: ModelConfig, say: Say) -> float:
    """Seconds of a load that reads its files from the disk; the model is dropped again."""
    if settings.source is None:
        raise RequestError("random weights have no files to load cold", cure="name a checkpoint")
    if not hasattr(os, "posix_fadvise"):
        raise RequestError("this system cannot drop files from its memory", cure="leave --cold out")
    say("loading the model from the disk")
    for file in settings.source.iterdir():
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())  # only clean pages can be dropped
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    runner = _runner(_load(settings, config, settings.device), settings)
    synchronize(runner.model.device)
    return time.perf_counter() - began


def _form(settings: SpeedSettings, config: ModelConfig) -> ModelConfig:
    """The description of the weights as they will be held."""
    if settings.source is not None:
        return wanted_form(config, settings.dtype)
    is_quantised = settings.dtype in ("int8", "int4")
    return config.quantized(int(settings.dtype[-1]), settings.group_size) if is_quantised else config


def _load(
    settings: SpeedSettings, config: ModelConfig, device: torch.device | str, group: ProcessGroup | None = None
) -> GLM:
    """The model, or one rank's part of it. config: the shape of random weights."""
    if settings.source is not None:
        return load_model(settings.source, settings.dtype, str(device), group=group).model
    wanted = _form(settings, config)
    bits = wanted.quantization_bit
    activations = "auto" if bits else settings.dtype
    placement = choose_placement(str(device), activations, config.num_parameters * (bits or 32) // 8)
    dtype = DTYPES.get(settings.dtype, placement.dtype)
    return random_model(
        config,
        bits=bits,
        group_size=wanted.quantization_group_size,
        embedding_bits=wanted.embedding_bits,
        dtype=dtype,
        device=placement.device,
        group=group,
    )


def _check(settings: SpeedSettings, config: ModelConfig) -> None:
    total = settings.prompt_tokens + settings.new_tokens
    if settings.prompt_tokens < 3 or total > config.max_sequence_length:
        raise RequestError(
            f"{settings.prompt_tokens} prompt and {settings.new_tokens} new tokens are {total}; this model holds "
            f"{config.max_sequence_length}, a prompt has at least 3"
        )
    if settings.devices == 1:
        return
    with torch.device("meta"):
        part = GLM(config.quantized(0))
    shard_model(part, 0, settings.devices)
    swap_as_described(part, _form(settings, config))
    if settings.cold:
        raise RequestError("a cold load is timed on one device", cure="leave --cold or --devices out")
    if settings.kernels not in (None, "auto", "torch"):
        raise RequestError(
            f"{settings.devices} devices run plain PyTorch, not the {settings.kernels} kernels",
            cure="leave --kernel or --devices out",
        )


def _slots(settings: SpeedSettings, config: ModelConfig) -> int:
    """Tokens that one sequence takes in the cache."""
    return -(-(settings.prompt_tokens + settings.new_tokens + (config.pre_seq_len or 0)) // 16) * 16


def _runner(model: GLM, settings: SpeedSettings, team: Team | None = None) -> Runner:
    slots = settings.batch * _slots(settings, model.config)
    if team:
        return LeadingRunner(model, cache_of(model, slots), team.group)
    cache = KVCache(model.config, slots, cache_dtype(model), model.device)
    return make_runner(model, cache, kernels=settings.kernels)


def make_sequences(settings: SpeedSettings, config: ModelConfig) -> list[Sequence]:
    """`batch` sequences with random contexts, always the same."""
    made = []
    for number in range(settings.batch):
        generator = torch.Generator().manual_seed(number)
        words = torch.randint(5, config.mask_token_id, (settings.prompt_tokens - 2,), generator=generator).tolist()
        ids = [*words, config.gmask_token_id, config.bos_token_id]
        made.append(
            Sequence.from_prompt_ids(
                ids,
                SamplingParams(temperature=0),
                max_new=settings.new_tokens + 1,
                sop_id=config.bos_token_id,
                gmask_id=config.gmask_token_id,
                mask_id=config.mask_token_id,
            )
        )
    return made


MOST_PREFILL_TOKENS = 8_192
"""Prompt tokens of one first pass, as the scheduler has it."""


def _start(runner: Runner, sequences: list[Sequence]) -> list[int]:
    """First passes; the best first tokens on the host."""
    for sequence in sequences:
        if not sequence.slots:
            sequence.slots = runner.cache.allocate(runner.slots_needed(sequence))
    step = max(1, MOST_PREFILL_TOKENS // sequences[0].num_prompt_tokens)
    tokens: list[int] = []
    for part in range(0, len(sequences), step):
        tokens += runner.prefill(sequences[part : part + step]).argmax(dim=-1).tolist()
    return tokens


def _time_prefill(runner: Runner, settings: SpeedSettings) -> list[float]:
    """Seconds of first passes of the whole batch, up to the first tokens on the host."""
    sequences = make_sequences(settings, runner.model.config)
    times = seconds_of(lambda: _start(runner, sequences), runner.model.device, settings.repeat, warm_up=1)
    for sequence in sequences:
        runner.cache.release(sequence.slots)
    return times


def _time_decode(runner: Runner, settings: SpeedSettings) -> tuple[list[float], bool]:
    """Seconds of each step up to its tokens on the host, the first dropped; whether all scores were finite."""
    sequences = make_sequences(settings, runner.model.config)
    for sequence, token in zip(sequences, _start(runner, sequences), strict=True):
        sequence.generated_ids.append(token)
    times, finite = [], True
    synchronize(runner.model.device)
    for _ in range(settings.new_tokens):
        begin = time.perf_counter()
        tokens, is_finite = _step(runner, sequences)
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.generated_ids.append(token)
        times.append(time.perf_counter() - begin)
        finite = finite and is_finite
    for sequence in sequences:
        runner.cache.release(sequence.slots)
    return times[1:] or times, finite


def _step(runner: Runner, sequences: list[Sequence]) -> tuple[list[int], bool]:
    """One decode step with the best tokens."""
    if isinstance(runner, GraphRunner):
        samples = runner.decode_greedy(sequences)
        return samples.tokens, all(samples.is_finite)
    logits = runner.decode(sequences)
    return logits.argmax(dim=-1).tolist(), bool(torch.isfinite(logits).all())


def _parity(model: GLM, runner: Runner) -> dict[str, Any]:
    """Largest relative error of logits against the plain network: a first pass and two steps of a short sequence."""
    if type(runner) in (Runner, LeadingRunner):
        return {"ok": True, "error": 0.0, "against": "itself"}
    settings = SpeedSettings(prompt_tokens=PARITY_TOKENS, new_tokens=4)
    plain = Runner(model, KVCache(model.config, 64, model.dtype, model.device))
    own, twin = (make_sequences(settings, model.config)[0] for _ in "ab")
    errors = []
    for sequence, one in ((own, runner), (twin, plain)):
        sequence.slots = one.cache.allocate(PARITY_TOKENS + 8)
    pair = [runner.prefill([own]).float().cpu(), plain.prefill([twin]).float().cpu()]
    for token in (11, 12):
        errors.append(_relative_error(*pair))
        own.generated_ids.append(token)
        twin.generated_ids.append(token)
        pair = [runner.decode([own]).float().cpu(), plain.decode([twin]).float().cpu()]
    errors.append(_relative_error(*pair))
    runner.cache.release(own.slots)
    bound = ROUNDED_BOUND if _rounds_activations(runner) else PARITY_BOUNDS[model.dtype]
    return {"ok": max(errors) <= bound, "error": max(errors), "bound": bound, "against": "plain PyTorch"}


def _rounds_activations(runner: Runner) -> bool:
    return isinstance(runner, CpuRunner) and runner.network.weights.is_quantised


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    error = float((actual - expected).norm() / expected.norm())
    return error if error == error else float("inf")


def _memory(model: GLM, runner: Runner) -> dict[str, int | None]:
    """Bytes, as the device tells them. `process` is what the whole device holds: run alone to read it."""
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    facts: dict[str, int | None] = {
        "weights": sum(tensors.values()),
        "kv": runner.cache.keys.nbytes + runner.cache.values.nbytes,
    }
    unit = 1 if sys.platform == "darwin" else 1024
    facts["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    facts["pss"] = _proportional_bytes()
    facts["peak"] = facts["rss"]
    if model.device.type == "cuda":
        facts["allocated"] = facts["peak"] = torch.cuda.max_memory_allocated(model.device)
        facts["reserved"] = torch.cuda.max_memory_reserved(model.device)
        free, total = torch.cuda.mem_get_info(model.device)
        facts["process"] = total - free
    return facts


def _proportional_bytes() -> int | None:
    try:
        with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return None


def step_bytes(model: GLM) -> int:
    """Weights, scales, biases and norms that one decode step reads: all but an embedding that is not the head."""
    head = [
        tensor for tensor in (model.lm_head.weight, getattr(model.lm_head, "weight_scale", None)) if tensor is not None
    ]
    total = sum(tensor.nbytes for tensor in head)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        is_layer = name.startswith(("transformer.layers.", "transformer.final_layernorm."))
        total += tensor.nbytes if is_layer else 0
    return total


def prefill_flops(config: ModelConfig, tokens: int) -> float:
    """Operations of a first pass: linears, attention in both directions, the head for one token."""
    first = config.inner_hidden_size * (2 if config.mlp == "geglu" else 1)
    layer = config.hidden_size * (4 * config.hidden_size + first + config.inner_hidden_size)
    attention = 4 * config.num_layers * config.hidden_size * tokens**2
    return 2.0 * config.num_layers * layer * tokens + attention + 2.0 * config.hidden_size * config.vocab_size


def _report(
    settings: SpeedSettings, model: GLM, runner: Runner, prefill: list[float], decode: list[float], limits: Limits
) -> dict[str, Any]:
    config, device, batch = model.config, model.device, settings.batch
    parts = settings.devices
    token_bytes = 2 * config.num_layers * config.hidden_size * runner.cache.keys.itemsize // parts
    held = settings.prompt_tokens + settings.new_tokens / 2 + 1
    moved = step_bytes(model) + int(batch * held * token_bytes)
    flops = batch * prefill_flops(config, settings.prompt_tokens) / parts
    bandwidth = limits.bandwidth(device)
    limit_step = max(moved / bandwidth, batch * 2 * _weights_of(config) / parts / limits.matmul_flops_per_s)
    limit_first = max(step_bytes(model) / bandwidth, flops / limits.matmul_flops_per_s)
    step, first = statistics.median(decode), statistics.median(prefill)
    return {
        "decode_tokens_per_s": batch / step,
        "prefill_tokens_per_s": batch * settings.prompt_tokens / first,
        "time_to_first_token_s": first,
        "decode_ms": _spread(decode),
        "prefill_ms": _spread(prefill),
        "bandwidth_bytes_per_s": bandwidth,
        "copy_bytes_per_s": limits.copy_bytes_per_s,
        "read_bytes_per_s": limits.read_bytes_per_s,
        "matmul_flops_per_s": limits.matmul_flops_per_s,
        "limit_decode_tokens_per_s": batch / limit_step,
        "limit_prefill_tokens_per_s": batch * settings.prompt_tokens / limit_first,
        "decode_fraction": limit_step / step,
        "prefill_fraction": limit_first / first,
        "bytes_per_step": moved,
        "flops_prefill": flops,
        "batch": batch,
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "dtype": _dtype_name(model),
        "activations": str(model.dtype).removeprefix("torch."),
        "group_size": config.quantization_group_size or None,
        "embedding_bits": config.embedding_bits or None,
        "kernels": {"GraphRunner": "triton", "CpuRunner": "native"}.get(type(runner).__name__, "torch"),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "devices": parts,
        "machine": _machine(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _weights_of(config: ModelConfig) -> int:
    first = config.inner_hidden_size * (2 if config.mlp == "geglu" else 1)
    layer = config.hidden_size * (4 * config.hidden_size + first + config.inner_hidden_size)
    return config.num_layers * layer + config.hidden_size * config.vocab_size


def _spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered) * 1e3,
        "p10": ordered[round(0.1 * last)] * 1e3,
        "p90": ordered[round(0.9 * last)] * 1e3,
        "n": len(ordered),
    }


def _dtype_name(model: GLM) -> str:
    bits = model.config.quantization_bit
    if bits:
        return f"int{bits}"
    weight = model.transformer.final_layernorm.weight.dtype
    return next(name for name, dtype in DTYPES.items() if dtype == weight)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return name


def _busy_share(seconds: float = 1.0) -> float:
    """Share of one core that other processes use, sampled; 0 where the system does not tell."""

    def used() -> float:
        with open("/proc/stat", encoding="ascii") as lines:
            numbers = [int(number) for number in lines.readline().split()[1:]]
        ours = sum(os.times()[:2])
        return (sum(numbers) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK") - ours

    try:
        before = used()
        time.sleep(seconds)
        return max(0.0, used() - before) / seconds
    except (OSError, ValueError, IndexError):
        return 0.0
