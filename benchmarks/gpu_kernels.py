"""Kernels one by one on a CUDA device: every tile size against the measured copy bandwidth.

    python benchmarks/gpu_kernels.py --parts limits,gemv,matmul,attention,step,prefill --out results.json

Each figure is the median of graph replays over the 28 distinct layers of ChatGLM-6B's shape, so nothing stays in the
cache; `fraction` is the least traffic over the copy bandwidth of the same run, divided by the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from chatglm.config import ModelConfig
from chatglm.engine.graph_runner import GraphRunner
from chatglm.engine.kv_cache import KVCache
from chatglm.engine.random_model import random_model
from chatglm.engine.sampling import SamplingParams
from chatglm.engine.sequence import Sequence
from chatglm.kernels.gpu import PackedWeight, launch

CONFIG = ModelConfig()
SHAPES = {"qkv": (12288, 4096), "dense": (4096, 4096), "up": (16384, 4096), "down": (4096, 16384)}
DEVICE = torch.device("cuda")
results: dict[str, object] = {}
copy_rate = 3e12


def note(name: str, **values: object) -> None:
    results[name] = values
    print(
        name.ljust(44),
        "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()),
        flush=True,
    )


def replayed(work: Callable[[], None], repeats: int = 20) -> float:
    """Median seconds of a graph replay of `work`."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return timed(graph.replay, repeats)


def timed(work: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def limits() -> None:
    global copy_rate
    source, target = (torch.empty(1 << 32, dtype=torch.uint8, device=DEVICE) for _ in "ab")
    source.random_()
    copy_rate = 2 * source.numel() / timed(lambda: target.copy_(source))
    note("copy", bytes_per_s=copy_rate)
    del source, target
    for dtype in (torch.float16, torch.bfloat16):
        a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=dtype) for _ in "ab")
        note(f"matmul {dtype}", flops_per_s=2 * 8192**3 / timed(lambda: a @ b))


