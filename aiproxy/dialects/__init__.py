"""What the APIs say on the wire: one module each, sans-IO.

A dialect checks and adapts a request, and reads answers: the JSON of one, or the frames of a stream
one by one. It knows what ends a stream, what carries output, where the usage stands, and how a
failure is told in-band. It never does I/O, and time is passed in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec import Raw

from aiproxy import jsontext, sse
from aiproxy.usage import estimate_output

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Sequence

    from aiproxy.config import Route, Upstream
    from aiproxy.dialects.responses_object import Produced
    from aiproxy.envelope import Envelope
    from aiproxy.errors import Outcome, ProxyError, Shape
    from aiproxy.usage import Reason, Usage


@dataclass(slots=True)
class Asked:
    """What the client asked for, as far as the answer depends on it."""

    model: str  # as the client wrote it
    stream: bool
    renamed: bool = False  # the route sends another name upstream: restore it in the answer
    declared: int | None = None  # the largest output that the client declared, tokens
    declared_as: str = "max_output_tokens"  # by this field
    include_usage: bool = False  # chat: the client itself asked for the usage frame
    choices: int = 1  # chat: `n`
    envelope: Envelope | None = None  # responses: what a failed response repeats, while needed
    previous: str | None = None  # responses: the turn that it goes on from
    store: bool = True  # responses: whether the client wants the turn kept
    keep: bool = False  # responses: whether the answer is kept: its end waits for that
    own: dict[str, bytes] = field(default_factory=dict)  # responses: what is ours in the object
    echo: dict[str, Raw] | None = None  # responses: what of it is, ready made
    clock: Callable[[], float] = field(default=lambda: 0.0)  # seconds since the epoch
    dropped: list[str] = field(default_factory=list)  # tools left out for a bridge
    custom: frozenset[str] = frozenset()  # names of tools that a bridge has made functions of


def output_maximum(envelope: Envelope, name: str) -> int | None:
    """A declared output maximum. Below 1 it is none: some servers take it for "without end".

    Raises:
        ProxyError: it is no integer.
    """
    value = envelope.integer(name)
    return value if value is not None and value > 0 else None


def bound_output(envelope: Envelope, fields: Sequence[str], most: int) -> None:
    """Let a request that declares no output maximum declare this one.

    A 0 stays as it is: to some servers it means no output at all.
    """
    given = [name for name in fields if name in envelope]
    if not any(envelope.integer(name) == 0 for name in given):
        for name in given or fields[:1]:
            envelope.put(name, most)


class Answer(NamedTuple):
    """A JSON answer, read."""

    body: bytes
    outcome: Outcome
    usage: Usage | None
    reason: Reason | None  # why there is no usage
    produced: Produced | None = None  # responses: what is to be kept
    delivered: int | None = None  # estimated output tokens; None: as the body's size says


class Dialect(ABC):
    """One API, as an upstream speaks it.

    Attributes:
        api: its name in an upstream's `apis`.
        path: appended to an upstream's base URL.
        shape: of its errors.
        output_fields: of a request, those that bound its output; the first is the one to use.
        translates: a client of the Responses API is served over another one: a bridge.
    """

    api: str
    path: str
    shape: Shape = "openai"
    output_fields: Sequence[str] = ()
    translates = False

    @abstractmethod
    def request(self, envelope: Envelope) -> Asked:
        """Check what is read of the body, and make explicit what must be.

        Raises:
            ProxyError: a field that is read is wrong, or asks for what cannot be done.
        """

    def check(  # noqa: B027 - most have nothing to refuse
        self, envelope: Envelope, asked: Asked, route: Route, upstream: Upstream
    ) -> None:
        """Refuse what this upstream cannot be asked for, before anything is taken for it.

        Raises:
            ProxyError: `unsupported_parameter` with what it is.
        """

    def adapt(self, envelope: Envelope, asked: Asked, route: Route) -> None:  # noqa: B027 - as above
        """Make of a request what can be asked of an upstream, as `check` has found it.

        Raises:
            ProxyError: as `check`.
        """

    def encode(self, envelope: Envelope, asked: Asked, upstream: Upstream) -> bytes:  # noqa: ARG002 - what a bridge needs
        """The body to send.

        Raises:
            ProxyError: what a conversation brought in cannot be expressed.
        """
        return envelope.encode()

    @abstractmethod
    def answer(self, body: bytes, asked: Asked) -> Answer:
        """Read a JSON answer.

        Raises:
            ProxyError: the body is no answer of this API.
        """

    @abstractmethod
    def stream(self, asked: Asked) -> Stream:
        """A reader for one stream."""


class Stream(ABC):
    """Reads one stream of frames, and says what goes to the client in their place.

    Attributes:
        over: the terminal event passed; nothing more may follow but what `feed` still lets through.
        whole: what came so far is a complete answer, whether or not more follows.
        owes: seconds for which the terminal event of a complete answer is worth waiting for more,
            its usage that is; then see `close`.
        outcome: how the answer counts, once `whole`.
        begun: an event came that is not of the lifecycle: from then on it is the answer.
        output_started: an event with output (text, reasoning, arguments) passed.
        usage: of the answer, once it came.
        reason: why there is no usage.
        error: set when the stream cannot go on: what to tell the client.
        produced: a whole answer that is to be kept, once its terminal event came. This event is
            held back until `end`.
    """

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.over = False
        self.whole = False
        self.owes = 0.0
        self.outcome: Outcome = "completed"
        self.output_started = False
        self.usage: Usage | None = None
        self.reason: Reason | None = "missing"
        self.error: ProxyError | None = None
        self.produced: Produced | None = None

    @property
    def begun(self) -> bool:
        """See the class; where an API has no such events every one counts."""
        return True

    @abstractmethod
    def feed(self, raw: bytes) -> bytes:
        """Read one whole frame; what goes to the client in its place (often the same bytes)."""

    @abstractmethod
    def spill(self, part: bytes, *, ends: bool) -> bytes:
        """Read a part of a frame that is too large to be read whole; what goes to the client."""

    def end(self) -> bytes:
        """The terminal event that was held back for `produced`; the stream is over with it."""
        return b""

    def close(self) -> bytes:
        """What is still owed to the client once nothing more comes from the upstream."""
        return b""

    @abstractmethod
    def delivered(self) -> int:
        """Estimated output tokens of what passed so far."""

    def cut(self) -> ProxyError | None:
        """The upstream's own account of why it ended without a terminal event, if it gave one."""
        return None

    @abstractmethod
    def fail(self, error: ProxyError, now: int) -> bytes:
        """The frames that end the stream for the client. `now`: seconds since the epoch."""


