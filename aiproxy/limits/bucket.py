"""Token buckets and slots: one limit each, exact.

Integers on a clock that is passed in, in nanoseconds, that never goes back (`Clock`).
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

Kind = Literal["concurrent", "requests", "tokens"]

SECOND = 1_000_000_000  # nanoseconds
MICRO = 1_000_000  # of a token: what a saved level is counted in
UNLIMITED = 1 << 62  # slots
BOUND = 2  # capacities that the largest possible outputs of a bucket's open reservations may have

_WINDOWS = {1: "second", 60: "minute", 3600: "hour", 86400: "day"}


class Clock:
    """A clock that never goes back: while the one it reads does, it stands still."""

    __slots__ = ("latest", "read")

    def __init__(self, read: Callable[[], int]) -> None:
        self.read = read
        self.latest = read()

    def now(self) -> int:
        """Nanoseconds since some moment."""
        self.latest = max(self.latest, self.read())
        return self.latest


class Window(NamedTuple):
    """What a bucket is to be: filled with `amount` in `seconds`, never over `capacity`."""

    amount: int
    seconds: int
    capacity: int


class Level(NamedTuple):
    """How a limit stands."""

    kind: Kind
    window: str  # second, minute, hour or day; empty for slots
    capacity: int
    remaining: int  # below zero: a debt
    reset: int  # ns until it is full; 0 for slots

    @property
    def left(self) -> tuple[int, int]:
        """By which the tightest is the least: what remains; of two alike the later one is."""
        return self.remaining, -self.reset


class TokenBucket:
    """One window of one limit.

    A token is cut into `unit` parts, so that each nanosecond brings exactly `amount` of them and
    nothing is ever rounded. The level is kept as the moment at which the bucket will be full, in
    parts, too: on a clock that counts `amount` parts in a nanosecond. So time refills it without
    being asked, and what is missing at `now` is `full_at - amount * now`, if that is positive.

    Attributes:
        owner: whose limit it is, as messages name it.
        spec: rate and capacity, as configured.
        full: parts of a full bucket.
        exposed: of the open and bounded reservations, by how much their largest possible use (each
            at most the capacity) exceeds what they have set aside, tokens.
        far: the same use (each at most `BOUND` capacities), tokens.
        next: what `full_at` becomes if a demand is met that is being looked at.
    """

    __slots__ = (
        "amount", "capacity", "exposed", "far", "full", "full_at", "next", "owner", "spec", "unit",
    )  # fmt: skip

    def __init__(self, owner: str, spec: Window, now: int) -> None:
        self.owner = owner
        self.exposed = self.far = 0
        self._become(spec)
        self.next = self.full_at = self.amount * now

    def _become(self, spec: Window) -> None:
        divisor = gcd(spec.amount, spec.seconds * SECOND)
        self.spec = spec
        self.amount = spec.amount // divisor
        self.unit = spec.seconds * SECOND // divisor
        self.capacity = spec.capacity
        self.full = spec.capacity * self.unit

    def __repr__(self) -> str:
        full_at = self.full_at // self.amount
        return f"<TokenBucket {self.spec.amount} per {self.window}, full at {full_at} ns>"

    @property
    def window(self) -> str:
        """The name of its window."""
        return _WINDOWS.get(self.spec.seconds, f"{self.spec.seconds} s")

    def parts(self, now: int) -> int:
        """The level, in parts."""
        return self.full - max(0, self.full_at - self.amount * now)

    def put(self, parts: int, now: int) -> None:
        """Set the level."""
        self.full_at = self.amount * now + self.full - parts

    def wait(self, parts: int) -> int:
        """Nanoseconds in which so many parts come."""
        return -(-parts // self.amount) if parts > 0 else 0

    def share(self, tokens: int) -> int:
        """What a demand of so many tokens sets aside here: never more than it can hold."""
        return min(tokens, self.capacity)

    def lacks(self, tokens: int, worst: int | None, now: int) -> int:
        """Parts that must come until a demand can be met; 0 or less: none.

        Args:
            tokens: what is to be set aside.
            worst: the largest possible use, for a bounded demand.
            now: the time.
        """
        need = self.share(tokens)
        if worst is not None:
            # If all that is open used all it may, the debt would be at most one capacity.
            need = max(need, self.exposed + min(worst, self.capacity) - self.capacity)
        return need * self.unit - self.parts(now)

    def crowded(self, worst: int | None) -> int:
        """Tokens by which the largest possible use of all that is open would exceed its bound."""
        if worst is None:
            return 0
        most = BOUND * self.capacity
        return max(0, self.far + min(worst, most) - most)

    def resize(self, spec: Window, now: int) -> None:
        """Another rate or capacity: the level stays, or shrinks with the capacity; it never grows.

        A debt stays a debt.
        """
        parts, unit, capacity = self.parts(now), self.unit, self.capacity
        self._become(spec)
        parts = parts * self.unit // unit  # floors: a part is lost rather than given
        if spec.capacity < capacity and parts > 0:
            parts = parts * spec.capacity // capacity
        self.put(parts, now)

    def level(self, kind: Kind, now: int) -> Level:
        """How it stands."""
        parts = self.parts(now)
        reset = self.wait(self.full - parts)
        return Level(kind, self.window, self.capacity, parts // self.unit, reset)


class Slots:
    """Requests at the same time.

    Attributes:
        owner: whose limit it is, as messages name it.
        most: how many there may be.
        held: how many there are.
    """

    __slots__ = ("held", "most", "owner")

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.most = UNLIMITED
        self.held = 0

    def __repr__(self) -> str:
        return f"<Slots {self.held} of {self.most}>"
