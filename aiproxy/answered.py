"""What an answer says, out of what its client was told.

A stream is read by the readers that serve the Responses API: its own collector, part by part, and
the bridges over the other two APIs. Of one that broke off it is what came by then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Raw

from aiproxy import sse
from aiproxy.dialects import Asked, members_of, value_of
from aiproxy.dialects.chat_bridge import ChatBridge
from aiproxy.dialects.messages_bridge import MessagesBridge
from aiproxy.dialects.responses_output import Output
from aiproxy.sse import Splitter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiproxy.dialects.bridge import Bridge

_BRIDGES: dict[str, Bridge] = {"chat": ChatBridge(), "messages": MessagesBridge()}


class Said(NamedTuple):
    """An answer's items or messages, and whether these are all of it."""

    items: list[dict[str, Any]]
    whole: bool = True


def said_in(api: str, said: Sequence[bytes], *, streamed: bool) -> Said:
    """Read an answer; what is malformed is left out.

    Args:
        api: responses, chat or messages.
        said: the body, in parts as it was sent, perhaps not to its end.
        streamed: whether it is a stream of events.
    """
    body = b"".join(said)
    if not streamed:
        return Said(_whole(api, body))
    bridge = _BRIDGES.get(api)
    return Said(_objects(_gathered(body))) if bridge is None else _bridged(bridge, body)


def _objects(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _whole(api: str, body: bytes) -> list[dict[str, Any]]:
    """The items of a response, the messages of a completion's choices, or the one message."""
    if api == "messages":
        return _objects([value_of(Raw(body))])
    members = members_of(body) or {}
    if api == "chat":
        return _objects(
            [each.get("message") for each in _objects(value_of(members.get("choices")))]
        )
    return _objects(value_of(members.get("output")))


def _frames(body: bytes) -> Iterator[bytes]:
    return (frame.raw for frame in Splitter().feed(body) if frame.whole)


def _gathered(body: bytes) -> Any:
    """The output of a stream of the Responses API."""
    output = Output()
    for raw in _frames(body):
        data = sse.parse(raw)[1]
        if data is None:
            continue
        event = members_of(data) or {}
        if value_of(event.get("type")) == "response.output_item.done" and "item" in event:
            output.finish(event["item"], value_of(event.get("output_index")))
        else:
            output.text(data)
    return value_of(Raw(b"[%b]" % b",".join(output.items())))


def _bridged(bridge: Bridge, body: bytes) -> Said:
    """The output of a stream of another API, by the bridge that would have told it."""
    stream = bridge.stream(Asked(model="", stream=True, keep=True))
    for raw in _frames(body):
        stream.feed(raw)
        if stream.produced is not None or stream.error is not None:
            break  # the end; or what a bridge cannot tell, though the client got it
    if stream.produced is not None:
        return Said(_objects(value_of(Raw(stream.produced.output))))
    stream.writer.settle("incomplete")
    output = stream.writer.produced().output
    return Said(_objects(value_of(Raw(output))), whole=stream.error is None)
