"""Every metric. Names and labels are an interface (README, "Metrics").

Labels come from the configuration only, so their number is bounded by it, whatever callers send.
"""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING

import aiohttp
from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics

import aiproxy
from aiproxy.exposition import Exposition
from aiproxy.limits import tightest
from aiproxy.series import LONGEST_EXEMPLAR, Family, Histograms, Numbers, Watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from aiproxy.exchange import Exchange
    from aiproxy.exposition import Format
    from aiproxy.limits import Level
    from aiproxy.series import Kind, Labels
    from aiproxy.sessions import Shares

# No second series for each with the time of its creation.
disable_created_metrics()  # type: ignore[no-untyped-call] # the library left it untyped

_DURATION = tuple(0.08 * 2**n for n in range(14))
_FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 60, 120)
_PER_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_OVERHEAD = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)
_STORE = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The metrics of one daemon; all but what reads them is called in the event loop alone.

    Attributes:
        registry: further collectors, which a scrape reads in a thread.
        loop_lag: how late the event loop ran a timer, seconds.
    """

    def __init__(self) -> None:
        self._families: list[Family] = []
        self.registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=self.registry)
        self._exposition = Exposition(self._families, self.registry)

        self._requests = self._numbers(
            "counter", "aiproxy_requests", "Requests that ended, by outcome.",
            "endpoint", "key", "outcome", "route",
        )  # fmt: skip
        self._in_flight = self._numbers(
            "gauge", "aiproxy_requests_in_flight", "Requests that have not ended.", "endpoint"
        )
        self._duration = self._histograms(
            "aiproxy_request_duration_seconds", "From the request's head to its end.",
            "endpoint", "route", "upstream", buckets=_DURATION,
        )  # fmt: skip
        self._first_token = self._histograms(
            "aiproxy_time_to_first_token_seconds", "To the first event that carries output.",
            "route", "upstream", buckets=_FIRST_TOKEN,
        )  # fmt: skip
        self._per_token = self._histograms(
            "aiproxy_time_per_output_token_seconds", "Between output tokens, after the first.",
            "route", "upstream", buckets=_PER_TOKEN,
        )  # fmt: skip
        self._overhead = self._histograms(
            "aiproxy_overhead_seconds", "Own time before the upstream request left.",
            "endpoint", buckets=_OVERHEAD,
        )  # fmt: skip
        self._tokens = self._numbers(
            "counter", "aiproxy_tokens", "Tokens, in disjoint types that add up.",
            "key", "route", "type",
        )  # fmt: skip
        self._estimated = self._numbers(
            "counter", "aiproxy_usage_estimated", "Answers whose usage is an estimate.",
            "reason", "route",
        )  # fmt: skip
        self._attempts = self._numbers(
            "counter", "aiproxy_upstream_attempts", "Requests to upstreams, by result.",
            "result", "upstream",
        )  # fmt: skip
        self._available = self._numbers(
            "gauge", "aiproxy_upstream_available", "Whether requests are sent to the upstream.",
            "upstream",
        )  # fmt: skip
        self._disconnects = self._numbers(
            "counter", "aiproxy_client_disconnects", "Clients that left before their answer's end.",
            "endpoint", "phase",
        )  # fmt: skip
        self._loads = self._numbers(
            "counter", "aiproxy_sessions_loads", "Look-ups of stored turns and items.", "result"
        )
        self._reasoning_left_out = self._numbers(
            "counter", "aiproxy_sessions_reasoning_left_out",
            "Reasoning items not sent on, since another upstream had encrypted them.", "upstream",
        )  # fmt: skip
        self._store_duration = self._histograms(
            "aiproxy_store_duration_seconds", "Operations on a store.",
            "operation", "store", buckets=_STORE,
        )  # fmt: skip
        self._rejections = self._numbers(
            "counter", "aiproxy_limit_rejections", "Requests that a limit refused.", "key", "limit"
        )
        self._degraded = self._numbers(
            "gauge", "aiproxy_limiter_degraded", "Whether limits are not kept where they should be."
        )
        self._store_errors = self._numbers(
            "counter", "aiproxy_store_errors", "Operations on a store that failed.",
            "operation", "store",
        )  # fmt: skip
        self.loop_lag = self._histograms(
            "aiproxy_event_loop_lag_seconds", "How late the event loop ran a timer.", buckets=_LAG
        )[()]
        self._reload_ok = self._numbers(
            "gauge",
            "aiproxy_config_last_reload_successful",
            "Whether the last reload was successful.",
        )
        self._reload_at = self._numbers(
            "gauge", "aiproxy_config_last_reload_success_timestamp_seconds",
            "When a configuration was last put in force.",
        )  # fmt: skip
        build = self._numbers(
            "gauge", "aiproxy_build_info", "Always 1.", "aiohttp", "python", "version"
        )
        build[aiohttp.__version__, platform.python_version(), aiproxy.__version__] = 1

    def _numbers(self, kind: Kind, name: str, documentation: str, *labels: str) -> Numbers:
        made = Numbers(kind, name, documentation, labels)
        self._families.append(made)
        return made

    def _histograms(
        self, name: str, documentation: str, *labels: str, buckets: tuple[float, ...]
    ) -> Histograms:
        made = Histograms(name, documentation, labels, buckets=buckets)
        self._families.append(made)
        return made

    def _watch(
        self,
        kind: Kind,
        name: str,
        documentation: str,
        *labels: str,
        read: Callable[[], Iterable[tuple[Labels, float]]],
    ) -> None:
        self._families.append(Watched(kind, name, documentation, labels, read=read))

    def begin(self, exchange: Exchange) -> None:
        """See `Recorder`."""
        self._in_flight[exchange.endpoint,] += 1

    def record(self, exchange: Exchange) -> None:
        """See `Recorder`."""
        endpoint, route, key = exchange.endpoint, exchange.route, exchange.key
        upstream = exchange.upstream
        outcome = exchange.outcome or "internal_error"
        self._in_flight[endpoint,] -= 1
        self._requests[endpoint, key, outcome, route] += 1
        request_id, now = exchange.request_id, time.time()
        if len(request_id) > LONGEST_EXEMPLAR:
            request_id = ""  # one that is cut would find nothing
        self._duration[endpoint, route, upstream].observe(exchange.duration, request_id, now)
        if (overhead := exchange.overhead) is not None:
            self._overhead[endpoint,].observe(overhead, request_id, now)
        if (first := exchange.time_to_first_token) is not None:
            self._first_token[route, upstream].observe(first, request_id, now)
        if (per_token := exchange.time_per_output_token) is not None:
            self._per_token[route, upstream].observe(per_token, request_id, now)
        if exchange.limit:
            self._rejections[key, exchange.limit] += 1
        for asked, result in exchange.results:
            self._attempts[result, asked] += 1
        for load in exchange.loads:
            self._loads[load,] += 1
        if exchange.reasoning_left_out:
            self._reasoning_left_out[upstream,] += exchange.reasoning_left_out
        if outcome == "client_disconnected":
            phase = "streaming" if exchange.streaming else "waiting"
            self._disconnects[endpoint, phase] += 1
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
                self._tokens[key, route, kind] += count  # a series of its own, also at 0
            if exchange.estimated is not None:
                self._estimated[exchange.estimated, route] += 1

    def configured(self, upstreams: Iterable[str], now: float) -> None:
        """A configuration was put in force, at `now` seconds since the epoch."""
        self._reload_ok[()] = 1
        self._reload_at[()] = now
        known = {(name,) for name in upstreams}
        for gone in self._available.keys() - known:
            del self._available[gone]
        for labels in known - self._available.keys():
            self._available[labels] = 1

    def upstream_available(self, upstream: str, *, available: bool) -> None:
        """Requests go to an upstream, or it is left alone for a while."""
        if (upstream,) in self._available:
            self._available[upstream,] = available

    def store_used(self, store: str, operation: str, seconds: float) -> None:
        """An operation on a store ended."""
        self._store_duration[operation, store].observe(seconds)

    def store_failed(self, store: str, operation: str) -> None:
        """An operation on a store failed."""
        self._store_errors[operation, store] += 1

    def limiter_degraded(self, *, degraded: bool) -> None:
        """Limits are not kept where they should be, or are again."""
        self._degraded[()] = degraded

    def reload_failed(self) -> None:
        """A configuration was refused; the one in force stays."""
        self._reload_ok[()] = 0

    def loads_by_result(self) -> dict[str, int]:
        """Look-ups of stored turns and items, since the start."""
        return {result: int(count) for (result,), count in sorted(self._loads.items())}

    def watch_log(self, dropped: Callable[[], int]) -> None:
        """Take the number of dropped log lines from the log itself, at each scrape."""
        self._watch(
            "counter", "aiproxy_log_dropped", "Log lines dropped since standard error was blocked.",
            read=lambda: [((), dropped())],
        )  # fmt: skip

    def watch_spans(self, totals: Callable[[], Mapping[str, int]]) -> None:
        """Take what became of spans from where they are sent, if they are sent anywhere."""
        self._watch(
            "counter", "aiproxy_trace_spans", "Spans, by what became of them.", "result",
            read=lambda: [((result,), spans) for result, spans in totals().items()],
        )  # fmt: skip

    def watch_sessions(self, shares: Callable[[], Shares]) -> None:
        """Take what is stored from where it is kept, at each scrape."""
        self._watch(
            "gauge", "aiproxy_sessions_stored_bytes", "Bytes of stored turns.",
            read=lambda: [((), shares().size)],
        )  # fmt: skip
        self._watch(
            "gauge", "aiproxy_sessions_stored_turns", "Stored turns.",
            read=lambda: [((), shares().turns)],
        )  # fmt: skip
        self._watch(
            "counter", "aiproxy_sessions_evictions", "Turns that were removed.", "reason",
            read=lambda: [((reason,), turns) for reason, turns in shares().removed.items()],
        )  # fmt: skip

    def watch_limits(self, levels: Callable[[], Iterable[tuple[str, Iterable[Level]]]]) -> None:
        """Take the levels of each key from where they are kept, at each scrape."""

        def read() -> Iterator[tuple[Labels, float]]:
            for key, its in levels():
                for kind, level in tightest(its).items():
                    yield (key, kind), level.remaining

        self._watch(
            "gauge", "aiproxy_limit_remaining",
            "What is left of a key's limit, of several windows the tightest; below zero: a debt.",
            "key", "limit", read=read,
        )  # fmt: skip

    def exposition(self, form: Format = "text") -> bytes:
        """All metrics, at once. May take tens of milliseconds."""
        return self._exposition.whole(form)

    async def scrape(self, form: Format) -> list[bytes]:
        """All metrics, in parts; see `Exposition.scrape`."""
        return await self._exposition.scrape(form)
