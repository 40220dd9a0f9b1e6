"""Tracing: which requests have a trace, and where their spans go (extra `otel`).

Off, it costs nothing, and nothing of OpenTelemetry is imported. What upstreams are told of the
trace is in `trace`, what spans say in `spans`, how they are sent in `otlp`.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from aiproxy import exporting
from aiproxy.kept import Budget, Kept
from aiproxy.trace import Trace, new_span_id, new_trace_id, parent_of, state_of

if TYPE_CHECKING:
    import threading
    from collections.abc import Mapping

    from aiohttp.web_request import BaseRequest

    from aiproxy.config import Tracing as Configured
    from aiproxy.exchange import Exchange
    from aiproxy.otlp import Counts, Pipeline, Sampling
    from aiproxy.otlp_wire import Value

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
MOST_KEPT = 64 * 1024 * 1024  # bytes of requests and answers that wait for their spans


class Tracing:
    """Of one daemon."""

    def __init__(self) -> None:
        self._configured: Configured | None = None
        self._pipeline: Pipeline | None = None
        self._resource: Mapping[str, Value] = {}
        self._sampling: Sampling | None = None
        self._counts: list[Counts] = []  # of all collectors since the start
        self._budget = Budget(MOST_KEPT)
        self._ending: list[threading.Thread] = []

    def prepare(self, configured: Configured | None) -> None:
        """Have ready what takes longer than the event loop may stop; may be called in a thread."""
        if configured is None or self._sampling is not None:
            return
        # Only here: who does not trace need not have what it needs.
        from aiproxy import otlp, spans  # noqa: F401, PLC0415 - see above

        self._resource = otlp.resource()
        self._sampling = otlp.Sampling()

    def configure(self, configured: Configured | None) -> None:
        """Take what the configuration says. Spans of before go where they were to go."""
        if configured == self._configured:
            return
        pipeline = None if configured is None else self._begin(configured)
        self.stop()
        self._configured, self._pipeline = configured, pipeline

    def _begin(self, configured: Configured) -> Pipeline:
        self.prepare(configured)
        from aiproxy.otlp import Counts, Pipeline  # noqa: PLC0415 - as in `prepare`
        from aiproxy.spans import Encoder  # noqa: PLC0415 - the same

        counts = Counts()
        how = exporting.read(os.environ)
        pipeline = Pipeline(configured.otlp, how, Encoder(self._resource), counts)
        self._counts.append(counts)
        return pipeline

    def begin(self, request: BaseRequest) -> Trace | None:
        """The trace of a request that was received; None where there is none."""
        if self._configured is None or self._sampling is None:
            return None
        headers = request.headers
        parent = parent_of(headers.getall("traceparent", ()))
        trace_id = new_trace_id() if parent is None else parent.trace_id
        kept = None
        if self._sampling(trace_id, parent):
            kept = Kept(self._budget, content=self._configured.content)
        return Trace(
            trace_id=trace_id,
            span_id=new_span_id(),
            parent=parent,
            state="" if parent is None else state_of(headers.getall("tracestate", ())),
            method=request.method if request.method in _METHODS else "_OTHER",
            kept=kept,
        )

    def record(self, exchange: Exchange) -> None:
        """A request has ended."""
        trace = exchange.trace
        if trace is None or trace.kept is None:
            return
        trace.offset = time.time() - time.monotonic()
        if self._pipeline is not None:
            self._pipeline.put(exchange)
        else:  # a reload has ended tracing meanwhile
            trace.kept.release()

    def totals(self) -> dict[str, int]:
        """Spans since the start, by what became of them; empty if there was never a collector."""
        if not self._counts:
            return {}
        return {
            "exported": sum(each.exported for each in self._counts),
            "failed": sum(each.failed for each in self._counts),
            "dropped": sum(each.dropped for each in self._counts),
        }

    def stop(self) -> None:
        """Send what waits, and take nothing more; returns at once."""
        if self._pipeline is not None:
            running = [thread for thread in self._ending if thread.is_alive()]
            self._ending = [*running, self._pipeline.stop()]
        self._configured = self._pipeline = None

    def join(self, seconds: float) -> bool:
        """Wait for what was stopped; whether all of it ended in time. Blocks."""
        until = time.monotonic() + seconds
        for thread in self._ending:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._ending)
