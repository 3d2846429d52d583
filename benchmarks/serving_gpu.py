"""Serving ChatGLM-6B's shape on one CUDA device over real HTTP, beside what the same engine step gives without HTTP.

    python benchmarks/serving_gpu.py --dtypes fp16 int4 --rate 16 --out benchmarks/results/serving-h100.json

A server process with random weights; a client process sends Poisson arrivals, an open loop: prompts of 128 to 1,024
random tokens and answers of 128 to 512 tokens, each evenly drawn on a log scale and evenly. The rate lies above what
the server can do, so that it always runs `--batch` sequences; what is measured is tokens a second between the first
and the last tenth. `bench`: decoding of as many sequences with the mix's mean context, without first passes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from chatglm.config import ModelConfig
from chatglm.evaluation.speed import RANDOM_SHAPES

TINY = ModelConfig(hidden_size=256, num_heads=4, num_layers=2, inner_hidden_size=512)
"""`--shape tiny --device cpu`: to see that it runs."""
PROMPTS, ANSWERS = (128, 1024), (128, 512)
MEAN_CONTEXT = 592
"""Tokens: the mean prompt, log-evenly 128 to 1,024, is 431; half of a mean answer is 160."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["fp16", "int4"])
    parser.add_argument("--shape", default="6b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=16, help="arrivals a second")
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--temperature", type=float, default=0.95, help="with the server's top_p and top_k")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--bench", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.shape == "tiny":
        RANDOM_SHAPES["tiny"] = TINY
    if given.serve:
        serve(given.serve, given)
        return
    if given.bench:
        print(json.dumps(bench(given.bench, given)))
        return
    results = []
    for dtype in given.dtypes:
        facts = {"dtype": dtype, **over_http(dtype, given)}
        alone = subprocess.run(command(given, "--bench", dtype), capture_output=True, text=True)
        if alone.returncode:
            print(alone.stderr[-1500:])
        else:
            facts["bench"] = json.loads(alone.stdout.splitlines()[-1])
            facts["of_bench"] = facts["tokens_per_s"] / facts["bench"]["decode_tokens_per_s"]
        results.append(facts)
        print(json.dumps(facts), flush=True)
        if given.out:
            given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def command(given: argparse.Namespace, *more: str) -> list[str]:
    kept = ("shape", "device", "batch")
    return [sys.executable, __file__, *more, *(text for key in kept for text in (f"--{key}", str(getattr(given, key))))]


def serve(dtype: str, given: argparse.Namespace) -> None:
    """The server process: the project's own, with random weights."""
    from chatglm.engine.loading import LoadedModel
    from chatglm.engine.placement import choose_placement
    from chatglm.engine.random_model import random_model
    from chatglm.server.backend import Backend
    from chatglm.server.logs import RequestLog
    from chatglm.server.running import bind, run_server
    from chatglm.server.settings import ServerSettings
    from chatglm.tokenizer import Tokenizer

    config, bits = RANDOM_SHAPES[given.shape], int(dtype[-1]) if dtype in ("int8", "int4") else 0
    form = config.quantized(bits) if bits else config
    placement = choose_placement(given.device, "auto" if bits else dtype, 1)
    model = random_model(
        config, bits=bits, group_size=form.quantization_group_size, embedding_bits=form.embedding_bits,
        dtype=placement.dtype, device=placement.device,
    )  # fmt: skip
    silence_specials(model)
    tokenizer = Tokenizer.from_file(ROOT / "tests" / "data" / "tokenizer" / "ice_text.model", config=model.config)
    loaded = LoadedModel(model, tokenizer, model.config, ROOT, placement, dtype)
    settings = ServerSettings(
        port=0, max_running=given.batch, max_waiting=100_000, queue_timeout_s=600, context_cache_s=0,
    )  # fmt: skip
    with bind(settings.host, settings.port) as listener:
        sys.exit(run_server(Backend(loaded, settings), listener, RequestLog(as_json=False)))


def silence_specials(model: Any) -> None:
    """A random model repeats its input, so answers to `<sop>` would have no text; without these rows they are words."""
    table = model.transformer.word_embeddings
    rows = getattr(table, "weight_scale", table.weight)
    rows.data[model.config.mask_token_id :] = 0


def bench(dtype: str, given: argparse.Namespace) -> dict[str, Any]:
    """What `chatglm bench` measures at this batch and the mean context of the mix."""
    from chatglm.evaluation.speed import SpeedSettings, measure_speed

    settings = SpeedSettings(
        random_shape=given.shape, dtype=dtype, device=given.device, batch=given.batch,
        prompt_tokens=MEAN_CONTEXT - 32, new_tokens=64, repeat=3,
    )  # fmt: skip
    return measure_speed(settings)


def over_http(dtype: str, given: argparse.Namespace) -> dict[str, Any]:
    """Start a server, load it, stop it."""
    log = Path(tempfile.mkstemp(suffix=".log")[1])
    with log.open("wb") as file:
        server = subprocess.Popen(command(given, "--serve", dtype), stdout=file, stderr=file)
    try:
        url = wait_for(server, log)
        before = by_thread(server.pid)
        facts = asyncio.run(load(url, given))
        seconds = {name: round(after - before.get(name, 0), 1) for name, after in by_thread(server.pid).items()}
        seconds = {name: spent for name, spent in seconds.items() if spent >= 1}
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        print(log.read_text(errors="replace")[:1500], file=sys.stderr)
    return {**facts, "processor_seconds": seconds, "exit": server.returncode, "batch": given.batch, "rate": given.rate}


def by_thread(pid: int) -> dict[str, float]:
    """Processor seconds of a process by thread."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        name, rest = (task / "stat").read_text().rsplit(")", 1)
        fields = rest.split()
        found[f"{name.split('(', 1)[1]} {task.name}"] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def wait_for(server: subprocess.Popen[bytes], log: Path) -> str:
    """The address, once the server is ready."""
    import httpx

    end = time.monotonic() + 240
    while time.monotonic() < end:
        text = log.read_text(errors="replace")
        if server.poll() is not None:
            raise SystemExit(f"the server ended: {text[-2000:]}")
        found = re.search(r"url=(http://\S+)", text)
        if found:
            try:
                if httpx.get(found[1] + "/ready", timeout=5).status_code == 200:
                    return found[1]
            except httpx.HTTPError:
                pass
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready in time: {log.read_text()[-2000:]}")


async def load(url: str, given: argparse.Namespace) -> dict[str, Any]:
    """Poisson arrivals until the time is over; tokens are counted as they arrive, between the first and last tenth."""
    import httpx

    rng = random.Random(1)
    arrivals: list[float] = []
    first_tokens: list[float] = []
    statuses: dict[str, int] = {}
    tasks: set[asyncio.Task[None]] = set()
    limits = httpx.Limits(max_connections=5000, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=900, limits=limits) as client:

        async def one(prompt: list[int], answer: int) -> None:
            since, is_first = time.monotonic(), True
            body = {
                "model": "chatglm", "prompt": prompt, "max_tokens": answer, "temperature": given.temperature,
                "ignore_eos": True, "stream": True,
            }  # fmt: skip
            try:
                async with client.stream("POST", url + "/v1/completions", json=body) as stream:
                    status = str(stream.status_code)
                    async for line in stream.aiter_lines():
                        if line.startswith("data: {"):
                            now = time.monotonic()
                            if is_first:
                                first_tokens.append(now - since)
                            is_first = False
                            arrivals.append(now)
            except asyncio.CancelledError:
                status = "cut at the end"
            except Exception as error:
                status = type(error).__name__
            statuses[status] = statuses.get(status, 0) + 1

        await one(list(range(100, 400)), 8)
        arrivals.clear(), first_tokens.clear(), statuses.clear()
        before = await counted(client, url)
        began = time.monotonic()
        marks: list[tuple[float, float]] = [(began, before)]
        while time.monotonic() - began < given.seconds:
            await asyncio.sleep(rng.expovariate(given.rate))
            size = int(math.exp(rng.uniform(math.log(PROMPTS[0]), math.log(PROMPTS[1]))))
            prompt = [rng.randrange(100, 100_000) for _ in range(size)]
            task = asyncio.create_task(one(prompt, rng.randint(*ANSWERS)))
            tasks.add(task)
            if time.monotonic() - marks[-1][0] > given.seconds / 20:
                marks.append((time.monotonic(), await counted(client, url)))
        sent = len(tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    inside = [mark for mark in marks if 0.1 <= (mark[0] - began) / given.seconds <= 0.95]
    (start, made), (stop, made_later) = inside[0], inside[-1]
    events = [now for now in arrivals if start <= now <= stop]
    return {
        "tokens_per_s": (made_later - made) / (stop - start), "events_per_s": len(events) / (stop - start),
        "span_s": stop - start, "requests": sent, "statuses": statuses, "time_to_first_event_median_s": (
            statistics.median(first_tokens) if first_tokens else None
        ), "temperature": given.temperature, "client_cores": os.cpu_count(),
    }  # fmt: skip


async def counted(client: Any, url: str) -> float:
    """Tokens that the server has made so far, by its own metrics."""
    text = (await client.get(url + "/metrics")).text
    return float(re.search(r"^\w+:generation_tokens_total\S* (\S+)", text, re.M)[1])  # type: ignore[index]


if __name__ == "__main__":
    main()
