"""The connections to one upstream: made, kept while idle, given out only when clean.

An upstream may answer before it has read the whole request, or say something unasked on an idle
connection. The next request there would go out behind the rest of the last one, or be given an
answer that is not its own: another client's.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from functools import cache, partial
from typing import TYPE_CHECKING

from aiohappyeyeballs import start_connection

from aiproxy.upstream_connection import Connection
from aiproxy.upstream_errors import NO_NAME, REFUSED, UNTRUSTED, Failure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from aiohappyeyeballs import AddrInfoType

RECEIVE_BUFFER = 256 * 1024  # bytes in the kernel per upstream connection
NEXT_ADDRESS = 0.25  # seconds until another address is tried beside (RFC 8305 section 5)
RESOLVED = 10.0  # seconds for which a name's addresses are known


def _socket(address: AddrInfoType) -> socket.socket:
    """A socket whose kernel buffer does not grow to megabytes while its client is slow."""
    family, kind, proto, *_ = address
    made = socket.socket(family, kind, proto)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def tls(authority: Path | None) -> ssl.SSLContext:
    """What an upstream's certificate is checked against: a file of authorities, or the system's."""
    return _context(authority) if authority else _of_the_system()


@cache
def _of_the_system() -> ssl.SSLContext:
    return _context(None)  # tens of milliseconds, hence once


def _context(authority: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority)
    context.set_alpn_protocols(["http/1.1"])
    return context


class Addresses:
    """Where a host is: one look-up at a time, and its result for a while.

    A look-up cannot be ended, so those who give it up leave it to those who come.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._known: Sequence[AddrInfoType] = _numeric(host, port)
        self._until = float("inf") if self._known else float("-inf")
        self._lookup: asyncio.Task[Sequence[AddrInfoType]] | None = None

    async def get(self) -> Sequence[AddrInfoType]:
        """The host's addresses, in the order of the resolver.

        Raises:
            OSError: there are none.
        """
        loop = asyncio.get_running_loop()
        if loop.time() < self._until:
            return self._known
        if self._lookup is None:
            self._lookup = loop.create_task(self._look_up(loop))
            self._lookup.add_done_callback(self._looked_up)
        lookup = self._lookup
        try:
            return await asyncio.shield(lookup)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if lookup.cancelled() and (task is None or not task.cancelling()):
                raise OSError("given up") from None  # not the asker was cancelled
            raise

    async def _look_up(self, loop: asyncio.AbstractEventLoop) -> Sequence[AddrInfoType]:
        return await loop.getaddrinfo(
            self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
        )

    def _looked_up(self, lookup: asyncio.Task[Sequence[AddrInfoType]]) -> None:
        self._lookup = None
        if not lookup.cancelled() and lookup.exception() is None:
            self._known = lookup.result()
            self._until = lookup.get_loop().time() + RESOLVED

    def close(self) -> None:
        """Whoever is looking up stops waiting."""
        if self._lookup is not None:
            self._lookup.cancel()


def _numeric(host: str, port: int) -> Sequence[AddrInfoType]:
    """What a host that is an address resolves to, without a resolver; nothing for a name."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (socket.gaierror, UnicodeError):  # the latter: a label that DNS cannot carry
        return ()


class Pool:
    """The connections to one host and port.

    Args:
        context: for TLS, whose certificate must be `host`'s; None: plain.
        keep: seconds for which an unused connection is kept; 0: not at all.
    """

    def __init__(self, host: str, port: int, context: ssl.SSLContext | None, keep: float) -> None:
        self._host = host
        self._context = context
        self._keep = keep
        self._addresses = Addresses(host, port)
        self._open: set[Connection] = set()
        self._idle: deque[tuple[Connection, float]] = deque()  # the longest unused one first
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<Pool {self._host} open={len(self._open)} idle={len(self._idle)}>"

    async def acquire(self) -> Connection:
        """A connection on which nothing is left over: the last one used, else a new one.

        Raises:
            Failure: there is none to be had.
        """
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection, since = self._idle.pop()
            if connection.clean and now - since < self._keep:
                return connection
            connection.abort()
        try:
            return await self._connect()
        except (socket.gaierror, UnicodeError):  # the latter: a label that DNS cannot carry
            raise Failure("connect", NO_NAME) from None
        except ssl.SSLError:
            raise Failure("connect", UNTRUSTED) from None
        except (OSError, RuntimeError):  # the latter: a socket that the event loop cannot take
            raise Failure("connect", REFUSED) from None

    def release(self, connection: Connection) -> None:
        """Take a connection back: keep it if it is clean, else close it."""
        if not self._keep or not connection.clean:
            connection.abort()
            return
        connection.rest()
        loop = asyncio.get_running_loop()
        self._idle.append((connection, loop.time()))
        if self._sweeper is None:
            self._sweeper = loop.call_later(self._keep, self._sweep)

    def retire(self) -> None:
        """Close what is unused, and keep nothing from now on."""
        self._keep = 0
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        while self._idle:
            self._idle.pop()[0].abort()

    def close(self) -> None:
        """Close all connections, those in use too."""
        self._closed = True
        self._addresses.close()
        self.retire()
        for connection in list(self._open):
            connection.abort()

    def count(self) -> tuple[int, int]:
        """How many connections there are, and how many of them are unused."""
        return len(self._open), sum(not connection.closed for connection, _ in self._idle)

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        found = await start_connection(
            await self._addresses.get(),
            happy_eyeballs_delay=NEXT_ADDRESS,
            interleave=1,
            socket_factory=_socket,
        )
        try:
            _, connection = await loop.create_connection(
                partial(Connection, loop, self._open.discard),
                sock=found,
                ssl=self._context,
                server_hostname=self._host if self._context else None,
            )
        except BaseException:
            found.close()
            raise
        if self._closed:
            connection.abort()
            raise Failure("connect", REFUSED)
        self._open.add(connection)
        return connection

    def _sweep(self) -> None:
        """Close what was unused for too long, before the upstream does."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._sweeper = None
        while self._idle:
            connection, since = self._idle[0]
            if not connection.closed and now < since + self._keep:
                self._sweeper = loop.call_at(since + self._keep, self._sweep)
                return
            self._idle.popleft()
            connection.abort()
