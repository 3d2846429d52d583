"""The figures of a CPU that this project reports, of random weights in ChatGLM-6B's shape.

    python benchmarks/cpu_model.py --out benchmarks/results/cpu-zen4-2-cores.json

Each part runs in a process of its own, so that its peak memory is its own. "contention" lets a busy loop take one core.
With `--layers` fewer layers are run, to compare forms of the weights that do not fit into memory as a whole.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

PARTS = {
    "int4": {"dtype": "int4", "layers": 28, "contention": True},
    "int4 group 128": {"dtype": "int4", "layers": 28, "group": 128},
    "int4, 4 layers": {"dtype": "int4", "layers": 4},
    "int8, 4 layers": {"dtype": "int8", "layers": 4},
    "fp16, 4 layers": {"dtype": "fp16", "layers": 4},
    "int4 by plain PyTorch, 4 layers": {"dtype": "int4", "layers": 4, "kernels": "torch", "new_tokens": 4},
}
BUSY = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
end = time.time() + float(sys.argv[2])
while time.time() < end:
    pass
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--only", help="names of parts, separated by semicolons")
    parser.add_argument("--part", help="one part, as JSON on stdout")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=24)
    chosen = parser.parse_args()
    if chosen.part:
        print(json.dumps(run(PARTS[chosen.part], chosen.prompt_tokens, chosen.new_tokens)))
        return
    names = [name.strip() for name in chosen.only.split(";")] if chosen.only else list(PARTS)
    results = {}
    for name in names:
        command = [sys.executable, __file__, "--part", name, "--prompt-tokens", str(chosen.prompt_tokens)]
        done = subprocess.run([*command, "--new-tokens", str(chosen.new_tokens)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        shown = {key: value for key, value in results[name].items() if isinstance(value, float | int)}
        print(name, json.dumps(shown), file=sys.stderr)
    record = {"date": datetime.date.today().isoformat(), "machine": machine(), "results": results}
    text = json.dumps(record, indent=1) + "\n"
    if chosen.out:
        Path(chosen.out).write_text(text)
    else:
        print(text)


def run(part: dict, prompt_tokens: int, new_tokens: int) -> dict:
    import torch

    from chatglm.config import ModelConfig
    from chatglm.engine.cpu_runner import cache_dtype
    from chatglm.engine.graph_runner import make_runner
    from chatglm.engine.kv_cache import KVCache
    from chatglm.engine.placement import physical_cores
    from chatglm.engine.random_model import random_model
    from chatglm.evaluation.limits import measure_limits
    from chatglm.evaluation.speed import SpeedSettings, make_sequences, step_bytes

    threads = physical_cores()
    torch.set_num_threads(threads)
    new_tokens = part.get("new_tokens", new_tokens)
    config = replace(ModelConfig(), num_layers=part["layers"])
    bits = {"int4": 4, "int8": 8}.get(part["dtype"], 0)
    wanted = config.quantized(bits, part.get("group")) if bits else config
    begin = time.perf_counter()
    model = random_model(
        config,
        bits=bits,
        group_size=wanted.quantization_group_size,
        embedding_bits=wanted.embedding_bits,
        dtype=torch.float32 if bits else torch.float16,
    )
    build_s = time.perf_counter() - begin
    cache = KVCache(config, prompt_tokens + 2 * new_tokens + 64, cache_dtype(model), model.device)
    runner = make_runner(model, cache, kernels=part.get("kernels"))
    settings = SpeedSettings(prompt_tokens=prompt_tokens, new_tokens=2 * new_tokens + 2)
    (sequence,) = make_sequences(settings, config)
    sequence.slots = cache.allocate(runner.slots_needed(sequence))
    firsts = []
    for _ in range(2):
        begin = time.perf_counter()
        token = int(runner.prefill([sequence]).argmax())
        firsts.append(time.perf_counter() - begin)
    sequence.generated_ids.append(token)

    def steps() -> list[float]:
        times = []
        for _ in range(new_tokens):
            begin = time.perf_counter()
            sequence.generated_ids.append(int(runner.decode([sequence]).argmax()))
            times.append(time.perf_counter() - begin)
        return times[1:]

    quiet = steps()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    facts = {
        "decode_tokens_per_s": 1 / statistics.median(quiet),
        "decode_best_tokens_per_s": 1 / min(quiet),
        "decode_ms": [round(1e3 * second, 2) for second in quiet],
        "prefill_tokens_per_s": prompt_tokens / min(firsts),
        "prefill_s": firsts,
        "build_s": build_s,
        "peak_rss_bytes": peak,
        "bytes_per_step": step_bytes(model) + 2 * config.num_layers * config.hidden_size * cache.keys.itemsize
        * (prompt_tokens + new_tokens // 2),
        "group_size": wanted.quantization_group_size,
        "embedding_bits": wanted.embedding_bits,
        "runner": type(runner).__name__,
        "threads": threads,
        "prompt_tokens": prompt_tokens,
        "load_average": os.getloadavg()[0],
    }  # fmt: skip
    if part.get("contention"):
        busy = subprocess.Popen([sys.executable, "-c", BUSY, str(max(os.sched_getaffinity(0))), "60"])
        time.sleep(0.3)
        contended = steps()
        busy.terminate()
        busy.wait()
        facts["decode_tokens_per_s_one_core_taken"] = 1 / statistics.median(contended)
        facts["share_of_quiet_one_core_taken"] = statistics.median(quiet) / statistics.median(contended)
    limits = measure_limits(torch.device("cpu"), torch.float32, repeats=5)
    facts["read_bytes_per_s"] = limits.read_bytes_per_s
    facts["decode_fraction"] = facts["bytes_per_step"] / statistics.median(quiet) / limits.read_bytes_per_s
    return facts


def machine() -> dict:
    import llvmlite
    import torch

    model = platform.processor()
    with open("/proc/cpuinfo") as lines:
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "llvmlite": llvmlite.__version__,
        "commit": commit.stdout.strip(),
    }


if __name__ == "__main__":
    main()
