"""Bytes of one connection -> answers: what HTTP/1.1 says, and where it ends (RFC 9112).

Sans-IO: `feed` either takes the bytes in, or raises `MalformedError`. llhttp (by httptools) reads
the framing in its strict mode; what it leaves to its user is decided here. Any doubt about where an
answer ends makes it none. The verdict does not depend on how the bytes were cut into reads: a head
is shown to llhttp once it is whole, and nothing that is not asked for is held beyond these bounds.
"""

from __future__ import annotations

from typing import NamedTuple

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

MAX_HEAD = 128 * 1024  # bytes of a head, its blank line included
MAX_FIELD = 32 * 1024  # bytes of a field's name and value, in a head or a trailer
MAX_FIELDS = 256  # fields of an answer, those of interim ones and trailers included
MAX_INTERIM = 16  # interim answers before the final one

_BEGIN = b"HTTP/1."
_LEAST, _FINAL = 100, 200  # the first status of any, and of a final answer
_SWITCHING = 101
_EMPTY = (204, 304)  # no body, whatever the head says (RFC 9112 section 6.3)
_NO_NEWS = 2 * MAX_FIELD  # bytes of a trailer field, or of a chunk's extensions: no end of these


class MalformedError(Exception):
    """What came is not HTTP/1.1, or not unambiguous."""


class Head(NamedTuple):
    """The head of an answer, in latin-1: all fields as they came, and the first of each name."""

    status: int
    headers: list[tuple[str, str]]
    first: dict[str, str]

    def get(self, name: str) -> str:
        """The first value of a lower-case name; empty where there is none."""
        return self.first.get(name, "")

    def listed(self, name: str) -> str:
        """All values of a lower-case name, as one list (RFC 9110 section 5.3)."""
        if name not in self.first:
            return ""
        return ", ".join(value for given, value in self.headers if given.lower() == name)


