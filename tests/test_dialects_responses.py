"""Streams of the Responses API, sans-IO: frames in, frames out, and how the stream stands."""

import json
from typing import Any, cast

import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from aiproxy.dialects import Answer
from aiproxy.dialects.responses import Responses, ResponsesStream
from aiproxy.envelope import Envelope
from aiproxy.errors import ProxyError
from aiproxy.sse import Splitter
from aiproxy.usage import Usage
from answers import USAGE, sse
from client import parse_sse
from responses import (
    function_item,
    message_item,
    reasoning_item,
    responses_events,
    responses_object,
)
from test_dialects import ERROR, asked, play

STRICT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
DISJOINT = Usage(**USAGE.disjoint())
EVENTS = responses_events()
CREATED, IN_PROGRESS, ADDED = EVENTS[:3]
DONE = sse("[DONE]")
UPSTREAM_ERROR = sse(
    {"type": "error", "code": "x", "message": "GPU fell off", "param": None, "sequence_number": 2},
    event="error",
)


def event(kind: str, **fields: Any) -> bytes:
    """One event with its `event:` line."""
    return sse({"type": kind, "sequence_number": 3, **fields}, event=kind)


def failed(stream: ResponsesStream, error: ProxyError = ERROR) -> list[dict[str, Any]]:
    """The events that end the stream, each accepted by the SDK's strict types."""
    raw = stream.fail(error, 1_790_000_000)
    assert all(frame.whole for frame in Splitter().feed(raw))
    events = parse_sse(raw)
    for kind, data in events:
        STRICT.validate_json(data, strict=True)
        assert json.loads(data)["type"] == kind
    return [json.loads(data) for _, data in events]


# The end


@pytest.mark.parametrize("terminal", ["completed", "incomplete", "failed"])
def test_terminal_events(terminal: Any) -> None:
    """Each of the three ends the stream with its outcome and its usage (traps, 21)."""
    frames = responses_events(terminal=terminal, done=True)
    played = play(ResponsesStream(asked()), [*frames, CREATED, b": comment\n\n"])
    assert played.out == b"".join(frames)
    assert (played.over, played.whole, played.outcome) == (True, True, terminal)
    assert played.usage == DISJOINT


def test_done_before_the_end_is_not_shown() -> None:
    """A [DONE] without a terminal event would hide the one to come."""
    played = play(ResponsesStream(asked()), [CREATED, DONE])
    assert (played.out, played.over, played.whole) == (CREATED, False, False)


def test_an_error_event_passes_and_is_remembered() -> None:
    """An upstream's error is shown, and told again where no terminal event follows."""
    stream = ResponsesStream(asked())
    played = play(stream, [CREATED, IN_PROGRESS, UPSTREAM_ERROR])
    assert played.out == CREATED + IN_PROGRESS + UPSTREAM_ERROR
    assert (played.over, played.whole) == (False, False)
    cause = stream.cut()
    assert cause is not None
    assert cause.outcome == "failed"
    (last,) = failed(stream, cause)
    assert last["response"]["error"]["code"] == "server_error"
    assert "GPU fell off" in last["response"]["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [{"message": "GPU fell off"}, {"error": {"message": "GPU fell off", "code": 500}}],
)
def test_the_message_of_an_error_is_found(fields: dict[str, Any]) -> None:
    """It stands at the event's top level, or in an `error` object as some servers have it."""
    stream = ResponsesStream(asked())
    play(stream, [sse({"type": "error", **fields})])
    assert "GPU fell off" in str(stream.cut())


def test_a_terminal_event_after_an_error_counts() -> None:
    """An error event is not the end: what follows decides."""
    played = play(ResponsesStream(asked()), [CREATED, UPSTREAM_ERROR, EVENTS[-1]])
    assert (played.whole, played.outcome) == (True, "completed")


@pytest.mark.parametrize(
    "name",
    [
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
        "response.output_item.done",
        "error",
    ],
)
@pytest.mark.parametrize("named", ["by event", "by type"])
def test_a_deciding_event_that_is_not_json(name: str, named: str) -> None:
    """A lifecycle, item-done or error event that cannot be read ends the stream, unshown."""
    broken = f'event: {name}\ndata: {{"x": \n\n' if named == "by event" else ""
    broken = broken or f'data: {{"type": "{name}", "x": \n\n'
    played = play(ResponsesStream(asked()), [CREATED, broken.encode()])
    assert played.out == CREATED
    assert played.error is not None
    assert played.error.code == "upstream_error"
    assert not played.whole


