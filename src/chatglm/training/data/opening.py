"""From names of prepared sets to one stream of rows: the sets' parts, their objectives, their shares.

A mixture file (`chatglm data mix`) is JSON: `{"format": "chatglm-mixture", "version": 1, "sets": [{"set": FOLDER,
"part": "text", "weight": 0.7, "texts": "joined", "objective": "chatglm-6b"}, …]}`; folders are relative to the file.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from chatglm.config import ModelConfig
from chatglm.errors import TrainingError
from chatglm.tokenizer import Tokenizer

from ..objective import Objective, SpecialIds, named_mixture
from .instructions import InstructionPieces
from .layout import sentence_ends
from .mixing import MixedStream
from .prepared import INDEX_FILE, PARTS, PreparedSet
from .remote import ENDLESS, PREFIX, open_remote, remote_tokenizer
from .streams import AnswerPieces, PackedStream, Stream, TextPieces, TextStream

MIXTURE_FORMAT = "chatglm-mixture"


@dataclass(frozen=True)
class Ingredient:
    """One part of a mixture.

    set        the folder of a prepared set, or `datasets:NAME?…`, a corpus that is streamed (remote.py)
    part       text, dialogue, instruction (dialogues as GLM-130B's prompted data sets), or all that there is
    weight     share of the rows; None: as many as its rows
    texts      joined: texts one after the other, cut into rows; apart: each a sample of its own, packed
    objective  the mixture of blank infilling for texts, by name
    """

    set: str
    part: Literal["text", "dialogue", "instruction", "all"] = "all"
    weight: float | None = None
    texts: Literal["joined", "apart"] = "joined"
    objective: str = "chatglm-6b"

    def __post_init__(self) -> None:
        for name, allowed in (("part", (*PARTS, "instruction", "all")), ("texts", ("joined", "apart"))):
            if getattr(self, name) not in allowed:
                raise TrainingError(f"{self.set}: `{name}` is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.weight is not None and not 0 <= self.weight < float("inf"):
            raise TrainingError(f"{self.set}: weight {self.weight} is no share; it must be 0 or more")


def open_stream(
    data: str | Path | Sequence[Ingredient | str | Path],
    *,
    length: int,
    seed: int,
    encoding: str = "2d",
    objective: str | None = None,
    config: ModelConfig | None = None,
    tokenizer: Tokenizer | None = None,
    with_sources: bool = False,
) -> Stream:
    """The stream of a prepared folder, a mixture file, or several of them.

    length        tokens a row
    encoding      "2d", or "1d" for models with one position row
    objective     overrides the named objective of every text
    config        the model's: ids that differ from the data's are refused
    tokenizer     for streamed corpora that name none
    with_sources  samples carry the name of their source
    Raises TrainingError.
    """
    ingredients = ingredients_of(data)
    streams: list[Stream] = []
    weights: list[float | None] = []
    for ingredient in ingredients:
        chosen = ingredient if objective is None else replace(ingredient, objective=objective)
        if chosen.set.startswith(PREFIX):
            streams.append(_remote(chosen, length, seed, encoding, config, tokenizer))
            weights.append(ingredient.weight)
            continue
        for stream, share in _streams(chosen, length, seed, encoding, config, with_sources):
            streams.append(stream)
            weights.append(None if ingredient.weight is None else ingredient.weight * share)
    if len(streams) == 1:
        return streams[0]
    return MixedStream(streams, _filled(weights, streams), seed=seed)


def ingredients_of(data: str | Path | Sequence[Ingredient | str | Path]) -> list[Ingredient]:
    """The ingredients that names stand for."""
    if not isinstance(data, str | Path):
        return [found for item in data for found in ([item] if isinstance(item, Ingredient) else ingredients_of(item))]
    if isinstance(data, str) and data.startswith(PREFIX):
        return [Ingredient(data)]
    path = Path(data)
    if path.is_dir() or not path.exists():
        PreparedSet.open(path)  # says what is wrong with it
        return [Ingredient(str(path))]
    if path.name == INDEX_FILE:
        return [Ingredient(str(path.parent))]
    return read_mixture(path)


def read_mixture(path: Path) -> list[Ingredient]:
    """The ingredients of a mixture file. Raises TrainingError for anything else, with unknown keys by name."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != MIXTURE_FORMAT or found["version"] != 1:
            raise ValueError(f"format {found['format']!r}, version {found['version']!r}")
        sets: list[dict[str, Any]] = list(found["sets"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{path} is no mixture file ({type(error).__name__}: {error})",
            cure="chatglm data mix SET=WEIGHT … --out FILE",
        ) from error
    known = [field.name for field in fields(Ingredient)]
    ingredients: list[Ingredient] = []
    for entry in sets:
        for key in entry:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise TrainingError(
                    f"{path}: unknown key `{key}`", cure=f"did you mean `{near[0]}`?" if near else f"known: {known}"
                )
        if "set" not in entry:
            raise TrainingError(f"{path}: an entry of `sets` has no `set`")
        is_remote = str(entry["set"]).startswith(PREFIX)
        ingredients.append(Ingredient(**(entry if is_remote else {**entry, "set": str(path.parent / entry["set"])})))
    return ingredients


def write_mixture(path: Path, ingredients: Sequence[Ingredient]) -> None:
    """A mixture file, written beside and renamed; folders inside the file's own become relative."""
    sets = []
    for ingredient in ingredients:
        if ingredient.set.startswith(PREFIX):
            sets.append(asdict(ingredient))
            continue
        folder = Path(ingredient.set).resolve()
        inside = folder.is_relative_to(path.parent.resolve())
        sets.append({**asdict(ingredient), "set": str(folder.relative_to(path.parent.resolve()) if inside else folder)})
    text = json.dumps({"format": MIXTURE_FORMAT, "version": 1, "sets": sets}, ensure_ascii=False, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{path.name}.tmp")
    written.write_text(f"{text}\n", encoding="utf-8")
    written.replace(path)


def special_ids(prepared: PreparedSet) -> SpecialIds:
    """The ids that a set was prepared with."""
    return SpecialIds(**prepared.index["ids"])


def _streams(
    ingredient: Ingredient, length: int, seed: int, encoding: str, config: ModelConfig | None, with_sources: bool
) -> list[tuple[Stream, float]]:
    """The streams of one set and their shares of it."""
    prepared = PreparedSet.open(ingredient.set)
    ids = special_ids(prepared)
    if config is not None:
        _check_ids(prepared, ids, config)
    names = prepared.sources if with_sources else None
    streams: list[Stream] = []
    if ingredient.part in ("text", "all") and prepared.text.documents:
        mixture = named_mixture(ingredient.objective)
        ends = _sentence_ends(prepared) if mixture.sentence else None
        objective = Objective(ids, mixture, "1d" if encoding == "1d" else "2d", ends)
        if ingredient.texts == "joined":
            streams.append(TextStream(prepared.text, objective, length=length, seed=seed, sources=names))
        else:
            pieces = TextPieces(prepared.text, objective, length=length, seed=seed, sources=names)
            streams.append(PackedStream(pieces, length=length, seed=seed))
    if ingredient.part in ("dialogue", "all") and prepared.dialogue.documents:
        official = bool(prepared.index["made_of"]["layout"]["official"])
        answers = AnswerPieces(prepared.dialogue, ids.sop, encoding, official, names)
        streams.append(PackedStream(answers, length=length, seed=seed))
    if ingredient.part == "instruction" and prepared.dialogue.documents:
        window = length // named_mixture(ingredient.objective).parts
        prompted = InstructionPieces(prepared.dialogue, ids, window=window, seed=seed, encoding=encoding, sources=names)
        streams.append(PackedStream(prompted, length=length, seed=seed))
    if not streams:
        raise TrainingError(f"{ingredient.set} has no part `{ingredient.part}`", cure="`chatglm data inspect` shows it")
    rows = sum(stream.rows_per_epoch for stream in streams)
    return [(stream, stream.rows_per_epoch / rows) for stream in streams]


def _remote(
    ingredient: Ingredient,
    length: int,
    seed: int,
    encoding: str,
    config: ModelConfig | None,
    tokenizer: Tokenizer | None,
) -> Stream:
    found = remote_tokenizer(ingredient.set, tokenizer)
    if config is not None:
        found.check_against(config)
    mixture = named_mixture(ingredient.objective)
    ends = sentence_ends(found) if mixture.sentence else None
    objective = Objective(SpecialIds.of_tokenizer(found), mixture, "1d" if encoding == "1d" else "2d", ends)
    return open_remote(ingredient.set, objective, length=length, seed=seed, tokenizer=found)


def _filled(weights: Sequence[float | None], streams: Sequence[Stream]) -> list[float]:
    """Weights where all are given; rows where none is and all are known. Raises TrainingError otherwise."""
    if all(weight is None for weight in weights) and not any(s.rows_per_epoch >= ENDLESS for s in streams):
        return [float(stream.rows_per_epoch) for stream in streams]
    if any(weight is None for weight in weights):
        raise TrainingError(
            "a set of the mixture has no weight, where others have one or a streamed corpus is of unknown size",
            cure="give each one a weight",
        )
    return [float(weight) for weight in weights if weight is not None]


def _check_ids(prepared: PreparedSet, ids: SpecialIds, config: ModelConfig) -> None:
    wanted = SpecialIds.of_config(config)
    wrong = [
        f"{name} is {getattr(ids, name)} in the data, {getattr(wanted, name)} in the model"
        for name in ("mask", "gmask", "sop", "eop")
        if getattr(ids, name) != getattr(wanted, name)
    ]
    if prepared.index["vocab_size"] > config.vocab_size:
        wrong.append(f"the data has ids up to {prepared.index['vocab_size']:,}, the model {config.vocab_size:,} rows")
    if wrong:
        raise TrainingError(
            f"{prepared.folder} was prepared with another tokenizer: {'; '.join(wrong)}",
            cure="prepare it again with --tokenizer and the model's folder",
        )


def _sentence_ends(prepared: PreparedSet) -> npt.NDArray[np.bool_]:
    """[vocab]: whether an id closes a sentence, kept with the set by `prepare`."""
    path = prepared.folder / "sentence_ends.npy"
    try:
        found: npt.NDArray[np.bool_] = np.load(path)
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read ({error})", cure="prepare the data again") from error
    return found
