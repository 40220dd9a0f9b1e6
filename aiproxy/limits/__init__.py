"""May they, and when again: token buckets and slots per key and per route.

A limit belongs to a key or to a route. A request takes what it needs from all limits of both, or
from none (`admission`); at its end it is settled with what it really used. The arithmetic is exact
and knows no I/O (`bucket`). Where the levels are kept is a `LimitStore`'s business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from aiproxy.limits.account import Account, Saved, SavedBucket, windows
from aiproxy.limits.admission import ONE_REQUEST, Combined, Demand, Refusal, Reservation
from aiproxy.limits.bucket import SECOND, Clock, Kind, Level, Slots, TokenBucket, Window
from aiproxy.limits.told import go_duration, ratelimit_headers, tightest

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "ONE_REQUEST",
    "SECOND",
    "Account",
    "Clock",
    "Combined",
    "Demand",
    "Held",
    "Kind",
    "Level",
    "LimitStore",
    "Limits",
    "Refusal",
    "Reservation",
    "Saved",
    "SavedBucket",
    "Slots",
    "TokenBucket",
    "Window",
    "go_duration",
    "ratelimit_headers",
    "tightest",
    "windows",
]


class Held(Protocol):
    """What an admitted request holds."""

    def settle(self, tokens: int) -> None:
        """See `Reservation.settle`. Awaits nothing, so that a slot is free before all else."""

    def revoke(self) -> None:
        """See `Reservation.revoke`. Awaits nothing either."""


class Limits(Protocol):
    """All that limits one request."""

    counts_tokens: bool  # whether there is a limit of tokens among them

    async def admit(self, demand: Demand) -> Held | Refusal:
        """See `Combined.admit`."""

    def levels(self) -> Sequence[Level]:
        """The tightest window of requests and of tokens, as far as it is known here and now."""


class LimitStore(Protocol):
    """Where levels are kept: in this process, or in a place that several share."""

    def of(self, key: str, route: str | None = None) -> Limits | None:
        """What limits the requests of a key (on a route); None: nothing."""
