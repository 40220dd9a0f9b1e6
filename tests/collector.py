"""A collector: an OTLP/HTTP receiver on loopback, in a thread of its own.

It reads what it gets by OTLP's own messages, and answers as it is told: at once, after a while, or
with a status that is no success.
"""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

PATH = "/v1/traces"


def value_of(value: AnyValue) -> Any:
    """Return a value as Python has it."""
    return getattr(value, cast("str", value.WhichOneof("value")))


@dataclass(frozen=True)
class Told:
    """A span, as it came."""

    span: Span
    resource: dict[str, Any]

    @property
    def attributes(self) -> dict[str, Any]:
        """Its attributes; that one is given twice is no OTLP."""
        pairs = [(each.key, value_of(each.value)) for each in self.span.attributes]
        assert len(dict(pairs)) == len(pairs), pairs
        return dict(pairs)

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.span.end_time_unix_nano - self.span.start_time_unix_nano) / 1e9


@dataclass
class Collector:
    """What came, and how to answer; `statuses` are those of the next requests, then 200."""

    url: str = ""
    spans: list[Told] = field(default_factory=list)
    requests: list[dict[str, str]] = field(default_factory=list)  # their headers
    statuses: list[int] = field(default_factory=list)
    rejected: int = 0  # of each batch, as it says
    retry_after: str = ""
    open: threading.Event = field(default_factory=threading.Event)  # while not set it is silent

    def take(self, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        """Read a request; its answer."""
        self.requests.append(headers)
        self.open.wait(30)
        status = self.statuses.pop(0) if self.statuses else 200
        if status != 200:
            return status, b""
        assert headers["content-type"] == "application/x-protobuf"
        if headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = {each.key: value_of(each.value) for each in group.resource.attributes}
            for scope in group.scope_spans:
                assert scope.scope.name == "aiproxy"
                self.spans += [Told(span, resource) for span in scope.spans]
        partial = ExportTracePartialSuccess(rejected_spans=self.rejected)
        response = ExportTraceServiceResponse(partial_success=partial if self.rejected else None)
        return 200, response.SerializeToString()

    def of(self, kind: int) -> list[Told]:
        """Return the spans of a kind, oldest first."""
        found = [told for told in self.spans if told.span.kind == kind]
        return sorted(found, key=lambda told: told.span.start_time_unix_nano)

    @property
    def servers(self) -> list[Told]:
        """The spans of requests."""
        return self.of(Span.SPAN_KIND_SERVER)

    @property
    def clients(self) -> list[Told]:
        """The spans of attempts."""
        return self.of(Span.SPAN_KIND_CLIENT)


def _handler(collector: Collector) -> Any:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, answer = collector.take(headers, body) if self.path == PATH else (404, b"")
            try:
                self.send_response(status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                if retry_after := collector.retry_after:
                    self.send_header("retry-after", retry_after)
                self.end_headers()
                self.wfile.write(answer)
            except OSError:  # whoever asked does not wait any more
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Write nothing."""

    return Handler


@contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector; it answers until told otherwise."""
    collector = Collector()
    collector.open.set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(collector))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    collector.url = f"http://127.0.0.1:{server.server_address[1]}{PATH}"
    try:
        yield collector
    finally:
        collector.open.set()
        server.shutdown()
        server.server_close()
        thread.join()
