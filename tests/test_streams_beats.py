"""Heartbeats: when they come, where they never do, and what a failure is after them."""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from aiproxy import relay
from aiproxy.sse import COMMENT, Splitter
from answers import sse
from client import parse_sse
from invariants import eventually
from responses import responses_events
from rig import Proxy, prompt
from steps import SSE_HEADERS
from test_streams import CHAT, MESSAGES, PATHS, RESPONSES, asking, events_of
from upstream import (
    Chunk,
    EndChunks,
    Finish,
    Headers,
    ScriptedUpstream,
    Sleep,
    Stall,
    Wait,
    error_answer,
    json_answer,
)

Serve = Callable[..., Awaitable[Proxy]]
STRICT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
OFTEN = {"keepalive": "50ms"}


def without_beats(body: bytes) -> bytes:
    """The body less the heartbeats, each of which stands between events."""
    parts = re.split(re.escape(COMMENT), body)
    assert all(part == b"" or part.endswith((b"\n\n", b"\r\r", b"\r\n\r\n")) for part in parts)
    return b"".join(parts)


async def log_line(proxy: Proxy) -> dict[str, Any]:
    """The only request's log line."""

    async def holds() -> None:
        assert proxy.request_logs()

    await eventually(holds)
    (line,) = proxy.request_logs()
    return line


@pytest.mark.parametrize("path", PATHS)
async def test_before_the_upstreams_headers(
    serve: Serve, upstream: ScriptedUpstream, path: str
) -> None:
    """Comments go out while the upstream has not even answered; then the stream follows."""
    proxy = await serve(streams=OFTEN)
    gate = asyncio.Event()
    events = events_of(path)
    upstream.script(
        Wait(gate), Headers(200, SSE_HEADERS), [Chunk(event) for event in events], EndChunks()
    )
    client = await proxy.send(path, asking(path))
    async with asyncio.timeout(5):
        head = await client.read_head()
        assert head.status == 200
        assert (head.header("content-type") or "").startswith("text/event-stream")
        assert head.header("cache-control") == "no-cache"
        seen = await client.read_until(COMMENT * 2)
        gate.set()
        body = seen + await client.read_body()
    assert without_beats(body) == b"".join(events)


@pytest.mark.parametrize("path", PATHS)
async def test_in_a_silence(serve: Serve, upstream: ScriptedUpstream, path: str) -> None:
    """Comments go out while the upstream is silent between two events."""
    proxy = await serve(streams=OFTEN)
    gate = asyncio.Event()
    first, *rest = events_of(path)
    upstream.script(
        Headers(200, SSE_HEADERS), Chunk(first), Wait(gate), Chunk(b"".join(rest)), EndChunks()
    )
    client = await proxy.send(path, asking(path))
    async with asyncio.timeout(5):
        await client.read_head()
        body = await client.read_until(COMMENT * 2)
        gate.set()
        body += await client.read_body()
    assert body.startswith(first + COMMENT)
    assert without_beats(body) == first + b"".join(rest)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("newline", [b"\n", b"\r", b"\r\n"])
async def test_never_inside_an_event(
    serve: Serve, upstream: ScriptedUpstream, path: str, newline: bytes
) -> None:
    """An upstream that pauses within an event has it arrive in one piece."""
    proxy = await serve(streams=OFTEN)
    gate = asyncio.Event()
    first, second, *rest = [event.replace(b"\n", newline) for event in events_of(path)]
    upstream.script(
        Headers(200, SSE_HEADERS),
        Chunk(first + second[:30]),
        Wait(gate),
        Chunk(second[30:] + b"".join(rest)),
        EndChunks(),
    )
    client = await proxy.send(path, asking(path))
    async with asyncio.timeout(5):
        await client.read_head()
        body = await client.read_until(COMMENT * 2)
        gate.set()
        body += await client.read_body()
    assert without_beats(body) == first + second + b"".join(rest)


