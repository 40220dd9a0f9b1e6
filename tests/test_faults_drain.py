"""Faults of the end, F23 to F25: what is in flight completes, or is cut in order and in time."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from client import IncompleteBody, RawClient
from faults import (
    FIRST_DELTA,
    PATHS,
    STREAMED,
    Api,
    Serve,
    asked,
    check_charge,
    check_closed,
    check_ended,
    check_error,
    check_failure,
    delivered,
    events_of,
    line_of,
)
from invariants import check_terminal, eventually
from rig import CREDENTIAL, TEAM_A, Proxy, config_text, prompt
from upstream import Chunk, EndChunks, Headers, ScriptedUpstream, Stall, Wait, stream

CHUNKED = (("content-type", "text/event-stream"), ("transfer-encoding", "chunked"))
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
async def serve(upstream: ScriptedUpstream) -> AsyncIterator[Serve]:
    """Start the real daemon, and end it unless the test did."""
    proxies: list[Proxy] = []

    async def start(**changes: Any) -> Proxy:
        proxy = await Proxy.start(config_text(upstream.url, **changes))
        proxies.append(proxy)
        return proxy

    yield start
    for proxy in proxies:
        await proxy.stop()


async def open_stream(
    proxy: Proxy, upstream: ScriptedUpstream, api: Api = "responses"
) -> RawClient:
    """Send a request whose script is queued, and read up to its first text."""
    client = await proxy.send(
        PATHS[api], asked(api, streamed=True), {"x-request-id": f"{api}-{len(upstream.requests)}"}
    )
    await client.read_head()
    return client


def begun(api: Api) -> tuple[list[bytes], list[Any]]:
    """Return the first events of a stream, and a script that stalls after them."""
    frames = events_of(api)[: FIRST_DELTA[api]]
    return frames, [Headers(200, CHUNKED), *map(Chunk, frames), Stall()]


def counts(proxy: Proxy) -> str:
    """Return what the log says of the drain."""
    return next(str(x["event"]) for x in proxy.logs() if str(x["event"]).startswith("drained "))


async def ended(drain: "asyncio.Task[None]", proxy: Proxy, within: float = 3.0) -> None:
    """Wait for the end of the drain; the port is closed then."""
    async with asyncio.timeout(within):
        await drain
    with pytest.raises(ConnectionRefusedError):
        await RawClient.connect(proxy.port)


async def test_f23_a_stream_completes_in_the_drain(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """What is in flight goes on to its end, is paid in full, and the daemon ends only then."""
    tasks = len(asyncio.all_tasks())
    proxy = await serve()
    go_on = asyncio.Event()
    frames = events_of("responses")
    upstream.script(Headers(200, CHUNKED), *map(Chunk, frames[:5]), Wait(go_on),
                    *map(Chunk, frames[5:]), EndChunks())  # fmt: skip
    client = await open_stream(proxy, upstream)
    got = await client.read_until(frames[4])
    assert (await proxy.admin("/-/ready")).status == 200
    drain = asyncio.create_task(proxy.daemon.drain())
    await asyncio.sleep(0.05)
    assert (await proxy.admin("/-/ready")).status == 503
    assert (await proxy.admin("/-/healthy")).status == 200
    assert not drain.done()
    go_on.set()
    got += await client.read_body()
    assert got == b"".join(frames)
    check_terminal(got, completed=True)
    await check_closed(client)
    await ended(drain, proxy)
    assert counts(proxy) == "drained 1, cut 0"
    check_charge(await line_of(proxy, "responses-0"), "usage")
    await check_ended(proxy)
    assert len(asyncio.all_tasks()) <= tasks + upstream.connections


async def test_f23_during_the_delay_requests_are_served_and_connections_closed(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """For `drain.delay` old and new connections are answered, with `Connection: close`."""
    proxy = await serve(drain={"delay": "400ms"})
    idle, other = await proxy.client(), await proxy.client()
    drain = asyncio.create_task(proxy.daemon.drain())
    await asyncio.sleep(0.05)
    new = await proxy.client()
    body = json.dumps(asked("responses", streamed=False)).encode()
    for client in (idle, new):
        await client.request("POST", PATHS["responses"], proxy.headers(), body)
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        await check_closed(client)
    frames = events_of("chat")
    upstream.script(stream(frames))
    body = json.dumps(asked("chat", streamed=True)).encode()
    await other.request("POST", PATHS["chat"], proxy.headers(), body)
    answer = await other.answer()
    assert (answer.headers["connection"], answer.body) == ("close", b"".join(frames))
    await check_closed(other)
    await ended(drain, proxy)
    await check_ended(proxy)


async def delay_passed(proxy: Proxy) -> None:
    """Assert that the drain has come to refuse requests."""
    assert proxy.daemon.clients.listener.serves == "none"


async def test_f23_after_the_delay_requests_are_refused(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Then an open connection gets 503 with its end, and a new one is not accepted."""
    proxy = await serve(drain={"delay": "100ms"})
    idle = [await proxy.client() for _ in STREAMED]
    for client in idle:
        await client.request("GET", "/", {})
        assert (await client.answer()).status == 200
    go_on = asyncio.Event()
    frames = events_of("responses")
    upstream.script(Headers(200, CHUNKED), Chunk(frames[0]), Wait(go_on),
                    *map(Chunk, frames[1:]), EndChunks())  # fmt: skip
    client = await open_stream(proxy, upstream)
    drain = asyncio.create_task(proxy.daemon.drain())
    await eventually(lambda: delay_passed(proxy))
    for api, late in zip(STREAMED, idle, strict=True):
        body = json.dumps(asked(api, streamed=True)).encode()
        await late.request("POST", PATHS[api], proxy.headers(), body)
        answer = await late.answer()
        check_error(answer, 503, "shutting_down", api)
        assert (answer.headers["connection"], answer.headers["retry-after"]) == ("close", "1")
        await check_closed(late)
    with pytest.raises(ConnectionRefusedError):
        await RawClient.connect(proxy.port)
    assert len(upstream.requests) == 1
    go_on.set()
    assert await client.read_body() == b"".join(frames)
    await ended(drain, proxy)
    assert counts(proxy) == "drained 1, cut 0"
    await check_ended(proxy)


