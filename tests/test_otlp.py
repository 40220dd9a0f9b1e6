"""The way of a batch to its collector: what is sent again, what is given up, what is counted."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from aiproxy import otlp
from aiproxy.exchange import Exchange
from aiproxy.exporting import Exporting, read
from aiproxy.kept import Budget, Kept
from aiproxy.otlp import Counts, Payload, Pipeline
from aiproxy.trace import Trace
from collector import Collector, collecting
from invariants import eventually
from steps import Headers, Repeat, Send, Stall, Step
from upstream import ScriptedUpstream

PLAIN = Exporting(headers={}, timeout=5.0, gzip=False, certificate=None, delay=0.005)
USUAL = PLAIN._replace(timeout=10.0, delay=5.0)
SECONDS = "OTEL_EXPORTER_OTLP_TIMEOUT must be a number of seconds above 0, at most 300"
PATIENCE = 20  # seconds for what takes milliseconds


class Nobody:
    """A recorder that records nothing."""

    def begin(self, exchange: Exchange) -> None:
        """See `exchange.Recorder`."""

    def record(self, exchange: Exchange) -> None:
        """See `exchange.Recorder`."""


def finished(budget: Budget | None = None, attempts: int = 0) -> Exchange:
    """Return a request with a trace."""
    kept = Kept(budget or Budget(1000), content=True)
    kept.answer(b"x" * 9, streamed=False)
    trace = Trace(trace_id=1, span_id=2, parent=None, state="", method="POST", kept=kept)
    for _ in range(attempts):
        trace.begin("up", "http://127.0.0.1:1", 0.0)
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
    traces = [exchange.trace for exchange in exchanges]
    spans = sum(1 + len(trace.attempts) for trace in traces if trace is not None)
    yield Payload(b"\xa2\x06\x01x", spans)


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


@pytest.mark.parametrize(("rejected", "failed"), [(1, 1), (3, 3), (5000, 3), (-5, 0)])
def test_a_partial_success_is_counted(collector: Collector, rejected: int, failed: int) -> None:
    """What a collector rejects of a batch has failed; never more than there was, or less than 0."""
    collector.rejected = rejected
    with pipeline(collector.url) as (made, counts):
        made.put(finished(attempts=2))
        until(lambda: counts.exported + counts.failed == 3)
    assert (counts.exported, counts.failed) == (3 - failed, failed)


@pytest.mark.parametrize("encoded", [0, 1])
def test_a_bug_costs_the_spans_that_it_costs(collector: Collector, encoded: int) -> None:
    """What is raised while spans are made is counted, and all that was kept is free again."""
    budget = Budget(10)

    def broken(exchanges: Sequence[Exchange]) -> Iterator[Payload]:
        for _ in exchanges[:encoded]:
            yield Payload(b"\xa2\x06\x01x", 1)
        raise TypeError

    with pipeline(collector.url, encode=broken) as (made, counts):
        made.put(finished(budget))
        until(lambda: counts.exported + counts.failed == 1)
    assert (counts.exported, counts.failed) == (encoded, 1 - encoded)
    assert budget.take(10)
    with pipeline(collector.url, encode=lambda _: iter([Payload(b"", 1)])) as (made, counts):
        made.put(finished())
        until(lambda: counts.failed == 1)


def test_a_collector_that_asks_for_time_gets_it(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Retry-After` is waited for; where that is longer than there is time, it is given up."""
    collector.statuses = [503]
    collector.retry_after = "30"
    with pipeline(collector.url) as (made, counts):
        made.put(finished())
        until(lambda: counts.failed == 1)
    assert len(collector.requests) == 1