@pytest.mark.parametrize(
    "strange",
    [
        b"data: {\n\n",
        b"event: response.output_text.delta\ndata: {\n\n",
        b"event: response.brand_new\ndata: [1, 2\n\n",
        b"data: response.completed\n\n",
        b'data: {"type": "response.brand_new", "x": 1}\n\n',
        b'data: {"type": "response.output_text.delta", "delta": "response.completed"}\n\n',
        b'data: {"type": "response.output_text.delta", "delta": "\\"response.completed\\""}\n\n',
        b'data: {"item": "response.completed", "type": "x.y", "z": "error"}\n\n',
        b"event: x\ndata: a\ndata: b\n\n",
        b"data: \xff\xfe\n\n",
        b": error\n\n",
    ],
)
def test_other_events_pass(strange: bytes) -> None:
    """Anything else passes as it came, JSON or not, and ends nothing."""
    played = play(ResponsesStream(asked()), [CREATED, strange])
    assert (played.out, played.over, played.error) == (CREATED + strange, False, None)


# First output and estimates


@pytest.mark.parametrize(
    ("frame", "carries"),
    [
        (CREATED, False),
        (event("response.queued", response={"id": "r"}), False),
        (ADDED, False),
        (event("response.content_part.added", part={"type": "output_text", "text": ""}), False),
        (event("response.reasoning_summary_part.added", part={"text": ""}), False),
        (event("response.web_search_call.in_progress", item_id="x"), False),
        (b": response.output_text.delta\n\n", False),
        (event("response.output_text.delta", delta="a"), True),
        (event("response.reasoning_text.delta", delta="a"), True),
        (event("response.reasoning_summary_text.delta", delta="a"), True),
        (event("response.refusal.delta", delta="a"), True),
        (event("response.function_call_arguments.delta", delta="{"), True),
        (event("response.function_call_arguments.done", arguments="{}"), True),
        (event("response.custom_tool_call_input.delta", delta="x"), True),
        (event("response.mcp_call_arguments.done", arguments="{}"), True),
        (event("response.output_item.done", item=message_item()), True),
    ],
)
def test_first_output(frame: bytes, carries: bool) -> None:  # noqa: FBT001
    """Text, reasoning, refusal and arguments are output; lifecycle and comments are not."""
    assert play(ResponsesStream(asked()), [frame]).output_started is carries


def test_arguments_only_at_their_end_are_counted() -> None:
    """A tool call without deltas is output and has a size (traps, 7)."""
    call = function_item(arguments=json.dumps({"text": "x" * 400}))
    stream = ResponsesStream(asked())
    done = event("response.function_call_arguments.done", arguments=call["arguments"])
    play(stream, [CREATED, done, event("response.output_item.done", item=call)])
    assert stream.delivered() >= 100


def test_delivered_counts_deltas() -> None:
    """Each delta is a token at least; finished items that repeat the deltas are not added."""
    stream = ResponsesStream(asked())
    play(stream, responses_events("a b c d e f g h", deltas=8, terminal=None))
    assert stream.delivered() == 8


# What aiproxy says itself


def test_a_failure_before_any_event() -> None:
    """Without an event before it: a complete created (0), then failed (1), of one response."""
    created, last = failed(ResponsesStream(asked()))
    assert (created["type"], created["sequence_number"]) == ("response.created", 0)
    assert (last["type"], last["sequence_number"]) == ("response.failed", 1)
    assert created["response"]["status"] == "in_progress"
    assert created["response"]["id"] == last["response"]["id"]
    assert created["response"]["model"] == last["response"]["model"] == "asked-model"
    assert created["response"]["error"] is None
    error = {"code": "server_error", "message": "[upstream_error] It broke off."}
    assert (last["response"]["status"], last["response"]["error"]) == ("failed", error)


@pytest.mark.parametrize(
    "nothing", [b": comment\n\n", b"retry: 3000\n\n", b"id: 1\n\n", b"\n", b"\xef\xbb\xbf: c\n\n"]
)
def test_frames_without_data_are_no_events(nothing: bytes) -> None:
    """A frame in which no client finds an event does not stand in for response.created."""
    stream = ResponsesStream(asked())
    play(stream, [nothing * 2, b"\n"])
    assert [fact["sequence_number"] for fact in failed(stream)] == [0, 1]


