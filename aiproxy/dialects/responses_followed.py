"""An upstream's own items, as it counts and names them, followed to those that are told.

Events of a loose server may leave out where they belong, or not come at all: an event without an
index or an id is about what is open of its kind, and what was never told is told at its end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiproxy import errors
from aiproxy.dialects.responses_parts import CALLS, KINDS, PREFIXES, OtherPart, Sink, objects

if TYPE_CHECKING:
    from aiproxy.dialects.responses_parts import Item
    from aiproxy.dialects.responses_writer import Beside, Writer

# What the writer itself says in an event.
_OWN = frozenset(
    {"type", "sequence_number", "item_id", "output_index", "content_index", "summary_index"}
    | {"delta", "text", "refusal", "arguments", "input", "logprobs", "response", "item", "part"}
    | {"annotation", "annotation_index"}
)


def beside(event: dict[str, Any]) -> dict[str, Any]:
    """What an event says besides."""
    return {name: value for name, value in event.items() if name not in _OWN}


def _index(event: dict[str, Any]) -> int | None:
    """The upstream's count of items."""
    index = event.get("output_index")
    return index if type(index) is int else None


def _is_part(part: dict[str, Any]) -> bool:
    """Whether it is a part whose text is told."""
    kind = KINDS.get(str(part.get("type")))
    return kind is not None and bool(kind.part)


