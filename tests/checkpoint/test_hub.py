"""Downloading from a hub: a real HTTP server on this machine stands in for it."""

from __future__ import annotations

import shutil
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, running_hub
from huggingface_hub import constants

from chatglm.checkpoint import hub as hub_module
from chatglm.checkpoint import open_checkpoint, transfer, verify
from chatglm.checkpoint.hub import commit_of, needed_files, pull, resolve
from chatglm.errors import CheckpointError, DownloadError
from checkpoint_folders import MODELS, golden_copy, small_safetensors

SHARD = "pytorch_model-00002-of-00002.bin"


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The rest of the suite forbids the network; here it is this machine only, without waiting between attempts."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_module, "PAUSE_S", 0.0)
    for name in ("HF_TOKEN", "HF_ENDPOINT", "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as server:
        yield server


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """A sharded original checkpoint with everything else that its repository holds."""
    found = files_of(golden_copy("base-fp32", tmp_path))
    return found | {"modeling_chatglm.py": b"raise SystemExit", "README.md": b"card", "MODEL_LICENSE": b"terms"}


def test_a_checkpoint_is_pulled_into_a_folder_without_its_python_files(
    tmp_path: Path, hub: Hub, files: dict[str, bytes]
) -> None:
    commit = hub.push(files)
    folder = pull("owner/model", tmp_path / "deep" / "model", endpoint=hub.url)
    assert folder == tmp_path / "deep" / "model" and verify(folder, deep=True) == []
    wanted = {name: data for name, data in files.items() if name not in ("modeling_chatglm.py", "README.md")}
    held = files_of(folder)
    note = held.pop(".chatglm-pull.json")
    assert held == wanted and commit.encode() in note
    assert commit_of(folder) == commit
    assert not [path for _, path, _ in hub.requests if path.endswith((".py", ".md"))]


def test_the_cache_is_the_one_that_other_libraries_use(tmp_path: Path, hub: Hub, files: dict[str, bytes]) -> None:
    from huggingface_hub import hf_hub_download

    commit = hub.push(files)
    folder = pull("owner/model", endpoint=hub.url)
    assert folder == tmp_path / "cache" / "models--owner--model" / "snapshots" / commit
    assert verify(folder, deep=True) == [] and commit_of(folder) == commit
    assert resolve("owner/model") == folder == resolve("owner/model", revision=commit)
    found = hf_hub_download("owner/model", SHARD, cache_dir=str(tmp_path / "cache"), local_files_only=True)
    assert Path(found).read_bytes() == files[SHARD]


@pytest.mark.parametrize("into_cache", [True, False])
def test_a_second_pull_fetches_nothing(tmp_path: Path, hub: Hub, files: dict[str, bytes], into_cache: bool) -> None:
    hub.push(files)
    to = None if into_cache else tmp_path / "model"
    first = pull("owner/model", to, endpoint=hub.url)
    hub.requests.clear()
    assert pull("owner/model", to, endpoint=hub.url) == first
    assert hub.fetched() == {}


@pytest.mark.parametrize("into_cache", [True, False])
def test_a_new_revision_fetches_only_what_changed(
    tmp_path: Path, hub: Hub, files: dict[str, bytes], into_cache: bool
) -> None:
    old = hub.push(files)
    to = None if into_cache else tmp_path / "model"
    pull("owner/model", to, endpoint=hub.url)
    hub.requests.clear()
    changed = files | {SHARD: files[SHARD] + b"", "tokenizer_config.json": b"{}", "README.md": b"an edit"}
    new = hub.push(changed)
    folder = pull("owner/model", to, endpoint=hub.url)
    assert hub.fetched() == {"tokenizer_config.json": 1}
    assert commit_of(folder) == new != old and (folder / "tokenizer_config.json").read_bytes() == b"{}"


@pytest.mark.parametrize("into_cache", [True, False])
def test_a_revision_is_pinned_by_branch_or_commit(
    tmp_path: Path, hub: Hub, files: dict[str, bytes], into_cache: bool
) -> None:
    old = hub.push(files, branch="v0.1.0")
    hub.push(files | {"tokenizer_config.json": b"{}"})
    for revision in ("v0.1.0", old):
        to = None if into_cache else tmp_path / revision
        folder = pull("owner/model", to, revision=revision, endpoint=hub.url)
        assert commit_of(folder) == old
        assert (folder / "tokenizer_config.json").read_bytes() == files["tokenizer_config.json"]
        if into_cache:
            assert resolve("owner/model", revision=revision) == folder


@pytest.mark.parametrize("into_cache", [True, False])
def test_a_broken_line_is_picked_up_where_it_broke(
    tmp_path: Path, hub: Hub, files: dict[str, bytes], into_cache: bool
) -> None:
    hub.push(files)
    hub.breaks_after[SHARD] = [100_000, 50_000]
    seen: list[tuple[int, int, str]] = []
    to = None if into_cache else tmp_path / "model"
    folder = pull("owner/model", to, endpoint=hub.url, progress=lambda *now: seen.append(now))
    assert verify(folder, deep=True) == []
    ranges = [
        headers.get("Range") for method, path, headers in hub.requests if path.startswith("/storage") and SHARD in path
    ]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert seen[-1][0] == seen[-1][1] == sum(path.stat().st_size for path in folder.iterdir() if path.name[0] != ".")
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


@pytest.mark.parametrize("into_cache", [True, False])
def test_an_interrupted_pull_goes_on_in_the_next_process(
    tmp_path: Path, hub: Hub, files: dict[str, bytes], into_cache: bool
) -> None:
    hub.push(files)
    hub.breaks_after[SHARD] = [40_000] + [0] * (transfer.ATTEMPTS - 1)
    to = None if into_cache else tmp_path / "model"
    with pytest.raises(DownloadError, match=rf"{SHARD} stopped at 40,000 of [0-9,]+ bytes") as stopped:
        pull("owner/model", to, endpoint=hub.url)
    assert "goes on from there" in str(stopped.value.cure)
    hub.requests.clear()
    folder = pull("owner/model", to, endpoint=hub.url)
    assert hub.fetched() == {SHARD: 1} and verify(folder, deep=True) == []
    (headers,) = [headers for method, path, headers in hub.requests if path.startswith("/storage")]
    assert headers["Range"] == "bytes=40000-"


def test_a_server_without_ranges_sends_the_whole_file_again(tmp_path: Path, hub: Hub, files: dict[str, bytes]) -> None:
    hub.push(files)
    hub.knows_ranges = False
    hub.breaks_after[SHARD] = [100_000]
    assert verify(pull("owner/model", tmp_path / "model", endpoint=hub.url), deep=True) == []


def test_what_is_left_of_a_longer_file_is_not_gone_on_with(tmp_path: Path, hub: Hub, files: dict[str, bytes]) -> None:
    import hashlib

    hub.push(files)
    folder = tmp_path / "model"
    folder.mkdir()
    etag = hashlib.sha256(files[SHARD]).hexdigest()
    (folder / f".{SHARD}.{etag[:16]}.part").write_bytes(files[SHARD] + b"more")
    assert verify(pull("owner/model", folder, endpoint=hub.url), deep=True) == []


def test_two_processes_do_not_write_into_one_file(tmp_path: Path, hub: Hub, files: dict[str, bytes]) -> None:
    fcntl = pytest.importorskip("fcntl")
    import hashlib

    hub.push(files)
    (tmp_path / "model").mkdir()
    part = tmp_path / "model" / f".{SHARD}.{hashlib.sha256(files[SHARD]).hexdigest()[:16]}.part"
    with part.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="is being downloaded by another process"):
            pull("owner/model", tmp_path / "model", endpoint=hub.url)
    assert verify(pull("owner/model", tmp_path / "model", endpoint=hub.url), deep=True) == []


