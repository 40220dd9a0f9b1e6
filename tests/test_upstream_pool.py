"""The connections to one upstream: which is given out, how long one is kept, where it goes to."""

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from aiproxy import upstream_pool
from aiproxy.upstream_connection import Connection
from aiproxy.upstream_errors import BROKE_OFF, NO_NAME, REFUSED, UNTRUSTED, Failure
from aiproxy.upstream_pool import Addresses, Pool, tls
from certificates import issue
from invariants import eventually
from upstream import Finish, Recorded, ScriptedUpstream, Stall, Wait, json_answer

HERE = "127.0.0.1"
NAME = "upstream.invalid"
LONG = 60.0  # seconds, more than any test
REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"

Serving = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


_MADE: list[Pool] = []


def made(host: str, port: int, context: ssl.SSLContext | None, keep: float) -> Pool:
    """Make a pool that is closed with its test, however that ends."""
    _MADE.append(Pool(host, port, context, keep))
    return _MADE[-1]


@pytest.fixture(autouse=True)
async def closed() -> AsyncIterator[None]:
    """Close what was made."""
    yield
    while _MADE:
        _MADE.pop().close()


@pytest.fixture
async def pool(upstream: ScriptedUpstream) -> Pool:
    """Make the connections to the scripted upstream, which answers briefly."""
    upstream.default = json_answer({})
    return made(HERE, upstream.port, None, LONG)


async def ask(pool: Pool) -> Connection:
    """Ask on one of the pool's connections and read the answer."""
    connection = await pool.acquire()
    connection.send(REQUEST, b"{}", lambda: None)
    await connection.head()
    while await connection.read():
        pass
    return connection


async def gone(request: Recorded) -> None:
    """Wait until the pool closed the connection of a request."""
    async with asyncio.timeout(2):
        await request.closed.wait()


