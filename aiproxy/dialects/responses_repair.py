"""Servers that say they speak the Responses API, and leave out what it requires.

Each event is read, and told again by the writer, which numbers events, items and parts, and makes
those that are missing. Whatever else an upstream says of the response, of an item or of a part
stays; events of unknown types pass, with the number that is next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiproxy import errors, usage
from aiproxy.dialects import value_of
from aiproxy.dialects.bridge import BridgeStream, declared
from aiproxy.dialects.responses import Responses
from aiproxy.dialects.responses_object import COMPLETE
from aiproxy.dialects.responses_parts import CALLS, KINDS, PREFIXES

if TYPE_CHECKING:
    from aiproxy.config import Route, Upstream
    from aiproxy.dialects import Answer, Asked
    from aiproxy.dialects.responses_parts import Item, Sink
    from aiproxy.envelope import Envelope
    from aiproxy.errors import Outcome, ProxyError

_LIFECYCLE = ("response.created", "response.queued", "response.in_progress")
_TERMINAL: dict[str, Outcome] = {
    "response.completed": "completed",
    "response.incomplete": "incomplete",
    "response.failed": "failed",
}
_SINKS = {kind.events: name for name, kind in KINDS.items()}
_PARTS = ("response.content_part", "response.reasoning_summary_part")
# What is said of an event by the writer itself.
_PLACES = frozenset(
    {"type", "sequence_number", "item_id", "output_index", "content_index", "summary_index"}
    | {"delta", "text", "refusal", "arguments", "input", "logprobs"}
)
_CODES = frozenset({"server_error", "rate_limit_exceeded", "invalid_prompt"})


class RepairedResponses(Responses):
    """See `Responses`; what comes back is completed."""

    def check(self, envelope: Envelope, asked: Asked, route: Route, upstream: Upstream) -> None:  # noqa: ARG002 - the protocol's shape
        """See `Dialect`."""
        asked.envelope = envelope  # for what a response repeats of it, also a JSON one

    def answer(self, body: bytes, asked: Asked) -> Answer:
        """See `Dialect`."""
        return RepairedStream(asked).told(body)

    def stream(self, asked: Asked) -> RepairedStream:  # type: ignore[override]
        """See `Dialect`."""
        return RepairedStream(asked)


class RepairedStream(BridgeStream):
    """See `BridgeStream`."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self._by_index: dict[int, Item] = {}  # as the upstream counts
        self._by_id: dict[str, Item] = {}
        self._declared: ProxyError | None = None

    def cut(self) -> ProxyError | None:
        """See `Stream`."""
        return self._declared

    def read(self, name: bytes, data: bytes) -> None:
        """See `BridgeStream`."""
        if data == b"[DONE]":
            return
        event = self.document(data)
        if event is None:
            self._not_json(name, data)
            return
        kind = event.get("type")
        if not isinstance(kind, str):
            kind = name.decode("ascii", "replace")
        if kind in _LIFECYCLE:
            self._lifecycle(kind, event.get("response"))
            return
        self.writer.created()
        if kind in _TERMINAL:
            self._end(_TERMINAL[kind], event.get("response"))
        elif kind.startswith("response.output_item."):
            self._item(kind, event)
        elif kind == "response.output_text.annotation.added":
            self.writer.annotate(self._sink("output_text", event), event.get("annotation"))
        elif kind == "error":
            self._failure(event)
        else:
            self._other(kind, event)

    def _not_json(self, name: bytes, data: bytes) -> None:
        """It passes as it is, unless something hangs on it."""
        if not data.strip():
            return
        kind = name.decode("ascii", "replace")
        if kind in (*_LIFECYCLE, *_TERMINAL, "response.output_item.done", "error", ""):
            raise errors.upstream_error("The upstream sent an event that is not JSON.")
        self.writer.created()
        self.writer.passed(self.raw)

    def _other(self, kind: str, event: dict[str, Any]) -> None:
        of, _, verb = kind.rpartition(".")
        if of in _SINKS and verb in ("delta", "done"):
            self._text(_SINKS[of], verb, event)
        elif of in _PARTS and isinstance(event.get("part"), dict):
            self._part(verb, event, event["part"])
        else:
            fields = {name: value for name, value in event.items() if name != "sequence_number"}
            if "item_id" in event or "output_index" in event:
                fields |= self._place(event)
            self.writer.emit(kind, {name: v for name, v in fields.items() if name != "type"})

    # -- the response

    def _lifecycle(self, kind: str, response: Any) -> None:
        if not isinstance(response, dict):
            raise errors.upstream_error(f"The upstream sent a {kind} event without a response.")
        writer = self.writer
        self._say(response)
        writer.response["status"] = "queued" if kind == "response.queued" else "in_progress"
        writer.created()
        if kind != "response.created":
            writer.lifecycle(kind)

    def _say(self, response: dict[str, Any]) -> None:
        """Take what an upstream says of the response, as far as it may be said."""
        own = {"output", "usage", "status", *self.asked.own}
        if self.asked.renamed:
            own.add("model")
        known = self.writer.response
        for name, value in response.items():
            if name in own or (value is None and known.get(name) is not None):
                continue
            if name in ("created_at", "completed_at") and isinstance(value, float):
                value = int(value)  # noqa: PLW2901 - some give the fraction of a second, too
            complete = COMPLETE.get(name)
            known[name] = value if complete is None else complete(value)

    def _end(self, outcome: Outcome, response: Any) -> None:
        if not isinstance(response, dict):
            raise errors.upstream_error(f"The upstream sent a {outcome} event without a response.")
        self._say(response)
        output = response.get("output")
        for index, item in enumerate(output if isinstance(output, list) else ()):
            if isinstance(item, dict):
                known = self._named(item)
                if known is None or known.type != item.get("type"):
                    known = self._by_index.get(index)
                if known is None or known.type != item.get("type"):
                    known = self._begin(item, index)
                self._finish(known, item)
        self._count(response.get("usage"))
        self._settle(outcome, response)

    def _settle(self, outcome: Outcome, response: dict[str, Any]) -> None:
        writer = self.writer
        details = response.get("incomplete_details")
        why = details.get("reason") if isinstance(details, dict) else None
        if outcome == "completed" and self._is_cut():
            outcome = "incomplete"
        if outcome == "failed":
            writer.response["error"] = _error(response.get("error"))
        self.conclude(outcome, str(why or "max_output_tokens"))

    def _is_cut(self) -> bool:
        """Whether an answer has all the tokens that it may have: some call that completed."""
        most = self.writer.response["max_output_tokens"]
        most = most if isinstance(most, int) else value_of(most)
        return type(most) is int and self.usage is not None and 0 < most <= self.usage.total_output

    def _count(self, given: Any) -> None:
        counted = usage.from_responses(given)
        self.count(counted, None if counted else "missing" if given is None else "bad")
        shown = self.writer.usage
        if shown is None:
            return
        for name, value in given.items():
            if isinstance(shown.get(name), dict):
                shown[name] |= value if isinstance(value, dict) else {}
            elif value is not None:
                shown[name] = value

    def _failure(self, event: dict[str, Any]) -> None:
        inner = event.get("error")
        said = {**inner, **event} if isinstance(inner, dict) else event
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
        """See `BridgeStream`."""
        if "output" not in document and "status" not in document:
            raise errors.upstream_error("The upstream's answer is not a response object.")
        status = document.get("status")
        self._end(_TERMINAL.get(f"response.{status}", "completed"), document)

    # -- items

    def _item(self, kind: str, event: dict[str, Any]) -> None:
        item = event.get("item")
        if not isinstance(item, dict):
            raise errors.upstream_error(f"The upstream sent a {kind} event without an item.")
        index = event.get("output_index")
        known = self._named(item) or (self._by_index.get(index) if index is not None else None)
        if known is None and kind.endswith(".done") and index is None:
            known = next((each for each in self._open() if each.type == item.get("type")), None)
        if known is None or known.done:
            known = self._begin(item, index)
        if kind.endswith(".done"):
            self._finish(known, item)

    def _named(self, item: dict[str, Any]) -> Item | None:
        item_id = item.get("id")
        return self._by_id.get(item_id) if isinstance(item_id, str) else None

    def _open(self) -> list[Item]:
        return [each for each in self.writer.output if not each.done]

    def _begin(self, item: dict[str, Any], index: object = None) -> Item:
        kind = str(item.get("type") or "message")
        item_id = item.get("id")
        more = {name: value for name, value in item.items() if name not in ("id", "type")}
        if kind in PREFIXES:
            for name in ("content", "summary", "arguments", "input"):
                more.pop(name, None)
        if kind in CALLS:
            more.setdefault("name", "")
            more["call_id"] = more.get("call_id") or item_id or f"call_{len(self.writer.output)}"
        known = self.writer.add(kind, more, item_id if isinstance(item_id, str) else "")
        if type(index) is int:
            self._by_index[index] = known
        self._by_id[known.id] = known
        return known

    def _finish(self, known: Item, item: dict[str, Any]) -> None:
        """An item is whole: tell what was not told of it, and take what else is said of it."""
        if known.done:
            return
        if known.type not in PREFIXES:
            known.more = {name: value for name, value in item.items() if name != "id"}
        elif known.type in CALLS:
            self._fill(known.sinks[0], item.get(KINDS[known.type].member))
        else:
            self._finish_parts(known, item)
        taken = ("id", "type", "status", "content", "summary", "arguments", "input")
        if known.type in PREFIXES:
            known.more |= {
                n: value for n, value in item.items() if n not in taken and value is not None
            }
        status = item.get("status")
        self.writer.end(known, status if status == "incomplete" else "completed")

    def _finish_parts(self, known: Item, item: dict[str, Any]) -> None:
        for name in ("summary", "content"):
            given = item.get(name)
            parts = (
                [part for part in given if isinstance(part, dict)]
                if isinstance(given, list)
                else []
            )
            for index, part in enumerate(parts):
                if part.get("type") in KINDS:
                    sink = self._numbered(known, str(part["type"]), index)
                    self._take(sink if sink is not None else self._begin_part(known, part), part)
                else:
                    known.others.append(part)

    # -- parts

    def _numbered(self, item: Item, kind: str, index: object) -> Sink | None:
        """A part of an item, by the upstream's count; without one the last of its kind."""
        number = KINDS[kind].number
        alike = [each for each in item.sinks if each.names.number == number]
        if type(index) is int:
            return alike[index] if 0 <= index < len(alike) else None
        return next((each for each in reversed(alike) if each.kind == kind and not each.done), None)

    def _where(self, event: dict[str, Any], *kinds: str) -> Item | None:
        """The item that an event is about."""
        index, item_id = event.get("output_index"), event.get("item_id")
        known = self._by_id.get(item_id) if isinstance(item_id, str) else None
        if known is None and type(index) is int:
            known = self._by_index.get(index)
        if known is None:
            known = next((each for each in reversed(self._open()) if each.type in kinds), None)
        return known

    def _place(self, event: dict[str, Any]) -> dict[str, Any]:
        """Where the item of an event is, as clients are told."""
        known = self._where(event)
        return {} if known is None else {"item_id": known.id, "output_index": known.index}

    def _sink(self, kind: str, event: dict[str, Any]) -> Sink:
        """The part that an event is about; where there is none it begins."""
        holder = kind if kind in CALLS else "message"
        if kind in ("reasoning_text", "summary_text"):
            holder = "reasoning"
        item = self._where(event, holder)
        if item is None or item.done or item.type != holder:
            named = {"type": holder, "id": event.get("item_id")}
            item = self._begin(named, event.get("output_index"))
        if kind in CALLS:
            return item.sinks[0]
        sink = self._numbered(item, kind, event.get(KINDS[kind].number))
        return self.writer.part(item, kind) if sink is None else sink

    def _begin_part(self, item: Item, part: dict[str, Any]) -> Sink:
        kind = str(part["type"])
        taken = ("type", KINDS[kind].member)
        more = {name: value for name, value in part.items() if name not in taken}
        return self.writer.part(item, kind, more)

    def _part(self, verb: str, event: dict[str, Any], part: dict[str, Any]) -> None:
        kind = part.get("type")
        if kind not in KINDS:
            self.writer.emit(str(event.get("type")), {**event, **self._place(event)})
            return
        sink = self._sink(kind, event)
        if verb == "done":
            self._take(sink, part)
            self.writer.end_part(sink)

    def _take(self, sink: Sink, part: dict[str, Any]) -> None:
        """A part is whole: tell what was not told of it, and take what else is said of it."""
        self._fill(sink, part.get(sink.names.member))
        for name, value in part.items():
            if name == "annotations":
                for annotation in (value or ())[len(sink.annotations) :]:
                    self.writer.annotate(sink, annotation)
            elif name == "logprobs":
                sink.logprobs = value or sink.logprobs
            elif name not in ("type", sink.names.member):
                sink.more[name] = value

    def _text(self, kind: str, verb: str, event: dict[str, Any]) -> None:
        sink = self._sink(kind, event)
        more = {name: value for name, value in event.items() if name not in _PLACES}
        if verb == "delta":
            delta = event.get("delta")
            if isinstance(delta, str):
                self.writer.delta(sink, delta, event.get("logprobs") or None, more)
            return
        self._fill(sink, event.get(sink.names.member))
        if kind in CALLS:
            self.writer.end_part(sink, more)

    def _fill(self, sink: Sink, text: Any) -> None:
        """Tell what no delta told: some servers send a text only once it is whole."""
        told = sink.text
        if (
            isinstance(text, str)
            and not sink.done
            and len(text) > len(told)
            and text.startswith(told)
        ):
            self.writer.delta(sink, text[len(told) :])


def _error(given: Any) -> dict[str, str]:
    """The error of a failed response: its code is one of a closed list."""
    error = declared(given)
    code = given.get("code") if isinstance(given, dict) else None
    if code in _CODES:
        return {"code": str(code), "message": error.message}
    said = error.message if code is None else f"[{code}] {error.message}"
    return {"code": error.response_error()["code"], "message": said}
