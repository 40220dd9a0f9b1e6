"""The request's body: received in time and within bounds, and inflated."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp.http import HttpVersion11
from aiohttp.web_protocol import RequestPayloadError

from aiproxy import errors
from aiproxy.coding import CODINGS, Decoder, UndecodableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiohttp.web_request import BaseRequest

_SLICE = 1 << 18  # bytes inflated at a time: a copy of so many holds nobody up

# Bodies that are inflated by turns: what a decoder keeps for itself is megabytes, and not counted.
_AT_ONCE = 6


class Buffered:
    """Bytes of request bodies in memory, of all requests together.

    Attributes:
        place: of each body that is being inflated; there are few.
        turn: of these one has a slice at a time, so that bombs take one processor at most, and a
            small body still comes through between their slices.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.place = asyncio.Semaphore(_AT_ONCE)
        self.turn = asyncio.Lock()

    def take(self, size: int) -> None:
        """Account for `size` more bytes.

        Raises:
            ProxyError: they would exceed the limit; nothing is taken.
        """
        if self.held + size > self.limit:
            raise errors.overloaded("too many request bodies in memory")
        self.held += size


class Hold:
    """One request's share of `Buffered`; given back once, whatever happens."""

    __slots__ = ("_brought", "_buffered", "size")

    def __init__(self, buffered: Buffered) -> None:
        self._buffered = buffered
        self._brought = 0
        self.size = 0

    @property
    def place(self) -> asyncio.Semaphore:
        """See `Buffered`."""
        return self._buffered.place

    @property
    def turn(self) -> asyncio.Lock:
        """See `Buffered`."""
        return self._buffered.turn

    def take(self, size: int) -> None:
        """See `Buffered.take`."""
        self._buffered.take(size)
        self.size += size

    def bring(self, size: int) -> None:
        """See `Buffered.take`; of what each attempt brings in anew the most counts."""
        if size > self._brought:
            self.take(size - self._brought)
            self._brought = size

    def release(self, but: int = 0) -> None:
        """Give all of it back, but for these bytes."""
        kept = min(but, self.size)
        self._buffered.held -= self.size - kept
        self.size = kept


async def receive(request: BaseRequest, hold: Hold, limit: int) -> bytes:
    """The body, decompressed, of at most `limit` bytes before and after.

    A client that waits for `100 Continue` gets it here: nothing before has asked for the body.

    Raises:
        ProxyError: too large, not decodable, an unknown encoding, broken framing, no memory.
    """
    encoding = ",".join(request.headers.getall("Content-Encoding", [])).strip().lower()
    if encoding not in CODINGS and encoding not in ("", "identity"):
        raise errors.unsupported_content_encoding(encoding)
    expect = request.headers.get("Expect")  # if any it is 100-continue
    declared = request.content_length
    if declared is not None and declared > limit:
        raise errors.request_too_large(limit)
    waits = expect is not None and request.version >= HttpVersion11  # RFC 9110 section 10.1.1
    if waits and request.transport is not None and not request.content.is_eof():
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    chunks: list[bytes] = []
    size = 0
    try:
        while chunk := await request.content.readany():
            size += len(chunk)
            if size > limit:
                raise errors.request_too_large(limit)
            hold.take(len(chunk))
            chunks.append(chunk)
    except RequestPayloadError:
        raise errors.invalid_http("The request body is not well-formed HTTP/1.1.") from None
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    if encoding in CODINGS:
        async with hold.place:
            body = await _inflated(body, encoding, hold, limit)
    return body


async def _inflated(body: bytes, coding: str, hold: Hold, limit: int) -> bytes:
    """The body decoded, in a thread: it may take tens of milliseconds.

    Each slice is accounted for as it comes: many bodies that grow at once are not in memory unseen.
    """
    loop = asyncio.get_running_loop()
    slices = inflate(body, coding, limit)
    out: list[bytes] = []
    while True:
        async with hold.turn:
            piece = await loop.run_in_executor(None, next, slices, b"")
        if not piece:
            return b"".join(out)
        hold.take(len(piece))
        out.append(piece)


def inflate(body: bytes, coding: str, limit: int) -> Iterator[bytes]:
    """The slices of a body, decoded; none is empty.

    Raises:
        ProxyError: it does not decode, is not complete, or grows beyond `limit` bytes.
    """
    decoder = Decoder(coding)
    decoder.feed(body)
    size = 0
    try:
        while piece := decoder.take(_SLICE):
            size += len(piece)
            if size > limit:
                raise errors.request_too_large(limit)
            yield piece
    except UndecodableError:
        raise errors.undecodable_body(coding) from None
    if not decoder.complete:
        raise errors.undecodable_body(coding)
