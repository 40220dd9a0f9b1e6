"""Chat completions as upstreams of a bridge give them, and what a Responses client is told of them.

An answer is told once, as what a stream says piece by piece; `Told` makes the whole JSON of it
too where there is one.
"""

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from answers import CREATED_AT, USAGE, Usage, fresh_id, sse
from client import Answer
from rig import TEAM_A, Proxy, prompt
from steps import SSE_HEADERS, Chunk, EndChunks, Headers, Step, json_answer
from validating import check_bridged

if TYPE_CHECKING:
    from upstream import Recorded

Serve = Callable[..., Awaitable[Proxy]]
Fact = dict[str, Any]

PATH = "/v1/responses"
CHAT_PATH = "/v1/chat/completions"
DONE = sse("[DONE]")
FUNCTION: Fact = {"type": "function", "name": "f", "parameters": {"type": "object"}}


def chat_only(**options: Any) -> Fact:
    """Return the `upstreams` of a configuration whose upstream speaks chat completions alone."""
    return {"scripted": {"apis": ["chat"], **options}}


def text(piece: Any, **more: Any) -> Fact:
    """Return a piece of text as a stream's choice has it."""
    return {"delta": {"content": piece}, **more}


def thought(piece: str, name: str = "reasoning_content") -> Fact:
    """Return a piece of reasoning."""
    return {"delta": {name: piece}}


def refusal(piece: str) -> Fact:
    """Return a piece of a refusal."""
    return {"delta": {"refusal": piece}}


def calls(*parts: Fact) -> Fact:
    """Return parts of tool calls, as `begun` and `more` make them."""
    return {"delta": {"tool_calls": list(parts)}}


def begun(index: int | None, call_id: str | None, name: str, arguments: Any = "") -> Fact:
    """Return the beginning of a tool call; what is None is left out."""
    part = {"type": "function", "function": {"name": name, "arguments": arguments}}
    named = {"index": index, "id": call_id}
    return {name: value for name, value in named.items() if value is not None} | part


def more(index: int | None, arguments: str, **members: Any) -> Fact:
    """Return a further part of a tool call's arguments."""
    part: Fact = {"function": {"arguments": arguments}, **members}
    return part if index is None else {"index": index, **part}


def frame(choices: Any = (), **members: Any) -> bytes:
    """Encode one frame of a stream."""
    head = {
        "id": "chatcmpl-scripted",
        "object": "chat.completion.chunk",
        "created": CREATED_AT,
        "model": "gpt-test",
        "choices": choices,
    }
    return sse({**head, **members})


def piece_frame(piece: Fact) -> bytes:
    """Encode a frame with one piece of the answer."""
    return frame([{"index": 0, "logprobs": None, "finish_reason": None, **piece}])


def finish_frame(reason: str = "stop") -> bytes:
    """Encode the frame with the finish reason."""
    return piece_frame({"delta": {}, "finish_reason": reason})


def usage_frame(usage: Any) -> bytes:
    """Encode the frame with the usage, as `Usage` or as it is."""
    return frame(usage=usage.chat() if isinstance(usage, Usage) else usage)


