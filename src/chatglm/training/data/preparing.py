"""`chatglm data prepare`: a corpus → a prepared set, on all cores, in bounded memory, resumable at any moment.

One process reads and cuts the corpus into blocks of 4 MB; workers turn each into ids and write it to `OUT.partial/`,
whole or not at all; when all are there they are merged into shards and the folder gets its name in one step.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from chatglm.errors import TrainingError
from chatglm.tokenizer import TOKENIZER_FILE, Tokenizer

from .block_files import BlockFacts, block_identity, block_path, write_block
from .blocks import BLOCK_BYTES, Block, blocks_of
from .encoding import Reading, encode_block
from .inputs import Form, expand, open_inputs, total_bytes
from .layout import Layout, sentence_ends
from .merging import SHARD_TOKENS, find_repetitions, read_table, write_set
from .prepared import FORMAT, INDEX_FILE, VERSION, PreparedSet
from .problems import Allowance, Findings, Problem

Progress = Callable[[int, int, str], None]
END_OF_TEXT = "</s>"


@dataclass(frozen=True)
class Preparation:
    """What is prepared, and how.

    inputs       files, folders, archives, `-` for stdin
    tokenizer    a checkpoint folder, or an `ice_text.model`
    end_of_text  the piece behind every text
    form         jsonl, json or text, where the names do not say
    allowance    problems that are passed over
    """

    inputs: tuple[str, ...]
    tokenizer: str | Path
    layout: Layout = field(default_factory=Layout)
    reading: Reading = field(default_factory=Reading)
    end_of_text: str = END_OF_TEXT
    form: Form | None = None
    allowance: Allowance = field(default_factory=Allowance)
    block_bytes: int = BLOCK_BYTES
    shard_tokens: int = SHARD_TOKENS


def open_tokenizer(path: str | Path) -> Tokenizer:
    """From a checkpoint folder or a tokenizer file."""
    path = Path(path)
    return Tokenizer.from_folder(path) if path.is_dir() else Tokenizer.from_file(path)


def prepare(
    preparation: Preparation,
    out: str | Path,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PreparedSet:
    """Write the prepared set `out`; the same call again goes on where an earlier one was interrupted.

    workers  processes; None: as many as cores. 1 works in this process
    Raises TrainingError for bad data (file, line and what to do), and for a folder that holds something else.
    """
    out = Path(out)
    try:
        return _prepare(preparation, out, workers or _cores(), overwrite, progress)
    except OSError as error:  # what cannot be read is a TrainingError by now
        raise TrainingError(
            f"{error.filename or out} cannot be written ({error.strerror or error})",
            cure="make room and give the same command again; it goes on where it was",
        ) from error


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare(
    preparation: Preparation, out: Path, workers: int, overwrite: bool, progress: Progress | None
) -> PreparedSet:
    tokenizer = open_tokenizer(preparation.tokenizer)
    if tokenizer.piece_to_id(preparation.end_of_text) == tokenizer.unk_id:
        raise TrainingError(
            f"`{preparation.end_of_text}` is no piece of {tokenizer.path}", cure="use `</s>` or `<eop>`"
        )
    identity = _identity(preparation, tokenizer)
    partial = out.with_name(f"{out.name}.partial")
    files = [_file_facts(file) for file in expand(preparation.inputs)]
    done = _finished(out, identity, files, overwrite)
    if done is not None:
        _findings_of(done).raise_if_stopping(preparation.allowance, sum(map(len, (done.text, done.dialogue))))
        return done
    with _locked(partial, out):
        _begin(partial, identity)
        began = time.monotonic()
        blocks, findings, kept = _encode_all(preparation, tokenizer, partial, workers, progress)
        sources: dict[str, int] = {}
        table = read_table(blocks, sources)
        keep = find_repetitions(table, blocks, findings)
        findings.raise_if_stopping(preparation.allowance, len(table) + sum(findings.counts.values()))
        if not keep.any():
            raise TrainingError(
                f"{', '.join(preparation.inputs)}: there is no text and no dialogue",
                cure="name files in a format of docs/training-data.md",
            )
        about = {
            **_about(preparation, tokenizer, identity),
            "inputs": files,
            "left_out": sum(facts.left_out for facts in blocks),
            "samples_with_dropped_rounds": sum(facts.dropped_rounds for facts in blocks),
            "problems": findings.as_dict(),
            "blocks_kept_from_before": kept,
            "seconds": round(time.monotonic() - began, 1),
        }
        merged = partial / "set"
        shutil.rmtree(merged, ignore_errors=True)
        write_set(merged, blocks, table, keep, sources, about, shard_tokens=preparation.shard_tokens, progress=progress)
        np.save(merged / "sentence_ends.npy", sentence_ends(tokenizer))
        shutil.copyfile(tokenizer.path, merged / TOKENIZER_FILE)
        if out.exists():  # renamed, not removed: half a set must never stand there
            os.replace(out, partial / "replaced")
        os.replace(merged, out)
        shutil.rmtree(partial, ignore_errors=True)
    return PreparedSet.open(out)


def _findings_of(prepared: PreparedSet) -> Findings:
    """What was passed over when a set was made."""
    found = Findings()
    problems = prepared.index["problems"]
    found.shown = [Problem(**problem) for problem in problems["first"]]
    found.counts.update(problems["counts"])
    return found


def _identity(preparation: Preparation, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the ids. The same identity and the same blocks give the same set."""
    return {
        "version": VERSION,
        "tokenizer_sha256": tokenizer.file.sha256,
        "image_tokens": tokenizer.offset,
        "end_of_text": preparation.end_of_text,
        "layout": asdict(preparation.layout),
        "reading": json.loads(json.dumps(asdict(preparation.reading))),
        "form": preparation.form,
        "block_bytes": preparation.block_bytes,
        "inputs": list(preparation.inputs),
    }


