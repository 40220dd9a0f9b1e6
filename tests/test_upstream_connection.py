"""A connection to an upstream as its user sees it: what waits, what is held, what is bounded.

The framing has its own table, in `test_upstream_framing`.
"""

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiproxy.upstream_answer import MAX_FIELD, MAX_FIELDS, MAX_HEAD, MAX_INTERIM
from aiproxy.upstream_connection import JOINED, MOST_HELD
from aiproxy.upstream_errors import BROKE_OFF, CLOSED, MALFORMED, Failure
from wire import HIGH, Wire, now

OK = b"HTTP/1.1 200 OK\r\n"
HI = OK + b"Content-Length: 2\r\n\r\nhi"
CHUNKS = OK + b"Transfer-Encoding: chunked\r\n\r\n"
READ = 256 * 1024  # bytes that the event loop reads at a time, at most


def rested() -> Wire:
    """Make a wire on which one answer came, and nothing is asked now."""
    wire = Wire()
    wire.ask()
    wire.feed(HI)
    assert wire.taken() == b"hi"
    assert wire.connection.clean
    wire.connection.rest()
    return wire


def chunk(data: bytes) -> bytes:
    """Write a chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


# What goes out


@pytest.mark.parametrize(("size", "writes"), [(0, 1), (1, 1), (JOINED, 1), (JOINED + 1, 2)])
def test_a_small_request_is_one_piece(size: int, writes: int) -> None:
    """A body of up to JOINED bytes goes out with its head; a larger one is not copied."""
    wire = Wire()
    body = b"b" * size
    wire.connection.send(b"head\r\n\r\n", body, lambda: None)
    assert wire.calls == 1
    assert len(wire.written) == writes
    assert b"".join(wire.written) == b"head\r\n\r\n" + body


def test_a_large_body_is_sent_once_the_kernel_has_it() -> None:
    """`sent` is called once: when the transport resumes writing, and not again for what follows."""
    wire = Wire()
    wire.stuck = True
    calls: list[int] = []
    assert not wire.connection.send(b"", b"b" * (HIGH + 1), lambda: calls.append(wire.unsent))
    assert (calls, wire.connection.unsent()) == ([], HIGH + 1)
    wire.drain()
    assert (calls, wire.connection.unsent()) == ([0], 0)
    wire.connection.pause_writing()
    wire.connection.resume_writing()
    assert calls == [0]


@pytest.mark.parametrize("size", [JOINED + 1, 64 * 1024, 64 * 1024 + 1, 200_000])
def test_with_tls_a_large_body_goes_out_in_slices(size: int) -> None:
    """Of 64 KiB: TLS takes all that one write gives it, and hides how much of that waits."""
    wire = Wire()
    wire.get_extra_info = lambda name, default=None: name == "sslcontext"  # type: ignore[method-assign]
    body = bytes(range(256)) * (size // 256) + b"b" * (size % 256)
    wire.connection.send(b"head\r\n\r\n", body, lambda: None)
    assert b"".join(wire.written) == b"head\r\n\r\n" + body
    assert [len(each) for each in wire.written[1:-1]] == [64 * 1024] * ((size - 1) // (64 * 1024))


def test_a_body_that_the_kernel_takes_at_once_is_sent_at_once() -> None:
    """`send` says so where nothing waits, and calls nobody later."""
    wire = Wire()
    calls: list[int] = []
    assert wire.connection.send(b"", b"b" * (HIGH + 1), lambda: calls.append(1))
    wire.connection.pause_writing()
    wire.connection.resume_writing()
    assert calls == []


def test_an_answer_before_the_body_was_taken_leaves_no_clean_connection() -> None:
    """It is not clean while the last request's bytes wait; a rested one calls no old `sent`."""
    wire = Wire()
    wire.stuck = True
    calls: list[int] = []
    wire.connection.send(b"", b"b" * (HIGH + 1), lambda: calls.append(1))
    wire.feed(HI)
    assert wire.taken() == b"hi"
    assert not wire.connection.clean
    wire.connection.rest()
    wire.drain()
    assert calls == []


# What comes in


def test_the_head_is_as_it_came() -> None:
    """All fields, in order, in their case, in latin-1; `get` gives the first of a name."""
    wire = Wire()
    wire.ask()
    wire.feed(OK + b"X-A: 1\r\nx-a: \xe9\r\nB: \r\nContent-Length: 0\r\n\r\n")
    head = now(wire.connection.head())
    assert head.headers == [("X-A", "1"), ("x-a", "\xe9"), ("B", ""), ("Content-Length", "0")]
    assert [head.get(name) for name in ("x-a", "b", "c")] == ["1", "", ""]


