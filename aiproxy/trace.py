"""The trace of one request: whose child it is, what upstreams are told, what was tried.

W3C Trace Context, level 1: `traceparent` is version, trace id, parent id and flags in lower-case
hexadecimal; `tracestate` is passed on as it came. What is malformed is as if it were not there
(section 4.3).
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiproxy.kept import Kept

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
MOST_STATE = 512  # characters of tracestate that are passed on (section 3.3.1.5)
MOST_MODEL = 128  # characters of a model's name, which may be the client's

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
    """Join the `tracestate` fields of a request; of too many members the right-most are left out.

    Empty if they cannot be passed on.
    """
    state = ",".join(each.strip() for each in tracestate)
    if len(state) > MOST_STATE:
        state = state[: MOST_STATE + 1].rpartition(",")[0]
    return state if _STATE.fullmatch(state) else ""


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
    result: str = ""  # empty: nobody waited for it any more
    status: int = 0  # of the answer; 0: none
    request_id: str = ""  # the upstream's own


@dataclass(slots=True, eq=False)
class Trace:
    """What a request is known by in its trace.

    Attributes:
        trace_id: of all its spans.
        span_id: of its own.
        parent: whose child it is.
        state: `tracestate`, to be passed on.
        method: of the request, or `_OTHER` (OpenTelemetry, "HTTP spans").
        kept: what its span is to say of the request and its answer; None: it is not sampled.
        attempts: so far.
        api, model: that the next attempt asks for.
        offset: seconds since the epoch at 0 of the exchange's clock, once it has ended.
    """

    trace_id: int
    span_id: int
    parent: Parent | None
    state: str
    method: str
    kept: Kept | None
    attempts: list[Attempt] = field(default_factory=list)
    api: str = ""
    model: str = ""
    offset: float = 0.0
    _next: int = 0  # the id of the attempt that comes next

    def told(self) -> list[tuple[str, str]]:
        """The fields for the attempt that comes next, which is to be `begin`."""
        self._next = self._next or new_span_id()
        flags = 0 if self.kept is None else 1
        line = f"00-{self.trace_id:032x}-{self._next:016x}-{flags:02x}"
        if self.state:
            return [(TRACEPARENT, line), (TRACESTATE, self.state)]
        return [(TRACEPARENT, line)]

    def aim(self, api: str, model: str) -> None:
        """The next attempt asks for this."""
        self.api, self.model = api, model[:MOST_MODEL]

    def begin(self, upstream: str, origin: str, now: float) -> Attempt:
        """An attempt is made, at `now`."""
        span_id, self._next = self._next or new_span_id(), 0
        attempt = Attempt(span_id, upstream, origin, self.api, self.model, now)
        self.attempts.append(attempt)
        return attempt


def new_trace_id() -> int:
    """A fresh one: no secret, but different from all others (section 3.2.2.3)."""
    return random.getrandbits(128) or 1


def new_span_id() -> int:
    """A fresh one."""
    return random.getrandbits(64) or 1