def weights(shape: tuple[int, int], bits: int, group: int, count: int = 28) -> list[PackedWeight]:
    rows, columns = shape
    if bits == 16:
        data = torch.randn(count, rows, columns, device=DEVICE, dtype=torch.float16) * 0.02
        return [PackedWeight(part, None, rows, columns, 16, columns, False) for part in data]
    data = torch.randint(-(2**31), 2**31 - 1, (count, rows, columns * bits // 32), device=DEVICE, dtype=torch.int32)
    scale = torch.rand(count, rows, columns // group, device=DEVICE, dtype=torch.float16) * 0.01
    return [PackedWeight(a, b, rows, columns, bits, group, group == columns) for a, b in zip(data, scale, strict=True)]


GEMV_TILES = {
    16: [(1, 4096, 8, 1), (2, 4096, 8, 1)],
    8: [(8, 1024, 8, 1), (8, 1024, 8, 2), (4, 1024, 8, 4), (4, 1024, 8, 1)],
    4: [
        (8, 512, 4, 1),
        (8, 512, 4, 3),
        (16, 512, 4, 1),
        (8, 512, 4, 4),
        (4, 512, 4, 1),
        (2, 2048, 16, 2),
        (4, 1024, 8, 1),
    ],
}


def gemv(bits_list: list[int]) -> None:
    for bits in bits_list:
        for name, shape in [*SHAPES.items(), ("head", (130528, 4096))]:
            layers = weights(shape, bits, shape[1] if bits == 16 else 128, 1 if name == "head" else 28)
            hidden = torch.randn(1, shape[1], device=DEVICE, dtype=torch.float16)
            out = torch.empty(1, 1, shape[0], device=DEVICE)
            floor = sum(w.num_bytes for w in layers) / copy_rate
            for tile in GEMV_TILES[bits]:
                if tile[1] * (1 if bits == 16 else 32 // bits) > shape[1]:
                    continue
                for overlap in (True, False) if tile == GEMV_TILES[bits][0] else (True,):
                    try:
                        seconds = replayed(
                            lambda: [launch.linear(hidden, w, out, tile=tile, overlap=overlap) for w in layers]
                        )
                        note(
                            f"gemv {bits} {name} {tile} overlap={overlap:d}",
                            us=seconds * 1e6 / len(layers),
                            fraction=floor / seconds,
                        )
                    except Exception as error:
                        print("failed", bits, name, tile, repr(error)[:200])
            del layers


MATMUL_TILES = {
    16: [(64, 64, 4, 4), (128, 64, 4, 4)],
    8: [(64, 64, 4, 3), (128, 64, 8, 2), (128, 32, 4, 4)],
    4: [(128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3), (128, 16, 4, 4), (128, 64, 4, 2)],
}


def matmul(bits_list: list[int], tokens_list: list[int]) -> None:
    for bits in bits_list:
        for name in ("qkv", "up", "down"):
            shape = SHAPES[name]
            layers = weights(shape, bits, shape[1] if bits == 16 else 128, 14)
            floor = sum(w.num_bytes for w in layers) / copy_rate
            for tokens in tokens_list:
                hidden = torch.randn(tokens, shape[1], device=DEVICE, dtype=torch.float16)
                if bits == 16:
                    flat = torch.empty(tokens, shape[0], device=DEVICE, dtype=torch.float16)
                    seconds = replayed(lambda: [torch.mm(hidden, w.data.t(), out=flat) for w in layers])
                    note(f"cublas {name} M={tokens}", us=seconds * 1e6 / len(layers), fraction=floor / seconds)
                for tile in MATMUL_TILES[bits]:
                    for splits in {12288: (1, 2), 16384: (1,), 4096: (4, 8)}[shape[0]]:
                        out = torch.empty(splits, tokens, shape[0], device=DEVICE)
                        try:
                            seconds = replayed(lambda: [launch.linear(hidden, w, out, tile=tile) for w in layers])
                            note(
                                f"matmul {bits} {name} M={tokens} {tile} splits={splits}",
                                us=seconds * 1e6 / len(layers),
                                fraction=floor / seconds,
                            )
                        except Exception as error:
                            print("failed", bits, name, tile, repr(error)[:200])
            del layers


def attention(batches: list[tuple[int, int]]) -> None:
    for batch, context in batches:
        cache = torch.randn(2, 14, (batch * context // 16 + 1) * 16, 32, 128, device=DEVICE, dtype=torch.float16)
        qkv, bias = torch.randn(1, batch, 12288, device=DEVICE), torch.zeros(12288, device=DEVICE, dtype=torch.float16)
        angles = torch.rand(batch, 64, device=DEVICE)
        tables = torch.randperm(batch * context // 16, device=DEVICE)[:, None] * 16 + torch.arange(16, device=DEVICE)
        tables = tables.flatten().view(batch, context).int()
        lengths = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
        floor = 14 * batch * context * 16384 / copy_rate
        for pieces in (1, 2, 4, 8, 16, 32):
            if not 128 <= pieces * batch * 32 <= 8192:
                continue
            for tile in ((32, 4), (64, 4), (64, 8), (16, 2)):
                workspace = (
                    torch.empty(batch * 32 * pieces * 130, device=DEVICE),
                    torch.zeros(batch * 32, dtype=torch.int32, device=DEVICE),
                )
                out = torch.empty(batch, 4096, device=DEVICE, dtype=torch.float16)

                def work() -> None:
                    for layer in range(14):
                        launch.decode_attention(
                            qkv, bias, angles, angles, cache[0, layer], cache[1, layer], tables, lengths, workspace, out,
                            rotary_streams=2, per_head=True, pieces=pieces, streams=8, tile=tile, overlap=True,
                        )  # fmt: skip

                seconds = replayed(work)
                note(
                    f"attention {batch}x{context} pieces={pieces} {tile}",
                    us=seconds * 1e6 / 14,
                    fraction=floor / seconds,
                )
        del cache


def sequences(count: int, context: int) -> list[Sequence]:
    made = []
    for number in range(count):
        ids = torch.randint(5, 100_000, (context - 2,), generator=torch.Generator().manual_seed(number)).tolist()
        made.append(Sequence.from_prompt_ids(
            [*ids, CONFIG.gmask_token_id, CONFIG.bos_token_id], SamplingParams(temperature=0), max_new=128,
            sop_id=CONFIG.bos_token_id, gmask_id=CONFIG.gmask_token_id, mask_id=CONFIG.mask_token_id,
        ))  # fmt: skip
    return made


def _rows(rows: int, most: int = 8, programs: int = 512):
    def tile(weight: PackedWeight) -> tuple[int, int, int, int]:
        if weight.bits == 16:
            return _tile(weight)
        words = min(weight.columns // weight.streams, launch.FULL_WORDS[weight.bits])
        chunks = weight.columns // weight.streams // words
        return (
            rows,
            words,
            launch.FULL_WORDS[weight.bits] // 128,
            max(1, min(most, weight.rows * chunks // (rows * programs))),
        )

    return tile


_tile = launch.gemv_tile
VARIANTS = {
    "": {},
    "unfused": {"is_fused": False},
    "4 rows, 4 tiles": {"gemv_tile": _rows(4, 4)},
    "4 rows, 2 tiles": {"gemv_tile": _rows(4, 2)},
    "4 rows, 16 tiles, 256": {"gemv_tile": _rows(4, 16, 256)},
    "2 rows, 16 tiles": {"gemv_tile": _rows(2, 16)},
    "2 rows, 8 tiles": {"gemv_tile": _rows(2, 8, 1024)},
    "8 rows, 4 tiles": {"gemv_tile": _rows(8, 4)},
    "8 rows, 1 tile": {"gemv_tile": _rows(8, 1)},
}


def whole(bits: int, group: int, batches: list[int], prefill_tokens: int, dtype: torch.dtype = torch.float16) -> None:
    """Decode steps and prefill of the whole model; graph replays and, for the step, time to tokens on the host."""
    label = f"{'fp16' if dtype == torch.float16 else 'bf16'} int{bits} g{group}" if bits else str(dtype)
    start = time.perf_counter()
    model = random_model(CONFIG, bits=bits, group_size=group, dtype=dtype, device=DEVICE)
    torch.cuda.synchronize()
    note(f"{label} built", seconds=time.perf_counter() - start, gib=torch.cuda.memory_allocated() / 2**30)
    cache = KVCache(CONFIG, max(max(batches) * 640, prefill_tokens + 176), dtype, DEVICE)
    runner = GraphRunner(model, cache, "triton")
    step_bytes = runner.network.num_bytes
    for batch in batches:
        batch_sequences = sequences(batch, 512)
        for sequence in batch_sequences:
            sequence.slots = cache.allocate(640)
        for part in range(0, batch, 8):
            logits = runner.prefill(batch_sequences[part : part + 8])
        for sequence in batch_sequences:
            sequence.generated_ids.append(7)
        for name, changes in (VARIANTS if batch == 1 and bits else {"": {}}).items():
            homes = {key: runner.network if key == "is_fused" else launch for key in changes}
            before = {key: getattr(homes[key], key) for key in changes}
            for key, value in changes.items():
                setattr(homes[key], key, value)
            runner._graphs.clear()
            began = time.perf_counter()
            runner.decode(batch_sequences)
            torch.cuda.synchronize()
            first = time.perf_counter() - began
            seconds = timed(runner._graphs[runner._bucket(batch)].replay, 40)
            floor = (step_bytes + batch * 530 * 458752) / copy_rate
            note(
                f"{label} step batch={batch} {name}",
                ms=seconds * 1e3,
                fraction=floor / seconds,
                per_s=batch / seconds,
                first_s=first,
            )
            for key, value in before.items():
                setattr(homes[key], key, value)
        runner._graphs.clear()
        runner.decode(batch_sequences)
        times = []
        for _ in range(60):
            began = time.perf_counter()
            samples = runner.decode_greedy(batch_sequences)
            for sequence, token in zip(batch_sequences, samples.tokens, strict=True):
                sequence.generated_ids.append(token)
            times.append(time.perf_counter() - began)
        seconds = statistics.median(times)
        note(f"{label} to host batch={batch}", ms=seconds * 1e3, per_s=batch / seconds, fraction=floor / seconds)
        for sequence in batch_sequences:
            cache.release(sequence.slots)
    if prefill_tokens:
        (sequence,) = sequences(1, prefill_tokens)
        sequence.slots = cache.allocate(prefill_tokens)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        seconds = timed(lambda: runner.prefill([sequence]), 10)
        flops = 11.274289152e9 * prefill_tokens + 458752 * prefill_tokens**2 + 1.069e9
        note(f"{label} prefill {prefill_tokens}", ms=seconds * 1e3, tflops=flops / seconds / 1e12, per_s=prefill_tokens / seconds,
             peak_gib=torch.cuda.max_memory_allocated() / 2**30)  # fmt: skip
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (torch.randn(1, prefill_tokens, 32, 128, device=DEVICE, dtype=dtype).transpose(1, 2) for _ in "abc")
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            with sdpa_kernel(backend):
                seconds = timed(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
            note(f"{backend}", us=seconds * 1e6)
        x = torch.randn(prefill_tokens, 4096, device=DEVICE, dtype=dtype)
        for rows in (4096, 12288, 16384):
            w = torch.randn(rows, 4096, device=DEVICE, dtype=dtype)
            seconds = timed(lambda: x @ w.t())
            note(
                f"product {prefill_tokens}x4096x{rows}",
                us=seconds * 1e6,
                tflops=2 * prefill_tokens * 4096 * rows / seconds / 1e12,
            )
        profile(lambda: runner.prefill([sequence]))
        cache.release(sequence.slots)
    parity(model, runner, label)


def profile(work: Callable[[], object]) -> None:
    """The kernels that take most of the time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda row: -row.device_time_total)[:12]
    for row in rows:
        print(f"    {row.key[:90]:90s} {row.count:5d} {row.device_time_total / 1e3:9.3f} ms")


def parity(model, runner: GraphRunner, label: str) -> None:
    """Prefill and two steps of kernels under a graph against the plain runner: relative error of the logits."""
    from chatglm.engine.runner import Runner

    errors = []
    plain = Runner(model, runner.cache)
    pair = [sequences(1, 64)[0] for _ in "ab"]
    for sequence in pair:
        sequence.slots = runner.cache.allocate(80)
    logits = [r.prefill([s]).clone() for r, s in zip((runner, plain), pair, strict=True)]
    for token in (11, 12, 13):
        errors.append(((logits[0] - logits[1]).norm() / logits[1].norm()).item())
        for sequence in pair:
            sequence.generated_ids.append(token)
        logits = [r.decode([s]).clone() for r, s in zip((runner, plain), pair, strict=True)]
    note(f"{label} parity", errors=[f"{e:.2e}" for e in errors], finite=bool(torch.isfinite(logits[0]).all()))
    for sequence in pair:
        runner.cache.release(sequence.slots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="limits,gemv,attention,step")
    parser.add_argument("--out")
    chosen = parser.parse_args()
    properties = torch.cuda.get_device_properties(DEVICE)
    note("machine", card=properties.name, torch=torch.__version__)
    parts = chosen.parts.split(",")
    began = time.perf_counter()
    for part in parts:
        name, _, detail = part.partition(":")
        try:
            if name == "limits":
                limits()
            elif name == "gemv":
                gemv([int(b) for b in detail.split("+")] if detail else [16, 8, 4])
            elif name == "matmul":
                bits, _, tokens = detail.partition("x")
                matmul([int(bits)], [int(t) for t in tokens.split("+")])
            elif name == "attention":
                attention([(1, 512), (1, 2048), (32, 512)])
            elif name == "whole":
                bits, group, batches, prefill = detail.split("x")
                dtype = torch.bfloat16 if bits == "b16" else torch.float16
                number = 0 if "16" in bits else int(bits)
                whole(number, int(group), [int(b) for b in batches.split("+")], int(prefill), dtype)
        except Exception:
            import traceback

            traceback.print_exc()
        torch.cuda.empty_cache()
        print(f"-- {part}: {time.perf_counter() - began:.0f} s", flush=True)
        if chosen.out:
            Path(chosen.out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
