"""Spans of the real daemon at a real OTLP/HTTP receiver, and the trace context on its way."""

import asyncio
import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from aiproxy import spans
from aiproxy.config import ConfigError
from aiproxy.tracing import MOST_KEPT
from chat_upstream import chat_only
from collector import Collector, Told, collecting
from faults import Serve
from invariants import check_invariants, check_secrets, eventually
from rig import OUTPUT_CANARY, PROMPT_CANARY, TEAM_B, Proxy, config_text, load, prompt, totals
from upstream import (
    Chunk,
    Headers,
    Reset,
    ScriptedUpstream,
    Stall,
    Wait,
    error_answer,
    json_answer,
)

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
PATHS = ["/v1/responses", "/v1/chat/completions", "/v1/messages", "/v1/embeddings"]
SSE = (("content-type", "text/event-stream"), ("transfer-encoding", "chunked"))
PROPAGATING: dict[str, Any] = {"upstreams": {"scripted": {"propagate_trace": True}}}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Run a collector; batches go out at once."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    with collecting() as running:
        yield running


async def traced(serve: Serve, collector: Collector, content: bool = False, **more: Any) -> Proxy:  # noqa: FBT001, FBT002 - as in the file
    """Start a daemon with tracing."""
    return await serve(tracing={"otlp": collector.url, "content": content}, **more)


async def spans_of(collector: Collector, requests: int = 1) -> tuple[list[Told], list[Told]]:
    """Wait for the spans of so many requests; return theirs and those of their attempts."""

    async def came() -> None:
        assert len(collector.servers) == requests

    await eventually(came)
    return collector.servers, collector.clients


async def lines_of(proxy: Proxy, requests: int = 1) -> list[dict[str, Any]]:
    """Wait for the log's lines of so many requests, or more."""

    async def came() -> None:
        assert len(proxy.request_logs()) >= requests

    await eventually(came)
    return proxy.request_logs()


def ids(told: Told) -> tuple[str, str, str]:
    """Return trace, span and parent."""
    return told.span.trace_id.hex(), told.span.span_id.hex(), told.span.parent_span_id.hex()


@pytest.mark.parametrize("path", PATHS)
async def test_a_request_has_a_span_and_one_for_its_attempt(
    serve: Serve, collector: Collector, path: str
) -> None:
    """Server and client, parent and child, as OpenTelemetry and OpenInference name things."""
    proxy = await traced(serve, collector)
    asked = prompt(path, "renamed")
    answer = await proxy.post(path, asked, {"x-request-id": "mine-1"})
    (server,), (client,) = await spans_of(collector)
    trace_id, span_id, parent = ids(server)
    assert (parent, server.span.flags) == ("", 0x101)
    assert ids(client)[::2] == (trace_id, span_id)
    assert server.span.name == f"POST {path}"
    embeds = path == "/v1/embeddings"
    operation = "embeddings" if embeds else "chat"
    assert client.span.name == f"{operation} upstream-model"
    assert server.seconds >= client.seconds > 0
    (line,) = await lines_of(proxy)
    assert abs(server.seconds - line["duration_s"]) < 1e-3
    told = server.attributes
    kinds = {"openinference.span.kind": "EMBEDDING" if embeds else "LLM"}
    model = "embedding.model_name" if embeds else "llm.model_name"
    provider = "anthropic" if path == "/v1/messages" else "openai"
    expected = kinds | {
        model: "renamed",
        "llm.system": provider,
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": provider,
        "gen_ai.request.model": "renamed",
        "http.request.method": "POST",
        "http.route": path,
        "http.response.status_code": 200,
        "client.address": "127.0.0.1",
        "aiproxy.request_id": "mine-1",
        "aiproxy.key": "team-a",
        "aiproxy.route": "renamed",
        "aiproxy.upstream": "scripted",
        "aiproxy.outcome": "completed",
        "aiproxy.attempts": 1,
    }
    assert expected.items() <= told.items()
    assert client.attributes == {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": provider,
        "gen_ai.request.model": "upstream-model",
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "server.address": "127.0.0.1",
        "server.port": client.attributes["server.port"],
        "aiproxy.upstream": "scripted",
        "aiproxy.attempt": 1,
        "aiproxy.result": "ok",
        "openinference.span.kind": "CHAIN",
    }
    assert server.resource["service.name"] == "aiproxy"
    assert answer.status == 200


