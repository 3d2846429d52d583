"""A real server as a child process, and what it may leave behind: nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

QUESTION = {"model": "chatglm", "messages": [{"role": "user", "content": "你好"}], "temperature": 0, "max_tokens": 8}
PATIENCE_S = 180.0


def until(condition, what: str, patience_s: float = PATIENCE_S) -> Any:
    """Wait for a condition to hold; what it gave."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {patience_s:g} s for: {what}")


class ServerProcess:
    """`chatglm serve` on a free port with the embedded model in fp32."""

    def __init__(self, *options: str, faults: dict[str, Any] | None = None, wait: bool = True) -> None:
        self.log_file = Path(tempfile.mkstemp(suffix=".log")[1])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
        environment.pop("CHATGLM_FAULTS", None)
        if faults is not None:
            environment["CHATGLM_FAULTS"] = json.dumps(faults)
            options = (*options, "--enable-faults")
        if "--port" not in options:
            options = ("--port", "0", *options)
        command = [sys.executable, "-m", "chatglm.cli", "serve", "--dtype", "fp32", "--device", "cpu", "--threads", "1"]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=environment)
        self.url = ""
        self.client = httpx.Client(timeout=120, limits=httpx.Limits(max_keepalive_connections=0))
        if wait:
            try:
                self.wait_until_ready()
            except BaseException:
                self.close()  # a server that nobody knows would go on
                raise

    def wait_until_ready(self) -> None:
        def address() -> str | None:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}: {self.log}")
            found = re.search(r"url=(http://\S+)", self.log) or re.search(r'"url": "(\S+)"', self.log)
            return found[1] if found else None

        self.url = until(address, "the address in the log")
        self.client.base_url = httpx.URL(self.url)
        until(lambda: self.status("/ready") == 200, "/ready")
        self.threads, self.files = self.num_threads, self.num_files

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def num_threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    @property
    def num_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def status(self, path: str) -> int:
        try:
            return self.client.get(path).status_code
        except httpx.HTTPError:
            return 0

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return self.client.post(path, json=body, **more)

    def chat(self, **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {**QUESTION, **fields})

    def metric(self, name: str, text: str | None = None) -> float:
        text = self.client.get("/metrics").text if text is None else text
        lines = [line for line in text.splitlines() if re.match(rf"chatglm:{name}(_total)?\{{", line)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def is_idle(self) -> bool:
        text = self.client.get("/metrics").text
        if any(self.metric(name, text) for name in ("num_requests_running", "num_requests_waiting")):
            return False
        return self.metric("kv_cache_usage_perc", text) == 0 or self.metric("cached_contexts", text) > 0

    def audit(self, *, expect_errors: bool = False) -> None:
        """After every test: nothing runs, nothing waits, no block is owned, files and threads are back."""
        if self.process.poll() is not None:
            return
        until(self.is_idle, "running = waiting = 0 and all blocks free")
        until(lambda: self.status("/ready") == 200, "/ready")
        until(lambda: self.num_files <= self.files + 3, f"open files {self.num_files} back to {self.files}")
        until(lambda: self.num_threads <= self.threads + 40, "threads")  # the pool of asyncio.to_thread may fill
        if not expect_errors:
            assert "Traceback" not in self.log and "level=error" not in self.log, self.log

    def stop(self, sig: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.log_file.unlink(missing_ok=True)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer, in the one shape."""
    body = response.json()
    assert set(body["error"]) == {"message", "type", "param", "code", "request_id"}, body
    assert body["error"]["request_id"] == response.headers["x-request-id"]
    return body["error"]


def stream_events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a whole stream; the last must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@contextmanager
def served(*options: str, faults: dict[str, Any] | None = None) -> Iterator[ServerProcess]:
    """A server for a module's tests; at the end nothing of it is left, and it stopped by itself."""
    server = ServerProcess(*options, faults=faults)
    try:
        yield server
        server.audit()
        assert server.stop() == 0
    finally:
        server.close()
