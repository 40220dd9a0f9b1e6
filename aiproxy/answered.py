"""The output items of an answer, out of what its client was told.

All three APIs are read by the readers that serve the Responses API: its own collector, and the
bridges over the other two. Of an answer that broke off it is what came by then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Raw

from aiproxy import sse
from aiproxy.dialects import Asked, members_of, value_of
from aiproxy.dialects.chat_bridge import ChatBridge
from aiproxy.dialects.messages_bridge import MessagesBridge
from aiproxy.dialects.responses_output import Output
from aiproxy.errors import ProxyError
from aiproxy.sse import Splitter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiproxy.dialects.bridge import Bridge

_BRIDGES: dict[str, Bridge] = {"chat": ChatBridge(), "messages": MessagesBridge()}


def output_of(api: str, said: Sequence[bytes], *, streamed: bool) -> list[dict[str, Any]]:
    """The items, each as the Responses API has them; what is malformed is left out.

    Args:
        api: responses, chat or messages.
        said: the body, in parts as it was sent, perhaps not to its end.
        streamed: whether it is a stream of events.
    """
    body = b"".join(said)
    bridge = _BRIDGES.get(api)
    if bridge is not None:
        items = _bridged(bridge, body, streamed=streamed)
    elif streamed:
        items = _gathered(body)
    else:
        items = (members_of(body) or {}).get("output", Raw(b""))
    found = value_of(items)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _frames(body: bytes) -> Iterator[bytes]:
    return (frame.raw for frame in Splitter().feed(body) if frame.whole)


def _gathered(body: bytes) -> Raw:
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
    return Raw(b"[%b]" % b",".join(output.items()))


def _bridged(bridge: Bridge, body: bytes, *, streamed: bool) -> Raw:
    """The output of an answer of another API, by the bridge that would have told it."""
    stream = bridge.stream(Asked(model="", stream=streamed, keep=True))
    try:
        if not streamed:
            return Raw(b"[]") if (told := stream.told(body).produced) is None else Raw(told.output)
        for raw in _frames(body):
            stream.feed(raw)
            if stream.produced is not None or stream.error is not None:
                break
        if stream.produced is None:
            stream.writer.settle("incomplete")
            return Raw(stream.writer.produced().output)
        return Raw(stream.produced.output)
    except ProxyError:
        return Raw(b"[]")
