"""What serving costs and gives: `python benchmarks/serving.py engine | http | soak | fuzz [--help]`.

engine  tokens a second of the serving engine at growing batches, same engine and dtype, no HTTP
http    time to first token of a short request, idle and beside a full batch; Poisson load over real HTTP
soak    random load with cancels; memory, files and threads of the server (one hour by default)
fuzz    schemathesis on the OpenAPI document (ten minutes by default): no 5xx but a documented 503

Traffic goes to 127.0.0.1 only. Results are printed as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def facts() -> dict:
    """Machine and versions."""
    import torch

    import chatglm

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    load = os.getloadavg()[0]
    return {
        "commit": commit, "chatglm": chatglm.__version__, "torch": torch.__version__, "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "load_before": round(load, 1),
    }  # fmt: skip


def engine(options: argparse.Namespace) -> dict:
    """Decode throughput by number of sequences, prefill excluded."""
    import torch

    from chatglm.chat import EMBEDDED_MODEL
    from chatglm.engine.loading import load_model
    from chatglm.engine.sampling import SamplingParams
    from chatglm.engine.serving_setup import EngineBuilder
    from chatglm.engine.serving_state import EngineLimits
    from chatglm.engine.stream import Choices, make_group

    torch.set_num_threads(options.threads)
    loaded = load_model(Path(options.model) if options.model else EMBEDDED_MODEL, options.dtype, options.device)
    limits = EngineLimits(
        context_cache_s=0,
        max_running=max(options.batches),
        queue_timeout_s=1e9,
        request_timeout_s=1e9,
        deterministic=options.deterministic,
    )
    build = EngineBuilder(loaded, limits, int(options.kv_memory * 1e9) if options.kv_memory else None)
    params = SamplingParams(temperature=0)
    prompt = loaded.tokenizer.encode_context("你好，" * (options.prompt // 2))[: options.prompt - 2]
    prompt = [*prompt[:-2], loaded.tokenizer.gmask_id, loaded.tokenizer.sop_id]
    found: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        for batch in options.batches:
            serving = build()
            for number in range(batch):
                group = make_group(
                    f"{number}", "bench", prompt, params, loaded.tokenizer, arrived=time.monotonic(),
                    max_new=options.answer, shared=Choices(ignore_eos=True),
                )  # fmt: skip
                serving.submit(group)
            while serving.pending or len(serving.waiting):
                serving.step()
            before, began = serving.counters.generation_tokens, time.perf_counter()
            while serving.has_work and len(serving.running) == batch:
                serving.step()
            rate = (serving.counters.generation_tokens - before) / (time.perf_counter() - began)
            found.setdefault(str(batch), []).append(rate)
    medians = {batch: round(statistics.median(rates), 1) for batch, rates in found.items()}
    ratios = {batch: round(rate / medians[str(options.batches[0])], 2) for batch, rate in medians.items()}
    spread = {batch: [round(min(rates), 1), round(max(rates), 1)] for batch, rates in found.items()}
    shape = {"prompt": options.prompt, "answer": options.answer, "dtype": options.dtype, "device": options.device}
    shape["deterministic"] = options.deterministic
    return {**facts(), **shape, "tokens_per_s": medians, "spread": spread, "times_batch_1": ratios}


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p95 and p99 in ms."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {
        f"p{q}": round(1000 * ordered[min(len(ordered) - 1, math.ceil(len(ordered) * q / 100) - 1)], 1)
        for q in (50, 95, 99)
    }


async def one_stream(client, url: str, body: dict, results: list[dict], leave_after: int | None = None) -> None:
    """A streamed request: times of its events, tokens by its usage."""
    began, times, tokens, status = time.monotonic(), [], 0, 0
    try:
        async with client.stream("POST", url + "/v1/chat/completions", json=body) as answer:
            status = answer.status_code
            async for line in answer.aiter_lines():
                if line.startswith("data: {") and '"content":"' in line:
                    if '"role"' not in line:
                        times.append(time.monotonic())
                    if leave_after is not None and len(times) >= leave_after:
                        break
                found = re.search(r'"completion_tokens":(\d+)', line)
                tokens = int(found[1]) if found else tokens
    except Exception as error:
        status = type(error).__name__
    gaps = [b - a for a, b in itertools.pairwise(times)]
    results.append(
        {
            "began": began,
            "ttft": times[0] - began if times else None,
            "gaps": gaps,
            "end": time.monotonic(),
            "tokens": tokens,
            "status": status,
            "left": leave_after is not None and len(times) >= leave_after,
        }
    )


def question(text: str, answer: int) -> dict:
    """A streamed request that runs to its limit."""
    return {
        "model": "chatglm", "messages": [{"role": "user", "content": text}], "max_tokens": answer, "temperature": 0,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


async def running(client, url: str) -> int:
    """Requests that the server has admitted, once none waits."""
    text = (await client.get(url + "/metrics")).text
    counts = {
        name: float(re.search(rf"num_requests_{name}{{[^}}]*}} (\S+)", text)[1]) for name in ("running", "waiting")
    }
    return 0 if counts["waiting"] else int(counts["running"])


async def measure_http(url: str, options: argparse.Namespace) -> dict:
    import httpx

    unlimited = httpx.Limits(max_connections=2000, max_keepalive_connections=200)
    async with httpx.AsyncClient(timeout=600, limits=unlimited) as client:
        idle: list[dict] = []
        await one_stream(client, url, question("你好", 2), [])  # warms up
        for number in range(options.probes):
            await one_stream(client, url, question(f"你好 {number}", 2), idle)
        background: list[dict] = []
        body = question("请介绍一下你自己 " * 4, 900)
        load = [
            asyncio.create_task(
                one_stream(
                    client,
                    url,
                    {**body, "messages": [{"role": "user", "content": f"{i} " + body["messages"][0]["content"]}]},
                    background,
                )
            )
            for i in range(options.clients - 1)
        ]
        while await running(client, url) < options.clients - 1:  # their first passes are over, all of them write
            await asyncio.sleep(0.5)
        await asyncio.sleep(options.settle)
        loaded: list[dict] = []
        for number in range(options.probes):
            await one_stream(client, url, question(f"你好 {number + 1000}", 2), loaded)
            await asyncio.sleep(random.random() * 0.2)
        for task in load:
            task.cancel()
        await asyncio.gather(*load, return_exceptions=True)
        poisson = await poisson_load(client, url, options) if options.rate else None
    first = (
        [result["ttft"] for result in idle if result["ttft"]],
        [result["ttft"] for result in loaded if result["ttft"]],
    )
    medians = [statistics.median(values) * 1000 for values in first]
    return {
        "ttft_idle_ms": percentiles(first[0]), "ttft_beside_load_ms": percentiles(first[1]),
        "clients": options.clients, "ratio_of_medians": round(medians[1] / medians[0], 2), "poisson": poisson,
    }  # fmt: skip


async def poisson_load(client, url: str, options: argparse.Namespace) -> dict:
    """Open loop: arrivals do not wait for answers; the first and last tenth are cut."""
    rng = random.Random(options.seed)
    results: list[dict] = []
    tasks, began = [], time.monotonic()
    while time.monotonic() - began < options.seconds:
        await asyncio.sleep(rng.expovariate(options.rate))
        prompt = int(math.exp(rng.uniform(math.log(options.prompts[0]), math.log(options.prompts[1]))))
        text = f"{rng.random()} " + "你好" * (prompt // 2)
        tasks.append(
            asyncio.create_task(one_stream(client, url, question(text, rng.randint(*options.answers)), results))
        )
    await asyncio.gather(*tasks)
    first, last = began + 0.1 * options.seconds, began + 0.9 * options.seconds
    kept = [result for result in results if first <= result["began"] <= last]
    span = max(result["end"] for result in kept) - first
    return {
        "rate": options.rate, "requests": len(results), "kept": len(kept),
        "errors": [result["status"] for result in results if result["status"] != 200],
        "tokens_per_s": round(sum(result["tokens"] for result in kept) / span, 1),
        "ttft_ms": percentiles([result["ttft"] for result in kept if result["ttft"]]),
        "inter_token_ms": percentiles([gap for result in kept for gap in result["gaps"]]),
    }  # fmt: skip


def http(options: argparse.Namespace) -> dict:
    """A server of its own, or the one at --url."""
    from server_process import ServerProcess

    server = None if options.url else ServerProcess(*options.server)
    try:
        return {**facts(), **asyncio.run(measure_http(options.url or server.url, options))}
    finally:
        if server:
            server.stop()
            server.close()


def soak(options: argparse.Namespace) -> dict:
    """Random requests, a fifth of them left early; resident memory, files and threads once a minute."""
    import httpx

    from server_process import ServerProcess

    at_start = facts()
    # a small pool, and first more requests than it holds: pages used for the first time are no leak
    server = ServerProcess("--context-cache", "5", "--kv-memory", options.kv_memory)
    rows: list[dict] = []

    def sample(at: float) -> None:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        resident = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024
        rows.append(
            {"minute": round(at / 60, 1), "rss_mb": resident, "files": server.num_files, "threads": server.num_threads}
        )
        rows[-1]["preemptions"] = int(server.metric("num_preemptions"))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)

    async def run() -> list[dict]:
        rng, results, tasks = random.Random(options.seed), [], set()
        # a connection for each: the server may close one that is kept in the moment it is used again
        limits = httpx.Limits(max_connections=500, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:
            began = last = time.monotonic()
            many = (question(f"{number} " + "你好" * 100, 200) for number in range(40))
            await asyncio.gather(*(one_stream(client, server.url, body, results) for body in many))
            sample(time.monotonic() - began)  # a preemption here: every block of the pool had an owner
            while time.monotonic() - began < options.seconds:
                await asyncio.sleep(rng.expovariate(options.rate))
                body = question(f"{rng.random()} " + "你好" * rng.randint(2, 100), rng.randint(8, 64))
                body["n"] = 2 if rng.random() < 0.1 else 1
                if rng.random() < 0.05:
                    body |= {"structured_outputs": {"regex": f"[0-9]{{{rng.randint(1, 20)}}}"}, "ignore_eos": False}
                leave = rng.randint(1, 10) if rng.random() < 0.2 else None
                if len(tasks) < 100:
                    task = asyncio.create_task(one_stream(client, server.url, body, results, leave))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                if time.monotonic() - last > min(60, options.seconds / 5):
                    last = time.monotonic()
                    sample(last - began)
            await asyncio.gather(*tasks)
            sample(time.monotonic() - began)
        return results

    results = asyncio.run(run())
    server.audit()
    preemptions = server.metric("num_preemptions")
    status = server.stop()
    server.close()
    settled = [row for row in rows if row["minute"] >= min(10, options.seconds / 180)]
    growth = (settled[-1]["rss_mb"] / settled[0]["rss_mb"] - 1) * 100 if settled else 0.0
    statuses = Counter(str(result["status"]) for result in results)
    return {
        **at_start,
        "requests": len(results),
        "left_early": sum(result["left"] for result in results),
        "statuses": dict(statuses),
        "preemptions": preemptions,
        "growth_percent": round(growth, 2),
        "exit": status,
        "rows": rows,
    }


def fuzz(options: argparse.Namespace) -> dict:
    """schemathesis until the time is over, each round with another seed."""
    from server_process import ServerProcess

    kept = tempfile.TemporaryDirectory()
    server = ServerProcess("--context-cache", "0", "--max-waiting", "64", "--feedback-db", f"{kept.name}/feedback.db")
    end, rounds, failures = time.monotonic() + options.seconds, 0, []
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", server.url + "/openapi.json",
        "--checks", "not_a_server_error",
        "--request-timeout", "300", "--max-examples", str(options.examples), "--no-color",
    ]  # fmt: skip
    try:
        while time.monotonic() < end:
            done = subprocess.run([*command, "--seed", str(options.seed + rounds)], capture_output=True, text=True)
            rounds += 1
            if done.returncode:
                failures.append(done.stdout[-3000:])
                break
        server.audit()
        counts = re.findall(r"status=(\d+)", server.log)
    finally:
        status = server.stop()
        server.close()
        kept.cleanup()
    statuses = {code: counts.count(code) for code in sorted(set(counts))}
    return {**facts(), "rounds": rounds, "statuses": statuses, "failures": failures, "exit": status}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    of_engine = parts.add_parser("engine")
    of_engine.add_argument("--model")
    of_engine.add_argument("--dtype", default="fp32")
    of_engine.add_argument("--device", default="cpu")
    of_engine.add_argument("--threads", type=int, default=1)
    of_engine.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 32, 64])
    of_engine.add_argument("--prompt", type=int, default=64)
    of_engine.add_argument("--answer", type=int, default=48)
    of_engine.add_argument("--repeats", type=int, default=5)
    of_engine.add_argument("--kv-memory", type=float, help="GB")
    of_engine.add_argument("--deterministic", action="store_true", help="every step of one shape: what it costs")
    of_http = parts.add_parser("http")
    of_http.add_argument("--url", help="a server that runs already")
    of_http.add_argument("--server", nargs="*", default=["--context-cache", "0", "--max-running", "65"])
    of_http.add_argument("--clients", type=int, default=64)
    of_http.add_argument("--probes", type=int, default=15)
    of_http.add_argument("--settle", type=float, default=10, help="seconds after all clients were admitted")
    of_http.add_argument("--rate", type=float, default=0, help="Poisson arrivals a second; 0: none")
    of_http.add_argument("--prompts", type=int, nargs=2, default=[16, 256])
    of_http.add_argument("--answers", type=int, nargs=2, default=[8, 64])
    for part in (of_http, parts.add_parser("soak"), parts.add_parser("fuzz")):
        part.add_argument("--seed", type=int, default=1)
        part.add_argument("--seconds", type=float, default={"soak": 3600, "fuzz": 600}.get(part.prog.split()[-1], 60))
    parts.choices["soak"].add_argument("--rate", type=float, default=2)
    parts.choices["soak"].add_argument("--kv-memory", default="100MB")
    parts.choices["fuzz"].add_argument("--examples", type=int, default=30)
    options = parser.parse_args()
    print(json.dumps(globals()[options.part](options), ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
