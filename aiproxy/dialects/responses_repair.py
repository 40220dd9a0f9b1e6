"""Servers that say they speak the Responses API, and leave out what it requires.

Each event is read, and told again by the writer, which numbers events, items and parts, and makes
those that are missing (`responses_followed`). Whatever else an upstream says of the response, of an
item or of a part stays; events of unknown types pass, with the number that is next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiproxy import errors, usage
from aiproxy.dialects import value_of
from aiproxy.dialects.responses import LIFECYCLE, SPECIAL_TYPE, TERMINAL, Responses
from aiproxy.dialects.responses_followed import Followed, beside
from aiproxy.dialects.responses_object import COMPLETE, repeated
from aiproxy.dialects.responses_parts import KINDS
from aiproxy.dialects.told_stream import ToldStream, declared

if TYPE_CHECKING:
    from aiproxy.config import Route
    from aiproxy.dialects import Answer, Asked
    from aiproxy.dialects.responses_writer import Beside
    from aiproxy.envelope import Envelope
    from aiproxy.errors import Outcome, ProxyError

_SINKS = {kind.events: name for name, kind in KINDS.items()}
_PARTS = ("response.content_part", "response.reasoning_summary_part")
_CODES = frozenset({"server_error", "rate_limit_exceeded", "invalid_prompt"})


class RepairedResponses(Responses):
    """See `Responses`; what comes back is completed."""

    def adapt(self, envelope: Envelope, asked: Asked, route: Route) -> None:  # noqa: ARG002 - the protocol's shape
        """See `Dialect`."""
        asked.envelope, asked.echo = None, repeated(envelope)

    def answer(self, body: bytes, asked: Asked) -> Answer:
        """See `Dialect`."""
        return RepairedStream(asked).told(body)

    def stream(self, asked: Asked) -> RepairedStream:
        """See `Dialect`."""
        return RepairedStream(asked)


class RepairedStream(ToldStream):
    """See `ToldStream`."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self._followed: Followed | None = None
        self._most = value_of((asked.echo or {}).get("max_output_tokens"))
        self._identified = False  # the upstream has told its id
        self._declared: ProxyError | None = None

    @property
    def items(self) -> Followed:
        """What is known of the upstream's items."""
        if self._followed is None:
            self._followed = Followed(self.writer)
        return self._followed

    def cut(self) -> ProxyError | None:
        """See `Stream`."""
        return self._declared

    def read(self, name: bytes, data: bytes) -> None:
        """See `ToldStream`."""
        if data == b"[DONE]":
            return
        event = self.document(data)
        if event is None:
            self._not_json(name, data)
            return
        kind = event.get("type")
        if not isinstance(kind, str):
            kind = name.decode("ascii", "replace")
        if kind in LIFECYCLE:
            self._lifecycle(kind, event.get("response"), beside(event))
            return
        self.writer.created()
        if kind in TERMINAL:
            self._end(TERMINAL[kind], event.get("response"), beside(event))
        elif kind.startswith("response.output_item."):
            self.items.item(kind, event)
        elif kind == "response.output_text.annotation.added":
            sink = self.items.sink("output_text", event)
            self.writer.annotate(sink, event.get("annotation"), beside(event))
        elif kind == "error" or (not kind and event.get("error") is not None):
            self._failure(event)
        else:
            self._other(kind, event)

    def _not_json(self, name: bytes, data: bytes) -> None:
        """It passes as it is, unless something hangs on it."""
        if not data.strip():
            return
        kind = name.decode("ascii", "replace")
        special = kind in (*LIFECYCLE, *TERMINAL, "response.output_item.done", "error")
        if special or SPECIAL_TYPE.search(data):
            raise errors.upstream_error("The upstream sent an event that is not JSON.")
        self.writer.created()
        self.writer.passed(self.raw)

    def _other(self, kind: str, event: dict[str, Any]) -> None:
        of, _, verb = kind.rpartition(".")
        if of in _SINKS and verb in ("delta", "done"):
            self.items.text(_SINKS[of], verb, event)
        elif of in _PARTS and isinstance(event.get("part"), dict):
            self.items.part(verb, event, event["part"])
        else:
            fields = {name: value for name, value in event.items() if name != "sequence_number"}
            if "item_id" in event or "output_index" in event:
                fields |= self.items.place(event)
            if isinstance(response := event.get("response"), dict):
                fields["response"] = {**response, **self._ours()}
            self.writer.emit(kind, {name: v for name, v in fields.items() if name != "type"})

    # -- the response

    def _lifecycle(self, kind: str, response: Any, more: Beside) -> None:
        if not isinstance(response, dict):
            raise errors.upstream_error(f"The upstream sent a {kind} event without a response.")
        writer = self.writer
        self._say(response)
        writer.response["status"] = "queued" if kind == "response.queued" else "in_progress"
        if kind == "response.created":
            writer.created(more)
        else:
            writer.created()
            writer.lifecycle(kind, more)

    def _ours(self) -> dict[str, Any]:
        """What in a response object is not the upstream's to say."""
        names = [*self.asked.own, *(("model",) if self.asked.renamed else ())]
        return {name: self.writer.response[name] for name in names}

    def _say(self, response: dict[str, Any]) -> None:
        """Take what an upstream says of the response, as far as it may be said."""
        own = {"object", "output", "usage", "status", *self.asked.own}
        if self.asked.renamed:
            own.add("model")
        if self.writer.begun:
            own.add("created_at")  # another one was told
        known = self.writer.response
        self._identified = self._identified or isinstance(response.get("id"), str)
        for name, value in response.items():
            if name in own or (value is None and known.get(name) is not None):
                continue
            if name in ("created_at", "completed_at"):
                value = _seconds(value)  # noqa: PLW2901 - some give the fraction of one, too
                if value is None:
                    continue
            complete = COMPLETE.get(name)
            known[name] = value if complete is None else complete(value)

    def _end(self, outcome: Outcome, response: Any, more: Beside = None) -> None:
        if not isinstance(response, dict):
            raise errors.upstream_error(f"The upstream sent a {outcome} event without a response.")
        self._say(response)
        output = response.get("output")
        self.items.conclude(output if isinstance(output, list) else [])
        self._count(response.get("usage"))
        self._settle(outcome, response, more)

    def _settle(self, outcome: Outcome, response: dict[str, Any], more: Beside) -> None:
        writer = self.writer
        details = response.get("incomplete_details")
        why = details.get("reason") if isinstance(details, dict) else None
        if outcome == "completed" and self._is_cut():
            outcome = "incomplete"
        if outcome == "failed":
            writer.response["error"] = _error(response.get("error"))
        self.conclude(outcome, str(why or "max_output_tokens"), more)
        if self.produced is not None and "id" not in self.asked.own and not self._identified:
            self.produced = None  # nobody could go on from an id that the upstream does not know

    def _is_cut(self) -> bool:
        """Whether an answer has all the tokens that it may have: some call that completed."""
        most = self._most
        return type(most) is int and self.usage is not None and 0 < most <= self.usage.total_output

    def _count(self, given: Any) -> None:
        counted = usage.from_responses(given)
        self.count(counted, None if counted else "missing" if given is None else "bad")
        shown = self.writer.usage
        if shown is None:
            return
        for name, value in given.items():
            if isinstance(shown.get(name), dict):
                details = value if isinstance(value, dict) else {}
                shown[name] |= {n: each for n, each in details.items() if each is not None}
            elif value is not None:
                shown[name] = value

    def _failure(self, event: dict[str, Any]) -> None:
        inner = event.get("error")
        said = {name: value for name, value in event.items() if value is not None}
        if isinstance(inner, dict):
            said = {**inner, **said}
        self._declared = declared(said)
        code = said.get("code")
        self.writer.emit(
            "error",
            {
                "code": None if code is None else str(code),
                "message": self._declared.message,
                "param": said.get("param"),
            },
        )

    def read_answer(self, document: dict[str, Any]) -> None:
        """See `ToldStream`."""
        if "output" not in document and "status" not in document:
            raise errors.upstream_error("The upstream's answer is not a response object.")
        status = document.get("status")
        outcome = TERMINAL.get(f"response.{'completed' if status is None else status}")
        if outcome is None:
            raise errors.upstream_error("The upstream's answer is not finished.")
        self._end(outcome, document)


def _seconds(value: Any) -> int | None:
    """A time in whole seconds; None for what is none."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**53
    return int(value) if known else None


def _error(given: Any) -> dict[str, str]:
    """The error of a failed response: its code is one of a closed list."""
    error = declared(given)
    code = given.get("code") if isinstance(given, dict) else None
    if error.code == "upstream_credential":
        return error.response_error()
    if isinstance(code, str) and code in _CODES:
        return {"code": code, "message": error.message}
    said = error.message if code is None else f"[{code}] {error.message}"
    return {"code": error.response_error()["code"], "message": said}