@pytest.mark.parametrize("events", range(1, len(EVENTS)))
def test_a_failure_after_events(events: int) -> None:
    """Only failed, with the next sequence number, the same response, and the finished items."""
    stream = ResponsesStream(asked())
    items = [reasoning_item(), message_item("a b")]
    frames = responses_events(items=items, response_id="resp_upstream")[:events]
    play(stream, frames)
    (last,) = failed(stream)
    assert (last["type"], last["sequence_number"]) == ("response.failed", events)
    assert last["response"]["id"] == "resp_upstream"
    finished = sum(b"response.output_item.done" in frame for frame in frames)
    assert last["response"]["output"] == items[: finished // 2]


@pytest.mark.parametrize("between", [b": comment\n\n", b"retry: 1\n\n", b"\n"])
def test_the_next_number_is_that_of_the_last_event(between: bytes) -> None:
    """What is no event takes no number, wherever it stands."""
    stream = ResponsesStream(asked())
    play(stream, [CREATED, between * 3, IN_PROGRESS, between * 2, b"\n"])
    (last,) = failed(stream)
    assert last["sequence_number"] == 2


def test_the_number_follows_the_upstream() -> None:
    """It goes on from the last number that the client saw, not from a count."""
    stream = ResponsesStream(asked())
    play(stream, [CREATED, event("response.output_text.delta", delta="a", sequence_number=41)])
    (last,) = failed(stream)
    assert last["sequence_number"] == 42


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "invalid_prompt"),
        (404, "invalid_prompt"),
        (413, "invalid_prompt"),
        (422, "invalid_prompt"),
        (429, "rate_limit_exceeded"),
        (500, "server_error"),
        (502, "server_error"),
        (503, "server_error"),
        (504, "server_error"),
    ],
)
def test_error_codes_are_the_apis_own(status: int, code: str) -> None:
    """The code is one of the closed list; ours stands in brackets before the message."""
    error = ProxyError(status, "some_type", "our_code", "A sentence.")
    created, last = failed(ResponsesStream(asked()), error)
    assert last["response"]["error"] == {"code": code, "message": "[our_code] A sentence."}
    assert created["response"]["error"] is None


@pytest.mark.parametrize("renamed", [False, True])
def test_a_failure_names_the_clients_model(renamed: bool) -> None:  # noqa: FBT001
    """Where the route renamed the model the failed response has the client's name."""
    stream = ResponsesStream(asked(renamed=renamed))
    play(stream, [CREATED])
    (last,) = failed(stream)
    assert last["response"]["model"] == ("asked-model" if renamed else "gpt-test")


def test_a_bare_created_is_completed() -> None:
    """After a server whose response object has three fields, the failed one is complete."""
    stream = ResponsesStream(asked())
    bare = {"id": "resp_bare", "object": "response", "status": "in_progress"}
    play(stream, [sse({"type": "response.created", "response": bare})])
    (last,) = failed(stream)
    assert (last["response"]["id"], last["sequence_number"]) == ("resp_bare", 1)


REQUEST = {
    "model": "asked-model",
    "input": "Hi",
    "stream": True,
    "instructions": "Be brief.",
    "tools": [{"type": "function", "name": "f", "parameters": {"a": [1]}, "strict": False}],
    "tool_choice": "required",
    "temperature": 0.5,
    "top_p": 1,
    "text": {"format": {"type": "json_object"}},
    "reasoning": {"effort": "low"},
    "metadata": {"a": "b"},
    "store": False,
    "truncation": None,
    "max_output_tokens": 16,
    "parallel_tool_calls": False,
}


@pytest.mark.parametrize("newline", ["", "\n", "\r\n"])
def test_the_request_is_echoed(newline: str) -> None:
    """A made-up response repeats the request's fields, complete, also of an indented body."""
    body = json.dumps(REQUEST, indent=1 if newline else None).replace("\n", newline)
    stream = ResponsesStream(Responses().request(Envelope.parse(body.encode())))
    for fact in failed(stream):
        for name in REQUEST.keys() - {"input", "stream", "truncation", "tools", "reasoning"}:
            assert fact["response"][name] == REQUEST[name]
        assert fact["response"]["truncation"] == "disabled"
        assert fact["response"]["reasoning"] == {"effort": "low", "summary": None}
        (tool,) = fact["response"]["tools"]
        assert tool == {"description": None, **cast("Any", REQUEST["tools"])[0]}


def test_items_over_many_lines_are_repeated() -> None:
    """A finished item that came in indented JSON is well-formed in the failed event."""
    item = message_item("a")
    text = json.dumps({"type": "response.output_item.done", "output_index": 0, "item": item})
    data = json.dumps(json.loads(text), indent=1).replace("\n", "\ndata: ")
    stream = ResponsesStream(asked())
    play(stream, [CREATED, f"data: {data}\n\n".encode()])
    (last,) = failed(stream)
    assert last["response"]["output"] == [item]


# JSON answers


@pytest.mark.parametrize("status", ["completed", "incomplete", "failed"])
def test_answers(status: str) -> None:
    """A JSON answer counts as its status says, with its usage, byte for byte."""
    body = json.dumps(responses_object(status=status, usage=USAGE)).encode()
    answer = Responses().answer(body, asked(stream=False))
    assert answer == Answer(body, cast("Any", status), DISJOINT, None)


@pytest.mark.parametrize("body", [b"[]", b"{}", b"null", b'{"error": {"message": "no"}}', b"x"])
def test_what_is_no_answer(body: bytes) -> None:
    """A body that is no response object is the upstream's error."""
    with pytest.raises(ProxyError, match="not a response object") as caught:
        Responses().answer(body, asked(stream=False))
    assert (caught.value.status, caught.value.code) == (502, "upstream_error")
