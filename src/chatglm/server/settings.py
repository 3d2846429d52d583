"""ServerSettings: everything an operator can say, checked once. No web library here."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import RequestError

_RATE = re.compile(r"(\d+)\s*/\s*(second|minute|hour|day)s?\Z")
_PERIODS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}


@dataclass(frozen=True)
class Rate:
    """So many in so many seconds."""

    count: int
    period_s: int

    @classmethod
    def parse(cls, text: str, option: str) -> Rate:
        """From `60/minute`. Raises RequestError naming the option."""
        found = _RATE.match(text.strip())
        if not found or not int(found[1]):
            raise RequestError(f"{option} is {text!r}; it must be like 60/minute (second, minute, hour or day)")
        return cls(int(found[1]), _PERIODS[found[2]])


@dataclass(frozen=True)
class ServerSettings:
    """Times in seconds, sizes in bytes. Raises RequestError for what cannot be or should not be.

    api_keys         key → name; empty: everybody may come in
    allow_no_key     bind to other than loopback without a key
    trusted_proxies  addresses whose X-Forwarded-For is believed
    prefill_budget   tokens times layers of one slice of a first pass; None is measured at the start
    deterministic    every step has one shape, so that answers do not depend on who else asks
    adapters         name → folder: served as `model: NAME:ADAPTER` beside the base
    log_prompts      prompts and answers go into the log
    feedback_db      SQLite file for what people say about answers; made where there is none
    feedback_url     another server that keeps it instead; feedback_spool holds what is not there yet
    web_path         where the chat page is, if `web`
    faults           JSON of faults to inject; refused unless enable_faults (tests)
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: dict[str, str] = field(default_factory=dict, repr=False)
    allow_no_key: bool = False
    rate_limit: Rate | None = None
    token_limit: Rate | None = None
    max_body: int = 1 << 20
    max_running: int = 64
    max_waiting: int = 256
    queue_timeout_s: float = 60.0
    request_timeout_s: float = 600.0
    read_timeout_s: float = 20.0
    drain_timeout_s: float = 30.0
    kv_memory: int | None = None
    context_cache_s: float = 60.0
    preempt: Literal["recompute", "swap"] = "recompute"
    prefill_budget: int | None = None
    deterministic: bool = False
    cors_origins: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    legacy_api: bool = False
    log_json: bool = False
    log_prompts: bool = False
    served_model_name: str = "chatglm"
    adapters: dict[str, str] = field(default_factory=dict)
    metrics_prefix: str = "chatglm"
    faults: str | None = None
    feedback_db: Path | None = None
    feedback_url: str | None = None
    feedback_key: str | None = field(default=None, repr=False)
    feedback_spool: Path | None = None
    web: bool = False
    web_path: str = "/chat"

    def __post_init__(self) -> None:
        if not self.is_loopback and not self.api_keys and not self.allow_no_key:
            raise RequestError(
                f"--host {self.host} opens the server to other machines, and no API key is set",
                cure="give --api-key-file FILE, or --allow-no-key if everybody who reaches it may use it",
            )
        if self.preempt not in ("recompute", "swap"):
            raise RequestError(f"--preempt is {self.preempt!r}; it must be recompute or swap")
        lowest = (("max_body", 1024), ("max_running", 1), ("max_waiting", 1), ("prefill_budget", 1))
        for name, low in lowest:
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise RequestError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {low}")
        if not 0 <= self.port <= 65535:
            raise RequestError(f"--port is {self.port}; it must be from 0 (any free one) to 65535")
        for origin in self.cors_origins:
            if not re.fullmatch(r"https?://[^/*\s]+", origin):
                raise RequestError(f"--cors-origin is {origin!r}; it must be an exact origin like https://example.org")

        self._check_feedback()
        if not re.fullmatch(r"/[A-Za-z0-9_-]{1,64}", self.web_path) or self.web_path in ("/v1", "/health", "/ready"):
            raise RequestError(f"--web-path is {self.web_path!r}; it must be one name like /chat")

    def _check_feedback(self) -> None:
        if self.feedback_url is None:
            if self.feedback_key is not None or self.feedback_spool is not None:
                raise RequestError("--feedback-key and --feedback-spool go with --feedback-url")
            return
        if self.feedback_db is not None:
            raise RequestError(
                "--feedback-db keeps feedback here, and --feedback-url on another server; give one of them"
            )
        if not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#\s]*)?", self.feedback_url):
            raise RequestError(
                f"--feedback-url is {self.feedback_url!r}; it must be the address of a server, like https://example.org"
            )
        if self.feedback_spool is None:
            raise RequestError(
                "--feedback-url needs --feedback-spool DIR",
                cure="name a folder on a local disk: what the other server has not taken yet is kept there",
            )

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_adapters(given: list[str]) -> dict[str, str]:
    """Adapters by name from `NAME=DIR`. Raises RequestError naming what is wrong."""
    adapters: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (equals and name and folder):
            raise RequestError(f"--adapter is {text!r}; it must be like poems=out/model")
        if name in adapters:
            raise RequestError(f"--adapter {name} was given before", cure="give every adapter a name of its own")
        adapters[name] = folder
    return adapters


def read_keys(given: list[str], file: str | None) -> dict[str, str]:
    """Keys with their names from the command line and from a file with one `name:key` (or key) a line.

    Raises RequestError naming the file and line; a message never shows a key.
    """
    lines = [(f"--api-key {number}", text) for number, text in enumerate(given, 1)]
    if file is not None:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise RequestError(f"{file}: the API keys cannot be read ({reason})") from error
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                lines.append((f"{file}, line {number}", line.strip()))
        if not lines:
            raise RequestError(f"{file} holds no API key", cure="write one `name:key` a line")
    keys: dict[str, str] = {}
    for number, (place, line) in enumerate(lines, 1):
        name, colon, key = line.partition(":")
        name, key = (name.strip(), key.strip()) if colon else (f"key-{number}", line)
        if not 8 <= len(key) <= 512 or not key.isascii() or not key.isprintable() or " " in key:
            raise RequestError(f"{place}: an API key must be 8 to 512 printable ASCII characters without blanks")
        if key in keys:
            raise RequestError(f"{place}: this key was given before")
        keys[key] = name
    return keys


def parse_size(text: str, option: str) -> int:
    """Bytes from `1048576`, `512MiB`, `2GB`. Raises RequestError naming the option."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not found:
        raise RequestError(f"{option} is {text!r}; it must be a size like 512MiB or 2GB")
    unit = 1024 if found[3] else 1000
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * unit**power)
