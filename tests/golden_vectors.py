"""Reading the golden cases: values are plain JSON or name a tensor in the file beside."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from chatglm.config import ModelConfig, read_config
from chatglm.model import GLM

GOLDEN = Path(__file__).parent / "data" / "golden"


@dataclass(frozen=True)
class Case:
    """One recorded case; `inputs` and `outputs` hold tensors and plain values."""

    id: str
    kind: str
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    raw: dict[str, Any]


def cases(name: str, *kinds: str) -> list[Case]:
    """The cases of `cases/<name>.json` (or `quant/<name>.json`) of these kinds."""
    folder = GOLDEN / ("quant" if name.startswith(("checkpoint-", "packing")) else "cases")
    described = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / f"{name}.safetensors")

    def value(item: Any) -> Any:
        return tensors[item["tensor"]] if isinstance(item, dict) and "tensor" in item else item

    return [
        Case(
            case["id"],
            case["kind"],
            {key: value(item) for key, item in case.get("inputs", {}).items()},
            {key: value(item) for key, item in case.get("outputs", {}).items()},
            case,
        )
        for case in described["cases"]
        if not kinds or case["kind"] in kinds
    ]


def tensors_of(name: str) -> dict[str, Tensor]:
    """All tensors of `models/<name>`, read independently of the checkpoint room."""
    folder = GOLDEN / "models" / name
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.bin")):
        found |= torch.load(file, weights_only=True)
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return {key: tensor for key, tensor in found.items() if "inv_freq" not in key}


def plain_model(name: str, dtype: torch.dtype = torch.float32) -> GLM:
    """`models/<name>` (not a quantised one) in the reference network."""
    config: ModelConfig = read_config(GOLDEN / "models" / name / "config.json")
    model = GLM(config)
    state = {key: tensor.float() for key, tensor in tensors_of(name).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_head()
    return model.to(dtype).eval()


def assert_close(actual: Tensor, expected: Tensor, bound: float = 1e-4) -> None:
    """Largest difference at most `bound` of the largest expected magnitude (golden/README.md, Tolerances)."""
    assert actual.shape == expected.shape
    difference = (actual.float() - expected.float()).abs().max().item()
    largest = expected.float().abs().max().item()
    assert difference <= bound * largest, f"largest difference {difference:.3g}, largest magnitude {largest:.3g}"