@dataclass(frozen=True)
class Told:
    """One answer of a chat upstream.

    Attributes:
        pieces: choices of the stream, in order.
        message: members of the JSON answer's message; None: there is no such answer.
        finish: the finish reason.
        usage: None: it is not told.
        choice: further members of the JSON answer's choice.
    """

    pieces: Sequence[Fact]
    message: Mapping[str, Any] | None = None
    finish: str = "stop"
    usage: Any = USAGE
    choice: Mapping[str, Any] | None = None

    def frames(self, *, done: bool = True) -> list[bytes]:
        """Return the frames of the stream."""
        first = piece_frame({"delta": {"role": "assistant", "content": ""}})
        frames = [first, *map(piece_frame, self.pieces), finish_frame(self.finish)]
        if self.usage is not None:
            frames.append(usage_frame(self.usage))
        return [*frames, DONE] if done else frames

    def json(self) -> Fact:
        """Return the whole answer."""
        message = {"role": "assistant", "content": None, **(self.message or {})}
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        whole: Fact = {
            "id": fresh_id("chatcmpl"),
            "object": "chat.completion",
            "created": CREATED_AT,
            "model": "gpt-test",
            "choices": [{"logprobs": None, **choice, **(self.choice or {})}],
        }
        usage = self.usage.chat() if isinstance(self.usage, Usage) else self.usage
        return whole if usage is None else whole | {"usage": usage}

    def script(self, *, streamed: bool) -> list[Step]:
        """Return the steps that play it."""
        return send(self.frames(), EndChunks()) if streamed else json_answer(self.json())

    def but(self, **changes: Any) -> "Told":
        """Return it with changes."""
        return replace(self, **changes)


def send(frames: Sequence[bytes], *after: Step) -> list[Step]:
    """Send the head of a stream and frames, a chunk each; then go on as told."""
    return [Headers(200, SSE_HEADERS), *(Chunk(each) for each in frames), *after]


HELLO = Told([text("Hel"), text("lo "), text("world")], {"content": "Hello world"})
THINKING = Told(
    [thought("Let me "), thought("think."), text("Hello "), text("world")],
    {"reasoning_content": "Let me think.", "content": "Hello world"},
)


def function_call(name: str, arguments: str, call_id: str) -> Fact:
    """Return a whole tool call of a message."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = Told(
    [
        thought("Look it up."),
        text("Just a moment."),
        calls(begun(0, "call_zh", "get_weather")),
        calls(more(0, '{"city": '), begun(1, "call_be", "get_weather", '{"ci')),
        calls(more(1, 'ty": "Bern"}')),
        calls(more(0, '"Zürich"}')),
    ],
    {
        "reasoning_content": "Look it up.",
        "content": "Just a moment.",
        "tool_calls": [
            function_call("get_weather", '{"city": "Zürich"}', "call_zh"),
            function_call("get_weather", '{"city": "Bern"}', "call_be"),
        ],
    },
    finish="tool_calls",
)


def items_of(response: Fact) -> list[tuple[Any, ...]]:
    """Return what the items of a response say, without their ids."""
    return [_said(item) for item in response["output"]]


def _said(item: Fact) -> tuple[Any, ...]:
    kind = item["type"]
    if kind == "reasoning":
        return (kind, *(part["text"] for part in item["summary"]))
    if kind == "message":
        parts = (part.get("text", part.get("refusal")) for part in item["content"])
        return ("message", *parts)
    said = item["arguments"] if kind == "function_call" else item["input"]
    return (kind, item["call_id"], item["name"], said)


async def ask(
    proxy: Proxy, *, streamed: bool, key: str = TEAM_A, **fields: Any
) -> tuple[Answer, Fact]:
    """Ask for an answer; return it and its response, after every check of it."""
    answer = await proxy.post(PATH, prompt(stream=streamed, **fields), key=key)
    return answer, check_bridged(answer)


def messages_of(request: "Recorded") -> list[Fact]:
    """Return the messages that a chat upstream was asked with."""
    assert request.path == CHAT_PATH
    messages: list[Fact] = request.json()["messages"]
    return messages


def check_pairs(messages: Sequence[Fact]) -> None:
    """Assert that the results of tool calls follow their calls at once, as chat wants it."""
    owed: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            assert message["tool_call_id"] in owed, messages
            owed.discard(message["tool_call_id"])
        else:
            assert not owed, f"no result of {owed}: {json.dumps(messages)}"
            owed = {call["id"] for call in message.get("tool_calls") or ()}
    assert not owed


@contextmanager
def row(name: str) -> Iterator[None]:
    """Say which row of a table failed: a daemon for each would take long."""
    try:
        yield
    except Exception as error:
        error.add_note(f"row: {name}")
        raise
