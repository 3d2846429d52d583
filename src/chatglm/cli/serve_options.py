"""Options of `chatglm serve`; each can also be set by the environment as CHATGLM_<NAME>."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..server.settings import ServerSettings


def _option(name: str, help: str, **more: Any) -> Any:
    variable = "CHATGLM_" + name.removeprefix("--").replace("-", "_").upper()
    return typer.Option(name, help=help, envvar=variable, show_envvar=False, show_default=False, **more)


@dataclass(frozen=True)
class LimitOptions:
    """How much at once, how long, how often."""

    rate_limit: Annotated[str | None, _option("--rate-limit", "Requests a key, like 60/minute", metavar="RATE")] = None
    token_limit: Annotated[str | None, _option("--token-limit", "Tokens a key, like 100000/minute", metavar="RATE")] = (
        None
    )
    max_body: Annotated[str, _option("--max-body", "Largest request body [1MiB]", metavar="SIZE")] = "1MiB"
    max_running: Annotated[int, _option("--max-running", "Answers that run at once [64]", metavar="N")] = 64
    max_waiting: Annotated[int, _option("--max-waiting", "Requests that may wait [256]", metavar="N")] = 256
    queue_timeout: Annotated[float, _option("--queue-timeout", "Longest wait for a turn [60]", metavar="S")] = 60
    request_timeout: Annotated[float, _option("--request-timeout", "Longest request [600]", metavar="S")] = 600
    read_timeout: Annotated[float, _option("--read-timeout", "Longest to send a request [20]", metavar="S")] = 20
    drain_timeout: Annotated[float, _option("--drain-timeout", "Longest to finish on SIGTERM [30]", metavar="S")] = 30
    kv_memory: Annotated[
        str | None, _option("--kv-memory", "Memory of the KV cache [a share of what is free]", metavar="SIZE")
    ] = None
    context_cache: Annotated[
        float, _option("--context-cache", "Keep a context for a repeat; 0 is off [60]", metavar="S")
    ] = 60
    preempt: Annotated[
        str, _option("--preempt", "Without room, recompute later or swap to host memory [recompute]", metavar="HOW")
    ] = "recompute"
    prefill_budget: Annotated[
        int | None, _option("--prefill-budget", "Tokens x layers of a slice of a first pass [measured]", metavar="N")
    ] = None
    deterministic: Annotated[bool, _option("--deterministic", "Answers do not depend on who else asks; slower")] = False


@dataclass(frozen=True)
class ListenOptions:
    """Where, and for whom."""

    host: Annotated[str, _option("--host", "Address to listen on [127.0.0.1]", metavar="HOST")] = "127.0.0.1"
    port: Annotated[int, _option("--port", "Port; 0 is any free one [8000]", metavar="N")] = 8000
    api_key: Annotated[
        list[str] | None,
        _option("--api-key", "A key, or name:key (repeatable; seen by `ps`, better a file)", metavar="KEY"),
    ] = None
    api_key_file: Annotated[str | None, _option("--api-key-file", "Keys, one `name:key` a line", metavar="FILE")] = None
    allow_no_key: Annotated[bool, _option("--allow-no-key", "Open to other machines without a key")] = False
    cors_origin: Annotated[
        list[str] | None, _option("--cors-origin", "A web origin that may call (repeatable)", metavar="URL")
    ] = None
    trusted_proxy: Annotated[
        list[str] | None,
        _option("--trusted-proxy", "Address whose X-Forwarded-For is believed (repeatable)", metavar="HOST"),
    ] = None

    feedback_db: Annotated[
        str | None, _option("--feedback-db", "Keep what people say about answers in this file", metavar="FILE")
    ] = None
    feedback_url: Annotated[
        str | None, _option("--feedback-url", "Or send it on to this server's /v1/feedback", metavar="URL")
    ] = None
    feedback_spool: Annotated[
        str | None, _option("--feedback-spool", "Where it waits until that server has it", metavar="DIR")
    ] = None
    feedback_key: Annotated[
        str | None, _option("--feedback-key", "A key of that server; better in the environment", metavar="KEY")
    ] = None

    def settings(self, limits: LimitOptions, *, enable_faults: bool, **more: Any) -> ServerSettings:
        """Everything checked. Raises RequestError."""
        from ..errors import RequestError
        from ..server.settings import Rate, ServerSettings, parse_size, read_keys

        given: dict[str, Any] = asdict(limits)
        times: dict[str, Any] = {f"{name}_s": given.pop(name) for name in list(given) if name.endswith("_timeout")}
        rates: dict[str, Any] = {
            name: Rate.parse(given.pop(name), f"--{name.replace('_', '-')}") if given[name] else given.pop(name)
            for name in ("rate_limit", "token_limit")
        }
        kv_memory = given.pop("kv_memory")
        faults = os.environ.get("CHATGLM_FAULTS")
        if faults and not enable_faults:
            raise RequestError("CHATGLM_FAULTS is set; faults are for tests and need --enable-faults")
        return ServerSettings(
            host=self.host,
            port=self.port,
            api_keys=read_keys(list(self.api_key or []), self.api_key_file),
            allow_no_key=self.allow_no_key,
            cors_origins=tuple(self.cors_origin or ()),
            feedback_db=Path(self.feedback_db) if self.feedback_db else None,
            feedback_url=self.feedback_url,
            feedback_spool=Path(self.feedback_spool) if self.feedback_spool else None,
            feedback_key=self.feedback_key,
            trusted_proxies=tuple(self.trusted_proxy or ()),
            max_body=parse_size(given.pop("max_body"), "--max-body"),
            kv_memory=parse_size(kv_memory, "--kv-memory") if kv_memory else None,
            context_cache_s=given.pop("context_cache"),
            faults=faults,
            **rates,
            **times,
            **given,
            **more,
        )