async def test_tokens_are_those_of_the_log(serve: Serve, collector: Collector) -> None:
    """Both vocabularies have the same counts, cached and reasoning tokens being parts of them."""
    proxy = await traced(serve, collector)
    await proxy.post()
    (server,), _ = await spans_of(collector)
    (line,) = await lines_of(proxy)
    given = line["input_tokens"] + line["input_cached_tokens"]
    made = line["output_tokens"] + line["output_reasoning_tokens"]
    assert line["input_cached_tokens"]
    assert line["output_reasoning_tokens"]
    expected = {
        "gen_ai.usage.input_tokens": given,
        "gen_ai.usage.output_tokens": made,
        "gen_ai.usage.cache_read.input_tokens": line["input_cached_tokens"],
        "gen_ai.usage.reasoning.output_tokens": line["output_reasoning_tokens"],
        "llm.token_count.prompt": given,
        "llm.token_count.completion": made,
        "llm.token_count.total": given + made,
        "llm.token_count.prompt_details.cache_read": line["input_cached_tokens"],
        "llm.token_count.completion_details.reasoning": line["output_reasoning_tokens"],
    }
    found = {key: value for key, value in server.attributes.items() if "token" in key}
    assert found == expected


async def test_the_first_token_is_an_event(serve: Serve, collector: Collector) -> None:
    """A stream's span has it where the log has it; a JSON answer has none."""
    proxy = await traced(serve, collector)
    await proxy.post(body=prompt(stream=True))
    await proxy.post()
    (streamed, whole), _ = await spans_of(collector, 2)
    (event,) = streamed.span.events
    assert event.name == "First Token Stream Event"
    lines = await lines_of(proxy, 2)
    after = (event.time_unix_nano - streamed.span.start_time_unix_nano) / 1e9
    assert abs(after - lines[0]["first_token_s"]) < 1e-3
    assert list(whole.span.events) == []


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("path", PATHS[:3])
async def test_contents_are_told_only_where_they_are_asked_for(  # noqa: PLR0917 - a table
    serve: Serve,
    upstream: ScriptedUpstream,
    collector: Collector,
    path: str,
    streamed: bool,  # noqa: FBT001 - a table's column
    content: bool,  # noqa: FBT001 - the same
) -> None:
    """Prompt and output are in the spans with `content: true` alone, and in no log ever."""
    upstream.text = f"Hello {OUTPUT_CANARY}"
    proxy = await traced(serve, collector, content)
    await proxy.post(path, prompt(path, stream=streamed))
    (server,), (client,) = await spans_of(collector)
    told = str(server.attributes)
    assert (PROMPT_CANARY in told, OUTPUT_CANARY in told) == (content, content)
    assert PROMPT_CANARY not in str(client.attributes)
    assert server.attributes["llm.input_messages.0.message.role"] == "user"
    assert server.attributes["llm.output_messages.0.message.role"] == "assistant"
    if content:
        assert server.attributes["output.value"] == upstream.text
    await check_secrets(proxy)


async def test_a_bridged_answer_is_told_as_its_client_got_it(
    serve: Serve, upstream: ScriptedUpstream, collector: Collector
) -> None:
    """Of a Responses client on a chat upstream: its messages, and the API that was spoken."""
    upstream.text = "Hello there"
    proxy = await traced(serve, collector, content=True, upstreams=chat_only())
    await proxy.post(body=prompt(stream=True))
    (server,), (client,) = await spans_of(collector)
    assert "Hello there" in server.attributes.values()
    assert client.attributes["http.response.status_code"] == 200
    assert client.attributes["gen_ai.provider.name"] == "openai"


