"""The way of a batch to its collector: what is sent again, what is given up, what is counted."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from aiproxy import otlp
from aiproxy.exchange import Exchange
from aiproxy.exporting import Exporting, read
from aiproxy.otlp import Counts, Payload, Pipeline
from aiproxy.trace import Budget, Trace
from collector import Collector, collecting

PLAIN = Exporting(headers={}, timeout=5.0, gzip=False, certificate=None)
PATIENCE = 20  # seconds for what takes milliseconds


class Nobody:
    """A recorder that records nothing."""

    def begin(self, exchange: Exchange) -> None:
        """See `exchange.Recorder`."""

    def record(self, exchange: Exchange) -> None:
        """See `exchange.Recorder`."""


def finished(budget: Budget | None = None) -> Exchange:
    """Return a request with a trace and no attempt."""
    trace = Trace(
        trace_id=1,
        span_id=2,
        parent=None,
        state="",
        sampled=True,
        method="POST",
        most=100,
        content=True,
        budget=budget or Budget(1000),
    )
    return Exchange(
        request_id="r",
        endpoint="none",
        recorder=Nobody(),
        clock=lambda: 0.0,
        started=0.0,
        trace=trace,
    )


def empty(exchanges: Sequence[Exchange]) -> Iterator[Payload]:
    """Encode a batch as a body that says nothing: a field of a later version."""
    yield Payload(b"\xa2\x06\x01x", len(exchanges))


@contextmanager
def pipeline(
    url: str,
    how: Exporting = PLAIN,
    encode: Callable[[Sequence[Exchange]], Iterator[Payload]] = empty,
) -> Iterator[tuple[Pipeline, Counts]]:
    """Run a pipeline, and end it."""
    counts = Counts()
    made = Pipeline(url, how, encode, counts)
    try:
        yield made, counts
    finally:
        made.stop().join(PATIENCE)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Run a collector; batches go out at once, and again soon."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "5")
    monkeypatch.setattr(otlp, "BACKOFF", 0.01)
    with collecting() as running:
        yield running


def until(check: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    tick = threading.Event()
    for _ in range(PATIENCE * 100):
        if check():
            return
        tick.wait(0.01)
    pytest.fail("it does not come")


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_a_collector_cannot_take_now_is_sent_again(collector: Collector, status: int) -> None:
    """OTLP's retryable statuses are tried again until it takes the batch."""
    collector.statuses = [status, status]
    with pipeline(collector.url) as (made, counts):
        made.put(finished())
        until(lambda: counts.exported == 1)
    assert len(collector.requests) == 3
    assert (counts.failed, counts.dropped) == (0, 0)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 500, 302])
def test_what_a_collector_refuses_is_given_up(
    collector: Collector, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Any other status is no case for another try; it is logged once, and when it is over."""
    collector.statuses = [status, status]
    with pipeline(collector.url) as (made, counts):
        for number in range(1, 4):
            made.put(finished())
            until(lambda number=number: counts.failed + counts.exported == number)  # type: ignore[misc] # a default binds it
    assert (counts.failed, counts.exported) == (2, 1)
    assert [record.getMessage() for record in caplog.records] == [
        f"spans cannot be exported: status {status}",
        "spans are exported again",
    ]


def test_a_collector_that_is_not_there_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens: the batch is given up once its time is over, and counted."""
    monkeypatch.setattr(otlp, "BACKOFF", 0.01)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "5")
    with pipeline("http://127.0.0.1:9/v1/traces", PLAIN._replace(timeout=0.1)) as (made, counts):
        made.put(finished())
        until(lambda: counts.failed == 1)


def test_a_silent_collector_is_waited_for_so_long(collector: Collector) -> None:
    """The time-out is of the batch, not of each try."""
    collector.open.clear()
    with pipeline(collector.url, PLAIN._replace(timeout=0.1)) as (made, counts):
        made.put(finished())
        until(lambda: counts.failed == 1)
        collector.open.set()


def test_a_partial_success_is_counted(collector: Collector) -> None:
    """What a collector rejects of a batch that it took has failed."""
    collector.rejected = 1

    def two(exchanges: Sequence[Exchange]) -> Iterator[Payload]:
        yield Payload(next(empty(exchanges)).body, 2)

    with pipeline(collector.url, encode=two) as (made, counts):
        made.put(finished())
        until(lambda: (counts.exported, counts.failed) == (1, 1))


