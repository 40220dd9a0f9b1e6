"""The answer to a client, as it is written: its end is ours to give or to withhold.

aiohttp's responses end a body on their own, also after a failure, and name their server. Here a
body without its last chunk is a decision, and nothing is sent that is not said.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import HttpVersion11

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable

    from aiohttp.web_request import BaseRequest

PHRASES = {status.value: status.phrase for status in HTTPStatus}


class Reply:
    """The answer to one request, written straight to the client's transport.

    It stands in for aiohttp's StreamResponse: its `prepare` and `write_eof` find all done. Nothing
    here awaits but `drain`, so a timer can begin an answer, too.

    Writing to a client that is gone raises ConnectionResetError.
    """

    __slots__ = (
        "_chunked",
        "_head_only",
        "_request",
        "bytes_out",
        "ended",
        "keep_alive",
        "started",
    )

    def __init__(self, request: BaseRequest) -> None:
        self._request = request
        self._head_only = request.method == "HEAD"
        self._chunked = False
        self.keep_alive = request.keep_alive and not _is_last(request)
        self.started = False
        self.ended = False
        self.bytes_out = 0  # of the body

    def start(self, status: int, headers: Iterable[tuple[str, str]]) -> None:
        """Write the head of a body that ends with a last chunk, or with the connection (1.0)."""
        self._transport().write(self._head(status, headers, None))

    def send(self, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> None:
        """Write the whole answer, at once."""
        head = self._head(status, headers, len(body))
        self.ended = True
        if self._head_only:
            body = b""
        self.bytes_out = len(body)
        self._transport().write(head + body)

    def _head(self, status: int, headers: Iterable[tuple[str, str]], length: int | None) -> bytes:
        http11 = self._request.version >= HttpVersion11
        lines = [
            # Our own version, whatever the request's was (RFC 9110 section 6.2).
            f"HTTP/1.1 {status} {PHRASES.get(status, 'Unknown')}",
            *(f"{name}: {value}" for name, value in headers),
            f"Date: {rfc822_formatted_time()}",
        ]
        if length is not None:
            lines.append(f"Content-Length: {length}")
        elif http11:
            self._chunked = True
            lines.append("Transfer-Encoding: chunked")
        else:
            self.keep_alive = False
        if not self.keep_alive:
            lines.append("Connection: close")
            if "Expect" in self._request.headers:
                # A client that waits for `100 Continue` sends no body to linger for.
                self._request.protocol._lingering_time = 0.0  # noqa: SLF001 - the runner has no other way
        elif not http11:
            lines.append("Connection: keep-alive")
        self.started = True
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def write(self, data: bytes) -> None:
        """Write a part of the body, at once."""
        if not data or self._head_only:
            return
        self.bytes_out += len(data)
        self._transport().write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def end(self) -> None:
        """End the body properly."""
        if self.ended:
            return
        self.ended = True
        if self._chunked and not self._head_only:
            self._transport().write(b"0\r\n\r\n")

    def abandon(self) -> None:
        """Leave the body without its end: the client must see that it was cut."""
        self.ended = True
        self.keep_alive = False
        if self.started and not self._chunked:
            self.abort()  # where the end of the connection is the end of the body

    def abort(self) -> None:
        """Drop the connection with all that waits to be sent."""
        self.ended = True
        self.keep_alive = False
        if (transport := self._request.transport) is not None:
            sock = transport.get_extra_info("socket")
            if sock is not None:  # else the kernel would keep what waits, and try for minutes
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()

    @property
    def gone(self) -> bool:
        """Whether the client has left."""
        transport = self._request.transport
        return transport is None or transport.is_closing()

    @property
    def blocked(self) -> bool:
        """Whether data waits for the client to read."""
        return self._request.protocol.writing_paused

    async def drain(self) -> None:
        """Wait until the client has taken enough to be sent more."""
        if self._request.protocol.writing_paused:
            await self._request.protocol._drain_helper()  # noqa: SLF001 - aiohttp's own flow control

    def unsent(self) -> int:
        """Bytes that the client has not taken: in the process and in the kernel (tcp(7))."""
        transport = self._request.transport
        if transport is None:
            return 0
        waiting = transport.get_write_buffer_size()
        sock = transport.get_extra_info("socket")
        if sock is None:
            return waiting
        try:
            queued = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
        except OSError:
            return waiting
        return waiting + int(struct.unpack("i", queued)[0])

    def _transport(self) -> asyncio.WriteTransport:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        return transport

    # What aiohttp asks of a response.

    async def prepare(self, request: BaseRequest) -> None:
        """All is written already."""

    async def write_eof(self) -> None:
        """All is written already."""


def _is_last(request: BaseRequest) -> bool:
    """Whether no other request may follow on the connection, whatever the client asked for.

    aiohttp's parser (3.14) takes the trailer fields of a request in chunks for header fields of the
    next one, and drops what follows an offer to upgrade.
    """
    return "Transfer-Encoding" in request.headers or "Upgrade" in request.headers
