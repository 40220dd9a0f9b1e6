"""Output items of the Responses API as they grow (API reference, "Streaming events").

An item is made of sinks: parts that text is added to, delta by delta, and a call's arguments. Each
knows the events that tell a client of it. The bytes around a delta are made once for each sink,
since deltas are most of a stream.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, NoReturn

import msgspec


def encode(value: Any) -> bytes:
    """JSON, also of text that holds half of a surrogate pair (RFC 8259 section 8.2)."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return _patiently(value)


def decode(raw: bytes) -> Any:
    """JSON, which may hold half of a surrogate pair, too.

    Raises:
        ValueError: it is none, or has a number that nobody can count with.
    """
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return json.loads(raw, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def objects(value: Any) -> list[dict[str, Any]]:
    """The objects in a list; whatever an upstream puts in their place is none."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _patiently(value: Any) -> bytes:
    """The same, value by value: what is JSON already stays as it is."""
    if isinstance(value, msgspec.Raw):
        return bytes(value)
    if isinstance(value, dict):
        members = (b"%b:%b" % (_patiently(name), _patiently(each)) for name, each in value.items())
        return b"{%b}" % b",".join(members)
    if isinstance(value, list):
        return b"[%b]" % b",".join(map(_patiently, value))
    if isinstance(value, str):
        return json.dumps(value).encode()
    return msgspec.json.encode(value)


class Kind(NamedTuple):
    """A kind of sink: its events, and the member that holds its text."""

    events: str  # "delta" and "done" follow
    member: str
    part: str = ""  # the events around a part; none for what an item has only one of
    number: str = ""  # the member that numbers its parts in the item


KINDS = {
    "output_text": Kind("response.output_text", "text", "response.content_part", "content_index"),
    "refusal": Kind("response.refusal", "refusal", "response.content_part", "content_index"),
    "reasoning_text": Kind(
        "response.reasoning_text", "text", "response.content_part", "content_index"
    ),
    "summary_text": Kind(
        "response.reasoning_summary_text",
        "text",
        "response.reasoning_summary_part",
        "summary_index",
    ),
    "function_call": Kind("response.function_call_arguments", "arguments"),
    "custom_tool_call": Kind("response.custom_tool_call_input", "input"),
}
"""By the type of a part, or of an item that has one text of its own."""

CALLS = ("function_call", "custom_tool_call")
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}


class Sink:
    """What text is added to.

    Attributes:
        kind: its type.
        place: what every event about it says of where it is.
        pieces: its text so far.
        head, tail: of a delta's event, around its number and its text.
        more: members of it that an upstream gave besides.
        beside: what the upstream's own event at its end said besides.
    """

    __slots__ = (
        "annotations", "beside", "done", "head", "kind", "logprobs", "middle", "more", "names",
        "pieces", "place", "tail",
    )  # fmt: skip

    def __init__(self, kind: str, place: dict[str, Any], more: dict[str, Any]) -> None:
        self.kind = kind
        self.names = names = KINDS[kind]
        self.place = place
        self.more = more
        self.pieces: list[str] = []
        self.beside: dict[str, Any] | None = None
        self.annotations: list[Any] = list(objects(more.pop("annotations", None)))
        self.logprobs: list[Any] = list(objects(more.pop("logprobs", None)))
        self.done = False
        event = f"{names.events}.delta"
        self.head = f'event: {event}\ndata: {{"type":"{event}","sequence_number":'.encode()
        self.middle = b"," + encode(place)[1:-1] + b',"delta":'
        self.tail = b',"logprobs":[]}\n\n' if kind == "output_text" else b"}\n\n"

    @property
    def text(self) -> str:
        """All of it."""
        if len(self.pieces) > 1:
            self.pieces = ["".join(self.pieces)]
        return self.pieces[0] if self.pieces else ""

    def part(self, *, empty: bool = False) -> dict[str, Any]:
        """It as a part of an item; `empty`: as it began."""
        if self.kind == "output_text":
            own: dict[str, Any] = {
                "type": self.kind,
                "text": "" if empty else self.text,
                "annotations": [] if empty else self.annotations,
                "logprobs": [] if empty else self.logprobs,
            }
        else:
            own = {"type": self.kind, self.names.member: "" if empty else self.text}
        return {**self.more, **own}


class OtherPart:
    """A part of a type that is not known: it is told as it came."""

    __slots__ = ("done", "given", "kind", "names", "place")

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        self.kind = str(given.get("type"))
        self.names = Kind("", "", "", "content_index")
        self.done = True

    def part(self, *, empty: bool = False) -> dict[str, Any]:  # noqa: ARG002 - as of a sink
        """It, as it came."""
        return self.given


class Item:
    """An item of the output.

    Attributes:
        type: of it.
        id: of it.
        index: its place in the output.
        sinks: its parts in order; of a call the one with its arguments.
        more: its other members.
        status: in_progress until it ends; None: it has none, or its own.
    """

    __slots__ = ("done", "id", "index", "more", "sinks", "status", "type")

    def __init__(self, kind: str, item_id: str, index: int, more: dict[str, Any]) -> None:
        self.type = kind
        self.id = item_id
        self.index = index
        self.more = more
        self.sinks: list[Any] = []  # Sink or OtherPart
        self.done = False
        self.status = None
        if kind in PREFIXES:
            given = more.pop("status", None)
            # Reasoning has one only where its maker says so.
            self.status = "in_progress" if given or kind != "reasoning" else None

    @property
    def sink(self) -> Sink | None:
        """The one that is open."""
        return self.sinks[-1] if self.sinks and not self.sinks[-1].done else None

    def place_of(self, kind: str) -> dict[str, Any]:
        """Where its next part of that kind is."""
        place: dict[str, Any] = {"item_id": self.id, "output_index": self.index}
        if number := KINDS[kind].number:
            place[number] = sum(each.names.number == number for each in self.sinks)
        return place

    def encoded(self, *, empty: bool = False) -> dict[str, Any]:
        """It as it stands in events and in the response; `empty`: as it began."""
        own: dict[str, Any] = {"id": self.id}
        if self.status is not None:
            own["status"] = "in_progress" if empty else self.status
        parts = [] if empty else self.sinks
        if self.type == "message":
            own |= {"role": "assistant", "content": [each.part() for each in parts]}
        elif self.type == "reasoning":
            own["summary"] = [each.part() for each in parts if each.kind == "summary_text"]
            content = [each.part() for each in parts if each.kind != "summary_text"]
            if content:
                own["content"] = content
        elif self.type in CALLS:
            own[KINDS[self.type].member] = "" if empty or not parts else parts[0].text
        return {"type": self.type, **self.more, **own}
