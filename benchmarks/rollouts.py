"""Roll-outs of a policy through the engine against `generate` of the transformers classes, on the same weights.

    python benchmarks/rollouts.py --world out/world --batches 16,64 --out FILE.json
    python benchmarks/rollouts.py --batches 8,16 --new 64
    python benchmarks/rollouts.py --device cuda --shape 6b --batches 16,64 --context 128 --new 128

`--world`: the base model of examples/training/minimal_experiments.py (136,000 parameters, trained into the folder if it
is not there) answers 128 of its prompts, `batch` at once; answers end when they end, as in a real roll-out.
Otherwise random weights of the embedded model's shape (44 M, fp32) or ChatGLM-6B's (bf16), where an end token is so
unlikely that every answer runs to its limit. Temperature 1, top_p 1, no top_k. One warm-up, then `--repeats` runs in
turn; medians, by the clock and of the processor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

import chatglm
from chatglm.chat import EMBEDDED_MODEL
from chatglm.config import ModelConfig, read_config, to_original
from chatglm.engine.random_model import random_model
from chatglm.hf import ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm.hf.configuration import ORIGINAL_KEYS, OWN_KEYS
from chatglm.model import GLM, initialize
from chatglm.tokenizer import Tokenizer
from chatglm.training.rlhf.rollout import Prompt, RolloutEngine

EXAMPLES = Path(__file__).parents[1] / "examples" / "training"
TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "tokenizer" / "ice_text.model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="16,64")
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=["embedded", "6b"], default="embedded")
    parser.add_argument("--world", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer, prompts, new = the_world(given.world) if given.world else at_the_limit(given)
    twin = hf_twin(model)
    results = []
    for batch in map(int, given.batches.split(",")):
        own = prompts if given.world else prompts[:batch]
        engine = RolloutEngine(model, tokenizer, new, batch=batch)
        parts = [own[first : first + batch] for first in range(0, len(own), batch)]
        ways: dict[str, Callable[[int], int]] = {
            "engine": lambda seed, e=engine, p=own: sum(len(a.ids) + a.is_finished for a in e.sample(p, seed=seed)),
            "generate": lambda seed, p=parts: sum(generated(twin, part, new, seed) for part in p),
        }
        results.append({"batch": batch, **told(batch, measure(ways, given.repeats))})
    if given.out:
        facts = {
            "torch": torch.__version__,
            "chatglm": chatglm.__version__,
            "threads": given.threads,
            "device": str(model.device),
        }
        if model.device.type == "cuda":
            facts["machine"] = torch.cuda.get_device_name()
        facts |= {"parameters": model.config.num_parameters, "prompts": len(prompts), "new": new, "results": results}
        given.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def the_world(folder: Path) -> tuple[GLM, Tokenizer, list[Prompt], int]:
    """A small trained model and its prompts."""
    sys.path.insert(0, str(EXAMPLES))
    import minimal_experiments

    folder.mkdir(parents=True, exist_ok=True)
    world = minimal_experiments.make_world(folder, print)
    return world.base, world.tokenizer, (world.prompts * 2)[:128], minimal_experiments.MAX_NEW


def at_the_limit(given: argparse.Namespace) -> tuple[GLM, Tokenizer, list[Prompt], int]:
    """Random weights of the embedded model's shape, random contexts."""
    if given.shape == "6b":
        model = random_model(ModelConfig(), dtype=torch.bfloat16, device=given.device)
        tokenizer = Tokenizer.from_file(TOKENIZER, config=model.config)
    else:
        model = GLM(replace(read_config(EMBEDDED_MODEL / "config.json").quantized(0), torch_dtype="float32"))
        initialize(model, 0)
        model.eval().requires_grad_(False).to(given.device)
        tokenizer = Tokenizer.from_folder(EMBEDDED_MODEL)
    config = model.config
    most = max(map(int, given.batches.split(",")))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, config.mask_token_id - 900, (most, given.context - 2), generator=generator).tolist()
    prompts = [Prompt("", (*row, config.gmask_token_id)) for row in ids]
    return model, tokenizer, prompts, given.new


def hf_twin(model: GLM) -> Any:
    """The same weights under transformers."""
    known = to_original(model.config)
    keys = [key for key in (*ORIGINAL_KEYS, *OWN_KEYS) if key in known]
    with torch.device("meta"):
        twin = ChatGLMForConditionalGeneration(ChatGLMConfig(**{key: known[key] for key in keys}))
    twin.load_state_dict(model.state_dict(), assign=True)  # the very tensors
    return twin.eval()


@torch.inference_mode()
def generated(twin: Any, prompts: Sequence[Prompt], new: int, seed: int) -> int:
    """Tokens that `generate` made of these prompts as one batch, end tokens counted and padding not."""
    torch.manual_seed(seed)
    config = twin.config
    rows = [[*prompt.context, config.bos_token_id] for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[config.pad_token_id] * (width - len(row)) + row for row in rows], device=twin.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=twin.device)
    settings = GenerationConfig(
        max_new_tokens=new,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    made = twin.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, width:]
    ended = (made == config.eos_token_id).int().cumsum(dim=1)
    return int((ended == 0).sum() + (ended[:, -1] > 0).sum())


def measure(ways: dict[str, Callable[[int], int]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of each way, by the clock and of the processor; run in turn after one warm-up."""
    for way in ways.values():
        way(0)
    rates: dict[str, dict[str, list[float]]] = {name: {"clock": [], "processor": []} for name in ways}
    for number in range(1, repeats + 1):
        for name, way in ways.items():
            began, worked = time.perf_counter(), time.process_time()
            tokens = way(number)
            rates[name]["clock"].append(tokens / (time.perf_counter() - began))
            rates[name]["processor"].append(tokens / (time.process_time() - worked))
    return rates


def told(batch: int, rates: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Medians and their ratio, printed too."""
    result: dict[str, Any] = {"runs": rates}
    for clock in ("clock", "processor"):
        medians = {name: statistics.median(values[clock]) for name, values in rates.items()}
        ratio = medians["engine"] / medians["generate"]
        result |= {f"tokens_per_{clock}_s": medians, f"engine_over_generate_{clock}": ratio}
        said = ", ".join(f"{name} {rate:,.1f}" for name, rate in medians.items())
        print(f"batch {batch}, tokens per {clock} second: {said}; {ratio:.2f} times generate", flush=True)
    return result


if __name__ == "__main__":
    main()
