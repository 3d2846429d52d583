"""The suites of `chatglm eval`: each runs what was asked and says how its report looks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ..errors import RequestError
from .conversation import write_beside
from .progress import ProgressBar
from .units import plural


@dataclass(frozen=True)
class Asked:
    """The options of the command, checked; see its help."""

    folders: tuple[Path, ...]
    forms: str | None
    text: tuple[Path, ...]
    data: Path | None
    prompt_column: str | None
    answer_column: str | None
    judge: dict[str, Any] | None
    official: bool
    max_new_tokens: int
    predictions: Path | None
    most: int | None
    seed: int
    device: str


@dataclass(frozen=True)
class Measured:
    """A report, the cells of its table with the header first, and notes for a person."""

    report: dict[str, Any]
    cells: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def table(self, markdown: bool) -> str:
        from ..evaluation.table import as_markdown, as_text

        return as_markdown(self.cells) if markdown else as_text(self.cells)


def judge_settings(rules: str) -> dict[str, Any]:
    """`full_sentence,max_characters=80,keyword=please` as the settings of a judge. Raises a usage error."""
    from ..evaluation.judges import judge_of

    settings: dict[str, Any] = {}
    for rule in rules.split(","):
        name, _, value = rule.strip().partition("=")
        settings[name] = int(value) if value.isdigit() else value or True
    try:
        judge_of(settings)
    except RequestError as error:
        raise typer.BadParameter(str(error)) from error
    return settings


def quality(asked: Asked, progress: ProgressBar) -> Measured:
    """What each form of the weights costs."""
    from ..engine.placement import choose_device
    from ..evaluation.forms import fitting_forms
    from ..evaluation.quality import OWN_TEXT, QualitySettings, measure_quality
    from ..evaluation.table import rows_of
    from ..quantization.calibration_text import CalibrationText

    settings = QualitySettings(
        asked.folders,
        tuple(name.strip() for name in asked.forms.split(",")) if asked.forms else fitting_forms(asked.folders[0]),
        asked.text or OWN_TEXT,
        asked.most,
        choose_device(asked.device),
        CalibrationText(seed=asked.seed),
    )
    report = measure_quality(settings, progress)
    return Measured(report, rows_of(report), (summary(report), "Try: chatglm quantize MODEL --dtype int4 --out DIR"))


def summary(report: dict[str, Any]) -> str:
    """What was scored, on one line."""
    files = plural(len(report["files"]), "file")
    return (
        f"{report['scored_tokens']:,} tokens ({report['scored_bytes']:,} bytes) of {files} scored "
        f"on {report['device']}; "
        f"reference: fp32, perplexity {report['reference_perplexity']:.3f}; "
        "divergence in thousandths of a nat a token"
    )


def ability(asked: Asked, progress: ProgressBar) -> Measured:
    """What models can do in general."""
    from ..engine.placement import choose_device
    from ..evaluation.ability import measure_ability
    from ..evaluation.quality import OWN_TEXT

    report = measure_ability(
        asked.folders,
        files=asked.text or OWN_TEXT,
        device=choose_device(asked.device),
        seed=asked.seed,
        most=asked.most,
        progress=progress,
    )
    cells = [["model", "bits/byte", "choices right", "blanks exact", "blank tokens right", *report["files"]]]
    for row in report["rows"]:
        shares = [f"{row[name]:.1%}" for name in ("choices", "blanks_exact", "blanks_tokens")]
        cells.append(
            [row["model"], f"{row['bits_per_byte']:.4f}", *shares, *map("{:.4f}".format, row["files"].values())]
        )
        if "change" in row:
            change = row["change"]
            points = [f"{100 * change[name]:+.1f}" for name in ("choices", "blanks_exact", "blanks_tokens")]
            cells.append(["  change", f"{change['bits_per_byte']:+.4f}", *points, *("" for _ in report["files"])])
    details = report["rows"][0]["details"]
    chance = details["choices"]["by_chance"]
    note = f"{details['choices']['questions']} questions ({chance:.0%} by chance), {details['blanks']['blanks']} blanks"
    return Measured(report, cells, (note,))


def answers(asked: Asked, progress: ProgressBar) -> Measured:
    """Answers against wanted ones."""
    from ..evaluation.answers import GREEDY, Answering, measure_answers
    from ..evaluation.judges import judge_of
    from ..evaluation.pairs import read_pairs

    assert asked.data is not None
    pairs = read_pairs(
        asked.data,
        prompt_column=asked.prompt_column,
        answer_column=asked.answer_column,
        needs_answers=asked.judge is None,
        most=asked.most,
    )
    sampling = {"temperature": 0.95, "top_p": 0.7, "top_k": 0} if asked.official else GREEDY
    answering = Answering(device=asked.device, sampling=sampling, seed=asked.seed, max_new_tokens=asked.max_new_tokens)
    judge = judge_of(asked.judge) if asked.judge else None
    report = measure_answers(asked.folders, pairs, answering, judge=judge, count=progress)
    found = report.pop("answers")
    if asked.predictions is not None:
        lines = [json.dumps(line, ensure_ascii=False) for line in found]
        write_beside(asked.predictions, "\n".join(lines) + "\n")
    names = list(dict.fromkeys(name for row in report["rows"] for name in row))
    cells = [[name.replace("_", " ") for name in names]]
    cells += [[_cell(name, row.get(name)) for name in names] for row in report["rows"]]
    notes = [f"{report['questions']} questions, {'sampled' if asked.official else 'greedy'}"]
    if report["win_rate_against"]:
        notes.append(f"win-rate against: {report['win_rate_against']}")
    return Measured(report, cells, notes)


def _cell(name: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.1%}" if name in ("judged", "win_rate") else f"{value:.2f}"


SUITES: dict[str, tuple[Callable[[Asked, ProgressBar], Measured], str]] = {
    "quality": (quality, "tokens"),
    "ability": (ability, "models"),
    "answers": (answers, "answers"),
}
"""Each with the unit of its progress."""