def test_a_full_queue_drops_the_newest(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the queue nothing waits: it is counted, and what it kept is free again."""
    monkeypatch.setattr(otlp, "QUEUE", 256)
    collector.open.clear()
    budget = Budget(10)
    with pipeline(collector.url) as (made, counts):
        for _ in range(256):
            made.put(finished())
        one = finished(budget)
        assert one.trace is not None
        one.trace.keep_answer(b"0123456789"[:9], streamed=False)
        assert not budget.take(5)
        made.put(one)
        assert counts.dropped == 1
        assert budget.take(10)
        collector.open.set()
        until(lambda: counts.exported == 256)
        made.put(finished())
        until(lambda: counts.exported == 257)


def test_headers_and_compression_are_the_environments(collector: Collector) -> None:
    """A collector's credential comes from there; the body is compressed if it says so."""
    how = read(
        {
            "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20secret, x-scope = a=b",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        }
    )
    with pipeline(collector.url, how) as (made, counts):
        made.put(finished())
        until(lambda: counts.exported == 1)
    headers = collector.requests[0]
    assert headers["authorization"] == "Bearer secret"
    assert headers["x-scope"] == "a=b"
    assert headers["content-encoding"] == "gzip"
    assert headers["user-agent"].startswith("aiproxy/")


def test_no_proxy_of_the_environment_sees_spans(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may hold prompts: they go where the configuration says, nowhere else."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pipeline(collector.url) as (made, counts):
        made.put(finished())
        until(lambda: counts.exported == 1)


def test_what_ends_takes_nothing_more(collector: Collector) -> None:
    """After `stop` spans are dropped, and counted."""
    with pipeline(collector.url) as (made, counts):
        made.stop()
        made.put(finished())
        assert counts.dropped == 1


@pytest.mark.parametrize(
    ("environ", "read_as"),
    [
        ({}, PLAIN._replace(timeout=10.0)),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "2.5"}, PLAIN._replace(timeout=2.5)),
        (
            {"OTEL_EXPORTER_OTLP_TIMEOUT": "2", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "3"},
            PLAIN._replace(timeout=3.0),
        ),
        (
            {"OTEL_EXPORTER_OTLP_HEADERS": ",a=1,,B%20C=%2C"},
            PLAIN._replace(timeout=10.0, headers={"a": "1", "B C": ","}),
        ),
    ],
)
def test_variables(environ: dict[str, str], read_as: Exporting) -> None:
    """Those for traces alone win over those for all signals."""
    assert read(environ) == read_as


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("HEADERS", "hunter2", "OTEL_EXPORTER_OTLP_HEADERS must be NAME=VALUE,NAME=VALUE,..."),
        ("HEADERS", "=hunter2", "OTEL_EXPORTER_OTLP_HEADERS must be NAME=VALUE,NAME=VALUE,..."),
        ("HEADERS", "a=x%0ay", "OTEL_EXPORTER_OTLP_HEADERS must be NAME=VALUE,NAME=VALUE,..."),
        ("TIMEOUT", "soon", "OTEL_EXPORTER_OTLP_TIMEOUT must be a number of seconds above 0"),
        ("TIMEOUT", "0", "OTEL_EXPORTER_OTLP_TIMEOUT must be a number of seconds above 0"),
        ("TIMEOUT", "inf", "OTEL_EXPORTER_OTLP_TIMEOUT must be a number of seconds above 0"),
        ("TIMEOUT", "nan", "OTEL_EXPORTER_OTLP_TIMEOUT must be a number of seconds above 0"),
        ("COMPRESSION", "br", "OTEL_EXPORTER_OTLP_COMPRESSION must be gzip or none"),
        ("CERTIFICATE", "/no/such", "OTEL_EXPORTER_OTLP_CERTIFICATE names no file"),
    ],
)  # fmt: skip
def test_variables_that_are_wrong(name: str, value: str, sentence: str) -> None:
    """Each is named, and what it holds is not: it may be a secret."""
    with pytest.raises(ValueError, match=r"^OTEL") as raised:
        read({f"OTEL_EXPORTER_OTLP_{name}": value})
    assert str(raised.value) == sentence
