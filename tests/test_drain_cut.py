"""A drain in the midst of something, and what ends it before all is done."""

import asyncio
from contextlib import suppress

import pytest

from aiproxy import drain, relay
from client import IncompleteBody
from drain_rig import (
    AGES,
    BODY,
    FRAMES,
    Begin,
    begin,
    check_served,
    counts,
    draining,
    ended,
    held_up,
    manager,
    server,
    serves,
    stream,
)
from faults import PATHS, asked, check_closed, check_ended, check_error, check_failure, line_of
from invariants import check_terminal, eventually
from steps import SSE_HEADERS, error_answer
from upstream import Chunk, EndChunks, Headers, ScriptedUpstream

FIXTURES = (begin, manager, server)  # found in a module by whoever runs it


# The second signal


async def test_a_second_signal_waits_for_no_first_request(
    begin: Begin, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While unread connections are waited for it ends what is in flight, in order."""
    monkeypatch.setattr(drain, "UNREAD", AGES)
    proxy = await begin(drain={"timeout": "1h"})
    upstream.script(held_up(asyncio.Event()))
    client, got = await stream(proxy)
    silent = await proxy.client()
    task = draining(proxy)
    await serves(proxy, "first")
    assert not task.done()
    proxy.daemon.hurry()
    check_failure("responses", got, got + await client.read_body(), "shutting_down")
    await check_closed(silent)
    await ended(task)
    assert counts(proxy) == "drained 0, cut 1"
    await check_ended(proxy)


async def test_a_second_signal_waits_for_no_slow_client(
    begin: Begin, upstream: ScriptedUpstream
) -> None:
    """An answer that is complete, but for a client that does not take it, is left."""
    proxy = await begin(drain={"timeout": "1h"})
    big = [Chunk(b"data: %b\n\n" % (b"x" * 1000))] * 600
    upstream.script(Headers(200, SSE_HEADERS), *map(Chunk, FRAMES[:5]), *big,
                    *map(Chunk, FRAMES[5:]), EndChunks())  # fmt: skip
    body = asked("responses", streamed=True)
    client = await proxy.send(PATHS["responses"], body, rcvbuf=4096, limit=1024)
    client.pause()
    await upstream.wait_request()
    task = draining(proxy)
    await serves(proxy, "none")
    await asyncio.sleep(0.1)
    assert not task.done()
    proxy.daemon.hurry()
    await ended(task)
    with suppress(IncompleteBody, ConnectionError):
        await client.answer()
    await check_ended(proxy)


@pytest.mark.parametrize("first", ["signal", "timeout"])
async def test_more_signals_take_nobody_s_terminal_event(
    begin: Begin, upstream: ScriptedUpstream, first: str
) -> None:
    """However often it is told to hurry, and while it does: each stream still ends in order."""
    proxy = await begin(drain={"timeout": "1h" if first == "signal" else "200ms"})
    streams = []
    for number in range(20):
        upstream.script(held_up(asyncio.Event()))
        streams.append(await stream(proxy, f"stream-{number}"))
    task = draining(proxy)
    await serves(proxy, "none")
    if first == "signal":
        proxy.daemon.hurry()
    hurried = 0
    while not task.done():
        await asyncio.sleep(0)
        if any(call.watch.reason for call in proxy.daemon._proxy.live):  # it cuts them
            proxy.daemon.hurry()
            hurried += 1
    assert hurried > 0
    for client, got in streams:
        check_failure("responses", got, got + await client.read_body(), "shutting_down")
        await check_closed(client)
    await ended(task)
    assert counts(proxy) == "drained 0, cut 20"
    await check_ended(proxy)


# In the midst of something


async def test_a_drain_while_another_attempt_is_waited_for(
    begin: Begin, upstream: ScriptedUpstream
) -> None:
    """A request between two attempts is in flight: its next one is made, and it is answered."""
    proxy = await begin(retries=1, drain={"timeout": "1h"})
    upstream.script(error_answer(503, headers=[("retry-after", "1")]))
    client = await proxy.send(headers={"x-request-id": "again"})
    request = await upstream.wait_request()
    await request.done.wait()
    task = draining(proxy)
    await serves(proxy, "none")
    assert len(upstream.requests) == 1
    check_served(await client.answer())
    await ended(task)
    assert (len(upstream.requests), counts(proxy)) == (2, "drained 1, cut 0")
    assert (await line_of(proxy, "again"))["attempts"] == 2
    await check_ended(proxy)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_cut_while_another_attempt_is_waited_for(
    begin: Begin, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """At the deadline it is refused as a request that is not begun, and not sent any more."""
    proxy = await begin(retries=1, drain={"timeout": "100ms"})
    upstream.script(error_answer(503, headers=[("retry-after", "4")]))
    body = asked("responses", streamed=streamed)
    client = await proxy.send(body=body, headers={"x-request-id": "again"})
    await upstream.wait_request()
    task = draining(proxy)
    answer = await client.answer()
    check_error(answer, 503, "shutting_down", "responses")
    await ended(task)
    assert (len(upstream.requests), counts(proxy)) == (1, "drained 0, cut 1")
    assert (await line_of(proxy, "again"))["outcome"] == "drained"
    await check_ended(proxy, [answer.body])


@pytest.mark.parametrize("way", ["goes on", "cut"])
async def test_a_drain_while_events_are_held_back(
    begin: Begin, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Lifecycle events that nobody has seen yet come with what follows, or with the failure."""
    monkeypatch.setattr(relay, "HOLD", AGES)
    timeout = "1h" if way == "goes on" else "100ms"
    proxy = await begin(retries=1, drain={"timeout": timeout})
    go_on = asyncio.Event()
    upstream.script(held_up(go_on, at=2))
    body = asked("responses", streamed=True)
    client = await proxy.send(body=body, headers={"x-request-id": "held"})

    async def held() -> None:
        assert upstream.requests[0].sent > len(FRAMES[0]) + len(FRAMES[1])

    await upstream.wait_request()
    await eventually(held)
    task = draining(proxy)
    await serves(proxy, "none")
    if way == "goes on":
        go_on.set()
        assert (await client.answer()).body == b"".join(FRAMES)
    else:
        answer = await client.answer()
        check_failure("responses", b"".join(FRAMES[:2]), answer.body, "shutting_down")
        check_terminal(answer.body, completed=False)
    await ended(task)
    assert counts(proxy) == ("drained 1, cut 0" if way == "goes on" else "drained 0, cut 1")
    assert len(upstream.requests) == 1
    await check_ended(proxy)


@pytest.mark.parametrize("way", ["in the delay", "after it"])
@pytest.mark.parametrize("expect", [False, True])
async def test_a_drain_while_a_body_comes(
    begin: Begin, upstream: ScriptedUpstream, way: str, *, expect: bool
) -> None:
    """A request whose head came in time is served, whenever its body is whole."""
    proxy = await begin(drain={"delay": "10s" if way == "in the delay" else "0s"})
    client = await proxy.client()
    fields = proxy.headers({"content-length": str(len(BODY)), "x-request-id": "upload"})
    await client.request(
        "POST", PATHS["responses"], [*fields, *[("expect", "100-continue")] * expect]
    )
    if expect:
        assert (await client.read_head()).status == 100
    await client.send(BODY[:20])

    async def begun() -> None:
        assert len(proxy.daemon._proxy.live) == 1

    await eventually(begun)
    task = draining(proxy)
    await serves(proxy, "all" if way == "in the delay" else "none")
    await client.send(BODY[20:])
    check_served(await client.answer())
    await check_closed(client)
    proxy.daemon.hurry()
    await ended(task)
    assert counts(proxy) == "drained 1, cut 0"
    await check_ended(proxy)


@pytest.mark.parametrize("hurried", [False, True])
async def test_a_cut_while_a_body_comes(
    begin: Begin, upstream: ScriptedUpstream, *, hurried: bool
) -> None:
    """A body that does not come to its end is not waited for longer than all else."""
    proxy = await begin(drain={"timeout": "1h" if hurried else "100ms"})
    client = await proxy.client()
    fields = proxy.headers({"content-length": str(len(BODY)), "x-request-id": "upload"})
    await client.request("POST", PATHS["responses"], fields)
    await client.send(BODY[:20])

    async def begun() -> None:
        assert len(proxy.daemon._proxy.live) == 1

    await eventually(begun)
    task = draining(proxy)
    await serves(proxy, "none")
    if hurried:
        proxy.daemon.hurry()
    check_error(await client.answer(), 503, "shutting_down", "responses")
    await ended(task)
    await check_closed(client)
    assert (upstream.requests, counts(proxy)) == ([], "drained 0, cut 1")
    assert (await line_of(proxy, "upload"))["outcome"] == "drained"
    await check_ended(proxy)
