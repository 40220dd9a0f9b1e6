"""The deadlines of one request, on one timer.

A request is in one phase at a time, each with its limit; `total` spans all of them, and a stream's
heartbeat runs beside them. Activity only notes the time. The timer finds out when it fires whether
something is really due, and is set again for what is due next: most requests never move it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

T = TypeVar("T")

Phase = Literal["client_body", "connect", "first_byte", "idle", "tail", "client_write", "none"]
Reason = Literal[
    "client_body", "connect", "first_byte", "idle", "tail", "client_write", "total",
    "shutting_down", "ended_at_once",
]  # fmt: skip

_OF_AN_ATTEMPT: tuple[Phase, ...] = ("connect", "first_byte")  # what is late there ends it alone

MIN_PROGRESS = 1024  # bytes that must be taken within the limit of a phase that sends them

_NEVER = float("inf")


class Interrupted(Exception):  # noqa: N818 - it is an event, not always an error
    """The request was interrupted; `reason` is a phase, `total`, or the drain."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


class Late(Exception):  # noqa: N818 - it is an event, not always an error
    """An attempt was late in a phase of its own; the request may go on."""

    def __init__(self, phase: Phase) -> None:
        super().__init__(phase)
        self.phase: Phase = phase


class Watch:
    """Interrupts the task that entered it when a deadline passes.

    Usage: `async with watch:` around the work; `Interrupted` is raised where the block ends. A
    cancellation from elsewhere stays a CancelledError.

    Args:
        total: seconds for all of it; 0 for no bound.
    """

    __slots__ = (
        "_armed_at", "_attempt", "_beat", "_began", "_every", "_handle", "_late", "_limit",
        "_loop", "_mark", "_scope", "_sent", "_since", "_total_at", "_unsent", "phase", "reason",
    )  # fmt: skip

    def __init__(self, loop: asyncio.AbstractEventLoop, *, total: float) -> None:
        self._loop = loop
        self._unsent: Callable[[], int] | None = None
        self._scope: asyncio.Timeout | None = asyncio.timeout(None)
        self._attempt: asyncio.Timeout | None = None
        self._late: Phase | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._armed_at = _NEVER
        now = loop.time()
        self._began = now
        self._total_at = now + total if total else _NEVER
        self.phase: Phase = "none"
        self._limit = 0.0
        self._since = now
        self._mark = 0
        self._beat: Callable[[], None] | None = None
        self._every = 0.0
        self._sent = now
        self.reason: Reason | None = None

    async def __aenter__(self) -> Self:
        """Begin: the current task is the one to interrupt."""
        if self._scope is None:
            raise RuntimeError("a watch is entered once")
        await self._scope.__aenter__()
        self._arm()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End; tell an interruption of our own from a cancellation."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._beat = None
        # The scope knows the task, which knows all of this: a cycle to collect per request.
        scope, self._scope = self._scope, None
        try:
            if scope is not None:
                await scope.__aexit__(kind, error, trace)
        except TimeoutError:
            if self.reason is None or not isinstance(error, asyncio.CancelledError):
                raise
            raise Interrupted(self.reason) from None

    def enter(self, phase: Phase, limit: float, unsent: Callable[[], int] | None = None) -> None:
        """Go on to another phase, of at most `limit` seconds without activity; 0 for no bound.

        `unsent` are the bytes that the other side has not taken yet: in a phase in which they are
        sent it is activity that they become fewer.
        """
        self.phase = phase
        self._limit = limit
        self._since = self._loop.time()
        self._unsent = unsent
        if unsent is not None:
            self._mark = unsent()
        if limit and self._since + limit < self._armed_at:
            self._arm()

    def bound(self, total: float) -> None:
        """Another bound for all of it, from the beginning on; 0 for none."""
        self._total_at = self._began + total if total else _NEVER
        if self._total_at < self._armed_at:
            self._arm()

    def touch(self) -> None:
        """Something came in the current phase."""
        self._since = self._loop.time()

    def sent(self) -> None:
        """Something went to the client."""
        self._sent = self._loop.time()

    def heartbeat(self, every: float, beat: Callable[[], None]) -> None:
        """Call `beat` after each `every` seconds in which nothing was sent; 0 for never."""
        if not every:
            return
        self._every = every
        self._beat = beat
        self._sent = self._loop.time()
        if self._sent + every < self._armed_at:
            self._arm()

    async def attempt(self, work: Awaitable[T]) -> T:
        """Do what may be done again: where it is late, only it ends.

        Raises:
            Late: it was not connected, or not answered, in time.
        """
        self._late = None
        scope = self._attempt = asyncio.timeout(None)
        try:
            async with scope:
                done = await work
        except TimeoutError:
            if self._late is None:
                raise
            raise Late(self._late) from None
        finally:
            self._attempt = None
        self._late = None  # it was done just before it would have been interrupted
        return done

    @property
    def missed(self) -> Phase | Reason | None:
        """The deadline that passed, of the attempt or of the request."""
        return self._late or self.reason

    def interrupt(self, reason: Reason) -> None:
        """Interrupt the task, from outside of it. The first reason stands."""
        if self.reason is None and self._scope is not None:
            self.reason = reason
            self._scope.reschedule(self._loop.time())

    def _due(self) -> float:
        due = self._total_at
        if self._limit:
            due = min(due, self._since + self._limit)
        if self._beat is not None:
            due = min(due, self._sent + self._every)
        return due

    def _arm(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._armed_at = self._due()
        if self._armed_at < _NEVER:
            self._handle = self._loop.call_at(self._armed_at, self._fire)

    def _fire(self) -> None:
        self._handle = None
        now = self._loop.time()
        if now >= self._total_at:
            self.interrupt("total")
            return
        if self._limit and now >= self._since + self._limit:
            if not self._moves():
                if self._attempt is not None and self.phase in _OF_AN_ATTEMPT:
                    self._late, self._limit = self.phase, 0.0
                    self._attempt.reschedule(now)
                    self._arm()
                    return
                self.interrupt("idle" if self.phase == "none" else self.phase)
                return
            self._since = now
        if self._beat is not None and now >= self._sent + self._every:
            self._sent = now
            self._beat()
        self._arm()

    def _moves(self) -> bool:
        """Whether the other side took something of what is sent, since the last look."""
        if self._unsent is None:
            return False
        unsent = self._unsent()
        moved = self._mark - unsent >= MIN_PROGRESS
        self._mark = unsent
        return moved
