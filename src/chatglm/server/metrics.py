"""Metrics in Prometheus' text form, named as vLLM's where the meaning is the same. Never keys or texts in labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .. import __version__
from ..engine.stream import Group
from ..engine.thread import EngineThread
from .engine_metrics import EngineMetrics

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_PACE = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2.5, 5)
_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)

REASONS = {"stop": "stop", "length": "length", "tool_calls": "stop", "cancelled": "abort", "timeout": "abort"}


class Metrics:
    """One registry a server."""

    def __init__(
        self, thread: EngineThread, model_name: str, prefix: str = "chatglm", memory: Mapping[str, int] | None = None
    ) -> None:
        """memory: bytes that do not change, by name."""
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name}

        def name(metric: str) -> str:
            return f"{prefix}:{metric}"

        def gauge(metric: str, help: str, value: Callable[[], float]) -> None:
            Gauge(name(metric), help, ["model_name"], registry=self.registry).labels(model_name).set_function(value)

        def counter(metric: str, help: str, *labels: str) -> Counter:
            return Counter(name(metric), help, ["model_name", *labels], registry=self.registry)

        def histogram(metric: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name(metric), help, ["model_name"], buckets=buckets, registry=self.registry)
            labelled: Histogram = made.labels(model_name)
            return labelled

        gauge("num_requests_running", "Requests past their admission.", lambda: thread.engine.num_running)
        gauge("num_requests_waiting", "Requests that wait for admission.", lambda: len(thread.engine.waiting))
        gauge("kv_cache_usage_perc", "Share of cache blocks in use, 0 to 1.", lambda: thread.engine.cache_usage)
        gauge("kv_cache_blocks", "Cache blocks in all.", lambda: thread.engine.pool.num_blocks)
        gauge("cached_contexts", "Contexts that are kept.", lambda: len(thread.engine.contexts))
        gauge("kv_cache_bytes", "Memory of the KV cache.", lambda: thread.engine.pool.cache.num_bytes)
        gauge("kv_used_bytes", "Of it, in blocks that somebody owns.", lambda: thread.engine.num_used_bytes)
        gauge("kv_contexts_bytes", "Of it, in blocks of kept contexts.", lambda: thread.engine.num_context_bytes)
        gauge("host_swap_bytes", "Host memory of preempted requests.", lambda: thread.engine.num_swapped_bytes)
        for what, size in (memory or {}).items():
            Gauge(name(what), what.replace("_", " "), ["model_name"], registry=self.registry).labels(model_name).set(
                size
            )
        self.registry.register(EngineMetrics(thread, prefix, model_name))
        self.finished = counter("request_success", "Requests that ended, by reason.", "finished_reason")
        self.http = counter("http_requests", "Answers, by route and status.", "route", "status")
        self.rejected = counter("rejected", "Requests refused before the engine.", "reason")
        self.rate_limited = counter("rate_limited", "Requests refused by a rate limit.")
        self.ignored = counter("ignored_fields", "Fields that were accepted without effect.", "field")
        self.feedback = counter("feedback", "Opinions stored and deleted, by kind.", "kind")
        self.feedback_errors = counter("feedback_write_errors", "Opinions that could not be stored.")
        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self.pace = histogram("request_time_per_output_token_seconds", "Mean time a token, of an answer.", _PACE)
        self.latency = histogram("e2e_request_latency_seconds", "From arrival to the end.", _SECONDS)
        self.queued = histogram("request_queue_time_seconds", "From arrival to admission.", _SECONDS)
        self.prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.answer = histogram("request_generation_tokens", "Answer tokens of a request.", _TOKENS)
        info = Gauge(name("build_info"), "Version.", ["model_name", "version"], registry=self.registry)
        info.labels(model_name, __version__).set(1)

    def count(self, counter: Counter, *labels: str, by: int = 1) -> None:
        """Add to a counter."""
        counter.labels(self._labels["model_name"], *labels).inc(by)

    def note_end(self, group: Group, finish: str) -> None:
        """A request has ended, for whatever reason."""
        self.count(self.finished, REASONS.get(finish, "error"))
        end = group.finished or group.arrived
        tokens = sum(stream.num_sampled for stream in group.streams)
        self.latency.observe(max(0.0, end - group.arrived))
        self.prompt.observe(group.num_prompt_tokens)
        self.answer.observe(tokens)
        if group.admitted is not None:
            self.queued.observe(max(0.0, group.admitted - group.arrived))
        if group.first_token is not None:
            self.first_token.observe(max(0.0, group.first_token - group.arrived))
            longest = max(stream.num_sampled for stream in group.streams)
            if longest > 1:
                self.pace.observe(max(0.0, end - group.first_token) / (longest - 1))

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)
