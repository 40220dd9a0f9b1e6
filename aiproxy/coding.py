"""Content codings (RFC 9110 section 8.4.1): gzip, deflate, br, zstd -> bytes, a piece at a time.

`Decoder.take` returns at most about what is asked for, so what a bomb grows to is never held.
"""

from __future__ import annotations

import sys
import zlib
from typing import Protocol

import brotli  # type: ignore[import-untyped] # it has no stubs

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CODINGS = frozenset({"gzip", "deflate", "br", "zstd"})
_IN_A_ROW = frozenset({"gzip", "zstd"})  # these allow several members, one after another
_ZLIB_HEAD = 2  # bytes
_SLICE = 16 * 1024  # bytes shown to a decompressor at a time
MAX_MEMBERS = 10_000  # many that hold nothing are a bomb, too


class UndecodableError(ValueError):
    """The bytes are not what their coding says."""


class _Decompressor(Protocol):
    def decompress(self, data: bytes, limit: int, /) -> bytes: ...
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...


class _Zlib:
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


def _decompressor(coding: str, begin: bytes) -> _Decompressor:
    if coding == "gzip":
        return _Zlib(zlib.MAX_WBITS | 16)
    if coding == "deflate":
        # With or without its zlib head (RFC 1950 section 2.2), as senders differ.
        has_head = (
            len(begin) >= _ZLIB_HEAD
            and begin[0] & 0x0F == zlib.DEFLATED
            and (begin[0] << 8 | begin[1]) % 31 == 0
        )
        return _Zlib(zlib.MAX_WBITS if has_head else -zlib.MAX_WBITS)
    if coding == "br":
        return _Brotli()
    return zstd.ZstdDecompressor()


class Decoder:
    """One body in a coding: `feed` it, then `take` until it needs more."""

    __slots__ = ("_at", "_coding", "_ended", "_fed", "_inner", "_more")

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._inner: _Decompressor | None = None
        self._ended = 0  # members
        self._fed = b""
        self._at = 0  # of `_fed`
        self._more = False  # the last piece may not have been all

    def feed(self, data: bytes) -> None:
        """More bytes as they came."""
        self._fed = self._fed[self._at :] + data
        self._at = 0

    def take(self, limit: int) -> bytes:
        """The next decoded bytes, about `limit` at most; empty when it needs more.

        Raises:
            UndecodableError: they are not in this coding, go on behind its end, or are in more
                than `MAX_MEMBERS` members.
        """
        try:
            while True:
                if self._inner is None and not self._begin():
                    return b""
                piece = self._go_on(limit)
                if piece or self._at == len(self._fed):
                    return piece
        except (zlib.error, brotli.error, zstd.ZstdError) as error:
            raise UndecodableError(self._coding) from error

    def _begin(self) -> bool:
        """The next member; whether one can begin."""
        left = len(self._fed) - self._at
        if not left or (self._coding == "deflate" and left < _ZLIB_HEAD):
            return False
        if self._ended >= (MAX_MEMBERS if self._coding in _IN_A_ROW else 1):
            raise UndecodableError(self._coding)
        self._inner = _decompressor(self._coding, self._fed[self._at : self._at + _ZLIB_HEAD])
        return True

    def _go_on(self, limit: int) -> bytes:
        inner = self._inner
        if inner is None:
            raise RuntimeError("no member was begun")
        piece = inner.decompress(b"", limit) if self._more else b""  # what it still holds
        if not piece and not inner.eof:
            # What comes behind a member is copied at its end, so little of it is shown at a time.
            data = self._fed[self._at : self._at + _SLICE]
            self._at += len(data)
            piece = inner.decompress(data, limit)
        self._more = bool(piece)
        if inner.eof:
            self._at -= len(inner.unused_data)
            self._ended += 1
            self._inner = None
            self._more = False
        return piece

    @property
    def complete(self) -> bool:
        """Whether what was fed ends where a member ends."""
        return self._inner is None and self._at == len(self._fed)
