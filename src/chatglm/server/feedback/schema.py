"""The feedback file: its tables, its migrations, and which files are refused.

Opening makes a file of mode 0600 where there is none, and never changes one that it does not know.
"""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

from ... import __version__
from ...errors import RequestError
from .ids import now_ms

APPLICATION_ID = 0x43474C4D
"""In the file's header: this is a feedback file and not another program's."""

BUSY_TIMEOUT_S = 5.0

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE conversation (
        id TEXT PRIMARY KEY,
        created_at INTEGER NOT NULL,
        key_name TEXT,
        language TEXT NOT NULL,
        system TEXT
    );
    CREATE TABLE answer (
        id TEXT PRIMARY KEY,
        conversation_id TEXT NOT NULL REFERENCES conversation(id) ON DELETE CASCADE,
        parent_id TEXT REFERENCES answer(id) ON DELETE SET NULL,
        round INTEGER NOT NULL,
        variant INTEGER NOT NULL,
        request_id TEXT NOT NULL,
        model TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        messages_json TEXT NOT NULL,
        prompt_ids_sha256 TEXT NOT NULL,
        text TEXT NOT NULL,
        finish_reason TEXT NOT NULL,
        sampling_json TEXT NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        latency_ms INTEGER NOT NULL,
        created_at INTEGER NOT NULL
    );
    CREATE INDEX answer_conversation ON answer(conversation_id);
    CREATE INDEX answer_prompt ON answer(prompt_ids_sha256);
    CREATE TABLE feedback (
        id TEXT PRIMARY KEY,
        answer_id TEXT NOT NULL REFERENCES answer(id) ON DELETE CASCADE,
        rater TEXT NOT NULL,
        thumb INTEGER CHECK (thumb IN (-1, 1)),
        rating INTEGER CHECK (rating BETWEEN 1 AND 5),
        correction TEXT,
        preferred_over TEXT REFERENCES answer(id),
        tags_json TEXT NOT NULL,
        comment TEXT,
        created_at INTEGER NOT NULL,
        updated_at INTEGER NOT NULL,
        UNIQUE (answer_id, rater),
        CHECK (coalesce(thumb, rating, correction, preferred_over) IS NOT NULL)
    );
    CREATE INDEX feedback_preferred ON feedback(preferred_over);
    CREATE TABLE audit (
        id INTEGER PRIMARY KEY,
        at INTEGER NOT NULL,
        action TEXT NOT NULL,
        count INTEGER NOT NULL
    );
    """,
)
"""Number n makes version n + 1 (`user_version`) from version n."""

NETWORK = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "glusterfs", "lustre", "afs", "gpfs", "beegfs", "davfs", "ncpfs")
) | frozenset(f"fuse.{name}" for name in ("sshfs", "glusterfs", "ceph", "s3fs", "gcsfuse", "rclone", "davfs2"))
"""File systems on which SQLite's locks or shared memory do not hold between machines."""


def open_for_writing(path: Path, busy_timeout_s: float = BUSY_TIMEOUT_S) -> sqlite3.Connection:
    """A connection for the writer's thread; the file is made or brought to this version.

    Raises RequestError, in one line, for a network file system, a path that cannot be written, a file that is damaged,
    foreign, or from a later version.
    """
    kind = file_system_of(path)
    if kind in NETWORK:
        raise RequestError(
            f"{path}: the feedback file is on a network file system ({kind})",
            cure="keep it on a local disk; several files are joined by `chatglm data feedback --db A --db B`",
        )
    try:
        _make_private(path)
    except OSError as error:
        raise RequestError(
            f"{path}: the feedback file cannot be written ({error.strerror})",
            cure="give --feedback-db a file in a folder that the server may write",
        ) from error
    connection = sqlite3.connect(path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False)
    try:
        _set_up(connection, path)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise _refusal(path, error) from error
    except RequestError:
        connection.close()
        raise
    return connection


