"""The figures of a CUDA device that this project reports, each in a process of its own.

    python benchmarks/gpu_record.py --out benchmarks/results/h100.json

What is run is what `chatglm bench` runs, with random weights of ChatGLM-6B's shape.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

RUNS = {
    "fp16 batch 1": {"dtype": "fp16"},
    "bf16 batch 1": {"dtype": "bf16"},
    "int8 batch 1": {"dtype": "int8"},
    "int4 batch 1": {"dtype": "int4"},
    "fp16 batch 32": {"dtype": "fp16", "batch": 32, "repeat": 3},
    "int4 batch 32": {"dtype": "int4", "batch": 32, "repeat": 3},
    "fp16 prompt 2000": {"dtype": "fp16", "prompt_tokens": 2000, "new_tokens": 24},
    "int4 prompt 2000": {"dtype": "int4", "prompt_tokens": 2000, "new_tokens": 24},
    "int4 chat of 2048": {"dtype": "int4", "prompt_tokens": 1536, "new_tokens": 511},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    parser.add_argument("--run", help="one run, as JSON on stdout")
    parser.add_argument("--only", help="names of runs, comma-separated")
    chosen = parser.parse_args()
    if chosen.run:
        from chatglm.evaluation.speed import SpeedSettings, measure_speed

        settings = SpeedSettings(**{"repeat": 20, "device": "cuda", **RUNS[chosen.run]})
        print(json.dumps(measure_speed(settings)))
        return
    results = {"date": datetime.date.today().isoformat(), "runs": {}}
    for name in chosen.only.split(",") if chosen.only else RUNS:
        command = [sys.executable, __file__, "--run", name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            print(name, "failed:", done.stderr[-1500:], flush=True)
            continue
        facts = json.loads(done.stdout.splitlines()[-1])
        results["runs"][name] = facts
        memory = {name: facts["memory"][name] / 2**30 for name in ("allocated", "process")}
        print(
            f"{name:20s} decode {facts['decode_tokens_per_s']:8.1f}/s {facts['decode_fraction']:.3f}  "
            f"first pass {facts['prefill_tokens_per_s']:8.0f}/s {facts['prefill_fraction']:.3f}  "
            f"allocated {memory['allocated']:.2f} GiB, process {memory['process']:.2f}  "
            f"parity {facts['parity']['ok']} {facts['parity']['error']:.1e}  {facts['machine']}",
            flush=True,
        )
        if chosen.out:
            Path(chosen.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
