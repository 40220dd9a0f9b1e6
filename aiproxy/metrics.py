"""Every metric. Names and labels are an interface (README, "Metrics").

Labels come from the configuration only, so their number is bounded by it, whatever callers send.
Children are kept once looked up: the look-up by label costs more than the increment.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Generic, TypeVar

import aiohttp
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

import aiproxy
from aiproxy.limits import tightest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from prometheus_client.metrics_core import Metric

    from aiproxy.exchange import Exchange
    from aiproxy.limits import Level
    from aiproxy.sessions import Shares

CONTENT_TYPE = CONTENT_TYPE_LATEST

# No second series for each with the time of its creation.
disable_created_metrics()  # type: ignore[no-untyped-call] # the library left it untyped

_M = TypeVar("_M", Counter, Gauge, Histogram)

_DURATION = tuple(0.08 * 2**n for n in range(14))
_FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 60, 120)
_PER_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_OVERHEAD = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)
_STORE = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class _Children(dict[tuple[str, ...], _M], Generic[_M]):
    """A metric's children by their label values, in the order in which it declares them."""

    def __init__(self, metric: _M) -> None:
        super().__init__()
        self.metric: _M = metric

    def __missing__(self, labels: tuple[str, ...]) -> _M:
        child: _M = self.metric.labels(*labels)
        self[labels] = child
        return child


class Metrics:
    """The metrics of one daemon, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry(auto_describe=True)
        self._requests = _Children(Counter(
            "aiproxy_requests", "Requests that ended, by outcome.",
            ("endpoint", "route", "key", "outcome"), registry=registry,
        ))  # fmt: skip
        self._in_flight = _Children(Gauge(
            "aiproxy_requests_in_flight", "Requests that have not ended.",
            ("endpoint",), registry=registry,
        ))  # fmt: skip
        self._duration = _Children(Histogram(
            "aiproxy_request_duration_seconds", "From the request's head to its end.",
            ("endpoint", "route", "upstream"), buckets=_DURATION, registry=registry,
        ))  # fmt: skip
        self._first_token = _Children(Histogram(
            "aiproxy_time_to_first_token_seconds", "To the first event that carries output.",
            ("route", "upstream"), buckets=_FIRST_TOKEN, registry=registry,
        ))  # fmt: skip
        self._per_token = _Children(Histogram(
            "aiproxy_time_per_output_token_seconds", "Between output tokens, after the first.",
            ("route", "upstream"), buckets=_PER_TOKEN, registry=registry,
        ))  # fmt: skip
        self._overhead = _Children(Histogram(
            "aiproxy_overhead_seconds", "Own time before the upstream request left.",
            ("endpoint",), buckets=_OVERHEAD, registry=registry,
        ))  # fmt: skip
        self._tokens = _Children(Counter(
            "aiproxy_tokens", "Tokens, in disjoint types that add up.",
            ("route", "key", "type"), registry=registry,
        ))  # fmt: skip
        self._estimated = _Children(Counter(
            "aiproxy_usage_estimated", "Answers whose usage is an estimate.",
            ("route", "reason"), registry=registry,
        ))  # fmt: skip
        self._attempts = _Children(Counter(
            "aiproxy_upstream_attempts", "Requests to upstreams, by result.",
            ("upstream", "result"), registry=registry,
        ))  # fmt: skip
        self._available = _Children(Gauge(
            "aiproxy_upstream_available", "Whether requests are sent to the upstream.",
            ("upstream",), registry=registry,
        ))  # fmt: skip
        self._disconnects = _Children(Counter(
            "aiproxy_client_disconnects", "Clients that left before their answer's end.",
            ("endpoint", "phase"), registry=registry,
        ))  # fmt: skip
        self._loads = _Children(Counter(
            "aiproxy_sessions_loads", "Look-ups of stored turns and items.",
            ("result",), registry=registry,
        ))  # fmt: skip
        self._reasoning_left_out = _Children(Counter(
            "aiproxy_sessions_reasoning_left_out",
            "Reasoning items not sent on, since another upstream had encrypted them.",
            ("upstream",), registry=registry,
        ))  # fmt: skip
        self._store_duration = _Children(Histogram(
            "aiproxy_store_duration_seconds", "Operations on a store.",
            ("store", "operation"), buckets=_STORE, registry=registry,
        ))  # fmt: skip
        self._rejections = _Children(Counter(
            "aiproxy_limit_rejections", "Requests that a limit refused.",
            ("key", "limit"), registry=registry,
        ))  # fmt: skip
        self._store_errors = _Children(Counter(
            "aiproxy_store_errors", "Operations on a store that failed.",
            ("store", "operation"), registry=registry,
        ))  # fmt: skip
        self.loop_lag = Histogram(
            "aiproxy_event_loop_lag_seconds", "How late the event loop ran a timer.",
            buckets=_LAG, registry=registry,
        )  # fmt: skip
        self._reload_ok = Gauge(
            "aiproxy_config_last_reload_successful", "Whether the last reload was successful.",
            registry=registry,
        )  # fmt: skip
        self._reload_at = Gauge(
            "aiproxy_config_last_reload_success_timestamp_seconds",
            "When a configuration was last put in force.", registry=registry,
        )  # fmt: skip
        build = Gauge(
            "aiproxy_build_info", "Always 1.", ("version", "python", "aiohttp"), registry=registry
        )
        build.labels(aiproxy.__version__, platform.python_version(), aiohttp.__version__).set(1)
        ProcessCollector(registry=registry)

    def begin(self, exchange: Exchange) -> None:
        """See `Recorder`."""
        self._in_flight[(exchange.endpoint,)].inc()

    def record(self, exchange: Exchange) -> None:
        """See `Recorder`."""
        endpoint, route, key = exchange.endpoint, exchange.route, exchange.key
        upstream = exchange.upstream
        outcome = exchange.outcome or "internal_error"
        self._in_flight[(endpoint,)].dec()
        self._requests[endpoint, route, key, outcome].inc()
        self._duration[endpoint, route, upstream].observe(exchange.duration)
        if (overhead := exchange.overhead) is not None:
            self._overhead[(endpoint,)].observe(overhead)
        if (first := exchange.time_to_first_token) is not None:
            self._first_token[route, upstream].observe(first)
        if (per_token := exchange.time_per_output_token) is not None:
            self._per_token[route, upstream].observe(per_token)
        if exchange.limit:
            self._rejections[key, exchange.limit].inc()
        for asked, result in exchange.results:
            self._attempts[asked, result].inc()
        for load in exchange.loads:
            self._loads[(load,)].inc()
        if exchange.reasoning_left_out:
            self._reasoning_left_out[(upstream,)].inc(exchange.reasoning_left_out)
        if outcome == "client_disconnected":
            phase = "streaming" if exchange.streaming else "waiting"
            self._disconnects[endpoint, phase].inc()
        self._count_tokens(exchange)

    def _count_tokens(self, exchange: Exchange) -> None:
        route, key, usage = exchange.route, exchange.key, exchange.usage
        if usage is not None:
            for kind, count in (
                ("input", usage.input),
                ("input_cached", usage.input_cached),
                ("output", usage.output),
                ("output_reasoning", usage.output_reasoning),
            ):
                child = self._tokens[route, key, kind]  # a series of its own, also at 0
                if count:
                    child.inc(count)
            if exchange.estimated is not None:
                self._estimated[route, exchange.estimated].inc()

    def configured(self, upstreams: Iterable[str], now: float) -> None:
        """A configuration was put in force, at `now` seconds since the epoch."""
        self._reload_ok.set(1)
        self._reload_at.set(now)
        known: set[tuple[str, ...]] = {(name,) for name in upstreams}
        for labels in known - set(self._available):
            self._available[labels].set(1)
        for gone in set(self._available) - known:
            self._available.metric.remove(*gone)
            del self._available[gone]

    def upstream_available(self, upstream: str, *, available: bool) -> None:
        """Requests go to an upstream, or it is left alone for a while."""
        if (upstream,) in self._available:
            self._available[upstream,].set(available)

    def store_used(self, store: str, operation: str, seconds: float) -> None:
        """An operation on a store ended."""
        self._store_duration[store, operation].observe(seconds)

    def store_failed(self, store: str, operation: str) -> None:
        """An operation on a store failed."""
        self._store_errors[store, operation].inc()

    def reload_failed(self) -> None:
        """A configuration was refused; the one in force stays."""
        self._reload_ok.set(0)

    def loads_by_result(self) -> dict[str, int]:
        """Look-ups of stored turns and items, since the start."""
        return _added_up(self._loads.metric, "result")

    def watch_log(self, dropped: Callable[[], int]) -> None:
        """Take the number of dropped log lines from the log itself, at each scrape."""
        self.registry.register(_Dropped(dropped))

    def watch_sessions(self, shares: Callable[[], Shares]) -> None:
        """Take what is stored from where it is kept, at each scrape."""
        self.registry.register(_Stored(shares))

    def watch_limits(self, levels: Callable[[], Mapping[str, Iterable[Level]]]) -> None:
        """Take the levels of keys from where they are kept, at each scrape."""
        self.registry.register(_Remaining(levels))

    def exposition(self) -> bytes:
        """All metrics in the text format that Prometheus scrapes. May take tens of milliseconds."""
        return generate_latest(self.registry)


def _added_up(metric: Counter, label: str) -> dict[str, int]:
    """A counter's series, added up by one of its labels."""
    found: dict[str, int] = {}
    for family in metric.collect():
        for sample in family.samples:
            value = sample.labels[label]
            found[value] = found.get(value, 0) + int(sample.value)
    return dict(sorted(found.items()))


