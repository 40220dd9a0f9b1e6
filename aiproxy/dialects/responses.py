"""OpenAI's Responses API, native (API reference, "Responses" and "Streaming events").

JSON is decoded for lifecycle, terminal, item-done and error events only. Which these are is decided
by the event's own `type`, since some servers send no `event:` lines.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Raw

from aiproxy import errors, sse, usage
from aiproxy.dialects import (
    Answer,
    Asked,
    Dialect,
    NativeStream,
    Stream,
    many_lines,
    members_of,
    output_maximum,
    value_of,
)
from aiproxy.dialects.responses_object import (
    amended,
    on_one_line,
    only_ids,
    produced,
    skeleton,
    with_response,
)
from aiproxy.dialects.responses_output import Output

if TYPE_CHECKING:
    from aiproxy.envelope import Envelope
    from aiproxy.errors import Outcome, ProxyError

LIFECYCLE = frozenset({"response.created", "response.queued", "response.in_progress"})
TERMINAL: dict[str, Outcome] = {
    "response.completed": "completed",
    "response.incomplete": "incomplete",
    "response.failed": "failed",
}
_CONTINUED: tuple[Outcome, ...] = ("completed", "incomplete")
_ITEM_DONE = "response.output_item.done"
_ERROR = "error"

# A frame that may be one of the above: by a quoted string in it, or by its event line.
_CANDIDATE = re.compile(
    rb'(?:"|event: ?)(?:response\.(?:created|queued|in_progress|completed|incomplete|failed'
    rb'|output_item\.done)|error)(?:"|\r|\n)|data: ?\[DONE\]'
)
# The type of an event that is not JSON, as far as it can be told.
SPECIAL_TYPE = re.compile(
    rb'"type"\s*:\s*"(?:response\.(?:created|queued|in_progress|completed|incomplete|failed'
    rb'|output_item\.done)|error)"'
)
_DELTA = re.compile(rb'"delta"\s*:\s*"([^"\\]*+(?:\\.[^"\\]*+)*+)"', re.DOTALL)
_OUTPUT = re.compile(rb'"response\.[a-z_.]+\.(?:delta|done)"')

# What the beginning of an event tells that is too large to be decoded.
_HEAD = 4096
_TYPE = re.compile(rb'"type"\s*:\s*"(response\.[a-z_.]+)"')
_LARGE_LIFECYCLE = re.compile(
    rb'[^{]*\{[^{]*"response"\s*:\s*\{[^{]*?"id"\s*:\s*("[^"\\]*")', re.DOTALL
)
_SEQUENCE = re.compile(rb'"sequence_number"\s*:\s*(\d{1,15})')


class Responses(Dialect):
    """`POST /v1/responses`."""

    api = "responses"
    path = "/responses"
    output_fields = ("max_output_tokens",)

    def request(self, envelope: Envelope) -> Asked:
        """See `Dialect`."""
        model = envelope.text("model") or ""
        stream = bool(envelope.boolean("stream"))
        _check_input(envelope)
        if envelope.boolean("background"):
            raise errors.unsupported_parameter("background", "'background' is not supported.")
        store = envelope.boolean("store")
        envelope.put("stream", stream)
        return Asked(
            model=model,
            stream=stream,
            declared=output_maximum(envelope, "max_output_tokens"),
            envelope=envelope if stream else None,
            previous=envelope.text("previous_response_id"),
            store=store is not False,
        )

    def answer(self, body: bytes, asked: Asked) -> Answer:
        """See `Dialect`."""
        members = members_of(body)
        if members is None or not ("output" in members or "status" in members):
            raise errors.upstream_error("The upstream's answer is not a response object.")
        status = value_of(members.get("status"))
        outcome = TERMINAL.get(f"response.{status}", "completed")
        counted, reason = _usage(members)
        object_ = amended(body, members, asked)
        kept = None
        if asked.keep and outcome in _CONTINUED and status in (None, *_CONTINUED):
            kept = produced(object_)
        return Answer(object_, outcome, counted, reason, kept)

    def stream(self, asked: Asked) -> Stream:
        """See `Dialect`."""
        return ResponsesStream(asked)


class InputTokens(Responses):
    """`POST /v1/responses/input_tokens`: how many tokens a request would have."""

    path = "/responses/input_tokens"

    def request(self, envelope: Envelope) -> Asked:
        """See `Dialect`."""
        model = envelope.text("model") or ""
        _check_input(envelope)
        previous = envelope.text("previous_response_id")
        return Asked(model=model, stream=False, previous=previous, store=False)


def _check_input(envelope: Envelope) -> None:
    envelope.require_one_of("input", (b'"', b"["), "a string or an array")
    if "conversation" in envelope:
        raise errors.unsupported_parameter("conversation", "'conversation' is not supported.")


def _usage(response: dict[str, Raw]) -> tuple[usage.Usage | None, usage.Reason | None]:
    given = value_of(response.get("usage"))
    if given is None:
        return None, "missing"
    counted = usage.from_responses(given)
    return counted, None if counted is not None else "bad"


class ResponsesStream(NativeStream):
    """See `Stream`."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked, _DELTA)
        self._events = 0
        self._begun = False
        self._last = b""  # the last event that went to the client
        self._base: Raw | None = None  # the latest response object
        self._gathered = Output()
        self._lost = False  # an item was too large to be read
        self._held = b""  # the terminal event, while its turn is kept
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

    def spill(self, part: bytes, *, ends: bool) -> bytes:
        """See `Stream`. In an event that is not read our id is put in, too; but nothing else is.

        An answer that cannot be read cannot be kept.
        """
        begins = not (self.over or self._spilling)
        passed = super().spill(part, ends=ends)
        if not begins:
            return passed
        ours = self.asked.own.get("id")
        theirs = _LARGE_LIFECYCLE.match(part[:_HEAD])
        if self._terminal in _CONTINUED and self.asked.keep:
            if ours is not None:
                self._terminal = None
                return self._too_large()
            # Of what the upstream holds the ids are enough.
            known = (members_of(self._base) or {}).get("id") if theirs is None else theirs.group(1)
            self.produced = only_ids(bytes(known or b"null"), self._gathered)
            self._held = passed
            return b""
        if ours is None or theirs is None:
            return passed
        return b"".join((passed[: theirs.start(1)], ours, passed[theirs.end(1) :]))

    def _begin_spill(self, part: bytes) -> Outcome | None:
        head = part[:_HEAD]
        self._passed(head)
        named = _TYPE.search(head)
        kind = "" if named is None else named.group(1).decode()
        self._lost = self._lost or kind == _ITEM_DONE
        return TERMINAL.get(kind)

    def _output(self, data: bytes) -> None:
        self.tally.count(data)
        if self.asked.keep and "id" in self.asked.own:
            self._gathered.text(data)
        if not self.output_started and _OUTPUT.search(data):
            self.output_started = True

    @property
    def begun(self) -> bool:
        """See `Stream`."""
        return self._begun

    def _passed(self, raw: bytes, *, begins: bool = True) -> None:
        self._events += 1
        self._last = raw
        self._begun = self._begun or begins

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
        if kind in LIFECYCLE or kind in TERMINAL:
            return self._lifecycle(raw, data, kind, event)
        if kind == _ITEM_DONE:
            item = event.get("item")
            if members_of(item) is None:
                return self._broken(kind)
            self._gathered.finish(event["item"], value_of(event.get("output_index")))
            self.output_started = True
        elif kind == _ERROR:
            self._declared = errors.upstream_error(_message(event), outcome="failed")
        else:
            self._output(data)
        self._passed(raw, begins=kind != _ERROR)
        return raw

    def _lifecycle(self, raw: bytes, data: bytes, kind: str, event: dict[str, Raw]) -> bytes:
        response = members_of(event.get("response"))
        if response is None:
            return self._broken(kind)
        self._base = event["response"]
        self.asked.envelope = None  # the upstream repeats it: the body need not stay in memory
        theirs = bytes(event["response"])
        ours = amended(theirs, response, self.asked)
        if ours is not theirs:
            raw = sse.with_data(raw, data, with_response(data, event, ours))
        if kind not in TERMINAL:
            self._passed(raw, begins=False)
            return raw
        self.outcome = TERMINAL[kind]
        self.usage, self.reason = _usage(response)
        if self.asked.keep and self.outcome in _CONTINUED:
            self.produced = produced(ours, self._gathered)
            lost = self._lost and not self.produced.output[1:-1].strip()
            if lost and "id" in self.asked.own:
                return self._too_large()
            self._held = raw
            return b""
        self._end(raw)
        return raw

    def _end(self, raw: bytes) -> None:
        self._passed(raw, begins=False)
        self.over = self.whole = True

    def end(self) -> bytes:
        """See `Stream`."""
        raw, self._held = self._held, b""
        self.produced = None
        self._kept = True
        if not self._spilling:  # else it ends with its last part
            self._end(raw)
        return raw

    def _too_large(self) -> bytes:
        self.produced = None
        self.error = errors.upstream_error(
            "The upstream's answer is too large to be kept; ask with 'store': false."
        )
        return b""

    def _not_json(self, raw: bytes, name: str, data: bytes) -> bytes:
        special = name in LIFECYCLE or name in TERMINAL or name in (_ITEM_DONE, _ERROR)
        if special or SPECIAL_TYPE.search(data):
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
        finished = self._gathered.finished
        return usage.estimate_output(0, sum(len(bytes(item)) for item in finished))

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
        response.update({name: Raw(value) for name, value in self.asked.own.items()})
        frames = b""
        sequence = self._next_sequence()
        if not self._events:
            frames = _event("response.created", 0, {**response, "status": "in_progress"})
            sequence = 1
        response["status"] = "failed"
        response["error"] = error.response_error()
        response["output"] = [on_one_line(item) for item in self._gathered.finished]
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


def _event(name: str, sequence: int, response: dict[str, Any]) -> bytes:
    data = {"type": name, "sequence_number": sequence, "response": response}
    return sse.event(msgspec.json.encode(data), name)
