"""What the engine counts by itself, for Prometheus. Counts go on when the engine is built again."""

from __future__ import annotations

import itertools

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..engine.serving import ServingEngine
from ..engine.serving_state import Tally
from ..engine.thread import EngineThread

TALLIES = {
    "iteration_tokens_total": ("iteration_tokens", "Tokens of an engine step."),
    "inter_token_latency_seconds": ("gaps", "Time between two tokens of one choice."),
}
"""Histograms: their name, the engine's name, what they say."""


class EngineMetrics(Collector):
    """Reads the engine's counters whenever the metrics are asked for."""

    def __init__(self, thread: EngineThread, prefix: str, model_name: str) -> None:
        self._thread, self._prefix, self._model = thread, prefix, model_name
        self._engine: ServingEngine | None = None
        self._base: dict[str, list[float]] = {}
        self._last: dict[str, list[float]] = {}

    def collect(self) -> list[CounterMetricFamily | HistogramMetricFamily]:
        engine = self._thread.engine
        now = _read(engine)
        if self._engine is not engine:
            self._base = {name: _sum(self._base.get(name), self._last.get(name), len(now[name])) for name in now}
            self._engine = engine
        self._last = now
        values = {name: _sum(self._base[name], numbers, len(numbers)) for name, numbers in now.items()}
        values["engine_restarts"] = [self._thread.num_restarts]
        families: list[CounterMetricFamily | HistogramMetricFamily] = []
        for name, numbers in values.items():
            if name in TALLIES:
                families.append(self._histogram(name, numbers, getattr(engine.counters, TALLIES[name][0])))
                continue
            counter = CounterMetricFamily(f"{self._prefix}:{name}", name.replace("_", " "), labels=["model_name"])
            counter.add_metric([self._model], numbers[0])
            families.append(counter)
        return families

    def _histogram(self, name: str, numbers: list[float], tally: Tally) -> HistogramMetricFamily:
        *counts, total = numbers
        bounds = [*map(floatToGoString, tally.bounds), "+Inf"]
        buckets = list(zip(bounds, itertools.accumulate(counts), strict=True))
        family = HistogramMetricFamily(f"{self._prefix}:{name}", TALLIES[name][1], labels=["model_name"])
        family.add_metric([self._model], buckets, total)
        return family


def _read(engine: ServingEngine) -> dict[str, list[float]]:
    counters = engine.counters
    found: dict[str, list[float]] = {
        "num_preemptions": [counters.preemptions],
        "prompt_tokens": [counters.prompt_tokens],
        "generation_tokens": [counters.generation_tokens],
        "context_cache_hits": [counters.context_hits],
        "out_of_memory": [counters.out_of_memory],
    }
    for name, (attribute, _) in TALLIES.items():
        tally: Tally = getattr(counters, attribute)
        found[name] = [*tally.counts, tally.total]
    return found


def _sum(first: list[float] | None, second: list[float] | None, length: int) -> list[float]:
    zeros = [0.0] * length
    return [a + b for a, b in zip(first or zeros, second or zeros, strict=True)]
