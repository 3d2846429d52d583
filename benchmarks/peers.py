"""ChatGLM-6B's size in INT4 on this CPU: this project beside chatglm.cpp and beside plain PyTorch, in one run.

    python -m venv peer
    CMAKE_POLICY_VERSION_MINIMUM=3.5 CMAKE_ARGS=-DCMAKE_C_FLAGS=-march=native peer/bin/pip install chatglm-cpp==0.4.2
    python benchmarks/peers.py --peer-python peer/bin/python --out benchmarks/results/peers-cpu-zen4.json

Each side is a process that keeps its model; rounds alternate between the sides. A round is a first pass of the same
random prompt and greedy decode steps behind it, up to the token on the host. Weights are random in the shape of the
released model, each side in its own INT4 form: what is read in a step is told beside the speed. chatglm.cpp gets a
model file that is written here (3.5 GB, deleted at the end). Plain PyTorch is this project's reference path on the
original's row-wise INT4: like the original code it expands each matrix in front of its product.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

NATIVE, PLAIN, PEER, LIMITS = "chatglm", "plain PyTorch", "chatglm.cpp", "limits"
PLAIN_STEPS = 3
"""Decode steps of plain PyTorch, which takes seconds for each."""

INSTALL = """{python} has no chatglm_cpp. To install it (a C++ compiler and some minutes are needed):
    python -m venv peer
    CMAKE_POLICY_VERSION_MINIMUM=3.5 CMAKE_ARGS=-DCMAKE_C_FLAGS=-march=native peer/bin/pip install chatglm-cpp==0.4.2
