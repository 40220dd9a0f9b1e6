"""The metrics are as the contract lists them, and no caller can add to them."""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import aiohttp
import pytest
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

import aiproxy
from aiproxy import pulse
from answers import chat_events, sse
from invariants import eventually
from responses import responses_events
from rig import TEAM_B, Proxy, prompt, totals
from upstream import Finish, Reset, ScriptedUpstream, Stall, error_answer, json_answer, stream

Serve = Callable[..., Awaitable[Proxy]]
RESPONSES, CHAT = "/v1/responses", "/v1/chat/completions"

# Contract, section 9: type and labels.
TABLE: dict[str, tuple[str, set[str]]] = {
    "aiproxy_requests": ("counter", {"endpoint", "route", "key", "outcome"}),
    "aiproxy_requests_in_flight": ("gauge", {"endpoint"}),
    "aiproxy_request_duration_seconds": ("histogram", {"endpoint", "route", "upstream"}),
    "aiproxy_time_to_first_token_seconds": ("histogram", {"route", "upstream"}),
    "aiproxy_time_per_output_token_seconds": ("histogram", {"route", "upstream"}),
    "aiproxy_overhead_seconds": ("histogram", {"endpoint"}),
    "aiproxy_tokens": ("counter", {"route", "key", "type"}),
    "aiproxy_usage_estimated": ("counter", {"route", "reason"}),
    "aiproxy_limit_rejections": ("counter", {"key", "limit"}),
    "aiproxy_limit_remaining": ("gauge", {"key", "limit"}),
    "aiproxy_limiter_degraded": ("gauge", set()),
    "aiproxy_upstream_attempts": ("counter", {"upstream", "result"}),
    "aiproxy_upstream_available": ("gauge", {"upstream"}),
    "aiproxy_client_disconnects": ("counter", {"endpoint", "phase"}),
    "aiproxy_sessions_loads": ("counter", {"result"}),
    "aiproxy_sessions_stored_bytes": ("gauge", set()),
    "aiproxy_sessions_stored_turns": ("gauge", set()),
    "aiproxy_sessions_evictions": ("counter", {"reason"}),
    "aiproxy_sessions_reasoning_left_out": ("counter", {"upstream"}),
    "aiproxy_trace_spans": ("counter", {"result"}),
    "aiproxy_store_duration_seconds": ("histogram", {"store", "operation"}),
    "aiproxy_store_errors": ("counter", {"store", "operation"}),
    "aiproxy_event_loop_lag_seconds": ("histogram", set()),
    "aiproxy_log_dropped": ("counter", set()),
    "aiproxy_config_last_reload_successful": ("gauge", set()),
    "aiproxy_config_last_reload_success_timestamp_seconds": ("gauge", set()),
    "aiproxy_build_info": ("gauge", {"version", "python", "aiohttp"}),
}
NOT_SEEN = (
    "aiproxy_store_errors",
    "aiproxy_sessions_reasoning",
    "aiproxy_trace",
)  # nothing fails here
BUCKETS = {
    "aiproxy_request_duration_seconds": [0.08 * 2**n for n in range(14)],
    "aiproxy_time_to_first_token_seconds": [
        0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 60, 120,
    ],
    "aiproxy_time_per_output_token_seconds": [
        0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5,
    ],
    "aiproxy_overhead_seconds": [
        0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25,
    ],
}  # fmt: skip

# What labels may say: names of the configuration, and closed lists.
VALUES = {
    "endpoint": {"responses", "chat", "embeddings", "messages", "response", "models", "none"},
    "route": {"gpt-test", "renamed", "org/*", "none"},
    "key": {"team-a", "team-b", "none"},
    "upstream": {"scripted", "none", ""},
    "type": {"input", "input_cached", "output", "output_reasoning"},
    "result": {
        "ok", "connect", "timeout", "reset", "protocol", "status_4xx", "status_429", "status_5xx",
        "hit", "missing", "foreign", "expired",
    },
    "store": {"levels", "memory"},
    "operation": {
        "load", "save", "find", "path", "content", "items", "put", "delete", "check", "tend",
    },
    "limit": {"requests", "tokens", "concurrent"},
    "phase": {"waiting", "streaming"},
    "reason": {"missing", "bad", "cut", "disconnected", "ttl", "size", "deleted"},
    "outcome": {
        "completed", "incomplete", "failed", "upstream_rejected", "upstream_error",
        "upstream_timeout", "client_disconnected", "rejected_auth", "rejected_invalid",
        "rejected_limit", "rejected_overload", "store_error", "drained", "internal_error",
    },
}  # fmt: skip


