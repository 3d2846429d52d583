"""How many requests a machine serves, computed from measured figures: the tables of docs/deploy.md.

    python benchmarks/sizing.py            # prints the tables as Markdown; a test compares them with the document

Measured: weights in memory, seconds of a first pass and of a decode step (benchmarks/results/gpu-h100.json, batch 1 and
32, and cpu-zen4-2-cores.json, batch 1). Computed: everything else, by

    sequences at once  = (memory - weights - reserve) / (458,752 B * tokens)
    t_prefill(p)       = (11.3e9 p + 459e3 p^2) / F,  F from the measured pass of 512 tokens
    t_step(B)          on the line between the measured steps of batch 1 and 32 (not beyond 32), and for longer
                       sequences than the measured ones the time to read their keys and values at the measured bandwidth
    requests a second  = u / (t_prefill(p) + g * t_step(B) / B),  u = 0.7 so that a queue stays short
    reply              = t_prefill(p) + g * t_step(B) * (1 + t_prefill(p) * requests a second)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
KV_BYTES = 28 * 2 * 4096 * 2
"""Of one token of ChatGLM-6B in fp16."""

BUSY = 0.7
QUESTIONS_A_MINUTE = 1.0
CARDS = (
    ("16 GB", 15e9, 1e9),
    ("24 GB", 23e9, 1e9),
    ("48 GB", 46e9, 1.5e9),
    ("80 GB", 78e9, 2e9),
    ("141 GB", 149e9, 3e9),
)
"""Name, usable bytes, reserve for activations and graphs."""

LOADS = ((512, 256), (1024, 512))
"""Tokens of prompt and answer."""


@dataclass(frozen=True)
class Measured:
    """A machine with one form of the weights. Seconds; `steps` by batch, of sequences of `held` tokens."""

    name: str
    prefill_512: float
    steps: dict[int, float]
    held: float
    bandwidth: float

    def prefill(self, prompt: int) -> float:
        """Seconds of a first pass alone."""
        return self.prefill_512 * _work(prompt) / _work(512)

    def step(self, prompt: int, answer: int, batch: int) -> float:
        """Seconds of a decode step in the middle of the answers."""
        low, high = min(self.steps), max(self.steps)
        share = (batch - low) / (high - low) if high > low else 0.0
        measured = self.steps[low] + (self.steps[high] - self.steps[low]) * share
        return measured + KV_BYTES * batch * (prompt + answer / 2 - self.held) / self.bandwidth

    def rate(self, prompt: int, answer: int, batch: int) -> float:
        """Requests a second that leave a share of the time free."""
        return BUSY / (self.prefill(prompt) + answer * self.step(prompt, answer, batch) / batch)

    def reply(self, prompt: int, answer: int, batch: int) -> float:
        """Seconds of a reply at that rate, its wait in the queue left out."""
        passes = self.prefill(prompt) * self.rate(prompt, answer, batch)
        return self.prefill(prompt) + answer * self.step(prompt, answer, batch) * (1 + passes)


def _work(prompt: int) -> float:
    return 11.3e9 * prompt + 459e3 * prompt**2


def gpu() -> list[Measured]:
    """One H100: fp16 and INT4 at batch 1 and 32."""
    runs = json.loads((RESULTS / "gpu-h100.json").read_text())["runs"]
    found = []
    for form in ("fp16", "int4"):
        one, many = runs[f"{form} batch 1"], runs[f"{form} batch 32"]
        steps = {run["batch"]: run["decode_ms"]["median"] / 1000 for run in (one, many)}
        prefill = many["prefill_ms"]["median"] / 1000 / many["batch"]
        held = many["prompt_tokens"] + many["new_tokens"] / 2
        found.append(Measured(f"H100 80 GB, {form}", prefill, steps, held, many["copy_bytes_per_s"]))
    return found


def cpu() -> Measured:
    """Two cores, INT4, one answer at a time."""
    run = json.loads((RESULTS / "cpu-zen4-2-cores.json").read_text())["results"]["int4"]
    prefill = 512 / run["prefill_tokens_per_s"]
    steps = {1: 1 / run["decode_tokens_per_s"]}
    return Measured("2 cores of an EPYC, int4", prefill, steps, run["prompt_tokens"], run["read_bytes_per_s"])


def weights() -> dict[str, float]:
    """Bytes in memory by form, measured."""
    runs = json.loads((RESULTS / "gpu-h100.json").read_text())["runs"]
    return {form: runs[f"{form} batch 1"]["memory"]["weights"] for form in ("fp16", "int8", "int4")}


def memory_table() -> str:
    """Sequences at once by card and form."""
    sizes = weights()
    heads = [f"{form} ({size / 1e9:.2f} GB)" for form, size in sizes.items()]
    lines = [f"| card | {' | '.join(heads)} |", "| --- |" + " --- |" * len(sizes)]
    for name, usable, reserve in CARDS:
        cells = []
        for size in sizes.values():
            counts = [int((usable - size - reserve) // (KV_BYTES * tokens)) for tokens in (1024, 2048)]
            cells.append(" / ".join(str(max(0, count)) for count in counts))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rate_table() -> str:
    """Requests a second, seconds of a reply, people."""
    heads = "| machine, weights | answers at once | prompt + answer | first pass | step | tokens/s | requests/s |"
    lines = [f"{heads} reply | people |", "| --- |" + " --- |" * 8]
    shapes = [(machine, batch) for machine in gpu() for batch in (8, 16, 32)] + [(cpu(), 1)]
    for machine, batch in shapes:
        for prompt, answer in LOADS:
            rate = machine.rate(prompt, answer, batch)
            numbers = (
                _time(machine.prefill(prompt)), _time(machine.step(prompt, answer, batch)), f"{rate * answer:,.0f}",
                f"{rate:.1f}" if rate >= 0.1 else f"{rate:.3f}", _time(machine.reply(prompt, answer, batch)),
                f"{people:,.0f}" if (people := rate * 60 / QUESTIONS_A_MINUTE) >= 1 else "< 1",
            )  # fmt: skip
            mark = "" if batch in machine.steps else "*"
            lines.append(f"| {machine.name} | {batch}{mark} | {prompt} + {answer} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"


def tables() -> str:
    """Both, as the document has them."""
    return f"{memory_table()}\n\n{rate_table()}"


if __name__ == "__main__":
    print(tables())
