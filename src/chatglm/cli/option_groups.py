"""Options that several commands share are dataclasses; `spread` shows typer their fields and passes the dataclass."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import typer


def spread(function: Callable[..., None]) -> Callable[..., None]:
    """The same function with every dataclass parameter replaced by its fields, as keyword-only parameters.

    Ctrl-C inside the function ends the program with exit code 130.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    own = inspect.signature(function).parameters
    groups: dict[str, Any] = {name: hints[name] for name in own if dataclasses.is_dataclass(hints[name])}
    parameters = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in own.items()
        if name not in groups
    ]
    for group in groups.values():
        field_hints = typing.get_type_hints(group, include_extras=True)
        for field in dataclasses.fields(group):
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None if field.default is dataclasses.MISSING else field.default,
                    annotation=field_hints[field.name],
                )
            )

    @functools.wraps(function)
    def command(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        try:
            function(**values)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del command.__wrapped__  # or typer would look at the original's hints
    return command
