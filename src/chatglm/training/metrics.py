"""What a run leaves to look at: `metrics.jsonl`, TensorBoard's files, and a line on the screen.

MFU: floating-point operations that the model needs for the tokens that are no padding, by the formula of GLM-130B's
and PaLM's reports, over what the device could do: 6 · parameters + 12 · layers · hidden · length for a token.
Recomputing activations is not counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.atomic import write_whole
from ..config import ModelConfig
from ..errors import MissingExtraError

METRICS = "metrics.jsonl"

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bf16 operations a second, by a part of the device's name; from the makers' data sheets."""

Say = Callable[[str], None]


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Operations of forward and backward for one token of a row of `length` tokens."""
    return 6.0 * config.num_parameters + 12.0 * config.num_layers * config.hidden_size * length


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that a device could do at best in bf16; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK_FLOPS.items() if part in name), None)


class MetricsLog:
    """Appends a line of figures a logged step; with `resume_at`, lines of later steps are dropped first."""

    def __init__(self, out: Path, *, resume_at: int | None = None, tensorboard: bool = False) -> None:
        self.path = out / METRICS
        out.mkdir(parents=True, exist_ok=True)
        self.drop_after(-1 if resume_at is None else resume_at)
        self.board: Any = _board(out / "tensorboard", resume_at) if tensorboard else None

    def write(self, figures: Mapping[str, Any]) -> None:
        """One line; `step` is among the figures."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures, ensure_ascii=False) + "\n")
        if self.board is not None:
            for name, value in figures.items():
                if isinstance(value, int | float) and name != "step":
                    self.board.add_scalar(name, value, figures["step"])

    def drop_after(self, step: int) -> None:
        """Forget the lines of later steps, which will be written again."""
        if self.path.exists():
            lines = [line for line in read_lines(self.path) if line["step"] <= step]
            write_whole(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The figures of a metrics file; a last line that was cut by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _board(folder: Path, resume_at: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", extra="train", purpose="log.tensorboard") from error
    return SummaryWriter(str(folder), purge_step=None if resume_at is None else resume_at + 1)


def line_of(figures: Mapping[str, Any], total: int) -> str:
    """The progress line: step, loss, rate, and what went wrong if something did."""
    parts = [f"step {figures['step']:,}/{total:,}", f"loss {figures['loss']:.4f}", f"lr {figures['lr']:.2e}"]
    if "evaluation_loss" in figures:
        parts.append(f"held-out {figures['evaluation_loss']:.4f}")
    parts.append(f"norm {figures['norm']:.3g}")
    parts.append(f"{figures['tokens_per_s']:,.0f} tokens/s")
    if figures.get("mfu") is not None:
        parts.append(f"MFU {figures['mfu']:.1%}")
    if figures.get("nonfinite"):
        parts.append(f"{figures['nonfinite']} skipped")
    if figures.get("restores"):
        parts.append(f"{figures['restores']} spikes")
    return " · ".join(parts)
