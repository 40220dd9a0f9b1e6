"""Connections that went wrong once: to the upstream, whose answers are whose; to the client,
what it may leave unread, unsent, or behind.
"""  # noqa: D205 - one sentence does not fit the line

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from aiproxy import listener, reply
from aiproxy import upstream_pool as door
from client import RawClient
from faults import Serve, fresh_request_id, line_of, results_of
from invariants import eventually
from rig import Proxy, config_text, prompt, totals
from steps import SSE_HEADERS
from upstream import (
    Chunk,
    Headers,
    PausedRead,
    Recorded,
    Repeat,
    ScriptedUpstream,
    Send,
    Stall,
    Wait,
    json_answer,
)

KEPT = {"scripted": {"idle_connections": "15s"}}
MIB = 2**20
DELTA = b"data: " + b"x" * 60_000 + b"\n\n"
PATH = "/v1/chat/completions"


def whole(number: int) -> dict[str, Any]:
    """Return an answer that is told from others by its id."""
    return {"id": f"resp_{number}", "object": "response", "status": "completed", "output": []}


async def gone(request: Recorded) -> None:
    """Wait until aiproxy closed the upstream's connection."""
    async with asyncio.timeout(1):
        await request.closed.wait()


async def cut(client: RawClient) -> None:
    """Wait until aiproxy closed the client's connection, without an answer."""
    async with asyncio.timeout(1):
        try:
            assert await client.reader.read() == b""
        except ConnectionError:
            pass


# To the upstream


async def test_what_comes_unasked_is_nobodys_answer(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A pooled connection on which an extra answer came is not used again."""
    proxy = await serve(upstreams=KEPT)
    gate = asyncio.Event()
    upstream.script(json_answer(whole(1)), Wait(gate), json_answer(whole(666)))
    upstream.script(json_answer(whole(2)))
    assert (await proxy.post()).json()["id"] == "resp_1"
    ((idle, _),) = proxy.daemon._snapshot.clients["scripted"].pool._idle
    gate.set()

    async def has_come() -> None:
        assert not idle.clean

    await eventually(has_come)
    async with asyncio.timeout(1):
        answer = await proxy.post()
    assert (answer.status, answer.json()["id"]) == (200, "resp_2")
    assert upstream.accepted == 2


class Hasty(asyncio.Protocol):
    """Answers a head at once, takes nothing of the body; on other connections all is well."""

    def __init__(self, links: "list[Hasty]", status: bytes) -> None:
        self.links = links
        self.status = status
        self.got = bytearray()
        self.answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep it."""
        self.transport = cast("asyncio.Transport", transport)
        self.links.append(self)

    def data_received(self, data: bytes) -> None:
        """Answer, once."""
        self.got += data
        head, _, body = bytes(self.got).partition(b"\r\n\r\n")
        if self.answered or b"\r\n\r\n" not in self.got:
            return
        first = self.links[0] is self
        if not first and len(body) < int(head.lower().split(b"content-length: ")[1].split()[0]):
            return
        self.answered = True
        status = self.status if first else b"200 OK"
        answer = json.dumps(whole(len(self.links))).encode()
        fields = b"Content-Type: application/json\r\nContent-Length: %d" % len(answer)
        self.transport.write(b"HTTP/1.1 %b\r\n%b\r\n\r\n%b" % (status, fields, answer))
        if first:
            self.transport.pause_reading()


@asynccontextmanager
async def hasty(status: bytes, patch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Proxy, Any]]:
    """Run a daemon before a `Hasty` upstream on a path that holds little, as a long one does."""
    links: list[Hasty] = []
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
    small.bind(("127.0.0.1", 0))
    made = door._socket

    def narrow(address: Any) -> socket.socket:
        sock = made(address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
        return sock

    patch.setattr(door, "_socket", narrow)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Hasty(links, status), sock=small)
    port = small.getsockname()[1]
    proxy = await Proxy.start(config_text(f"http://127.0.0.1:{port}/v1", upstreams=KEPT))
    try:
        yield proxy, links
    finally:
        await proxy.stop()
        server.close()
        for link in links:
            link.transport.abort()


