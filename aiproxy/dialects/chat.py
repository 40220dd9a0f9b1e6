"""OpenAI's Chat Completions and Embeddings, native (API reference, "Chat", "Embeddings").

Upstreams send a stream's usage only when asked for it, in a frame after the finish chunk: it is
always asked for, and that frame is left out where the client did not ask.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec
from msgspec import Raw

from aiproxy import errors, sse, usage
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
    from aiproxy.errors import Outcome, ProxyError

_CANDIDATE = re.compile(
    rb'"usage"\s*:\s*[^n\s]|"finish_reason"\s*:\s*"|"error"\s*:|data: ?\[DONE\]'
)
_DELTA = re.compile(
    rb'"(?:content|refusal|reasoning_content|reasoning|arguments)"\s*:\s*"([^"\\]*+(?:\\.[^"\\]*+)*+)"',
    re.DOTALL,
)
_INCOMPLETE = frozenset({"length", "content_filter"})


class Chat(Dialect):
    """`POST /v1/chat/completions`."""

    api = "chat"
    path = "/chat/completions"
    output_fields = ("max_completion_tokens", "max_tokens")

    def request(self, envelope: Envelope) -> Asked:
        """See `Dialect`."""
        model = envelope.text("model") or ""
        stream = bool(envelope.boolean("stream"))
        envelope.require_one_of("messages", (b"[",), "an array")
        choices = max(1, envelope.integer("n") or 1)
        declared, declared_as = max(
            (
                (limit * choices, name)
                for name in self.output_fields
                if (limit := output_maximum(envelope, name)) is not None
            ),
            default=(None, ""),
        )
        include_usage = False
        envelope.put("stream", stream)
        if stream:
            options = envelope.object("stream_options") or {}
            include_usage = value_of(options.get("include_usage")) is True
            envelope.put("stream_options", {**options, "include_usage": True})
        return Asked(
            model=model,
            stream=stream,
            declared=declared,
            declared_as=declared_as,
            include_usage=include_usage,
            choices=choices,
        )

    def answer(self, body: bytes, asked: Asked) -> Answer:
        """See `Dialect`."""
        members = members_of(body)
        if members is None or "choices" not in members:
            raise errors.upstream_error("The upstream's answer is not a chat completion.")
        reasons = {reason for _, reason in _finished(members.get("choices"))}
        outcome: Outcome = "incomplete" if reasons & _INCOMPLETE else "completed"
        counted, reason = _usage(members)
        if asked.renamed:
            body = restore_model(body, (), asked.model)
        return Answer(body, outcome, counted, reason)

    def stream(self, asked: Asked) -> ChatStream:
        """See `Dialect`."""
        return ChatStream(asked)


class Embeddings(Dialect):
    """`POST /v1/embeddings`: JSON only."""

    api = "embeddings"
    path = "/embeddings"

    def request(self, envelope: Envelope) -> Asked:
        """See `Dialect`. `stream` is no field of this API; strict upstreams refuse it."""
        if envelope.boolean("stream"):
            raise errors.unsupported_parameter("stream", "Embeddings cannot be streamed.")
        return Asked(model=envelope.text("model") or "", stream=False, declared=0)

    def answer(self, body: bytes, asked: Asked) -> Answer:
        """See `Dialect`."""
        members = members_of(body)
        if members is None or "data" not in members:
            raise errors.upstream_error("The upstream's answer is not a list of embeddings.")
        counted, reason = _usage(members)
        if asked.renamed:
            body = restore_model(body, (), asked.model)
        return Answer(body, "completed", counted, reason)

    def stream(self, asked: Asked) -> ChatStream:
        """Never asked for: `request` refuses it."""
        raise errors.unsupported_parameter("stream", f"{asked.model} cannot be streamed.")


def _usage(members: dict[str, Raw]) -> tuple[usage.Usage | None, usage.Reason | None]:
    given = value_of(members.get("usage"))
    if given is None:
        return None, "missing"
    counted = usage.from_chat(given)
    return counted, None if counted is not None else "bad"


def _finished(choices: Raw | None) -> list[tuple[int, str]]:
    """Index and finish reason of the choices that have one."""
    found = value_of(choices)
    if not isinstance(found, list):
        return []
    return [
        (index if isinstance(index := choice.get("index"), int) else 0, reason)
        for choice in found
        if isinstance(choice, dict) and isinstance(reason := choice.get("finish_reason"), str)
    ]


class ChatStream(NativeStream):
    """See `Stream`. Whole with a finish reason for every choice, even without `[DONE]`."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked, _DELTA)
        self._finished: set[int] = set()
        self._usage_frames = 0

    def _read(self, raw: bytes) -> bytes:
        if self.asked.renamed or _CANDIDATE.search(raw) is not None or many_lines(raw):
            return self._look(raw)
        if self.tally.count(raw):
            self.output_started = True
        return raw

    def _look(self, raw: bytes) -> bytes:
        name, data = sse.parse(raw)
        if data is None:
            return raw
        if data == b"[DONE]":
            return self._done(raw)
        chunk = members_of(data)
        if chunk is None:
            return self._not_json(raw, name)
        if self.tally.count(data):
            self.output_started = True
        if value_of(chunk.get("error")) is not None:
            self.over = self.whole = True
            self.outcome = "failed"
            return raw
        self._finish(chunk.get("choices"))
        if value_of(chunk.get("usage")) is not None:
            alone = not value_of(chunk.get("choices"))
            self._count(chunk, alone=alone)
            if alone and not self.asked.include_usage:
                return b""
        if self.asked.renamed:
            return restored_frame(raw, data, (), self.asked.model)
        return raw

    def _count(self, chunk: dict[str, Raw], *, alone: bool) -> None:
        """Usage beside content is a running total, so the last counts.

        A frame of its own says the whole, and two of them contradict each other (llama.cpp sends
        one for each choice): then neither is believed.
        """
        self._usage_frames += alone
        if self._usage_frames > 1:
            self.usage, self.reason = None, "bad"
        else:
            self.usage, self.reason = _usage(chunk)

    def _finish(self, choices: Raw | None) -> None:
        for index, reason in _finished(choices):
            self._finished.add(index)
            if reason in _INCOMPLETE:
                self.outcome = "incomplete"
        self.whole = len(self._finished) >= self.asked.choices

    def _not_json(self, raw: bytes, name: bytes) -> bytes:
        if name != b"error":
            return raw
        self.error = errors.upstream_error("The upstream sent an error event that is not JSON.")
        return b""

    def _done(self, raw: bytes) -> bytes:
        # `n` may be ignored upstream: its own end of the stream counts if any choice finished.
        if not self._finished:
            return b""
        self.over = self.whole = True
        return raw

    def fail(self, error: ProxyError, now: int) -> bytes:  # noqa: ARG002 - the protocol's shape
        """See `Stream`: an error frame, and no `[DONE]`."""
        self.over = True
        return sse.event(msgspec.json.encode(error.frame("openai")))
