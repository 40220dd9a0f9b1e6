"""A client on a raw socket, and a reader of server-sent events of its own.

Both are strict where SDKs are lenient: a body that lacks its last chunk is an error, and the
arrival of every chunk can be seen.
"""

import asyncio
import json
import re
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

_LINGER_OFF = struct.pack("ii", 1, 0)
_STATUS_LINE = re.compile(r"HTTP/1\.1 (\d{3}) [ -~]*")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,8}\r\n")

Fields = Mapping[str, str] | Sequence[tuple[str, str]]


class ProtocolError(Exception):
    """What came is no HTTP/1.1."""


class IncompleteBody(Exception):  # noqa: N818 - it says what is the matter with the body
    """The connection ended before the body did; `partial` is what came of it."""

    def __init__(self, partial: bytes) -> None:
        super().__init__(f"the body ends after {len(partial)} bytes")
        self.partial = partial


class Head(NamedTuple):
    """Status and header fields of an answer, as sent."""

    status: int
    headers: list[tuple[str, str]]

    def header(self, name: str) -> str | None:
        """Return the first value of a field, None if it did not come."""
        return next((v for n, v in self.headers if n.lower() == name.lower()), None)


class Answer(NamedTuple):
    """A whole answer; the names of `headers` are lower case, the last of a name counts."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)

    def events(self) -> "list[tuple[str, str]]":
        """Return the body as server-sent events."""
        return parse_sse(self.body)


class RawClient:
    """One connection, by hand. Make it with `await RawClient.connect(port)`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._method = "GET"
        self._head = Head(0, [])
        self._left: int | None = 0  # bytes of a body with a length, None: until the close
        self._chunked = False
        self._ended = True  # nothing of a body is left

    @classmethod
    async def connect(
        cls,
        port: int,
        host: str = "127.0.0.1",
        *,
        rcvbuf: int | None = None,
        limit: int = 2**16,
    ) -> Self:
        """Connect; `rcvbuf` must be small here already to keep the TCP window small.

        At most about twice `limit` bytes are taken from the kernel unasked.
        """
        sock = socket.socket()
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if rcvbuf is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
            await asyncio.get_running_loop().sock_connect(sock, (host, port))
            reader, writer = await asyncio.open_connection(sock=sock, limit=limit)
        except BaseException:
            sock.close()
            raise
        return cls(reader, writer)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    def set_rcvbuf(self, n: int) -> None:
        """Set the kernel's receive buffer, in bytes."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, n)

    def pause(self) -> None:
        """Take nothing more from the kernel until the next read."""
        reader: Any = self.reader
        if not reader._paused:  # its own flag: so that the next read resumes
            reader._transport.pause_reading()
            reader._paused = True

    async def send(self, data: bytes) -> None:
        """Send these bytes as they are."""
        self.writer.write(data)
        await self.writer.drain()

    async def request(
        self,
        method: str,
        path: str,
        headers: Fields = (),
        body: bytes | None = None,
    ) -> None:
        """Send a request; Host and, with a body, Content-Length are added where not given."""
        pairs = list(headers.items() if isinstance(headers, Mapping) else headers)
        names = {name.lower() for name, _ in pairs}
        if "host" not in names:
            pairs.insert(0, ("host", "127.0.0.1"))
        if body is not None and not names & {"content-length", "transfer-encoding"}:
            pairs.append(("content-length", str(len(body))))
        self._method = method
        lines = [f"{method} {path} HTTP/1.1", *(f"{n}: {v}" for n, v in pairs), "", ""]
        await self.send("\r\n".join(lines).encode("latin-1") + (body or b""))

    async def read_head(self) -> Head:
        """Read the next head, of a 1xx answer too; raise ProtocolError if it is none."""
        try:
            raw = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            raise IncompleteBody(error.partial) from error
        first, *lines = raw[:-4].decode("latin-1").split("\r\n")
        status = _STATUS_LINE.fullmatch(first)
        if status is None or any(not re.match(r"[!-9;-~]+:", line) for line in lines):
            raise ProtocolError(raw)
        pairs = [line.split(":", 1) for line in lines]
        self._head = Head(int(status[1]), [(n, v.strip(" \t")) for n, v in pairs])
        self._begin_body()
        return self._head

    def _begin_body(self) -> None:
        head = self._head
        length, coding = head.header("content-length"), head.header("transfer-encoding")
        if length is not None and coding is not None:
            raise ProtocolError("both Content-Length and Transfer-Encoding")
        bare = self._method == "HEAD" or head.status < 200 or head.status in {204, 304}
        self._chunked = not bare and coding is not None
        self._left = 0 if bare else None if length is None else int(length)
        self._ended = bare or length == "0"

    async def read_chunk(self) -> tuple[bytes, float]:
        """Return one chunk and the loop time of its arrival; an empty one ends the body."""
        if not self._chunked:
            raise ProtocolError("the body is not chunked")
        data = b"" if self._ended else await self._chunk()
        return data, asyncio.get_running_loop().time()

    async def _chunk(self) -> bytes:
        data = b""
        try:
            line = await self.reader.readuntil(b"\r\n")
            if not _CHUNK_SIZE.fullmatch(line):
                raise ProtocolError(line)
            size = int(line, 16)
            if size:
                data = await self.reader.readexactly(size)
            if await self.reader.readexactly(2) != b"\r\n":
                raise ProtocolError("a chunk or the last chunk does not end where it said")
        except asyncio.IncompleteReadError as error:
            raise IncompleteBody(data or error.partial) from error
        self._ended = not size
        return data

    async def _piece(self) -> bytes:
        """Return some more bytes of the body, none at its end."""
        if self._ended:
            return b""
        if self._chunked:
            return await self._chunk()
        data = await self.reader.read(2**16 if self._left is None else min(self._left, 2**16))
        if self._left is not None:
            if not data:
                raise IncompleteBody(b"")
            self._left -= len(data)
        self._ended = not data or self._left == 0
        return data

    async def read_until(self, needle: bytes) -> bytes:
        """Return the body up to the chunk in which it is seen; IncompleteBody if it never is."""
        body = b""
        while needle not in body:
            try:
                piece = await self._piece()
            except IncompleteBody as error:
                raise IncompleteBody(body + error.partial) from None
            if not piece:
                raise IncompleteBody(body)
            body += piece
        return body

    async def read_body(self) -> bytes:
        """Return the rest of the body; raise IncompleteBody if the connection ends before it."""
        pieces = []
        try:
            while piece := await self._piece():
                pieces.append(piece)
        except IncompleteBody as error:
            raise IncompleteBody(b"".join(pieces) + error.partial) from None
        return b"".join(pieces)

    async def answer(self) -> Answer:
        """Read a whole answer, past any 1xx."""
        while (head := await self.read_head()).status < 200:
            pass
        fields = {name.lower(): value for name, value in head.headers}
        return Answer(head.status, fields, await self.read_body())

    def half_close(self) -> None:
        """Close the sending side alone."""
        self.writer.write_eof()

    def abort(self) -> None:
        """Close with RST."""
        if self.writer.is_closing():
            return
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_OFF)
        self.writer.transport.abort()

    async def close(self) -> None:
        """Close with FIN, whatever state the connection is in."""
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            pass


def parse_sse(stream: bytes) -> list[tuple[str, str]]:
    """Return (event, data) of each complete event, by the WHATWG's algorithm.

    https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
    """
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]
    events: list[tuple[str, str]] = []
    kind, data = "", ""
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                events.append((kind or "message", data.removesuffix("\n")))
            kind, data = "", ""
        elif name == "event":
            kind = value
        elif name == "data":
            data += value + "\n"
    return events