@pytest.mark.parametrize("way", ["timeout", "hurry", "hurry in the delay"])
async def test_f24_f25_what_does_not_end_is_cut_in_order(
    serve: Serve, upstream: ScriptedUpstream, way: str
) -> None:
    """At `drain.timeout` or the second signal all that is left gets its failure, and is paid."""
    limits = {
        "timeout": {"timeout": "200ms"},
        "hurry": {"timeout": "1h"},
        "hurry in the delay": {"delay": "1h"},
    }
    proxy = await serve(drain=limits[way])
    clients: dict[Api, tuple[RawClient, bytes]] = {}
    for api in STREAMED:
        frames, script = begun(api)
        upstream.script(script)
        client = await open_stream(proxy, upstream, api)
        clients[api] = client, b"".join(frames)
        assert await client.read_until(frames[-1]) == b"".join(frames)
    upstream.script(Stall())
    waiting = await proxy.send(PATHS["chat"], prompt(PATHS["chat"]), {"x-request-id": "json"})
    await upstream.wait_request(4)
    drain = asyncio.create_task(proxy.daemon.drain())
    if way != "timeout":
        await asyncio.sleep(0.05)
        assert not drain.done()
        proxy.daemon.hurry()
    for number, (api, (client, prefix)) in enumerate(clients.items()):
        body = await client.read_body()
        check_failure(api, prefix, prefix + body, "shutting_down")
        await check_closed(client)
        line = await line_of(proxy, f"{api}-{number}")
        assert line["outcome"] == "drained"
        check_charge(line, "delivered", upstream.requests[number], made=delivered(prefix))
        await upstream.requests[number].closed.wait()
    answer = await waiting.answer()
    check_error(answer, 503, "shutting_down", "chat")
    assert (await line_of(proxy, "json"))["outcome"] == "drained"
    await ended(drain, proxy)
    assert counts(proxy) == "drained 0, cut 4"
    await check_ended(proxy, [answer.body])


