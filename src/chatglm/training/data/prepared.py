"""A prepared set: ids in memory-mapped shards, with an index of documents, sources, problems and hashes.

A folder of `index.json`, and for each of the two collections, `text` and `dialogue`: `tokens-00000.bin` … (int32,
little endian, one after the other), `offsets.npy` (where each document begins), `contexts.npy` (dialogue: |A| of each
sample), `sources.npy`, `files.npy` and `lines.npy` (where each came from). The tokenizer's file lies beside.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from chatglm.errors import TrainingError
from chatglm.tokenizer import TOKENIZER_FILE, Tokenizer

INDEX_FILE = "index.json"
FORMAT = "chatglm-tokens"
VERSION = 1

Part = Literal["text", "dialogue"]
PARTS: tuple[Part, ...] = ("text", "dialogue")


@dataclass(frozen=True)
class Collection:
    """Documents of one kind. `documents` of them (texts, or samples of dialogues), together `tokens` ids."""

    folder: Path
    documents: int
    tokens: int
    num_bytes: int
    shards: tuple[dict[str, Any], ...]
    _open: dict[str, npt.NDArray[Any]] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return self.documents

    def _array(self, name: str) -> npt.NDArray[Any]:
        if name not in self._open:
            path = self.folder / name
            try:
                self._open[name] = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise TrainingError(f"{path} cannot be read ({error})", cure="prepare the data again") from error
        return self._open[name]

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """[documents + 1]: document i has the ids `offsets[i] … offsets[i + 1] - 1`."""
        return self._array("offsets.npy")

    @property
    def contexts(self) -> npt.NDArray[np.int32]:
        """[documents]: tokens of each sample's context (dialogue only)."""
        return self._array("contexts.npy")

    @property
    def sources(self) -> npt.NDArray[np.int32]:
        """[documents]: index into the set's sources."""
        return self._array("sources.npy")

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[documents]: tokens of each."""
        return np.diff(self.offsets)

    def place(self, document: int) -> tuple[int, int]:
        """Index of the file that a document came from, and its line there."""
        return int(self._array("files.npy")[document]), int(self._array("lines.npy")[document])

    @cached_property
    def _shard_tokens(self) -> int:
        return int(self.shards[0]["tokens"]) if self.shards else 1

    def _shard(self, number: int) -> npt.NDArray[np.int32]:
        name = str(self.shards[number]["file"])
        if name not in self._open:
            self._open[name] = np.memmap(self.folder / name, dtype="<i4", mode="r")
        return self._open[name]

    def ids(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Ids `start … stop - 1` of all documents in a row, a copy."""
        parts: list[npt.NDArray[np.int32]] = []
        while start < stop:
            number, place = divmod(start, self._shard_tokens)
            part = self._shard(number)[place : place + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def document(self, number: int) -> npt.NDArray[np.int32]:
        """The ids of one document."""
        return self.ids(int(self.offsets[number]), int(self.offsets[number + 1]))


@dataclass(frozen=True)
class PreparedSet:
    """A folder that `chatglm data prepare` wrote. `index` is what its index.json holds."""

    folder: Path
    index: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> PreparedSet:
        """Raises TrainingError for a folder that is none, is of another version, or lacks a part of a file."""
        folder = Path(folder)
        path = folder / INDEX_FILE
        try:
            index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise TrainingError(
                f"{folder} is no prepared data: there is no {INDEX_FILE}",
                cure=f"chatglm data prepare FILE … --out {folder}",
            ) from error
        except (OSError, ValueError) as error:
            raise TrainingError(f"{path}: not readable as JSON ({error})", cure="prepare the data again") from error
        if index.get("format") != FORMAT or index.get("version") != VERSION:
            raise TrainingError(
                f"{path}: format {index.get('format')!r}, version {index.get('version')!r}; "
                f"this release reads {FORMAT!r}, version {VERSION}",
                cure="prepare the data again",
            )
        found = cls(folder, index)
        for part in PARTS:
            collection = found.collection(part)
            for shard in collection.shards:
                file = collection.folder / str(shard["file"])
                size = file.stat().st_size if file.is_file() else 0
                if size != 4 * int(shard["tokens"]):
                    raise TrainingError(
                        f"{file} has {size:,} bytes, the index says {4 * int(shard['tokens']):,}",
                        cure="copy the folder again, or prepare the data again",
                    )
        return found

    def collection(self, part: Part) -> Collection:
        """The texts, or the samples of dialogues."""
        found = self.index[part]
        return Collection(
            self.folder / part, found["documents"], found["tokens"], found["bytes"], tuple(found["shards"])
        )

    @cached_property
    def text(self) -> Collection:
        return self.collection("text")

    @cached_property
    def dialogue(self) -> Collection:
        return self.collection("dialogue")

    @property
    def amounts(self) -> dict[str, int]:
        """How much of everything the set holds: texts, samples of dialogues, their tokens, and bytes."""
        return {
            "texts": self.text.documents,
            "text_tokens": self.text.tokens,
            "samples": self.dialogue.documents,
            "sample_tokens": self.dialogue.tokens,
            "bytes": self.text.num_bytes + self.dialogue.num_bytes,
        }

    @property
    def sources(self) -> list[str]:
        """Names of the sources, by index."""
        return [str(source["name"]) for source in self.index["sources"]]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the ids belong to; the set holds its file."""
        made_of = self.index["made_of"]
        return Tokenizer.from_file(self.folder / TOKENIZER_FILE, image_tokens=made_of["image_tokens"])

    def verify(self) -> list[str]:
        """Files whose sha256 is not the index's, one line each; reads everything."""
        wrong: list[str] = []
        for part in PARTS:
            folder = self.folder / part
            for name, wanted in self.index[part]["sha256"].items():
                found = file_sha256(folder / name)
                if found != wanted:
                    wrong.append(f"{folder / name}: sha256 {found[:12]}…, the index says {wanted[:12]}…")
        return wrong


def file_sha256(path: Path) -> str:
    """Hash of a file, read in pieces; "absent" where there is none."""
    if not path.is_file():
        return "absent"
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            found.update(piece)
    return found.hexdigest()
