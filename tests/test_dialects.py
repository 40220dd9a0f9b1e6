"""Streams of all three APIs, sans-IO: the same bytes and the same count however they are cut."""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiproxy.dialects import Asked, Stream, Tally
from aiproxy.dialects.chat import Chat
from aiproxy.dialects.messages import Messages
from aiproxy.dialects.responses import Responses
from aiproxy.errors import ProxyError, upstream_error
from aiproxy.sse import Splitter
from aiproxy.usage import Usage
from answers import USAGE, chat_events, messages_events, sse, tool_call
from client import parse_sse
from responses import function_item, message_item, reasoning_item, responses_events

NEWLINES = (b"\n", b"\r", b"\r\n")
ERROR = upstream_error("It broke off.")


class Played(NamedTuple):
    """What a stream said and how it stands."""

    out: bytes
    over: bool
    whole: bool
    outcome: str
    usage: Usage | None
    output_started: bool
    error: ProxyError | None


def asked(**changes: Any) -> Asked:
    """A stream that was asked for under the name `asked-model`."""
    return Asked(**{"model": "asked-model", "stream": True, **changes})


def play(stream: Stream, chunks: list[bytes]) -> Played:
    """Feed the frames of some chunks, until the stream cannot go on."""
    splitter, out = Splitter(), b""
    for chunk in chunks:
        for frame in splitter.feed(chunk):
            if stream.error is None:
                out += stream.feed(frame.raw)
    return Played(
        out,
        stream.over,
        stream.whole,
        stream.outcome,
        stream.usage,
        stream.output_started,
        stream.error,
    )


def pretty(event: bytes) -> bytes:
    """The same event with indented JSON, hence with its data over many lines."""
    out = b""
    for line in event.splitlines():
        if line.startswith(b"data: {"):
            text = json.dumps(json.loads(line.removeprefix(b"data: ")), indent=1)
            out += b"".join(b"data: " + part.encode() + b"\n" for part in text.split("\n"))
        else:
            out += line + b"\n"
    return out


def broken_everywhere(event: bytes) -> bytes:
    """The same event with a line end after every colon of its JSON."""
    return re.sub(rb'(?<!\\)": ', b'":\ndata: ', pretty(event))


ITEMS = [reasoning_item(), message_item("Grüße, world"), function_item()]
STREAMS: dict[str, tuple[Responses | Chat | Messages, list[bytes]]] = {
    "responses": (Responses(), responses_events(items=ITEMS, done=True)),
    "responses incomplete": (Responses(), responses_events(terminal="incomplete")),
    "responses failed": (Responses(), responses_events(terminal="failed")),
    "chat": (
        Chat(),
        chat_events("Grüße", include_usage=True, tool_calls=[tool_call("f", '{"a": 1}')]),
    ),
    "messages": (Messages(), messages_events("Grüße", tool_uses=[("f", {"a": 1})])),
}
DISJOINT = Usage(**USAGE.disjoint())
CASES = st.sampled_from(sorted(STREAMS))
CUTS = st.lists(st.integers(0, 20_000), max_size=10)


def total(usage: Usage | None) -> tuple[int, int, int] | None:
    """Input, cached input and all output."""
    return None if usage is None else (usage.input, usage.input_cached, usage.total_output)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """Cut bytes at some places."""
    ends = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in pairwise(ends)]


# Any chunking, any line end


@given(CASES, st.sampled_from(NEWLINES), CUTS)
def test_bytes_and_usage_do_not_depend_on_chunks(
    case: str, newline: bytes, places: list[int]
) -> None:
    """Where nothing must change, the client's bytes are the upstream's, and the usage is read."""
    dialect, events = STREAMS[case]
    data = b"".join(events).replace(b"\n", newline)
    played = play(dialect.stream(asked(include_usage=True)), cut(data, places))
    assert played.out == data
    assert (played.over, played.whole, played.error) == (True, True, None)
    assert total(played.usage) == total(DISJOINT)
    assert played.output_started


@pytest.mark.parametrize("case", sorted(STREAMS))
@pytest.mark.parametrize("newline", NEWLINES)
def test_every_single_cut(case: str, newline: bytes) -> None:
    """Cut in two near the end of any event, a stream arrives byte for byte (traps, 1 and 3)."""
    dialect, events = STREAMS[case]
    frames = [event.replace(b"\n", newline) for event in events]
    data, end = b"".join(frames), 0
    for frame in frames:
        end += len(frame)
        for at in range(end - 4, end + 2):
            played = play(dialect.stream(asked(include_usage=True)), [data[:at], data[at:]])
            assert played.out == data, (at - end, frame)
            assert total(played.usage) == total(DISJOINT)


@given(CASES, st.sampled_from(NEWLINES), CUTS)
def test_what_is_changed_does_not_depend_on_chunks(
    case: str, newline: bytes, places: list[int]
) -> None:
    """With a renamed model and a usage frame to strip, any chunking gives the same bytes."""
    dialect, events = STREAMS[case]
    data = b"".join(events).replace(b"\n", newline)
    whole = play(dialect.stream(asked(renamed=True)), [data])
    played = play(dialect.stream(asked(renamed=True)), cut(data, places))
    assert played == whole
    assert b'"gpt-test"' not in played.out


