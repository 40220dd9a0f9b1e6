"""What a scrape gets: the two formats, exemplars, and that it stops nobody."""

import asyncio
import itertools
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.samples import Exemplar

from aiproxy import exposition
from aiproxy.exposition import Exposition, Format, negotiate
from aiproxy.series import LONGEST_EXEMPLAR, Family, Histograms, Numbers, Watched
from client import RawClient
from invariants import eventually
from rig import Proxy, prompt
from upstream import ScriptedUpstream

Serve = Callable[..., Awaitable[Proxy]]
parsed: Callable[[str], Iterator[Metric]] = parser.text_string_to_metric_families
ASKED = "application/openmetrics-text;version=1.0.0"
# As Prometheus 2 and 3 send it, and a browser.
PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
BOUNDS = (0.5, 1, 2.5, 10_000_000)
values = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from('\\"\n')
amounts = st.floats() | st.integers(-(10**20), 10**20)
BOTH = pytest.mark.parametrize("form", ["text", "openmetrics"])


async def scrape(proxy: Proxy) -> dict[str, Metric]:
    """Every metric, as OpenMetrics."""
    async with await RawClient.connect(int(proxy.daemon.operators.port)) as client:
        await client.request("GET", "/metrics", {"accept": ASKED})
        answer = await client.answer()
    assert answer.headers["content-type"] == (
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    )
    assert answer.body.endswith(b"\n# EOF\n")
    return {family.name: family for family in parsed(answer.body.decode())}


def exemplars(family: Metric) -> list[Exemplar]:
    """The exemplars of a metric."""
    return [sample.exemplar for sample in family.samples if sample.exemplar is not None]


PER_REQUEST = {
    "aiproxy_request_duration_seconds": "duration_s",
    "aiproxy_time_to_first_token_seconds": "first_token_s",
    "aiproxy_time_per_output_token_seconds": None,
    "aiproxy_overhead_seconds": "overhead_s",
}


@pytest.mark.parametrize("size", [1, LONGEST_EXEMPLAR])
async def test_exemplars_lead_to_the_request(serve: Serve, size: int) -> None:
    """What a request took is told with its id, the caller's as well, and the moment."""
    proxy = await serve()
    request_id = "x" * size
    fields = {"x-request-id": request_id}
    answer = await proxy.post("/v1/responses", prompt(stream=True), fields)
    assert answer.headers["x-request-id"] == request_id
    (line,) = await logged(proxy, 1)
    found = await scrape(proxy)
    for name, its in PER_REQUEST.items():
        (exemplar,) = exemplars(found[name])
        assert exemplar.labels == {"request_id": request_id}
        (total,) = [s.value for s in found[name].samples if s.name == f"{name}_sum"]
        assert exemplar.value == total
        assert its is None or exemplar.value == pytest.approx(line[its], abs=0.001)
        assert exemplar.timestamp is not None
        assert float(exemplar.timestamp) > 1e9
    others = {name for name, family in found.items() if exemplars(family)} - PER_REQUEST.keys()
    assert not others


@pytest.mark.parametrize("size", [LONGEST_EXEMPLAR + 1, 128])
async def test_an_id_that_is_too_long_is_no_exemplar(serve: Serve, size: int) -> None:
    """OpenMetrics allows 128 characters in all; a longer id is left out, and not cut."""
    proxy = await serve()
    answer = await proxy.post(headers={"x-request-id": "x" * size})
    assert (answer.status, answer.headers["x-request-id"]) == (200, "x" * size)
    await logged(proxy, 1)
    found = await scrape(proxy)
    assert not exemplars(found["aiproxy_request_duration_seconds"])
    assert found["aiproxy_request_duration_seconds"].samples


async def logged(proxy: Proxy, n: int) -> list[dict[str, Any]]:
    """The lines of `n` requests, once they are there."""

    async def holds() -> None:
        assert len(proxy.request_logs()) >= n

    await eventually(holds)
    return proxy.request_logs()


