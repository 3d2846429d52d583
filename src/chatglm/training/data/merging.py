"""Encoded blocks → one prepared set: duplicates found, ids written in shards, the index last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .block_files import BlockFacts, read_arrays
from .prepared import INDEX_FILE, Part, file_sha256
from .problems import SHOWN, Findings, Problem

SHARD_TOKENS = 1 << 28
"""Ids in a shard: 1 GiB."""

Bools = npt.NDArray[np.bool_]


@dataclass
class Table:
    """Every record of all blocks, in order; all arrays [records].

    block     the block that a record is in
    goes_on   whether a text goes on in the next record (a document larger than a block)
    """

    block: npt.NDArray[np.int32]
    lines: npt.NDArray[np.int64]
    samples: npt.NDArray[np.int32]
    is_text: Bools
    whole: npt.NDArray[np.uint64]
    asked: npt.NDArray[np.uint64]
    source: npt.NDArray[np.int32]
    num_bytes: npt.NDArray[np.int64]
    goes_on: Bools

    def __len__(self) -> int:
        return len(self.block)


def read_table(blocks: Sequence[BlockFacts], sources: dict[str, int]) -> Table:
    """The records of all blocks; source names are numbered in `sources`."""
    names = ("lines", "samples", "is_text", "whole", "asked", "sources", "num_bytes")
    columns: list[list[np.ndarray]] = [[] for _ in range(len(names) + 2)]
    for number, facts in enumerate(blocks):
        lines, samples, is_text, whole, asked, source, num_bytes = read_arrays(facts.path, *names)
        numbers = np.array([sources.setdefault(name, len(sources)) for name in facts.source_names], dtype=np.int32)
        goes_on = np.zeros(len(lines), dtype=np.bool_)
        if facts.is_continued and len(goes_on):
            goes_on[-1] = True
        source = numbers[source] if len(source) else source
        block = np.full(len(lines), number, dtype=np.int32)
        row = (block, lines, samples, is_text, whole, asked, source, num_bytes, goes_on)
        for column, part in zip(columns, row, strict=True):
            column.append(part)
    dtypes = (np.int32, np.int64, np.int32, np.bool_, np.uint64, np.uint64, np.int32, np.int64, np.bool_)
    table = Table(*(np.concatenate([np.empty(0, dtype), *c]) for c, dtype in zip(columns, dtypes, strict=True)))
    files: dict[str, int] = {}
    of_block = np.array([files.setdefault(facts.file, len(files)) for facts in blocks] or [0])
    ends = np.diff(of_block[table.block], append=-1) != 0  # what would go on ends with its file
    table.goes_on[ends] = False
    return table


def find_repetitions(table: Table, blocks: Sequence[BlockFacts], findings: Findings) -> Bools:
    """Which records stay [records]: all but duplicates. Duplicates and contradictions go to `findings`."""
    is_part = table.goes_on | np.concatenate([[False], table.goes_on[:-1]])  # parts of a large text are not compared
    compared = np.flatnonzero(~is_part)
    keys = (table.whole[compared] << np.uint64(1)) | table.is_text[compared].astype(np.uint64)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    earlier = np.arange(len(table))
    earlier[compared] = compared[first[inverse.reshape(-1)]]
    keep: Bools = earlier == np.arange(len(table))
    _report(findings, "duplicate", "is the same as", np.flatnonzero(~keep), earlier, table, blocks)
    asking = np.flatnonzero(keep & ~table.is_text)
    _, first, inverse = np.unique(table.asked[asking], return_index=True, return_inverse=True)
    earlier_asking = asking[first[inverse.reshape(-1)]]
    places = np.flatnonzero(earlier_asking != asking)
    lookup = dict(zip(asking[places].tolist(), earlier_asking[places].tolist(), strict=True))
    words = "asks the same and answers otherwise than"
    _report(findings, "contradiction", words, asking[places], lookup, table, blocks)
    return keep


def _report(
    findings: Findings,
    kind: str,
    words: str,
    found: npt.NDArray[np.int64],
    earlier: Any,
    table: Table,
    blocks: Sequence[BlockFacts],
) -> None:
    for record in found[:SHOWN].tolist():
        other = int(earlier[record])
        there = f"{blocks[int(table.block[other])].file}, line {int(table.lines[other])}"
        file = blocks[int(table.block[record])].file
        findings.add([Problem(kind, file, int(table.lines[record]), f"{words} {there}")])
    findings.counts[kind] += max(0, len(found) - SHOWN)
    if not findings.counts[kind]:
        del findings.counts[kind]


class ShardWriter:
    """Ids one after the other, in files of SHARD_TOKENS, hashed as they are written."""

    def __init__(self, folder: Path, shard_tokens: int = SHARD_TOKENS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.shard_tokens = shard_tokens
        self.shards: list[dict[str, Any]] = []
        self.tokens = 0
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()

    def add(self, ids: npt.NDArray[np.int32]) -> None:
        while len(ids):
            if self._file is None:
                name = f"tokens-{len(self.shards):05}.bin"
                self._file, self._hash = (self.folder / name).open("wb"), hashlib.sha256()
                self.shards.append({"file": name, "tokens": 0})
            shard = self.shards[-1]
            part = ids[: self.shard_tokens - shard["tokens"]].astype("<i4")
            self._file.write(part.tobytes())
            self._hash.update(part.tobytes())
            shard["tokens"] += len(part)
            self.tokens += len(part)
            ids = ids[len(part) :]
            if shard["tokens"] == self.shard_tokens:
                self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self.shards[-1]["sha256"] = self._hash.hexdigest()
            self._file = None


def write_set(
    folder: Path,
    blocks: Sequence[BlockFacts],
    table: Table,
    keep: Bools,
    sources: dict[str, int],
    about: dict[str, Any],
    *,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Write the set of the records that stay into `folder`, index.json last."""
    files: dict[str, int] = {}
    file_of_block = np.array([files.setdefault(facts.file, len(files)) for facts in blocks] or [0], dtype=np.int32)
    counts = np.zeros((len(sources), 3), dtype=np.int64)  # documents, tokens, bytes
    parts: dict[Part, Any] = {
        "text": _Part(folder / "text", shard_tokens),
        "dialogue": _Part(folder / "dialogue", shard_tokens),
    }
    start = done = 0
    total = sum(facts.path.stat().st_size for facts in blocks)
    for number, facts in enumerate(blocks):
        if progress is not None:
            progress(done, total, "writing shards")
        done += facts.path.stat().st_size
        stop = start + facts.records
        records = slice(start, stop)
        names = ("text_ids", "text_lengths", "answer_ids", "answer_lengths", "context_lengths")
        text_ids, text_lengths, answer_ids, answer_lengths, contexts = read_arrays(facts.path, *names)
        is_text, samples, kept = table.is_text[records], table.samples[records], keep[records]
        for part, chosen, ids, lengths in (
            ("text", is_text, text_ids, text_lengths),
            ("dialogue", ~is_text, answer_ids, answer_lengths),
        ):
            of_record = np.repeat(np.arange(start, stop)[chosen], samples[chosen])
            stays = np.repeat(kept[chosen], samples[chosen])
            ids = ids if stays.all() else ids[np.repeat(stays, lengths)]
            of_record, lengths = of_record[stays], lengths[stays]
            parts[part].add(  # type: ignore[index]
                ids,
                lengths,
                contexts[stays] if part == "dialogue" else None,
                table.source[of_record],
                np.full(len(lengths), file_of_block[number], dtype=np.int32),
                table.lines[of_record],
                table.goes_on[of_record],
            )
            counts[:, 1] += _summed(table.source[of_record], lengths, len(sources))
        start = stop
    counts[:, 0] = _summed(table.source[keep], np.ones(int(keep.sum())), len(sources))
    counts[:, 2] = _summed(table.source[keep], table.num_bytes[keep], len(sources))
    index = {**about, "files": list(files)}
    for part, is_text in (("text", table.is_text), ("dialogue", ~table.is_text)):
        index[part] = {**parts[part].finish(), "bytes": int(table.num_bytes[keep & is_text].sum())}  # type: ignore[index]
    index["sources"] = [
        {"name": name, "documents": int(row[0]), "tokens": int(row[1]), "bytes": int(row[2])}
        for name, row in zip(sources, counts, strict=True)
    ]
    written = folder / f"{INDEX_FILE}.tmp"
    written.write_text(json.dumps(index, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    written.replace(folder / INDEX_FILE)


def _summed(of: np.ndarray, values: np.ndarray, size: int) -> npt.NDArray[np.int64]:
    """Sums of `values` by what they are of."""
    return np.bincount(of, weights=values, minlength=size).astype(np.int64)


class _Part:
    """A collection while it is written."""

    def __init__(self, folder: Path, shard_tokens: int) -> None:
        self.writer = ShardWriter(folder, shard_tokens)
        self.columns: dict[str, list[np.ndarray]] = {"lengths": [], "sources": [], "files": [], "lines": []}
        self.contexts: list[np.ndarray] = []
        self.goes_on: list[np.ndarray] = []

    def add(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        contexts: np.ndarray | None,
        sources: np.ndarray,
        files: np.ndarray,
        lines: np.ndarray,
        goes_on: np.ndarray,
    ) -> None:
        self.writer.add(ids)
        for name, part in (("lengths", lengths), ("sources", sources), ("files", files), ("lines", lines)):
            self.columns[name].append(part)
        self.goes_on.append(goes_on)
        if contexts is not None:
            self.contexts.append(contexts)

    def finish(self) -> dict[str, Any]:
        self.writer.close()
        folder = self.writer.folder
        columns = {name: np.concatenate([np.empty(0, np.int64), *parts]) for name, parts in self.columns.items()}
        goes_on = np.concatenate([np.empty(0, np.bool_), *self.goes_on])
        firsts = np.flatnonzero(~np.concatenate([[False], goes_on[:-1]])) if len(goes_on) else np.empty(0, np.int64)
        lengths = np.add.reduceat(columns["lengths"], firsts) if len(firsts) else columns["lengths"]
        saved = {"offsets.npy": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)}
        for name, dtype in (("sources", np.int32), ("files", np.int32), ("lines", np.int64)):
            saved[f"{name}.npy"] = columns[name][firsts].astype(dtype)
        if folder.name == "dialogue":
            saved["contexts.npy"] = np.concatenate([np.empty(0, np.int32), *self.contexts]).astype(np.int32)
        sha256 = {shard["file"]: shard["sha256"] for shard in self.writer.shards}
        for name, values in saved.items():
            np.save(folder / name, values)
            sha256[name] = file_sha256(folder / name)
        shards = [{"file": shard["file"], "tokens": shard["tokens"]} for shard in self.writer.shards]
        return {"documents": len(firsts), "tokens": self.writer.tokens, "shards": shards, "sha256": sha256}
