"""What /metrics tells: the names and meaning of vLLM's, with our prefix, so that its dashboards fit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from athanor.types import Completion

if TYPE_CHECKING:
    from athanor.infer.engine import Chunk, Stats

_LABELS = ("model_name", "engine")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

# Name, what it is, field of the engine's Stats.
GAUGES = (
    ("num_requests_running", "Requests that the engine computes", "running"),
    ("num_requests_waiting", "Requests that wait for a place", "waiting"),
    ("kv_cache_usage_perc", "Share of the key-value cache in use; 1 is all", "cache_usage"),
)
COUNTERS = (
    ("prompt_tokens", "Tokens of prompts that were started", "prompt_tokens"),
    ("generation_tokens", "New tokens", "generation_tokens"),
    ("num_preemptions", "Times that a running request gave its blocks back", "preemptions"),
    ("prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache", "prefix_queries"),
    ("prefix_cache_hits", "Of them, those that were found", "prefix_hits"),
)
# Name, what it is, buckets.
HISTOGRAMS = (
    ("request_queue_time_seconds", "From the arrival of a request to its first computation", _SECONDS),
    ("request_prefill_time_seconds", "From there to its first token", _SECONDS),
    ("request_decode_time_seconds", "From its first token to its last", _SECONDS),
    ("time_to_first_token_seconds", "From the arrival of a request to its first token", _SECONDS),
    ("e2e_request_latency_seconds", "From the arrival of a request to its last token", _SECONDS),
    ("inter_token_latency_seconds", "From one token of a request to its next", _BETWEEN),
    ("iteration_tokens_total", "Tokens that one step of the engine computed", _TOKENS),
)


class Metrics:
    """All metrics of a server; `of(model)` watches the engine of one model."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._watches: list[ModelWatch] = []
        self._finished = Counter(
            "athanor:request_success", "Finished requests", (*_LABELS, "finished_reason"), registry=self.registry
        )
        self._histograms = {
            name: Histogram(f"athanor:{name}", told, _LABELS, buckets=buckets, registry=self.registry)
            for name, told, buckets in HISTOGRAMS
        }
        self.registry.register(self)

    def of(self, model: str) -> ModelWatch:
        """A watch for the worker of `model`."""
        watch = ModelWatch(model, self._finished, self._histograms)
        self._watches.append(watch)
        return watch

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """What the engines count themselves."""
        counted = [(watch.labels, watch.stats) for watch in self._watches if watch.stats is not None]
        for name, told, field in GAUGES:
            gauge = GaugeMetricFamily(f"athanor:{name}", told, labels=_LABELS)
            for labels, stats in counted:
                gauge.add_metric(labels, getattr(stats, field))
            yield gauge
        for name, told, field in COUNTERS:
            counter = CounterMetricFamily(f"athanor:{name}", told, labels=_LABELS)
            for labels, stats in counted:
                counter.add_metric(labels, getattr(stats, field))
            yield counter


class ModelWatch:
    """A `worker.Watch` over one engine."""

    def __init__(self, model: str, finished: Counter, histograms: dict[str, Histogram]) -> None:
        self.labels = (model, "0")  # one engine a model
        self.stats: Stats | None = None
        self._finished = finished
        self._histograms = {name: h.labels(*self.labels) for name, h in histograms.items()}
        self._last: dict[str, float] = {}  # when each running request had its last token

    def stepped(self, chunks: Sequence[Chunk], stats: Stats | None) -> None:
        now = time.perf_counter()
        for chunk in chunks:
            before = self._last.get(chunk.request_id)
            if before is not None:
                for _ in chunk.ids:
                    self._observe("inter_token_latency_seconds", (now - before) / len(chunk.ids))
            if chunk.ids:
                self._last[chunk.request_id] = now
            if chunk.completion is not None:
                self._last.pop(chunk.request_id, None)
                self._end(chunk.completion)
        if stats is not None:
            if stats.step_tokens:
                self._observe("iteration_tokens_total", stats.step_tokens)
            self.stats = stats

    def dropped(self, request_ids: Sequence[str]) -> None:
        self._finished.labels(*self.labels, "abort").inc(len(request_ids))
        for id in request_ids:
            self._last.pop(id, None)

    def _end(self, completion: Completion) -> None:
        if completion.finish_reason == "abort":
            return  # counted when it was dropped
        self._finished.labels(*self.labels, completion.finish_reason).inc()
        if t := completion.timing:
            self._observe("request_queue_time_seconds", t.started - t.added)
            self._observe("request_prefill_time_seconds", t.first - t.started)
            self._observe("request_decode_time_seconds", t.ended - t.first)
            self._observe("time_to_first_token_seconds", t.first - t.added)
            self._observe("e2e_request_latency_seconds", t.ended - t.added)

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)
