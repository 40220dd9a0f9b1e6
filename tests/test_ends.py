"""Ends that went wrong once: who left, who had the last word, and what a large body costs."""

import asyncio
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from aiproxy import jsontext, relay
from aiproxy.envelope import Envelope
from answers import sse
from client import RawClient, parse_sse
from faults import PATHS, STREAMED, Api, Serve, asked, events_of, fresh_request_id, line_of
from invariants import eventually
from rig import prompt
from steps import SSE_HEADERS
from upstream import Chunk, Headers, Repeat, ScriptedUpstream, Stall, Wait, json_answer, stream

MIB = 2**20
LARGE = b"A" * (8 * MIB)
ON_FIRE = "GPU 3 on fire"

Way = Callable[[RawClient], None]
CLOSE: Way = lambda client: client.writer.close()  # noqa: E731 - as a parameter beside the next
WAYS = pytest.mark.parametrize(
    "leave", [CLOSE, RawClient.abort, RawClient.half_close], ids=["close", "abort", "half-close"]
)
EACH = pytest.mark.parametrize("api", STREAMED)


# After the terminal event


@EACH
@WAYS
async def test_who_leaves_after_the_terminal_event_missed_nothing(
    serve: Serve, upstream: ScriptedUpstream, api: Api, leave: Way
) -> None:
    """The log has the stream's own outcome and 200, though the upstream's body is still open."""
    proxy = await serve()
    frames = events_of(api)
    upstream.script(Headers(200, SSE_HEADERS), *map(Chunk, frames), Stall())
    request_id = fresh_request_id()
    body = asked(api, streamed=True)
    client = await proxy.send(PATHS[api], body, {"x-request-id": request_id})
    async with asyncio.timeout(1.5):
        await client.read_head()
        await client.read_until(frames[-1])
        leave(client)
        line = await line_of(proxy, request_id)
        await upstream.requests[0].closed.wait()
    assert (line["status"], line["outcome"]) == (200, "completed")


@EACH
async def test_comments_after_the_terminal_event_hold_nobody_up(
    serve: Serve, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch, api: Api
) -> None:
    """The client's body ends while the upstream still sends its comments."""
    monkeypatch.setattr(relay, "TAIL", 0.2)
    proxy = await serve()
    frames = events_of(api)
    upstream.script(
        Headers(200, SSE_HEADERS), *map(Chunk, frames), Repeat(b": ping\n\n", 10**6, 0.01)
    )
    async with asyncio.timeout(1.5):
        answer = await proxy.post(PATHS[api], asked(api, streamed=True))
        request = upstream.requests[0]
        await request.closed.wait()
    assert answer.body == b"".join(frames)
    assert not request.completed


# Drain


@pytest.mark.parametrize("streamed", [False, True], ids=["JSON", "stream"])
async def test_an_answer_that_begins_in_a_drain_closes_its_connection(
    serve: Serve,
    upstream: ScriptedUpstream,
    streamed: bool,  # noqa: FBT001
) -> None:
    """A request that was in flight at SIGTERM, unanswered, is answered `Connection: close`."""
    proxy = await serve()
    gate = asyncio.Event()
    answer = stream(events_of("responses")) if streamed else json_answer({"output": []})
    upstream.script(Wait(gate), answer)
    client = await proxy.send(body=prompt(stream=streamed))
    await upstream.wait_request()
    drained = asyncio.create_task(proxy.daemon.drain())

    async def draining() -> None:
        assert proxy.daemon._proxy.draining

    await eventually(draining)
    gate.set()
    async with asyncio.timeout(1.5):
        head = await client.read_head()
        await client.read_body()
        assert await client.reader.read() == b""
        await drained
    assert (head.status, head.header("connection")) == (200, "close")


# Requests that were not understood


async def test_a_lone_surrogate_in_stream_options(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A name that no UTF-8 has is the client's mistake, not a bug of ours."""
    proxy = await serve()
    body = (
        b'{"model": "gpt-test", "messages": [], "stream": true, "stream_options": {"\\ud800": 1}}'
    )
    answer = await proxy.post(PATHS["chat"], body)
    assert answer.status == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_type", "stream_options")
    assert upstream.requests == []


KINDS = [
    b'"type": "item_reference", "id": "msg_other", "type": "message"',
    b'"type": "message", "id": "msg_other", "type": "item_reference"',
    b'"type": "\\u0069tem_reference", "id": "msg_other", "type": "message"',
    b'"t\\u0079pe": "item_reference", "id": "msg_other", "type": "message"',
]


@pytest.mark.parametrize("kinds", KINDS, ids=["first", "last", "escaped", "escaped name"])
async def test_a_reference_beside_another_type(
    serve: Serve, upstream: ScriptedUpstream, kinds: bytes
) -> None:
    """An item whose `type` is given twice is refused: which of them counts differs by reader."""
    proxy = await serve()
    item = b'{%b, "role": "user", "content": "Hi"}' % kinds
    body = b'{"model": "gpt-test", "input": [%b]}' % item
    answer = await proxy.post(PATHS["responses"], body)
    error = answer.json()["error"]
    assert (answer.status, error["code"], error["param"]) == (400, "invalid_value", "input[0]")
    assert upstream.requests == []


# What a large string costs


def peak_of(work: Callable[[], object]) -> int:
    """Return the most bytes that it had allocated at a time."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_name_is_restored_beside_a_large_string() -> None:
    """The document is looked at in memory of its own order."""
    document = b'{"image": "%b", "model": "x"}' % LARGE
    found: list[bytes] = []
    peak = peak_of(lambda: found.append(jsontext.replace(document, (), {"model": b'"y"'})))
    assert found == [document.replace(b'"x"', b'"y"')]
    assert peak < 10 * len(document)


def test_a_large_string_of_escapes() -> None:
    """So is one that is made of escapes alone."""
    document = b'{"image": "%b", "model": "x"}' % (b'\\"' * MIB)
    found: list[bytes] = []
    peak = peak_of(lambda: found.append(jsontext.replace(document, (), {"model": b'"y"'})))
    assert found == [document.replace(b'"x"', b'"y"')]
    assert peak < 10 * len(document)


def test_a_lone_surrogate_beside_a_large_string() -> None:
    """The patient way to read a body takes memory of the body's order, too."""
    document = b'{"model": "x", "user": "\\ud800", "input": "%b"}' % LARGE
    found: list[Envelope] = []
    peak = peak_of(lambda: found.append(Envelope.parse(document)))
    assert found[0].raw("input") == b'"%b"' % LARGE
    assert peak < 10 * len(document)


# An error event and then nothing


async def test_silence_after_an_error_event_is_told_by_the_upstreams_words(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """When the deadline cuts it, `response.failed` has the message of the `error` event."""
    proxy = await serve(timeouts={"idle": "200ms"})
    said = {"type": "error", "sequence_number": 1, "message": ON_FIRE, "code": None, "param": None}
    upstream.script(Headers(200, SSE_HEADERS), Chunk(sse(said, event="error")), Stall())
    request_id = fresh_request_id()
    client = await proxy.send(body=prompt(stream=True), headers={"x-request-id": request_id})
    async with asyncio.timeout(1.5):
        answer = await client.answer()
    events: list[dict[str, Any]] = [json.loads(data) for _, data in parse_sse(answer.body)]
    assert events[0] == said
    assert events[-1]["type"] == "response.failed"
    assert ON_FIRE in events[-1]["response"]["error"]["message"]
    assert (await line_of(proxy, request_id))["outcome"] == "failed"