def _about(preparation: Preparation, tokenizer: Tokenizer, identity: dict[str, Any]) -> dict[str, Any]:
    names = ("mask_id", "gmask_id", "smask_id", "sop_id", "eop_id")
    return {
        "format": FORMAT,
        "version": VERSION,
        "vocab_size": tokenizer.vocab_size,
        "ids": {
            **{name.removesuffix("_id"): getattr(tokenizer, name) for name in names},
            "end_of_text": tokenizer.piece_to_id(preparation.end_of_text),
            "start_of_text": tokenizer.piece_to_id("<ENC>"),
            "hidden": tokenizer.piece_to_id("<dBLOCK>"),
        },
        "made_of": identity,
    }


def _file_facts(file: str) -> dict[str, Any]:
    """Name, size and age of a file: what changes when its content does."""
    if file == "-":
        return {"file": file, "bytes": None, "modified_ns": None}
    state = Path(file).stat()
    return {"file": file, "bytes": state.st_size, "modified_ns": state.st_mtime_ns}


def _finished(out: Path, identity: dict[str, Any], files: list[dict[str, Any]], overwrite: bool) -> PreparedSet | None:
    """The set that is already there, if it is the one that is asked for."""
    if not out.exists():
        return None
    if (out / INDEX_FILE).is_file():
        found = PreparedSet.open(out)
        if overwrite:
            return None
        if found.index["made_of"] == identity and found.index["inputs"] == files and "-" not in identity["inputs"]:
            return found
        if found.index["made_of"] == identity:
            raise TrainingError(f"{out} was prepared from files that have changed", cure="add --overwrite")
        raise TrainingError(
            f"{out} holds data that was prepared otherwise", cure="add --overwrite, or name another --out"
        )
    if out.is_dir() and not any(out.iterdir()):
        return None
    raise TrainingError(f"{out} exists and is no prepared data", cure="name another folder with --out")


def _begin(partial: Path, identity: dict[str, Any]) -> None:
    """Empty the working folder of blocks of another preparation."""
    made_of = partial / "made_of.json"
    wanted = json.dumps(identity, sort_keys=True)
    if not (made_of.is_file() and made_of.read_text(encoding="utf-8") == wanted):
        for block in partial.glob("block-*"):
            block.unlink()
    shutil.rmtree(partial / "replaced", ignore_errors=True)
    written = partial / "made_of.tmp"
    written.write_text(wanted, encoding="utf-8")
    os.replace(written, made_of)


