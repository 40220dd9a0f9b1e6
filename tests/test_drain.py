"""The order at SIGTERM: who is served still, who is refused, and what systemd is told.

What is in flight and its charge: `test_faults_drain`; what ends it: `test_drain_cut`.
"""

import asyncio
import json
import re
import socket
import time
from functools import partial
from typing import Any

import pytest

from aiproxy import drain
from client import RawClient
from drain_rig import (
    BODY,
    FRAMES,
    Begin,
    begin,
    check_refused,
    check_served,
    counts,
    draining,
    ended,
    held_up,
    manager,
    post,
    server,
    serves,
    stream,
    used,
)
from faults import PATHS, asked, check_closed, check_ended
from invariants import eventually
from rig import Proxy, config_text
from test_systemd import Manager, Message, connected
from upstream import ScriptedUpstream

FIXTURES = (begin, manager, server)  # found in a module by whoever runs it


# Who is served


async def test_nobody_who_connects_is_refused(
    begin: Begin, upstream: ScriptedUpstream, server: socket.socket
) -> None:
    """New connections come all the time while one of two daemons drains: each is answered."""
    old = await begin(drain={"delay": "200ms"})
    new = await begin()
    go_on = asyncio.Event()
    upstream.script(held_up(go_on))
    client, got = await stream(old)  # whichever has it
    over = asyncio.Event()
    statuses: list[int] = []

    async def come() -> None:
        while not over.is_set():
            async with await connected(server) as one:
                await post(new, one)
                statuses.append((await one.answer()).status)

    coming = [asyncio.create_task(come()) for _ in range(4)]
    task = draining(old)
    await serves(old, "none")
    before = len(statuses)
    go_on.set()
    got += await client.read_body()
    assert got == b"".join(FRAMES)
    await ended(task)
    await asyncio.sleep(0.05)
    over.set()
    await asyncio.gather(*coming)
    assert set(statuses) == {200}
    assert len(statuses) > before > 0

    async def logged() -> None:
        taken = [len(each.request_logs()) for each in (old, new)]
        assert sum(taken) == len(statuses) + 1
        assert min(taken) > 0

    await eventually(logged)


async def test_who_was_accepted_and_not_read_is_served(
    begin: Begin, upstream: ScriptedUpstream
) -> None:
    """A connection from before the end of the delay whose request comes after it is answered.

    One that had its answer before is refused at the same moment.
    """
    proxy = await begin(drain={"delay": "100ms"})
    kept = await used(proxy)
    unread, halves = await proxy.client(), await proxy.client()
    await halves.send(b"POST /v1/responses HT")
    task = draining(proxy)
    late = await proxy.client()  # within the delay
    await serves(proxy, "first")
    await post(proxy, kept)
    check_refused(await kept.answer())
    for client in (unread, late):
        await post(proxy, client)
        check_served(await client.answer())
        await check_closed(client)
    fields = "".join(f"{name}: {value}\r\n" for name, value in proxy.headers())
    length = f"host: x\r\ncontent-length: {len(BODY)}\r\n\r\n"
    await halves.send(f"TP/1.1\r\n{fields}{length}".encode() + BODY)
    check_served(await halves.answer())
    await ended(task)
    await check_ended(proxy)


