"""OpenAI's Responses API, native (API reference, "Responses" and "Streaming events").

JSON is decoded for lifecycle, terminal, item-done and error events only. Which these are is decided
by the event's own `type`, since some servers send no `event:` lines.
"""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Raw

from aiproxy import errors, jsontext, sse, usage
from aiproxy.dialects import (
    Answer,
    Asked,
    Stream,
    elements_of,
    many_lines,
    members_of,
    output_maximum,
    restore_model,
    restored_frame,
    value_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiproxy.envelope import Envelope
    from aiproxy.errors import Outcome, ProxyError, Shape

_LIFECYCLE = frozenset({"response.created", "response.queued", "response.in_progress"})
_TERMINAL: dict[str, Outcome] = {
    "response.completed": "completed",
    "response.incomplete": "incomplete",
    "response.failed": "failed",
}
_ITEM_DONE = "response.output_item.done"
_ERROR = "error"

# A frame that may be one of the above: by a quoted string in it, or by its event line.
_CANDIDATE = re.compile(
    rb'(?:"|event: ?)(?:response\.(?:created|queued|in_progress|completed|incomplete|failed'
    rb'|output_item\.done)|error)(?:"|\r|\n)|data: ?\[DONE\]'
)
# The type of an event that is not JSON, as far as it can be told.
_SPECIAL_TYPE = re.compile(
    rb'"type"\s*:\s*"(?:response\.(?:created|queued|in_progress|completed|incomplete|failed'
    rb'|output_item\.done)|error)"'
)
_DELTA = re.compile(rb'"delta"\s*:\s*"([^"\\]*+(?:\\.[^"\\]*+)*+)"', re.DOTALL)
_OUTPUT = re.compile(rb'"response\.[a-z_.]+\.(?:delta|done)"')

# What the beginning of an event tells that is too large to be decoded.
_HEAD = 4096
_TYPE = re.compile(rb'"type"\s*:\s*"(response\.[a-z_.]+)"')
_SEQUENCE = re.compile(rb'"sequence_number"\s*:\s*(\d{1,15})')

# Fields of the request that the response object repeats.
_ECHO = (
    "previous_response_id", "instructions", "tools", "tool_choice", "truncation",
    "parallel_tool_calls", "text", "top_p", "presence_penalty", "frequency_penalty",
    "top_logprobs", "temperature", "reasoning", "max_output_tokens", "max_tool_calls", "store",
    "service_tier", "metadata", "safety_identifier", "prompt_cache_key",
)  # fmt: skip


class Responses:
    """`POST /v1/responses`."""

    api = "responses"
    path = "/responses"
    shape: Shape = "openai"
    output_fields: Sequence[str] = ("max_output_tokens",)

    def request(self, envelope: Envelope) -> Asked:
        """See `Dialect`. Conversations are not held yet: what needs one is refused."""
        model = envelope.text("model") or ""
        stream = bool(envelope.boolean("stream"))
        envelope.require_one_of("input", (b'"', b"["), "a string or an array")
        if envelope.text("previous_response_id") is not None:
            raise errors.unsupported_parameter(
                "previous_response_id", "'previous_response_id' is not supported yet."
            )
        if envelope.boolean("background"):
            raise errors.unsupported_parameter("background", "'background' is not supported.")
        if "conversation" in envelope:
            raise errors.unsupported_parameter("conversation", "'conversation' is not supported.")
        envelope.boolean("store")
        _refuse_references(envelope.raw("input"))
        envelope.put("stream", stream)
        return Asked(
            model=model,
            stream=stream,
            declared=output_maximum(envelope, "max_output_tokens"),
            envelope=envelope if stream else None,
        )

    def answer(self, body: bytes, asked: Asked) -> Answer:
        """See `Dialect`."""
        members = members_of(body)
        if members is None or not ("output" in members or "status" in members):
            raise errors.upstream_error("The upstream's answer is not a response object.")
        outcome = _TERMINAL.get(f"response.{value_of(members.get('status'))}", "completed")
        counted, reason = _usage(members)
        if asked.renamed:
            body = restore_model(body, (), asked.model)
        return Answer(body, outcome, counted, reason)

    def stream(self, asked: Asked) -> ResponsesStream:
        """See `Dialect`."""
        return ResponsesStream(asked)


def _refuse_references(given: bytes | None) -> None:
    """An item that only the upstream's shared account knows may be another client's."""
    if given is None or given[:1] != b"[":
        return
    for raw in elements_of(given):
        if _is_reference(bytes(raw)):
            raise errors.item_not_found()


def _is_reference(item: bytes) -> bool:
    """Whether any reader of an item could take it for a reference."""
    if b"item_reference" not in item and b"\\u" not in item:
        members = members_of(item) or {"role": Raw()}
        return "id" in members and not ("role" in members or value_of(members.get("type")))
    kinds: list[object] = []
    names = set()
    for key, start, end in jsontext.members(item):
        name = jsontext.key_text(key)
        names.add(name)
        if name == "type":  # which of two counts is its reader's choice
            kinds.append(value_of(Raw(item[start:end])))
    if "item_reference" in kinds:
        return True
    # `type` may be left out (API reference, "Item reference"); a message then has a role.
    return not any(kinds) and "role" not in names and "id" in names


def _usage(response: dict[str, Raw]) -> tuple[usage.Usage | None, usage.Reason | None]:
    given = value_of(response.get("usage"))
    if given is None:
        return None, "missing"
    counted = usage.from_responses(given)
    return counted, None if counted is not None else "bad"


class ResponsesStream(Stream):
    """See `Stream`."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked, _DELTA)
        self._events = 0
        self._last = b""  # the last event that went to the client
        self._base: Raw | None = None  # the latest response object
        self._items: list[Raw] = []
        self._declared: ProxyError | None = None

    def _read(self, raw: bytes) -> bytes:
        if _CANDIDATE.search(raw) is not None or many_lines(raw):
            return self._look(raw)
        if b"data:" in raw:
            self._passed(raw)
            self._output(raw)
        return raw

    def _after(self, raw: bytes) -> bytes:
        return raw if sse.parse(raw)[1] == b"[DONE]" else b""

    def _begin_spill(self, part: bytes) -> Outcome | None:
        head = part[:_HEAD]
        self._passed(head)
        named = _TYPE.search(head)
        return None if named is None else _TERMINAL.get(named.group(1).decode())

    def _output(self, data: bytes) -> None:
        self.tally.count(data)
        if not self.output_started and _OUTPUT.search(data):
            self.output_started = True

    def _passed(self, raw: bytes) -> None:
        self._events += 1
        self._last = raw

    def _look(self, raw: bytes) -> bytes:
        name, data = sse.parse(raw)
        if data is None:
            return raw
        if data == b"[DONE]":
            return b""  # before the terminal event: it would hide the one to come
        event = members_of(data)
        if event is None:
            return self._not_json(raw, name.decode("ascii", "replace"), data)
        kind = value_of(event.get("type"))
        if not isinstance(kind, str):
            kind = name.decode("ascii", "replace")
        if kind in _LIFECYCLE or kind in _TERMINAL:
            return self._lifecycle(raw, data, kind, event)
        if kind == _ITEM_DONE:
            item = event.get("item")
            if members_of(item) is None:
                return self._broken(kind)
            self._items.append(event["item"])
            self.output_started = True
        elif kind == _ERROR:
            self._declared = errors.upstream_error(_message(event), outcome="failed")
        else:
            self._output(data)
        self._passed(raw)
        return raw

    def _lifecycle(self, raw: bytes, data: bytes, kind: str, event: dict[str, Raw]) -> bytes:
        response = members_of(event.get("response"))
        if response is None:
            return self._broken(kind)
        self._base = event["response"]
        self.asked.envelope = None  # the upstream repeats it: the body need not stay in memory
        if self.asked.renamed:
            raw = restored_frame(raw, data, ("response",), self.asked.model)
        self._passed(raw)
        if kind in _TERMINAL:
            self.outcome = _TERMINAL[kind]
            self.over = self.whole = True
            self.usage, self.reason = _usage(response)
        return raw

    def _not_json(self, raw: bytes, name: str, data: bytes) -> bytes:
        special = name in _LIFECYCLE or name in _TERMINAL or name in (_ITEM_DONE, _ERROR)
        if special or _SPECIAL_TYPE.search(data):
            return self._broken(name or "lifecycle")
        self._passed(raw)
        return raw

    def _broken(self, kind: str) -> bytes:
        self.error = errors.upstream_error(f"The upstream sent a {kind} event that is not JSON.")
        return b""

    def delivered(self) -> int:
        """See `Stream`. Text that came without deltas is counted by its finished items."""
        if self.tally.deltas:
            return super().delivered()
        return usage.estimate_output(0, sum(len(bytes(item)) for item in self._items))

    def cut(self) -> ProxyError | None:
        """See `Stream`."""
        return self._declared

    def fail(self, error: ProxyError, now: int) -> bytes:
        """See `Stream`: `response.failed`, after a `response.created` if nothing went before."""
        response = skeleton(self.asked, now)
        base = value_of(self._base)
        if isinstance(base, dict):
            response.update(base)
        response["model"] = self.asked.model if self.asked.renamed else response["model"]
        frames = b""
        sequence = self._next_sequence()
        if not self._events:
            frames = _event("response.created", 0, {**response, "status": "in_progress"})
            sequence = 1
        response["status"] = "failed"
        response["error"] = error.response_error()
        response["output"] = [_on_one_line(item) for item in self._items]
        self.over = True
        return frames + _event("response.failed", sequence, response)

    def _next_sequence(self) -> int:
        event = members_of(sse.parse(self._last)[1])
        if event is None:  # not JSON, or the beginning of a large one
            number = _SEQUENCE.search(self._last)
            return int(number.group(1)) + 1 if number else self._events
        last = value_of(event.get("sequence_number"))
        return last + 1 if type(last) is int else self._events


def _message(event: dict[str, Raw]) -> str:
    """The message of an error event: at its top level, or in an `error` object."""
    inner = members_of(event.get("error")) or {}
    for raw in (event.get("message"), inner.get("message")):
        message = value_of(raw)
        if isinstance(message, str) and message:
            return message
    return "The upstream reported an error."


def _on_one_line(raw: bytes | Raw) -> Raw:
    """A JSON value fit for one data line: its line ends can only stand between tokens."""
    return Raw(bytes(raw).replace(b"\r", b" ").replace(b"\n", b" "))


def _event(name: str, sequence: int, response: dict[str, Any]) -> bytes:
    data = {"type": name, "sequence_number": sequence, "response": response}
    return sse.event(msgspec.json.encode(data), name)


def skeleton(asked: Asked, now: int) -> dict[str, Any]:
    """A response object with every field of the specification, nothing produced yet."""
    response: dict[str, Any] = {
        "id": f"resp_{secrets.token_urlsafe(24)}",
        "object": "response",
        "created_at": now,
        "completed_at": None,
        "status": "in_progress",
        "incomplete_details": None,
        "model": asked.model,
        "previous_response_id": None,
        "instructions": None,
        "output": [],
        "error": None,
        "tools": [],
        "tool_choice": "auto",
        "truncation": "disabled",
        "parallel_tool_calls": True,
        "text": {"format": {"type": "text"}},
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "top_logprobs": 0,
        "temperature": 1.0,
        "reasoning": None,
        "usage": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "store": True,
        "background": False,
        "service_tier": "default",
        "metadata": {},
        "safety_identifier": None,
        "prompt_cache_key": None,
    }
    if asked.envelope is not None:
        for name in _ECHO:
            if (raw := asked.envelope.raw(name)) is not None:
                response[name] = _on_one_line(raw)
    return response
