"""The one writer of answers of the Responses API (API reference, "Streaming events").

It is told what an upstream says: text, a refusal, reasoning, a call and its arguments, the usage,
the end. It makes the sequence of events of it, and the response object, which is the same for a
JSON answer. Whoever reads an upstream's dialect makes no event itself.

Items come in the order in which they begin. Reasoning ends where something else begins, a message
where a call begins; calls stay open to the end, since their arguments may come by turns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Raw

from aiproxy import errors, sse
from aiproxy.dialects import value_of
from aiproxy.dialects.responses_object import Produced, skeleton
from aiproxy.dialects.responses_parts import CALLS, PREFIXES, Item, Sink, encode

if TYPE_CHECKING:
    from aiproxy.dialects import Asked
    from aiproxy.errors import Outcome, ProxyError

MAX_OUTPUT = 16 * 1024 * 1024  # bytes of an answer that is gathered; endless ones end there
MAX_ITEMS = 1024  # of one answer
ITEM = 256  # bytes that an item counts besides its text


Beside = dict[str, Any] | None  # what an upstream's own event said besides: it stays


class Writer:
    """One answer.

    Attributes:
        response: the object without its output; what an upstream says of it is put there.
        output: its items, in order.
        usage: tokens, as the object shows them.
        deltas, size: of the text told so far (size in bytes), for an estimate of its tokens.
    """

    def __init__(self, asked: Asked, *, events: bool) -> None:
        self._events = events
        self._clock = asked.clock
        self.response = skeleton(asked, int(asked.clock()))
        self.response.update({name: value_of(Raw(value)) for name, value in asked.own.items()})
        self.output: list[Item] = []
        self.usage: dict[str, Any] | None = None
        self.deltas = 0
        self.size = 0
        self._out: list[bytes] = []
        self._sequence = 0
        self._begun = False
        self._gathered = 0
        self._open: dict[int, Item] = {}  # by their places
        self._speaker: Item | None = None  # the message or reasoning that is open

    # -- what is to be sent

    def take(self) -> bytes:
        """The events made since the last time."""
        out, self._out = self._out, []
        return out[0] if len(out) == 1 else b"".join(out)

    def emit(self, kind: str, fields: dict[str, Any], beside: Beside = None) -> None:
        """An event."""
        if not self._events:
            return
        said = {"type": kind, "sequence_number": self._sequence}
        data = encode({**said, **beside, **fields} if beside else {**said, **fields})
        self._sequence += 1
        # An upstream may have named it: what is no name is told by the data alone.
        name = kind if kind.isascii() and kind.isprintable() else ""
        self._out.append(sse.event(data, name))

    def passed(self, raw: bytes) -> None:
        """A frame of the upstream's own, as it is."""
        if self._events:
            self._out.append(raw)

    # -- the response

    @property
    def begun(self) -> bool:
        """Whether anything was told of it."""
        return self._begun

    @property
    def id(self) -> str:
        """Of the response."""
        return str(self.response["id"])

    def begin(self) -> None:
        """The upstream has begun to answer; later calls do nothing."""
        if not self._begun:
            self._begun = True
            self.lifecycle("response.created")
            self.lifecycle("response.in_progress")

    def created(self, beside: Beside = None) -> None:
        """The same, where the upstream itself says what follows."""
        if not self._begun:
            self._begun = True
            self.lifecycle("response.created", beside)

    def lifecycle(self, kind: str, beside: Beside = None) -> None:
        """An event with the whole object."""
        self.emit(kind, {"response": self.object()}, beside)

    def object(self) -> dict[str, Any]:
        """The response as it stands."""
        output = [each.encoded() for each in self.output if each.done]
        return {**self.response, "output": output, "usage": self.usage}

    def settle(self, outcome: Outcome, why: str = "") -> None:
        """The answer is whole: what is open ends; `terminal` is to follow.

        Args:
            outcome: completed or incomplete.
            why: it is incomplete: max_output_tokens or content_filter.
        """
        self.begin()
        status = str(outcome)
        if outcome != "failed":  # whose output is what was whole by then
            for item in list(self._open.values()):
                self.end(item, status)
        self.response["status"] = status
        self.response["incomplete_details"] = {"reason": why} if outcome == "incomplete" else None
        if outcome != "completed":
            self.response["completed_at"] = None
        elif self.response["completed_at"] is None:
            self.response["completed_at"] = int(self._clock())

    def terminal(self, beside: Beside = None) -> None:
        """The event that ends the answer."""
        self.lifecycle(f"response.{self.response['status']}", beside)

    def unsay(self) -> None:
        """The terminal event was made, but not sent: another one takes its place."""
        self._sequence -= 1
        self.response |= {"completed_at": None, "incomplete_details": None}

    def fail(self, error: ProxyError) -> None:
        """The answer ends here with what is finished of it."""
        self.created()
        self.response["status"] = "failed"
        self.response["error"] = error.response_error()
        self.terminal()

    def produced(self) -> Produced:
        """The object as it is kept, once it is finished."""
        whole = self.object()
        output = encode(whole.pop("output"))
        return Produced(self.id, b'%b,"output":' % encode(whole)[:-1], output, b"}")

    # -- items and their parts

    def add(self, kind: str, more: Beside = None, item_id: str = "", beside: Beside = None) -> Item:
        """Begin an item; `more`: its other members."""
        index = len(self.output)
        if index >= MAX_ITEMS:
            raise errors.upstream_error("The upstream's answer has too many items.")
        self.grow(ITEM)
        item_id = item_id or f"{PREFIXES.get(kind, 'item')}_{self.id.removeprefix('resp_')}_{index}"
        item = Item(kind, item_id, index, {} if more is None else more)
        self.output.append(item)
        self._open[index] = item
        if kind not in CALLS:
            self._speaker = item
        self.emit(
            "response.output_item.added",
            {"output_index": index, "item": item.encoded(empty=True)},
            beside,
        )
        if kind in CALLS:
            self.part(item, kind)
        return item

    def part(self, item: Item, kind: str, more: Beside = None, beside: Beside = None) -> Sink:
        """Begin a part of an item; the one before it ends. `more`: its other members."""
        if (before := item.sink) is not None:
            self.end_part(before)
        sink = Sink(kind, item.place_of(kind), {} if more is None else more)
        item.sinks.append(sink)
        if sink.names.part:
            fields = {**sink.place, "part": sink.part(empty=True)}
            self.emit(f"{sink.names.part}.added", fields, beside)
        return sink

    def delta(
        self,
        sink: Sink,
        text: str,
        logprobs: list[Any] | None = None,
        beside: Beside = None,
    ) -> None:
        """Text of a part, or of a call's arguments.

        Raises:
            ProxyError: the answer is larger than can be gathered.
        """
        data = encode(text)
        sink.pieces.append(text)
        self.deltas += bool(text)
        self.size += len(data) - 2
        self.grow(len(data))
        if logprobs:
            self.grow(len(encode(logprobs)))
            sink.logprobs += logprobs
        elif not beside:
            if self._events:
                # The most frequent event by far: nothing is made for it but its bytes.
                self._out.append(
                    b"%b%d%b%b%b" % (sink.head, self._sequence, sink.middle, data, sink.tail)
                )
                self._sequence += 1
            return
        fields = {**sink.place, "delta": text}
        if sink.kind == "output_text":
            fields["logprobs"] = logprobs or []
        self.emit(f"{sink.names.events}.delta", fields, beside)

    def grow(self, size: int) -> None:
        """So many more bytes are gathered.

        Raises:
            ProxyError: they are too many.
        """
        self._gathered += size
        if self._gathered > MAX_OUTPUT:
            raise errors.upstream_error("The upstream's answer is too large.")

    def annotate(self, sink: Sink, annotation: Any, beside: Beside = None) -> None:
        """A source of what a text says."""
        place = {**sink.place, "annotation_index": len(sink.annotations)}
        self.grow(len(encode(annotation)))
        sink.annotations.append(annotation)
        fields = {**place, "annotation": annotation}
        self.emit("response.output_text.annotation.added", fields, beside)

    def end_part(self, sink: Sink, beside: Beside = None) -> None:
        """A part is whole, or a call's arguments are; later calls do nothing."""
        if sink.done:
            return
        sink.done = True
        fields = {**sink.place, sink.names.member: sink.text}
        if sink.kind == "output_text":
            fields["logprobs"] = sink.logprobs
        self.emit(f"{sink.names.events}.done", fields, sink.beside)
        if sink.names.part:
            self.emit(f"{sink.names.part}.done", {**sink.place, "part": sink.part()}, beside)

    def end(self, item: Item, status: str = "completed", beside: Beside = None) -> None:
        """An item is whole, or as much of it as will come; later calls do nothing."""
        if item.done:
            return
        for sink in item.sinks:
            self.end_part(sink)
        item.done = True
        if item.status is not None:
            item.status = status
        del self._open[item.index]
        if self._speaker is item:
            self._speaker = None
        fields = {"output_index": item.index, "item": item.encoded()}
        self.emit("response.output_item.done", fields, beside)

    # -- what an upstream says, in its order

    def text(self, delta: str, logprobs: list[Any] | None = None) -> None:
        """Text of the answer."""
        self.delta(self._speaking("message", "output_text"), delta, logprobs)

    def refuse(self, delta: str) -> None:
        """Text of a refusal."""
        self.delta(self._speaking("message", "refusal"), delta)

    def cite(self, annotation: Any) -> None:
        """A source of the text that came last."""
        self.annotate(self._speaking("message", "output_text"), annotation)

    def think(self, delta: str) -> None:
        """Reasoning, as far as it is shown."""
        self.delta(self._speaking("reasoning", "summary_text"), delta)

    def call(self, kind: str, name: str, call_id: str) -> Item:
        """A call of a tool begins; its arguments follow.

        Args:
            kind: function_call or custom_tool_call.
            name: of the tool.
            call_id: under which its output will be given.
        """
        self.pause()
        return self.add(kind, {"call_id": call_id, "name": name})

    def open(self, kind: str, part: str = "") -> Item:
        """A message or reasoning that goes on, else begins; with a part that begins."""
        item = self._speaker
        if item is None or item.type != kind:
            self.pause()
            item = self.add(kind)
        if part:
            self.part(item, part)
        return item

    def end_text(self) -> None:
        """The part of the message that is open ends; the message goes on."""
        if self._speaker is not None and (sink := self._speaker.sink) is not None:
            self.end_part(sink)

    def pause(self) -> None:
        """The text or the reasoning that is open ends here: what follows is apart from it."""
        if self._speaker is not None:
            self.end(self._speaker)

    def _speaking(self, kind: str, part: str) -> Sink:
        """The open part of that kind; where there is none it begins."""
        item = self.open(kind)
        sink = item.sink
        return sink if sink is not None and sink.kind == part else self.part(item, part)
