"""What a key or a route has: its slots, and a bucket for each window of each of its limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

from aiproxy.limits.bucket import MICRO, UNLIMITED, Level, Slots, TokenBucket, Window

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aiproxy.config import Limits, RateLimit


Positive = Annotated[int, msgspec.Meta(ge=1)]


class SavedBucket(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A bucket at rest; `level` in millionths of a token."""

    amount: Positive
    seconds: Positive
    capacity: Positive
    level: Annotated[int, msgspec.Meta(ge=-(10**18))]  # no debt is beyond what can be counted


Saved = dict[str, list[SavedBucket]]  # by kind


class Account:
    """The limits of one owner.

    Attributes:
        owner: as messages name it: key 'team-a', route 'gpt-5'.
        slots: they count what is in flight even where it is not limited.
        requests, tokens: buckets, one for each window.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.slots = Slots(owner)
        self.requests: tuple[TokenBucket, ...] = ()
        self.tokens: tuple[TokenBucket, ...] = ()

    def __repr__(self) -> str:
        return f"<Account of {self.owner}: {self.slots} {self.requests} {self.tokens}>"

    def resize(self, limits: Limits, now: int) -> None:
        """Other limits. What is taken stays taken, see `TokenBucket.resize`."""
        self.slots.most = UNLIMITED if limits.concurrent is None else limits.concurrent
        self.requests = self._resized(self.requests, windows(limits.requests), now)
        self.tokens = self._resized(self.tokens, windows(limits.tokens), now)

    def _resized(
        self, old: Sequence[TokenBucket], specs: Sequence[Window], now: int
    ) -> tuple[TokenBucket, ...]:
        """A bucket for each of `specs`; each goes on from an old one, as long as there are any.

        Those of the same length go together first. Whoever writes 600/min as 36000/h has not paid
        back what was used; only a window that comes in addition begins full.
        """
        left = list(old)
        found: dict[int, TokenBucket] = {}
        for alike in (True, False):
            for index, spec in enumerate(specs):
                if index in found:
                    continue
                for bucket in left:
                    if not alike or bucket.spec.seconds == spec.seconds:
                        left.remove(bucket)
                        bucket.resize(spec, now)
                        found[index] = bucket
                        break
        return tuple(
            found[index] if index in found else TokenBucket(self.owner, spec, now)
            for index, spec in enumerate(specs)
        )

    def levels(self, now: int) -> list[Level]:
        """How each of its limits stands."""
        slots = self.slots
        levels = [bucket.level("requests", now) for bucket in self.requests]
        levels += [bucket.level("tokens", now) for bucket in self.tokens]
        if slots.most != UNLIMITED:
            levels.append(Level("concurrent", "", slots.most, slots.most - slots.held, 0))
        return levels

    def save(self, now: int) -> Saved:
        """Its levels at rest. What is set aside counts as used."""
        return {
            kind: [
                SavedBucket(
                    amount=bucket.spec.amount,
                    seconds=bucket.spec.seconds,
                    capacity=bucket.capacity,
                    level=bucket.parts(now) * MICRO // bucket.unit,
                )
                for bucket in buckets
            ]
            for kind, buckets in (("requests", self.requests), ("tokens", self.tokens))
            if buckets
        }

    def restore(self, saved: Saved, then: int) -> None:
        """Take over levels that were saved at the time `then`; time has refilled them since."""
        self.requests = self._restored(saved.get("requests", ()), then)
        self.tokens = self._restored(saved.get("tokens", ()), then)

    def _restored(self, saved: Iterable[SavedBucket], then: int) -> tuple[TokenBucket, ...]:
        buckets = []
        for one in saved:
            spec = Window(one.amount, one.seconds, one.capacity)
            bucket = TokenBucket(self.owner, spec, then)
            bucket.put(one.level * bucket.unit // MICRO, then)
            buckets.append(bucket)
        return tuple(buckets)


def windows(limits: Iterable[RateLimit]) -> list[Window]:
    """The configured windows; a burst that is not given is one window's worth."""
    return [
        Window(limit.rate.amount, limit.rate.seconds, limit.burst or limit.rate.amount)
        for limit in limits
    ]