class AnswerReader:
    """Reads the answers of one connection: `begin`, then `feed` until `whole`.

    Attributes:
        head: of the final answer, once it is here.
        chunks: pieces of its body; whoever takes them clears them.
        whole: its last byte has come.
        keep: the connection may be used for another.
        surplus: something came behind its end.
    """

    __slots__ = (
        "_coded", "_complete", "_fields", "_headers", "_interim", "_left", "_parser", "_pending",
        "_quiet", "_tail", "chunks", "head", "keep", "surplus", "whole",
    )  # fmt: skip

    def __init__(self) -> None:
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        self.begin()

    def begin(self) -> None:
        """Another answer is awaited."""
        self.head: Head | None = None
        self.chunks: list[bytes] = []
        self.whole = False
        self.keep = False
        self.surplus = False
        self._pending = bytearray()  # of a head that is not whole
        self._complete = False  # a head, interim or final
        self._interim = 0
        self._fields = 0
        self._headers: list[tuple[str, str]] = []
        self._left: int | None = None  # bytes of a body whose length was said
        self._coded = False  # the body is in chunks
        self._tail = b""  # the last bytes of chunks
        self._quiet = 0  # bytes of chunks that llhttp made nothing of yet

    def close(self) -> None:
        """Forget the parser, which knows this object: a cycle."""
        self._parser = None

    def end(self) -> bool:
        """The other side closed properly; whether the answer is whole, or ends where that does."""
        if self.head is not None and self._left is None and not self._coded:
            self.whole = True
        return self.whole

    def feed(self, data: bytes) -> None:
        """Take in what came.

        Raises:
            MalformedError: the answer is none. Behind its end nothing is raised: see `surplus`.
        """
        try:
            if self.head is None:
                data = self._feed_head(data)
            if data:
                self._feed_body(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            if not self.whole:
                raise MalformedError from error
            self.surplus = True

    def _feed_head(self, data: bytes) -> bytes:
        """Heads up to the final one; what follows it."""
        if self._pending:
            seen = len(self._pending)
            self._pending += data
            self._check_begin(self._pending)
            if _end_of_head(self._pending, max(0, seen - 2)) < 0:
                return b""
            data = bytes(self._pending)
            self._pending.clear()
        at = 0
        while self.head is None:
            if at == len(data):
                return b""
            rest = data[at:] if at else data
            self._check_begin(rest)
            end = _end_of_head(rest, 0)
            if end < 0:
                self._pending += rest
                return b""
            if end > MAX_HEAD:
                raise MalformedError
            self._complete = False
            self._parse(rest[:end])
            if not self._complete:  # what llhttp takes for a head is longer: a line was odd
                raise MalformedError
            at += end
        return data[at:]

    @staticmethod
    def _check_begin(head: bytes | bytearray) -> None:
        """Refuse what cannot become a head any more."""
        if not _BEGIN.startswith(bytes(head[: len(_BEGIN)])):
            raise MalformedError  # llhttp knows RTSP, too, and skips empty lines
        if len(head) > MAX_HEAD and _end_of_head(head[: MAX_HEAD + 1], 0) < 0:
            raise MalformedError

    def _feed_body(self, data: bytes) -> None:
        if self.whole:
            self.surplus = True
        elif self._left is not None:
            mine = data[: self._left]
            self._left -= len(mine)
            self._parse(mine)
            self.surplus = len(mine) < len(data)
        elif self._coded:
            self._feed_chunks(data)
        else:
            self._parse(data)

    def _feed_chunks(self, data: bytes) -> None:
        self._quiet += len(data)
        self._parse(data)
        self._tail = (self._tail + data[-5:])[-5:]
        if self.whole:
            # llhttp skips empty lines behind the end, as if they were before the next answer.
            self.surplus = not _ends_once(self._tail)
        elif self._quiet > _NO_NEWS:
            raise MalformedError

    def _parse(self, data: bytes) -> None:
        if self._parser is None:
            raise RuntimeError("the reader is closed")
        self._parser.feed_data(data)

    # -- httptools

    def on_message_begin(self) -> None:
        """An answer begins; llhttp would read a second one, too."""
        if self.whole:
            raise MalformedError("a second answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field, or behind the body a trailer field, which nobody needs."""
        self._quiet = 0
        self._fields += 1
        if self._fields > MAX_FIELDS or len(name) + len(value) > MAX_FIELD:
            raise MalformedError("beyond all bounds")
        if self.head is None:
            self._headers.append((name.decode("latin-1"), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        """A head is here; judge its framing."""
        self._complete = True
        parser = self._parser
        if parser is None:
            return
        status = parser.get_status_code()
        headers, self._headers = self._headers, []
        if status < _LEAST or status == _SWITCHING:
            raise MalformedError("nobody asked for another protocol")
        if status < _FINAL:
            self._interim += 1
            if self._interim > MAX_INTERIM:
                raise MalformedError("beyond all bounds")
            return
        first: dict[str, str] = {}
        codings = []
        for name, value in headers:
            lower = name.lower()
            first.setdefault(lower, value)
            if lower == "transfer-encoding":
                codings.append(value.strip(" \t").lower())
        if codings and (codings != ["chunked"] or parser.get_http_version() != "1.1"):
            raise MalformedError("a transfer coding that was not asked for")
        self._coded = bool(codings)
        if (length := first.get("content-length")) is not None:
            self._left = int(length)
        elif status in _EMPTY:
            self._left = 0
        self.head = Head(status, headers, first)

    def on_chunk_header(self) -> None:
        """A chunk's size and extensions are read."""
        self._quiet = 0

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._quiet = 0
        self.chunks.append(data)

    def on_message_complete(self) -> None:
        """The answer is whole, unless it was an interim one."""
        if self.head is not None and self._parser is not None:
            self.whole = True
            self.keep = self._parser.should_keep_alive()


def _end_of_head(data: bytes | bytearray, start: int) -> int:
    """Where the first blank line ends, well-formed or not; -1 if there is none yet."""
    proper = data.find(b"\n\r\n", start)
    bare = data.find(b"\n\n", start)
    if bare >= 0 and (proper < 0 or bare < proper):
        return bare + 2
    return proper + 3 if proper >= 0 else -1


def _ends_once(tail: bytes) -> bool:
    """Whether chunks end with one blank line, none behind it."""
    return tail[-4:] == b"\r\n\r\n" and tail[-5:-4] not in (b"\r", b"\n")
