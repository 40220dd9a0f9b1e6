"""Spans on their way to a collector: OTLP over HTTP, in the background (extra `otel`).

The queue, its batches and their thread are those of OpenTelemetry's batch processor, which gets
one item for each request. What a batch becomes is made in that thread. A collector that is slow,
away or refuses costs requests nothing: what does not fit into the queue is dropped and counted.

Of OpenTelemetry's own variables of the environment those in `exporting` hold here, and by its SDK
OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG.
"""

from __future__ import annotations

import gzip
import logging
import threading
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from google.protobuf.message import DecodeError
from opentelemetry.context import Context
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
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
from aiproxy.otlp_post import NotSentError, Poster

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from aiproxy.exchange import Exchange
    from aiproxy.exporting import Exporting
    from aiproxy.otlp_wire import Value
    from aiproxy.trace import Parent

QUEUE = 2048  # requests that wait; the processor's own default
BATCH = 256  # of them are taken at once
BACKOFF, MOST_BACKOFF = 0.5, 5.0  # seconds before a batch is sent again
AT_THE_END = 5.0  # seconds for all that waits once it is to end

_SUCCESS = range(200, 300)
_NO_RESOURCE = Resource.get_empty()  # else each span looks for one
_AGAIN = frozenset({429, 502, 503, 504})  # OTLP/HTTP, "Retryable response codes"

_log = logging.getLogger(__name__)


class Payload(NamedTuple):
    """A body to send, and the number of spans in it; empty where they could not be made."""

    body: bytes
    spans: int


class Encode(Protocol):
    """Makes bodies of requests that ended."""

    def __call__(self, exchanges: Sequence[Exchange], /) -> Iterator[Payload]:
        """Make them one after another."""


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
        # The SDK reads the variable there. What else it would read is given.
        limits = SpanLimits(**dict.fromkeys(_LIMITS, SpanLimits.UNSET))
        provider = TracerProvider(resource=_NO_RESOURCE, shutdown_on_exit=False, span_limits=limits)
        self._sampler = provider.sampler

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


_LIMITS = (
    "max_attributes", "max_events", "max_links", "max_span_attributes", "max_event_attributes",
    "max_link_attributes", "max_attribute_length", "max_span_attribute_length",
)  # fmt: skip


def resource() -> Mapping[str, Value]:
    """Who exports, as attributes; what the environment says of it wins."""
    own = {
        "service.name": "aiproxy",
        "service.version": aiproxy.__version__,
        "service.instance.id": str(uuid.uuid4()),
    }
    given = OTELResourceDetector().detect().attributes
    return own | {key: value for key, value in given.items() if isinstance(value, str)}


class _Exporter(SpanExporter):
    """Sends batches. Runs in the processor's thread."""

    def __init__(self, poster: Poster, how: Exporting, encode: Encode, counts: Counts) -> None:
        self._poster = poster
        self._how = how
        self._encode = encode
        self._counts = counts
        self._reason = ""  # why the last one was not taken
        self._until = float("inf")  # the end of all
        self.done = 0  # requests
        self._stopping = threading.Event()

    def hurry(self) -> None:
        """What waits is sent once more, as far as it can be in time."""
        self._until = time.monotonic() + AT_THE_END
        self._stopping.set()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See `SpanExporter`. Whatever happens, every span is counted, and all is released."""
        finished = [each.exchange for each in spans if isinstance(each, Finished)]
        left = sum(map(_spans, finished))
        try:
            for payload in self._encode(finished) if time.monotonic() < self._until else ():
                left -= payload.spans
                self._deliver(payload)
        finally:
            self._counts.failed += left
            for exchange in finished:
                release(exchange)
            self.done += len(finished)
        return SpanExportResult.SUCCESS

    def _deliver(self, payload: Payload) -> None:
        try:
            rejected = self._send(payload) if payload.body else payload.spans
            reason = ""
        except NotSentError as error:
            rejected, reason = payload.spans, str(error)
        rejected = min(max(rejected, 0), payload.spans)
        self._counts.failed += rejected
        self._counts.exported += payload.spans - rejected
        if reason == self._reason:  # once: a collector may be away for days
            return
        self._reason = reason
        if reason:
            _log.warning("spans cannot be exported: %s", reason)
        else:
            _log.warning("spans are exported again")

    def _send(self, payload: Payload) -> int:
        """Send a body, again where that is allowed; how many of its spans were not taken.

        Raises:
            NotSentError: none was.
        """
        body = gzip.compress(payload.body, 1) if self._how.gzip else payload.body
        until = min(time.monotonic() + self._how.timeout, self._until)
        wait = BACKOFF
        while True:
            try:
                answer = self._poster.post(body, until)
            except NotSentError as error:
                failed = error
            else:
                if answer.status in _SUCCESS:
                    return _rejected(answer.body)
                failed = NotSentError(f"status {answer.status}")
                if answer.status not in _AGAIN:
                    raise failed
                wait = max(wait, answer.retry_after)
            if time.monotonic() + wait > until or self._stopping.wait(wait):
                raise failed
            wait = min(MOST_BACKOFF, 2 * wait)

    def shutdown(self) -> None:
        """See `SpanExporter`."""
        self._poster.close()


def _rejected(body: bytes) -> int:
    """What a collector did not take of a batch that it took (OTLP, "Partial Success")."""
    try:
        rejected: int = ExportTraceServiceResponse.FromString(body).partial_success.rejected_spans
    except DecodeError:  # some answer with something else
        return 0
    return rejected


def _spans(exchange: Exchange) -> int:
    return 0 if exchange.trace is None else 1 + len(exchange.trace.attempts)


def release(exchange: Exchange) -> None:
    """What was kept for a request's spans is not needed any more; from any thread."""
    if exchange.trace is not None and exchange.trace.kept is not None:
        exchange.trace.kept.release()


class Pipeline:
    """The queue to one collector, from its making to `stop`."""

    def __init__(self, url: str, how: Exporting, encode: Encode, counts: Counts) -> None:
        self._counts = counts
        self._exporter = _Exporter(Poster(url, how), how, encode, counts)
        self._processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=QUEUE,
            max_export_batch_size=BATCH,
            schedule_delay_millis=how.delay * 1000,
            export_timeout_millis=how.timeout * 1000,
            meter_provider=NoOpMeterProvider(),
        )
        self._put = 0
        self._stopped: threading.Thread | None = None

    def put(self, exchange: Exchange) -> None:
        """Queue the spans of a request that ended; never waits."""
        trace = exchange.trace
        assert trace is not None  # noqa: S101 - only such come here
        if self._put - self._exporter.done >= QUEUE or self._stopped is not None:
            self._counts.dropped += _spans(exchange)
            release(exchange)
            return
        self._put += 1
        context = SpanContext(
            trace.trace_id, trace.span_id, is_remote=False, trace_flags=TraceFlags(1)
        )
        self._processor.on_end(Finished(exchange, context))

    def stop(self) -> threading.Thread:
        """Send what waits, as far as it can be in time, and end; the thread in which that is."""
        if self._stopped is None:
            self._exporter.hurry()
            self._stopped = threading.Thread(
                target=self._processor.shutdown, name="spans", daemon=True
            )
            self._stopped.start()
        return self._stopped