@given(CASES, st.sampled_from(NEWLINES), CUTS, st.integers(1, 5))
def test_a_cut_stream_ends_alike_under_any_chunking(
    case: str, newline: bytes, places: list[int], lost: int
) -> None:
    """What is said after a break does not depend on how the bytes before it were cut."""
    dialect, events = STREAMS[case]
    data = b"".join(events[:-lost]).replace(b"\n", newline)
    ends = []
    for chunks in ([data], cut(data, places)):
        stream = dialect.stream(asked())
        play(stream, chunks)
        ends.append((stream.whole, stream.delivered(), parse_sse(stream.fail(ERROR, 5))))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("case", sorted(STREAMS))
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda event: event.replace(b"data: ", b"data:"), id="no space"),
        pytest.param(lambda event: b": comment\n" + event, id="comment in the frame"),
        pytest.param(lambda event: b": comment\n\n" + event, id="comment before"),
        pytest.param(lambda event: b"retry: 5\n\nid: 1\n" + event, id="other fields"),
        pytest.param(pretty, id="data over many lines"),
        pytest.param(broken_everywhere, id="a line end within every member"),
    ],
)
def test_other_spellings_are_understood(case: str, change: Callable[[bytes], bytes]) -> None:
    """However an upstream spells its events, they pass unchanged and are counted (traps, 3)."""
    dialect, events = STREAMS[case]
    frames = [event if b"[DONE]" in event else change(event) for event in events]
    played = play(dialect.stream(asked(include_usage=True)), frames)
    assert played.out == b"".join(frames)
    assert (played.over, played.whole) == (True, True)
    assert total(played.usage) == total(DISJOINT)


@pytest.mark.parametrize("case", sorted(STREAMS))
def test_output_is_seen_in_indented_json(case: str) -> None:
    """Output starts with the same event, whether or not its data is one line."""
    dialect, events = STREAMS[case]
    plain, indented = dialect.stream(asked()), dialect.stream(asked())
    for event in events:
        if b"[DONE]" not in event:
            plain.feed(event)
            indented.feed(pretty(event))
            assert indented.output_started == plain.output_started, event
    assert indented.delivered() == plain.delivered()


@pytest.mark.parametrize("case", ["responses", "responses failed", "messages"])
def test_event_lines_are_not_needed(case: str) -> None:
    """Without `event:` lines the type in the data decides."""
    dialect, events = STREAMS[case]
    frames = [b"data: " + event.split(b"data: ", 1)[1] for event in events]
    played = play(dialect.stream(asked()), frames)
    assert played.out == b"".join(frames)
    assert (played.whole, total(played.usage)) == (True, total(DISJOINT))


@given(CASES, st.lists(st.binary(max_size=60), max_size=6), CUTS)
@example("chat", [b'data: {"choices": [{"finish_reason": "stop", "index": {}}]}\n\n'], [])
@example("chat", [b'data: {"choices": 5, "finish_reason": "x", "usage": {"a": 1}}\n\n'], [])
@example("messages", [b'data: {"type": "message_start", "message": 5}\n\n'], [])
@example("messages", [b'data: {"type": "message_delta", "delta": 5, "usage": []}\n\n'], [])
@example("messages", [b'data: {"type": ["error"]}\n\n', b'data: {"type": {"error": 1}}\n\n'], [])
@example("messages", [b'data: {"type": "message_delta", "delta": {"stop_reason": []}}\n\n'], [])
@example("messages", [b'event: message_stop\xff\ndata: "message_stop"\n\n'], [])
@example("responses", [b'data: {"type": "response.completed", "response": 5}\n\n'], [])
@example("responses", [b'data: {"type": ["response.created"]}\n\n'], [])
@example("responses", [b'data: {"type": "error", "error": 5, "message": {}}\n\n'], [])
@example("responses", [b'data: "\\ud800 response.completed" \n\n', b'data: ["error"]\n\n'], [])
def test_nothing_that_an_upstream_sends_raises(
    case: str, junk: list[bytes], places: list[int]
) -> None:
    """Any bytes before a stream's events are read without an exception, and failing still works."""
    dialect, events = STREAMS[case]
    stream = dialect.stream(asked(renamed=True))
    play(stream, cut(b"".join([*junk, b"\n\n", *events[:3]]), places))
    assert stream.delivered() >= 0
    assert stream.cut() is None or isinstance(stream.cut(), ProxyError)
    assert parse_sse(stream.fail(ERROR, 5))


# Estimates


def test_delivered_counts_text_that_passed() -> None:
    """An estimate is one token a delta at least, else a token for four bytes of text."""
    for dialect, events in STREAMS.values():
        stream = dialect.stream(asked())
        assert stream.delivered() == 0
        play(stream, events)
        assert stream.delivered() >= 2
    long = chat_events("x" * 4000, deltas=1)
    stream = Chat().stream(asked())
    play(stream, long)
    assert stream.delivered() == 1000


def test_a_tally_reads_escapes() -> None:
    r"""A `\"` or a `\\` within a delta does not end it."""
    tally = Tally(re.compile(rb'"delta"\s*:\s*"((?:[^"\\]|\\.)*)"', re.DOTALL))
    assert tally.count(sse({"delta": 'a"b\\'}))
    assert (tally.deltas, tally.size) == (1, len(rb"a\"b\\"))
    assert not tally.count(sse({"delta": ""}))