async def test_text_has_no_exemplars(serve: Serve) -> None:
    """Who does not ask for OpenMetrics gets the text format, which knows neither them nor EOF."""
    proxy = await serve()
    await proxy.post()
    await logged(proxy, 1)
    answer = await proxy.admin("/metrics")
    assert b"aiproxy_requests_total{" in answer.body
    assert b"# {" not in answer.body
    assert b"# EOF" not in answer.body
    assert (await proxy.admin("/metrics", "HEAD")).body == b""


@pytest.mark.parametrize(
    ("accepts", "expected"),
    [
        ([], "text"),
        ([""], "text"),
        (["*/*"], "text"),
        (["text/plain"], "text"),
        ([BROWSER], "text"),
        ([PROMETHEUS_2], "openmetrics"),
        ([PROMETHEUS_3], "openmetrics"),
        (["application/openmetrics-text"], "openmetrics"),
        (['Application/OpenMetrics-Text; Version="1.0.0" ; Q=0.5'], "openmetrics"),
        (["application/*"], "text"),
        (["application/openmetrics-text;version=0.0.1"], "text"),
        (["application/openmetrics-text;version=2.0.0, text/html"], "text"),
        (["application/openmetrics-text;q=0"], "text"),
        (["application/openmetrics-text;q=0.4, text/plain;q=0.5"], "text"),
        (["application/openmetrics-text;q=0.4", "text/*;q=0.5"], "text"),
        (["text/plain;version=0.0.4;q=0.5", "application/openmetrics-text;q=0.6"], "openmetrics"),
        (["application/openmetrics-text;q=0.5, text/plain;version=9;q=0.6"], "openmetrics"),
        (["application/openmetrics-text, */*"], "openmetrics"),
        (["application/openmetrics-text;q=x"], "text"),
        (["application/openmetrics-text;q=nan"], "text"),
        (["application/openmetrics-text;q=7"], "text"),
        ([";;,=;q=,"], "text"),
    ],
)
def test_what_is_asked_for(accepts: list[str], expected: Format) -> None:
    """The format with the higher quality; OpenMetrics only by name, and in its version 1."""
    assert negotiate(accepts) == expected


def rendered(family: Family, form: Format) -> bytes:
    """What a scrape says of one metric."""
    return Exposition([family], CollectorRegistry()).whole(form)


def by_library(registry: CollectorRegistry, form: Format) -> bytes:
    """The same by the library."""
    if form == "text":
        return generate_latest(registry)
    return bytes(generate_openmetrics(registry))  # type: ignore[no-untyped-call]


@BOTH
@given(found=st.dictionaries(st.tuples(values, values), amounts, max_size=4))
def test_numbers_are_written_as_by_the_library(
    form: Format, found: dict[tuple[str, str], float]
) -> None:
    """Counters and gauges, kept here or elsewhere, are byte for byte what the library makes."""
    registry, counters = CollectorRegistry(), CollectorRegistry()
    gauge = Gauge("it", "It is.", ("a", "b"), registry=registry)
    counter = Counter("it", "It is.", ("a", "b"), registry=counters)
    own, counted = (
        Numbers("gauge", "it", "It is.", ("a", "b")),
        Numbers("counter", "it", "It is.", ("a", "b")),
    )
    for labels, amount in found.items():
        gauge.labels(*labels).set(amount)
        own[labels] = amount
        counter.labels(*labels).inc(max(0.0, amount))
        counted[labels] += max(0.0, amount)
    watched = Watched("gauge", "it", "It is.", ("a", "b"), read=found.items)
    assert rendered(own, form) == rendered(watched, form) == by_library(registry, form)
    assert rendered(counted, form) == by_library(counters, form)


@BOTH
@given(
    found=st.lists(
        st.tuples(st.tuples(values, values), st.floats(allow_nan=False, allow_infinity=False))
    )
)
def test_histograms_are_written_as_by_the_library(
    form: Format, found: list[tuple[tuple[str, str], float]]
) -> None:
    """Buckets, counts and sums are byte for byte what the library makes."""
    registry = CollectorRegistry()
    histogram = Histogram("it", "It is.", ("a", "z"), buckets=BOUNDS, registry=registry)
    own = Histograms("it", "It is.", ("a", "z"), buckets=BOUNDS)
    for labels, amount in found:
        histogram.labels(*labels).observe(amount)
        own[labels].observe(amount)
    assert rendered(own, form) == by_library(registry, form)


