"""Checkpoints from the hub: `pull` downloads one, `resolve` finds what is already here. Only `pull` opens a socket."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DownloadError
from ..tokenizer.model_file import TOKENIZER_FILE
from .atomic import write_whole
from .folder import BIN, CONFIG, INDEX, SAFETENSORS, SHARD, TOKENIZER_CONFIG
from .tensor_file import Progress, sizes_said
from .transfer import RemoteFile, fetch, has_etag

SMALL_FILES = (CONFIG, TOKENIZER_CONFIG, TOKENIZER_FILE, "generation_config.json", "LICENSE", "MODEL_LICENSE")
NOTE = ".chatglm-pull.json"
"""Where a folder made by `pull(to=…)` remembers repository and commit."""

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DEFAULT_REVISION = "main"

PAUSE_S = 1.0
"""Before a broken line is tried again; doubled each time."""


def resolve(source: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `source` itself, or where a hub name was pulled to. Never opens a socket.

    revision  branch, tag or commit of a hub name
    Raises DownloadError for a hub name that was not pulled, with the command; CheckpointError for a folder that is not.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; a checkpoint is a folder", cure=f"give {folder.parent}")
    name = str(source)
    if not HUB_NAME.fullmatch(name):
        raise CheckpointError(f"{folder} does not exist", cure="give a checkpoint folder or a hub name (OWNER/NAME)")
    cached = _cached(name, revision)
    if cached is None:
        at = f" at revision {revision}" if revision else ""
        raise DownloadError(f"{name}{at} is neither a folder here nor downloaded", cure=f"`{_command(name, revision)}`")
    return cached


def pull(
    repo: str,
    to: str | Path | None = None,
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Download the files of a checkpoint that are needed, never Python files; returns the folder.

    to        a folder of your own; by default the cache that transformers uses too
    revision  branch, tag or commit; `commit_of(folder)` tells which commit it was
    endpoint  a mirror; HF_ENDPOINT in the environment does the same. Your stored token is not sent to a mirror
    offline   ask nobody (HF_HUB_OFFLINE does the same): the folder that is here, or an error

    Interrupted downloads go on where they stopped, unchanged files are not fetched again, every file is compared with
    its hash. Raises DownloadError when the hub cannot be reached or does not have it, CheckpointError for a full disk.
    """
    if not HUB_NAME.fullmatch(repo):
        raise DownloadError(f"{repo!r} is no hub name", cure="give OWNER/NAME, such as THUDM/chatglm-6b")
    from huggingface_hub import constants

    folder = None if to is None else Path(to).expanduser()
    if offline or constants.HF_HUB_OFFLINE:
        return _without_network(repo, revision, folder)
    hub = _Hub.at(endpoint, token)
    with _asking(repo, revision, hub.endpoint):
        info = hub.api.repo_info(repo, revision=revision)
        commit = str(info.sha)
        names = needed_files([file.rfilename for file in info.siblings or []])
        if not any(name.endswith((".safetensors", ".bin")) for name in names):
            raise DownloadError(f"{repo} holds no weights that are read here", cure="pull a ChatGLM-6B repository")
        remotes = [hub.look_up(repo, commit, name) for name in names]
    place: _Folder | _Cache = _Cache(repo, revision, commit, hub) if folder is None else _Folder(folder, repo, commit)
    _fetch_all(remotes, place, hub.token, progress)
    with _asking(repo, revision, hub.endpoint):
        return place.finish(remotes)


def commit_of(folder: str | Path) -> str | None:
    """The hub commit that a pulled folder holds, or None for a folder of other origin."""
    folder = Path(folder)
    if folder.parent.name == "snapshots":
        return folder.name
    try:
        commit = json.loads((folder / NOTE).read_text(encoding="utf-8"))["commit"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(commit)


def needed_files(names: list[str]) -> list[str]:
    """Of the files of a repository those that loading reads: safetensors where there are some, else `.bin` shards."""
    found = [name for name in SMALL_FILES if name in names]
    for single in (SAFETENSORS, BIN):
        stem = single.split(".")[0]
        shards = [name for name in names if (match := SHARD.fullmatch(name)) and match[1] == stem]
        weights = [name for name in (single, f"{single}{INDEX}", *sorted(shards)) if name in names]
        if weights:
            return found + weights
    return found


def _fetch_all(
    remotes: list[RemoteFile], place: _Folder | _Cache, token: str | None, progress: Progress | None
) -> None:
    total, done = sum(remote.size for remote in remotes), 0

    def tell(what: str) -> None:
        if progress is not None:
            progress(min(max(done, 0), total), total, what)

    wanted = []
    for remote in remotes:
        tell(f"checking {remote.name}")
        if place.has(remote):
            done += remote.size
        else:
            wanted.append(remote)
    _check_disk(place.root, sum(remote.size for remote in wanted))
    for remote in wanted:

        def count(nbytes: int, name: str = remote.name) -> None:
            nonlocal done
            done += nbytes
            tell(name)

        fetch(remote, place.path(remote), token=token, count=count, pause_s=PAUSE_S)


def _check_disk(root: Path, needed: int) -> None:
    place = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"the download needs {sizes_said(needed)}, but {sizes_said(free)} are free in {root}",
            cure="free some space, or give another folder (`--to`)",
        )


