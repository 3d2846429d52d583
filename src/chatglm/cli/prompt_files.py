"""Files of prompts in, files of answers out: text or JSON lines, one a line, resumable.

While a run lasts its answers stand in `OUT.part` as JSON lines, after a first line that describes the run. The finished
file is written beside its target and renamed: an interrupted run leaves the old file, and a part for the next run.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from ..errors import RequestError
from .conversation import write_beside


@dataclass(frozen=True)
class Prompt:
    """A prompt and the other fields of its JSON line, which its answer keeps."""

    text: str
    fields: dict[str, Any]


def read_prompts(path: str) -> list[Prompt]:
    """One prompt a line; `-` is standard input. A line of a `.jsonl` file is a string or an object with `prompt`.

    Blank lines are skipped. Raises RequestError naming file and line.
    """
    try:
        content = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror or error})") from error
    lines = content.removeprefix("\ufeff").split("\n")
    is_json = path.endswith((".jsonl", ".ndjson"))
    if path == "-":
        is_json = next((line for line in lines if line.strip()), "").lstrip().startswith("{")
    return [
        _json_prompt(line, f"{path}, line {number}") if is_json else Prompt(line.rstrip("\r"), {})
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(f"{where}: not JSON ({error.msg}, column {error.colno})") from error
    if isinstance(value, str):
        return Prompt(value, {})
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        found = f"an object with the keys {', '.join(value)}" if isinstance(value, dict) else type(value).__name__
        raise RequestError(f"{where}: {found}; expected a string, or an object with the text `prompt`")
    return Prompt(value["prompt"], {key: entry for key, entry in value.items() if key != "prompt"})


class AnswerFile:
    """Takes answers in order and knows which are there already. A context manager.

    path   None or `-`: standard output, nothing to resume
    run    describes model and settings; a part that was begun with others is refused
    """

    def __init__(
        self, path: str | None, prompts: list[Prompt], run: dict[str, Any], *, as_json: bool, overwrite: bool
    ) -> None:
        self._target = None if path in (None, "-") else Path(str(path))
        self._prompts = prompts
        self._run = run
        self._as_json = as_json or (self._target is not None and self._target.suffix in (".jsonl", ".ndjson"))
        self._part: TextIO | None = None
        self.num_done = 0
        self.is_resumed = False
        if self._target is not None:
            self._part_path = self._target.with_name(self._target.name + ".part")
            if overwrite:
                self._part_path.unlink(missing_ok=True)
            elif self._target.exists():
                raise RequestError(f"{self._target} exists already", cure="name another file, or add --overwrite")
            self._open_part()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._part is not None:
            self._part.close()

    def add(self, record: dict[str, Any]) -> None:
        """The answer to the next prompt."""
        if self._part is None:
            print(self._line(record), flush=True)
        else:
            self._part.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._part.flush()
        self.num_done += 1

    def finish(self) -> None:
        """All answers are there: put the file in its place."""
        if self._target is None or self._part is None:
            return
        self._part.close()
        _, records = _read_part(self._part_path)
        write_beside(self._target, "".join(self._line(record) + "\n" for record in records))
        os.chmod(self._target, 0o666 & ~_umask())
        self._part_path.unlink()

    def _line(self, record: dict[str, Any]) -> str:
        if self._as_json:
            return json.dumps(record, ensure_ascii=False)
        return str(record.get("answer", "")).replace("\\", "\\\\").replace("\n", "\\n")

    def _open_part(self) -> None:
        try:
            if self._part_path.exists():
                self._resume()
            else:
                self._part_path.write_text(json.dumps({"run": self._run}, ensure_ascii=False) + "\n", encoding="utf-8")
            self._part = self._part_path.open("a", encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{self._part_path}: cannot be written ({error.strerror or error})") from error

    def _resume(self) -> None:
        head, records = _read_part(self._part_path)
        cure = "give the same prompts and settings as before, or add --overwrite to begin anew"
        before = head.get("run", {})
        for name in sorted({*before, *self._run}):
            was, now = before.get(name), json.loads(json.dumps(self._run.get(name)))
            if was != now:
                raise RequestError(f"{self._part_path} was begun with {name} {was!r}, now it is {now!r}", cure=cure)
        for number, record in enumerate(records):
            if number >= len(self._prompts) or record.get("prompt") != self._prompts[number].text:
                raise RequestError(f"{self._part_path} answers other prompts (from prompt {number + 1} on)", cure=cure)
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in ({"run": self._run}, *records)]
        write_beside(self._part_path, "".join(lines))  # without the half line of an interruption
        self.num_done, self.is_resumed = len(records), True


def _read_part(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Head and complete records. A last line that was cut off by an interruption is left out."""
    entries: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith("\n") else None
        except json.JSONDecodeError:
            entry = None
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return (entries[0], entries[1:]) if entries else ({}, [])


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