def descriptors() -> int:
    """Count what this process holds open."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are enough


async def settled(before: int) -> None:
    """Wait until no more is open than before."""

    async def holds() -> None:
        assert descriptors() <= before

    await eventually(holds)


# Which one


async def test_the_last_one_used_is_given_out_first(pool: Pool) -> None:
    """So that those that are not needed grow old."""
    first, second, third = [await ask(pool) for _ in "123"]
    for connection in (second, first, third):
        pool.release(connection)
    assert [await pool.acquire() for _ in "123"] == [third, first, second]


async def test_one_connection_serves_many_requests(pool: Pool, upstream: ScriptedUpstream) -> None:
    """What was given back is used again."""
    for _ in range(5):
        pool.release(await ask(pool))
    assert (upstream.accepted, len(upstream.requests)) == (1, 5)


async def test_two_at_once_are_two(pool: Pool, upstream: ScriptedUpstream) -> None:
    """A connection is given to one at a time."""
    assert await ask(pool) is not await ask(pool)
    assert upstream.accepted == 2


async def test_what_was_unused_for_long_is_closed_by_us(upstream: ScriptedUpstream) -> None:
    """Each unused connection is closed after `keep`, and the timer ends with the last."""
    upstream.default = json_answer({})
    pool = made(HERE, upstream.port, None, 0.1)
    held = [await ask(pool) for _ in "123"]
    for connection in held[:2]:
        pool.release(connection)
    await asyncio.sleep(0.05)
    pool.release(held[2])
    for request in upstream.requests:
        await gone(request)
    assert (list(pool._idle), pool._open, pool._sweeper) == ([], set(), None)


async def test_what_is_used_again_is_not_old(pool: Pool) -> None:
    """`keep` begins anew with every use: the timer passes over what was used since it was set."""
    used = await ask(pool)
    pool.release(used)
    pool._idle[0] = (used, pool._idle[0][1] - LONG / 2)
    assert await ask(pool) is used
    pool.release(used)
    assert pool._sweeper is not None
    pool._sweeper.cancel()
    pool._sweep()
    assert pool.count() == (1, 1)
    assert asyncio.get_running_loop().time() - pool._idle[0][1] < LONG / 2
    due = pool._sweeper.when() - pool._idle[0][1]
    assert due == pytest.approx(LONG, abs=0.01)  # the loop counts milliseconds


async def test_what_is_too_old_is_not_given_out(pool: Pool, upstream: ScriptedUpstream) -> None:
    """Not even where the timer has not run yet."""
    old = await ask(pool)
    pool.release(old)
    pool._idle[0] = (old, pool._idle[0][1] - LONG)
    assert await pool.acquire() is not old
    await gone(upstream.requests[0])


@pytest.mark.parametrize("closed", [True, False])
async def test_what_went_wrong_while_unused_is_not_given_out(
    pool: Pool,
    upstream: ScriptedUpstream,
    closed: bool,  # noqa: FBT001
) -> None:
    """One that the upstream closed, or said something on, is let go; the one before it is given."""
    gate = asyncio.Event()
    good = await ask(pool)
    last = Finish() if closed else json_answer({"for": "nobody"})
    upstream.script(json_answer({}), Wait(gate), last if isinstance(last, list) else [last])
    bad = await ask(pool)
    pool.release(good)
    pool.release(bad)
    gate.set()

    async def noticed() -> None:
        assert bad.closed

    await eventually(noticed)
    assert pool.count() == (1, 1)
    assert await pool.acquire() is good
    assert upstream.accepted == 2


async def test_without_keep_none_is_kept(upstream: ScriptedUpstream) -> None:
    """`keep` 0: a connection is closed with its answer."""
    upstream.default = json_answer({})
    pool = made(HERE, upstream.port, None, 0)
    pool.release(await ask(pool))
    assert not pool._idle
    await gone(upstream.requests[0])


async def test_what_comes_back_after_a_reload_is_closed(
    pool: Pool, upstream: ScriptedUpstream
) -> None:
    """A pool that is no more in use closes what is unused, and what comes back to it."""
    unused, used = await ask(pool), await ask(pool)
    pool.release(unused)
    pool.retire()
    await gone(upstream.requests[0])
    states = [used.closed]
    pool.release(used)
    assert [*states, used.closed] == [False, True]
    assert (list(pool._idle), pool._sweeper) == ([], None)


async def test_what_is_not_clean_is_not_kept(pool: Pool, upstream: ScriptedUpstream) -> None:
    """A connection whose answer was not taken, or not all, is closed."""
    upstream.script(Stall())
    connection = await pool.acquire()
    connection.send(REQUEST, b"{}", lambda: None)
    await upstream.wait_request()
    pool.release(connection)
    await gone(upstream.requests[0])
    connection = await pool.acquire()
    connection.send(REQUEST, b"{}", lambda: None)
    await connection.head()
    pool.release(connection)
    await gone(upstream.requests[1])
    assert not pool._idle


async def test_close_closes_all(pool: Pool, upstream: ScriptedUpstream) -> None:
    """What is unused and what is in use; who waits for an answer is told."""
    pool.release(await ask(pool))
    await ask(pool)
    upstream.script(Stall())
    busy = await pool.acquire()
    busy.send(REQUEST, b"{}", lambda: None)
    waiting = asyncio.ensure_future(busy.head())
    await upstream.wait_request(3)
    pool.close()
    async with asyncio.timeout(2):
        with pytest.raises(Failure):
            await waiting
    for request in upstream.requests:
        await gone(request)
    assert (list(pool._idle), pool._sweeper) == ([], None)


async def test_what_was_connecting_at_the_end_is_not_kept(
    pool: Pool, upstream: ScriptedUpstream
) -> None:
    """A connection that is made while the pool closes is nobody's."""
    connecting = asyncio.ensure_future(pool.acquire())
    await asyncio.sleep(0)
    pool.close()
    with pytest.raises(Failure, match="connect"):
        await connecting

    async def none() -> None:
        assert (upstream.connections, pool._open) == (0, set())

    await eventually(none)


