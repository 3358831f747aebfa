# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics: requests and waiting times counted as they happen, the engine's numbers read when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fewbit.decode.batch import Stats

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
GAUGES = (
    ("running", "fewbit_running", "Texts being written."),
    ("waiting", "fewbit_waiting", "Texts in the queue."),
    ("kept", "fewbit_kept_caches", "Caches of finished texts."),
    ("cache_bytes", "fewbit_cache_bytes", "Bytes of all keys and values."),
)
COUNTERS = (
    ("steps", "fewbit_steps", "Passes through the model."),
    ("prompt_tokens", "fewbit_prompt_tokens", "Tokens of prompts."),
    ("reused_tokens", "fewbit_reused_tokens", "Tokens of prompts that were not computed anew."),
    ("generated_tokens", "fewbit_generated_tokens", "Tokens written."),
)


class Metrics(Collector):
    """``stats``: the engine's numbers now."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "fewbit_requests", "Answers by path and status.", ("path", "status"), registry=self._registry
        )
        self.first = Histogram(
            "fewbit_first_token_seconds",
            "From a request to its first token.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.whole = Histogram(
            "fewbit_request_seconds", "From a request to its last token.", buckets=SECONDS, registry=self._registry
        )
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        stats = self._stats()
        for name, metric, text in GAUGES:
            yield GaugeMetricFamily(metric, text, value=getattr(stats, name))
        for name, metric, text in COUNTERS:
            yield CounterMetricFamily(metric, text, value=getattr(stats, name))

    def text(self) -> bytes:
        return generate_latest(self._registry)