def test_interim_fields_are_not_the_answers() -> None:
    """What a 103 says is in no head."""
    wire = Wire()
    wire.ask()
    wire.feed(b"HTTP/1.1 103 ?\r\nX-A: 1\r\n\r\n" + HI)
    assert now(wire.connection.head()).headers == [("Content-Length", "2")]


def test_trailers_are_nobodys() -> None:
    """What comes behind a body changes no head, even one that was not taken yet."""
    wire = Wire()
    wire.ask()
    wire.feed(CHUNKS + chunk(b"hi") + b"0\r\nX-A: 1\r\nConnection: x\r\n\r\n")
    assert now(wire.connection.head()).headers == [("Transfer-Encoding", "chunked")]


ENDS: dict[str, Callable[[Wire], object]] = {
    "FIN": lambda wire: wire.end("FIN"),
    "RST": lambda wire: wire.end("RST"),
    "no HTTP": lambda wire: wire.feed(b"zz\r\n"),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_came_before_a_failure_is_given_out_before_it(end: str) -> None:
    """The body so far is whole, and every later `read` fails alike."""
    wire = Wire()
    wire.ask()
    wire.feed(CHUNKS + chunk(b"one"))
    wire.feed(chunk(b"two"))
    ENDS[end](wire)
    assert now(wire.connection.head()).status == 200
    assert now(wire.connection.read()) == b"onetwo"
    for _ in "12":
        with pytest.raises(Failure) as raised:
            now(wire.connection.read())
        expected = MALFORMED if end == "no HTTP" else BROKE_OFF
        assert raised.value.message == expected
    assert wire.closing


def test_what_came_in_the_segment_of_a_failure_is_given_out_before_it() -> None:
    """A good chunk before a bad one in the same segment is not lost."""
    wire = Wire()
    wire.ask()
    wire.feed(CHUNKS + chunk(b"one") + b"zz\r\n")
    assert wire.taken() == b"one"
    assert wire.judged() == (200, ("protocol", MALFORMED))


def test_the_first_failure_stays() -> None:
    """What is no HTTP stays so when the connection that is closed for it is gone."""
    wire = Wire()
    wire.ask()
    wire.feed(b"garbage")
    wire.connection.connection_lost(ConnectionResetError())
    assert wire.judged() == (None, ("protocol", MALFORMED))


@pytest.mark.parametrize("how", ["abort", "lost"])
def test_our_own_end_is_not_the_end_of_an_answer(how: str) -> None:
    """A body without length that we cut ourselves, or that had no FIN, is not whole.

    TLS says so of an upstream that is gone without a close_notify (RFC 9112 section 9.8).
    """
    wire = Wire()
    wire.ask()
    wire.feed(OK + b"\r\nhalf an ans")
    if how == "abort":
        wire.connection.abort()
    wire.connection.connection_lost(None)
    assert wire.taken() == b"half an ans"
    assert wire.judged() == (200, ("reset", BROKE_OFF))


def test_who_asks_on_a_connection_that_is_gone_is_told_so() -> None:
    """`send` on a closed connection fails in `head`, and its loss is told once."""
    wire = rested()
    wire.end("RST")
    assert wire.lost == [wire.connection]
    assert wire.connection.closed
    wire.ask()
    assert wire.judged() == (None, ("reset", CLOSED))


def test_who_asked_on_a_connection_that_is_closing_is_told_so() -> None:
    """A request on a connection whose end comes next fails in `head`."""
    wire = rested()
    wire.ask()
    wire.end("FIN")
    assert wire.judged() == (None, ("reset", CLOSED))


def test_one_that_rests_says_so() -> None:
    """Who looks at a pool sees which connections are in use."""
    wire = rested()
    assert "idle" in repr(wire.connection)
    wire.ask()
    assert "idle" not in repr(wire.connection)


# What nobody asked for

UNASKED = [HI, OK, b"H", b"\r\n", b"\0", b"HTTP/1.1 408 Request Timeout\r\n\r\n", b"x" * READ]


@pytest.mark.parametrize("data", UNASKED, ids=lambda data: repr(data[:20]))
def test_what_comes_on_a_rested_connection_is_no_answer(data: bytes) -> None:
    """It spoils the connection, which is closed; nothing of it is ever given out."""
    wire = rested()
    wire.feed(data)
    assert wire.closing
    assert not wire.connection.clean
    wire.end(None)
    wire.ask()
    assert wire.judged() == (None, ("reset", CLOSED))


@pytest.mark.parametrize("data", UNASKED, ids=lambda data: repr(data[:20]))
def test_what_comes_before_the_first_request_is_no_answer(data: bytes) -> None:
    """So it is with a server that speaks first."""
    wire = Wire()
    clean = [wire.connection.clean]
    wire.feed(data)
    assert wire.closing
    assert [*clean, wire.connection.clean] == [True, False]


@given(st.data())
def test_bytes_between_two_answers_are_never_in_the_second(data: st.DataObject) -> None:
    """Whatever came behind an answer, however cut, the next request is not answered by it."""
    extra = data.draw(st.one_of(st.sampled_from(UNASKED), st.binary(min_size=1, max_size=40)))
    at = data.draw(st.integers(0, len(HI)))
    wire = Wire()
    wire.ask()
    wire.feed(HI[:at])
    wire.feed(HI[at:] + extra)
    assert wire.taken() == b"hi"
    assert not wire.connection.clean, extra
    assert wire.closing


# Back-pressure


def test_nothing_is_read_while_too_much_waits() -> None:
    """Beyond MOST_HELD reading pauses, and taking resumes it."""
    wire = Wire()
    wire.ask()
    wire.feed(OK + b"Content-Length: 1000000\r\n\r\n")
    wire.feed(b"x" * (MOST_HELD // 2))
    paused = [wire.paused]
    wire.feed(b"y" * (MOST_HELD // 2 + 1))
    paused.append(wire.paused)
    assert len(now(wire.connection.read())) == MOST_HELD // 2 * 2 + 1
    paused.append(wire.paused)
    wire.feed(b"z")
    assert [*paused, wire.paused] == [False, True, False, False]
    assert now(wire.connection.read()) == b"z"


def test_what_waits_is_bounded() -> None:
    """An upstream that sends for ever to a client that takes nothing is held to one read more."""
    wire = Wire()
    wire.ask()
    wire.feed(CHUNKS)
    held = 0
    while not wire.paused:
        held += READ
        wire.feed(chunk(b"x" * READ))
    assert held <= MOST_HELD + READ
    before = wire.brought
    wire.feed(chunk(b"y" * READ))
    assert wire.brought == before


@given(st.lists(st.integers(1, MOST_HELD + 9), min_size=1, max_size=9), st.data())
def test_no_byte_is_lost_between_pauses(sizes: list[int], data: st.DataObject) -> None:
    """Whatever is brought and taken in turns, the body comes whole and in order."""
    body = b"".join(bytes([number + 1]) * size for number, size in enumerate(sizes))
    wire = Wire()
    wire.ask()
    wire.feed(OK + b"Content-Length: %d\r\n\r\n" % len(body))
    got = b""
    at = 0
    for size in sizes:
        wire.feed(body[at : at + size])
        at += size
        if data.draw(st.booleans()):
            got += wire.taken()
    got += wire.taken()
    assert got == body
    assert not wire.paused
    assert wire.connection.clean


def test_a_whole_answer_that_waits_leaves_reading_on_for_the_next() -> None:
    """A connection is not given back paused."""
    wire = Wire()
    size = MOST_HELD + 1
    for _ in "12":
        wire.ask()
        wire.feed(OK + b"Content-Length: %d\r\n\r\n" % size + b"x" * size)
        connection = wire.connection
        before = (wire.paused, connection.taken, connection.clean)
        assert len(wire.taken()) == size
        after = (wire.paused, connection.taken, connection.clean)
        assert (before, after) == ((True, False, False), (False, True, True))
        connection.rest()


# Who waits

SLOW = CHUNKS + chunk(b"one") + chunk(b"two") + b"0\r\nA: b\r\n\r\n"


async def test_a_waiter_is_woken_for_every_byte_that_matters() -> None:
    """A reader that always waits has each part as soon as it is here, and the end at the end."""
    wire = Wire(asyncio.get_running_loop())
    wire.ask()
    got: list[bytes] = []

    async def read() -> None:
        assert (await wire.connection.head()).status == 200
        while piece := await wire.connection.read():
            got.append(piece)
        got.append(b"")

    reader = asyncio.ensure_future(read())
    for at in range(len(SLOW)):
        wire.feed(SLOW[at : at + 1])
        for _ in "123":
            await asyncio.sleep(0)
        brought = SLOW[: at + 1].removeprefix(CHUNKS) if at >= len(CHUNKS) else b""
        assert len(b"".join(got)) == sum(map(len, _parts(brought)))
    assert reader.done()
    assert got == [b"o", b"n", b"e", b"t", b"w", b"o", b""]


def _parts(brought: bytes) -> Iterator[bytes]:
    """Return the data of chunks so far."""
    for part in brought.split(b"3\r\n")[1:]:
        yield part[:3]


@pytest.mark.parametrize("end", ["FIN", "RST", "no HTTP", "abort"])
@pytest.mark.parametrize("what", ["head", "read"])
async def test_a_waiter_is_woken_by_the_end(what: str, end: str) -> None:
    """Who waits for a head or a body is told when none will come."""
    wire = Wire(asyncio.get_running_loop())
    wire.ask()
    if what == "read":
        wire.feed(CHUNKS)
    waits: Callable[[], Coroutine[Any, Any, Any]] = getattr(wire.connection, what)
    waiter = asyncio.ensure_future(waits())
    await asyncio.sleep(0)
    assert not waiter.done()
    if end == "no HTTP":
        wire.feed(b"zz\r\n")
    elif end == "abort":
        wire.connection.abort()
        wire.end(None)
    else:
        wire.end(end)
    async with asyncio.timeout(1):
        with pytest.raises(Failure):
            await waiter


async def test_a_waiter_that_left_is_not_woken() -> None:
    """Bytes after a cancellation disturb nobody, and wait for who comes next."""
    wire = Wire(asyncio.get_running_loop())
    wire.ask()
    waiter = asyncio.ensure_future(wire.connection.head())
    await asyncio.sleep(0)
    waiter.cancel()
    wire.feed(HI)
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert (await wire.connection.head()).status == 200
    assert await wire.connection.read() == b"hi"


# Bounds


@dataclass(frozen=True)
class Endless:
    """What begins well and never ends; `at_most`: bytes of it that may be read."""

    name: str
    begin: bytes
    again: bytes
    at_most: int


ENDLESS = [
    Endless("a status line", b"HTTP/1.1 ", b"2", MAX_HEAD),
    Endless("a reason", b"HTTP/1.1 200 ", b"r", MAX_HEAD),
    Endless("a field's name", OK, b"n", MAX_HEAD),
    Endless("blanks before a value", OK + b"A:", b" ", MAX_HEAD),
    Endless("a field's value", OK + b"A: ", b"v", MAX_HEAD),
    Endless("fields", OK, b"A: b\r\n", MAX_HEAD),
    Endless("fields without values", OK, b"A:\r\n", MAX_HEAD),
    Endless("large fields", OK, b"A: " + b"v" * 1000 + b"\r\n", MAX_HEAD),
    Endless("interim answers", b"", b"HTTP/1.1 100\r\n\r\n", 20 * MAX_INTERIM),
    Endless("interim answers with fields", b"", b"HTTP/1.1 103\r\nA: b\r\n\r\n", 40 * MAX_INTERIM),
    Endless("a size of zeros", CHUNKS, b"0", 2 * MAX_FIELD),
    Endless("an extension", CHUNKS + b"2;", b"e", 2 * MAX_FIELD),
    Endless("an extension's value", CHUNKS + b'2;a="', b"e", 2 * MAX_FIELD),
    Endless("the last one's extension", CHUNKS + b"0;", b"e", 2 * MAX_FIELD),
    Endless("trailers", CHUNKS + b"0\r\n", b"A: b\r\n", MAX_FIELDS * 8),
    Endless("a trailer", CHUNKS + b"0\r\nA: ", b"v", 2 * MAX_FIELD),
    Endless("blank lines", b"", b"\r\n", 2),
]


@pytest.mark.parametrize("row", ENDLESS, ids=[row.name for row in ENDLESS])
@pytest.mark.parametrize("segment", [1, 1460, READ])
def test_what_does_not_end_is_cut(row: Endless, segment: int) -> None:
    """A head, an extension or a trailer without end is read up to its bound and one segment."""
    wire = Wire()
    wire.ask()
    pieces = itertools.repeat(row.again * max(1, segment // len(row.again)))
    bound = len(row.begin) + row.at_most + 2 * max(segment, len(row.again))
    for piece in itertools.chain([row.begin], pieces):
        if not wire.feed(piece):
            break
        assert wire.brought <= bound, "it is still read"
    wire.end(None)
    assert wire.judged()[1] == ("protocol", MALFORMED)