class Followed:
    """The items of one answer."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._by_index: dict[int, Item] = {}  # as the upstream counts
        self._by_id: dict[str, Item] = {}
        self._early: dict[object, dict[str, Any]] = {}  # calls whose names did not come yet

    def conclude(self, output: list[Any]) -> None:
        """The whole output: tell what was not told of it."""
        items = objects(output)
        found = [self._told(item, index) for index, item in enumerate(items)]
        taken = {known.index for known in found if known is not None}
        # Those that neither an id nor an index tells are the same if they are of one type, in turn.
        left: dict[str, list[Item]] = {}
        for each in reversed(self._writer.output):
            if each.index not in taken:
                left.setdefault(each.type, []).append(each)
        for index, item in enumerate(items):
            known = found[index]
            if known is None and (alike := left.get(str(item.get("type")))):
                known = alike.pop()
            self._finish(self._begin(item, index) if known is None else known, item)
        for early in list(self._early.values()):
            self._finish(self._begin(early), early)

    def item(self, kind: str, event: dict[str, Any]) -> None:
        """An item begins, or is whole."""
        item = event.get("item")
        if not isinstance(item, dict):
            raise errors.upstream_error(f"The upstream sent a {kind} event without an item.")
        index = _index(event)
        known = self._named(item) or (self._by_index.get(index) if index is not None else None)
        if known is None and kind.endswith(".done") and index is None:
            known = next((each for each in self._open() if each.type == item.get("type")), None)
        done = kind.endswith(".done")
        if known is None or known.done:
            known = self._begin(item, index, None if done else beside(event))
        if done:
            self._finish(known, item, beside(event))

    def _named(self, item: dict[str, Any]) -> Item | None:
        item_id = item.get("id")
        return self._by_id.get(item_id) if isinstance(item_id, str) else None

    def _told(self, item: dict[str, Any], index: int) -> Item | None:
        """The one that an item of the whole output is, by its id or its place."""
        known = self._named(item) or self._by_index.get(index)
        return known if known is not None and known.type == item.get("type", known.type) else None

    def _open(self) -> list[Item]:
        return [each for each in self._writer.output if not each.done]

    def _begin(self, item: dict[str, Any], index: object = None, beside: Beside = None) -> Item:
        kind = str(item.get("type") or "message")
        item_id = item.get("id")
        if isinstance(item_id, str) and item_id in self._by_id:
            item_id = None  # it was of another one, which is done
        more = {name: value for name, value in item.items() if name not in ("id", "type")}
        if kind in PREFIXES:
            for name in ("content", "summary", "arguments", "input"):
                more.pop(name, None)
        if kind in CALLS:
            more.setdefault("name", "")
            more["call_id"] = more.get("call_id") or item_id or f"call_{len(self._writer.output)}"
        name = item_id if isinstance(item_id, str) else ""
        known = self._writer.add(kind, more, name, beside)
        if type(index) is int:
            self._by_index[index] = known
        self._by_id[known.id] = known
        if kind in CALLS:
            early = self._early.pop(index, None) or self._early.pop(item_id, None)
            self._fill(known.sinks[0], (early or {}).get(KINDS[kind].member))
        return known

    def _finish(self, known: Item, item: dict[str, Any], beside: Beside = None) -> None:
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
        self._writer.end(known, status if status == "incomplete" else "completed", beside)

    def _finish_parts(self, known: Item, item: dict[str, Any]) -> None:
        for name in ("summary", "content"):
            given = item.get(name)
            if isinstance(given, str):  # some servers know one text alone
                given = [{"type": "output_text", "text": given}]
            for index, part in enumerate(objects(given)):
                self._finish_part(known, part, index)

    def _finish_part(self, known: Item, part: dict[str, Any], index: int) -> None:
        sink = self._numbered(known, part, index)
        if isinstance(sink, OtherPart):
            sink.given = part
        elif not _is_part(part):
            known.sinks.append(OtherPart(part))
        else:
            self._take(self._begin_part(known, part) if sink is None else sink, part)

    # -- parts

    def _numbered(self, item: Item, part: dict[str, Any], index: object) -> Any:
        """A part of an item, by the upstream's count; without one the last of its kind."""
        kind = str(part.get("type"))
        number = KINDS[kind].number if _is_part(part) else "content_index"
        alike = [each for each in item.sinks if each.names.number == number]
        if type(index) is int:
            return alike[index] if 0 <= index < len(alike) else None
        return next((each for each in reversed(alike) if each.kind == kind and not each.done), None)

    def _other_part(self, event: dict[str, Any], part: dict[str, Any], verb: str) -> None:
        """Keep a part of a type that is not known in its place."""
        item = self._where(event, "message", "reasoning")
        if item is None:
            return
        known = self._numbered(item, part, event.get("content_index"))
        if isinstance(known, OtherPart):
            known.given = part
        elif known is None and verb == "added":
            if (before := item.sink) is not None:
                self._writer.end_part(before)
            item.sinks.append(OtherPart(part))

    def _where(self, event: dict[str, Any], *kinds: str) -> Item | None:
        """The item that an event is about."""
        index, item_id = _index(event), event.get("item_id")
        known = self._by_id.get(item_id) if isinstance(item_id, str) else None
        if known is None and index is not None:
            known = self._by_index.get(index)
        if known is None:
            known = next((each for each in reversed(self._open()) if each.type in kinds), None)
            if known is not None and isinstance(item_id, str):
                self._by_id[item_id] = known  # some leave the id out of the item itself
        return known

    def place(self, event: dict[str, Any]) -> dict[str, Any]:
        """Where the item of an event is, as clients are told."""
        known = self._where(event)
        return {} if known is None else {"item_id": known.id, "output_index": known.index}

    def sink(self, kind: str, event: dict[str, Any], part: dict[str, Any] | None = None) -> Sink:
        """The part that an event is about; where there is none it begins.

        Args:
            kind: of the part, or of the call whose arguments it is about.
            event: that is about it.
            part: it, as the event that begins it has it.
        """
        holder = kind if kind in CALLS else "message"
        if kind in ("reasoning_text", "summary_text"):
            holder = "reasoning"
        item = self._where(event, holder)
        if item is None or item.done or item.type != holder:
            named = {"type": holder, "id": event.get("item_id")}
            item = self._begin(named, _index(event))
        if kind in CALLS:
            call: Sink = item.sinks[0]
            return call
        known = self._numbered(item, {"type": kind}, event.get(KINDS[kind].number))
        if isinstance(known, Sink):
            return known
        if part is None:
            return self._writer.part(item, kind)
        return self._begin_part(item, part, beside(event))

    def _begin_part(self, item: Item, part: dict[str, Any], beside: Beside = None) -> Sink:
        kind = str(part["type"])
        taken = ("type", KINDS[kind].member)
        more = {name: value for name, value in part.items() if name not in taken}
        return self._writer.part(item, kind, more, beside)

    def part(self, verb: str, event: dict[str, Any], part: dict[str, Any]) -> None:
        """A part begins, or is whole."""
        kind = str(part.get("type"))
        if not _is_part(part):
            self._other_part(event, part, verb)
            fields = {n: v for n, v in event.items() if n not in ("type", "sequence_number")}
            self._writer.emit(str(event.get("type")), {**fields, **self.place(event)})
            return
        done = verb == "done"
        sink = self.sink(kind, event, None if done else part)
        if done:
            self._take(sink, part)
            self._writer.end_part(sink, beside(event))

    def _take(self, sink: Sink, part: dict[str, Any]) -> None:
        """A part is whole: tell what was not told of it, and take what else is said of it."""
        self._fill(sink, part.get(sink.names.member))
        sink.more = {}  # what it says last of it counts
        for name, value in part.items():
            if name == "annotations":
                for annotation in objects(value)[len(sink.annotations) :]:
                    self._writer.annotate(sink, annotation)
            elif name == "logprobs":
                sink.logprobs = objects(value) or sink.logprobs
            elif name not in ("type", sink.names.member):
                sink.more[name] = value

    def text(self, kind: str, verb: str, event: dict[str, Any]) -> None:
        """A piece of a text, or all of it."""
        if kind in CALLS and self._where(event, kind) is None:
            self._hear(kind, event)
            return
        sink = self.sink(kind, event)
        more = beside(event)
        if verb == "delta":
            delta = event.get("delta")
            if isinstance(delta, str):
                self._writer.delta(sink, delta, objects(event.get("logprobs")), more)
            return
        self._fill(sink, event.get(sink.names.member))
        sink.beside = more
        if kind in CALLS:
            self._writer.end_part(sink)

    def _hear(self, kind: str, event: dict[str, Any]) -> None:
        """Arguments of a call that did not begin: it is told once its tool is known."""
        index, item_id = _index(event), event.get("item_id")
        key = item_id if index is None else index
        if not isinstance(key, int | str):
            key = None
        call = self._early.setdefault(key, {"type": kind, "id": item_id, KINDS[kind].member: ""})
        member = KINDS[kind].member
        if isinstance(event.get("delta"), str):
            call[member] += event["delta"]
        elif isinstance(event.get(member), str):
            call[member] = event[member]

    def _fill(self, sink: Sink, text: Any) -> None:
        """Tell what no delta told: some servers send a text only once it is whole."""
        told = sink.text
        if (
            isinstance(text, str)
            and not sink.done
            and len(text) > len(told)
            and text.startswith(told)
        ):
            self._writer.delta(sink, text[len(told) :])
