"""The request's body: received in time and within bounds, and inflated."""

from __future__ import annotations

import asyncio
import sys
import zlib
from typing import TYPE_CHECKING, Protocol

import brotli  # type: ignore[import-untyped] # it has no stubs
from aiohttp.http import HttpVersion11
from aiohttp.web_protocol import RequestPayloadError

from aiproxy import errors

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from aiohttp.web_request import BaseRequest

ENCODINGS = frozenset({"gzip", "deflate", "br", "zstd"})
_SLICE = 1 << 20  # bytes inflated at a time


class Buffered:
    """Bytes of request bodies in memory, of all requests together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

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

    __slots__ = ("_buffered", "size")

    def __init__(self, buffered: Buffered) -> None:
        self._buffered = buffered
        self.size = 0

    def take(self, size: int) -> None:
        """See `Buffered.take`."""
        self._buffered.take(size)
        self.size += size

    def release(self) -> None:
        """Give all of it back."""
        self._buffered.held -= self.size
        self.size = 0


async def receive(request: BaseRequest, hold: Hold, limit: int) -> bytes:
    """The body, decompressed, of at most `limit` bytes before and after.

    A client that waits for `100 Continue` gets it here: nothing before has asked for the body.

    Raises:
        ProxyError: too large, not decodable, an unknown encoding, broken framing, no memory.
    """
    encoding = ",".join(request.headers.getall("Content-Encoding", [])).strip().lower()
    if encoding not in ENCODINGS and encoding not in ("", "identity"):
        raise errors.unsupported_content_encoding(encoding)
    expect = request.headers.get("Expect")
    if expect is not None and expect.strip().lower() != "100-continue":
        raise errors.unknown_expectation()
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
    if encoding in ENCODINGS:
        loop = asyncio.get_running_loop()
        body = await loop.run_in_executor(None, inflate, body, encoding, limit)
        hold.take(len(body))
    return body


class _Decompressor(Protocol):
    def decompress(self, data: bytes, limit: int, /) -> bytes: ...
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...


class _Zlib:
    """gzip and deflate; the latter with or without its zlib head, as clients differ."""

    def __init__(self, wbits: int) -> None:
        self._inner = zlib.decompressobj(wbits)

    def decompress(self, data: bytes, limit: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, limit)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


class _Brotli:
    def __init__(self) -> None:
        self._inner = brotli.Decompressor()

    def decompress(self, data: bytes, limit: int) -> bytes:
        return bytes(self._inner.process(data, output_buffer_limit=limit))

    @property
    def eof(self) -> bool:
        return bool(self._inner.is_finished())

    @property
    def unused_data(self) -> bytes:
        return b""


def _decompressor(encoding: str, body: bytes) -> _Decompressor:
    if encoding == "gzip":
        return _Zlib(zlib.MAX_WBITS | 16)
    if encoding == "deflate":
        has_head = len(body) > 1 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0  # noqa: PLR2004 - RFC 1950
        return _Zlib(zlib.MAX_WBITS if has_head else -zlib.MAX_WBITS)
    if encoding == "br":
        return _Brotli()
    return zstd.ZstdDecompressor()


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """The body decoded; runs in a thread, since it may take tens of milliseconds.

    Raises:
        ProxyError: it does not decode, is not complete, or grows beyond `limit` bytes. What grows
            is never held beyond the limit and one slice.
    """
    out: list[bytes] = []
    size = 0
    rest = body
    try:
        while rest:  # gzip and zstd allow several members in a row
            decompressor = _decompressor(encoding, rest)
            data = rest
            while not decompressor.eof:
                piece = decompressor.decompress(data, _SLICE)
                if not piece and not data and not decompressor.eof:
                    raise errors.undecodable_body(encoding)
                data = b""
                size += len(piece)
                if size > limit:
                    raise errors.request_too_large(limit)
                out.append(piece)
            rest = decompressor.unused_data
            if rest and encoding not in ("gzip", "zstd"):
                raise errors.undecodable_body(encoding)
    except (zlib.error, brotli.error, zstd.ZstdError):
        raise errors.undecodable_body(encoding) from None
    return b"".join(out)