def open_for_reading(path: Path, busy_timeout_s: float = BUSY_TIMEOUT_S) -> sqlite3.Connection:
    """A connection that changes nothing. Raises RequestError as open_for_writing does."""
    if not path.is_file():
        raise RequestError(f"{path}: there is no feedback file", cure="`chatglm serve --feedback-db FILE` makes one")
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=busy_timeout_s)
    connection.row_factory = sqlite3.Row
    try:
        connection.execute("PRAGMA query_only = ON")
        version = _known_version(connection, path)
        if not version:
            raise RequestError(f"{path}: it is empty, not a feedback file")
        _check_whole(connection, path)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise _refusal(path, error) from error
    except RequestError:
        connection.close()
        raise
    return connection


def file_system_of(path: Path, mounts: str | None = None) -> str:
    """Type of the file system that holds a path, as /proc/self/mountinfo names it; empty where that is not known."""
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
    place = str(path.absolute().resolve())
    best, found = "", ""
    for line in mounts.splitlines():
        before, separator, after = line.partition(" - ")
        fields = before.split()
        if not separator or len(fields) < 5:
            continue
        mount = fields[4].replace("\\040", " ")
        is_above = place == mount or place.startswith(mount.rstrip("/") + "/")
        if is_above and len(mount) >= len(best):
            best, found = mount, after.split()[0]
    return found


def _make_private(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(2, f"there is no folder {path.parent}")
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "rb"):
        os.chmod(path, 0o600)


def _set_up(connection: sqlite3.Connection, path: Path) -> None:
    _known_version(connection, path)
    mode = _patiently(connection, "PRAGMA journal_mode = WAL")
    if mode != "wal":
        raise RequestError(
            f"{path}: this file system has no write-ahead log for SQLite (journal mode {mode})",
            cure="keep the feedback file on a local disk",
        )
    for setting in ("synchronous = FULL", "foreign_keys = ON", "secure_delete = ON"):
        connection.execute(f"PRAGMA {setting}")
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _known_version(connection, path)  # again: another server may just have made it
        for number in range(version, len(MIGRATIONS)):
            for statement in MIGRATIONS[number].split(";"):
                if statement.strip():
                    connection.execute(statement)
        if version < len(MIGRATIONS):
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            facts = {"created": str(now_ms())} if not version else {}
            facts |= {"schema_version": str(len(MIGRATIONS)), "app_version": __version__}
            connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", facts.items())
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    _check_whole(connection, path)


def _patiently(connection: sqlite3.Connection, statement: str, patience_s: float = 10.0) -> str:
    """The switch to WAL does not always wait by itself when two processes make it at once."""
    end = time.monotonic() + patience_s
    while True:
        try:
            return str(connection.execute(statement).fetchone()[0])
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.05)


def _known_version(connection: sqlite3.Connection, path: Path) -> int:
    """0 for an empty file. Raises RequestError for a file that is not ours or newer than this program."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and application != APPLICATION_ID:
        raise RequestError(f"{path}: another program's database, not a feedback file", cure="name another file")
    if version > len(MIGRATIONS):
        raise RequestError(
            f"{path}: a feedback file of version {version}; this chatglm knows versions up to {len(MIGRATIONS)}",
            cure="update chatglm",
        )
    return int(version) if tables else 0


def _check_whole(connection: sqlite3.Connection, path: Path) -> None:
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise RequestError(
            f"{path}: the feedback file is damaged ({' '.join(str(found).split())[:80]})", cure=_RECOVER.format(path)
        )


_RECOVER = "nothing was changed; keep a copy, then try `sqlite3 {} .recover`, or name another file"


def _refusal(path: Path, error: sqlite3.DatabaseError) -> RequestError:
    text = str(error)
    if "locked" in text or "busy" in text:
        return RequestError(f"{path}: another process has locked the feedback file", cure="end it and start again")
    if "readonly" in text or "read-only" in text or "unable to open" in text or "full" in text:
        return RequestError(
            f"{path}: the feedback file cannot be written ({text})",
            cure="give --feedback-db a file in a folder that the server may write, with room on its disk",
        )
    return RequestError(f"{path}: damaged, or not a feedback file ({text})", cure=_RECOVER.format(path))
