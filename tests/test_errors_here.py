"""The table of errors, aiproxy's own part: overload, lateness, the drain, and a bug."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from aiproxy.dialects.messages import Messages
from aiproxy.dialects.responses import Responses, ResponsesStream
from client import RawClient
from invariants import check_invariants
from refusals import SERVER, Refusal, assert_closes
from rig import PROMPT_CANARY, Proxy, config_text, prompt
from upstream import ScriptedUpstream, Stall, Wait, json_answer

Serve = Callable[..., Awaitable[Proxy]]

R = "/v1/responses"
M = "/v1/messages"

BUG = Refusal(500, "internal_error", SERVER)
BUSY = Refusal(503, "overloaded", SERVER, headers={"retry-after": None})
DRAINING = Refusal(
    503, "shutting_down", SERVER, headers={"retry-after": None, "connection": "close"}
)
DETAIL = "DETAIL-OF-A-BUG-5521"


def fail(*_args: object) -> Any:
    """Be a bug."""
    raise RuntimeError(DETAIL)


@pytest.mark.parametrize(("path", "dialect"), [(R, Responses), (M, Messages)])
@pytest.mark.parametrize("method", ["request", "answer"])
async def test_a_bug(
    *,
    path: str,
    dialect: type,
    method: str,
    serve: Serve,
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bug is 500 with the request id and no detail; its traceback is in the log."""
    proxy = await serve()
    with monkeypatch.context() as patch:
        patch.setattr(dialect, method, fail)
        answer = await proxy.post(path, headers={"x-request-id": "the-request.1"})
    chosen = "scripted" if method == "answer" else None
    BUG.check(answer, anthropic=path == M, upstream=chosen)
    assert answer.headers["x-request-id"] == "the-request.1"
    assert b"the-request.1" in answer.body
    assert DETAIL.encode() not in answer.body
    await check_invariants(proxy, upstream, bodies=[answer.body])
    (bug,) = (line for line in proxy.logs() if line.get("request_id") == "the-request.1"
              and line["event"] != "request")  # fmt: skip
    assert bug["level"] == "error"
    assert DETAIL in json.dumps(bug)
    assert "Traceback" in json.dumps(bug)
    (line,) = (ln for ln in proxy.request_logs() if ln["request_id"] == "the-request.1")
    assert (line["status"], line["outcome"], line["error_code"]) == (
        500,
        "internal_error",
        "internal_error",
    )


