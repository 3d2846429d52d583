"""One model on one CUDA device against the same split over two: equal logits, first passes and decode steps.

    python benchmarks/two_gpus.py --out benchmarks/results/two_gpus.json

Random weights of ChatGLM-6B's shape in fp16, plain PyTorch on both sides (what `--devices 2` runs).
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.multiprocessing.spawn import spawn

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from chatglm.config import ModelConfig
from chatglm.engine.kv_cache import KVCache
from chatglm.engine.random_model import random_model
from chatglm.engine.runner import Runner
from chatglm.engine.sampling import SamplingParams
from chatglm.engine.sequence import Sequence
from chatglm.model import GLM
from chatglm.parallel import connect, join_group, shard_model
from chatglm.parallel.sharding import local_heads, part_of

CONFIG = ModelConfig()


def sequences(count: int, tokens: int) -> list[Sequence]:
    made = []
    for number in range(count):
        ids = torch.randint(5, 100_000, (tokens - 2,), generator=torch.Generator().manual_seed(number)).tolist()
        made.append(Sequence.from_prompt_ids(
            [*ids, CONFIG.gmask_token_id, CONFIG.bos_token_id], SamplingParams(temperature=0), max_new=40,
            sop_id=CONFIG.bos_token_id, gmask_id=CONFIG.gmask_token_id, mask_id=CONFIG.mask_token_id,
        ))  # fmt: skip
    return made


def timed_run(runner: Runner, count: int, tokens: int) -> dict[str, object]:
    """Medians of first passes and decode steps, and logits of both."""
    batch = sequences(count, tokens)
    for sequence in batch:
        sequence.slots = runner.cache.allocate(tokens + 40)
    first = []
    for _ in range(4):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for part in range(0, count, 4):
            logits = runner.prefill(batch[part : part + 4])
        torch.cuda.synchronize()
        first.append(time.perf_counter() - begin)
    kept = [logits.float().cpu()]
    steps = []
    for step in range(20):
        for number, sequence in enumerate(batch):
            sequence.generated_ids.append(50 + step + number)
        begin = time.perf_counter()
        logits = runner.decode(batch)
        torch.cuda.synchronize()
        steps.append(time.perf_counter() - begin)
    kept.append(logits.float().cpu())
    for sequence in batch:
        runner.cache.release(sequence.slots)
    return {
        "prefill_ms": statistics.median(first[1:]) * 1e3,
        "decode_ms": statistics.median(steps[2:]) * 1e3,
        "logits": kept,
    }


def work(rank: int, meeting_place: str, out: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group = join_group(Path(meeting_place), rank, 2, device)
    whole = random_model(CONFIG, device=device)
    with torch.device("meta"):
        half = GLM(CONFIG)
    shard_model(half, rank, 2)
    parts = {name: part_of(name, tensor, CONFIG, rank, 2).contiguous() for name, tensor in whole.state_dict().items()}
    half.load_state_dict(parts, strict=False, assign=True)
    half.tie_head()
    half.requires_grad_(False).eval()
    connect(half, group)
    results = {"card": torch.cuda.get_device_name(device), "date": datetime.date.today().isoformat()}
    for count, tokens in ((1, 2000), (1, 512), (32, 512)):
        runs = {}
        for name, model in (("one", whole), ("two", half)):
            cache = KVCache(CONFIG, count * (tokens + 64), torch.float16, device, num_heads=local_heads(model))
            torch.distributed.barrier()
            with torch.inference_mode():
                runs[name] = timed_run(Runner(model, cache), count, tokens)
            del cache
            torch.cuda.empty_cache()
        pairs = zip(runs["one"].pop("logits"), runs["two"].pop("logits"), strict=True)
        errors = [((a - b).norm() / a.norm()).item() for a, b in pairs]
        results[f"batch {count}, {tokens} tokens"] = {**runs, "relative_errors": errors}
        if rank == 0:
            print(count, tokens, runs, errors, flush=True)
    results["allocated_one"] = sum(t.nbytes for t in whole.state_dict().values())
    results["allocated_two"] = sum(t.nbytes for t in half.state_dict().values())
    if rank == 0 and out:
        Path(out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    group.leave()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="")
    with tempfile.TemporaryDirectory() as place:
        spawn(work, (f"{place}/group", parser.parse_args().out), nprocs=2)