@contextlib.contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    partial.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: nothing keeps two runs apart there
        yield
        return
    with (partial / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingError(
                f"{out} is being prepared by another process", cure="wait for it, or stop it"
            ) from error
        yield


def _encode_all(
    preparation: Preparation, tokenizer: Tokenizer, partial: Path, workers: int, progress: Progress | None
) -> tuple[list[BlockFacts], Findings, int]:
    """Every block of the corpus in ids on disk, what is wrong with it, and how many blocks were there already.

    Problems stop the run as soon as they are too many.
    """
    files = expand(preparation.inputs)
    total = total_bytes(files)
    findings = Findings()
    done: dict[int, BlockFacts] = {}
    reported = kept = 0

    def note(number: int, facts: BlockFacts) -> None:
        nonlocal reported
        done[number] = facts
        while reported in done:  # in the order of the corpus, whoever is ready first
            findings.add(done[reported].problems)
            reported += 1
            findings.raise_if_stopping(preparation.allowance)

    work = _Work(partial, preparation, tokenizer, workers)
    with work:
        for block in blocks_of(
            open_inputs(files, preparation.form), preparation.reading.separation, preparation.block_bytes
        ):
            facts = BlockFacts.read(block_path(partial, block.number))
            if facts is not None and facts.identity == block_identity(block):
                kept += 1
                note(block.number, facts)
            else:
                for number, ready in work.submit(block):
                    note(number, ready)
            if progress is not None:
                progress(block.consumed, total or block.consumed, "reading text")
        for number, ready in work.rest():
            note(number, ready)
    return [done[number] for number in sorted(done)], findings, kept


class _Work:
    """Blocks given to workers, never more waiting than twice their number."""

    def __init__(self, partial: Path, preparation: Preparation, tokenizer: Tokenizer, workers: int) -> None:
        end_of_text = tokenizer.piece_to_id(preparation.end_of_text)
        self.job = _Job(partial, preparation.layout, preparation.reading, end_of_text)
        self.tokenizer = tokenizer
        self.workers = workers
        self._pool: Executor | None = None
        self._running: dict[Future[BlockFacts], int] = {}

    def __enter__(self) -> _Work:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, block: Block) -> Iterator[tuple[int, BlockFacts]]:
        """Give a block away; yields blocks that became ready meanwhile."""
        if self.workers == 1:
            yield block.number, self.job.run(block, self.tokenizer)
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(self.job, str(self.tokenizer.path), self.tokenizer.offset),
            )
        with _without_main():
            self._running[self._pool.submit(_work_on, block)] = block.number
        if len(self._running) >= 2 * self.workers:
            yield from self._ready()

    def rest(self) -> Iterator[tuple[int, BlockFacts]]:
        """Wait for all that was given away."""
        while self._running:
            yield from self._ready()

    def _ready(self) -> Iterator[tuple[int, BlockFacts]]:
        ready, _ = wait(self._running, return_when=FIRST_COMPLETED)
        for future in ready:
            number = self._running.pop(future)
            try:
                yield number, future.result()
            except BrokenExecutor as error:
                raise TrainingError(
                    f"a worker died at block {number:,}, most likely for want of memory",
                    cure="give the same command again with fewer --workers; it goes on where it was",
                ) from error


@dataclass(frozen=True)
class _Job:
    partial: Path
    layout: Layout
    reading: Reading
    end_of_text: int

    def run(self, block: Block, tokenizer: Tokenizer) -> BlockFacts:
        encoded = encode_block(block, tokenizer, self.layout, self.reading, self.end_of_text)
        return write_block(self.partial, block, encoded)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep new workers from running the user's script again, as they would without `if __name__ == "__main__"`.

    A worker imports what it needs from this package; `multiprocessing` looks for the script in these two names.
    """
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    try:
        for name in kept:
            setattr(main, name, None)
        if "__file__" in kept:
            del main.__file__
        yield
    finally:
        for name, value in kept.items():
            setattr(main, name, value)


_here: dict[str, Any] = {}
"""What a worker process holds."""


def _start_worker(job: _Job, tokenizer_file: str, offset: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear
    _here["job"] = job
    _here["tokenizer"] = Tokenizer.from_file(tokenizer_file, image_tokens=offset)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A killed parent cannot tell its workers; they see its end themselves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work_on(block: Block) -> BlockFacts:
    job: _Job = _here["job"]
    return job.run(block, _here["tokenizer"])
