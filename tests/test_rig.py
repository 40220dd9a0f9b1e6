"""The rig proves itself, without aiproxy: what it sends, what it sees, what it refuses."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from blockbuster import BlockingError
from hypothesis import given
from hypothesis import strategies as st

from answers import USAGE
from client import IncompleteBody, ProtocolError, RawClient, parse_sse
from conftest import PACKAGE, BlockingCalls
from responses import (
    function_item,
    message_item,
    reasoning_item,
    responses_events,
)
from steps import body_of, rechunk
from upstream import (
    Chunk,
    EndChunks,
    Finish,
    Garbage,
    Headers,
    PausedRead,
    Repeat,
    Reset,
    ScriptedUpstream,
    Send,
    Stall,
    Wait,
    json_answer,
    stream,
)

CHUNKED = (("transfer-encoding", "chunked"),)
ALL_ITEMS = [reasoning_item(), message_item("Grüße, world"), function_item()]


@pytest.fixture
async def raw(upstream: ScriptedUpstream) -> AsyncIterator[RawClient]:
    """Connect a raw client to the scripted upstream."""
    async with await RawClient.connect(upstream.port) as client:
        yield client


# Server-sent events


@pytest.mark.parametrize(
    ("raw_stream", "events"),
    [
        (b"data: a\n\n", [("message", "a")]),
        (b"data:a\n\n", [("message", "a")]),
        (b"data:  a\n\n", [("message", " a")]),
        (b"event: x\ndata: a\n\n", [("x", "a")]),
        (b"event: x\r\ndata: a\r\n\r\n", [("x", "a")]),
        (b"event: x\rdata: a\r\r", [("x", "a")]),
        (b"\xef\xbb\xbfdata: a\n\n", [("message", "a")]),
        (b"data: a\ndata: b\n\n", [("message", "a\nb")]),
        (b"data\ndata\n\n", [("message", "\n")]),
        (b": comment\n\ndata: a\n\n", [("message", "a")]),
        (b"data: a\n: comment\n\n", [("message", "a")]),
        (b"event: x\n\ndata: a\n\n", [("message", "a")]),
        (b"id: 1\nretry: 5\nother: y\ndata: a\n\n", [("message", "a")]),
        (b"data: a\n", []),
        (b"data: a", []),
        (b"", []),
        (b"data: [DONE]\n\n", [("message", "[DONE]")]),
        ("data: ü\n\n".encode(), [("message", "ü")]),
    ],
)
def test_parse_sse_follows_the_specification(
    raw_stream: bytes, events: list[tuple[str, str]]
) -> None:
    """Line ends, comments, BOM, several data lines and unfinished events read as WHATWG says."""
    assert parse_sse(raw_stream) == events


@pytest.mark.parametrize("newline", [b"\n", b"\r", b"\r\n"])
def test_a_stream_says_the_same_with_every_line_end(newline: bytes) -> None:
    """Converted to CR or CRLF, a scripted stream still holds the same events."""
    events = responses_events(items=ALL_ITEMS)
    body = body_of(stream(events, newline=newline))
    assert parse_sse(body) == parse_sse(b"".join(events))


@given(st.binary(), st.integers(1, 50))
def test_rechunking_loses_nothing(data: bytes, size: int) -> None:
    """Pieces of any size add up to the whole."""
    assert b"".join(rechunk(data, size)) == data


# The upstream and the raw client


async def test_default_answer_repeats_the_model(raw: RawClient) -> None:
    """Without a script the upstream answers under the model that was asked for."""
    await raw.request("POST", "/v1/responses", body=b'{"model": "m-1", "input": "hi"}')
    answer = await raw.answer()
    assert (answer.status, answer.json()["model"]) == (200, "m-1")
    assert answer.json()["usage"] == USAGE.responses()


async def test_requests_are_recorded_as_sent(raw: RawClient, upstream: ScriptedUpstream) -> None:
    """Target, header fields in order and a chunked body arrive unchanged in the record."""
    fields = [("X-A", "1"), ("x-a", "2"), *CHUNKED]
    await raw.request("POST", "/v1/x%2Fy?q=1", fields, b"2\r\n{}\r\n3\r\n   \r\n0\r\n\r\n")
    request = await upstream.wait_request()
    assert (request.target, request.path) == ("/v1/x%2Fy?q=1", "/v1/x%2Fy")
    assert [pair for pair in request.headers if pair[0].lower() == "x-a"] == fields[:2]
    assert (request.body, request.json(), request.header("X-a")) == (b"{}   ", {}, "1")
    assert (await raw.answer()).status == 404


async def test_connections_are_kept(raw: RawClient, upstream: ScriptedUpstream) -> None:
    """A finished script leaves the connection open for the next request."""
    for _ in range(3):
        upstream.script(json_answer({"n": 1}))
        await raw.request("POST", "/", body=b"{}")
        assert (await raw.answer()).json() == {"n": 1}
    assert (upstream.connections, upstream.accepted) == (1, 1)
    assert {request.connection for request in upstream.requests} == {1}


async def test_scripts_are_taken_in_order(raw: RawClient, upstream: ScriptedUpstream) -> None:
    """Each request takes one queued script, and afterwards the default answers."""
    upstream.script(*json_answer({"n": 1}))
    upstream.script(*json_answer({"n": 2}, 503, [("retry-after", "1")]))
    upstream.default = json_answer({"n": 3})
    seen = []
    for _ in range(4):
        await raw.request("POST", "/", body=b"{}")
        seen.append((await raw.answer()).json()["n"])
    assert (seen, upstream.scripts_left) == ([1, 2, 3, 3], 0)


async def test_chunks_arrive_one_by_one(raw: RawClient, upstream: ScriptedUpstream) -> None:
    """A chunk is delivered before the next one is sent."""
    gate = asyncio.Event()
    upstream.script(Headers(200, CHUNKED), Chunk(b"one"), Wait(gate), Chunk(b"two"), EndChunks())
    await raw.request("GET", "/")
    assert (await raw.read_head()).status == 200
    first, _ = await raw.read_chunk()
    assert not upstream.requests[0].done.is_set()
    gate.set()
    second, _ = await raw.read_chunk()
    assert (first, second) == (b"one", b"two")
    assert (await raw.read_chunk())[0] == b""


async def test_read_until_leaves_the_rest(raw: RawClient, upstream: ScriptedUpstream) -> None:
    """After the chunk with the needle the body can be read on to its end."""
    upstream.script(Headers(200, CHUNKED), Repeat(b"abc", 3), EndChunks())
    await raw.request("GET", "/")
    await raw.read_head()
    assert await raw.read_until(b"ca") == b"abcabc"
    assert await raw.read_body() == b"abc"


@pytest.mark.parametrize("end", [Finish(), Reset()])
async def test_a_missing_last_chunk_is_seen(
    raw: RawClient, upstream: ScriptedUpstream, end: Finish | Reset
) -> None:
    """A chunked body without its last chunk is no success, whichever way the connection ends."""
    upstream.script(Headers(200, CHUNKED), Chunk(b"half"), end)
    await raw.request("GET", "/")
    await raw.read_head()
    assert (await raw.read_chunk())[0] == b"half"
    expected = IncompleteBody if isinstance(end, Finish) else ConnectionResetError
    with pytest.raises(expected):
        await raw.read_body()
    assert upstream.requests[0].completed


async def test_a_short_body_is_seen(raw: RawClient, upstream: ScriptedUpstream) -> None:
    """A body shorter than its Content-Length is no success, and what came of it is kept."""
    upstream.script(Headers(200, [("content-length", "9")]), Send(b"short"), Finish())
    await raw.request("GET", "/")
    with pytest.raises(IncompleteBody) as caught:
        await raw.answer()
    assert caught.value.partial == b"short"


async def test_a_body_may_end_with_the_connection(
    raw: RawClient, upstream: ScriptedUpstream
) -> None:
    """Without a length the body is all that comes before FIN."""
    upstream.script(Headers(200), Send(b"all of it"), Finish())
    await raw.request("GET", "/")
    assert (await raw.answer()).body == b"all of it"


@pytest.mark.parametrize(
    "wire",
    [
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nabcd",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nHTTP/1.1 502 Bad Gateway",
    ],
)
async def test_the_raw_client_is_strict(
    raw: RawClient, upstream: ScriptedUpstream, wire: bytes
) -> None:
    """Broken heads, chunk sizes and chunk ends are errors, not something to live with."""
    upstream.script(Send(wire), Finish())
    await raw.request("GET", "/")
    with pytest.raises(ProtocolError):
        await raw.answer()


async def test_garbage_is_no_answer(raw: RawClient, upstream: ScriptedUpstream) -> None:
    """Garbage is the same every time and no HTTP."""
    assert Garbage(64).encode() == Garbage(64).encode()
    upstream.script(Garbage(64), Send(b"\r\n\r\n"), Finish())
    await raw.request("GET", "/")
    with pytest.raises(ProtocolError):
        await raw.answer()


@pytest.mark.parametrize("way", ["abort", "close", "half_close"])
async def test_the_peers_going_is_seen_at_once(
    raw: RawClient, upstream: ScriptedUpstream, way: str
) -> None:
    """A stalled script ends within 100 ms of the client's RST or FIN, and the record says so."""
    upstream.script(Headers(200, CHUNKED), Stall())
    await raw.request("GET", "/")
    request = await upstream.wait_request()
    await raw.read_head()
    gone_at = asyncio.get_running_loop().time()
    if way == "close":
        await raw.close()
    else:
        getattr(raw, way)()
    async with asyncio.timeout(1):
        await request.closed.wait()
        await request.done.wait()
    assert request.closed_at == pytest.approx(gone_at, abs=0.1)
    assert not request.completed


