"""Pictures of `metrics.jsonl`: loss, learning rate, gradient norms, speed; several runs in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, TrainingError
from .metrics import METRICS, read_lines

PANELS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("loss", ("loss", "evaluation_loss"), False),
    ("loss by objective", tuple(f"loss_{name}" for name in ("token", "sentence", "document", "instruction")), False),
    ("gradient norm", ("norm", "norm_embedding", "norm_layer_0", "norm_others"), True),
    ("learning rate", ("lr",), False),
    ("tokens/s", ("tokens_per_s",), False),
    ("MFU", ("mfu",), False),
)
"""Title, figures, logarithmic."""

OTHERS = ("reward", "kl", "accuracy", "entropy", "margin", "length", "clip", "ratio", "rate")
"""Parts of further figures' names that get a panel of their own, for the stages that learn from preferences."""


def plot(runs: Sequence[Path], target: Path) -> list[str]:
    """Draw the runs into one picture (PNG, SVG or PDF by the name's end); returns the titles of its panels.

    runs  run folders, or their metrics.jsonl
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib", extra="train", purpose="chatglm train plot") from error
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    tables = {_name(run): _table(run) for run in runs}
    panels = _panels(tables)
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 3.2 * rows), layout="constrained")
    for number, (title, names, is_logarithmic) in enumerate(panels):
        axes = figure.add_subplot(rows, 2, number + 1)
        for run, table in tables.items():
            for name in names:
                points = [(line["step"], line[name]) for line in table if line.get(name) is not None]
                if points:
                    label = name if len(tables) == 1 else f"{run}: {name}"
                    marker = "." if len(points) < 3 else None
                    axes.plot(*zip(*points, strict=True), label=label, linewidth=1, marker=marker)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
        if is_logarithmic:
            axes.set_yscale("log")
        axes.legend(fontsize=7)
    temporary = target.with_name(f".{target.stem}.saving{target.suffix}")
    try:
        figure.savefig(temporary, dpi=120)
    except ValueError as error:
        raise TrainingError(
            f"{target} cannot be drawn: {error}", cure="a name that ends in .png, .svg or .pdf"
        ) from error
    temporary.replace(target)
    return [title for title, _, _ in panels]


def _table(run: Path) -> list[dict[str, Any]]:
    path = run / METRICS if run.is_dir() else run
    if not path.is_file():
        raise TrainingError(f"there is no {path}", cure="name a run folder of `chatglm train`")
    table = read_lines(path)
    if not table:
        raise TrainingError(f"{path} holds no step yet")
    return table


def _name(run: Path) -> str:
    return run.parent.name if run.name == METRICS else run.resolve().name


def _panels(tables: dict[str, list[dict[str, Any]]]) -> list[tuple[str, tuple[str, ...], bool]]:
    """Those that have something to show."""
    known = {name for table in tables.values() for line in table for name, value in line.items() if _is_number(value)}
    panels = [(title, tuple(n for n in names if n in known), log) for title, names, log in PANELS]
    drawn = {name for _, names, _ in panels for name in names} | {f"loss_{name}" for name in ("dialogue", "scale")}
    more = sorted(name for name in known - drawn if any(part in name for part in OTHERS))
    return [panel for panel in panels if panel[1]] + [(name, (name,), False) for name in more]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
