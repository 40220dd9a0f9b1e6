"""Chat completions and messages, sans-IO: frames in, frames out, and how the stream stands."""

import json
from typing import Any

import pytest

from aiproxy.dialects.chat import Chat, ChatStream
from aiproxy.dialects.messages import Messages, MessagesStream
from aiproxy.usage import Usage
from answers import USAGE, chat_events, messages_events, sse
from client import parse_sse
from test_dialects import ERROR, asked, broken_everywhere, play

COUNTED = USAGE.chat()
DISJOINT = Usage(**USAGE.disjoint())
DONE = sse("[DONE]")


def chunk(*choices: dict[str, Any], **more: Any) -> bytes:
    """One chunk of a chat stream."""
    return sse({"object": "chat.completion.chunk", "model": "m", "choices": choices, **more})


def choice(index: int = 0, reason: str | None = None, **delta: Any) -> dict[str, Any]:
    """One choice of a chunk."""
    return {"index": index, "delta": delta, "finish_reason": reason}


TEXT = chunk(choice(content="Hi"))
STOP = chunk(choice(reason="stop"))
USED = chunk(usage=COUNTED)


# Chat: what passes, and when it is whole


@pytest.mark.parametrize(
    ("frames", "passed", "over", "whole", "outcome", "counted"),
    [
        pytest.param([TEXT, STOP, DONE], 3, True, True, "completed", False, id="no usage"),
        pytest.param([TEXT, STOP], 2, False, True, "completed", False, id="no done"),
        pytest.param([TEXT], 1, False, False, "completed", False, id="cut"),
        pytest.param([TEXT, DONE], 1, False, False, "completed", False, id="early done"),
        pytest.param(
            [TEXT, chunk(choice(reason="length")), DONE],
            3, True, True, "incomplete", False, id="length",
        ),
        pytest.param(
            [chunk(choice(reason="content_filter")), DONE],
            2, True, True, "incomplete", False, id="content filter",
        ),
        pytest.param(
            [chunk(choice(reason="tool_calls")), DONE],
            2, True, True, "completed", False, id="tool calls",
        ),
        pytest.param([TEXT, STOP, DONE, TEXT, DONE], 3, True, True, "completed", False, id="after"),
        pytest.param(
            [TEXT, chunk(choice(reason="stop"), usage=COUNTED), DONE],
            3, True, True, "completed", True, id="usage beside the finish reason",
        ),
        pytest.param(
            [TEXT, sse({"error": {"message": "no"}}), DONE],
            2, True, True, "failed", False, id="error, nothing after it",
        ),
        pytest.param(
            [chunk(choice(content="a"), error=None), STOP],
            2, False, True, "completed", False, id="an error that is null is none",
        ),
        pytest.param(
            [sse("not json"), sse({"x": "[DONE]"}), STOP],
            3, False, True, "completed", False, id="strange frames pass",
        ),
    ],
)  # fmt: skip
def test_chat(  # noqa: PLR0917 - the columns of a table
    frames: list[bytes],
    passed: int,
    over: bool,  # noqa: FBT001
    whole: bool,  # noqa: FBT001
    outcome: str,
    counted: bool,  # noqa: FBT001
) -> None:
    """A chat stream is complete with a finish reason, and nothing follows its end."""
    played = play(ChatStream(asked()), frames)
    assert played.out == b"".join(frames[:passed])
    assert (played.over, played.whole, played.error) == (over, whole, None)
    if whole:
        assert played.outcome == outcome
    assert played.usage == (DISJOINT if counted else None)


@pytest.mark.parametrize("wanted", [False, True])
def test_the_usage_frame_is_for_who_asked(wanted: bool) -> None:  # noqa: FBT001
    """The frame with usage and no choices is counted, and shown to a client that asked for it."""
    frames = [TEXT, STOP, USED, DONE]
    played = play(ChatStream(asked(include_usage=wanted)), frames)
    assert played.out == b"".join(frames if wanted else [TEXT, STOP, DONE])
    assert (played.usage, played.whole) == (DISJOINT, True)


def test_every_choice_must_finish() -> None:
    """With n=2 a stream is whole when both finished, in whatever order their chunks come."""
    stream = ChatStream(asked(choices=2))
    open_still = [
        chunk(choice(1, content="b")),
        chunk(choice(0, content="a")),
        chunk(choice(1, "stop")),
        chunk(choice(1, "stop")),
    ]
    assert not play(stream, open_still).whole
    played = play(stream, [chunk(choice(0, "length"))])
    assert (played.whole, played.outcome) == (True, "incomplete")


