"""Spans on their way to a collector: OTLP over HTTP, in the background (extra `otel`).

The queue, its batches and their thread are those of OpenTelemetry's batch processor, which gets
one item for each request. What a batch becomes is made in that thread. A collector that is slow,
away or refuses costs requests nothing: what does not fit into the queue is dropped and counted.

Of OpenTelemetry's own variables of the environment those in `exporting` hold here, and by
its SDK OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_BSP_SCHEDULE_DELAY, OTEL_TRACES_SAMPLER.
"""

from __future__ import annotations

import gzip
import logging
import threading
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import requests
from google.protobuf.message import DecodeError
from opentelemetry.context import Context
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import DEFAULT_ON, Decision
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    TraceFlags,
    set_span_in_context,
)

import aiproxy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from aiproxy.exchange import Exchange
    from aiproxy.exporting import Exporting
    from aiproxy.trace import Parent

QUEUE = 2048  # requests that wait; the processor's own default
BATCH = 256  # of them are taken at once
BACKOFF, MOST_BACKOFF = 0.5, 5.0  # seconds between two of these

_SUCCESS = range(200, 300)
_NO_RESOURCE = Resource.get_empty()  # else each span looks for one
_AGAIN = frozenset({429, 502, 503, 504})  # OTLP/HTTP, "Retryable response codes"

_log = logging.getLogger(__name__)


class Payload(NamedTuple):
    """A body to send, and the number of spans in it."""

    body: bytes
    spans: int


class Encode(Protocol):
    """Makes bodies of requests that ended."""

    def __call__(self, exchanges: Sequence[Exchange], /) -> Iterator[Payload]:
        """Make them one after another; what was kept of a request is released."""


@dataclass(slots=True)
class Counts:
    """Spans that the collector took, that it did not take, and that were not even queued."""

    exported: int = 0
    failed: int = 0
    dropped: int = 0


class Finished(ReadableSpan):
    """A request that ended: all of its spans, not made yet."""

    def __init__(self, exchange: Exchange, context: SpanContext) -> None:
        super().__init__("request", context, resource=_NO_RESOURCE)
        self.exchange = exchange


class Sampling:
    """Which requests have spans, as OTEL_TRACES_SAMPLER says; by default as the parent has it."""

    def __init__(self) -> None:
        self._sampler = TracerProvider(shutdown_on_exit=False).sampler  # the SDK reads it there

    def __call__(self, trace_id: int, parent: Parent | None) -> bool:
        """Whether one has."""
        if self._sampler is DEFAULT_ON:  # what it would say, at a tenth of the cost
            return parent is None or parent.sampled
        context = Context()
        if parent is not None:
            flags = TraceFlags(parent.sampled)
            remote = SpanContext(trace_id, parent.span_id, is_remote=True, trace_flags=flags)
            context = set_span_in_context(NonRecordingSpan(remote), context)
        result = self._sampler.should_sample(context, trace_id, "request", SpanKind.SERVER)
        return result.decision is Decision.RECORD_AND_SAMPLE


def resource() -> Mapping[str, Any]:
    """Who exports, as attributes; what the environment says of it wins."""
    own = Resource(
        {
            "service.name": "aiproxy",
            "service.version": aiproxy.__version__,
            "service.instance.id": str(uuid.uuid4()),
        }
    )
    return own.merge(OTELResourceDetector().detect()).attributes