async def test_what_is_closed_at_once_is_forgotten(upstream: ScriptedUpstream) -> None:
    """A server that accepts and closes leaves nothing behind in the pool."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), HERE, 0)
    pool = made(HERE, server.sockets[0].getsockname()[1], None, LONG)
    before = descriptors()
    for _ in range(30):
        pool.release(await pool.acquire())

    async def forgotten() -> None:
        assert (pool._open, [c for c, _ in pool._idle if not c.closed]) == (set(), [])

    await eventually(forgotten)
    await settled(before)
    server.close()


# Where to


class Resolver:
    """A stand-in for `loop.getaddrinfo`: waits for `gate`, counts, and gives what it is told."""

    def __init__(self, patch: pytest.MonkeyPatch, *found: tuple[str, int]) -> None:
        self.calls: list[tuple[str, int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: OSError | None = None
        self.found = found
        loop = asyncio.get_running_loop()
        self._real = loop.getaddrinfo
        patch.setattr(loop, "getaddrinfo", self.look_up)

    async def look_up(self, host: Any, port: Any, **options: Any) -> Sequence[Any]:
        """Look a name up; the event loop itself may ask for addresses."""
        if host != NAME:
            return await self._real(host, port, **options)
        self.calls.append((host, port))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        tcp = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*tcp, address) for address in self.found]


async def test_many_wait_for_one_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty at once are one look-up; one of them that leaves leaves it to the others."""
    resolver = Resolver(monkeypatch, (HERE, 1))
    resolver.gate.clear()
    addresses = Addresses(NAME, 1)
    waiting = [asyncio.ensure_future(addresses.get()) for _ in range(20)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    late = asyncio.ensure_future(addresses.get())
    await asyncio.sleep(0)
    resolver.gate.set()
    found = [await waiter for waiter in (*waiting[1:], late)]
    assert {each[0][4] for each in found} == {(HERE, 1)}
    assert resolver.calls == [(NAME, 1)]


async def test_a_look_up_that_all_have_left_is_there_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A slow resolver whose first asker gave up is not asked again."""
    resolver = Resolver(monkeypatch, (HERE, 1))
    resolver.gate.clear()
    addresses = Addresses(NAME, 1)
    waiting = asyncio.ensure_future(addresses.get())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    late = asyncio.ensure_future(addresses.get())
    await asyncio.sleep(0)
    resolver.gate.set()
    assert (await late)[0][4] == (HERE, 1)
    assert len(resolver.calls) == 1


async def test_a_result_is_used_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """For RESOLVED seconds a name is not looked up again; then it is, and the new result holds."""
    resolver = Resolver(monkeypatch, (HERE, 1))
    addresses = Addresses(NAME, 1)
    for _ in "123":
        assert (await addresses.get())[0][4] == (HERE, 1)
    assert len(resolver.calls) == 1
    left = addresses._until - asyncio.get_running_loop().time()
    assert 0 < left <= upstream_pool.RESOLVED
    addresses._until -= upstream_pool.RESOLVED
    resolver.found = ((HERE, 2),)
    for _ in "123":
        assert (await addresses.get())[0][4] == (HERE, 2)
    assert len(resolver.calls) == 2


async def test_a_failure_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that does not resolve is NO_NAME to all who wait, and is looked up again after."""
    resolver = Resolver(monkeypatch, (HERE, 1))
    resolver.error = socket.gaierror(socket.EAI_NONAME, "no")
    pool = made(NAME, 1, None, LONG)
    for _ in "12":
        failures = await asyncio.gather(pool.acquire(), pool.acquire(), return_exceptions=True)
        assert [str(each) for each in failures] == [str(Failure("connect", NO_NAME))] * 2
    assert len(resolver.calls) == 2
    resolver.error = None
    assert (await pool._addresses.get())[0][4] == (HERE, 1)


@pytest.mark.parametrize("host", [HERE, "::1"])
async def test_an_address_needs_no_resolver(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """It is where it says, for ever."""
    resolver = Resolver(monkeypatch)
    addresses = Addresses(host, 80)
    ((*_, address),) = await addresses.get()
    assert (address[:2], addresses._until) == ((host, 80), float("inf"))
    assert resolver.calls == []


@pytest.mark.parametrize("host", ["a" * 64 + ".invalid", "x..invalid"])
async def test_a_name_that_dns_cannot_carry_is_no_name(host: str) -> None:
    """Such a name fails when it is asked for, not when the daemon starts."""
    with pytest.raises(Failure) as raised:
        await made(host, 80, None, LONG).acquire()
    assert raised.value.message == NO_NAME


async def test_who_waits_at_the_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """`close` while a name is looked up is a failure to connect, not a cancellation of the asker.

    Nobody cancelled that task: were it one of a group, the group would take it for done.
    """
    Resolver(monkeypatch).gate.clear()
    pool = made(NAME, 1, None, LONG)
    waiting = asyncio.ensure_future(pool.acquire())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    pool.close()
    with pytest.raises(Failure):
        await waiting


async def test_who_is_cancelled_at_the_end_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancellation of the asker stays one, though the look-up was given up, too."""
    Resolver(monkeypatch).gate.clear()
    addresses = Addresses(NAME, 1)
    waiting = asyncio.ensure_future(addresses.get())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    addresses.close()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


def unused() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as sock:
        sock.bind((HERE, 0))
        return int(sock.getsockname()[1])


@asynccontextmanager
async def listening(serve: Serving, **options: Any) -> AsyncIterator[int]:
    """Listen, on 127.0.0.2 alone."""
    server = await asyncio.start_server(serve, "127.0.0.2", 0, **options)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer once, and close after the client."""
    await reader.readuntil(b"{}")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    await reader.read()
    writer.close()


async def test_a_dead_address_falls_over_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with a refused address and a good one is reached by the good one."""
    async with listening(answer) as port:
        Resolver(monkeypatch, (HERE, unused()), ("127.0.0.2", port))
        pool = made(NAME, port, None, LONG)
        pool.release(await ask(pool))
        assert pool.count() == (1, 1)
        pool.close()


async def test_a_silent_address_falls_over_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address whose packets are lost costs NEXT_ADDRESS, not the whole timeout."""
    with socket.socket() as full, socket.socket() as one, socket.socket() as two:
        full.bind((HERE, 0))
        full.listen(0)  # its queue holds one, and what comes then gets no answer
        for sock in (one, two):
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        async with listening(answer) as port:
            Resolver(monkeypatch, full.getsockname(), ("127.0.0.2", port))
            pool = made(NAME, port, None, LONG)
            before = descriptors()
            async with asyncio.timeout(upstream_pool.NEXT_ADDRESS + 2):
                connection = await ask(pool)
            connection.abort()
            await settled(before)


async def test_no_address_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name whose addresses all refuse is REFUSED."""
    before = descriptors()
    Resolver(monkeypatch, (HERE, unused()), ("127.0.0.2", unused()))
    with pytest.raises(Failure) as raised:
        await made(NAME, 1, None, LONG).acquire()
    assert (raised.value.result, raised.value.message) == ("connect", REFUSED)
    await settled(before)


# TLS


def contexts(folder: Path, name: str = NAME) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Make a server's context for a name, and a client's that trusts its authority."""
    authority = issue(name="authority.invalid", authority=True)
    (folder / "ca.pem").write_bytes(authority.pem())
    return issue(authority, name=name).context(folder), tls(folder / "ca.pem")


@pytest.mark.parametrize("host", [NAME, "127.0.0.2"])
async def test_what_a_hello_says(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """It offers exactly http/1.1, and names the upstream unless that is an address."""
    hello = asyncio.get_running_loop().create_future()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello.set_result(await reader.read(2**14))
        writer.close()

    async with listening(listen) as port:
        Resolver(monkeypatch, ("127.0.0.2", port))
        with pytest.raises(Failure) as raised:
            await made(host, port, tls(None), LONG).acquire()
        assert raised.value.result == "connect"
        raw = await hello
    offer = b"\x08http/1.1"
    assert b"\x00\x10" + b"\x00\x0b\x00\x09" + offer in raw
    assert (NAME.encode() in raw) is (host == NAME)
    assert b"127.0.0.2" not in raw


@pytest.mark.parametrize("name", [NAME, "other.invalid"])
async def test_the_certificate_must_be_the_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """A certificate of our own authority for another name is refused, before a byte is sent."""
    server, client = contexts(tmp_path, name)
    server.set_alpn_protocols(["h2", "http/1.1"])
    async with listening(answer, ssl=server) as port:
        before = descriptors()
        Resolver(monkeypatch, ("127.0.0.2", port))
        pool = made(NAME, port, client, LONG)
        if name != NAME:
            with pytest.raises(Failure) as raised:
                await pool.acquire()
            assert raised.value.message == UNTRUSTED
        else:
            connection = await ask(pool)
            transport = connection._transport
            assert transport is not None
            chosen = transport.get_extra_info("ssl_object").selected_alpn_protocol()
            assert chosen == "http/1.1"
            pool.release(connection)
            assert await pool.acquire() is connection
        pool.close()
        await settled(before)


@pytest.mark.parametrize("whole", [True, False])
async def test_tls_that_is_cut_is_no_end(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    whole: bool,  # noqa: FBT001
) -> None:
    """A body until close is whole with a close_notify alone (RFC 9112 section 9.8)."""
    taken = asyncio.Event()

    async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhalf an answer")
        await taken.wait()
        if whole:
            writer.close()
        else:
            writer.transport.abort()  # FIN alone

    server, client = contexts(tmp_path)
    async with listening(end, ssl=server) as port:
        Resolver(monkeypatch, ("127.0.0.2", port))
        connection = await made(NAME, port, client, LONG).acquire()
        connection.send(REQUEST, b"{}", lambda: None)
        assert await connection.read() == b"half an answer"
        taken.set()
        if whole:
            assert await connection.read() == b""
        else:
            with pytest.raises(Failure) as raised:
                await connection.read()
            assert raised.value.message == BROKE_OFF
        connection.abort()


@pytest.mark.parametrize("way", ["plain", "TLS", "two addresses", "TLS that hangs"])
async def test_who_gives_up_connecting_leaves_no_socket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    """Cancelled at any step: of the look-up, of the connect, of the handshake."""
    server, client = contexts(tmp_path)
    secure = server if way == "TLS" else None

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(2**16):  # whatever comes is no answer's beginning
            pass
        writer.close()

    served = hang if way == "TLS that hangs" else answer
    async with listening(served, ssl=secure) as port:
        dead = [(HERE, unused())] if way == "two addresses" else []
        resolver = Resolver(monkeypatch, *dead, ("127.0.0.2", port))
        context = client if way.startswith("TLS") else None
        before = descriptors()
        finished = 0
        for steps in range(40):
            pool = made(NAME, port, context, LONG)
            connecting = asyncio.ensure_future(pool.acquire())
            for _ in range(steps):
                await asyncio.sleep(0)
            finished += connecting.done()
            connecting.cancel()
            (end,) = await asyncio.gather(connecting, return_exceptions=True)
            if isinstance(end, Connection):
                end.abort()
            else:
                assert isinstance(end, asyncio.CancelledError), end
        assert resolver.calls
        assert way == "plain" or finished < 40
        await settled(before)