def test_waiting_grows(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time is twice the one before, up to a most."""
    monkeypatch.setattr(otlp, "MOST_BACKOFF", 0.04)
    collector.statuses = [503] * 5
    waits: list[float] = []
    with pipeline(collector.url) as (made, counts):
        stopping = made._exporter._stopping
        monkeypatch.setattr(stopping, "wait", waits.append)
        made.put(finished())
        until(lambda: counts.exported == 1)
    assert waits == [0.01, 0.02, 0.04, 0.04, 0.04]


CHUNKED = (("transfer-encoding", "chunked"),)
ELSEWHERE = (("location", "http://[x"), ("content-length", "0"))


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ([Headers(200, CHUNKED), Repeat(b"x", 10_000, pause=0.02), Stall()], "failed"),
        ([Headers(200, CHUNKED), Repeat(bytes(65536), 64), Stall()], "exported"),
        ([Headers(302, ELSEWHERE)], "failed"),
        ([Send(b"no HTTP at all\r\n\r\n")], "failed"),
    ],
    ids=["slow", "long", "elsewhere", "odd"],
)
async def test_no_answer_is_waited_for_without_end(
    upstream: ScriptedUpstream, script: list[Step], outcome: str
) -> None:
    """The time-out is of the batch, however slowly an answer comes, or however long it is."""
    upstream.default = script
    counts = Counts()
    made = Pipeline(upstream.url, PLAIN._replace(timeout=0.3), empty, counts)
    made.put(finished())

    async def counted() -> None:
        assert getattr(counts, outcome) == 1

    await eventually(counted)
    thread = made.stop()
    await asyncio.get_running_loop().run_in_executor(None, thread.join, PATIENCE)
    assert not thread.is_alive()


def test_the_end_of_a_pipeline_frees_all_that_waits(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collector that never answers has its time, then the rest has failed, and is free."""
    monkeypatch.setattr(otlp, "AT_THE_END", 0.1)
    monkeypatch.setattr(otlp, "BATCH", 2)
    collector.open.clear()
    budget = Budget(90)
    with pipeline(collector.url) as (made, counts):
        for _ in range(10):
            made.put(finished(budget))
        assert not budget.take(1)
        made.stop().join(PATIENCE)
        assert (counts.exported, counts.failed) == (0, 10)
        assert budget.take(90)
        collector.open.set()


def test_a_connection_that_was_closed_meanwhile_is_no_failure(collector: Collector) -> None:
    """A collector that ends kept connections is asked on another one, at once."""
    with pipeline(collector.url) as (made, counts):
        made.put(finished())
        until(lambda: counts.exported == 1)
        made._exporter._poster._cut()
        made.put(finished())
        until(lambda: counts.exported == 2)
    assert counts.failed == 0


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
        ({}, USUAL),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "2.5"}, USUAL._replace(timeout=2.5)),
        (
            {"OTEL_EXPORTER_OTLP_TIMEOUT": "2", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "3"},
            USUAL._replace(timeout=3.0),
        ),
        (
            {"OTEL_EXPORTER_OTLP_HEADERS": ",a=1,,b=%2C"},
            USUAL._replace(headers={"a": "1", "b": ","}),
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
        ("TIMEOUT", "soon", SECONDS),
        ("TIMEOUT", "0", SECONDS),
        ("TIMEOUT", "inf", SECONDS),
        ("TIMEOUT", "nan", SECONDS),
        ("TIMEOUT", "10000", SECONDS),
        ("HEADERS", "a=%E2%82%AC", "OTEL_EXPORTER_OTLP_HEADERS must be NAME=VALUE,NAME=VALUE,..."),
        ("COMPRESSION", "br", "OTEL_EXPORTER_OTLP_COMPRESSION must be gzip or none"),
        ("CERTIFICATE", "/no/such", "OTEL_EXPORTER_OTLP_CERTIFICATE names no file"),
    ],
)  # fmt: skip
def test_variables_that_are_wrong(name: str, value: str, sentence: str) -> None:
    """Each is named, and what it holds is not: it may be a secret."""
    with pytest.raises(ValueError, match=r"^OTEL") as raised:
        read({f"OTEL_EXPORTER_OTLP_{name}": value})
    assert str(raised.value) == sentence


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "60001"])
def test_a_delay_that_is_wrong(value: str) -> None:
    """The processor would refuse it, after the file was accepted."""
    with pytest.raises(ValueError, match=r"^OTEL_BSP_SCHEDULE_DELAY must be a number of milli"):
        read({"OTEL_BSP_SCHEDULE_DELAY": value})
    assert read({"OTEL_BSP_SCHEDULE_DELAY": "200"}).delay == pytest.approx(0.2)
