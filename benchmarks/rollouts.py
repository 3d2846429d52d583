"""Roll-outs of a policy through the engine against `generate` of the transformers classes, on the same weights.

    python benchmarks/rollouts.py --batches 4,16 --new 64 --out FILE.json

Random weights of the embedded model's shape (44 M) in fp32: an end token is so unlikely that every answer runs to
its limit, so both make the same number of tokens. Temperature 1, top_p 1, no top_k. Each is warmed up once; then
`--repeats` runs in turn, median. `uncached` computes the whole row again for every token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

import chatglm
from chatglm.chat import EMBEDDED_MODEL
from chatglm.config import read_config
from chatglm.hf import ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm.model import GLM, initialize
from chatglm.model.batch import left_padded
from chatglm.tokenizer import Tokenizer
from chatglm.training.rlhf.rollout import Prompt, RolloutEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="4,16,32")
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--uncached", action="store_true", help="also the loop without a cache")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = replace(read_config(EMBEDDED_MODEL / "config.json").quantized(0), torch_dtype="float32")
    tokenizer = Tokenizer.from_folder(EMBEDDED_MODEL)
    model = GLM(config)
    initialize(model, 0)
    model.eval().requires_grad_(False)
    twin = hf_twin(model)
    results = []
    for batch in map(int, given.batches.split(",")):
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(100, 11_000, (batch, given.context - 2), generator=generator).tolist()
        prompts = [Prompt("", (*row, config.gmask_token_id)) for row in ids]
        engine = RolloutEngine(model, tokenizer, given.new, batch=batch)
        ways: dict[str, Callable[[int], int]] = {
            "engine": lambda seed, e=engine, p=prompts: sum(len(a.ids) for a in e.sample(p, seed=seed)),
            "generate": lambda seed, p=prompts: generated(twin, p, given.new, seed),
        }
        if given.uncached:
            ways["uncached"] = lambda seed, p=prompts: without_cache(model, p, given.new, seed)
        rates = measure(ways, given.repeats)
        medians = {name: statistics.median(values) for name, values in rates.items()}
        results.append({"batch": batch, "tokens_per_s": medians, "runs": rates})
        results[-1]["engine_over_generate"] = medians["engine"] / medians["generate"]
        print(f"batch {batch}: " + ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in medians.items()))
    if given.out:
        facts = {"torch": torch.__version__, "chatglm": chatglm.__version__, "threads": given.threads}
        facts |= {
            "context": given.context,
            "new": given.new,
            "model": "embedded shape, random fp32",
            "results": results,
        }
        given.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def hf_twin(model: GLM) -> Any:
    """The same weights under transformers."""
    stored = {**json.loads((EMBEDDED_MODEL / "config.json").read_text()), "quantization_bit": 0}
    twin = ChatGLMForConditionalGeneration(ChatGLMConfig(**{**stored, "quantization_embeddings": False}))
    twin.load_state_dict(model.state_dict())
    return twin.float().eval()


@torch.inference_mode()
def generated(twin: Any, prompts: list[Prompt], new: int, seed: int) -> int:
    torch.manual_seed(seed)
    config = twin.config
    ids = torch.tensor([[*prompt.context, config.bos_token_id] for prompt in prompts])
    settings = GenerationConfig(
        max_new_tokens=new,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    made = twin.generate(input_ids=ids, generation_config=settings)
    return int((made.shape[1] - ids.shape[1]) * len(prompts))


@torch.inference_mode()
def without_cache(model: GLM, prompts: list[Prompt], new: int, seed: int) -> int:
    generator = torch.Generator().manual_seed(seed)
    contexts = [list(prompt.context) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    for _ in range(new):
        ids, positions, blocked = left_padded(contexts, answers, model.config, model.device)
        hidden = model.transformer(ids, positions, blocked)[:, -1]
        drawn = torch.multinomial(model.logits(hidden).softmax(-1), 1, generator=generator)
        for answer, token in zip(answers, drawn[:, 0].tolist(), strict=True):
            answer.append(token)
    return new * len(prompts)


def measure(ways: dict[str, Callable[[int], int]], repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each way, run in turn after one warm-up."""
    for way in ways.values():
        way(0)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1, repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            tokens = way(number)
            rates[name].append(tokens / (time.perf_counter() - began))
    return rates


if __name__ == "__main__":
    main()
