"""J3: a clone without Git LFS, a download that breaks off, a truncated shard. A local server stands in for the hub."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from chatglm.checkpoint import random_checkpoint
from chatglm.checkpoint.releases import known_sizes, shard_name
from chatglm.config import ModelConfig, to_original
from checkpoint_folders import GOLDEN, SMALL
from command_line import PROGRAM, run

REPO = "THUDM/chatglm-6b"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n"


def pointer(size: int) -> bytes:
    return POINTER.format(digest="0" * 64, size=size).encode()


def hub_server() -> Any:
    """The checkpoint room's stand-in for a hub."""
    path = Path(__file__).parents[1] / "checkpoint" / "hub_server.py"
    spec = importlib.util.spec_from_file_location("journey_hub_server", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub() -> Iterator[Any]:
    module = hub_server()
    held = module.Hub()

    class Handler(module.Handler):  # type: ignore[name-defined,misc]
        hub = held

        def answer(self) -> None:
            self.path = self.path.replace(REPO, "owner/model")
            super().answer()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    held.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield held
    server.shutdown()
    thread.join()
    server.server_close()


def test_clone_without_lfs_names_nine_pointers_and_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_original(ModelConfig())))
    for name, size in known_sizes(ModelConfig()).items():
        (folder / name).write_bytes(pointer(size))
    (folder / "ice_text.model").write_bytes(pointer(2_706_249))
    done = run("verify", folder)
    assert done.returncode == 1
    assert done.stdout.count("is a Git-LFS pointer") == 9
    assert "1,740,651,802 bytes" in done.stdout
    assert f"chatglm pull {REPO}" in done.stdout
    assert "9 problems" in done.stderr


@pytest.fixture
def published(tmp_path: Path, hub: Any) -> dict[str, bytes]:
    """A small checkpoint in eight shards, pushed to the stand-in."""
    folder = tmp_path / "published"
    random_checkpoint(folder, SMALL, max_shard_bytes=7_000, tokenizer_file=GOLDEN / "tokenizer-reduced/ice_text.model")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.push({**files, "modeling_chatglm.py": b"raise SystemExit"})
    return files


def test_interrupted_pull_resumes_and_the_result_is_fit_to_load(
    tmp_path: Path, hub: Any, published: dict[str, bytes]
) -> None:
    shard = max((name for name in published if name.endswith(".bin")), key=lambda name: len(published[name]))
    hub.breaks_after[shard] = [1_000] * 50
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    first = run("pull", REPO, "--to", tmp_path / "d", **online)
    hub.breaks_after.clear()
    second = run("pull", REPO, "--to", tmp_path / "d", **online)
    assert second.returncode == 0, second.stderr
    assert f"{REPO} is in {tmp_path / 'd'}" in second.stdout
    assert f"Try: chatglm chat {tmp_path / 'd'}" in second.stderr
    if first.returncode:  # the second command went on where the first one was
        assert "cure:" in first.stderr
        ranges = [headers.get("Range") for _, path, headers in hub.requests if path.endswith(shard)]
        assert any(ranges)
    done = run("verify", "--deep", tmp_path / "d")
    assert done.returncode == 0, done.stdout
    assert not (tmp_path / "d" / "modeling_chatglm.py").exists()
    chat = run("chat", tmp_path / "d", "--max-new-tokens", "2", "--threads", "1", stdin="你好\n")
    assert chat.returncode == 0, chat.stderr


def test_pull_of_what_does_not_exist_is_one_error(tmp_path: Path, hub: Any) -> None:
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    done = run("pull", "THUDM/none", **online)
    assert done.returncode == 1
    assert "has no THUDM/none" in done.stderr and "cure:" in done.stderr
    assert "Traceback" not in done.stderr


PEAK = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print("peak", peak // 1024 if sys.platform == "darwin" else peak, file=sys.stderr)
sys.exit(done.returncode)
"""


def test_truncated_shard_is_told_with_both_sizes_before_memory_is_spent(full_size: Path) -> None:
    assert run("verify", full_size).returncode == 0
    name = shard_name(2)
    os.truncate(full_size / name, 100_000_000)
    done = run(*PROGRAM, "chat", full_size, program=(sys.executable, "-c", PEAK))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{name} is truncated at 100,000,000 of 1,980,385,902 bytes" in done.stderr
    assert "tensor: transformer.layers.6.mlp" in done.stderr
    assert f"chatglm pull {REPO}" in done.stderr
    assert int(done.stderr.rpartition("peak ")[2]) < 500_000  # kB


def test_a_damaged_checkpoint_is_told_before_pytorch_is_imported(full_size: Path) -> None:
    os.truncate(full_size / shard_name(2), 100_000_000)
    code = (
        "import sys; from chatglm.cli import main\n"
        "try: main()\nfinally: print(*sys.modules, sep='\\n', file=sys.stderr)"
    )
    done = run("chat", full_size, program=(sys.executable, "-c", code))
    assert "is truncated" in done.stderr
    assert "torch" not in done.stderr.split()