def test_a_finish_reason_on_a_line_of_its_own() -> None:
    """Data over many lines, broken wherever JSON allows it, still completes a stream (traps, 3)."""
    frames = [broken_everywhere(frame) for frame in (TEXT, STOP)]
    played = play(ChatStream(asked()), frames)
    assert (played.out, played.whole) == (b"".join(frames), True)


def test_an_upstream_that_ignores_n_may_end() -> None:
    """Its own [DONE] after one finish reason ends the stream."""
    frames = [TEXT, STOP, DONE]
    played = play(ChatStream(asked(choices=3)), frames)
    assert (played.out, played.over, played.whole) == (b"".join(frames), True, True)


@pytest.mark.parametrize(
    ("delta", "carries"),
    [
        ({"role": "assistant"}, False),
        ({"role": "assistant", "content": ""}, False),
        ({"role": "assistant", "content": None}, False),
        ({"content": "a"}, True),
        ({"content": "\n"}, True),
        ({"refusal": "I won't."}, True),
        ({"reasoning_content": "hm"}, True),
        ({"reasoning": "hm"}, True),
        ({"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]}, False),
        ({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}, True),
    ],
)
def test_first_output_of_chat(delta: dict[str, Any], carries: bool) -> None:  # noqa: FBT001
    """Text, refusal, reasoning and arguments are output; a role or an empty text is none."""
    assert play(ChatStream(asked()), [chunk(choice(**delta))]).output_started is carries


def test_a_comment_is_no_output() -> None:
    """A comment passes, whatever it says, and starts nothing."""
    comment = b': "content": "x"\n\n'
    for stream in (ChatStream(asked()), MessagesStream(asked())):
        played = play(stream, [b": ping\n\n"])
        assert (played.out, played.output_started) == (b": ping\n\n", False)
    played = play(ChatStream(asked()), [comment])
    assert (played.out, played.output_started) == (comment, False)


def test_an_error_event_that_is_not_json_ends_chat() -> None:
    """What cannot be shown as an error is one of ours; the frame itself is not shown."""
    played = play(ChatStream(asked()), [TEXT, b'event: error\ndata: "error": x\n\n'])
    assert played.out == TEXT
    assert played.error is not None
    assert played.error.code == "upstream_error"


def test_chat_fails_with_an_error_frame() -> None:
    """A failure is one `data: {"error"}` frame with all four keys, no [DONE], nothing after."""
    stream = ChatStream(asked())
    ((kind, data),) = parse_sse(stream.fail(ERROR, 5))
    assert kind == "message"
    assert json.loads(data) == {
        "error": {
            "message": "It broke off.",
            "type": "server_error",
            "param": None,
            "code": "upstream_error",
        }
    }
    assert stream.feed(DONE) == b""


def test_bad_usage_of_chat_is_not_believed() -> None:
    """A usage that is no count leaves the estimate, and says that it is bad."""
    stream = ChatStream(asked())
    play(stream, [STOP, chunk(usage={"prompt_tokens": "1", "completion_tokens": 1}), DONE])
    assert (stream.usage, stream.reason) == (None, "bad")


def test_late_usage_replaces_early_usage() -> None:
    """Servers that count in every chunk count cumulatively: the last count stands."""
    early = chunk(choice(content="a"), usage={"prompt_tokens": 11, "completion_tokens": 1})
    played = play(ChatStream(asked()), [early, STOP, USED, DONE])
    assert played.usage == DISJOINT


# Messages


START = messages_events()[0]
PING = sse({"type": "ping"}, event="ping")
MESSAGE_STOP = sse({"type": "message_stop"}, event="message_stop")
OVERLOADED = sse(
    {"type": "error", "error": {"type": "overloaded_error", "message": "no"}}, event="error"
)


def message_delta(reason: str, **usage: Any) -> bytes:
    """The event before the last."""
    delta = {"stop_reason": reason, "stop_sequence": None}
    return sse({"type": "message_delta", "delta": delta, "usage": usage}, event="message_delta")


def block_delta(**delta: Any) -> bytes:
    """Some output."""
    return sse(
        {"type": "content_block_delta", "index": 0, "delta": delta}, event="content_block_delta"
    )


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        ("end_turn", "completed"),
        ("tool_use", "completed"),
        ("stop_sequence", "completed"),
        ("max_tokens", "incomplete"),
        ("refusal", "incomplete"),
        ("model_context_window_exceeded", "incomplete"),
    ],
)
def test_messages_end_with_message_stop(reason: str, outcome: str) -> None:
    """Only `message_stop` completes; the stop reason says how; nothing follows."""
    frames = [START, PING, block_delta(type="text_delta", text="a"), message_delta(reason)]
    stream = MessagesStream(asked())
    assert play(stream, frames).out == b"".join(frames)
    assert not stream.whole
    assert stream.usage is None
    played = play(stream, [MESSAGE_STOP, PING, MESSAGE_STOP])
    assert played.out == MESSAGE_STOP
    assert (played.over, played.whole, played.outcome) == (True, True, outcome)