@pytest.mark.parametrize("amount", [*BOUNDS, 0.4, 1.5, math.inf])
def test_a_bound_belongs_to_its_bucket(amount: float) -> None:
    """A value is in the bucket whose upper bound it is, and so is its exemplar."""
    own = Histograms("it", "It is.", (), buckets=BOUNDS)
    own[()].observe(amount, "id", 1.0)
    (family,) = parsed(rendered(own, "openmetrics").decode())
    (place,) = [sample for sample in family.samples if sample.exemplar is not None]
    assert float(place.labels["le"]) == min(b for b in (*BOUNDS, math.inf) if amount <= b)


# The loop


def ticking(step: float) -> Callable[[], float]:
    """Make a clock by which each look takes so long, whatever the machine does."""
    ticks = itertools.count()
    return lambda: next(ticks) * step


def large(proxy: Proxy) -> int:
    """Let there be series of 200 keys; return how many."""
    requests = proxy.daemon._metrics._requests
    for key, route in itertools.product(range(200), range(10)):
        requests["responses", f"key-{key}", "completed", f"route-{route}"] += 1
    return len(requests)


@BOTH
async def test_a_large_scrape_lets_the_loop_turn(serve: Serve, form: Format) -> None:
    """Between slices the loop does something else; in a slice are only as many series as fit."""
    proxy = await serve()
    series = large(proxy)
    metrics = proxy.daemon._metrics
    metrics._exposition._clock = ticking(exposition.SLICE / 5)
    turns, over = 0, False

    async def turn() -> None:
        nonlocal turns
        while not over:
            turns += 1
            await asyncio.sleep(0)

    turning = asyncio.create_task(turn())
    parts = await metrics.scrape(form)
    over = True
    await turning
    counted = [part.count(b"\naiproxy_requests_total{") for part in parts]
    assert sum(counted) >= series - len(parts)
    assert max(counted) <= 5
    assert turns >= series / 5


async def test_scrapes_share_the_turns_of_the_loop(serve: Serve) -> None:
    """Of several scrapes one has a slice at each turn, so that many stop the loop no longer."""
    proxy = await serve()
    large(proxy)
    rendering = proxy.daemon._metrics._exposition
    rendering._clock = ticking(exposition.SLICE / 50)
    turns, over = 0, False
    slices: list[int] = []
    slice_of = rendering._slice

    def noted(pieces: Iterator[str]) -> bytes:
        slices.append(turns)
        return slice_of(pieces)

    async def turn() -> None:
        nonlocal turns
        while not over:
            turns += 1
            await asyncio.sleep(0)

    rendering._slice = noted  # type: ignore[method-assign] # to see when
    turning = asyncio.create_task(turn())
    bodies = await asyncio.gather(*(proxy.daemon._metrics.scrape("text") for _ in range(4)))
    over = True
    await turning
    assert len({b"".join(body).count(b"\naiproxy_requests_total") for body in bodies}) == 1
    assert len(slices) > 4 * 2000 / 51
    assert len(set(slices)) == len(slices)


async def test_a_scraper_that_leaves_leaves_nothing(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """One that goes in the middle stops neither the next one nor requests, and is no error."""
    proxy = await serve()
    series = large(proxy)
    proxy.daemon._metrics._exposition._clock = ticking(exposition.SLICE)
    for _ in range(3):
        client = await RawClient.connect(int(proxy.daemon.operators.port))
        await client.request("GET", "/metrics")
        await client.read_head()
        client.abort()
    assert (await proxy.post()).status == 200
    body = (await proxy.admin("/metrics")).body
    assert body.count(b"\naiproxy_requests_total{") >= series
    assert not [line for line in proxy.logs() if line["level"] == "error"]
    assert upstream.requests
