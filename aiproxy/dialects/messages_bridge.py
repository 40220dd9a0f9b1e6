"""The Responses API over an upstream that speaks Anthropic's Messages.

A message is a list of blocks; a stream tells each from its start to its stop, and a JSON answer is
read like such a stream whose blocks are whole. Only `message_stop` makes it complete.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from aiproxy import errors, usage
from aiproxy.dialects.bridge import Bridge
from aiproxy.dialects.messages_request import REDACTED, messages_request
from aiproxy.dialects.responses_parts import encode, objects
from aiproxy.dialects.told_stream import ToldStream, declared

if TYPE_CHECKING:
    from aiproxy.config import Route, Upstream
    from aiproxy.dialects import Asked
    from aiproxy.dialects.bridge_request import Request
    from aiproxy.dialects.responses_parts import Item
    from aiproxy.envelope import Envelope

# Stop reasons that say that something is missing.
_INCOMPLETE = {
    "max_tokens": "max_output_tokens",
    "model_context_window_exceeded": "max_output_tokens",
    "refusal": "content_filter",
}


class MessagesBridge(Bridge):
    """See `Bridge`."""

    api = "messages"
    path = "/messages"

    def bound(self, envelope: Envelope, asked: Asked, route: Route) -> None:
        """See `Bridge`: a maximum is required there."""
        given = envelope.integer("max_output_tokens")
        if given is not None and given < 1:
            raise errors.invalid_value(
                "max_output_tokens", "'max_output_tokens' must be at least 1 on this model."
            )
        if asked.declared is None:
            most = route.default_max_tokens
            if route.max_output_tokens is not None:
                most = min(most, route.max_output_tokens)
            envelope.put("max_output_tokens", most)
            asked.declared = most

    def translate(self, request: Request, upstream: Upstream) -> dict[str, Any]:  # noqa: ARG002 - the protocol's shape
        """See `Bridge`."""
        return messages_request(request)

    def stream(self, asked: Asked) -> MessagesBridgeStream:
        """See `Dialect`."""
        return MessagesBridgeStream(asked)


class _Block:
    """A block that is open."""

    __slots__ = ("custom", "item", "kind", "pieces", "signature", "started")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.item: Item | None = None  # of a call
        self.custom = False
        self.started: Any = None  # the input that a call began with
        self.pieces: list[str] = []  # of its arguments
        self.signature = ""


class MessagesBridgeStream(ToldStream):
    """See `ToldStream`."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self._counts: dict[str, Any] = {}
        self._stop: str | None = None
        self._blocks: dict[int, _Block] = {}

    def read(self, name: bytes, data: bytes) -> None:
        """See `ToldStream`. Events of unknown types say nothing (API reference, "Streaming")."""
        event = self.document(data)
        if event is None:
            raise errors.upstream_error("The upstream sent an event that is not JSON.")
        kind = event.get("type") or name.decode("ascii", "replace")
        if kind == "error":
            raise declared(event.get("error"))
        self.writer.begin()
        match kind:
            case "message_start":
                message = event.get("message")
                self._count(message.get("usage") if isinstance(message, dict) else None)
            case "content_block_start":
                self._start(_index(event), event.get("content_block"))
            case "content_block_delta":
                self._delta(_index(event), event.get("delta"))
            case "content_block_stop":
                self._end(_index(event))
            case "message_delta":
                self._count(event.get("usage"))
                self._stopped(event.get("delta"))
            case "message_stop":
                self._conclude()

    def read_answer(self, document: dict[str, Any]) -> None:
        """See `ToldStream`."""
        blocks = document.get("content")
        if not isinstance(blocks, list):
            raise errors.upstream_error("The upstream's answer is not a message.")
        self._count(document.get("usage"))
        for index, block in enumerate(blocks):
            self._start(index, block)
            self._end(index)
        self._stopped(document)
        self._conclude()

    def _conclude(self) -> None:
        for index in list(self._blocks):
            self._end(index)
        counted = usage.from_messages(self._counts) if self._counts else None
        written = self._counts.get("cache_creation_input_tokens")
        self.count(
            counted,
            None if counted is not None else "bad" if self._counts else "missing",
            written if isinstance(written, int) else 0,
        )
        why = _INCOMPLETE.get(self._stop or "")
        self.conclude("completed" if why is None else "incomplete", why or "")

    def _count(self, given: Any) -> None:
        """Counts are cumulative: what came last of each is the whole."""
        if isinstance(given, dict):
            self._counts.update((name, n) for name, n in given.items() if n is not None)
            if isinstance(tier := given.get("service_tier"), str):
                self.writer.response["service_tier"] = _tier(tier)

    def _stopped(self, said: Any) -> None:
        if isinstance(said, dict) and isinstance(said.get("stop_reason"), str):
            self._stop = said["stop_reason"]

    # -- blocks

    def _start(self, index: int, given: Any) -> None:
        if not isinstance(given, dict):
            raise errors.upstream_error("The upstream sent a block that is none.")
        kind = str(given.get("type"))
        block = self._blocks[index] = _Block(kind)
        writer = self.writer
        match kind:
            case "text":
                writer.open("message", "output_text")
                if text := given.get("text"):
                    writer.text(str(text))
                for each in objects(given.get("citations")):
                    self._cite(each)
            case "thinking":
                writer.pause()
                block.item = writer.open("reasoning")
                if text := given.get("thinking"):
                    writer.think(str(text))
                block.signature = str(given.get("signature") or "")
            case "redacted_thinking":
                writer.pause()
                block.item = writer.open("reasoning")
                block.signature = REDACTED + str(given.get("data") or "")
            case "tool_use":
                self._call(block, given)
            case _:
                # What is not told would be missing without a word.
                raise errors.upstream_error(
                    f"The upstream sent a block of the unknown type '{errors.shown(kind)}'."
                )

    def _call(self, block: _Block, given: dict[str, Any]) -> None:
        name = str(given.get("name") or "")
        block.custom = name in self.asked.custom
        call_id = str(given.get("id") or f"call_{secrets.token_urlsafe(18)}")
        kind = "custom_tool_call" if block.custom else "function_call"
        block.item = self.writer.call(kind, name, call_id)
        block.started = given.get("input")

    def _delta(self, index: int, delta: Any) -> None:
        block = self._blocks.get(index)
        if block is None or not isinstance(delta, dict):
            return
        text = delta.get(_TEXTS.get(str(delta.get("type")), ""))
        if block.kind == "text":
            if delta.get("type") == "citations_delta":
                self._cite(delta.get("citation"))
            elif isinstance(text, str) and text:
                self.writer.text(text)
                self.only = text
        elif not isinstance(text, str) or not text:
            return
        elif delta["type"] == "signature_delta":
            self.writer.grow(len(text))
            block.signature += text
        elif block.kind == "thinking":
            self.writer.think(text)
        elif block.kind == "tool_use" and block.item is not None:
            block.pieces.append(text)
            if block.custom:
                self.writer.grow(len(text))
            else:
                self.writer.delta(block.item.sinks[0], text)

    def _end(self, index: int) -> None:
        block = self._blocks.pop(index, None)
        if block is None:
            return
        writer, item = self.writer, block.item
        if block.kind == "text":
            writer.end_text()
        elif item is None:
            return
        elif block.kind == "tool_use":
            self._end_call(block, item)
        else:
            if block.signature and not item.done:  # else it came too late to be told
                item.more["encrypted_content"] = block.signature
            writer.end(item)

    def _end_call(self, block: _Block, item: Item) -> None:
        """A call's input came by pieces of text, or whole with its start."""
        if block.custom:
            said = "".join(block.pieces)
            document = self.document(said.encode("utf-8", "surrogatepass")) if said else None
            given = block.started if document is None else document
            text = given.get("input") if isinstance(given, dict) else None
            if not isinstance(text, str):
                text = said or encode(block.started or {}).decode("utf-8", "surrogatepass")
            self.writer.delta(item.sinks[0], text)
        elif not block.pieces:
            self.writer.delta(item.sinks[0], encode(block.started or {}).decode())

    def _cite(self, given: Any) -> None:
        """A source on the web; those in documents of the request have no counterpart."""
        if isinstance(given, dict) and given.get("type") == "web_search_result_location":
            self.writer.cite(
                {
                    "type": "url_citation",
                    "url": str(given.get("url") or ""),
                    "title": str(given.get("title") or ""),
                    "start_index": 0,
                    "end_index": 0,
                }
            )


_TEXTS = {
    "text_delta": "text",
    "thinking_delta": "thinking",
    "input_json_delta": "partial_json",
    "signature_delta": "signature",
}


def _index(event: dict[str, Any]) -> int:
    """Which block an event is about; where it does not say, the first."""
    index = event.get("index")
    return index if type(index) is int else 0


def _tier(tier: str) -> str:
    return {"standard": "default"}.get(tier, tier)