def test_usage_of_messages_is_cumulative() -> None:
    """The input is that of the start, later counts replace earlier ones, null changes nothing."""
    frames = [
        START,
        message_delta("end_turn", output_tokens=3, input_tokens=None),
        message_delta("end_turn", output_tokens=7),
        MESSAGE_STOP,
    ]
    counted = play(MessagesStream(asked()), frames).usage
    assert counted is not None
    assert (counted.input, counted.input_cached, counted.total_output) == (8, 3, 7)


def test_an_error_ends_messages() -> None:
    """An upstream's error event is the terminal one: it passes, nothing follows, it failed."""
    frames = [START, block_delta(type="text_delta", text="a" * 40), OVERLOADED, MESSAGE_STOP]
    stream = MessagesStream(asked())
    played = play(stream, frames)
    assert played.out == b"".join(frames[:3])
    assert (played.over, played.outcome, played.usage) == (True, "failed", None)
    assert stream.delivered() == 10


@pytest.mark.parametrize("name", ["message_start", "message_delta", "message_stop", "error"])
def test_a_messages_event_that_is_not_json(name: str) -> None:
    """An event that decides something but cannot be read ends the stream with our error."""
    played = play(MessagesStream(asked()), [START, f"event: {name}\ndata: {{\n\n".encode()])
    assert played.out == START
    assert played.error is not None


def test_other_messages_events_need_not_be_json() -> None:
    """Any other event passes as it came."""
    strange = b"event: content_block_delta\ndata: {\n\n"
    played = play(MessagesStream(asked()), [START, strange])
    assert (played.out, played.error) == (START + strange, None)


@pytest.mark.parametrize(
    ("frame", "carries"),
    [
        (START, False),
        (PING, False),
        (block_delta(type="text_delta", text="a"), True),
        (block_delta(type="text_delta", text=""), False),
        (block_delta(type="thinking_delta", thinking="hm"), True),
        (block_delta(type="signature_delta", signature="abc"), False),
        (block_delta(type="input_json_delta", partial_json="{"), True),
        (block_delta(type="text_delta", text='say "error"'), True),
    ],
)
def test_first_output_of_messages(frame: bytes, carries: bool) -> None:  # noqa: FBT001
    """Text, thinking and tool input are output."""
    assert play(MessagesStream(asked()), [frame]).output_started is carries


def test_messages_fail_with_an_error_event() -> None:
    """A failure is one `event: error` in Anthropic's shape."""
    stream = MessagesStream(asked())
    ((kind, data),) = parse_sse(stream.fail(ERROR, 5))
    assert kind == "error"
    error = {"type": "api_error", "message": "It broke off."}
    assert json.loads(data) == {"type": "error", "error": error}
    assert stream.feed(MESSAGE_STOP) == b""


# JSON answers


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        (b'{"choices": [{"finish_reason": "stop"}]}', "completed"),
        (b'{"choices": [{"finish_reason": "length"}]}', "incomplete"),
        (b'{"choices": [{"finish_reason":"x"},{"finish_reason":"content_filter"}]}', "incomplete"),
        (b'{"choices": null}', "completed"),
    ],
)  # fmt: skip
def test_chat_answers(body: bytes, outcome: str) -> None:
    """A JSON answer is incomplete when any choice was cut short; its bytes stay."""
    answer = Chat().answer(body, asked(stream=False))
    assert (answer.body, answer.outcome) == (body, outcome)
    assert (answer.usage, answer.reason) == (None, "missing")


@pytest.mark.parametrize("reason", ["end_turn", "max_tokens", None])
def test_messages_answers(reason: str | None) -> None:
    """A message is incomplete when its output was cut short."""
    body = json.dumps({"content": [], "stop_reason": reason}).encode()
    answer = Messages().answer(body, asked(stream=False))
    assert answer.outcome == ("incomplete" if reason == "max_tokens" else "completed")


def test_chat_events_of_the_rig_are_understood() -> None:
    """The rig's own healthy chat stream is whole, with its usage."""
    played = play(ChatStream(asked()), chat_events(include_usage=True))
    assert (played.whole, played.usage) == (True, DISJOINT)
