"""What prompt lookup does to the speed of answers, on text that repeats and on ordinary text; and what a pass costs.

    python benchmarks/prompt_lookup.py --out benchmarks/results/prompt-lookup-cpu.json

"text": the embedded model, greedy, with and without drafts; the tokens must be equal. "passes": the time of a pass that
verifies drafts, in decode steps, in ChatGLM-6B's shape with random weights (`--layers` of its 28).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

DRAFTS = (2, 4, 8)
REPEATING = (
    "Please repeat the following sentence five times: The early bird catches the worm, but the second mouse gets it.",
    "Copy this list of cities and then copy it again: Berlin, Paris, Rome, Madrid, Vienna, Prague, Warsaw, Lisbon.",
    "请把下面这句话重复五遍：春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "请逐字抄写下面的话，然后再抄写一遍：今天天气很好，我们一起去公园散步，看花，听鸟叫。",
)
"""Questions whose answers repeat their own text or the question's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="auto")
    chosen = parser.parse_args()
    record = {
        "date": date.today().isoformat(),
        "text": effect_on_text(chosen.device),
        "passes": cost_of_passes(chosen.layers),
    }
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    if chosen.out:
        chosen.out.write_text(text, encoding="utf-8")
    print(text)


def ordinary_questions() -> list[str]:
    import chatglm.evaluation

    folder = Path(chatglm.evaluation.__file__).parent / "data"
    found = []
    for name in ("chat_zh.jsonl", "chat_en.jsonl"):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        found += [json.loads(line)["turns"][0][0] for line in lines[:8]]
    return found


def effect_on_text(device: str) -> dict[str, Any]:
    import chatglm

    model = chatglm.load(device=device)
    model.chat("你好", temperature=0, max_new_tokens=4)
    found: dict[str, Any] = {"dtype": str(model.dtype)}
    for kind, questions in (("repeating", REPEATING), ("ordinary", ordinary_questions())):
        base = answers(model, questions, 0)
        rows = {"0": {"tokens_per_s": base[1]}}
        for drafts in DRAFTS:
            texts, rate = answers(model, questions, drafts)
            rows[str(drafts)] = {"tokens_per_s": rate, "speed_up": rate / base[1], "equal": texts == base[0]}
        found[kind] = rows
    return found


def answers(model: Any, questions: Any, drafts: int) -> tuple[list[str], float]:
    """Greedy answers of at most 120 tokens, and tokens a second over all of them (the better of two runs)."""
    rates = []
    for _ in range(2):
        begin, tokens, texts = time.perf_counter(), 0, []
        for question in questions:
            reply = model.chat(question, temperature=0, max_new_tokens=120, prompt_lookup=drafts)
            texts.append(reply.text)
            tokens += reply.usage.answer_tokens
        rates.append(tokens / (time.perf_counter() - begin))
    return texts, max(rates)


def cost_of_passes(layers: int) -> dict[str, Any]:
    import torch

    from chatglm.config import ModelConfig
    from chatglm.engine.cpu_runner import cache_dtype
    from chatglm.engine.graph_runner import make_runner
    from chatglm.engine.kv_cache import KVCache
    from chatglm.engine.placement import physical_cores
    from chatglm.engine.random_model import random_model

    torch.set_num_threads(physical_cores())
    found: dict[str, Any] = {"layers": layers}
    for name, bits in (("int4", 4), ("int8", 8), ("fp16", 0)):
        config = replace(ModelConfig(), num_layers=layers)
        wanted = config.quantized(bits, None) if bits else config
        model = random_model(
            config,
            bits=bits,
            group_size=wanted.quantization_group_size,
            embedding_bits=wanted.embedding_bits,
            dtype=torch.float32 if bits else torch.float16,
        )
        cache = KVCache(config, 1024, cache_dtype(model), model.device)
        runner = make_runner(model, cache)
        found[name] = cost_of_drafts(runner, config)
        del model, runner, cache
    return found


def cost_of_drafts(runner: Any, config: Any) -> dict[str, float]:
    from chatglm.evaluation.speed import SpeedSettings, make_sequences

    (sequence,) = make_sequences(SpeedSettings(prompt_tokens=512, new_tokens=64), config)
    sequence.slots = runner.cache.allocate(runner.slots_needed(sequence))
    sequence.generated_ids.append(int(runner.prefill([sequence]).argmax()))
    step = median_ms(lambda: step_of(runner, sequence))
    rows = {"step_ms": step}
    for drafts in DRAFTS:
        held = sequence.cached

        def verify(drafts: int = drafts, held: int = held) -> None:
            runner.verify(sequence, list(range(20, 20 + drafts)))
            sequence.cached = held

        rows[f"verify_{drafts}"] = median_ms(verify) / step
    return rows


def step_of(runner: Any, sequence: Any) -> None:
    sequence.generated_ids.append(int(runner.decode([sequence]).argmax()))


def median_ms(work: Any, repeats: int = 7) -> float:
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    main()
