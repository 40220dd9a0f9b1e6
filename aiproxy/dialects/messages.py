"""Anthropic's Messages, native (API reference, "Messages" and "Streaming messages")."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Raw

from aiproxy import errors, sse
from aiproxy import usage as counts
from aiproxy.dialects import (
    Answer,
    Asked,
    Dialect,
    NativeStream,
    many_lines,
    members_of,
    output_maximum,
    restore_model,
    restored_frame,
    value_of,
)

if TYPE_CHECKING:
    from aiproxy.envelope import Envelope
    from aiproxy.errors import ProxyError

_CANDIDATE = re.compile(
    rb'(?:"|event: ?)(?:message_start|message_delta|message_stop|error)(?:"|\r|\n)'
)
_DELTA = re.compile(
    rb'"(?:text|partial_json|thinking)"\s*:\s*"([^"\\]*+(?:\\.[^"\\]*+)*+)"', re.DOTALL
)
_SPECIAL = frozenset({b"message_start", b"message_delta", b"message_stop", b"error"})
_INCOMPLETE = frozenset({"max_tokens", "refusal", "model_context_window_exceeded"})


class Messages(Dialect):
    """`POST /v1/messages`."""

    api = "messages"
    path = "/messages"
    shape = "anthropic"
    output_fields = ("max_tokens",)

    def request(self, envelope: Envelope) -> Asked:
        """See `Dialect`."""
        model = envelope.text("model") or ""
        stream = bool(envelope.boolean("stream"))
        envelope.require_one_of("messages", (b"[",), "an array")
        envelope.put("stream", stream)
        return Asked(
            model=model,
            stream=stream,
            declared=output_maximum(envelope, "max_tokens"),
            declared_as="max_tokens",
        )

    def answer(self, body: bytes, asked: Asked) -> Answer:
        """See `Dialect`."""
        members = members_of(body)
        if members is None or "content" not in members:
            raise errors.upstream_error("The upstream's answer is not a message.")
        counted = counts.from_messages(given := value_of(members.get("usage")))
        stop = value_of(members.get("stop_reason"))
        if asked.renamed:
            body = restore_model(body, (), asked.model)
        return Answer(
            body,
            "incomplete" if _is_incomplete(stop) else "completed",
            counted,
            None if counted is not None else "missing" if given is None else "bad",
        )

    def stream(self, asked: Asked) -> MessagesStream:
        """See `Dialect`."""
        return MessagesStream(asked)


class CountTokens(Messages):
    """`POST /v1/messages/count_tokens`: how many tokens a request would have."""

    path = "/messages/count_tokens"

    def request(self, envelope: Envelope) -> Asked:
        """See `Dialect`."""
        model = envelope.text("model") or ""
        envelope.require_one_of("messages", (b"[",), "an array")
        return Asked(model=model, stream=False)


def _is_incomplete(stop_reason: object) -> bool:
    return isinstance(stop_reason, str) and stop_reason in _INCOMPLETE


class MessagesStream(NativeStream):
    """See `Stream`. Whole only with `message_stop`."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked, _DELTA)
        self._counts: dict[str, Any] = {}

    def _read(self, raw: bytes) -> bytes:
        if _CANDIDATE.search(raw) is not None or many_lines(raw):
            return self._look(raw)
        if self.tally.count(raw):
            self.output_started = True
        return raw

    def _look(self, raw: bytes) -> bytes:
        name, data = sse.parse(raw)
        if data is None:
            return raw
        event = members_of(data)
        if event is None:
            if name in _SPECIAL:
                self.error = errors.upstream_error(
                    f"The upstream sent a {name.decode()} event that is not JSON."
                )
                return b""
            return raw
        kind = value_of(event.get("type")) or name.decode("ascii", "replace")
        if kind == "message_start":
            return self._start(raw, data, members_of(event.get("message")) or {})
        if kind == "message_delta":
            if self._count(value_of(event.get("usage"))):
                self._settle()
            self._stop(value_of(event.get("delta")))
        elif kind == "message_stop":
            self.over = self.whole = True
            self._settle()
        elif kind == "error":
            self.over = self.whole = True
            self.outcome = "failed"  # the counts are a beginning's: what passed is estimated
        elif self.tally.count(data):
            self.output_started = True
        return raw

    def _settle(self) -> None:
        """The usage: of the start, overridden by what later events said (they are cumulative)."""
        if self._counts:
            self.usage = counts.from_messages(self._counts)
            self.reason = None if self.usage is not None else "bad"

    def _start(self, raw: bytes, data: bytes, message: dict[str, Raw]) -> bytes:
        self._count(value_of(message.get("usage")))
        if not self.asked.renamed:
            return raw
        return restored_frame(raw, data, ("message",), self.asked.model)

    def _stop(self, delta: object) -> None:
        if isinstance(delta, dict) and _is_incomplete(delta.get("stop_reason")):
            self.outcome = "incomplete"

    def _count(self, given: object) -> bool:
        """Take what an event says of the usage; whether it says the output's."""
        if not isinstance(given, dict):
            return False
        self._counts.update((k, v) for k, v in given.items() if v is not None)
        return given.get("output_tokens") is not None

    def fail(self, error: ProxyError, now: int) -> bytes:  # noqa: ARG002 - the protocol's shape
        """See `Stream`: an `error` event."""
        self.over = True
        return sse.event(msgspec.json.encode(error.frame("anthropic")), "error")
