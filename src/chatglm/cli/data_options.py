"""Options of the data commands that say how files are read and what may be wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .source_folder import source_folder

if TYPE_CHECKING:
    from ..training.data.encoding import Reading
    from ..training.data.layout import Layout

FORMS = ("jsonl", "json", "text")
SEPARATIONS = ("file", "blank", "line")


def _option(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, show_default=False, **more)


@dataclass(frozen=True)
class ReadingOptions:
    """How bytes become records."""

    form: Annotated[
        str | None, _option("--format", metavar="NAME", help="jsonl, json or text, where names do not say [by content]")
    ] = None
    documents: Annotated[
        str,
        _option("--documents", metavar="HOW", help="What ends a document of plain text: file, blank (line) or line"),
    ] = "file"
    encoding: Annotated[str, _option("--encoding", metavar="NAME", help="Of the files [utf-8]")] = "utf-8"
    prompt_column: Annotated[
        str | None, _option("--prompt-column", metavar="KEY", help="The field that asks, in data of your own format")
    ] = None
    response_column: Annotated[
        str | None, _option("--response-column", metavar="KEY", help="The field that answers [response]")
    ] = None
    history_column: Annotated[
        str | None, _option("--history-column", metavar="KEY", help="The field of earlier rounds, [[q, a], …]")
    ] = None
    leave_out: Annotated[
        list[str] | None,
        _option("--leave-out", metavar="PATTERN", help="Records whose source matches, like 'site/*' (repeatable)"),
    ] = None
    leave_out_file: Annotated[
        Path | None, _option("--leave-out-file", metavar="FILE", help="Patterns of sources to leave out, one a line")
    ] = None
    allow: Annotated[
        list[str] | None,
        _option(
            "--allow",
            metavar="KIND[=N]",
            help="Pass over such records: all, json, encoding, keys, roles, empty, long, duplicate, contradiction, …; "
            "at most N, or N% (repeatable)",
        ),
    ] = None

    def reading(self) -> Reading:
        """Raises a usage error for an unknown value."""
        import codecs

        from ..training.data.encoding import Reading
        from ..training.data.formats import Columns

        for flag, value, known in (("--format", self.form, FORMS), ("--documents", self.documents, SEPARATIONS)):
            if value is not None and value not in known:
                raise typer.BadParameter(f"{value!r}; known: {', '.join(known)}", param_hint=flag)
        try:
            codecs.lookup(self.encoding)
        except LookupError as error:
            raise typer.BadParameter(f"{self.encoding!r} is no encoding", param_hint="--encoding") from error
        if self.prompt_column is None and (self.response_column or self.history_column):
            raise typer.BadParameter("other columns need --prompt-column", param_hint="--response-column")
        columns = Columns(self.prompt_column, self.response_column, self.history_column)
        return Reading(self.encoding, columns, self.documents, self._patterns())  # type: ignore[arg-type]

    def _patterns(self) -> tuple[str, ...]:
        patterns = list(self.leave_out or [])
        if self.leave_out_file is not None:
            try:
                lines = self.leave_out_file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise typer.BadParameter(f"{self.leave_out_file}: {error}", param_hint="--leave-out-file") from error
            patterns += [line.strip() for line in lines if line.strip()]
        return tuple(patterns)


@dataclass(frozen=True)
class LayoutOptions:
    """How dialogues become samples."""

    tokenizer: Annotated[
        str | None,
        _option(
            "--tokenizer", metavar="MODEL", help="Checkpoint folder, hub name or ice_text.model [the embedded model]"
        ),
    ] = None
    length: Annotated[
        int, _option("--length", metavar="N", help="Tokens of a sample; oldest rounds are left out [2048]", min=8)
    ] = 2048
    last_answer: Annotated[
        bool, _option("--last-answer", help="One sample a dialogue, for its last answer, not one for each answer")
    ] = False
    official: Annotated[
        bool, _option("--official", help="The original script's preprocessing and labels (see docs/training-data.md)")
    ] = False
    max_source_length: Annotated[
        int, _option("--max-source-length", metavar="N", help="With --official: tokens of a question [64]", min=2)
    ] = 64
    max_target_length: Annotated[
        int, _option("--max-target-length", metavar="N", help="With --official: tokens of an answer [64]", min=3)
    ] = 64

    def layout(self) -> Layout:
        from ..training.data.layout import Layout

        return Layout(self.length, not self.last_answer, self.official, self.max_source_length, self.max_target_length)

    def tokenizer_path(self) -> Path:
        """A checkpoint folder or a tokenizer file."""
        if self.tokenizer is not None and Path(self.tokenizer).is_file():
            return Path(self.tokenizer)
        return source_folder(self.tokenizer)