async def test_a_bug_in_a_stream(
    serve: Serve, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a stream began, a bug ends it with response.failed, without detail."""
    proxy = await serve()
    look = ResponsesStream.feed

    def feed(self: ResponsesStream, raw: bytes) -> bytes:
        return fail() if b"output_item.added" in raw else look(self, raw)

    with monkeypatch.context() as patch:
        patch.setattr(ResponsesStream, "feed", feed)
        answer = await proxy.post(R, prompt(stream=True))
    if answer.status == 200:
        kind, data = answer.events()[-1]
        assert kind == "response.failed"
        assert json.loads(data)["response"]["error"]["code"] == "server_error"
        assert "[internal_error]" in data
    else:
        BUG.check(answer, upstream="scripted")
    assert DETAIL.encode() not in answer.body
    assert PROMPT_CANARY.encode() not in proxy.tap.raw


async def test_a_body_that_does_not_come(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A body that is not here within `client_body` is 408, in the shape, and the close."""
    proxy = await serve(timeouts={"client_body": "100ms"})
    refusal = Refusal(408, "request_timeout", headers={"connection": "close"})
    for path in (R, M):
        client = await proxy.client()
        await client.request("POST", path, proxy.headers({"content-length": "10"}), b'{"m')
        refusal.check(await client.answer(), anthropic=path == M)
        await client.send(b"1234567")  # the rest of it, so that nothing is waited for
        await assert_closes(client)
    assert upstream.requests == []


async def test_a_body_that_trickles(serve: Serve) -> None:
    """`client_body` is for the whole body: progress does not prolong it."""
    proxy = await serve(timeouts={"client_body": "200ms"})
    client = await proxy.client()
    await client.request("POST", R, proxy.headers({"content-length": "1000"}), b"{")

    async def trickle() -> None:
        while True:
            await asyncio.sleep(0.03)
            await client.send(b" ")

    task = asyncio.get_running_loop().create_task(trickle())
    async with asyncio.timeout(2):
        Refusal(408, "request_timeout").check(await client.answer())
    task.cancel()


async def test_too_many_connections(serve: Serve, upstream: ScriptedUpstream) -> None:
    """One connection more than `max_connections` is 503 and closed; a freed place counts."""
    proxy = await serve(max_connections=2)
    kept = [await proxy.client() for _ in range(2)]
    for client in kept:
        await client.request("GET", "/")
        assert (await client.answer()).status == 200
    third = await proxy.client()
    answer = await third.answer()
    assert (answer.status, answer.json()["error"]["code"]) == (503, "overloaded")
    assert answer.headers["connection"] == "close"
    await assert_closes(third)
    BUSY.check(answer)
    await kept[0].close()
    await check_invariants(proxy, upstream)


async def test_too_many_connections_for_one_that_writes_at_once(serve: Serve) -> None:
    """A client that sends its request before it is accepted still reads the 503."""
    proxy = await serve(max_connections=1)
    first = await proxy.client()
    await first.request("GET", "/")
    await first.answer()
    with socket.create_connection(("127.0.0.1", proxy.port)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(2):
            assert (await loop.sock_recv(sock, 100)).startswith(b"HTTP/1.1 503 ")


async def held_body(proxy: Proxy, size: int) -> RawClient:
    """Send all of a body but its last byte."""
    client = await proxy.client()
    body = json.dumps(prompt(x="x" * size)).encode()
    fields = proxy.headers({"content-length": str(len(body))})
    await client.request("POST", R, fields, body[:-1])
    return client


@pytest.mark.parametrize("path", [R, M])
async def test_too_many_bodies(path: str, serve: Serve, upstream: ScriptedUpstream) -> None:
    """Bodies over `max_buffered` together are 503; what was held is free when its request ends."""
    proxy = await serve(max_body="1MiB", max_buffered="1MiB")
    first = await held_body(proxy, 700_000)
    large = prompt(path, x="x" * 500_000)

    async def refused() -> None:
        answer = await proxy.post(path, large)
        while answer.status == 200:  # the first body is still on its way
            answer = await proxy.post(path, large)
        BUSY.check(answer, anthropic=path == M)

    async with asyncio.timeout(5):
        await refused()
    assert (await proxy.post(path)).status == 200
    await first.send(b"}")
    assert (await first.answer()).status == 200
    assert (await proxy.post(path, large)).status == 200


@pytest.mark.parametrize("end", ["answered", "refused", "client gone", "upstream silent"])
async def test_memory_is_given_back(end: str, serve: Serve, upstream: ScriptedUpstream) -> None:
    """However a request ends, the bytes that it held are free again."""
    proxy = await serve(max_buffered="1MiB", timeouts={"first_byte": "100ms"})
    for _ in range(4):
        body = prompt(x="x" * 700_000)
        if end == "client gone":
            client = await held_body(proxy, 700_000)
            await asyncio.sleep(0.02)
            client.abort()
            await asyncio.sleep(0.02)
            continue
        if end == "refused":
            body["model"] = "unknown"
        if end == "upstream silent":
            upstream.script(Stall())
        expected = {"answered": 200, "refused": 404, "upstream silent": 504}[end]
        assert (await proxy.post(R, body)).status == expected
    assert (await proxy.post(R, prompt(x="x" * 700_000))).status == 200


async def test_the_memory_of_a_request_that_waits_for_its_stream(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Once the upstream answers, a long stream no longer holds its request's body."""
    proxy = await serve(max_buffered="1MiB")
    go = asyncio.Event()
    healthy = upstream.healthy

    def held(request: Any) -> Any:
        head, *rest = healthy(request)
        return [head, rest[0], Wait(go), *rest[1:]]

    upstream.default = held
    client = await proxy.send(R, prompt(stream=True, x="x" * 700_000))
    assert (await client.read_head()).status == 200
    await client.read_chunk()
    upstream.heal()
    assert (await proxy.post(R, prompt(x="x" * 700_000))).status == 200
    go.set()
    assert b"response.completed" in await client.read_body()


async def test_the_drain(upstream: ScriptedUpstream) -> None:
    """After `drain.delay` a request on an open connection is 503, in the shape, and the close."""
    # Not by the fixture, which would end it a second time.
    proxy = await Proxy.start(config_text(upstream.url, drain={"delay": "0s", "timeout": "5s"}))
    go = asyncio.Event()
    upstream.script(Wait(go), json_answer({"object": "response", "output": []}))
    running = await proxy.send()
    await upstream.wait_request()
    idle = {path: await proxy.client() for path in (R, M)}
    for client in idle.values():
        await client.request("GET", "/")
        await client.answer()
    drain = asyncio.get_running_loop().create_task(proxy.daemon.drain())
    while True:
        await asyncio.sleep(0.01)
        if any("draining" in str(line.get("event")) for line in proxy.logs()):
            break
    for path, client in idle.items():
        await client.request("POST", path, proxy.headers(), json.dumps(prompt(path)).encode())
        DRAINING.check(await client.answer(), anthropic=path == M)
        await assert_closes(client)
    go.set()
    assert (await running.answer()).status == 200
    await drain
    await proxy.close_clients()
