"""Everything that can be wrong with a checkpoint folder, found before memory is spent.

The shallow check reads file sizes, headers and the tokenizer: seconds and a few megabytes for 13 GB of weights, and
no torch. The deep one reads every byte: checksums of the zip records, NaN and infinity, and whether a tied head
equals the embedding.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import ModelConfig, from_original
from ..errors import ConfigError, TokenizerError
from ..tokenizer.model_file import KNOWN_RELEASES, TOKENIZER_FILE
from .eras import era_problem
from .folder import CONFIG, Checkpoint, WeightFiles, merge, read_json, require_folder, weight_files
from .layout import PREFIX, SCORE, expected_tensors
from .problem import PULL, FileError, Problem, raise_for, reward_problem
from .releases import known_sizes, releases_of_sizes
from .tensor_file import Progress, TensorEntry, list_tensors, named

SHOWN = 3
"""Wrong tensors told one by one; above that they are one problem with a number."""


def verify(
    folder: str | Path, deep: bool = False, *, tokenizer: bool = True, progress: Progress | None = None
) -> list[Problem]:
    """The problems of a checkpoint folder, empty when it is fit to load.

    deep       also read all weights (minutes for 13 GB): damaged bytes, NaN and infinity, an untied head
    tokenizer  a folder without a tokenizer file is a problem (a P-tuning prefix never needs one)
    Each fault is one problem that names file, tensor and cure: a broken file hides the tensors that should be in it,
    files of two releases hide the shapes that follow. Raises CheckpointError only where there is no folder.
    """
    folder = Path(folder)
    require_folder(folder)
    raw, config, problems = _read_config(folder)
    try:
        files = weight_files(folder)
    except FileError as error:
        return [*problems, error.problem]
    listed, broken = _list_files(folder, files, config)
    problems += broken.values()
    tensors = merge(listed, files)
    mixed = era_problem(raw or {}, tensors)
    if mixed is not None:
        problems = [mixed, *(problem for problem in problems if problem.file != CONFIG)]
    elif config is not None:
        problems += _tensor_problems(config, files, tensors, broken)
    is_prefix = bool(tensors) and all(name.startswith(PREFIX) for name in tensors)
    if config is not None and mixed is None and not is_prefix:
        problems += _tokenizer_problems(folder, config, files, is_needed=tokenizer)
    if deep and config is not None:
        from .deep import deep_problems

        problems += deep_problems(Checkpoint(folder, config, tensors, None), progress)
    return problems


def check(folder: str | Path, *, tokenizer: bool = True) -> None:
    """`verify`, raised: CheckpointError with the first problem and the number of others."""
    raise_for(verify(folder, tokenizer=tokenizer), str(folder))


def _read_config(folder: Path) -> tuple[Mapping[str, Any] | None, ModelConfig | None, list[Problem]]:
    """config.json as it is, as a description, and what is wrong with it."""
    path = folder / CONFIG
    raw = read_json(path)
    if raw is None:
        what = "is no JSON object" if path.exists() else "is missing"
        return None, None, [Problem(CONFIG, what, f"download it again into {folder}: {PULL}")]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unknown key is told when the checkpoint is opened
            return raw, from_original(raw, where=CONFIG), []
    except ConfigError as error:
        what = error.message.removeprefix(f"{CONFIG}: ")
        return (
            raw,
            None,
            [Problem(CONFIG, f"cannot be: {what}", error.cure or f"take that of the checkpoint's release: {PULL}")],
        )


def _list_files(
    folder: Path, files: WeightFiles, config: ModelConfig | None
) -> tuple[list[Mapping[str, TensorEntry]], dict[str, Problem]]:
    """The tensors of each whole file, and the problem of each broken one by file name."""
    sizes = known_sizes(config)
    specs = {} if config is None else expected_tensors(config)
    listed: list[Mapping[str, TensorEntry]] = []
    broken: dict[str, Problem] = {}
    for name in files.names:
        try:
            listed.append(list_tensors(folder / name, sizes.get(name)))
        except FileError as error:
            problem = error.problem
            if not problem.tensor:
                lost = [f"{tensor} {_shape(specs, tensor)}".rstrip() for tensor in files.promised(name)]
                problem = problem.about(named(lost))
            broken[name] = problem
    return listed, broken


def _shape(specs: Mapping[str, Any], tensor: str) -> str:
    return str(list(specs[tensor].shape)) if tensor in specs else ""


def _tensor_problems(
    config: ModelConfig, files: WeightFiles, tensors: Mapping[str, TensorEntry], broken: Mapping[str, Problem]
) -> list[Problem]:
    """Missing, unexpected and wrong tensors, those of broken files left out; of a reward model, that it is one."""
    score = next((entry for name, entry in tensors.items() if name.startswith(SCORE)), None)
    if score is not None:
        return [reward_problem(score.file.name, str(score))]
    expected = expected_tensors(config)
    only_prefix = bool(tensors) and all(name.startswith(PREFIX) for name in tensors)
    if only_prefix:
        expected = {name: spec for name, spec in expected.items() if name.startswith(PREFIX)}
    missing = [name for name, spec in expected.items() if name not in tensors and not spec.is_optional]
    if broken:  # without an index nobody can say what a broken file held
        missing = [name for name in missing if files.index and files.index.get(name) not in broken]
    problems = _gathered(missing, lambda name: _missing(name, expected[name].shape, files))
    foreign = [name for name in tensors if name not in expected]
    problems += _gathered(foreign, lambda name: _unexpected(tensors[name], config))
    wrong = [name for name, entry in tensors.items() if name in expected and not _fits(entry, expected[name])]
    return problems + _gathered(wrong, lambda name: _wrong(tensors[name], expected[name]))


def _gathered(names: list[str], problem: Any) -> list[Problem]:
    """One problem a name, or one for all of them where there are many."""
    if len(names) <= SHOWN:
        return [problem(name) for name in names]
    first: Problem = problem(names[0])
    return [first.about(f"{first.tensor} (and {len(names) - 1} more)")]


def _missing(name: str, shape: tuple[int, ...], files: WeightFiles) -> Problem:
    if name.startswith(PREFIX):
        cure = "load the P-tuning folder over this base, or take `pre_seq_len` out of config.json"
    else:
        cure = f"config.json must describe these weights, or the download is incomplete: {PULL}"
    file = files.index.get(name, files.names[0] if len(files.names) == 1 else "the checkpoint")
    return Problem(file, "lacks a tensor that config.json asks for", cure, f"{name} {list(shape)}")


def _unexpected(entry: TensorEntry, config: ModelConfig) -> Problem:
    cure = f"config.json must describe these weights (num_layers is {config.num_layers}, pre_seq_len "
    cure += f"{config.pre_seq_len}, quantization_bit {config.quantization_bit})"
    return Problem(entry.file.name, "holds a tensor that config.json does not know", cure, str(entry))


def _fits(entry: TensorEntry, spec: Any) -> bool:
    return entry.shape == spec.shape and entry.dtype in spec.kinds


def _wrong(entry: TensorEntry, spec: Any) -> Problem:
    if entry.shape == spec.shape:
        what = f"holds a tensor of {entry.dtype} where config.json asks for {' or '.join(spec.kinds[:3])}"
        cure = "check quantization_bit and quantization_embeddings in config.json"
    else:
        what = f"holds a tensor of shape {list(entry.shape)} where config.json asks for {list(spec.shape)}"
        is_scale = entry.name.endswith("_scale")
        settings = "check quantization_bit and quantization_group_size in config.json"
        cure = settings if is_scale else f"take config.json and weights from one release: {PULL}"
    return Problem(entry.file.name, what, cure, str(entry))


def _tokenizer_problems(folder: Path, config: ModelConfig, files: WeightFiles, *, is_needed: bool) -> list[Problem]:
    """What the tokenizer room says about the file, and the rule for weights of a known release."""
    from ..tokenizer import Tokenizer

    path = folder / TOKENIZER_FILE
    if not path.exists():
        cure = f"copy it from where the checkpoint came from, or {PULL}"
        return [Problem(TOKENIZER_FILE, "is missing", cure)] if is_needed else []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = Tokenizer.from_folder(folder, config=config)
    except TokenizerError as error:
        what = error.message.removeprefix(str(path)).lstrip(": ")
        return [Problem(TOKENIZER_FILE, what, error.cure or f"download it again: {PULL}")]
    sizes = {name: (folder / name).stat().st_size for name in files.names if (folder / name).exists()}
    of_release = releases_of_sizes(sizes)
    if not of_release:
        return []
    right = {"slim": KNOWN_RELEASES[0], "pre-slim": KNOWN_RELEASES[1]}[of_release[0].era]
    if tokenizer.file.sha256 == right.sha256:
        return []
    names = " or ".join(release.name for release in of_release)
    what = f"has sha256 {tokenizer.file.sha256[:16]}…, but the weights are those of {names}, where it has "
    what += f"{right.sha256[:16]}…"
    return [Problem(TOKENIZER_FILE, what, f"take the tokenizer file of the same release: {PULL}")]
