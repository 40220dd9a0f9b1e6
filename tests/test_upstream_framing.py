"""The answers of upstreams, byte by byte: what is well-formed, and what is not (RFC 9112).

Every row is fed in one piece, in single bytes, in two pieces cut at every place, and in pieces
that hypothesis chooses: what comes of it must not depend on how TCP happened to cut it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiproxy.upstream_answer import MAX_FIELD, MAX_FIELDS, MAX_HEAD, MAX_INTERIM
from aiproxy.upstream_errors import BROKE_OFF, CLOSED, MALFORMED
from wire import Wire, now

End = Literal["FIN", "RST"]

OK = b"HTTP/1.1 200 OK\r\n"
TWO = b"Content-Length: 2\r\n"
CODED = b"Transfer-Encoding: chunked\r\n"
HI = OK + TWO + b"\r\nhi"  # the usual answer
CHUNKS = OK + CODED + b"\r\n"
LAST = b"0\r\n\r\n"
FIELD = b"X: y\r\n"


class Seen(NamedTuple):
    """What came of an answer."""

    status: int | None
    body: bytes
    failure: tuple[str, str] | None
    clean: bool


def seen(pieces: Iterable[bytes], end: End | None = None, *, eager: bool = False) -> Seen:
    """Ask once, on a wire that brings these pieces; `eager` takes each part as it comes."""
    wire = Wire()
    wire.ask()
    got = b""
    for piece in pieces:
        wire.feed(piece)
        if eager:
            got += wire.taken()
    wire.end(end)
    got += wire.taken()
    status, failure = wire.judged()
    return Seen(status, got, failure, wire.connection.clean)


def ways(data: bytes) -> Iterable[Sequence[bytes]]:
    """Cut in no, in one, and in all places."""
    yield [data]
    yield [data[at : at + 1] for at in range(len(data))]
    if len(data) < 1000:
        for at in range(1, len(data)):
            yield [data[:at], data[at:]]


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """Cut there."""
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


# Well-formed


@dataclass(frozen=True)
class Good:
    """An answer that is one; `clean`: whether the connection is of use again."""

    name: str
    data: bytes
    body: bytes = b"hi"
    status: int = 200
    clean: bool = True
    end: End | None = None

    def seen(self) -> Seen:
        """Return what must come of it."""
        return Seen(self.status, self.body, None, self.clean)


def head(status: bytes, *fields: bytes, version: bytes = b"HTTP/1.1") -> bytes:
    """Write a head."""
    return version + b" " + status + b"\r\n" + b"".join(f + b"\r\n" for f in fields) + b"\r\n"


def chunked(data: bytes) -> bytes:
    """Write an answer whose chunks are these."""
    return CHUNKS + data


EARLY = head(b"103 Early Hints", b"Link: </a>; rel=preload")
CONTINUE = head(b"100 Continue")
LONG = b"X: " + b"v" * (MAX_FIELD - 2**10) + b"\r\n"
HALF = b"r" * (MAX_FIELD * 5 // 8)

GOOD = [
    Good("length", HI),
    Good("length 0", OK + b"Content-Length: 0\r\n\r\n", b""),
    Good("length with zeros", OK + b"Content-Length: 002\r\n\r\nhi"),
    Good("length without a space", OK + b"Content-Length:2\r\n\r\nhi"),
    Good("length in blanks", OK + b"Content-Length: \t 2 \t \r\n\r\nhi"),
    Good("names in any case", OK + b"cONTENT-lENGTH: 2\r\n\r\nhi"),
    Good("a body that looks like an end", OK + b"Content-Length: 4\r\n\r\n\r\n\r\n", b"\r\n\r\n"),
    Good("a body that looks like an answer", OK + b"Content-Length: %d\r\n\r\n" % len(HI) + HI, HI),
    Good("empty values", OK + b"A:\r\nB: \r\nC:c\r\n" + TWO + b"\r\nhi"),
    Good("obs-text", OK + b"A: \x80\xff\r\n" + TWO + b"\r\nhi"),
    Good("tabs within a value", OK + b"A: b\tc\r\n" + TWO + b"\r\nhi"),
    Good("all of token", OK + b"!#$%&'*+-.^_`|~09azAZ: b\r\n" + TWO + b"\r\nhi"),
    Good("no reason", b"HTTP/1.1 200 \r\n" + TWO + b"\r\nhi"),
    Good("no reason, no space", b"HTTP/1.1 200\r\n" + TWO + b"\r\nhi"),
    Good("a reason in latin-1", b"HTTP/1.1 200 \xc4h  \t!\r\n" + TWO + b"\r\nhi"),
    Good("status 299", head(b"299 ?", b"Content-Length: 2") + b"hi", status=299),
    Good("status 404", head(b"404 Not Found", b"Content-Length: 2") + b"hi", status=404),
    Good("status 599", head(b"599 ?", b"Content-Length: 2") + b"hi", status=599),
    Good("100", CONTINUE + HI),
    Good("102", head(b"102 Processing") + HI),
    Good("103", EARLY + HI),
    Good("199", head(b"199 ?") + HI),
    Good("100, 102, 103", CONTINUE + head(b"102 Processing") + EARLY + HI),
    Good("103 with a length has no body", head(b"103 ?", b"Content-Length: 3") + HI),
    Good("100 with a coding has no body", head(b"100 ?", b"Transfer-Encoding: chunked") + HI),
    Good("as many 1xx as may be", EARLY * MAX_INTERIM + HI),
    Good("204", head(b"204 No Content"), b"", 204),
    Good("204 with a length", head(b"204 No Content", b"Content-Length: 2"), b"", 204),
    Good("204 with a coding", head(b"204 No Content", b"Transfer-Encoding: chunked"), b"", 204),
    Good("304", head(b"304 Not Modified"), b"", 304),
    Good("304 with a length", head(b"304 Not Modified", b"Content-Length: 2"), b"", 304),
    Good("205", head(b"205 Reset Content", b"Content-Length: 0"), b"", 205),
    Good("205 in chunks", head(b"205 Reset Content", b"Transfer-Encoding: chunked") + LAST,
         b"", 205),
    Good("an upgrade that is offered", OK + b"Connection: upgrade\r\nUpgrade: h2c\r\n" + TWO
         + b"\r\nhi"),
    # The end is the connection's
    Good("until close", OK + b"\r\nhi", clean=False, end="FIN"),
    Good("until close, nothing", OK + b"\r\n", b"", clean=False, end="FIN"),
    Good("until close, 1.0", head(b"200 OK", version=b"HTTP/1.0") + b"hi", clean=False, end="FIN"),
    Good("until close, 1.0 that would stay", clean=False, end="FIN",
         data=head(b"200 OK", b"Connection: keep-alive", version=b"HTTP/1.0") + b"hi"),
    Good("until close, 205", head(b"205 Reset Content"), b"", 205, clean=False, end="FIN"),
    Good("until close, an answer in it", OK + b"\r\n" + HI, HI, clean=False, end="FIN"),
    Good("length and FIN", HI, clean=False, end="FIN"),
    Good("length and RST", HI, clean=False, end="RST"),
    Good("chunks and FIN", chunked(b"2\r\nhi\r\n" + LAST), clean=False, end="FIN"),
    # Whether it stays
    Good("Connection: close", OK + TWO + b"Connection: close\r\n\r\nhi", clean=False),
    Good("Connection: Close in a list", OK + TWO + b"Connection: a, Close\r\n\r\nhi", clean=False),
    Good("close and keep-alive", clean=False,
         data=OK + TWO + b"Connection: close\r\nConnection: keep-alive\r\n\r\nhi"),
    Good("keep-alive and close", clean=False,
         data=OK + TWO + b"Connection: keep-alive, close\r\n\r\nhi"),
    Good("close, in chunks", OK + CODED + b"Connection: close\r\n\r\n2\r\nhi\r\n" + LAST,
         clean=False),
    Good("1.0", head(b"200 OK", b"Content-Length: 2", version=b"HTTP/1.0") + b"hi", clean=False),
    Good("1.0 that stays", head(b"200 OK", b"Content-Length: 2", b"Connection: keep-alive",
                                version=b"HTTP/1.0") + b"hi"),
    # Chunks
    Good("a chunk", chunked(b"2\r\nhi\r\n" + LAST)),
    Good("chunks", chunked(b"1\r\nh\r\n1\r\ni\r\n" + LAST)),
    Good("no chunk", chunked(LAST), b""),
    Good("Chunked in blanks", OK + b"Transfer-Encoding: \tChunked \r\n\r\n2\r\nhi\r\n" + LAST),
    Good("sizes in any case", chunked(b"a\r\n0123456789\r\nA\r\n0123456789\r\n" + LAST),
         b"0123456789" * 2),
    Good("zeros before a size", chunked(b"0" * 20 + b"2\r\nhi\r\n000\r\n\r\n")),
    Good("a chunk that looks like the last", chunked(b"5\r\n" + LAST + b"\r\n" + LAST), LAST),
    Good("extensions", chunked(b'2;a\r\nhi\r\n0;b=c;d="e;f\\"g"\r\n\r\n')),
    Good("trailers", chunked(b"2\r\nhi\r\n0\r\nA: b\r\nC:\r\n\r\n")),
    Good("a trailer's say on closing", chunked(b"2\r\nhi\r\n0\r\nX-Connection: close\r\n\r\n")),
    # Bounds
    Good("as many fields as may be", OK + FIELD * (MAX_FIELDS - 1) + TWO + b"\r\nhi"),
    Good("as many trailers", chunked(b"2\r\nhi\r\n0\r\n" + FIELD * (MAX_FIELDS - 1) + b"\r\n")),
    Good("a long field", OK + LONG + TWO + b"\r\nhi"),
    Good("long fields", OK + LONG * 4 + TWO + b"\r\nhi"),
    Good("a long trailer", chunked(b"2\r\nhi\r\n0\r\n" + LONG + b"\r\n")),
    Good("a long extension", chunked(b"2;" + HALF + b"\r\nhi\r\n" + LAST)),
    Good("long extensions", chunked((b"1;" + HALF + b"\r\nh\r\n") * 3 + LAST), b"hhh"),
    Good("a long reason", b"HTTP/1.1 200 " + HALF + b"\r\n" + TWO + b"\r\nhi"),
    Good("a long reason, a long field",
         b"HTTP/1.1 200 " + HALF + b"\r\nX: " + HALF + b"\r\n" + TWO + b"\r\nhi"),
    # Behind the end: an answer, but no connection for another
    Good("extra garbage", HI + b"garbage", clean=False),
    Good("an extra byte", HI + b"H", clean=False),
    Good("an extra NUL", HI + b"\0", clean=False),
    Good("an extra CRLF", HI + b"\r\n", clean=False),
    Good("an extra LF", HI + b"\n", clean=False),
    Good("an extra CR", HI + b"\r", clean=False),
    Good("a second answer", HI + HI, clean=False),
    Good("an extra 100", HI + CONTINUE, clean=False),
    Good("garbage behind chunks", chunked(b"2\r\nhi\r\n" + LAST) + b"x", clean=False),
    Good("CRLF behind chunks", chunked(b"2\r\nhi\r\n" + LAST) + b"\r\n", clean=False),
    Good("the last chunk twice", chunked(b"2\r\nhi\r\n" + LAST + LAST), clean=False),
    Good("CRLF behind trailers", chunked(b"2\r\nhi\r\n0\r\nA: b\r\n\r\n") + b"\r\n", clean=False),
    Good("an answer behind chunks", chunked(b"2\r\nhi\r\n" + LAST) + HI, clean=False),
    Good("a body behind 204", head(b"204 ?", b"Content-Length: 2") + b"hi", b"", 204, clean=False),
    Good("CRLF behind 204", head(b"204 ?") + b"\r\n", b"", 204, clean=False),
    Good("chunks behind 304", head(b"304 ?", b"Transfer-Encoding: chunked") + LAST, b"", 304,
         clean=False),
    Good("an answer behind Connection: close", OK + TWO + b"Connection: close\r\n\r\nhi" + HI,
         clean=False),
]  # fmt: skip

# Not well-formed


@dataclass(frozen=True)
class Bad:
    """What is no answer, or none to its end; `status` is None where no head was good."""

    name: str
    data: bytes
    status: int | None = None
    body: bytes = b""
    failure: tuple[str, str] = ("protocol", MALFORMED)
    end: End | None = None

    def seen(self) -> Seen:
        """Return what must come of it."""
        return Seen(self.status, self.body, self.failure, clean=False)


def line(first: bytes) -> bytes:
    """Write an answer whose first line is this."""
    return first + b"\r\n" + TWO + b"\r\nhi"


def field(*fields: bytes) -> bytes:
    """Write an answer that is good but for these fields."""
    return OK + b"".join(f + b"\r\n" for f in fields) + TWO + b"\r\nhi"


def framed(*fields: bytes, body: bytes = b"hi") -> bytes:
    """Write an answer whose only framing is these fields."""
    return head(b"200 OK", *fields) + body


def size(data: bytes, body: bytes = b"", name: str = "") -> Bad:
    """Make a row of chunks that break off in the framing."""
    return Bad(name or f"chunks {data[:24]!r}", chunked(data), 200, body)


def early(name: str, data: bytes, end: End, status: int | None = None, body: bytes = b"") -> Bad:
    """Make a row of an answer that the connection's end cut."""
    return Bad(name, data, status, body, ("reset", BROKE_OFF if status else CLOSED), end)