@dataclass(frozen=True)
class _Hub:
    """The API of one endpoint."""

    api: Any
    endpoint: str
    token: str | None

    @classmethod
    def at(cls, endpoint: str | None, token: str | None) -> _Hub:
        from huggingface_hub import HfApi, constants, get_token

        is_mirror = endpoint is not None or "HF_ENDPOINT" in os.environ
        endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        if token is None and not is_mirror:
            token = get_token()
        return cls(HfApi(endpoint=endpoint, token=token or False), endpoint, token)

    def look_up(self, repo: str, commit: str, name: str) -> RemoteFile:
        """Size and hash of a file, without its bytes."""
        url = f"{self.endpoint}/{repo}/resolve/{commit}/{name}"
        found = self.api.get_hf_file_metadata(url=url, token=self.token or False)
        if found.size is None or found.etag is None:
            raise DownloadError(f"{self.endpoint} does not tell size and hash of {name}", cure="use another mirror")
        return RemoteFile(name, url, int(found.size), str(found.etag))


@dataclass(frozen=True)
class _Folder:
    """A folder of the user's own as the target."""

    root: Path
    repo: str
    commit: str

    def path(self, remote: RemoteFile) -> Path:
        return self.root / remote.name

    def has(self, remote: RemoteFile) -> bool:
        path = self.path(remote)
        return path.is_file() and path.stat().st_size == remote.size and has_etag(path, remote.etag)

    def finish(self, remotes: list[RemoteFile]) -> Path:
        note = {"repo": self.repo, "commit": self.commit, "files": {file.name: file.etag for file in remotes}}
        write_whole(self.root / NOTE, json.dumps(note, indent=2).encode())
        return self.root


@dataclass(frozen=True)
class _Cache:
    """huggingface_hub's cache as the target: contents by hash, which its own code then links under the names."""

    repo: str
    revision: str | None
    commit: str
    hub: _Hub

    @property
    def root(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.repo.replace('/', '--')}"

    def path(self, remote: RemoteFile) -> Path:
        return self.root / "blobs" / remote.etag

    def has(self, remote: RemoteFile) -> bool:
        path = self.path(remote)
        return path.is_file() and path.stat().st_size == remote.size

    def finish(self, remotes: list[RemoteFile]) -> Path:
        from huggingface_hub import hf_hub_download

        revision = self.revision or DEFAULT_REVISION
        for remote in remotes:
            linked = hf_hub_download(
                self.repo,
                remote.name,
                revision=self.commit,
                endpoint=self.hub.endpoint,
                token=self.hub.token or False,
                cache_dir=str(self.root.parent),
            )
        if revision != self.commit:
            (self.root / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.root / "refs" / revision, self.commit.encode())
        return Path(linked).parent


def _cached(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, CONFIG, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _without_network(repo: str, revision: str | None, folder: Path | None) -> Path:
    if folder is not None and (folder / CONFIG).is_file():
        return folder
    found = None if folder is not None else _cached(repo, revision)
    if found is None:
        where = str(folder) if folder is not None else "the download cache"
        raise DownloadError(
            f"{repo} is not in {where}, and offline mode is on",
            cure="go online once, without --offline and HF_HUB_OFFLINE, or copy the folder from another machine",
        )
    return found


def _command(repo: str, revision: str | None) -> str:
    return f"chatglm pull {repo}" + (f" --revision {revision}" if revision else "")


@contextmanager
def _asking(repo: str, revision: str | None, endpoint: str) -> Iterator[None]:
    """The library's many exceptions as one DownloadError each."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        cure = "accept the licence on its page, then log in (`hf auth login`) or give a token"
        raise DownloadError(f"{repo} asks for its licence to be accepted", cure=cure) from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"{endpoint} has no {repo}, or it is private",
            cure="check the name; for a private one log in or give a token",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(
            f"{repo} has no revision {revision!r}", cure="give a branch, tag or commit of it"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise DownloadError(f"{endpoint}: {_first_line(error)}", cure="try again later, or use a mirror") from error
    except _transport_errors() as error:
        raise DownloadError(
            f"{endpoint} cannot be reached ({_first_line(error)})",
            cure="check the network and the proxy; HF_ENDPOINT names a mirror; a folder that is here needs no network",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _transport_errors() -> tuple[type[BaseException], ...]:
    """The error base of whichever HTTP library huggingface_hub brought: requests before 1.0, httpx or httpx2 since."""
    errors: list[type[BaseException]] = [
        sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules
    ]
    return (OSError, *errors)
