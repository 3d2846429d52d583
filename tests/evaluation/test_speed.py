"""What `chatglm bench` counts and prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chatglm.config import ModelConfig
from chatglm.engine.fast_network import FastNetwork
from chatglm.engine.random_model import random_model
from chatglm.errors import CheckpointError, DeviceError, QuantizationError, RequestError
from chatglm.evaluation import limits, speed
from chatglm.kernels.gpu import operations
from checkpoint_folders import small_safetensors

TINY = ModelConfig(
    vocab_size=300, hidden_size=64, num_layers=2, num_heads=4, inner_hidden_size=128, max_sequence_length=128,
    bos_token_id=204, eos_token_id=205, mask_token_id=200, gmask_token_id=201,
)  # fmt: skip
KEYS = {
    "decode_tokens_per_s", "prefill_tokens_per_s", "time_to_first_token_s", "decode_ms", "prefill_ms",
    "peak_memory_bytes", "memory", "load_s", "load_cold_s", "first_token_s", "bandwidth_bytes_per_s",
    "matmul_flops_per_s",
    "limit_decode_tokens_per_s", "limit_prefill_tokens_per_s", "decode_fraction", "prefill_fraction", "bytes_per_step",
    "flops_prefill", "batch", "prompt_tokens", "new_tokens", "dtype", "group_size", "kernels", "threads", "device",
    "devices", "machine", "versions", "parity", "quiet",
}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(speed.RANDOM_SHAPES, "6b", TINY)
    monkeypatch.setattr(limits, "CPU_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "CPU_EDGE", 64)
    monkeypatch.setattr(speed, "PARITY_TOKENS", 8)


@pytest.mark.parametrize(("dtype", "batch"), [("fp32", 1), ("bf16", 2), ("int8", 1), ("int4", 3)])
@pytest.mark.usefixtures("small")
def test_a_run_reports_every_fact(dtype: str, batch: int) -> None:
    settings = speed.SpeedSettings(
        dtype=dtype, device="cpu", kernels="torch", prompt_tokens=16, new_tokens=4, batch=batch, repeat=2
    )
    facts = speed.measure_speed(settings)
    assert facts.keys() >= KEYS
    json.dumps(facts)
    assert (facts["dtype"], facts["batch"], facts["kernels"]) == (dtype, batch, "torch")
    assert facts["finite"] and facts["parity"]["ok"]
    assert facts["decode_ms"]["n"] == 3 and facts["prefill_ms"]["n"] == 2
    fraction = facts["decode_tokens_per_s"] / facts["limit_decode_tokens_per_s"]
    assert facts["decode_fraction"] == pytest.approx(fraction)
    assert facts["group_size"] == (64 if dtype.startswith("int") else None)


@pytest.mark.parametrize(("bits", "embedding_bits"), [(0, 0), (8, 8), (4, 8)])
def test_step_bytes_are_what_the_kernels_read(bits: int, embedding_bits: int) -> None:
    model = random_model(
        TINY, bits=bits, group_size=32 if bits else 0, embedding_bits=embedding_bits, dtype=torch.float32
    )
    assert speed.step_bytes(model) == FastNetwork(model, operations("torch")).num_bytes


def test_operations_of_a_first_pass_are_those_of_the_released_shape() -> None:
    # 11.274e9 · S + 458,752 · S² + 1.069e9 for S = 2,000
    assert speed.prefill_flops(ModelConfig(), 2000) == pytest.approx(24.38e12, rel=1e-3)


@pytest.mark.usefixtures("small")
def test_more_tokens_than_the_model_holds_are_refused() -> None:
    with pytest.raises(RequestError, match=r"100 prompt and 50 new tokens are 150; this model holds 128"):
        speed.measure_speed(speed.SpeedSettings(device="cpu", dtype="fp32", prompt_tokens=100, new_tokens=50))


@pytest.mark.usefixtures("small")
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot drop files from its memory")
def test_a_cold_load_is_timed_beside_the_warm_one_and_needs_files(tmp_path: Path) -> None:
    folder = small_safetensors(tmp_path / "model")
    settings = speed.SpeedSettings(
        source=folder, device="cpu", kernels="torch", prompt_tokens=8, new_tokens=3, repeat=1, cold=True
    )
    facts = speed.measure_speed(settings)
    assert facts["load_cold_s"] > 0 and 0 < facts["load_s"] < facts["first_token_s"]
    with pytest.raises(RequestError, match="no files"):
        speed.measure_speed(replace(settings, source=None))


def test_rates_are_positive_and_the_larger_one_counts_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CPU_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "CPU_EDGE", 64)
    found = limits.measure_limits(torch.device("cpu"), torch.float32)
    assert min(found.copy_bytes_per_s, found.read_bytes_per_s, found.matmul_flops_per_s) > 0
    assert found.bandwidth(torch.device("cpu")) == max(found.copy_bytes_per_s, found.read_bytes_per_s)
    assert found.bandwidth(torch.device("cuda")) == found.copy_bytes_per_s


def test_a_model_and_a_random_shape_exclude_each_other() -> None:
    command = [sys.executable, "-m", "chatglm.cli", "bench", "some-folder", "--random", "6b"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "exclude each other" in done.stderr


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_two_processes_are_timed_as_one_model(dtype: str) -> None:
    settings = speed.SpeedSettings(
        dtype=dtype, device="cpu", group_size=32, prompt_tokens=16, new_tokens=4, batch=2, repeat=2
    )
    one = speed.measure_speed(replace(settings, kernels="torch"))
    two = speed.measure_speed(replace(settings, devices=2))
    assert two.keys() == one.keys()
    assert (two["devices"], two["kernels"], two["batch"]) == (2, "torch", 2)
    assert two["finite"] and two["decode_ms"]["n"] == 3 and two["prefill_ms"]["n"] == 2
    # each rank reads its half of the linears and of the keys and values; norms and an INT8 head are whole everywhere
    assert one["bytes_per_step"] / 2 <= two["bytes_per_step"] < one["bytes_per_step"]
    assert two["flops_prefill"] == one["flops_prefill"] / 2
    assert not torch.distributed.is_initialized()


@pytest.mark.usefixtures("small")
def test_a_checkpoint_over_two_processes_is_checked_and_timed(tmp_path: Path) -> None:
    folder = small_safetensors(tmp_path / "model")
    settings = speed.SpeedSettings(
        source=folder, device="cpu", dtype="fp32", prompt_tokens=8, new_tokens=3, repeat=1, devices=2
    )
    assert speed.measure_speed(settings)["devices"] == 2
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError):
        speed.measure_speed(settings)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"devices": 3}, DeviceError, "4 heads cannot be split evenly over 3 devices"),
        ({"devices": 2, "dtype": "int4", "group_size": 64}, QuantizationError, "32 columns are not a multiple"),
        ({"devices": 2, "kernels": "native"}, RequestError, "2 devices run plain PyTorch, not the native kernels"),
        ({"devices": 2, "cold": True}, RequestError, "timed on one device"),
    ],
)
def test_what_several_devices_cannot_run_is_said_before_a_process_starts(
    more: dict, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "gather_team", lambda *_: pytest.fail("a process was started"))
    settings = speed.SpeedSettings(device="cpu", dtype="fp32", prompt_tokens=16, new_tokens=4)
    with pytest.raises(error, match=words):
        speed.measure_speed(replace(settings, **more))
