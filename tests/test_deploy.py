"""deploy/ and docs/deploy.md: what can be checked without building anything."""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"

pytestmark = pytest.mark.skipif(not DEPLOY.is_dir(), reason="deploy/ is not beside the tests")

DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")
KNOWN = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "STOPSIGNAL"}
KNOWN |= {"USER", "VOLUME", "WORKDIR"}


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Every option of `chatglm serve`."""
    command = [sys.executable, "-m", "chatglm.cli", "serve", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env={"COLUMNS": "200"}).stdout
    return set(re.findall(r"--[a-z][a-z-]+", text))


def instructions(name: str) -> list[tuple[str, str]]:
    """Instructions with their words, lines joined and comments left out."""
    text = (DEPLOY / name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def last_stage(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    start = max(place for place, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


def check_serve(words: list[str], options: set[str]) -> None:
    assert words[0] == "serve"
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= options


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_runs_as_a_user_with_a_health_check_and_without_secrets(name, options):
    found = instructions(name)
    assert {word for word, _ in found} <= KNOWN  # no ADD, which fetches and unpacks
    stage = last_stage(found)
    values = dict(stage)
    users = [value for word, value in stage if word == "USER"]
    assert users and re.fullmatch(r"[1-9]\d+:[1-9]\d+", users[-1])
    assert stage.index(("USER", users[-1])) > max(i for i, (word, _) in enumerate(stage) if word == "RUN")
    assert "/health" in values["HEALTHCHECK"] and "--start-period" in values["HEALTHCHECK"]
    assert values["STOPSIGNAL"] == "SIGTERM"
    command = json.loads(values["ENTRYPOINT"]) + json.loads(values["CMD"])  # words, so that signals reach the server
    assert command[0] == "chatglm"
    check_serve(command[1:], options)
    assert "--api-key-file" in command  # it listens on all addresses
    text = (DEPLOY / name).read_text(encoding="utf-8")
    assert not re.search(r"(?i)^(ENV|ARG)\b.*(password|secret|token|api_?key)", text, re.MULTILINE)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_made_of_pinned_parts_that_exist(name):
    found = instructions(name)
    for word, value in found:
        if word == "FROM":
            assert re.match(r"\S+:\d[\w.-]+", value), value  # a version, not `latest`
        if word == "COPY" and not value.startswith("--from"):
            assert all((ROOT / source).exists() for source in value.split()[:-1]), value
        if word == "RUN" and "pip install" in value:
            assert "--constraint constraints.txt" in value and "--no-cache-dir" in value
            (extras,) = re.findall(r"\.\[([\w,]+)\]", value)
            declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            assert all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for extra in extras.split(","))
        if word == "RUN" and "apt-get install" in value:
            assert "--no-install-recommends" in value and "rm -rf /var/lib/apt/lists" in value


def test_the_health_check_of_an_image_is_python_that_runs():
    for name in DOCKERFILES:
        command = json.loads(dict(last_stage(instructions(name)))["HEALTHCHECK"].split("CMD", 1)[1])
        assert command[:2] == ["python", "-c"]
        compile(command[2], name, "exec")


def test_compose_opens_the_proxy_only_and_gives_the_server_time_to_finish(options):
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    server, proxy = found["services"]["chatglm"], found["services"]["proxy"]
    assert "ports" not in server and proxy["ports"]
    for service in (server, proxy):
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and "privileged" not in service
        assert service["security_opt"] == ["no-new-privileges:true"] and service["restart"] == "unless-stopped"
    check_serve(server["command"], options)
    given = dict(word.removeprefix("--").split("=") for word in server["command"] if "=" in word)
    assert given["trusted-proxy"] == proxy["networks"]["inside"]["ipv4_address"]
    assert int(server["stop_grace_period"].removesuffix("s")) > int(given["drain-timeout"])
    (secret,) = server["secrets"]
    assert given["api-key-file"] == f"/run/secrets/{secret}" and secret in found["secrets"]
    assert given["feedback-db"].startswith(server["volumes"][0].split(":")[1])
    assert proxy["depends_on"]["chatglm"]["condition"] == "service_healthy"
    assert not re.search(r":latest\b", str(found))
    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).is_file()
    for volume in [*server["volumes"], *proxy["volumes"]]:
        source = volume.split(":")[0]
        assert (DEPLOY / source).is_file() if source.startswith(".") else source in found["volumes"]


def test_the_file_for_gpus_changes_the_server_of_the_other_file():
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((DEPLOY / "compose.cuda.yaml").read_text(encoding="utf-8"))
    (server,) = found["services"].values()
    assert list(found["services"]) == ["chatglm"] and (ROOT / server["build"]["dockerfile"]).is_file()
    assert server["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_the_proxy_holds_no_stream_back_and_has_time_limits():
    text = re.sub(r"#.*", "", (DEPLOY / "Caddyfile").read_text(encoding="utf-8"))
    assert text.count("{") == text.count("}")
    assert "flush_interval -1" in text and "encode" not in text
    for limit in ("read_header", "read_body", "max_header_size", "max_size"):
        assert re.search(rf"\b{limit}\s+\d", text), limit
    (keep,) = re.findall(r"\bkeepalive (\d+)s", text)
    assert int(keep) < 5  # the server closes idle connections after 5 s
    waits = re.findall(r"(?:response_header_timeout|read_timeout) (\d+)s", text)
    assert len(waits) == 2 and min(map(int, waits)) > 600  # --request-timeout


def test_the_systemd_unit_starts_a_command_that_exists_and_waits_for_the_drain(options):
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "chatglm.service", encoding="utf-8")
    service = unit["Service"]
    command = shlex.split(service["ExecStart"])
    assert command[0].endswith("/chatglm")
    check_serve(command[1:], options)
    drain = int(command[command.index("--drain-timeout") + 1])
    assert int(service["TimeoutStopSec"]) > drain and service["KillSignal"] == "SIGTERM"
    assert service["KillMode"] == "mixed"  # children of --replicas finish their answers
    assert service["Restart"] == "on-failure" and service["DynamicUser"] == "yes"
    assert service["LoadCredential"].startswith("keys:") and "${CREDENTIALS_DIRECTORY}/keys" in service["ExecStart"]


def test_the_sizing_tables_of_the_document_are_those_that_the_script_makes():
    spec = importlib.util.spec_from_file_location("sizing", ROOT / "benchmarks" / "sizing.py")
    assert spec is not None and spec.loader is not None
    sizing = importlib.util.module_from_spec(spec)
    sys.modules["sizing"] = sizing  # dataclasses look their module up
    try:
        spec.loader.exec_module(sizing)
        document = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
        assert sizing.memory_table() in document
        assert sizing.rate_table() in document
    finally:
        del sys.modules["sizing"]


def test_every_option_that_the_document_names_exists(options):
    document = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", document, re.MULTILINE | re.DOTALL)
    served = [line for block in blocks for line in block.splitlines() if "chatglm serve" in line]
    assert len(served) >= 4
    for line in served:
        assert set(re.findall(r"--[a-z][a-z-]+", line.split("chatglm serve")[1])) <= options, line