then --peer-python peer/bin/python. Its build starts as many compilers as it likes: where memory is short, unpack the
archive from `pip download --no-deps --no-binary :all: chatglm-cpp==0.4.2`, turn "-j" in its setup.py into "-j1" and
install that folder."""

LAYERS = 28
GMASK, SOP = 130_001, 130_004


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter that can import chatglm_cpp; without it: plain PyTorch only")
    parser.add_argument("--layers", type=int, default=LAYERS, help="less than 28 where memory is short, on every side")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plain-rounds", type=int, default=1, help="of plain PyTorch; 0 leaves it out [1]")
    parser.add_argument("--scratch", help="folder for chatglm.cpp's model file [the system's temporary one]")
    parser.add_argument("--out")
    parser.add_argument("--side", choices=(NATIVE, PLAIN, PEER, LIMITS), help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        serve(chosen.side, chosen.layers, chosen.prompt_tokens + chosen.new_tokens + 64, chosen.file)
        return
    if chosen.peer_python:
        check_peer(chosen.peer_python)
    record = compare(chosen)
    print(table(record))
    text = json.dumps(record, indent=1) + "\n"
    if chosen.out:
        Path(chosen.out).write_text(text, encoding="utf-8")
    else:
        print(text)


def check_peer(python: str) -> None:
    """End with how to install the peer where `python` cannot import it."""
    try:
        done = subprocess.run([python, "-c", "import chatglm_cpp"], capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"--peer-python {python}: {error.strerror}")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        sys.exit(f"{INSTALL.format(python=python)}\nIt says: {reason}")


# ---- the sides: one command a line on stdin, one JSON object a line on stdout


def serve(side: str, layers: int, slots: int, file: str | None) -> None:
    """Load, say {"ready": facts}, then answer each {"prompt": ids, "steps": n} with its times."""
    if side == LIMITS:
        say({"ready": limits()})
        return
    began = time.perf_counter()
    run, facts = peer_side(file or "") if side == PEER else own_side(side, layers, slots)
    facts["load_s"] = time.perf_counter() - began
    say({"ready": facts})
    for line in sys.stdin:
        asked = json.loads(line)
        own = time.process_time()
        times = list(run(asked["prompt"], asked["steps"]))
        own = time.process_time() - own
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        say({"prefill_s": times[0], "decode_s": times[1:], "peak_rss_bytes": peak, "own_cpu_s": own})


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def peer_side(file: str) -> tuple[Any, dict[str, Any]]:
    import chatglm_cpp
    from chatglm_cpp import _C

    pipeline = chatglm_cpp.Pipeline(file)
    greedy = _C.GenerationConfig(do_sample=False)

    def run(prompt: list[int], steps: int) -> Iterator[float]:
        ids, held = list(prompt), 0
        for _ in range(steps + 1):
            begin = time.perf_counter()
            token = pipeline.model.generate_next_token(ids, None, greedy, held, len(prompt))
            yield time.perf_counter() - begin
            held = len(ids)
            ids.append(token)

    cores = os.cpu_count() or 1  # its own rule: all up to four, else half
    threads = cores if cores <= 4 else cores // 2
    return run, {"version": chatglm_cpp.__version__, "form": "q4_0, groups of 32, head 4 bits", "threads": threads}


def own_side(side: str, layers: int, slots: int) -> tuple[Any, dict[str, Any]]:
    sys.path.insert(0, str(ROOT / "src"))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from dataclasses import replace

    import torch

    import chatglm
    from chatglm.config import ModelConfig
    from chatglm.engine.cpu_runner import cache_dtype
    from chatglm.engine.graph_runner import make_runner
    from chatglm.engine.kv_cache import KVCache
    from chatglm.engine.placement import physical_cores
    from chatglm.engine.random_model import random_model
    from chatglm.engine.sampling import SamplingParams
    from chatglm.engine.sequence import Sequence
    from chatglm.evaluation.speed import step_bytes

    threads = physical_cores()
    torch.set_num_threads(threads)
    config = replace(ModelConfig(), num_layers=layers)
    wanted = config.quantized(4, 0 if side == PLAIN else None)
    group, head = wanted.quantization_group_size, wanted.embedding_bits
    model = random_model(config, bits=4, group_size=group, embedding_bits=head, dtype=torch.float32)
    cache = KVCache(config, slots, cache_dtype(model) if side == NATIVE else model.dtype, model.device)
    runner = make_runner(model, cache, kernels="torch" if side == PLAIN else "native")

    @torch.inference_mode()
    def run(prompt: list[int], steps: int) -> Iterator[float]:
        sequence = Sequence.from_prompt_ids(
            prompt, SamplingParams(temperature=0), max_new=steps + 1, sop_id=config.bos_token_id,
            gmask_id=config.gmask_token_id, mask_id=config.mask_token_id,
        )  # fmt: skip
        sequence.slots = cache.allocate(runner.slots_needed(sequence))
        for step in range(steps + 1):
            begin = time.perf_counter()
            logits = runner.decode([sequence]) if step else runner.prefill([sequence])
            sequence.generated_ids.append(int(logits.argmax()))
            yield time.perf_counter() - begin
        cache.release(sequence.slots)

    scales = f"groups of {group}" if group else "a scale a row"
    return run, {
        "version": f"{chatglm.__version__}, torch {torch.__version__}",
        "form": f"int4, {scales}, head {head} bits",
        "threads": threads,
        "weight_bytes_per_step": step_bytes(model),
    }


def limits() -> dict[str, float]:
    """Measured in a process of its own, so that no side's peak memory has it."""
    sys.path.insert(0, str(ROOT / "src"))
    import torch

    from chatglm.engine.placement import physical_cores
    from chatglm.evaluation.limits import measure_limits

    torch.set_num_threads(physical_cores())
    found = measure_limits(torch.device("cpu"), torch.float32)
    return {"copy_bytes_per_s": found.copy_bytes_per_s, "read_bytes_per_s": found.read_bytes_per_s}


# ---- the comparison