async def test_f24_drained_and_cut_add_up(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Of three in flight the one that ends is drained and two are cut."""
    proxy = await serve(drain={"timeout": "400ms"})
    go_on = asyncio.Event()
    frames = events_of("responses")
    upstream.script(Headers(200, CHUNKED), Chunk(frames[0]), Wait(go_on),
                    *map(Chunk, frames[1:]), EndChunks())  # fmt: skip
    whole = await open_stream(proxy, upstream)
    cut = []
    for _ in range(2):
        upstream.script(begun("responses")[1])
        cut.append(await open_stream(proxy, upstream))
    drain = asyncio.create_task(proxy.daemon.drain())
    await asyncio.sleep(0.05)
    go_on.set()
    check_terminal(await whole.read_body(), completed=True)
    for client in cut:
        check_terminal(await client.read_body(), completed=False)
    await ended(drain, proxy)
    assert counts(proxy) == "drained 1, cut 2"
    await check_ended(proxy)


async def test_f24_a_client_that_does_not_read_does_not_hold_up_the_end(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A stuck client is cut at `drain.timeout` as the others; no success is shown to it."""
    proxy = await serve(drain={"timeout": "200ms"})
    upstream.script(Headers(200, CHUNKED), *[Chunk(b"data: %b\n\n" % (b"x" * 2**20))] * 30)
    client = await proxy.send(
        PATHS["responses"], asked("responses", streamed=True), rcvbuf=4096, limit=1024
    )
    client.pause()
    await upstream.wait_request()
    await asyncio.sleep(0.2)
    drain = asyncio.create_task(proxy.daemon.drain())
    await ended(drain, proxy)
    assert counts(proxy) == "drained 0, cut 1"
    try:
        answer = await client.answer()
    except (IncompleteBody, ConnectionError):
        pass  # what it did not take in time is lost
    else:
        assert b"event: response.failed\n" in answer.body[-8192:]
    await check_ended(proxy)


# The real process


@asynccontextmanager
async def process(
    upstream: ScriptedUpstream, folder: Path, **changes: Any
) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """Run `python -m aiproxy serve`; yield it and its port once it listens."""
    with socket.socket() as one, socket.socket() as two:
        for sock in (one, two):
            sock.bind(("127.0.0.1", 0))
        port, admin = one.getsockname()[1], two.getsockname()[1]
    file = folder / "aiproxy.yaml"
    listen = {"listen": f"127.0.0.1:{port}", "admin": f"127.0.0.1:{admin}"}
    file.write_text(config_text(upstream.url, **listen, **changes), encoding="utf-8")
    arguments = ["-m", "aiproxy", "serve", "--config", str(file)]
    running = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        cwd=ROOT,
        env={**os.environ, "UPSTREAM_KEY": CREDENTIAL},
        stderr=asyncio.subprocess.PIPE,
    )
    assert running.stderr is not None
    try:
        async with asyncio.timeout(20):
            while b'"started"' not in (line := await running.stderr.readline()):
                assert line, "it ended at its start"
        yield running, port
    finally:
        if running.returncode is None:
            running.kill()
        await running.stderr.read()
        await running.wait()


async def ask_process(port: int, **options: Any) -> RawClient:
    """Ask the process for a stream."""
    client = await RawClient.connect(port, **options)
    body = json.dumps(prompt(stream=True)).encode()
    fields = [("content-type", "application/json"), ("authorization", f"Bearer {TEAM_A}")]
    await client.request("POST", PATHS["responses"], fields, body)
    return client


@pytest.mark.parametrize("signals", [1, 2])
async def test_f23_f25_the_process_ends_with_0(
    upstream: ScriptedUpstream, tmp_path: Path, signals: int
) -> None:
    """SIGTERM lets the stream complete, a second one cuts it in order; the process exits with 0."""
    frames = events_of("responses")
    go_on = asyncio.Event()
    upstream.script(Headers(200, CHUNKED), *map(Chunk, frames[:5]), Wait(go_on),
                    *map(Chunk, frames[5:]), EndChunks())  # fmt: skip
    async with process(upstream, tmp_path) as (running, port):
        client = await ask_process(port)
        await client.read_head()
        prefix = b"".join(frames[:5])
        assert await client.read_until(frames[4]) == prefix
        running.send_signal(signal.SIGTERM)
        assert running.stderr is not None
        while b"draining" not in (line := await running.stderr.readline()):
            assert line
        if signals == 2:
            running.send_signal(signal.SIGTERM)
        else:
            go_on.set()
        body = prefix + await client.read_body()
        if signals == 1:
            assert body == b"".join(frames)
        else:
            check_failure("responses", prefix, body, "shutting_down")
        await client.close()
        async with asyncio.timeout(10):
            assert await running.wait() == 0


async def test_f23_the_process_waits_until_its_clients_have_all(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """A stream whose end waits for a slow client is in flight: whatever its size, it comes whole.

    Around the size of the kernel's buffer, its end is held by the process alone.
    """
    frames = events_of("responses")
    event = b"event: x\ndata: %b\n\n" % (b"x" * 1000)
    async with process(upstream, tmp_path) as (running, port):
        slow: list[tuple[RawClient, bytes]] = []
        for size in range(150, 750, 20):
            body = b"".join([*frames[:5], *[event] * size, *frames[5:]])
            upstream.script(stream([body]))
            client = await ask_process(port, rcvbuf=4096, limit=1024)
            client.pause()
            slow.append((client, body))
            await upstream.wait_request(len(slow))
        await asyncio.sleep(0.3)
        running.send_signal(signal.SIGTERM)
        assert running.stderr is not None
        while b"draining" not in (line := await running.stderr.readline()):
            assert line
        await asyncio.sleep(0.1)
        cut = []
        for client, body in reversed(slow):
            # The larger ones first: with the last of them nothing is in flight by the handlers.
            await asyncio.sleep(0.05)
            try:
                await client.read_head()
                assert await client.read_body() == body
            except IncompleteBody as error:
                cut.append((len(error.partial), len(body)))
            await client.close()
        assert cut == []
        async with asyncio.timeout(10):
            assert await running.wait() == 0
