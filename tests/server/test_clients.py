"""The clients of examples/clients, run as a user runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "clients"


def run(server, *command: str) -> str:
    environment = {**os.environ, "CHATGLM_URL": server.url, "LANGSMITH_TRACING": "false", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_openai_sdk_talks_streams_and_embeds(server):
    pytest.importorskip("openai")
    said = run(server, sys.executable, str(EXAMPLES / "openai_sdk.py"))
    assert "ChatGLM" in said and "prompt_tokens=5" in said and "a vector of 512 numbers" in said


def test_langchain_talks_streams_and_gets_structured_answers(server):
    pytest.importorskip("langchain_openai")
    said = run(server, sys.executable, str(EXAMPLES / "langchain_chat.py"))
    assert "{'size': 'small'}" in said or "{'size': 'large'}" in said


def test_curl_talks_and_streams(server):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    said = run(server, "bash", str(EXAMPLES / "curl.sh"))
    assert '"object":"chat.completion"' in said and "data: [DONE]" in said and '"object":"text_completion"' in said


def test_the_openai_sdk_sees_errors_as_its_own_classes(server):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(model="chatglm", messages=[{"role": "user", "content": "a"}], temperature=-1)
        assert raised.value.param == "temperature" and raised.value.code == "invalid_value"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "a"}])
