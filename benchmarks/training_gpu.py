"""Training at ChatGLM-6B's layer shape on one CUDA device: speed, MFU and peak memory beside the forecast.

    python benchmarks/training_gpu.py --out benchmarks/results/training-h100.json
    python benchmarks/training_gpu.py --run full

Each run is the project's own loop in a process of its own, on random weights made on the device and random tokens (two
samples a row, half of each is context). `full` takes as many layers as the forecast says will fit with optimiser state.
MFU: 6 · parameters + 12 · layers · hidden · length operations for each token that is no padding, over the device's
dense bf16 peak; beside it the same over the rate of an 8192³ product measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

LONG = {"batch.length": 2048}
RUNS: dict[str, dict[str, Any]] = {
    "full": {**LONG, "batch.rows": 16, "batch.micro_rows": 2, "compute.compile": True},
    "full, checkpointing": {
        **LONG, "batch.rows": 16, "batch.micro_rows": 8, "compute.compile": True, "compute.checkpointing": True,
    },
    "full, not compiled": {**LONG, "batch.rows": 16, "batch.micro_rows": 2},
    "lora": {**LONG, "method.name": "lora", "batch.rows": 16, "batch.micro_rows": 4, "compute.compile": True},
    "qlora": {
        **LONG, "method.name": "qlora", "batch.rows": 4, "batch.micro_rows": 1, "compute.checkpointing": True,
        "compute.compile": True, "method.targets": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    },
    "qlora, not compiled": {
        **LONG, "method.name": "qlora", "batch.rows": 4, "batch.micro_rows": 1, "compute.checkpointing": True,
        "method.targets": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    },
    "p-tuning": {
        **LONG, "method.name": "ptuning", "method.bits": 4, "batch.rows": 4, "batch.micro_rows": 1,
        "compute.checkpointing": True, "compute.compile": True,
    },
    "p-tuning, 64 + 64": {
        "batch.length": 128, "method.name": "ptuning", "method.bits": 4, "batch.rows": 16, "batch.micro_rows": 1,
    },
    "embedded, full": {
        "batch.length": 1024, "batch.rows": 96, "batch.micro_rows": 48, "compute.compile": True,
        "model.config": {
            "vocab_size": 12352, "hidden_size": 512, "num_layers": 12, "num_heads": 8, "inner_hidden_size": 2048,
            "max_sequence_length": 1024, "bos_token_id": 12004, "eos_token_id": 12005, "mask_token_id": 12000,
            "gmask_token_id": 12001,
        },
    },
}  # fmt: skip
"""By name: what is set of a fine-tuning run; the rest are the defaults."""

ROOM = 0.96
"""Share of the device's memory that `full` may take by the forecast."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="one run, here; prints JSON")
    parser.add_argument("--only", help="names of runs, semicolon-separated")
    parser.add_argument("--layers", type=int, help="of `full` [as many as fit]")
    parser.add_argument("--small", action="store_true", help="a tiny shape, to see that it runs")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.run:
        print(json.dumps(measured(given.run, given)))
        return
    results: dict[str, Any] = {"versions": {"torch": torch.__version__}, "runs": {}}
    for name in given.only.split(";") if given.only else RUNS:
        command = [sys.executable, __file__, "--run", name, "--steps", str(given.steps)]
        command += ["--layers", str(given.layers)] if given.layers else []
        done = subprocess.run([*command, "--small"] if given.small else command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name} failed: {done.stderr[-1500:]}", flush=True)
            continue
        facts = json.loads(done.stdout.splitlines()[-1])
        results["runs"][name] = facts
        print(told(name, facts), flush=True)
        if given.out:
            given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def told(name: str, facts: dict[str, Any]) -> str:
    mfu = f"MFU {facts['mfu']:.1%}, {facts['of_matmul']:.1%} of the matrix rate" if facts["mfu"] else ""
    peak, forecast = facts["peak_bytes"] / 2**30, facts["forecast_bytes"] / 2**30
    return (
        f"{name:22s} {facts['layers']} layers  {facts['tokens_per_s']:8,.0f} tokens/s  {mfu}  "
        f"peak {peak:.2f} GiB, forecast {forecast:.2f} ({forecast / peak - 1:+.1%})  loss {facts['loss']:.2f}"
    )


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """One run: warm-up steps, then `--steps` timed ones."""
    from chatglm.config import ModelConfig
    from chatglm.training.adapters.costs import costs
    from chatglm.training.forecast import forecast
    from chatglm.training.loop import Trainer
    from chatglm.training.metrics import flops_per_token, peak_flops
    from chatglm.training.run_config import read_run
    from chatglm.training.sft import SFTRun
    from chatglm.training.sharding import World

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    product = matrix_rate(device)
    shape: dict[str, Any] = {}
    if given.small:
        shape = {"hidden_size": 128, "num_heads": 2, "inner_hidden_size": 512, "num_layers": 3}
    shape = RUNS[name].get("model.config", shape)
    changes = {**RUNS[name], "model.config": shape, "model.source": None, "optimizer.lr": 1e-5, "steps": 1000}
    if given.small:
        changes |= {"batch.length": 128, "batch.rows": 2, "batch.micro_rows": 1, "compute.compile": False}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as out:
        run = read_run(None, SFTRun, flags={"out": out}, changes=[f"{k}={json.dumps(v)}" for k, v in changes.items()])
        config = ModelConfig(**shape)
        if run.method.get("name", "full") == "full" and not shape:
            config = replace(config, num_layers=given.layers or most_layers(run, config, device))
            run = replace(run, model=replace(run.model, config={"num_layers": config.num_layers}))
        trained, frozen = costs(run) or (None, 0)
        expected = forecast(run, config, trained=trained, frozen_bytes=frozen, steps=1).as_mapping()
        task = task_of(run, config, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        trainer = Trainer(task, run, World(device))
        seconds, figures = [], None
        for step in range(3 + given.steps):
            before, since = trainer.place.tokens, time.monotonic()
            figures = trainer.step()  # reads its sums at the end, so the device is done
            seconds.append((time.monotonic() - since) / (trainer.place.tokens - before))
            print(f"step {step}: {seconds[-1] * 1e6:.1f} µs a token, loss {figures.loss:.3f}", file=sys.stderr)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        trainer.close()
    assert figures is not None
    rate = 1 / statistics.median(seconds[3:])
    needed = rate * flops_per_token(config, run.batch.length)
    most = peak_flops(device)
    return {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "set": RUNS[name], "layers": config.num_layers, "parameters": config.num_parameters, "trained": trained,
        "tokens_per_s": rate, "mfu": None if most is None else needed / most, "of_matmul": needed / product,
        "matmul_flops_per_s": product, "peak_bytes": peak, "reserved_bytes": reserved(device),
        "forecast_bytes": expected["memory"], "forecast": expected, "loss": figures.loss,
        "seconds_in_all": time.monotonic() - begin,
    }  # fmt: skip


def reserved(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved() if device.type == "cuda" else 0


def most_layers(run: Any, config: Any, device: torch.device) -> int:
    """Layers that fit with their optimiser state, by the forecast."""
    from chatglm.training.forecast import forecast

    room = torch.cuda.get_device_properties(device).total_memory * ROOM
    for layers in range(config.num_layers, 1, -1):
        if forecast(run, replace(config, num_layers=layers), steps=1).memory <= room:
            return layers
    raise SystemExit("not even two layers fit")


def task_of(run: Any, config: Any, device: torch.device) -> Any:
    """Random weights made on the device, under the run's method."""
    from chatglm.engine.random_model import random_model
    from chatglm.model import GLM, initialize
    from chatglm.training.adapters.base import base_dtype, wanted_config
    from chatglm.training.adapters.lora import add_lora
    from chatglm.training.adapters.prefix import add_prefix, prefixed
    from chatglm.training.adapters.settings import PtuningSettings, settings_of
    from chatglm.training.task import ListSource, Task

    settings = settings_of(run.method)
    if settings is None:
        with torch.device("meta"):
            model = GLM(config)
        model.to_empty(device=device)
        model.tie_head()
        initialize(model, 0)
    else:
        wanted = wanted_config(run, settings)
        form = {"bits": wanted.quantization_bit, "group_size": wanted.quantization_group_size or 0}
        model = random_model(config, **form, embedding_bits=0, dtype=base_dtype(run.compute), device=device)
        if isinstance(settings, PtuningSettings):
            model = add_prefix(model, prefixed(wanted, settings), settings, 0)
        else:
            model = add_lora(model, settings, 0)
    return Task(model, loss, ListSource(rows_of(run.batch.length, config.vocab_size)))


def loss(model: torch.nn.Module, batch: Any) -> Any:
    """As the stages' own, without the figures of each objective."""
    from chatglm.training.attending import attend_for
    from chatglm.training.loss import batch_loss
    from chatglm.training.sharding import glms

    glm = glms(model)[0]
    return batch_loss(glm, batch, attend=attend_for(batch, glm.config))


def rows_of(length: int, vocab: int) -> list[list[Any]]:
    """32 full rows of two samples each; borders are drawn."""
    from chatglm.training.data.streams import answer_sample

    random = np.random.default_rng(0)
    rows = []
    for _ in range(32):
        border = int(random.integers(length // 4, 3 * length // 4))
        ids = random.integers(5, vocab - 200, length).astype(np.int32)
        parts = [ids[:border], ids[border:]]
        rows.append([answer_sample(part, len(part) // 2, vocab - 100) for part in parts])
    return rows


def matrix_rate(device: torch.device) -> float:
    """Operations a second of a bf16 product, 8192³ on a GPU."""
    side = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(20):
        if device.type == "cuda":
            torch.cuda.synchronize()
        since = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - since)
    return float(2 * side**3 / statistics.median(times[5:]))


if __name__ == "__main__":
    main()
