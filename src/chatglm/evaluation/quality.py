"""The suite `quality`: what each form of the weights costs, against the fp32 weights of the same checkpoint."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoint import check, open_checkpoint
from ..errors import RequestError
from ..model import GLM
from ..quantization.calibration_text import CalibrationText
from ..tokenizer import Tokenizer
from ..tokenizer.examples import Example, read_examples
from .agreement import Divergence, divergence, greedy_answers
from .forms import STORED, Form, description, form_named, model_in
from .memory_of import weight_bytes_of
from .scoring import Reference, Score, make_reference, score

DATA = Path(__file__).parent / "data"

OWN_TEXT = tuple(DATA / name for name in ("chat_zh.jsonl", "chat_en.jsonl", "text_zh.txt", "text_en.txt"))
"""Written for this purpose; never calibrated on."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class QualitySettings:
    """What is compared, on which text.

    sources  one folder: its `forms` against its own fp32 weights. Several: each as it is stored, against the first in
             fp32; their tokenizers must be the same
    forms    names as form_named reads them
    files    dialogues (.jsonl) and text (.txt)
    most     so many dialogues, or spans of a text, of each file; None: all
    device   where models run
    """

    sources: tuple[Path, ...]
    forms: tuple[str, ...]
    files: tuple[Path, ...] = OWN_TEXT
    most: int | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a constant
    calibration: CalibrationText = CalibrationText()  # noqa: RUF009 - frozen


def measure_quality(settings: QualitySettings, progress: Progress | None = None) -> dict[str, Any]:
    """One report: `settings`, `text` (counts and hashes), and a row for each form.

    Raises CheckpointError for a damaged checkpoint and RequestError for an unknown form or text that cannot be read,
    before anything is loaded.
    """
    return _Quality(settings, progress).run()


class _Quality:
    def __init__(self, settings: QualitySettings, progress: Progress | None) -> None:
        self.settings, self.progress = settings, progress
        self.base = settings.sources[0]
        for source in settings.sources:
            check(source)
        self.candidates = list(self._candidates())
        config = open_checkpoint(self.base).config
        tokenizer = Tokenizer.from_folder(self.base, config=config)
        for source in settings.sources[1:]:
            if Tokenizer.from_folder(source).file.sha256 != tokenizer.file.sha256:
                raise RequestError(f"{source} has another tokenizer than {self.base}", cure="compare them one by one")
        for _, form in self.candidates:
            description(config, form)
        limit = config.max_sequence_length
        self.sets = {file: read_examples(file, tokenizer, limit, most=settings.most) for file in settings.files}
        for file, examples in self.sets.items():
            if not examples:
                raise RequestError(f"{file} holds nothing to score", cure="give dialogues or text")
        self.examples = [example for examples in self.sets.values() for example in examples]
        self.done = 0
        self.total = (len(self.candidates) + 1) * sum(len(example.answer_ids) for example in self.examples)

    def _candidates(self) -> Iterator[tuple[Path, Form]]:
        if len(self.settings.sources) > 1:
            yield from ((source, form_named(STORED)) for source in self.settings.sources)
        else:
            yield from ((self.base, form_named(name)) for name in self.settings.forms)

    def run(self) -> dict[str, Any]:
        model = model_in(self.base, form_named("fp32"), self.settings.device)
        reference = make_reference(model, self.examples)
        base = score(model, self.examples, reference=reference, count=self._count("fp32"))
        dialogues = [example for example in self.examples if example.answer_ids[-1] == model.config.eos_token_id]
        answers = greedy_answers(model, dialogues) if dialogues else []
        del model
        rows = []
        for source, form in self.candidates:
            model = model_in(source, form, self.settings.device, self.settings.calibration)
            name = source.name if form.name == STORED else form.name
            rows.append({"form": name, **self._row(model, source, form, base, reference, answers)})
            del model
        return {**self._facts(base), "rows": rows}

    def _row(
        self, model: GLM, source: Path, form: Form, base: Score, reference: Reference, answers: Sequence[Example]
    ) -> dict[str, Any]:
        found = score(model, self.examples, reference=reference, count=self._count(form.name))
        assert found.divergence is not None
        left = divergence(score(model, answers), answers) if answers else Divergence(1.0, 1.0, 0.0)
        return {
            "weight_bytes": weight_bytes_of(source, form),
            "perplexity": found.perplexity,
            "perplexity_change": found.perplexity / base.perplexity - 1,
            "bits_per_byte": found.bits_per_byte,
            "divergence": float(found.divergence.mean()),
            "equal_next_tokens": found.agreement(base),
            "equal_answers": left.equal_answers,
            "first_difference": left.first_difference,
            "files": self._by_file(found, base),
        }

    def _by_file(self, found: Score, base: Score) -> dict[str, dict[str, float]]:
        """Perplexity and its change for each file."""
        lengths = [sum(len(example.answer_ids) for example in examples) for examples in self.sets.values()]
        pieces = zip(self.sets, found.nats.split(lengths), base.nats.split(lengths), strict=True)
        return {
            file.name: {
                "perplexity": float(own.mean().exp()),
                "perplexity_change": float((own.mean() - other.mean()).exp()) - 1,
            }
            for file, own, other in pieces
        }

    def _facts(self, base: Score) -> dict[str, Any]:
        return {
            "suite": "quality",
            "model": self.base.resolve().name,
            "reference": "fp32",
            "reference_perplexity": base.perplexity,
            "scored_tokens": base.tokens,
            "scored_bytes": base.bytes,
            "files": [
                {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "examples": len(examples)}
                for file, examples in self.sets.items()
            ],
            "calibration_seed": self.settings.calibration.seed,
            "device": str(self.settings.device),
            "versions": {"chatglm": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }

    def _count(self, name: str) -> Callable[[int], None]:
        def count(tokens: int) -> None:
            self.done += tokens
            if self.progress is not None:
                self.progress(self.done, self.total, name)

        return count