async def test_never_inside_an_oversize_event(
    serve: Serve, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an event beyond the bound the client has a part: no comment until its end."""
    monkeypatch.setattr(relay, "Splitter", lambda: Splitter(4096))
    proxy = await serve(streams=OFTEN)
    big = sse({"type": "response.brand_new", "x": "y" * 10_000})
    events = responses_events()
    upstream.script(
        Headers(200, SSE_HEADERS),
        Chunk(events[0] + big[:9000]),
        Sleep(0.2),
        Chunk(big[9000:] + b"".join(events[1:])),
        EndChunks(),
    )
    answer = await proxy.post(RESPONSES, asking(RESPONSES))
    assert answer.body == events[0] + big + b"".join(events[1:])


async def test_no_first_token(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The first token is the first output: neither heartbeats nor lifecycle events are (55)."""
    proxy = await serve(streams=OFTEN)
    gate = asyncio.Event()
    events = events_of(RESPONSES)
    upstream.script(
        Headers(200, SSE_HEADERS),
        Chunk(b": ping\n\n" + b"".join(events[:2])),
        Wait(gate),
        Chunk(b"".join(events[2:])),
        EndChunks(),
    )
    client = await proxy.send(RESPONSES, asking(RESPONSES))
    await client.read_head()
    begun = time.monotonic()
    await client.read_until(COMMENT * 2)
    silent = time.monotonic() - begun
    gate.set()
    await client.read_body()
    line = await log_line(proxy)
    assert silent > 0.05
    assert line["first_token_s"] >= silent


async def test_heartbeats_alone_are_no_token(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A stream that failed after heartbeats has no first token."""
    proxy = await serve(streams=OFTEN)
    upstream.script(Sleep(0.12), Finish())
    await proxy.post(RESPONSES, asking(RESPONSES))
    assert (await log_line(proxy))["first_token_s"] is None
    found = {name for name, _ in await proxy.metrics()}
    assert "aiproxy_time_to_first_token_seconds_count" not in found


@pytest.mark.parametrize("path", PATHS)
async def test_none_for_json(serve: Serve, upstream: ScriptedUpstream, path: str) -> None:
    """A request for JSON gets its answer and nothing before it."""
    proxy = await serve(streams=OFTEN)
    upstream.script(Sleep(0.15), *json_answer(upstream_json(path)))
    answer = await proxy.post(path, prompt(path))
    assert answer.headers["content-type"] == "application/json"
    assert answer.body == upstream_json(path)


def upstream_json(path: str) -> bytes:
    """The least that is an answer."""
    return {RESPONSES: b'{"output": []}', CHAT: b'{"choices": []}', MESSAGES: b'{"content": []}'}[
        path
    ]


async def test_none_with_zero(serve: Serve, upstream: ScriptedUpstream) -> None:
    """`keepalive: 0s` turns them off."""
    proxy = await serve(streams={"keepalive": "0s"})
    events = events_of(RESPONSES)
    upstream.script(
        Headers(200, SSE_HEADERS),
        Chunk(events[0]),
        Sleep(0.15),
        Chunk(b"".join(events[1:])),
        EndChunks(),
    )
    assert (await proxy.post(RESPONSES, asking(RESPONSES))).body == b"".join(events)


@pytest.mark.parametrize("path", PATHS)
async def test_none_after_the_end(
    serve: Serve, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Nothing follows the terminal event, even while the upstream keeps its body open."""
    monkeypatch.setattr(relay, "TAIL", 0.2)
    proxy = await serve(streams=OFTEN)
    events = events_of(path)
    upstream.script(Headers(200, SSE_HEADERS), [Chunk(event) for event in events], Stall())
    answer = await proxy.post(path, asking(path))
    assert answer.body == b"".join(events)


# Failures once a heartbeat went out


FAILURES: list[Any] = [
    (error_answer(429, "slow down", code="rate_limit_exceeded"), "rate_limit_exceeded"),
    (error_answer(400, "bad prompt", code="x"), "invalid_prompt"),
    (error_answer(422, "bad prompt", code="x"), "invalid_prompt"),
    (error_answer(500, "oops"), "server_error"),
    (error_answer(503, "busy"), "server_error"),
    (error_answer(401, "who?"), "server_error"),
    ([Finish()], "server_error"),
    ([Headers(200, SSE_HEADERS), EndChunks()], "server_error"),
]


@pytest.mark.parametrize(("script", "code"), FAILURES)
async def test_failures_are_in_band(
    serve: Serve, upstream: ScriptedUpstream, script: Any, code: str
) -> None:
    """After a heartbeat a failure is created (0) and failed (1), each of the SDK's strict types."""
    proxy = await serve(streams=OFTEN)
    gate = asyncio.Event()
    upstream.script(Wait(gate), script)
    client = await proxy.send(RESPONSES, asking(RESPONSES, instructions="Be brief."))
    async with asyncio.timeout(5):
        await client.read_head()
        body = await client.read_until(COMMENT)
        gate.set()
        body += await client.read_body()
        assert await client.reader.read() == b""  # closed: it was ours
    events = parse_sse(without_beats(body))
    for _, data in events:
        STRICT.validate_json(data, strict=True)
    facts = [json.loads(data) for _, data in events]
    assert [kind for kind, _ in events] == ["response.created", "response.failed"]
    assert [fact["type"] for fact in facts] == ["response.created", "response.failed"]
    assert [fact["sequence_number"] for fact in facts] == [0, 1]
    assert facts[1]["response"]["error"]["code"] == code
    assert facts[1]["response"]["instructions"] == "Be brief."
    assert facts[0]["response"]["id"] == facts[1]["response"]["id"]
    line = await log_line(proxy)
    assert line["status"] == 200
    assert line["outcome"] in {"upstream_rejected", "upstream_error"}


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("script", [failure[0] for failure in FAILURES])
async def test_failures_are_in_band_elsewhere(
    serve: Serve, upstream: ScriptedUpstream, path: str, script: Any
) -> None:
    """On chat an error frame and no [DONE]; on messages an error event; then the end."""
    proxy = await serve(streams=OFTEN)
    gate = asyncio.Event()
    upstream.script(Wait(gate), script)
    client = await proxy.send(path, asking(path))
    async with asyncio.timeout(5):
        await client.read_head()
        body = await client.read_until(COMMENT)
        gate.set()
        body += await client.read_body()
        assert await client.reader.read() == b""
    ((kind, data),) = parse_sse(without_beats(body))
    error = json.loads(data)
    if path == CHAT:
        assert kind == "message"
        assert error["error"].keys() == {"message", "type", "param", "code"}
    else:
        assert (kind, error["type"]) == ("error", "error")
        assert error["error"].keys() == {"type", "message"}


async def test_the_sdk_sees_the_failure(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The Python SDK's stream helper takes the made-up events for a failed response."""
    proxy = await serve(streams=OFTEN)
    upstream.script(Sleep(0.12), error_answer(429, "slow down"))
    async with (
        proxy.openai() as client,
        client.responses.stream(model="gpt-test", input="Hi") as events,
    ):
        seen = [event async for event in events]
    assert [event.type for event in seen] == ["response.created", "response.failed"]
    last: Any = seen[-1]
    assert last.response.error.code == "rate_limit_exceeded"
    assert "slow down" in last.response.error.message