async def test_what_a_client_got_before_it_left_is_told(
    serve: Serve, upstream: ScriptedUpstream, collector: Collector
) -> None:
    """A stream that its client leaves has a span with what came, and an attempt that was left."""
    frame = b'data: {"type":"response.output_text.delta","output_index":0,"content_index":0,'
    upstream.script(
        Headers(200, SSE), Chunk(frame + b'"delta":"' + OUTPUT_CANARY.encode() + b'"}\n\n'), Stall()
    )
    proxy = await traced(serve, collector, content=True)
    client = await proxy.send(body=prompt(stream=True))
    await client.read_head()
    await client.read_until(OUTPUT_CANARY.encode())
    await client.close()
    (server,), (attempt,) = await spans_of(collector)
    assert server.attributes["aiproxy.outcome"] == "client_disconnected"
    assert server.attributes["http.response.status_code"] == 499
    assert OUTPUT_CANARY in server.attributes.values()
    assert attempt.attributes["aiproxy.result"] == "ok", "as the metric has it: its head was good"
    assert attempt.span.status.code == server.span.status.code == Status.STATUS_CODE_UNSET


async def test_an_attempt_that_nobody_waits_for_was_left(
    serve: Serve, upstream: ScriptedUpstream, collector: Collector
) -> None:
    """A client that leaves before the upstream has answered is no failure of that."""
    upstream.script(Stall())
    proxy = await traced(serve, collector)
    client = await proxy.send()
    await upstream.wait_request()
    await client.close()
    _, (attempt,) = await spans_of(collector)
    assert attempt.attributes["aiproxy.result"] == "left"
    assert "http.response.status_code" not in attempt.attributes
    assert attempt.span.status.code == Status.STATUS_CODE_UNSET


async def test_each_attempt_has_a_span(
    serve: Serve, upstream: ScriptedUpstream, collector: Collector
) -> None:
    """What was tried, in order, with how it ended; the request itself is fine."""
    upstream.script(*error_answer(503))
    upstream.script(*error_answer(429))
    proxy = await traced(serve, collector, retries=2)
    assert (await proxy.post()).status == 200
    (server,), attempts = await spans_of(collector)
    assert server.attributes["aiproxy.attempts"] == 3
    assert server.span.status.code == Status.STATUS_CODE_UNSET
    found = [
        (
            told.attributes["aiproxy.attempt"],
            told.attributes["aiproxy.result"],
            told.span.status.code,
        )
        for told in attempts
    ]
    failed = Status.STATUS_CODE_ERROR
    assert found == [
        (1, "status_5xx", failed),
        (2, "status_429", failed),
        (3, "ok", Status.STATUS_CODE_UNSET),
    ]
    assert [told.attributes.get("error.type") for told in attempts] == [
        "status_5xx",
        "status_429",
        None,
    ]
    assert {ids(told)[2] for told in attempts} == {ids(server)[1]}
    assert len({ids(told)[1] for told in attempts}) == 3
    assert all(
        a.span.end_time_unix_nano <= b.span.start_time_unix_nano
        for a, b in itertools.pairwise(attempts)
    )


async def test_a_usage_that_is_estimated_says_why(
    serve: Serve, upstream: ScriptedUpstream, collector: Collector
) -> None:
    """As the metric has it; a counted one says nothing."""
    upstream.script(*json_answer({"status": "completed", "output": []}))
    proxy = await traced(serve, collector)
    await proxy.post()
    await proxy.post()
    (estimated, counted), _ = await spans_of(collector, 2)
    assert estimated.attributes["aiproxy.usage.estimated"] == "missing"
    assert "aiproxy.usage.estimated" not in counted.attributes


async def test_turns_that_were_replayed_are_told(serve: Serve, collector: Collector) -> None:
    """Of a turn that goes on how many went before, of a first one nothing."""
    holder: dict[str, Any] = {"upstreams": {"scripted": {"sessions": "replay"}}}
    proxy = await traced(serve, collector, **holder)
    first = (await proxy.post()).json()["id"]
    second = (await proxy.post(body=prompt(previous_response_id=first))).json()["id"]
    await proxy.post(body=prompt(previous_response_id=second))
    servers, _ = await spans_of(collector, 3)
    told = [server.attributes.get("aiproxy.replayed_turns") for server in servers]
    assert told == [None, 1, 2]


