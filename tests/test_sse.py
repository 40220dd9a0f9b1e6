"""Frames of a byte stream: nothing lost, nothing late, nothing unbounded."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiproxy import sse
from aiproxy.sse import BOM, Frame, Splitter
from client import parse_sse

NEWLINES = (b"\n", b"\r", b"\r\n")

# Lines of a stream, without their ends.
LINES = st.sampled_from(
    [
        b"",
        b"",
        b"data: a",
        b"data:b",
        b"data:  c",
        b"data",
        b'data: {"x": "\xc3\xbc"}',
        b"event: x",
        b"event:y",
        b"event",
        b": comment",
        b":",
        b"id: 1",
        b"retry: 5",
        b"other",
        b" data: no",
        b"data : no",
    ]
)  # fmt: skip
ENDED_LINES = st.tuples(LINES, st.sampled_from(NEWLINES)).map(b"".join)
STREAMS = st.tuples(
    st.sampled_from([b"", BOM]), st.lists(ENDED_LINES, max_size=12), st.sampled_from([b"", b"dat"])
).map(lambda parts: parts[0] + b"".join(parts[1]) + parts[2])
ANY_BYTES = st.lists(st.sampled_from([b"\n", b"\r", b"a", b":", b"data:", BOM, b"\x00"])).map(
    b"".join
)
CUTS = st.lists(st.integers(0, 200), max_size=8)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Cut bytes at some places."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in pairwise(places)]


def frames_of(splitter: Splitter, chunks: list[bytes]) -> list[Frame]:
    """Feed all chunks; return all frames."""
    return [frame for chunk in chunks for frame in splitter.feed(chunk)]


def parsed(frames: list[Frame]) -> list[tuple[str, str]]:
    """The frames that carry an event, as `parse_sse` writes them."""
    found = [sse.parse(frame.raw) for frame in frames]
    return [(name.decode() or "message", data.decode()) for name, data in found if data is not None]


# Splitting


@given(ANY_BYTES, CUTS, st.sampled_from([4, 16, sse.MAX_FRAME]))
@example(b"\r\n\r\n", [3], sse.MAX_FRAME)
@example(b"a\r\r\nb", [3], 4)
def test_nothing_is_lost(data: bytes, cuts: list[int], bound: int) -> None:
    """Whatever the bytes, the chunks and the bound, frames and rest add up to the input."""
    splitter = Splitter(bound)
    out = b"".join(frame.raw for frame in frames_of(splitter, pieces(data, cuts)))
    assert out + splitter.rest() == data
    assert splitter.held == 0


@given(STREAMS, CUTS)
@example(b"event: x\r\ndata: a\r\n\r\ndata: b\r\n\r\n", [21, 22])
@example(b"data: a\r\rdata: b\r\r", [8])
def test_events_are_those_of_an_independent_parser(data: bytes, cuts: list[int]) -> None:
    """Under any chunking and any line ends the frames hold the events that the WHATWG defines."""
    frames = frames_of(Splitter(), pieces(data, cuts))
    assert all(frame.whole for frame in frames)
    assert parsed(frames) == parse_sse(data)


@given(STREAMS, CUTS)
def test_an_event_never_waits(data: bytes, cuts: list[int]) -> None:
    """After each chunk all events that it completed are out, whatever comes next."""
    splitter, seen, frames = Splitter(), b"", list[Frame]()
    for chunk in pieces(data, cuts):
        seen += chunk
        frames += splitter.feed(chunk)
        assert parsed(frames) == parse_sse(seen)


@pytest.mark.parametrize("newline", NEWLINES)
@pytest.mark.parametrize("by_byte", [False, True])
def test_the_last_byte_of_an_event_brings_it(newline: bytes, by_byte: bool) -> None:  # noqa: FBT001
    """With every line end, CR alone too, an event is out with its last byte, without the next."""
    raw = newline.join([b"event: x", b"data: a", b"", b""])
    splitter = Splitter()
    chunks = [raw[at : at + 1] for at in range(len(raw))] if by_byte else [raw]
    frames = frames_of(splitter, chunks)
    assert parsed(frames) == [("x", "a")]
    assert splitter.at_boundary
    assert splitter.held == 0


@pytest.mark.parametrize(
    ("data", "frames"),
    [
        (b"data: a\n\ndata: b\n\n", [b"data: a\n\n", b"data: b\n\n"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"data: a\r\n\r\n", b"data: b\r\n\r\n"]),
        (b"data: a\r\rdata: b\r\r", [b"data: a\r\r", b"data: b\r\r"]),
        (b"data: a\n\r\ndata: b\r\n\n", [b"data: a\n\r\n", b"data: b\r\n\n"]),
        (b"data: a\r\n\rdata: b\n\r", [b"data: a\r\n\r", b"data: b\n\r"]),
        (b"data: a\n\n: c\n\ndata: b", [b"data: a\n\n", b": c\n\n"]),
        (BOM + b"data: a\n\n", [BOM + b"data: a\n\n"]),
        (b"data: a\ndata: b\n\n", [b"data: a\ndata: b\n\n"]),
        (b"data: a\n", []),
        (b"data: a\r\n", []),
        (b"", []),
    ],
)
def test_frames(data: bytes, frames: list[bytes]) -> None:
    """A frame is the bytes of one event with the empty line that ends it, whatever its line end."""
    splitter = Splitter()
    assert [frame.raw for frame in splitter.feed(data)] == frames
    assert splitter.rest() == data[len(b"".join(frames)) :]


def test_a_crlf_cut_in_two_makes_no_second_event() -> None:
    """Half a CRLF ends the event at once; the other half is neither lost nor an event."""
    splitter = Splitter()
    assert parsed(splitter.feed(b"data: a\r\n\r")) == [("message", "a")]
    frames = splitter.feed(b"\ndata: b\r\n\r\n")
    assert b"".join(frame.raw for frame in frames) == b"\ndata: b\r\n\r\n"
    assert parsed(frames) == [("message", "b")]


# Frames beyond the bound


@given(
    st.integers(0, 60), st.integers(1, 16), st.integers(8, 24), st.sampled_from(NEWLINES),
)  # fmt: skip
def test_memory_is_bounded(size: int, step: int, bound: int, newline: bytes) -> None:
    """However long a frame grows, at most the bound is held after a chunk, and nothing is lost."""
    data = b"data: " + b"x" * size + newline * 2 + b"data: y" + newline * 2
    splitter = Splitter(bound)
    out = b""
    for start in range(0, len(data), step):
        out += b"".join(frame.raw for frame in splitter.feed(data[start : start + step]))
        assert splitter.held <= bound
    assert out + splitter.rest() == data


@pytest.mark.parametrize("newline", NEWLINES)
def test_an_oversize_frame_goes_in_parts(newline: bytes) -> None:
    """Its parts are marked, no boundary is claimed until its end, and the next frame is whole."""
    splitter = Splitter(16)
    parts = splitter.feed(b"data: " + b"x" * 40)
    assert parts
    assert not any(part.whole for part in parts)
    boundaries = [splitter.at_boundary]
    parts += splitter.feed(b"y" * 40)
    boundaries.append(splitter.at_boundary)
    last = splitter.feed(newline * 2)
    assert [*boundaries, splitter.at_boundary] == [False, False, True]
    assert last
    assert not last[0].whole
    assert b"".join(part.raw for part in [*parts, *last]) == (
        b"data: " + b"x" * 40 + b"y" * 40 + newline * 2
    )
    assert splitter.feed(b"data: z" + newline * 2) == [Frame(b"data: z" + newline * 2, whole=True)]


@pytest.mark.parametrize("newline", NEWLINES)
@pytest.mark.parametrize("at", range(1, 5))
def test_the_end_of_an_oversize_frame_is_found_across_chunks(newline: bytes, at: int) -> None:
    """Wherever its end is cut in two, an oversize frame ends there and not later."""
    raw = b"data: " + b"x" * 40 + newline * 2
    splitter = Splitter(16)
    frames = frames_of(splitter, [raw[:-at], raw[-at:]])
    assert splitter.at_boundary
    assert splitter.held == 0
    assert b"".join(frame.raw for frame in frames) == raw


def test_a_boundary_is_where_nothing_was_let_through() -> None:
    """A held frame leaves the client at a boundary: a comment may go out before it."""
    splitter = Splitter()
    assert splitter.at_boundary
    splitter.feed(b"data: half")
    assert (splitter.at_boundary, splitter.held) == (True, len(b"data: half"))


def test_rest_empties_the_splitter() -> None:
    """What is given up is given once, and the next frame begins afresh."""
    splitter = Splitter()
    splitter.feed(b"data: a\n\ndata: half")
    assert splitter.rest() == b"data: half"
    assert splitter.rest() == b""
    assert splitter.feed(b"data: b\n\n") == [Frame(b"data: b\n\n", whole=True)]


def test_the_usual_bound_holds_a_response_with_images() -> None:
    """A terminal event of several MiB is still one whole frame (traps, 4)."""
    raw = b"data: " + b"x" * (4 * 2**20) + b"\n\n"
    splitter = Splitter()
    frames = frames_of(splitter, [raw[: 2**20], raw[2**20 : -1], raw[-1:]])
    assert frames == [Frame(raw, whole=True)]


# Reading and writing one frame


@pytest.mark.parametrize(
    ("raw", "name", "data"),
    [
        (b"data: a\n\n", b"", b"a"),
        (b"data:a\n\n", b"", b"a"),
        (b"data:  a\n\n", b"", b" a"),
        (b"data\n\n", b"", b""),
        (b"data: a\ndata: b\n\n", b"", b"a\nb"),
        (b"data: a\r\ndata: b\r\n\r\n", b"", b"a\nb"),
        (b"data: a\rdata: b\r\r", b"", b"a\nb"),
        (b"event: x\ndata: a\n\n", b"x", b"a"),
        (b"data: a\nevent:x\n\n", b"x", b"a"),
        (b"event: x\nevent: y\ndata: a\n\n", b"y", b"a"),
        (b"event: x\n\n", b"x", None),
        (b": data: a\n\n", b"", None),
        (b"\n", b"", None),
        (b"database: a\n\n", b"", None),
        (BOM + b"data: a\n\n", b"", b"a"),
        (b"data: a\x0bb\x85c\xe2\x80\xa8d\n\n", b"", b"a\x0bb\x85c\xe2\x80\xa8d"),
    ],
)
def test_parse(raw: bytes, name: bytes, data: bytes | None) -> None:
    """Name and data are read as the WHATWG defines; only LF, CR and CRLF end a line."""
    assert sse.parse(raw) == (name, data)


@pytest.mark.parametrize(
    ("raw", "data", "out"),
    [
        (b"data: a\n\n", b"N", b"data: N\n\n"),
        (b"data:a\r\n\r\n", b"N", b"data:N\r\n\r\n"),
        (b"data: a\r\r", b"N", b"data: N\r\r"),
        (b"id: 1\nevent:x\ndata: a\n: c\n\n", b"N", b"id: 1\nevent:x\ndata: N\n: c\n\n"),
        (b"data: a\nid: 1\r\ndata: b\r\r", b"N", b"data: N\nid: 1\r\n\r"),
        (b"data: a\r\n\r\n", b"N\nM", b"data: N\r\ndata: M\r\n\r\n"),
        (b"data\n\n", b"N", b"data:N\n\n"),
        (BOM + b"data: a\n\n", b"N", BOM + b"data: N\n\n"),
        (b"database: a\ndata: a\n\n", b"N", b"database: a\ndata: N\n\n"),
    ],
)
def test_replace_data(raw: bytes, data: bytes, out: bytes) -> None:
    """Only the data changes: other lines, their ends, their spacing and their order stay."""
    assert sse.replace_data(raw, data) == out
    assert sse.parse(out) == (sse.parse(raw)[0], data)


@given(
    st.lists(ENDED_LINES, max_size=5),
    st.lists(ENDED_LINES, max_size=5),
    st.binary(max_size=20).filter(lambda data: b"\r" not in data),
    st.sampled_from(NEWLINES),
)
def test_replaced_data_is_read_back(
    before: list[bytes], after: list[bytes], data: bytes, newline: bytes
) -> None:
    """Whatever surrounds it, the replaced data is what a reader gets, and the name stays."""
    raw = b"".join([*before, b"data: old" + newline, *after])
    out = sse.replace_data(raw, data)
    assert sse.parse(out) == (sse.parse(raw)[0], data)
    others = [line for line in raw.splitlines(keepends=True) if not _is_data(line)]
    assert [line for line in out.splitlines(keepends=True) if not _is_data(line)] == others


def _is_data(line: bytes) -> bool:
    return line.split(b":", 1)[0].rstrip(b"\r\n") == b"data"


@given(st.from_regex(rb"[a-z_.]{0,20}", fullmatch=True), st.binary(max_size=40))
def test_a_frame_of_our_own_is_read_back(name: bytes, data: bytes) -> None:
    """What `event` writes is one whole frame with that name and that data."""
    data = data.replace(b"\r", b"").replace(b"\n", b"")
    raw = sse.event(data, name.decode())
    assert sse.parse(raw) == (name, data)
    assert Splitter().feed(raw) == [Frame(raw, whole=True)]


def test_the_heartbeat_is_a_comment() -> None:
    """It is one whole frame in which no parser finds an event."""
    assert Splitter().feed(sse.COMMENT) == [Frame(sse.COMMENT, whole=True)]
    assert parse_sse(sse.COMMENT) == []