async def test_a_request_that_just_came_is_in_flight(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often the drain looks whether all is done: from its first byte read it is not."""
    monkeypatch.setattr(drain, "LOOK", 0.0)
    for _ in range(10):
        proxy = await begin()
        clients = [await proxy.client() for _ in range(3)]
        task = draining(proxy)
        await serves(proxy, "first")
        for client in clients:
            await post(proxy, client)
        for client in clients:
            check_served(await client.answer())
        await ended(task)


async def test_the_last_first_requests_are_counted(
    begin: Begin, upstream: ScriptedUpstream
) -> None:
    """A stream that began after the delay, on a connection from before, is drained as others."""
    proxy = await begin(drain={"delay": "100ms"})
    client = await proxy.client()
    task = draining(proxy)
    await serves(proxy, "first")
    go_on = asyncio.Event()
    upstream.script(held_up(go_on))
    body = json.dumps(asked("responses", streamed=True)).encode()
    await client.request("POST", PATHS["responses"], proxy.headers(), body)
    await upstream.wait_request()
    await serves(proxy, "none")
    assert not task.done()
    go_on.set()
    answer = await client.answer()
    assert answer.body == b"".join(FRAMES)
    await ended(task)
    assert counts(proxy) == "drained 1, cut 0"


@pytest.mark.parametrize("sent", [b"", b"POST /v1/resp"], ids=["nothing", "half a head"])
async def test_who_never_sends_does_not_hold_up_the_end(begin: Begin, sent: bytes) -> None:
    """A silent connection is waited for but a moment, then closed."""
    proxy = await begin()
    client = await proxy.client()
    await client.send(sent)
    task = draining(proxy)
    await serves(proxy, "first")
    await serves(proxy, "none")
    await check_closed(client)
    await ended(task)
    await check_ended(proxy)


async def test_a_first_request_that_comes_too_late_is_refused(
    begin: Begin, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a stream goes on, a connection that was silent all along gets 503."""
    monkeypatch.setattr(drain, "UNREAD", 0.05)
    proxy = await begin()
    go_on = asyncio.Event()
    upstream.script(held_up(go_on))
    streaming, _ = await stream(proxy)
    silent = await proxy.client()
    task = draining(proxy)
    await serves(proxy, "none")
    await post(proxy, silent)
    check_refused(await silent.answer())
    await check_closed(silent)
    go_on.set()
    await streaming.read_body()
    await ended(task)
    assert len(upstream.requests) == 1
    assert counts(proxy) == "drained 1, cut 0"


def open_and_send(address: Any, data: bytes) -> socket.socket:
    """Connect and send, without the event loop."""
    sock = socket.create_connection(address)
    sock.sendall(data)
    sock.setblocking(False)
    return sock


@pytest.mark.parametrize("passed", [True, False], ids=["passed", "own"])
async def test_what_was_sent_in_time_is_served_however_late_it_is_read(
    begin: Begin, upstream: ScriptedUpstream, *, passed: bool
) -> None:
    """A loop that is blocked over the end of the delay finds requests from before it: served.

    One came on a connection that is kept, one on a new one that is not even accepted yet. (Of a
    socket that was passed the next process may accept it: so there is one.)
    """
    changes = {"drain": {"delay": "200ms"}}
    own = partial(Proxy.start, config_text(upstream.url, **changes))
    proxy = await (begin(**changes) if passed else own())
    kept = await proxy.client()
    await post(proxy, kept)
    await kept.answer()
    fields = "".join(f"{name}: {value}\r\n" for name, value in proxy.headers())
    head = f"POST /v1/responses HTTP/1.1\r\nhost: x\r\n{fields}content-length: {len(BODY)}\r\n\r\n"
    request = head.encode() + BODY
    number = kept.writer.get_extra_info("socket").fileno()
    made: list[socket.socket] = []

    def block() -> None:
        with socket.fromfd(number, socket.AF_INET, socket.SOCK_STREAM) as same:
            same.send(request)
        made.append(open_and_send(("127.0.0.1", proxy.port), request))
        time.sleep(0.25)  # the loop is late: that is the case

    task = draining(proxy)
    asyncio.get_running_loop().call_later(0.1, block)
    kept._method = "POST"
    check_served(await kept.answer())
    if passed:
        await begin()
    (sock,) = made
    async with RawClient(*await asyncio.open_connection(sock=sock)) as new:
        assert (await new.answer()).status == 200
    await ended(task)
    await check_ended(proxy)
    await proxy.stop()


async def test_a_kept_connection_always_gets_an_answer(
    begin: Begin, upstream: ScriptedUpstream
) -> None:
    """Whenever a client sends around the end of the delay, it is served or told, never cut off."""
    proxy = await begin(drain={"delay": "150ms"})
    go_on = asyncio.Event()
    upstream.script(held_up(go_on))
    streaming, _ = await stream(proxy)
    kept = [await used(proxy) for _ in range(60)]
    task = draining(proxy)
    statuses: list[int] = []

    async def come(client: RawClient, after: float) -> None:
        await asyncio.sleep(after)
        await post(proxy, client)
        answer = await client.answer()
        statuses.append(answer.status)
        (check_served if answer.status == 200 else check_refused)(answer)
        await check_closed(client)

    await asyncio.gather(*(come(client, at * 0.005) for at, client in enumerate(kept)))
    assert {200, 503} == set(statuses)
    go_on.set()
    await streaming.read_body()
    await ended(task)
    await check_ended(proxy)


# What is told


STATUS = re.compile(r"Draining: (\d+) of (\d+) requests left(?:, at most (\w+) more)?")


def status_of(message: Message) -> tuple[int, int, str]:
    """Return the requests left, of how many, and how long they may take at most."""
    found = STATUS.fullmatch(message["STATUS"])
    assert found is not None, message
    left, of, most = found.groups()
    return int(left), int(of), most or ""


async def test_systemd_is_asked_for_time_while_streams_live(
    begin: Begin, upstream: ScriptedUpstream, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once and again and again: how many are left, how long at most, and to wait for that.

    Nothing is asked for once the last has ended.
    """
    assert drain.EXTENSION > 2 * drain.REPORT > 0
    monkeypatch.setattr(drain, "REPORT", 0.05)
    proxy = await begin(drain={"timeout": "2min"})
    go_on = [asyncio.Event(), asyncio.Event()]
    streams = []
    for event in go_on:
        upstream.script(held_up(event))
        streams.append(await stream(proxy))
    assert "READY" in await manager.next()
    task = draining(proxy)
    first = await manager.next()
    assert first.keys() == {"STOPPING", "STATUS"}
    assert (first["STOPPING"], status_of(first)) == ("1", (2, 2, "2min"))
    for left, event in ((2, go_on[0]), (1, go_on[1])):
        for _ in range(3):
            while status_of(message := await manager.next())[0] > left:
                pass
            assert message.keys() == {"EXTEND_TIMEOUT_USEC", "STATUS"}
            assert message["EXTEND_TIMEOUT_USEC"] == "60000000"
            assert status_of(message)[:2] == (left, 2)
            assert re.fullmatch(r"2min|1\d\ds", status_of(message)[2])
        event.set()
        client, _ = streams.pop(0)
        await client.read_body()
    await ended(task)
    report = proxy.daemon._drain._report
    assert report is not None
    assert report.cancelled()  # nothing more is told


async def test_a_drain_without_end(
    begin: Begin, upstream: ScriptedUpstream, manager: Manager
) -> None:
    """With `timeout: 0s` a stream may take as long as it takes, and no time is named."""
    proxy = await begin(drain={"timeout": "0s"})
    go_on = asyncio.Event()
    upstream.script(held_up(go_on))
    client, got = await stream(proxy)
    manager.take_all()
    task = draining(proxy)
    for _ in range(2):
        assert status_of(await manager.next()) == (1, 1, "")
    await serves(proxy, "none")
    await asyncio.sleep(0.3)  # longer than any wait of the drain here
    assert not task.done()
    go_on.set()
    assert got + await client.read_body() == b"".join(FRAMES)
    await ended(task)
    assert counts(proxy) == "drained 1, cut 0"
