"""What is tried again after a failure, and what never is: targets, attempts, breakers."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from client import parse_sse
from invariants import check_invariants, eventually
from responses import message_item, responses_events, responses_json
from rig import prompt, totals
from sessions_rig import Serve
from steps import Chunk, EndChunks, Headers, Reset, Stall, Step, error_answer, json_answer, stream
from upstream import ScriptedUpstream

SSE = Headers(200, [("content-type", "text/event-stream")])
EVENTS = responses_events(items=[message_item("Hello")])
SAID = "Hello"


@pytest.fixture
async def second() -> AsyncIterator[ScriptedUpstream]:
    """Run another upstream."""
    async with ScriptedUpstream() as other:
        yield other


def two(upstream: ScriptedUpstream, second: ScriptedUpstream, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a route with two targets, the second one a tier higher."""
    common = {"apis": ["responses", "chat"], "sessions": "replay"}
    route = {
        "model": "gpt-test",
        "upstreams": [{"name": "scripted"}, {"name": "second", "tier": 2}],
        **changes.pop("route", {}),
    }
    return {
        "upstreams": {"scripted": {"sessions": "replay"}, "second": {"url": second.url, **common}},
        "routes": [route],
        "retries": 2,
        **changes,
    }


def failed_at_once() -> list[Step]:
    """Begin a stream, and say that it has failed, before any output."""
    facts = [json.loads(data) for _, data in parse_sse(b"".join(EVENTS[:2]))]
    error = {"code": "server_error", "message": "overloaded"}
    last = {
        "type": "response.failed",
        "sequence_number": 2,
        "response": {**facts[0]["response"], "status": "failed", "error": error},
    }
    frame = b"event: response.failed\ndata: %b\n\n" % json.dumps(last).encode()
    return [SSE, *map(Chunk, EVENTS[:2]), Chunk(frame), EndChunks()]


