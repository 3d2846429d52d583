"""Where the time of a step goes on a CUDA device, and which tile sizes are best.

    python benchmarks/gpu_kernels.py --parts limits,step:4x64,matmul:4x32,attention,prefill:4x64

step:BITSxGROUP     a decode step of one sequence: what each kernel costs (the step without it), then other tiles
matmul:BITSxTOKENS  linears of a few tokens, against cuBLAS where weights are floats
attention           one new token of 1 and 32 sequences, by pieces and tiles
prefill:BITSxGROUP  the kernels of a first pass of 2,000 tokens

Random weights of ChatGLM-6B's shape, all 28 layers, so nothing stays in the cache; medians of graph replays.
`fraction` is the least traffic over the copy bandwidth of the same run, divided by the time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from chatglm.config import ModelConfig
from chatglm.engine.graph_runner import GraphRunner
from chatglm.engine.kv_cache import KVCache
from chatglm.engine.random_model import random_model
from chatglm.evaluation.limits import measure_limits
from chatglm.evaluation.speed import SpeedSettings, make_sequences
from chatglm.kernels.gpu import PackedWeight, launch

CONFIG, DEVICE = ModelConfig(), torch.device("cuda")
SHAPES = {
    "qkv": (12288, 4096),
    "dense": (4096, 4096),
    "up": (16384, 4096),
    "down": (4096, 16384),
    "head": (130528, 4096),
}
GEMV_TILES = {
    4: [(4, 512, 4, 2), (4, 512, 4, 4), (4, 512, 4, 8), (8, 512, 4, 1), (8, 512, 4, 2), (2, 512, 4, 8)],
    8: [(4, 1024, 8, 1), (4, 1024, 8, 4), (4, 1024, 8, 8), (8, 1024, 8, 1), (8, 1024, 8, 2), (2, 1024, 8, 8)],
}
MATMUL_TILES = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 4, 2), (128, 64, 8, 2), (128, 32, 4, 4)]
copy_rate = 3e12


def say(name: str, seconds: float, floor: float = 0.0) -> None:
    share = f"  fraction {floor / seconds:.3f}" if floor else ""
    print(f"{name:52s} {seconds * 1e6:10.2f} us{share}", flush=True)


def timed(work: Callable[[], object], repeats: int = 20) -> float:
    """Median seconds by device events."""
    times = []
    for number in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def replayed(work: Callable[[], object]) -> float:
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return timed(graph.replay)


def limits() -> None:
    global copy_rate
    found = measure_limits(DEVICE, torch.float16)
    copy_rate = found.copy_bytes_per_s
    name = torch.cuda.get_device_name(DEVICE)
    print(f"{name}: copy {copy_rate / 1e12:.3f} TB/s, product {found.matmul_flops_per_s / 1e12:.0f} TFLOP/s")


def runner_of(bits: int, group: int, tokens: int) -> GraphRunner:
    model = random_model(CONFIG, bits=bits, group_size=group, embedding_bits=8 if bits else 0, device=DEVICE)
    return GraphRunner(model, KVCache(CONFIG, tokens + 128, torch.float16, DEVICE), "triton")


class Step:
    """A decode step at 512 tokens whose kernels can be left out or given other tiles."""

    def __init__(self, bits: int, group: int) -> None:
        self.runner = runner_of(bits, group, 512)
        (self.sequence,) = make_sequences(SpeedSettings(prompt_tokens=512, new_tokens=64), CONFIG)
        self.sequence.slots = self.runner.cache.allocate(640)
        self.runner.prefill([self.sequence])
        self.sequence.generated_ids.append(7)
        self.floor = (self.runner.network.num_bytes + 513 * 458752) / copy_rate
        self.names = {shape: name for name, shape in SHAPES.items()}
        self.tiles: dict[str, Any] = {}
        self.left_out = ""
        self.linear, self.attention = launch.linear, launch.decode_attention
        operations = self.runner.network.operations
        operations.linear, operations.decode_attention = self.own_linear, self.own_attention

    def own_linear(self, hidden: Tensor, weight: PackedWeight, out: Tensor, **options: Any) -> None:
        name = self.names[weight.rows, weight.columns]
        if name != self.left_out:
            self.linear(hidden, weight, out, tile=self.tiles.get(name), **options)

    def own_attention(self, *arguments: Any, **options: Any) -> None:
        if self.left_out != "attention":
            self.attention(*arguments, tile=self.tiles.get("attention"), **options)

    def seconds(self) -> float:
        self.runner._graphs.clear()
        self.runner.decode([self.sequence])
        self.sequence.cached -= 1
        return timed(self.runner._graphs[1].replay)

    def close(self) -> None:
        launch.linear, launch.decode_attention = self.linear, self.attention


def step(bits: int, group: int) -> None:
    one = Step(bits, group)
    try:
        base = one.seconds()
        say(f"step, {bits} bits, group {group}", base, one.floor)
        for name in [*SHAPES, "attention"]:
            one.left_out = name
            say(f"  {name} costs", (base - one.seconds()) / (1 if name == "head" else CONFIG.num_layers))
        one.left_out = ""
        for name in SHAPES if bits else ():
            for tile in GEMV_TILES[8 if name == "head" else bits]:
                one.tiles = {name: tile}
                say(f"  step with {name} {tile}", one.seconds(), one.floor)
    finally:
        one.close()


def weights(shape: tuple[int, int], bits: int, count: int = 14) -> list[PackedWeight]:
    rows, columns = shape
    if not bits:
        data = torch.randn(count, rows, columns, device=DEVICE, dtype=torch.float16)
        return [PackedWeight(part, None, rows, columns, 16, columns, False) for part in data]
    size = (count, rows, columns * bits // 32)
    data = torch.randint(-(2**31), 2**31 - 1, size, device=DEVICE, dtype=torch.int32)
    scale = torch.rand(count, rows, columns // 64, device=DEVICE, dtype=torch.float16)
    return [PackedWeight(a, b, rows, columns, bits, 64, False) for a, b in zip(data, scale, strict=True)]


def matmul(bits: int, tokens: int) -> None:
    for name in ("qkv", "dense", "up", "down"):
        layers = weights(SHAPES[name], bits)
        rows, columns = SHAPES[name]
        floor = sum(layer.num_bytes for layer in layers) / copy_rate
        hidden = torch.randn(tokens, columns, device=DEVICE, dtype=torch.float16)
        if not bits:
            flat = torch.empty(tokens, rows, device=DEVICE, dtype=torch.float16)
            seconds = replayed(lambda h=hidden, o=flat, ls=layers: [torch.mm(h, w.data.t(), out=o) for w in ls])
            say(f"{name}, {tokens} tokens, cuBLAS", seconds, floor)
        for tile in MATMUL_TILES:
            for splits in (1,) if name == "up" else (1, 2, 4):
                out = torch.empty(splits, tokens, rows, device=DEVICE)

                def run(h=hidden, o=out, ls=layers, t=tile) -> None:
                    for w in ls:
                        launch.linear(h, w, o, tile=t)

                say(f"{name}, {tokens} tokens, {tile}, {splits} splits", replayed(run), floor)


def attention() -> None:
    layers = 14
    for batch, context in ((1, 512), (1, 2048), (32, 512)):
        blocks = batch * context // 16
        cache = torch.randn(2, layers, (blocks + 1) * 16, 32, 128, device=DEVICE, dtype=torch.float16)
        qkv, angles = torch.randn(1, batch, 12288, device=DEVICE), torch.rand(batch, 64, device=DEVICE)
        tables = torch.randperm(blocks, device=DEVICE)[:, None] * 16 + torch.arange(16, device=DEVICE)
        tables = tables.flatten().view(batch, context).int()
        lengths = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
        tickets, out = (
            torch.zeros(batch * 32, dtype=torch.int32, device=DEVICE),
            torch.empty(batch, 4096, device=DEVICE),
        )
        floor = layers * batch * context * 16384 / copy_rate
        for pieces in (1, 2, 4, 8, 16) if batch > 1 else (4, 8, 16, 32):
            workspace = torch.empty(batch * 32 * pieces * 130, device=DEVICE), tickets
            for tile in ((16, 2), (32, 4), (64, 4), (64, 8)):

                def run(c=cache, w=workspace, p=pieces, t=tile, q=qkv, a=angles, s=tables, n=lengths, o=out) -> None:
                    for layer in range(layers):
                        launch.decode_attention(
                            q, None, a, a, c[0, layer], c[1, layer], s, n, w, o,
                            rotary_streams=2, per_head=True, pieces=p, streams=8, tile=t,
                        )  # fmt: skip

                say(f"attention {batch} x {context}, {pieces} pieces, {tile}", replayed(run) / layers, floor / layers)


def prefill(bits: int, group: int) -> None:
    runner = runner_of(bits, group, 2000)
    (sequence,) = make_sequences(SpeedSettings(prompt_tokens=2000, new_tokens=2), CONFIG)
    sequence.slots = runner.cache.allocate(2016)
    say("first pass of 2,000 tokens", timed(lambda: runner.prefill([sequence]), 10))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        runner.prefill([sequence])
        torch.cuda.synchronize()
    for row in sorted(seen.key_averages(), key=lambda row: -row.device_time_total)[:12]:
        print(f"  {row.key[:80]:80s} {row.count:5d} {row.device_time_total / 1e3:9.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="limits,step:4x64")
    for part in parser.parse_args().parts.split(","):
        name, _, numbers = part.partition(":")
        known = {"limits": limits, "step": step, "matmul": matmul, "attention": attention, "prefill": prefill}
        known[name](*(int(number) for number in numbers.split("x") if number))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