async def test_what_spans_have_in_common_is_not_remembered_for_ever(
    serve: Serve, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models are the callers': what is remembered of them has a bound, and each is told right."""
    monkeypatch.setattr(spans, "_MOST_KNOWN", 4)
    proxy = await traced(serve, collector)
    models = [f"org/{number}" for number in range(10)]
    for model in models:
        await proxy.post(body=prompt(model=model))
    servers, clients = await spans_of(collector, 10)
    for found in (servers, clients):
        assert [told.attributes["gen_ai.request.model"] for told in found] == models
    pipeline: Any = proxy.daemon._tracing._pipeline
    assert len(pipeline._exporter._encode._known) <= 4


async def test_failures_are_errors_of_spans(
    serve: Serve, upstream: ScriptedUpstream, collector: Collector
) -> None:
    """A failure of ours or an upstream's is an error with its code; a client's own is none."""
    proxy = await traced(serve, collector)
    upstream.script(Reset())
    await proxy.post()
    await proxy.post(key=None)
    await proxy.post(body=b"{")
    servers, attempts = await spans_of(collector, 3)
    codes = [told.span.status.code for told in servers]
    assert codes == [Status.STATUS_CODE_ERROR, *[Status.STATUS_CODE_UNSET] * 2]
    assert [told.attributes["error.type"] for told in servers] == [
        line["error_code"] for line in await lines_of(proxy, 3)
    ]
    assert [told.attributes["aiproxy.result"] for told in attempts] == ["reset"]


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        ("GET", "/v1/models", "GET /v1/models"),
        ("GET", "/v1/models/gpt-test", "GET /v1/models"),
        ("GET", "/v1/responses/resp_unknown", "GET /v1/responses/{id}"),
        ("GET", "/v1/secret-path", "GET"),
        ("SECRETMETHOD", "/v1/secret-path", "_OTHER"),
    ],
)
async def test_names_of_spans_are_few(
    serve: Serve, collector: Collector, method: str, path: str, name: str
) -> None:
    """A name never holds what a caller made; calls without a model are no LLM's."""
    proxy = await traced(serve, collector)
    client = await proxy.client()
    await client.request(method, path, proxy.headers())
    await client.answer()
    (server,), attempts = await spans_of(collector)
    assert server.span.name == name
    assert attempts == []
    assert not [
        key for key in server.attributes if key.startswith(("openinference", "gen_ai", "llm"))
    ]


# -- the trace context


@pytest.mark.parametrize("flag", ["00", "01"])
async def test_a_trace_is_continued(
    serve: Serve, upstream: ScriptedUpstream, collector: Collector, flag: str
) -> None:
    """The client's trace id, its span as parent, its state; the upstream is told of the attempt."""
    proxy = await traced(serve, collector, **PROPAGATING)
    parent = f"00-{TRACE_ID}-{SPAN_ID}-{flag}"
    await proxy.post(
        headers=[("traceparent", parent), ("tracestate", "a=1"), ("tracestate", "b=2")]
    )
    (recorded,) = upstream.requests
    _, trace_id, span_id, flags = (recorded.header("traceparent") or "").split("-")
    assert (trace_id, flags) == (TRACE_ID, flag)
    assert span_id != SPAN_ID
    assert recorded.header("tracestate") == "a=1,b=2"
    assert len([name for name, _ in recorded.headers if name.lower() == "traceparent"]) == 1
    if flag == "00":  # the parent is not sampled, hence neither are we: only the next one is
        await proxy.post(key=TEAM_B)
        (server,), _ = await spans_of(collector)
        assert server.attributes["aiproxy.key"] == "team-b"
        return
    (server,), (client,) = await spans_of(collector)
    assert ids(server)[::2] == (TRACE_ID, SPAN_ID)
    assert (server.span.flags, server.span.trace_state) == (0x301, "a=1,b=2")
    assert ids(client) == (TRACE_ID, span_id, ids(server)[1])
    assert client.span.flags == 0x101


async def test_each_attempt_is_told_its_own_id(
    serve: Serve, upstream: ScriptedUpstream, collector: Collector
) -> None:
    """Two attempts are two parents upstream."""
    upstream.script(*error_answer(503))
    proxy = await traced(serve, collector, retries=1, **PROPAGATING)
    await proxy.post()
    _, attempts = await spans_of(collector)
    told = [(recorded.header("traceparent") or "").split("-")[2] for recorded in upstream.requests]
    assert told == [ids(attempt)[1] for attempt in attempts]