async def test_backpressure_reaches_the_script(raw: RawClient, upstream: ScriptedUpstream) -> None:
    """A client that does not read stops the script once the kernel's buffers are full."""
    raw.pause()
    upstream.script(Headers(200, CHUNKED), Repeat(b"x" * 65536, 1000), EndChunks())
    await raw.request("GET", "/")
    request = await upstream.wait_request()
    sent = -1
    while sent != request.sent:
        sent = request.sent
        await asyncio.sleep(0.05)
    assert sent < 30_000_000
    await raw.read_head()
    assert len(await raw.read_body()) == 65_536_000
    await request.done.wait()
    assert request.completed


async def test_an_unread_body_does_not_hold_up_the_script(
    raw: RawClient, upstream: ScriptedUpstream
) -> None:
    """With PausedRead the answer comes before the body, and the connection ends with it."""
    upstream.script(PausedRead(), *json_answer({}, 413))
    await raw.request("POST", "/", {"content-length": "1000000"}, b"begin")
    assert (await raw.answer()).status == 413
    assert await raw.reader.read() == b""


async def test_closed_connections_are_counted_out(upstream: ScriptedUpstream) -> None:
    """The count of open connections falls when a client goes."""
    client = await RawClient.connect(upstream.port, rcvbuf=4096)
    upstream.script(Headers(200, CHUNKED), Stall())
    await client.request("GET", "/")
    request = await upstream.wait_request()
    assert upstream.connections == 1
    client.set_rcvbuf(8192)
    client.abort()
    await request.closed.wait()
    assert upstream.connections == 0


