"""`chatglm serve --adapter NAME=DIR`: `model: base:adapter` in every route."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import chatglm
from adapter_folders import low_rank_folder, prefix_folder
from chatglm.config import read_config
from command_line import run
from server_process import ServerProcess

CONFIG = read_config(Path(chatglm.__file__).parent / "assets" / "mini" / "config.json")
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("served")
    return {
        "loud": low_rank_folder(where / "loud", CONFIG, seed=2, size=0.3),
        "tuned": prefix_folder(where / "tuned", CONFIG, length=20, size=3.0),
    }


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> Iterator[ServerProcess]:
    options = [word for name, folder in folders.items() for word in ("--adapter", f"{name}={folder}")]
    server = ServerProcess("--kv-memory", "400MB", *options)
    yield server
    assert server.stop() == 0
    server.close()


def ask(server: ServerProcess, model: str, **more: Any) -> Any:
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 12}
    return server.client.post("/v1/chat/completions", json={**body, **more})


def test_base_and_adapters_are_listed_with_their_parent(served: ServerProcess) -> None:
    listed = served.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["chatglm", "chatglm:loud", "chatglm:tuned"]
    assert listed[0]["adapters"] == ["loud", "tuned"]
    assert [model["parent"] for model in listed[1:]] == ["chatglm", "chatglm"]
    one = served.client.get("/v1/models/chatglm:loud")
    assert one.status_code == 200 and one.json() == listed[1]


def test_each_name_answers_as_the_adapter_does_in_python(served: ServerProcess, folders: dict[str, Path]) -> None:
    model = chatglm.load(dtype="fp32", device="cpu", adapters=folders)
    answers = {}
    for name in ("base", *folders):
        identity = "chatglm" if name == "base" else f"chatglm:{name}"
        reply = ask(served, identity).json()
        assert reply["model"] == identity
        answers[name] = reply["choices"][0]["message"]["content"]
        assert answers[name] == model.chat(QUESTION, adapter=name, temperature=0, max_new_tokens=12).text
    assert len(set(answers.values())) == 3


def test_completions_and_embeddings_know_adapters(served: ServerProcess) -> None:
    texts, vectors = [], []
    for identity in ("chatglm", "chatglm:loud", "chatglm:tuned"):
        body = {"model": identity, "prompt": QUESTION, "temperature": 0, "max_tokens": 8}
        reply = served.client.post("/v1/completions", json=body).json()
        assert reply["model"] == identity
        texts.append(reply["choices"][0]["text"])
        reply = served.client.post("/v1/embeddings", json={"model": identity, "input": QUESTION}).json()
        vectors.append(tuple(reply["data"][0]["embedding"]))
    assert len(set(texts)) == len(set(vectors)) == 3


def test_an_unknown_adapter_is_404_and_names_what_is_served(served: ServerProcess) -> None:
    reply = ask(served, "chatglm:quiet")
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert error["code"] == "model_not_found"
    assert "chatglm, chatglm:loud, chatglm:tuned" in error["message"]


def test_a_wrong_adapter_ends_the_server_before_it_loads(tmp_path: Path) -> None:
    for given, said in (("loud", "must be like"), (f"loud={tmp_path}", "holds no adapter")):
        done = run("serve", "--port", "0", "--adapter", given)
        assert done.returncode in (1, 2)
        assert said in done.stderr.replace("\n", " ") and "Traceback" not in done.stderr