@pytest.mark.parametrize("tracing_on", [False, True])
@pytest.mark.parametrize("propagate", [False, True])
async def test_an_upstream_is_told_only_where_it_is_to_be(
    serve: Serve,
    upstream: ScriptedUpstream,
    collector: Collector,
    propagate: bool,  # noqa: FBT001 - a table's column
    tracing_on: bool,  # noqa: FBT001 - the same
) -> None:
    """By default nothing crosses; with `propagate_trace` ours, without tracing the client's own."""
    changes: dict[str, Any] = {"upstreams": {"scripted": {"propagate_trace": propagate}}}
    if tracing_on:
        changes["tracing"] = {"otlp": collector.url}
    proxy = await serve(**changes)
    await proxy.post(headers={"traceparent": PARENT, "tracestate": "a=1"})
    (recorded,) = upstream.requests
    told, state = recorded.header("traceparent"), recorded.header("tracestate")
    if not propagate:
        assert (told, state) == (None, None)
    elif tracing_on:
        assert told is not None
        assert told != PARENT
        assert told.startswith(f"00-{TRACE_ID}-")
        assert state == "a=1"
    else:
        assert (told, state) == (PARENT, "a=1")


async def test_a_bad_context_begins_a_trace(
    serve: Serve, upstream: ScriptedUpstream, collector: Collector
) -> None:
    """What is malformed is no parent, and its state goes nowhere."""
    proxy = await traced(serve, collector, **PROPAGATING)
    await proxy.post(headers={"traceparent": f"{PARENT}-x", "tracestate": "a=1"})
    (server,), _ = await spans_of(collector)
    trace_id, _, parent = ids(server)
    assert (parent, server.span.trace_state) == ("", "")
    assert trace_id != TRACE_ID
    assert upstream.requests[0].header("tracestate") is None


