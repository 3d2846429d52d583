"""Ways to choose INT4 codes on the embedded model: plain rounding, calibrated scales, AWQ-like scaling, GPTQ.

    python benchmarks/quantization_methods.py --text FILE… --out benchmarks/results/quantization-methods.json

All have the same storage, groups of INT4 in the linears and INT8 in embedding and head, except the AWQ-like one: it
multiplies the columns of a weight by s and the inputs by 1 / s. In a GLM block 1 / s cannot be folded into the layer
norm, whose output is also the residual, so it would be a vector at run time for two of the four linears of a layer, and
behind the gelu for a third; here every linear has one, which is the best that such scaling could do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from chatglm.chat import EMBEDDED_MODEL
from chatglm.engine.placement import choose_device
from chatglm.evaluation.forms import form_named, model_in
from chatglm.evaluation.quality import OWN_TEXT
from chatglm.evaluation.scoring import make_reference, score
from chatglm.model import GLM
from chatglm.quantization import dequantize_groups, dequantize_model, quantize_groups
from chatglm.quantization.calibration import Calibration
from chatglm.quantization.calibration_text import CalibrationText
from chatglm.quantization.gptq import gptq
from chatglm.quantization.group_format import CLIP_FACTORS
from chatglm.quantization.swap import swap_tables_as_described
from chatglm.tokenizer import Tokenizer
from chatglm.tokenizer.examples import read_examples

Choice = Callable[[Tensor, Tensor, int], Tensor]
"""(weight, Hessian, group size) → the weight that the codes stand for."""


def plain(weight: Tensor, hessian: Tensor, group_size: int) -> Tensor:
    return dequantize_groups(*quantize_groups(weight, 4, group_size), 4, torch.float32)


def without_search(weight: Tensor, hessian: Tensor, group_size: int) -> Tensor:
    return dequantize_groups(*quantize_groups(weight, 4, group_size, search=False), 4, torch.float32)


def by_gptq(weight: Tensor, hessian: Tensor, group_size: int) -> Tensor:
    return dequantize_groups(*gptq(weight, hessian, 4, group_size), 4, torch.float32)


def weighted_search(weight: Tensor, hessian: Tensor, group_size: int) -> Tensor:
    """Plain rounding, but the error that a clipping factor is judged by counts large inputs more."""
    groups = weight.unflatten(-1, (-1, group_size))
    importance = hessian.diagonal().unflatten(0, (-1, group_size))
    extreme = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    best = torch.full_like(extreme, torch.inf)
    found = torch.zeros_like(groups)
    for factor in CLIP_FACTORS:
        scale = (extreme * (factor / -8)).half().float()
        back = (groups / scale).nan_to_num().round().clamp(-8, 7) * scale
        error = ((back - groups).square() * importance).sum(dim=-1, keepdim=True)
        found = torch.where(error < best, back, found)
        best = torch.minimum(error, best)
    return found.flatten(-2)


def awq(weight: Tensor, hessian: Tensor, group_size: int) -> Tensor:
    """Columns scaled by (root mean square input) ** alpha, alpha by the error of the output. Source: AWQ §3.2."""
    size = hessian.diagonal().clamp(min=1e-12).sqrt()
    best, found = torch.inf, weight
    for step in range(11):
        scale = size ** (step / 10)
        scale = scale / (scale.max() * scale.min()).sqrt()
        back = plain(weight * scale, hessian, group_size) / scale
        error = float(((back - weight) @ hessian * (back - weight)).sum())
        if error < best:
            best, found = error, back
    return found


CHOICES: dict[str, Choice] = {
    "rtn, no search": without_search,
    "rtn": plain,
    "rtn, search weighted by inputs": weighted_search,
    "AWQ-like, a vector before every linear": awq,
    "gptq": by_gptq,
}


class Chosen(Calibration):
    """A calibration that puts the chosen weights back as floats."""

    choice: Choice

    def _replace(self, parent: nn.Module, name: str, hessian: Tensor, bits: int, group_size: int) -> None:
        linear = parent.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight = nn.Parameter(type(self).choice(linear.weight, hessian, group_size), requires_grad=False)


def with_choice(choice: Choice, group_size: int, device: torch.device, text: CalibrationText) -> GLM:
    model = model_in(EMBEDDED_MODEL, form_named("fp32"), device)
    tokenizer = Tokenizer.from_folder(EMBEDDED_MODEL)
    kind = type("Chosen", (Chosen,), {"choice": staticmethod(choice)})
    run = kind(text.examples(tokenizer, 1024), model.config, model.transformer.embed, device)
    for layer in model.transformer.layers:
        run.quantize(layer, 4, group_size)
    tables = model.config.quantized(4, group_size)
    return dequantize_model(swap_tables_as_described(model, tables), torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, nargs="*", default=list(OWN_TEXT))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--groups", type=int, nargs="*", default=[32, 64, 128])
    parser.add_argument("--calibration-tokens", type=int, default=98_304)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = choose_device(arguments.device)
    tokenizer = Tokenizer.from_folder(EMBEDDED_MODEL)
    examples = [example for file in arguments.text for example in read_examples(file, tokenizer, 1024)]
    base = model_in(EMBEDDED_MODEL, form_named("fp32"), device)
    reference = make_reference(base, examples)
    fp32 = score(base, examples)
    text = CalibrationText(most_tokens=arguments.calibration_tokens)
    rows = []
    for group_size in arguments.groups:
        for name, choice in CHOICES.items():
            found = score(with_choice(choice, group_size, device, text), examples, reference=reference)
            assert found.divergence is not None
            rows.append(
                {
                    "group_size": group_size,
                    "method": name,
                    "perplexity_change": found.perplexity / fp32.perplexity - 1,
                    "divergence": float(found.divergence.mean()),
                    "equal_next_tokens": found.agreement(fp32),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    record = {
        "text": [file.name for file in arguments.text],
        "scored_tokens": fp32.tokens,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
