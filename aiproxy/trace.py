"""The trace of one request: whose child it is, what it tells upstreams, what is kept for its spans.

W3C Trace Context, level 1: `traceparent` is version, trace id, parent id and flags in lower-case
hexadecimal; `tracestate` is passed on as it came. What is malformed is as if it were not there
(section 4.3).
"""

from __future__ import annotations

import random
import re
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
MOST_STATE = 512  # characters of tracestate that are passed on (section 3.3.1.5)

# A later version may say more after the flags.
_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)
_STATE = re.compile(r"[\x20-\x7e\t]*")


class Parent(NamedTuple):
    """Whose child a request is."""

    trace_id: int
    span_id: int
    sampled: bool


def parent_of(traceparent: Sequence[str]) -> Parent | None:
    """Read the `traceparent` fields of a request; None unless it is exactly one good one."""
    if len(traceparent) != 1:
        return None
    match = _TRACEPARENT.fullmatch(traceparent[0].strip())
    if match is None or (match[1] == "00" and match[5]):
        return None
    return Parent(int(match[2], 16), int(match[3], 16), bool(int(match[4], 16) & 1))


def state_of(tracestate: Sequence[str]) -> str:
    """Join the `tracestate` fields of a request; empty if they cannot be passed on."""
    state = ",".join(each.strip() for each in tracestate)
    return state if len(state) <= MOST_STATE and _STATE.fullmatch(state) else ""


@dataclass(slots=True)
class Attempt:
    """One request to an upstream. Times are of the exchange's clock."""

    span_id: int
    upstream: str
    origin: str
    api: str
    model: str  # as it was asked for
    began: float
    ended: float = 0.0
    result: str = ""
    status: int = 0  # of the answer; 0: none
    request_id: str = ""  # the upstream's own


class Budget:
    """Bytes of prompts and outputs that wait to be exported, of all requests together."""

    def __init__(self, most: int) -> None:
        self._left = most
        self._returned: deque[int] = deque()

    def take(self, size: int) -> bool:
        """Take room; whether there was enough. Called in the event loop only."""
        while self._returned:
            self._left += self._returned.popleft()
        if size > self._left:
            return False
        self._left -= size
        return True

    def give_back(self, size: int) -> None:
        """Give room back, from any thread: the one that takes adds it up."""
        self._returned.append(size)


@dataclass(slots=True, eq=False)
class Trace:
    """What a request is known by in its trace.

    Attributes:
        parent: whose child it is.
        state: `tracestate`, to be passed on.
        sampled: whether its spans are exported.
        method: of the request.
        most: bytes that may be kept of its body, and of its answer.
        content: whether spans hold prompts and outputs.
        budget: of what is kept, of all requests.
        api: that the client speaks.
        fields: of the request's body, by name, as JSON.
        said: what the client was told of the answer.
        streamed: whether that was told as events.
        cut: there was no room for all of it.
        asked, model: the API and the model that the next attempt asks for.
        held: bytes of the budget.
    """

    trace_id: int
    span_id: int
    parent: Parent | None
    state: str
    sampled: bool
    method: str
    most: int
    content: bool
    budget: Budget
    attempts: list[Attempt] = field(default_factory=list)
    api: str = ""
    fields: dict[str, bytes] = field(default_factory=dict)
    said: list[bytes] = field(default_factory=list)
    streamed: bool = False
    cut: bool = False
    asked: str = ""
    model: str = ""
    held: int = 0
    _next: int = 0  # the id of the attempt that comes next
    _room: int = -1  # for the rest of the answer

    @property
    def holds_content(self) -> bool:
        """Whether what the client is told is to be kept."""
        return self.sampled and self.content

    # -- what upstreams are told

    def told(self) -> list[tuple[str, str]]:
        """The fields for the attempt that comes next, which is to be `begin`."""
        self._next = self._next or new_span_id()
        line = f"00-{self.trace_id:032x}-{self._next:016x}-{int(self.sampled):02x}"
        if self.state:
            return [(TRACEPARENT, line), (TRACESTATE, self.state)]
        return [(TRACEPARENT, line)]

    def begin(self, upstream: str, origin: str, now: float) -> Attempt:
        """An attempt is made, at `now`."""
        attempt = Attempt(
            self._next or new_span_id(), upstream, origin, self.asked, self.model, now
        )
        self._next = 0
        self.attempts.append(attempt)
        return attempt

    # -- what is kept for spans

    def keep_request(
        self, api: str, names: Iterable[str], raw: Callable[[str], bytes | None]
    ) -> None:
        """Keep a request's body by its fields; those for which there is no room are left out."""
        self.api = api
        room = self.most
        for name in names:
            value = raw(name)
            if value is None:
                continue
            if self._take(len(value), room):
                room -= len(value)
                self.fields[name] = value

    def keep_answer(self, data: bytes, *, streamed: bool) -> None:
        """Keep what the client is told, up to the first part for which there is no room."""
        self.streamed = streamed
        if self._room < 0:
            self._room = self.most
        self._room -= len(data) if self._take(len(data), self._room) else self._room
        if self._room:
            self.said.append(data)

    def _take(self, size: int, room: int) -> bool:
        if size >= room or not self.budget.take(size):
            self.cut = True
            return False
        self.held += size
        return True

    def release(self) -> None:
        """What was kept is not needed any more; from any thread."""
        self.fields, self.said = {}, []
        self.budget.give_back(self.held)
        self.held = 0


def new_trace_id() -> int:
    """A fresh one: no secret, but different from all others (section 3.2.2.3)."""
    return random.getrandbits(128) or 1


def new_span_id() -> int:
    """A fresh one."""
    return random.getrandbits(64) or 1