async def families(proxy: Proxy) -> dict[str, Metric]:
    """Every metric of a scrape."""
    text = (await proxy.admin("/metrics")).body.decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


async def ended(proxy: Proxy, n: int) -> None:
    """Wait until `n` requests ended."""

    async def holds() -> None:
        assert len(proxy.request_logs()) >= n

    await eventually(holds)


async def use_all(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Requests after which every metric of this version has a sample."""
    for path in (RESPONSES, CHAT, "/v1/messages"):
        await proxy.post(path, prompt(path, stream=True))
    await proxy.post("/v1/embeddings")
    upstream.script(stream(chat_events()))
    await proxy.post(CHAT, prompt(CHAT, stream=True))
    upstream.script(Stall())
    client = await proxy.send(RESPONSES)
    await upstream.wait_request(6)
    await client.close()
    await ended(proxy, 6)
    await proxy.get(f"{RESPONSES}/resp_unknown")
    await ended(proxy, 7)


ONE_A_DAY = {"requests": "1/day"}


async def test_names_types_and_labels(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Each metric of the table is there with its type and labels, and no other is."""
    limits = {"requests": "100/min", "tokens": "100000/min", "concurrent": 9}
    proxy = await serve(keys={"team-a": {"limits": limits}, "team-b": {"limits": ONE_A_DAY}})
    await use_all(proxy, upstream)
    assert [(await proxy.post(key=TEAM_B)).status for _ in range(2)] == [200, 429]
    proxy.daemon._metrics.store_failed("levels", "save")  # really failing: test_limits_kept.py
    found = await families(proxy)
    own = {name: family for name, family in found.items() if not name.startswith("process_")}
    assert own.keys() <= TABLE.keys()
    assert {name for name in TABLE if not name.startswith(NOT_SEEN)} <= own.keys()
    for name, family in own.items():
        kind, labels = TABLE[name]
        assert (family.type, bool(family.documentation)) == (kind, True), name
        assert family.samples or name.startswith(NOT_SEEN), name
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == labels, sample
    assert "process_resident_memory_bytes" in found
    assert not any(sample.name.endswith("_created") for f in found.values() for sample in f.samples)


async def test_buckets(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The bounds of the histograms are the contract's."""
    proxy = await serve()
    await use_all(proxy, upstream)
    found = await families(proxy)
    for name, bounds in BUCKETS.items():
        samples = [s for s in found[name].samples if s.name.endswith("_bucket")]
        assert sorted({float(s.labels["le"]) for s in samples}) == pytest.approx(
            [*bounds, float("inf")]
        )


async def test_the_facts_of_a_process(serve: Serve) -> None:
    """Build, upstreams and the configuration's state are there before any request."""
    proxy = await serve()
    found = await families(proxy)
    (build,) = found["aiproxy_build_info"].samples
    assert build.value == 1
    assert build.labels["version"] == aiproxy.__version__
    assert build.labels["aiohttp"] == aiohttp.__version__
    assert found["aiproxy_config_last_reload_successful"].samples[0].value == 1
    assert found["aiproxy_config_last_reload_success_timestamp_seconds"].samples[0].value > 1e9
    (available,) = found["aiproxy_upstream_available"].samples
    assert (available.labels, available.value) == ({"upstream": "scripted"}, 1)
    assert found["aiproxy_log_dropped"].samples[0].value == 0


async def test_content_type(serve: Serve) -> None:
    """The scrape names the text format of Prometheus, and is not served to clients."""
    proxy = await serve()
    answer = await proxy.admin("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert (await proxy.get("/metrics")).status == 404


OUTCOMES: list[Any] = [
    (RESPONSES, None, {}, "completed"),
    (RESPONSES, None, {"stream": True}, "completed"),
    (RESPONSES, stream(responses_events(terminal="incomplete")), {"stream": True}, "incomplete"),
    (RESPONSES, stream(responses_events(terminal="failed")), {"stream": True}, "failed"),
    (RESPONSES, error_answer(400), {}, "upstream_rejected"),
    (RESPONSES, error_answer(429), {}, "upstream_rejected"),
    (RESPONSES, error_answer(500), {}, "upstream_error"),
    (RESPONSES, error_answer(401), {}, "upstream_error"),
    (RESPONSES, [Finish()], {}, "upstream_error"),
    (RESPONSES, [Stall()], {}, "upstream_timeout"),
    (RESPONSES, None, {"stream": 1}, "rejected_invalid"),
    (RESPONSES, None, {"model": "unknown"}, "rejected_invalid"),
    (CHAT, stream([sse({"error": {"message": "x"}})]), {"stream": True}, "failed"),
]


@pytest.mark.parametrize(("path", "script", "fields", "outcome"), OUTCOMES)
async def test_outcomes(  # noqa: PLR0917 - fixtures, and the columns of a table
    serve: Serve,
    upstream: ScriptedUpstream,
    path: str,
    script: Any,
    fields: dict[str, Any],
    outcome: str,
) -> None:
    """Each way to end counts once, under its own name, and nothing stays in flight."""
    proxy = await serve(timeouts={"first_byte": "100ms"})
    if script is not None:
        upstream.script(script)
    await proxy.post(path, prompt(path, **fields))
    await ended(proxy, 1)
    metrics = await proxy.metrics()
    assert totals(metrics, "aiproxy_requests_total", "outcome") == {outcome: 1}
    assert totals(metrics, "aiproxy_requests_in_flight", "endpoint") == {}
    route = "none" if fields.get("model") or fields.get("stream") == 1 else "gpt-test"
    if fields.get("stream") is True:
        route = "gpt-test"
    assert totals(metrics, "aiproxy_requests_total", "route") == {route: 1}
    assert totals(metrics, "aiproxy_requests_total", "key") == {"team-a": 1}
    assert totals(metrics, "aiproxy_request_duration_seconds_count", "route") == {route: 1}


@pytest.mark.parametrize(
    ("script", "result"),
    [
        (json_answer(b'{"output": []}'), "ok"),
        (error_answer(400), "status_4xx"),
        (error_answer(401), "status_4xx"),
        (error_answer(429), "status_429"),
        (error_answer(503), "status_5xx"),
        ([Finish()], "reset"),
        ([Reset()], "reset"),
        ([Stall()], "timeout"),
        (json_answer(b"<html>"), "protocol"),
    ],
)
async def test_attempts(serve: Serve, upstream: ScriptedUpstream, script: Any, result: str) -> None:
    """Each attempt counts once, by what became of it."""
    proxy = await serve(timeouts={"first_byte": "100ms"})
    upstream.script(script)
    await proxy.post(RESPONSES)
    await ended(proxy, 1)
    counted = totals(await proxy.metrics(), "aiproxy_upstream_attempts_total", "result")
    assert counted == {result: 1}


async def test_in_flight_until_the_last_byte(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A stream is in flight while it is open (traps, 23), and its client's going is counted."""
    proxy = await serve()
    events = responses_events()
    upstream.script([*stream(events)[:-3], Stall()])
    client = await proxy.send(RESPONSES, prompt(stream=True))
    await client.read_head()
    await client.read_until(events[2])
    flying = totals(await proxy.metrics(), "aiproxy_requests_in_flight", "endpoint")
    assert flying == {"responses": 1}
    await client.close()
    await ended(proxy, 1)
    metrics = await proxy.metrics()
    assert totals(metrics, "aiproxy_requests_in_flight", "endpoint") == {}
    assert totals(metrics, "aiproxy_client_disconnects_total", "phase") == {"streaming": 1}
    assert totals(metrics, "aiproxy_requests_total", "outcome") == {"client_disconnected": 1}


async def test_unknown_callers_count_under_none(serve: Serve) -> None:
    """An unknown model is route "none"; no key or an unknown one is key "none"."""
    proxy = await serve()
    await proxy.post(RESPONSES, prompt(model="who"))
    await proxy.post(RESPONSES, key=None)
    await proxy.post(RESPONSES, key="sk-aip-unknown")
    await proxy.get("/nowhere")
    metrics = await proxy.metrics()
    assert totals(metrics, "aiproxy_requests_total", "route") == {"none": 4}
    assert totals(metrics, "aiproxy_requests_total", "key") == {"team-a": 1, "none": 3}
    assert totals(metrics, "aiproxy_requests_total", "endpoint") == {"responses": 3, "none": 1}


def hostile(n: int) -> tuple[str, str, dict[str, Any], list[tuple[str, str]], bool]:
    """The n-th of many requests that differ in everything a caller can choose."""
    paths = [RESPONSES, f"/v1/x{n}", f"/v1/responses/resp_{n}", f"/v1/models/m{n}", f"/{n}?q={n}"]
    body = {"model": f'm{n}"\n{{x="y"}}', "input": "x", "user": f"u{n}", "service_tier": f"s{n}"}
    if n % 2:
        body["model"] = f"org/{n}"
    fields = [
        ("user-agent", f"agent-{n}"),
        ("x-request-id", f"id-{n}"),
        ("x-stainless-lang", f"lang-{n}"),
        ("x-forwarded-for", f"10.0.{n % 256}.1"),
        ("openai-organization", f"org-{n}"),
    ]
    return ("POST", "GET", "PROPFIND", "DELETE")[n % 4], paths[n % 5], body, fields, n % 7 != 0


async def test_callers_add_no_series(serve: Serve) -> None:
    """Three hundred hostile requests add no series, and no label says what they said (54)."""
    proxy = await serve()
    seen: list[set[Any]] = []
    client = await proxy.client()
    for n in range(600):
        method, path, body, fields, with_key = hostile(n)
        key = proxy.key if with_key else f"sk-aip-{n}"
        await client.request(method, path, proxy.headers(fields, key), json.dumps(body).encode())
        answer = await client.answer()
        assert answer.status < 500
        if answer.headers.get("connection") == "close":
            await client.close()
            client = await proxy.client()
        if n in (299, 599):
            await ended(proxy, n + 1)
            seen.append(set(await proxy.metrics()))
    assert seen[0] == seen[1]
    for name, labels in seen[1]:
        if name.startswith("aiproxy_") and name != "aiproxy_build_info":
            for label, value in labels:
                assert label == "le" or value in VALUES[label], (name, label, value)


class SlowCollector(Collector):
    """A metric that is read only once the event loop says so."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.begun = asyncio.Event()
        self.go_on = threading.Event()
        self.let_on = False

    def describe(self) -> Iterable[Metric]:
        """Say nothing, so that registering does not read."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Wait for the loop."""
        self.loop.call_soon_threadsafe(self.begun.set)
        self.let_on = self.go_on.wait(2)
        yield CounterMetricFamily("slow", "Slow.", value=1)


async def test_a_scrape_does_not_stop_the_loop(serve: Serve) -> None:
    """While what may block is read the daemon answers others: that is done in a thread."""
    proxy = await serve()
    slow = SlowCollector(asyncio.get_running_loop())
    proxy.daemon._metrics.registry.register(slow)
    scrape = asyncio.create_task(proxy.admin("/metrics"))
    await asyncio.wait_for(slow.begun.wait(), 5)
    assert (await proxy.post(RESPONSES)).status == 200
    assert not scrape.done()
    slow.go_on.set()
    assert b"slow_total 1.0" in (await scrape).body
    assert slow.let_on


async def test_a_blocked_loop_shows(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the event loop does something for 150 ms a timer that is due waits at least 100 ms."""
    monkeypatch.setattr(pulse, "LAG_PERIOD", 0.05)
    proxy = await serve()
    block(0.15)

    async def holds() -> None:
        lag = (await families(proxy))["aiproxy_event_loop_lag_seconds"].samples
        late = {sample.labels["le"]: sample.value for sample in lag if sample.labels}
        assert late["+Inf"] > late["0.05"]

    await eventually(holds)


def block(seconds: float) -> None:
    """Let nothing else happen in this thread."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        pass