NOT_ACTED: dict[str, list[Step]] = {
    "429": error_answer(429),
    "503": error_answer(503),
    "529": error_answer(529),
}
ACTED: dict[str, tuple[list[Step], int]] = {
    "500": (error_answer(500), 502),
    "400": (error_answer(400), 400),
    "reset": ([Reset()], 502),
    "garbage": ([Headers(200, [("content-type", "text/html")]), EndChunks()], 502),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", NOT_ACTED)
async def test_the_next_target(
    serve: Serve, upstream: ScriptedUpstream, second: ScriptedUpstream, name: str, *, streamed: bool
) -> None:
    """Where the first one says that it has done nothing the next one is asked, at once."""
    proxy = await serve(**two(upstream, second))
    upstream.script(NOT_ACTED[name])
    answer = await proxy.post(body=prompt(stream=streamed))
    assert (answer.status, answer.headers["x-aiproxy-upstream"]) == (200, "second")
    assert [len(upstream.requests), len(second.requests)] == [1, 1]
    await check_invariants(proxy, upstream)
    line = proxy.request_logs()[0]
    assert (line["attempts"], line["upstream"], line["outcome"]) == (2, "second", "completed")
    by = totals(await proxy.metrics(), "aiproxy_upstream_attempts_total", "upstream")
    assert by["scripted"] >= 1
    assert by["second"] == 1


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", ACTED)
async def test_never_twice(
    serve: Serve, upstream: ScriptedUpstream, second: ScriptedUpstream, name: str, *, streamed: bool
) -> None:
    """What may have been done is not asked for again."""
    proxy = await serve(**two(upstream, second))
    script, status = ACTED[name]
    upstream.script(script)
    answer = await proxy.post(body=prompt(stream=streamed))
    assert answer.status == status
    assert [len(upstream.requests), len(second.requests)] == [1, 0]
    await check_invariants(proxy, upstream)


@pytest.mark.parametrize("script", [[Reset()], [Stall()]], ids=["reset", "silence"])
async def test_retry_unsafe(
    serve: Serve, upstream: ScriptedUpstream, second: ScriptedUpstream, script: list[Step]
) -> None:
    """A route may say that it is worth being paid for twice."""
    proxy = await serve(
        **two(upstream, second, route={"retry_unsafe": True}, timeouts={"first_byte": "150ms"})
    )
    upstream.script(script)
    answer = await proxy.post(body=prompt())
    assert (answer.status, answer.headers["x-aiproxy-upstream"]) == (200, "second")


async def test_nobody_listens(
    serve: Serve, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    """A target that cannot be connected to has done nothing."""
    config = two(upstream, second)
    config["upstreams"]["scripted"]["url"] = "http://127.0.0.1:9/v1"
    proxy = await serve(**config)
    answer = await proxy.post(body=prompt(stream=True))
    assert (answer.status, answer.headers["x-aiproxy-upstream"]) == (200, "second")
    await check_invariants(proxy, second)


@pytest.mark.parametrize("most", [0, 1, 2])
async def test_so_many_attempts(serve: Serve, upstream: ScriptedUpstream, most: int) -> None:
    """`retries` are further attempts in all; what the last one says is told."""
    proxy = await serve(retries=most)
    upstream.default = error_answer(429, headers=[("retry-after", "0")])
    answer = await proxy.post(body=prompt())
    assert answer.status == 429
    assert len(upstream.requests) == 1 + most


async def test_a_wait_that_is_too_long(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The only target asks for more than 5 s: the client is told, and may decide."""
    proxy = await serve(retries=2)
    upstream.default = error_answer(429, headers=[("retry-after", "6")])
    answer = await proxy.post(body=prompt())
    assert (answer.status, answer.headers["retry-after"]) == (429, "6")
    assert len(upstream.requests) == 1


async def test_a_failure_right_after_the_beginning(
    serve: Serve, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    """The upstream itself declares it before any output: the client sees the next one alone."""
    proxy = await serve(**two(upstream, second))
    upstream.script(failed_at_once())
    answer = await proxy.post(body=prompt(stream=True))
    kinds = [json.loads(data)["type"] for _, data in parse_sse(answer.body) if data != "[DONE]"]
    assert kinds.count("response.created") == 1
    assert kinds[-1] == "response.completed"
    assert answer.headers["x-aiproxy-upstream"] == "second"
    await check_invariants(proxy, upstream)


async def test_a_cut_right_after_the_beginning(
    serve: Serve, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    """It declares nothing: what came is passed on, and its end is told."""
    proxy = await serve(**two(upstream, second))
    upstream.script([SSE, *map(Chunk, EVENTS[:2]), Reset()])
    answer = await proxy.post(body=prompt(stream=True))
    kinds = [json.loads(data)["type"] for _, data in parse_sse(answer.body)]
    assert kinds == ["response.created", "response.in_progress", "response.failed"]
    assert second.requests == []


async def test_the_beginning_is_held_for_a_second_at_most(
    serve: Serve, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    """A slow model's lifecycle events reach the client before its first output."""
    proxy = await serve(**two(upstream, second))
    upstream.script([SSE, *map(Chunk, EVENTS[:2]), Stall()])
    client = await proxy.send(body=prompt(stream=True))
    async with asyncio.timeout(5):
        head = await client.read_head()
    assert head.status == 200


async def test_weights(serve: Serve, upstream: ScriptedUpstream, second: ScriptedUpstream) -> None:
    """Those of a tier share the requests by their weights."""
    config = two(upstream, second)
    config["routes"][0]["upstreams"] = [{"name": "scripted", "weight": 3}, {"name": "second"}]
    proxy = await serve(**config)
    for _ in range(8):
        assert (await proxy.post(body=prompt(store=False))).status == 200
    assert [len(upstream.requests), len(second.requests)] == [6, 2]


async def test_a_conversation_stays(
    serve: Serve, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    """It prefers the target of its last turn, and moves whole where that one fails."""
    config = two(upstream, second)
    config["routes"][0]["upstreams"] = ["scripted", "second"]
    proxy = await serve(**config)
    first = await proxy.post(body=prompt())
    home = first.headers["x-aiproxy-upstream"]
    previous = first.json()["id"]
    for _ in range(3):
        answer = await proxy.post(body=prompt(previous_response_id=previous))
        assert answer.headers["x-aiproxy-upstream"] == home
    (one, other) = (upstream, second) if home == "scripted" else (second, upstream)
    one.script(error_answer(503))
    answer = await proxy.post(body=prompt(previous_response_id=previous))
    assert answer.headers["x-aiproxy-upstream"] != home
    assert len(other.requests[-1].json()["input"]) == 3
    assert (await proxy.get(f"/v1/responses/{answer.json()['id']}")).status == 200


async def test_an_upstream_is_left_alone(
    serve: Serve, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    """After so many failures in a row nothing goes to it, until a probe succeeds; all is told."""
    breaker = {"failures": 2, "cooldown": "200ms"}
    proxy = await serve(retries=0, breaker=breaker)
    upstream.default = error_answer(500)
    for _ in range(2):
        assert (await proxy.post(body=prompt())).status == 502
    answer = await proxy.post(body=prompt())
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "upstream_overloaded"
    assert len(upstream.requests) == 2
    gauge = totals(await proxy.metrics(), "aiproxy_upstream_available", "upstream")
    assert gauge == {}
    report = (await proxy.admin("/-/status")).json()
    assert report["upstreams"][0]["state"] == "open"
    upstream.heal()

    async def served() -> None:
        assert (await proxy.post(body=prompt())).status == 200

    await eventually(served)
    gauge = totals(await proxy.metrics(), "aiproxy_upstream_available", "upstream")
    assert gauge == {"scripted": 1}

    async def logged() -> None:
        told = [line["event"] for line in proxy.logs() if "upstream " in str(line["event"])]
        assert told == ["upstream left alone", "upstream probed", "upstream available again"]

    await eventually(logged)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_credential(
    serve: Serve, upstream: ScriptedUpstream, second: ScriptedUpstream, status: int
) -> None:
    """The next request goes elsewhere at once, and the operator is told loudly."""
    proxy = await serve(**two(upstream, second))
    upstream.script(error_answer(status))
    assert (await proxy.post(body=prompt())).json()["error"]["code"] == "upstream_credential"
    answer = await proxy.post(body=prompt())
    assert (answer.status, answer.headers["x-aiproxy-upstream"]) == (200, "second")

    async def logged() -> None:
        told = [line["event"] for line in proxy.logs() if line.get("level") == "error"]
        assert told == ["upstream refuses our credential"]

    await eventually(logged)


async def test_a_full_upstream(
    serve: Serve, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    """The next target is asked; where there is none it is 503."""
    config = two(upstream, second)
    config["upstreams"]["scripted"]["max_concurrent"] = 1
    config["upstreams"]["second"]["max_concurrent"] = 1
    proxy = await serve(**config)
    upstream.script([Stall()])
    second.script([Stall()])
    one = await proxy.send(body=prompt())
    await upstream.wait_request()
    other = await proxy.send(body=prompt())
    await second.wait_request()
    answer = await proxy.post(body=prompt())
    assert (answer.status, answer.json()["error"]["code"]) == (503, "upstream_overloaded")
    await one.close()
    await other.close()
    await check_invariants(proxy, upstream)


async def test_another_dialect(
    serve: Serve, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    """A bridge takes over from a native target, and what it cannot express is not lost there."""
    config = two(upstream, second)
    config["upstreams"]["second"]["apis"] = ["chat"]
    proxy = await serve(**config)
    upstream.script(error_answer(503))
    answer = await proxy.post(body=prompt())
    assert (answer.status, answer.headers["x-aiproxy-upstream"]) == (200, "second")
    assert second.requests[-1].path == "/v1/chat/completions"
    upstream.default = error_answer(503)
    answer = await proxy.post(body=prompt(tools=[{"type": "web_search"}]))
    assert answer.status == 503
    assert len(second.requests) == 1


async def test_total_bounds_all(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A deadline of all passes also between attempts."""
    proxy = await serve(retries=5, timeouts={"total": "300ms"})
    upstream.default = error_answer(503, headers=[("retry-after", "2")])
    answer = await proxy.post(body=prompt(stream=True))
    assert answer.status == 504


async def test_a_json_answer_that_says_it_failed(
    serve: Serve, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    """As a stream would be, it is asked for elsewhere."""
    proxy = await serve(**two(upstream, second))
    error = {"code": "server_error", "message": "no"}
    failed = {**responses_json(items=[], usage=None), "status": "failed", "error": error}
    upstream.script(json_answer(failed))
    answer = await proxy.post(body=prompt())
    assert answer.json()["status"] == "completed"
    upstream.script(stream(EVENTS))
    assert (await proxy.post(body=prompt(stream=True))).status == 200