@pytest.mark.parametrize("status", [b"429 Too Many Requests", b"200 OK"])
async def test_an_answer_before_the_body_was_taken(
    monkeypatch: pytest.MonkeyPatch, status: bytes
) -> None:
    """The next request goes out whole, on another connection, and gets its own answer."""
    async with hasty(status, monkeypatch) as (proxy, links), asyncio.timeout(1.8):
        first = await proxy.post(body=prompt(input="A" * 300_000))
        assert first.status == int(status[:3])
        second = await proxy.post(body=prompt(input="SECOND"))
        assert (second.status, second.json()["id"]) == (200, "resp_2")
        old, new = links
        head, _, body = bytes(new.got).partition(b"\r\n\r\n")
        assert head.startswith(b"POST /v1/responses HTTP/1.1\r\n")
        assert json.loads(body)["input"] == "SECOND"
        ended = asyncio.Event()
        monkeypatch.setattr(Hasty, "connection_lost", lambda *_: ended.set())
        old.transport.resume_reading()
        await ended.wait()  # it was let go: there is nobody to read its body's rest for
        assert b"SECOND" not in old.got


def held(port: int) -> list[str]:
    """Return the states of the sockets to a port that a process holds open."""
    rows = [row.split() for row in Path("/proc/self/net/tcp").read_text("ascii").splitlines()[1:]]
    return [row[3] for row in rows if int(row[2][-4:], 16) == port and row[9] != "0"]