class NativeStream(Stream):
    """A stream whose frames mostly pass as they are.

    Attributes:
        tally: of the output that passed.
    """

    def __init__(self, asked: Asked, output: re.Pattern[bytes]) -> None:
        super().__init__(asked)
        self.tally = Tally(output)
        self._came = False
        self._kept = True
        self._spilling = False
        self._terminal: Outcome | None = None

    def feed(self, raw: bytes) -> bytes:
        """See `Stream`."""
        if raw == b"\n":
            # The second half of a CRLF that came late: it goes where its frame went.
            return raw if self._kept else b""
        if raw.startswith(b":") and sse.parse(raw)[1] is None:
            return b"" if self.over else raw
        out = self._after(raw) if self.over else self._read(raw)
        self._kept = bool(out)
        self._came = self._came or not (self.over and self.outcome == "failed")
        return out

    @property
    def begun(self) -> bool:
        """See `Stream`: any event, but for a failure as the very first one."""
        return self._came

    @abstractmethod
    def _read(self, raw: bytes) -> bytes:
        """Read a frame that is no comment, before the stream is over."""

    def _after(self, _raw: bytes) -> bytes:
        """What is let through of a frame after the end."""
        return b""

    def spill(self, part: bytes, *, ends: bool) -> bytes:
        """See `Stream`."""
        if self.over:
            return b""
        if not self._spilling:
            self._spilling = self._came = True
            self._terminal = self._begin_spill(part)
        if ends:
            self._spilling = False
            if self._terminal is not None:
                self.outcome = self._terminal
                self.over = self.whole = True
        return part

    def _begin_spill(self, _part: bytes) -> Outcome | None:
        """How a large frame ends the stream, by its beginning; None: it does not."""
        return None

    def delivered(self) -> int:
        """See `Stream`."""
        return estimate_output(self.tally.deltas, self.tally.size)


def many_lines(raw: bytes) -> bool:
    """Whether a frame's data may be on several lines, hence broken anywhere."""
    return raw.count(b"data:") > 1


class Tally:
    """What a stream has delivered: text deltas and their bytes, without decoding them."""

    __slots__ = ("_pattern", "deltas", "size")

    def __init__(self, pattern: re.Pattern[bytes]) -> None:
        self._pattern = pattern
        self.deltas = 0
        self.size = 0

    def count(self, raw: bytes) -> bool:
        """Count one frame; whether it carried output."""
        carried = False
        for match in self._pattern.finditer(raw):
            size = match.end(1) - match.start(1)
            if size:
                carried = True
                self.deltas += 1
                self.size += size
        return carried


_members = msgspec.json.Decoder(dict[str, Raw])


def members_of(document: bytes | Raw | None) -> dict[str, Raw] | None:
    """The members of a JSON object, values as written; None for anything else."""
    if document is None:
        return None
    try:
        return _members.decode(document)
    except msgspec.ValidationError:
        return None
    except (msgspec.DecodeError, ValueError, RecursionError):  # ValueError: not UTF-8
        try:
            return {key: Raw(value) for key, value in jsontext.split(bytes(document)).items()}
        except (ValueError, RecursionError):
            return None


def value_of(raw: Raw | None) -> Any:
    """A JSON value, decoded; None also for one that does not decode."""
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError):  # ValueError: not UTF-8
        return None


def restore_model(document: bytes, path: tuple[str, ...], model: str) -> bytes:
    """The document with the `model` of the object at `path` as the client wrote it."""
    return jsontext.replace(document, path, {"model": msgspec.json.encode(model)})


def restored_frame(raw: bytes, data: bytes, path: tuple[str, ...], model: str) -> bytes:
    """A stream's frame with `restore_model` done to its data."""
    restored = restore_model(data, path, model)
    return raw if restored is data else sse.replace_data(raw, restored)
