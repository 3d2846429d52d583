"""From the nested mappings of a YAML file to frozen dataclasses, every key and value checked on the way.

Unknown keys are refused by name with the nearest known one; values by key, value and what is allowed. A dataclass says
more about a field in its metadata: `Field(low=…, high=…)`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import MissingExtraError, TrainingError

Settings = TypeVar("Settings")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises TrainingError with the line for a file that is none."""
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError("pyyaml", extra="train", purpose="reading run files") from error
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror})", cure="see examples/training") from error
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path} is not UTF-8 text", cure="a run file is YAML; see examples/training") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark is not None else str(path)
        raise TrainingError(f"{where}: {getattr(error, 'problem', None) or 'no YAML'}") from error
    if not isinstance(loaded, dict):
        raise TrainingError(f"{path} holds no `key: value` lines", cure="see examples/training")
    return loaded


def override(mapping: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """A copy of `mapping` with changes like `optimizer.lr=1e-4` applied; values are read as YAML."""
    import yaml

    result: dict[str, Any] = _copied(mapping)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key.strip():
            raise TrainingError(f"--set {change}: not of the form key=value", cure="--set optimizer.lr=1e-4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise TrainingError(f"--set {change}: the value is no YAML") from error
        put(result, key.strip(), value)
    return result


def put(mapping: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making the sections on the way."""
    *sections, last = key.split(".")
    place = mapping
    for section in sections:
        inner = place.get(section)
        if inner is None:
            inner = place[section] = {}
        if not isinstance(inner, dict):
            raise TrainingError(f"`{key}`: `{section}` is {inner!r}, not a section")
        place = inner
    place[last] = value


def build(
    kind: type[Settings],
    mapping: Mapping[str, Any] | None,
    where: str,
    prefix: str = "",
    defaults: Settings | None = None,
) -> Settings:
    """A dataclass of `kind` from a mapping; keys that are left out keep their defaults.

    where     what the values come from, for messages; prefix: the dotted name of this section, with its dot
    defaults  values of keys that are left out, in the place of the class's own
    Raises TrainingError naming key, value and what is allowed.
    """
    mapping = {} if mapping is None else mapping
    if not isinstance(mapping, Mapping):
        raise TrainingError(f"{where}: `{prefix.rstrip('.')}` is {mapping!r}; it must be a section of keys")
    hints = _hints(kind)  # type: ignore[arg-type]
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean `{prefix}{near[0]}`?" if near else f"known here: {', '.join(known)}"
            raise TrainingError(f"{where}: unknown key `{prefix}{key}`", cure=hint)
        values[key] = _value(hints[key], value, where, f"{prefix}{key}", _default(known[key]))
        _check_range(known[key].metadata, values[key], where, f"{prefix}{key}")
    if defaults is not None:
        return dataclasses.replace(defaults, **values)  # type: ignore[type-var]
    for name, field in known.items():
        is_needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_needed and name not in values:
            raise TrainingError(f"{where}: `{prefix}{name}` is missing")
    return kind(**values)


def in_range(low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """Metadata of a numeric field: least and greatest value."""
    return {"low": low, "high": high}


def as_mapping(settings: Any) -> dict[str, Any]:
    """The resolved values, nested as in the file, ready for YAML and JSON."""
    found = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {name: _plain(value) for name, value in found.items()}


def as_yaml(settings: Any) -> str:
    """The resolved values as a run file."""
    import yaml

    text: str = yaml.safe_dump(as_mapping(settings), sort_keys=False, allow_unicode=True)
    return text


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _default(field: dataclasses.Field[Any]) -> Any:
    """The value of a field that is left out, or None."""
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _copied(value: Any) -> Any:
    return {key: _copied(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return as_mapping(value)
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, Path) else value


def _check_range(metadata: Mapping[str, Any], value: Any, where: str, key: str) -> None:
    low, high = metadata.get("low"), metadata.get("high")
    for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, int | float):
            continue
        if (low is not None and number < low) or (high is not None and number > high) or not math.isfinite(number):
            said = f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"
            raise TrainingError(f"{where}: `{key}` is {number}; allowed: {said}")


def _value(hint: Any, value: Any, where: str, key: str, default: Any = None) -> Any:
    """`value` in the type of the hint, or a TrainingError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _value(inner, value, where, key)
    if origin is typing.Literal:
        if value not in arguments or isinstance(value, bool):
            near = difflib.get_close_matches(str(value), map(str, arguments), n=1)
            hint_text = f"did you mean {near[0]}?" if near else None
            raise TrainingError(
                f"{where}: `{key}` is {value!r}; allowed: {', '.join(map(str, arguments))}", cure=hint_text
            )
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, where, f"{key}.", default if isinstance(default, hint) else None)
    if origin is tuple:
        return _items(arguments, value, where, key)
    if origin in (dict, Mapping) or hint is Any:
        return value
    return _scalar(hint, value, where, key)


def _items(arguments: tuple[Any, ...], value: Any, where: str, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        value = [value]  # one item may stand alone
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_value(arguments[0], item, where, f"{key}[{i}]") for i, item in enumerate(value))
    if len(value) != len(arguments):
        raise TrainingError(f"{where}: `{key}` has {len(value)} values, not {len(arguments)}")
    pairs = zip(arguments, value, strict=True)
    return tuple(_value(argument, item, where, f"{key}[{i}]") for i, (argument, item) in enumerate(pairs))


_SAID = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def _scalar(hint: Any, value: Any, where: str, key: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and is_number:
        return float(value)
    if hint is int and is_number and float(value).is_integer():
        return int(value)
    if hint is int and isinstance(value, str) and value.replace("_", "").isdigit():
        return int(value)
    if (hint is bool and isinstance(value, bool)) or (hint is str and isinstance(value, str)):
        return value
    if hint is str and is_number:
        return str(value)
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    raise TrainingError(f"{where}: `{key}` is {value!r}; it must be {_SAID.get(hint, hint)}")