async def test_a_request_that_is_no_http_fails_the_test() -> None:
    """What the tested program sends wrongly is raised when the upstream stops."""
    upstream = await ScriptedUpstream().__aenter__()
    async with await RawClient.connect(upstream.port) as client:
        await client.send(b"nonsense\r\n\r\n")
        assert await client.reader.read() == b""
    with pytest.raises(ExceptionGroup, match="no HTTP"):
        await upstream.stop()


# The guard against blocking


async def test_blocking_calls_of_tests_are_allowed() -> None:
    """Only code of aiproxy must not block: a test may."""
    time.sleep(0)  # noqa: ASYNC251 - the very subject


async def test_blocking_calls_of_aiproxy_fail(blocking_calls: BlockingCalls) -> None:
    """A blocking call below a frame of aiproxy raises, and is remembered where it is caught."""
    code = compile("import time\ndef nap(): time.sleep(0)", f"{PACKAGE}/nap.py", "exec")
    scope: dict[str, Any] = {}
    exec(code, scope)  # noqa: S102 - code with a file name inside the package
    with pytest.raises(BlockingError):
        scope["nap"]()
    assert blocking_calls.seen == [f"time.sleep at {PACKAGE}/nap.py:2"]
    blocking_calls.seen.clear()
    await asyncio.to_thread(scope["nap"])


@given(st.integers())
async def test_async_properties_run_on_uvloop(number: int) -> None:
    """An async test with hypothesis runs on the loop of the daemon."""
    assert type(asyncio.get_running_loop()).__module__.startswith("uvloop")