async def test_the_sampler_is_the_environments(
    serve: Serve, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OTEL_TRACES_SAMPLER decides, over the parent's flag too where it says so."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
    proxy = await traced(serve, collector)
    await proxy.post(headers={"traceparent": PARENT[:-1] + "0"})
    (server,), _ = await spans_of(collector)
    assert ids(server)[0] == TRACE_ID


# -- never in the way


async def test_a_collector_that_is_away_costs_nobody_anything(
    serve: Serve, upstream: ScriptedUpstream, collector: Collector
) -> None:
    """Requests end as always while it is silent, and their spans are there once it is not."""
    collector.open.clear()
    proxy = await traced(serve, collector, content=True)
    for _ in range(20):
        assert (await proxy.post()).status == 200
    await check_invariants(proxy, upstream)
    collector.open.set()
    await spans_of(collector, len(await lines_of(proxy, 20)))


async def test_spans_are_counted(serve: Serve, collector: Collector) -> None:
    """What was exported and what was not is a metric, which is there with tracing alone."""
    proxy = await traced(serve, collector)
    collector.statuses = [400]
    for results in ({"failed": 2}, {"failed": 2, "exported": 2}):
        await proxy.post()

        async def counted(results: dict[str, int] = results) -> None:
            metrics = await proxy.metrics()
            assert totals(metrics, "aiproxy_trace_spans_total", "result") == results

        await eventually(counted)
    plain = await serve()
    assert not [name for name, _ in await plain.metrics() if name == "aiproxy_trace_spans_total"]


async def test_a_reload_moves_the_spans(
    serve: Serve, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracing can be begun, moved and ended by a reload; what waited goes where it was to go."""
    proxy = await serve()
    await proxy.post()
    text = proxy.text
    with collecting() as other:
        for url in (collector.url, other.url, None):
            proxy.text = text + (f'"tracing": {{"otlp": "{url}"}}\n' if url else "")
            assert (await proxy.admin("/-/reload", "POST")).status == 200
            await proxy.post()
        await spans_of(collector, 1)
        await spans_of(other, 1)


async def test_a_reload_that_changes_nothing_of_it_leaves_tracing_alone(
    serve: Serve, collector: Collector
) -> None:
    """The queue and the connection to the collector go on."""
    proxy = await traced(serve, collector)
    before = proxy.daemon._tracing._pipeline
    assert (await proxy.admin("/-/reload", "POST")).status == 200
    assert proxy.daemon._tracing._pipeline is before


async def test_what_is_kept_is_free_again_when_tracing_ends_meanwhile(
    serve: Serve, upstream: ScriptedUpstream, collector: Collector
) -> None:
    """A request that began with a trace and ended without leaves nothing behind."""
    gate = asyncio.Event()
    upstream.script(Wait(gate), *json_answer({"output": [], "status": "completed"}))
    proxy = await serve()
    text = proxy.text
    proxy.text += f'"tracing": {{"otlp": "{collector.url}", "content": true}}\n'
    await proxy.admin("/-/reload", "POST")
    client = await proxy.send()
    await upstream.wait_request()
    budget = proxy.daemon._tracing._budget
    assert not budget.take(MOST_KEPT)
    proxy.text = text
    await proxy.admin("/-/reload", "POST")
    gate.set()
    await client.answer()
    await lines_of(proxy)
    assert budget.take(MOST_KEPT)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_BSP_SCHEDULE_DELAY", "0"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
    ],
)
async def test_a_variable_that_is_wrong_changes_nothing(
    serve: Serve, collector: Collector, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """A reload that would begin tracing with it is refused as a whole, before anything is done."""
    proxy = await serve()
    proxy.environ[name] = value
    proxy.text += f'"tracing": {{"otlp": "{collector.url}"}}\n"max_body": "1MiB"\n'
    answer = await proxy.admin("/-/reload", "POST")
    assert answer.status == 400
    assert name in answer.json()["error"]["message"]
    assert proxy.daemon._proxy.snapshot.config.max_body == 32 * 2**20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "abc"),
        ("OTEL_PYTHON_METER_PROVIDER", "nonsense"),
        ("OTEL_RESOURCE_ATTRIBUTES", "a=\udcff,b=1"),
        ("OTEL_TRACES_SAMPLER", "nonsense"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
    ],
)
async def test_variables_that_are_not_read_do_no_harm(
    serve: Serve, collector: Collector, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """What OpenTelemetry would stumble over is not read, or told as far as it goes."""
    monkeypatch.setenv(name, value)
    proxy = await traced(serve, collector)
    await proxy.post()
    await spans_of(collector)


async def test_the_environment_says_who_exports(
    serve: Serve, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over what aiproxy says of itself."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "gateway")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=prod")
    proxy = await traced(serve, collector)
    await proxy.post()
    (server,), _ = await spans_of(collector)
    assert server.resource["service.name"] == "gateway"
    assert server.resource["deployment.environment.name"] == "prod"
    assert server.resource["service.version"]


async def test_what_waits_is_sent_at_the_end(
    serve: Serve, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that ends sends the spans that wait, however long the next batch would take."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    proxy = await traced(serve, collector)
    await proxy.post()
    assert collector.spans == []
    await proxy.stop()
    assert len(collector.servers) == 1


async def test_a_collector_does_not_hold_up_the_end(
    serve: Serve, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silent one is waited for as long as it says, no longer; that is in the log."""
    monkeypatch.setattr("aiproxy.daemon.LAST_SPANS", 0.05)
    collector.open.clear()
    proxy = await traced(serve, collector)
    await proxy.post()
    await proxy.stop()
    assert [line["event"] for line in proxy.logs()][-2:] == ["spans lost", "stopped"]


def test_the_extra_is_asked_for_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what tracing needs the file is refused, with the line and the command that helps."""
    monkeypatch.setattr("aiproxy.config.collector._NEEDED", ("opentelemetry.no.such.thing",))
    text = config_text("http://127.0.0.1:9", tracing={"otlp": "http://127.0.0.1:4318/v1/traces"})
    with pytest.raises(ConfigError, match=r"needs the extra otel: .*pip install 'aiproxy\[otel\]'"):
        load(text)


def test_variables_of_the_environment_are_checked() -> None:
    """A variable that is wrong is a mistake of the configuration, and never shown."""
    text = config_text("http://127.0.0.1:9", tracing={"otlp": "http://127.0.0.1:4318/v1/traces"})
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_HEADERS must be") as raised:
        load(text, {"OTEL_EXPORTER_OTLP_HEADERS": "hunter2"})
    assert "hunter2" not in str(raised.value)


def test_without_tracing_nothing_of_it_is_imported() -> None:
    """Who does not trace pays nothing at the start, and need not have the extra."""
    code = (
        "import sys, aiproxy.daemon, aiproxy.__main__; "
        "print([m for m in sys.modules if m.startswith(('opentelemetry', 'openinf', 'requests'))])"
    )
    done = subprocess.run(  # noqa: S603 - this Python
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