FIRST = [
    b"HTTP/0.9 200 OK", b"HTTP/1.2 200 OK", b"HTTP/2 200 OK", b"HTTP/2.0 200 OK",
    b"HTTP/3.0 200 OK", b"HTTP/1.10 200 OK", b"HTTP/01.1 200 OK", b"HTTP/1 200 OK",
    b"HTTP/1,1 200 OK", b"HTTP 200 OK", b"HTTPS/1.1 200 OK", b"http/1.1 200 OK",
    b"RTSP/1.0 200 OK", b"RTSP/1.1 200 OK", b"ICE/1.0 200 OK", b"ICY 200 OK", b"SIP/2.0 200 OK",
    b"POST / HTTP/1.1", b"HTTP/1.1 POST /", b"200 OK", b"\xef\xbb\xbfHTTP/1.1 200 OK",
    b"\r\nHTTP/1.1 200 OK", b"\nHTTP/1.1 200 OK", b" HTTP/1.1 200 OK", b"\0HTTP/1.1 200 OK",
    b"HTTP/1.1  200 OK", b"HTTP/1.1\t200 OK", b"HTTP/1.1200 OK", b"HTTP/1.1 200OK",
    b"HTTP/1.1 200\tOK", b"HTTP/1.1 OK", b"HTTP/1.1 ", b"HTTP/1.1 2", b"HTTP/1.1 20 OK",
    b"HTTP/1.1 99 OK", b"HTTP/1.1 099 OK", b"HTTP/1.1 000 OK", b"HTTP/1.1 1000 OK",
    b"HTTP/1.1 2000", b"HTTP/1.1 abc OK", b"HTTP/1.1 2x0 OK", b"HTTP/1.1 -20 OK",
    b"HTTP/1.1 +20 OK", b"HTTP/1.1 0x2 OK", b"HTTP/1.1 200.0 OK", b"HTTP/1.1 200 OK\r",
    b"HTTP/1.1 200 O\rK", b"HTTP/1.1 200 O\nK", b"HTTP/1.1 200\rOK", b"HTTP/1.1 101 OK",
]  # fmt: skip
FIELDS = [
    b"no colon", b"nocolon", b": no name", b":", b"A : b", b"A\t: b", b" A: b", b"\tA: b",
    b"A: b\r\n c", b"A: b\r\n\tc", b"A:\r\n b", b"A: b\r\n \r\nC: d", b"A: b\rC: d", b"A: b\nC: d",
    b"A: b\r", b"A: b\0", b"\0A: b", b"A\0: b", b"A: b\x01", b"A: b\x1f", b"A: b\x7f",
    b"A: \x0bb", b"A: b\x0c", b"A\x7f: b", b"\xe9: b", b"A b: c", b"A(b): c", b'"A": b', b"A/b: c",
    b"A[]: b", b"A{: b", b"A@b: c", b"A,b: c", b"A;b: c", b"A=b: c", b"A?: c", b"A\\: c",
]  # fmt: skip
LENGTHS = [
    b"-2", b"+2", b"2, 2", b"2,2", b"2, 3", b"2;", b"2 2", b"2\t2", b"0x2", b"2.0", b"2e0", b"two",
    b"", b" ", b"\xb2", b"2_0", b"18446744073709551616", b"1" * 100, b"2\r\n 3", b"2\0",
]  # fmt: skip
CODINGS = [
    b"gzip", b"identity", b"", b" ", b"xchunked", b"chunkedx", b"chunke", b"chunked;a=b", b"x",
    b"chunked, chunked", b"gzip, chunked", b"chunked, gzip", b"identity, chunked", b"chunked,",
    b",chunked", b'"chunked"', b"chunked\xa0", b"\xa0chunked", b"chunked\x85", b"\x85chunked",
    b"chunked\0", b"chunked\x0b", b"chunked\r\n ", b"\xc4\xb1chunked",
]  # fmt: skip
TE = b"Transfer-Encoding: chunked"
BAD = [
    *(Bad(f"line {first!r}", line(first)) for first in FIRST),
    *(Bad(f"field {name!r}", field(name)) for name in FIELDS),
    *(Bad(f"length {value!r}", framed(b"Content-Length: " + value)) for value in LENGTHS),
    *(Bad(f"coding {value!r}", framed(b"Transfer-Encoding: " + value, body=LAST))
      for value in CODINGS),
    Bad("nothing like it", b"<html></html>"),
    Bad("a TLS alert", b"\x15\x03\x01\x00\x02\x02\x46"),
    Bad("LF alone", HI.replace(b"\r\n", b"\n")),
    Bad("LF at the end of the head", OK + TWO + b"\nhi"),
    Bad("CR at the end of the head", OK + TWO + b"\rhi\r\n\r\n"),
    Bad("LF at the end of a field", OK + b"Content-Length: 2\n\r\nhi"),
    Bad("lengths twice", framed(b"Content-Length: 2", b"Content-Length: 2")),
    Bad("lengths of two kinds", framed(b"Content-Length: 2", b"Content-Length: 3")),
    Bad("length with a space before its colon", framed(b"Content-Length : 2")),
    Bad("length folded", framed(b"Content-Length:\r\n 2")),
    Bad("length, then coding", framed(b"Content-Length: 2", TE, body=LAST)),
    Bad("coding, then length", framed(TE, b"Content-Length: 2", body=LAST)),
    Bad("coding, then length 0", framed(TE, b"Content-Length: 0", body=LAST)),
    Bad("another coding and length", framed(b"Transfer-Encoding: x", b"Content-Length: 2")),
    Bad("coding with a space before its colon", framed(b"Transfer-Encoding : chunked", body=LAST)),
    Bad("coding twice", framed(TE, TE, body=LAST)),
    Bad("coding and another", framed(TE, b"Transfer-Encoding: identity", body=LAST)),
    Bad("another and coding", framed(b"Transfer-Encoding: identity", TE, body=LAST)),
    Bad("coding in 1.0", head(b"200 OK", TE, version=b"HTTP/1.0") + LAST),
    Bad("coding in 1.0 that stays", head(b"200 OK", TE, b"Connection: keep-alive",
                                         version=b"HTTP/1.0") + LAST),
    # Interim ones
    Bad("101", head(b"101 ?", b"Connection: upgrade", b"Upgrade: h2c") + b"hi"),
    Bad("101, bare", head(b"101 ?") + HI),
    Bad("101 after 100", CONTINUE + head(b"101 ?", b"Upgrade: x", b"Connection: upgrade") + HI),
    Bad("100 with a body", head(b"100 ?", b"Content-Length: 2") + b"hi" + HI),
    Bad("103 with a body", head(b"103 ?", b"Content-Length: 2") + b"hi" + HI),
    Bad("103 with chunks", head(b"103 ?", TE) + LAST + HI),
    Bad("103 that closes", head(b"103 ?", b"Connection: close") + HI),
    Bad("100 in 2.0", head(b"100 ?", version=b"HTTP/2.0") + HI),
    Bad("CRLF behind 100", CONTINUE + b"\r\n" + HI),
    Bad("LF behind 100", CONTINUE + b"\n" + HI),
    Bad("RTSP behind 100", CONTINUE + line(b"RTSP/1.0 200 OK")),
    Bad("ICE behind 103", EARLY + line(b"ICE/1.0 200 OK")),
    Bad("000 and an answer", head(b"000 ?", b"Content-Length: 2") + b"xx" + HI),
    Bad("099 and an answer", head(b"099 ?", b"Content-Length: 2") + b"xx" + HI),
    # Chunks
    *(size(data) for data in (
        b"g\r\nhi\r\n" + LAST, b"-2\r\nhi\r\n" + LAST, b"+2\r\nhi\r\n" + LAST,
        b"0x2\r\nhi\r\n" + LAST, b"2h\r\nhi\r\n" + LAST, b"2.0\r\nhi\r\n" + LAST,
        b" 2\r\nhi\r\n" + LAST, b"2 \r\nhi\r\n" + LAST, b"2\t\r\nhi\r\n" + LAST,
        b"2 ;a\r\nhi\r\n" + LAST, b"2;\r\nhi\r\n" + LAST, b"2,\r\nhi\r\n" + LAST,
        b"\r\nhi\r\n" + LAST, b";a\r\nhi\r\n" + LAST, b"\0" + LAST, b"2\nhi\r\n" + LAST,
        b"2\rhi\r\n" + LAST, b"2\n\rhi\r\n" + LAST, b"2;a\nhi\r\n" + LAST, b"2;a\rhi\r\n" + LAST,
        b"2;a=\x07\r\nhi\r\n" + LAST, b"2;a=\0\r\nhi\r\n" + LAST, b'2;a="\r\nhi\r\n' + LAST,
        b'2;a="\nhi\r\n' + LAST, b"10000000000000000\r\nhi\r\n" + LAST, b"f" * 40 + b"\r\nhi",
        b"\xb2\r\nhi\r\n" + LAST, b"0\n\r\n", b"0\r\n\n", b"0\r\rn\n", b"0\r\n\rx",
    )),
    size(b"2\r\nhix\r\n" + LAST, b"hi"),
    size(b"2\r\nhi" + LAST, b"hi"),
    size(b"2\r\nhi\n" + LAST, b"hi"),
    size(b"2\r\nhi\r" + LAST, b"hi"),
    size(b"2\r\nhi\r\nzz\r\n", b"hi"),
    size(b"2\r\nhi\r\n\r\n", b"hi"),
    size(b"2\r\nhi\r\n" + HI, b"hi"),
    *(size(b"2\r\nhi\r\n0\r\n" + trailer + b"\r\n\r\n", b"hi", f"trailer {trailer!r}")
      for trailer in (b"A b", b"A : b", b" A: b", b"A: b\r\n c", b"A: b\n", b"A: \0", b": b",
                      b"Content-Length: 2")),
    # Bounds
    Bad("too many fields", OK + FIELD * (MAX_FIELDS + 1) + b"\r\n"),
    Bad("too many with the length", OK + FIELD * MAX_FIELDS + TWO + b"\r\nhi"),
    Bad("too many in 1xx", head(b"103 ?", *[b"A: b"] * 20) * (MAX_FIELDS // 20 + 1) + HI),
    Bad("too many 1xx", CONTINUE * (MAX_INTERIM + 1) + HI),
    size(b"2\r\nhi\r\n0\r\n" + FIELD * MAX_FIELDS + b"\r\n", b"hi", "too many trailers"),
    Bad("a value too long", field(b"X: " + b"v" * (MAX_FIELD + 1))),
    Bad("a name too long", field(b"N" * (MAX_FIELD + 1) + b": v")),
    Bad("a field too long", field(b"N" * (MAX_FIELD // 2) + b": " + b"v" * (MAX_FIELD // 2 + 1))),
    Bad("a head too long", OK + LONG * (MAX_HEAD // len(LONG) + 1) + TWO + b"\r\nhi"),
    Bad("a reason too long", line(b"HTTP/1.1 200 " + b"r" * MAX_HEAD)),
    Bad("a reason of a 1xx too long", head(b"103 " + b"r" * MAX_HEAD) + HI),
    size(b"0\r\nX: " + b"v" * (MAX_FIELD + 1) + b"\r\n\r\n", name="a trailer too long"),
    # The end came early
    early("FIN and nothing", b"", "FIN"),
    early("RST and nothing", b"", "RST"),
    early("FIN in the status line", b"HTTP/1.1 20", "FIN"),
    early("FIN behind the status line", OK, "FIN"),
    early("FIN in the head", OK + b"A: b\r\nC", "FIN"),
    early("RST in the head", OK + b"A: b\r\nC", "RST"),
    early("FIN before the head's last LF", OK + TWO + b"\r", "FIN"),
    early("FIN behind 100", CONTINUE, "FIN"),
    early("RST behind 103", EARLY, "RST"),
    early("FIN behind the head", OK + TWO + b"\r\n", "FIN", 200),
    early("FIN in a body", OK + TWO + b"\r\nh", "FIN", 200, b"h"),
    early("RST in a body", OK + TWO + b"\r\nh", "RST", 200, b"h"),
    early("a length beyond all", framed(b"Content-Length: 18446744073709551615"), "FIN", 200,
          b"hi"),
    early("RST in a body without length", OK + b"\r\nhi", "RST", 200, b"hi"),
    early("RST behind a head without length", OK + b"\r\n", "RST", 200),
    early("FIN before chunks", CHUNKS, "FIN", 200),
    early("FIN in a size", CHUNKS + b"2", "FIN", 200),
    early("FIN in an extension", CHUNKS + b"2;a", "FIN", 200),
    early("FIN in a chunk", CHUNKS + b"2\r\nh", "FIN", 200, b"h"),
    early("RST in a chunk", CHUNKS + b"2\r\nh", "RST", 200, b"h"),
    early("FIN behind a chunk's data", CHUNKS + b"2\r\nhi", "FIN", 200, b"hi"),
    early("FIN behind a chunk", CHUNKS + b"2\r\nhi\r\n", "FIN", 200, b"hi"),
    early("FIN in the last chunk", CHUNKS + b"2\r\nhi\r\n0", "FIN", 200, b"hi"),
    early("FIN behind the last size", CHUNKS + b"2\r\nhi\r\n0\r\n", "FIN", 200, b"hi"),
    early("FIN in the last CRLF", CHUNKS + b"2\r\nhi\r\n0\r\n\r", "FIN", 200, b"hi"),
    early("FIN in the trailers", CHUNKS + b"2\r\nhi\r\n0\r\nA: b\r\n", "FIN", 200, b"hi"),
]  # fmt: skip
ROWS: list[Good | Bad] = [*GOOD, *BAD]


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_an_answer_is_what_it_is_however_it_is_cut(row: Good | Bad) -> None:
    """In one piece, in single bytes, in any two pieces: the same head, body, failure, and use."""
    for pieces in ways(row.data):
        sizes = [len(piece) for piece in pieces]
        assert seen(pieces, row.end) == row.seen(), f"in pieces of {sizes[:3]} ({len(sizes)})"


SHORT = [row for row in ROWS if 1 < len(row.data) < 1000]


@settings(max_examples=10 * settings().max_examples)
@given(st.data())
def test_an_answer_is_what_it_is_in_any_pieces(data: st.DataObject) -> None:
    """In pieces of any sizes, taken at the end or as they come."""
    row = data.draw(st.sampled_from(SHORT))
    places = data.draw(st.sets(st.integers(1, len(row.data) - 1), max_size=8))
    pieces = cut(row.data, sorted(places))
    assert seen(pieces, row.end, eager=data.draw(st.booleans())) == row.seen()


@pytest.mark.parametrize(
    "row", [row for row in GOOD if row.clean], ids=[row.name for row in GOOD if row.clean]
)
def test_behind_a_clean_answer_comes_another(row: Good) -> None:
    """A connection that is clean gives the next answer as a new one would, and the next one's."""
    wire = Wire()
    for _ in "123":
        wire.ask()
        wire.feed(row.data)
        assert wire.taken() == row.body
        assert now(wire.connection.head()).status == row.status
        assert wire.connection.clean
        wire.connection.rest()
        assert wire.connection.clean