class _Dropped(Collector):
    """A counter that is kept elsewhere."""

    def __init__(self, value: Callable[[], int]) -> None:
        self._value = value

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily(
            "aiproxy_log_dropped",
            "Log lines dropped since standard error was blocked.",
            value=self._value(),
        )


class _Stored(Collector):
    """What the store of sessions holds, and what it has removed."""

    def __init__(self, shares: Callable[[], Shares]) -> None:
        self._shares = shares

    def collect(self) -> Iterable[Metric]:
        shares = self._shares()
        yield GaugeMetricFamily(
            "aiproxy_sessions_stored_bytes", "Bytes of stored turns.", value=shares.size
        )
        yield GaugeMetricFamily(
            "aiproxy_sessions_stored_turns", "Stored turns.", value=shares.turns
        )
        evictions = CounterMetricFamily(
            "aiproxy_sessions_evictions", "Turns that were removed.", labels=("reason",)
        )
        for reason, turns in dict(shares.removed).items():
            evictions.add_metric((reason,), turns)
        yield evictions


class _Remaining(Collector):
    """What is left of each key's limits; of several windows the tightest.

    It is read in the thread of a scrape, beside the event loop: a level that changes at this moment
    may be seen a little too low or too high.
    """

    def __init__(self, levels: Callable[[], Mapping[str, Iterable[Level]]]) -> None:
        self._levels = levels

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "aiproxy_limit_remaining",
            "What is left of a key's limit; below zero: a debt.",
            labels=("key", "limit"),
        )
        for key, levels in self._levels().items():
            for kind, level in tightest(levels).items():
                family.add_metric((key, kind), level.remaining)
        yield family