def test_a_file_that_grew_meanwhile_is_measured_again(
    tmp_path: Path, hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(files)
    claimed: list[int] = []

    def grow(file: Any, remote: transfer.RemoteFile) -> None:
        if remote.name == SHARD and not claimed:
            claimed.append(file.write(files[SHARD][:1_000]))

    monkeypatch.setattr(transfer, "_claim", grow)
    assert verify(pull("owner/model", tmp_path / "model", endpoint=hub.url), deep=True) == [] and claimed


def test_a_download_that_was_complete_is_only_checked(tmp_path: Path, hub: Hub, files: dict[str, bytes]) -> None:
    import hashlib

    hub.push(files)
    folder = tmp_path / "model"
    folder.mkdir()
    etag = hashlib.sha256(files[SHARD]).hexdigest()
    (folder / f".{SHARD}.{etag[:16]}.part").write_bytes(files[SHARD])
    pull("owner/model", folder, endpoint=hub.url)
    assert SHARD not in hub.fetched() and verify(folder) == []


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_damaged_bytes_are_not_taken_over(tmp_path: Path, hub: Hub, files: dict[str, bytes], name: str) -> None:
    hub.push(files)
    hub.damaged.add(name)
    with pytest.raises(DownloadError, match=f"{name} arrived damaged"):
        pull("owner/model", tmp_path / "model", endpoint=hub.url)
    assert not (tmp_path / "model" / name).exists()
    hub.damaged.clear()
    assert verify(pull("owner/model", tmp_path / "model", endpoint=hub.url), deep=True) == []


def test_a_broken_file_of_a_folder_is_repaired_and_nothing_else_fetched(
    tmp_path: Path, hub: Hub, files: dict[str, bytes]
) -> None:
    hub.push(files)
    folder = pull("owner/model", tmp_path / "model", endpoint=hub.url)
    data = bytearray(files[SHARD])
    data[1_000] ^= 1
    (folder / SHARD).write_bytes(data)
    (folder / "ice_text.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    hub.requests.clear()
    assert verify(pull("owner/model", folder, endpoint=hub.url), deep=True) == []
    assert hub.fetched() == {SHARD: 1, "ice_text.model": 1}


def test_the_token_goes_to_the_hub_and_not_to_its_storage(tmp_path: Path, hub: Hub, files: dict[str, bytes]) -> None:
    hub.push(files)
    pull("owner/model", tmp_path / "model", endpoint=hub.url, token="secret")
    for _, path, headers in hub.requests:
        assert headers.get("Authorization", headers.get("authorization")) == (
            None if path.startswith("/storage") else "Bearer secret"
        ), path


def test_a_stored_token_is_not_sent_to_a_mirror(
    tmp_path: Path, hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_stored")
    hub.push(files)
    pull("owner/model", tmp_path / "a", endpoint=hub.url)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # read from the environment at import
    pull("owner/model", tmp_path / "b")
    assert not [headers for _, _, headers in hub.requests if "hf_stored" in str(headers)]
    monkeypatch.delenv("HF_ENDPOINT")  # now it counts as the hub itself
    pull("owner/model", tmp_path / "c")
    assert [headers for _, path, headers in hub.requests if "hf_stored" in str(headers)]


def test_safetensors_are_preferred_to_bin_files(tmp_path: Path, hub: Hub) -> None:
    files = files_of(small_safetensors(tmp_path / "source")) | {"pytorch_model.bin": b"not wanted"}
    hub.push(files)
    folder = pull("owner/model", tmp_path / "model", endpoint=hub.url)
    assert not (folder / "pytorch_model.bin").exists() and open_checkpoint(folder).tensors


def test_the_needed_files_of_repositories() -> None:
    names = ["config.json", "a.py", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names += ["model.safetensors.index.json", "pytorch_model-00001-of-00001.bin", "other.safetensors"]
    assert needed_files(names) == [names[0], names[4], names[2], names[3]]
    assert needed_files(["config.json", "LICENSE"]) == ["config.json", "LICENSE"]
    assert needed_files(["pytorch_model.bin", "ice_text.model"]) == ["ice_text.model", "pytorch_model.bin"]


def test_what_the_hub_does_not_have_is_one_error_with_a_cure(tmp_path: Path, hub: Hub, files: dict[str, bytes]) -> None:
    hub.push(files)
    with pytest.raises(DownloadError, match=r"has no owner/absent, or it is private") as missing:
        pull("owner/absent", tmp_path / "a", endpoint=hub.url)
    assert "check the name" in str(missing.value.cure)
    with pytest.raises(DownloadError, match="owner/model has no revision 'v9'"):
        pull("owner/model", tmp_path / "a", revision="v9", endpoint=hub.url)
    hub.push({"config.json": b"{}", "weights.gguf": b""})
    with pytest.raises(DownloadError, match="holds no weights that are read here"):
        pull("owner/model", tmp_path / "a", endpoint=hub.url)
    hub.refuses = "GatedRepo"
    with pytest.raises(DownloadError, match="asks for its licence to be accepted"):
        pull("owner/model", tmp_path / "a", endpoint=hub.url)
    assert not (tmp_path / "a").exists()


def test_a_hub_that_fails_is_one_error(tmp_path: Path, hub: Hub, files: dict[str, bytes]) -> None:
    hub.push(files)
    hub.status = 418
    with pytest.raises(DownloadError, match="418"):
        pull("owner/model", tmp_path / "a", endpoint=hub.url)


@pytest.mark.parametrize(("status", "cure"), [(403, "log in"), (410, "check the name")])
def test_a_file_that_is_refused_is_one_error(
    tmp_path: Path, hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, status: int, cure: str
) -> None:
    hub.push(files)
    inner = transfer.fetch

    def refuse(*arguments: Any, **options: Any) -> None:
        hub.status = status
        inner(*arguments, **options)

    monkeypatch.setattr(hub_module, "fetch", refuse)
    with pytest.raises(DownloadError, match=f"the hub answers {status}") as refused:
        pull("owner/model", tmp_path / "a", endpoint=hub.url)
    assert cure in str(refused.value.cure)


def test_a_server_error_is_tried_again(
    tmp_path: Path, hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(files)
    inner, calls = urllib.request.urlopen, []

    def flaky(request: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            hub.status = 503
        try:
            return inner(request, **options)
        finally:
            hub.status = 0

    monkeypatch.setattr(urllib.request, "urlopen", flaky)
    assert verify(pull("owner/model", tmp_path / "model", endpoint=hub.url)) == []


def test_a_hub_without_hashes_is_refused(tmp_path: Path, hub: Hub, files: dict[str, bytes]) -> None:
    hub.push(files)
    hub.hides_etags = True
    with pytest.raises(DownloadError, match=r"does not tell size and hash of config\.json"):
        pull("owner/model", tmp_path / "a", endpoint=hub.url)


def test_a_hub_that_cannot_be_reached_is_one_error_that_names_the_mirror_switch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DownloadError, match=rf"http://127\.0\.0\.1:{port} cannot be reached") as refused:
        pull("owner/model", tmp_path / "a", endpoint=f"http://127.0.0.1:{port}/")
    assert "HF_ENDPOINT" in str(refused.value.cure) and len(str(refused.value).splitlines()) <= 5


def test_free_disk_is_checked_before_the_first_byte(
    tmp_path: Path, hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(files)
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"the download needs [0-9,]+ bytes, but 1,000 bytes are free"):
        pull("owner/model", tmp_path / "a", endpoint=hub.url)
    assert hub.fetched() == {}


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_sockets")
def test_a_local_folder_never_opens_a_socket(tmp_path: Path) -> None:
    import torch

    from chatglm.checkpoint import convert, load_into
    from chatglm.model import GLM

    folder = resolve(golden_copy("base-fp16", tmp_path))
    assert verify(folder, deep=True) == []
    checkpoint = open_checkpoint(folder)
    load_into(GLM(checkpoint.config), checkpoint, dtype=torch.float32)
    convert(folder, tmp_path / "new")


@pytest.mark.usefixtures("no_sockets")
def test_offline_a_pulled_checkpoint_is_found_and_another_is_an_error(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    assert pull("owner/model", folder, offline=True) == folder
    for to in (None, tmp_path / "absent"):
        with pytest.raises(DownloadError, match="offline mode is on") as refused:
            pull("owner/model", to, offline=True)
        assert "HF_HUB_OFFLINE" in str(refused.value.cure)


def test_offline_mode_of_the_environment_is_obeyed(
    tmp_path: Path, hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(files)
    folder = pull("owner/model", endpoint=hub.url)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull("owner/model", endpoint=hub.url) == folder and hub.requests == []


@pytest.mark.usefixtures("no_sockets")
def test_a_name_that_was_not_pulled_is_an_error_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="neither a folder here nor downloaded") as refused:
        resolve("THUDM/chatglm-6b")
    assert refused.value.cure == "`chatglm pull THUDM/chatglm-6b`"
    with pytest.raises(DownloadError, match=r"at revision v1\.1\.0") as refused:
        resolve("THUDM/chatglm-6b", revision="v1.1.0")
    assert refused.value.cure == "`chatglm pull THUDM/chatglm-6b --revision v1.1.0`"


def test_what_is_neither_folder_nor_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve(tmp_path / "absent")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file; a checkpoint is a folder"):
        resolve(tmp_path / "model.bin")
    with pytest.raises(DownloadError, match="'chatglm' is no hub name"):
        pull("chatglm")


def test_a_folder_of_other_origin_has_no_commit(tmp_path: Path) -> None:
    assert commit_of(MODELS / "base-fp16") is None
    (tmp_path / ".chatglm-pull.json").write_text("[]")
    assert commit_of(tmp_path) is None


def test_an_etag_that_is_no_hash_is_not_compared(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert transfer.has_etag(tmp_path / "file", "W/some-etag")
    assert not transfer.has_etag(tmp_path / "file", "0" * 64)
    assert not transfer.has_etag(tmp_path / "file", "0" * 40)