async def test_who_leaves_in_an_upload_leaves_nothing_to_send(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """What an upstream that does not read has not taken yet keeps no connection open."""
    proxy = await serve()
    upstream.script(PausedRead(), Stall())
    client = await proxy.send(body=prompt(input="A" * (8 * MIB)))
    await upstream.wait_request()
    assert held(upstream.port)
    client.abort()

    async def closed() -> None:
        assert held(upstream.port) == []

    await eventually(closed, within=1)


# To the client


async def behind(proxy: Proxy, upstream: ScriptedUpstream) -> tuple[RawClient, Recorded]:
    """Begin a stream to a client that does not read, until the upstream is at a stop."""
    upstream.script(Headers(200, SSE_HEADERS), Repeat(DELTA, 2000))
    client = await proxy.send(PATH, prompt(PATH, stream=True), rcvbuf=4096, limit=1024)
    client.pause()
    request = await upstream.wait_request()
    stuck = -1
    while stuck != request.sent:
        stuck = request.sent
        await asyncio.sleep(0.05)
    assert 0 < stuck < 2000 * len(DELTA)
    return client, request


async def test_half_closed_with_data_unread_is_gone(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A slow client that closes its sending side has its upstream let go at once."""
    proxy = await serve(timeouts={"client_write": "60s"})
    client, request = await behind(proxy, upstream)
    client.half_close()
    await gone(request)

    async def logged() -> None:
        assert [line["outcome"] for line in proxy.request_logs()] == ["client_disconnected"]

    await eventually(logged)
    assert "reset" not in await results_of(proxy)


async def test_too_many_bytes_behind_a_request(serve: Serve, upstream: ScriptedUpstream) -> None:
    """More than 64 KiB behind a request in flight ends it, on both sides."""
    proxy = await serve()
    upstream.script(Stall())
    client = await proxy.send()
    request = await upstream.wait_request()
    head = b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    client.writer.write(head + b"x" * (listener.MAX_AHEAD + 1))
    await gone(request)
    await cut(client)


async def test_too_many_requests_behind_a_request(serve: Serve, upstream: ScriptedUpstream) -> None:
    """More than eight requests behind one in flight end it, on both sides, small as they are."""
    proxy = await serve()
    upstream.script(Stall())
    client = await proxy.send()
    request = await upstream.wait_request()
    get = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    for _ in range(4 * listener.MAX_QUEUED):
        client.writer.write(get)
        await asyncio.sleep(0.01)
        if request.closed.is_set():
            break
    await gone(request)
    await cut(client)


async def test_too_many_requests_in_one_piece(serve: Serve, upstream: ScriptedUpstream) -> None:
    """So they do when all come in one segment, after which aiohttp would pause reading."""
    proxy = await serve()
    upstream.script(Stall())
    client = await proxy.send()
    request = await upstream.wait_request()
    client.writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
    await gone(request)


async def test_two_requests_at_once_are_answered_in_order(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A client may send its next request before the answer of the last."""
    proxy = await serve()
    gate = asyncio.Event()
    upstream.script(Wait(gate), json_answer(whole(1)))
    upstream.script(json_answer(whole(2)))
    client = await proxy.send()
    await upstream.wait_request()
    await client.request(
        "POST", "/v1/responses", proxy.headers(), json.dumps(prompt(input="2")).encode()
    )
    gate.set()
    async with asyncio.timeout(1):
        assert [(await client.answer()).json()["id"] for _ in "12"] == ["resp_1", "resp_2"]


async def test_a_closed_connection_does_not_wait_for_ever(
    serve: Serve, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits after `Connection: close` for a client that never reads waits `client_write`."""
    monkeypatch.setattr(listener, "WRITE_HIGH", 16 * MIB)  # the request itself never waits
    proxy = await serve(timeouts={"client_write": "200ms"})
    upstream.script(json_answer({**whole(1), "metadata": {"x": "y" * (4 * MIB)}}))
    request_id = fresh_request_id()
    client = await proxy.send(
        headers={"connection": "close", "x-request-id": request_id}, rcvbuf=4096, limit=1024
    )
    client.pause()
    assert (await line_of(proxy, request_id))["outcome"] == "completed"
    clients = proxy.daemon.clients.listener
    assert clients.count == 1
    assert clients.unsent() > 0

    async def closed() -> None:
        assert clients.count == 0

    await eventually(closed, within=1)


async def test_a_head_that_begins_with_its_connection(serve: Serve) -> None:
    """Its deadline holds for first bytes that are there before the connection is accepted."""
    proxy = await serve(timeouts={"client_header": "200ms"}, client_keepalive="60s")
    loop = asyncio.get_running_loop()
    with socket.create_connection(("127.0.0.1", proxy.port)) as sock:
        sock.send(b"GET /v1/models HTTP/1.1\r\nHo")  # the loop has not run since the connect
        sock.setblocking(False)
        async with asyncio.timeout(1):
            assert await loop.sock_recv(sock, 100) == b""


async def test_a_client_that_left_is_no_upstreams_reset(
    serve: Serve, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing to a client that is gone says nothing about the upstream's attempt."""
    proxy = await serve()
    write = reply.Reply.write

    def left(self: reply.Reply, data: bytes) -> None:
        transport = self._request.transport
        assert transport is not None
        transport.abort()  # its end is known to the transport alone so far
        write(self, data)

    monkeypatch.setattr(reply.Reply, "write", left)
    upstream.script(Headers(200, SSE_HEADERS), Chunk(DELTA), Stall())
    request_id = fresh_request_id()
    await proxy.send(PATH, prompt(PATH, stream=True), {"x-request-id": request_id})
    line = await line_of(proxy, request_id)
    assert (line["status"], line["outcome"]) == (499, "client_disconnected")
    await gone(upstream.requests[0])
    monkeypatch.setattr(reply.Reply, "write", write)
    metrics = await proxy.metrics()
    assert totals(metrics, "aiproxy_upstream_attempts_total", "result") == {"ok": 1}


@pytest.mark.parametrize("streamed", [False, True])
async def test_framing_that_breaks_in_the_body_fails_at_once(
    serve: Serve, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """A bad chunk long after the head is told at once, not after `idle`."""
    proxy = await serve()
    gate = asyncio.Event()
    kind = "text/event-stream" if streamed else "application/json"
    head = Headers(200, [("content-type", kind), ("transfer-encoding", "chunked")])
    upstream.script(head, Chunk(b": one\n\n"), Wait(gate), Send(b"zz\r\n"), Stall())
    client = await proxy.send("/v1/responses", prompt(stream=streamed))
    await upstream.wait_request()
    if streamed:
        await client.read_head()
        await client.read_until(b": one\n\n")
    gate.set()
    async with asyncio.timeout(2):
        if not streamed:
            await client.read_head()
        await client.read_until(b"upstream_error")


async def test_what_waited_before_does_not_count_again(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """What may wait behind a request is a bound at a time, not of a connection's whole life."""
    proxy = await serve()
    client = await proxy.client()
    body = json.dumps(prompt(input="x" * 20_000)).encode()
    for number in range(5):
        gate = asyncio.Event()
        upstream.script(Wait(gate), json_answer(whole(number)))
        await client.request("POST", "/v1/responses", proxy.headers(), body)
        await upstream.wait_request(2 * number + 1)
        await client.request("POST", "/v1/responses", proxy.headers(), body)
        gate.set()
        async with asyncio.timeout(5):
            assert [(await client.answer()).status for _ in "12"] == [200, 200]