class _Exporter(SpanExporter):
    """Sends batches. Runs in the processor's thread."""

    def __init__(self, endpoint: str, how: Exporting, encode: Encode, counts: Counts) -> None:
        self._endpoint = endpoint
        self._how = how
        self._encode = encode
        self._counts = counts
        self._session = requests.Session()
        self._session.trust_env = False  # no proxies of the environment, no .netrc
        self._session.headers.update(
            {
                "User-Agent": f"aiproxy/{aiproxy.__version__}",
                "Content-Type": "application/x-protobuf",
                **({"Content-Encoding": "gzip"} if how.gzip else {}),
                **how.headers,
            }
        )
        self._session.verify = how.certificate or True
        self._failing = False
        self.done = 0  # requests
        self.stopping = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See `SpanExporter`."""
        finished = [each.exchange for each in spans if isinstance(each, Finished)]
        try:
            for payload in self._encode(finished):
                self._deliver(payload)
        finally:
            self.done += len(finished)
        return SpanExportResult.SUCCESS

    def _deliver(self, payload: Payload) -> None:
        reason = self._send(payload) if payload.body else "a bug"
        if reason is None:
            self._counts.exported += payload.spans
            if self._failing:
                self._failing = False
                _log.warning("spans are exported again")
            return
        self._counts.failed += payload.spans
        if not self._failing:  # once: a collector may be away for days
            self._failing = True
            _log.warning("spans cannot be exported: %s", reason)

    def _send(self, payload: Payload) -> str | None:
        """Send a body, again where that is allowed; why it was not taken."""
        body = gzip.compress(payload.body, 1) if self._how.gzip else payload.body
        until = time.monotonic() + self._how.timeout
        wait = BACKOFF
        while True:
            left = until - time.monotonic()
            answer: requests.Response | None = None
            try:
                answer = self._session.post(
                    self._endpoint, data=body, timeout=max(left, 0.1), allow_redirects=False
                )
            except (requests.RequestException, OSError) as error:
                reason = type(error).__name__  # its text may hold the address with all its parts
            else:
                if answer.status_code in _SUCCESS:
                    return self._rejected(answer.content)
                reason = f"status {answer.status_code}"
                if answer.status_code not in _AGAIN:
                    return reason
                asked = answer.headers.get("Retry-After", "")
                wait = max(wait, float(asked)) if asked.isdecimal() else wait
            if time.monotonic() + wait > until or self.stopping.wait(wait):
                return reason
            wait = min(MOST_BACKOFF, 2 * wait)

    def _rejected(self, body: bytes) -> str | None:
        """Read what a collector did not take of a batch that it took (OTLP, "Partial Success")."""
        try:
            partial = ExportTraceServiceResponse.FromString(body).partial_success
        except DecodeError:
            return None
        if not partial.rejected_spans:
            return None
        self._counts.exported -= partial.rejected_spans
        self._counts.failed += partial.rejected_spans
        _log.warning("the collector has rejected %d spans of a batch", partial.rejected_spans)
        return None

    def shutdown(self) -> None:
        """See `SpanExporter`."""
        self._session.close()


class Pipeline:
    """The queue to one collector, from its making to `stop`."""

    def __init__(self, endpoint: str, how: Exporting, encode: Encode, counts: Counts) -> None:
        self._counts = counts
        self._exporter = _Exporter(endpoint, how, encode, counts)
        self._processor = BatchSpanProcessor(
            self._exporter, max_queue_size=QUEUE, max_export_batch_size=BATCH
        )
        self._put = 0
        self._stopped: threading.Thread | None = None

    def put(self, exchange: Exchange) -> None:
        """Queue the spans of a request that ended; never waits."""
        trace = exchange.trace
        assert trace is not None  # noqa: S101 - only such come here
        if self._put - self._exporter.done >= QUEUE or self._stopped is not None:
            self._counts.dropped += 1 + len(trace.attempts)
            trace.release()
            return
        self._put += 1
        context = SpanContext(
            trace.trace_id, trace.span_id, is_remote=False, trace_flags=TraceFlags(1)
        )
        self._processor.on_end(Finished(exchange, context))

    def stop(self) -> threading.Thread:
        """Send what waits, once, and end; the thread in which that is done."""
        if self._stopped is None:
            self._exporter.stopping.set()
            self._stopped = threading.Thread(
                target=self._processor.shutdown, name="spans", daemon=True
            )
            self._stopped.start()
        return self._stopped