class Side:
    """One process that runs what it is told."""

    def __init__(self, name: str, python: str, chosen: argparse.Namespace, file: str = "") -> None:
        command = [python, __file__, "--side", name, "--layers", str(chosen.layers), "--file", file]
        command += ["--prompt-tokens", str(chosen.prompt_tokens), "--new-tokens", str(chosen.new_tokens)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts: dict[str, Any] = self._answer()["ready"]
        self.rounds: list[dict[str, Any]] = []

    def ask(self, **message: Any) -> dict[str, Any]:
        """Its times, and the cores that others (and the host of a virtual machine) took meanwhile."""
        assert self.process.stdin is not None
        began, used = time.perf_counter(), cpu_seconds()
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        others = cpu_seconds() - used - answer.pop("own_cpu_s")
        answer["cores_used_by_others"] = round(max(0.0, others) / (time.perf_counter() - began), 2)
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a side ended with code {self.process.wait()}; its words are above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def summary(self, prompt_tokens: int) -> dict[str, Any]:
        steps = [second for each in self.rounds for second in each["decode_s"]]
        firsts = [each["prefill_s"] for each in self.rounds]
        return {
            **self.facts,
            "decode_tokens_per_s": 1 / statistics.median(steps),
            "decode_best_tokens_per_s": 1 / min(steps),
            "decode_tokens_per_s_by_round": [1 / statistics.median(each["decode_s"]) for each in self.rounds],
            "prefill_tokens_per_s": prompt_tokens / statistics.median(firsts),
            "prefill_s": firsts,
            "cores_used_by_others_by_round": [each["cores_used_by_others"] for each in self.rounds],
            "peak_rss_bytes": max(each["peak_rss_bytes"] for each in self.rounds),
        }


def compare(chosen: argparse.Namespace) -> dict[str, Any]:
    numbers = random.Random(0)
    prompt = [numbers.randrange(5, 130_000) for _ in range(chosen.prompt_tokens - 2)] + [GMASK, SOP]
    short = prompt[-64:]
    with tempfile.TemporaryDirectory(dir=chosen.scratch) as scratch:
        sides = {NATIVE: Side(NATIVE, sys.executable, chosen)}
        if chosen.peer_python:
            from peer_model_file import write_peer_file

            file = Path(scratch) / "random-q4_0.bin"
            read = write_peer_file(file, chosen.layers)
            sides[PEER] = Side(PEER, chosen.peer_python, chosen, str(file))
            sides[PEER].facts["weight_bytes_per_step"] = read
        for side in sides.values():
            side.ask(prompt=short, steps=2)
        before = Side(LIMITS, sys.executable, chosen).facts
        for number in range(chosen.rounds):
            for name, side in sides.items():
                side.rounds.append(side.ask(prompt=prompt, steps=chosen.new_tokens))
                print(f"round {number + 1}, {name}: {brief(side.rounds[-1], len(prompt))}", file=sys.stderr)
        after = Side(LIMITS, sys.executable, chosen).facts
        for side in sides.values():
            side.close()
    if chosen.plain_rounds:
        sides[PLAIN] = plain = Side(PLAIN, sys.executable, chosen)
        plain.ask(prompt=short, steps=1)
        for _ in range(chosen.plain_rounds):
            plain.rounds.append(plain.ask(prompt=prompt, steps=PLAIN_STEPS))
            print(f"{PLAIN}: {brief(plain.rounds[-1], len(prompt))}", file=sys.stderr)
        plain.close()
    results = {name: side.summary(len(prompt)) for name, side in sides.items()}
    for facts in results.values():
        facts["weights_read_bytes_per_s"] = facts["weight_bytes_per_step"] * facts["decode_tokens_per_s"]
        for what in ("decode", "prefill"):
            facts[f"{what}_times_slower"] = results[NATIVE][f"{what}_tokens_per_s"] / facts[f"{what}_tokens_per_s"]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "layers": chosen.layers,
        "prompt_tokens": len(prompt),
        "new_tokens": chosen.new_tokens,
        "limits_before": before,
        "limits_after": after,
        "results": results,
    }


def brief(times: dict[str, Any], tokens: int) -> str:
    step = statistics.median(times["decode_s"])
    others = times["cores_used_by_others"]
    return f"first pass {tokens / times['prefill_s']:.1f} tokens/s, then {1 / step:.2f} tokens/s; others {others} cores"


def cpu_seconds() -> float:
    """Seconds that all cores have worked, or were taken from this machine; 0 where the system does not tell."""
    try:
        with open("/proc/stat", encoding="ascii") as lines:
            ticks = [int(number) for number in lines.readline().split()[1:9]]
    except OSError:
        return 0.0
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, Any]:
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {"cpu": name, "cores": os.cpu_count(), "python": platform.python_version(), "commit": commit.stdout.strip()}


def table(record: dict[str, Any]) -> str:
    layers = record["layers"]
    shape = "all 28 layers" if layers == LAYERS else f"{layers} of 28 layers, so every figure is of a smaller model"
    copy, read = (record["limits_before"][f"{what}_bytes_per_s"] / 1e9 for what in ("copy", "read"))
    lines = [
        f"{shape}; context {record['prompt_tokens']}; the machine copies {copy:.1f} GB/s, reads {read:.1f} GB/s",
        f"{'':14} {'decode':>10} {'reads':>10} {'first pass':>12} {'peak':>10}  form",
        f"{'':14} {'tokens/s':>10} {'GB/s':>10} {'tokens/s':>12} {'GiB':>10}",
    ]
    for name, facts in record["results"].items():
        lines.append(
            f"{name:14} {facts['decode_tokens_per_s']:10.2f} {facts['weights_read_bytes_per_s'] / 1e9:10.1f} "
            f"{facts['prefill_tokens_per_s']:12.1f} {facts['peak_rss_bytes'] / 2**30:10.2f}  {facts['form']}, "
            f"{facts['threads']} threads"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
