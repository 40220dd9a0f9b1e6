"""All limits of a request, its key's and its route's: all of them admit it, or nothing is taken."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from aiproxy.limits.bucket import BOUND, SECOND
from aiproxy.limits.told import go_duration

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiproxy.limits.account import Account
    from aiproxy.limits.bucket import Clock, Kind, Level, Slots, TokenBucket

CONCURRENT_WAIT = SECOND  # when a slot will be free nobody knows
CROWDED_WAIT = 60 * SECOND  # at most, where it is others that must end first


class Demand(NamedTuple):
    """What a request takes, besides one request.

    Attributes:
        input: tokens, as estimated; 0: it takes no tokens at all.
        output: tokens to set aside for the output.
        largest: the largest possible output, at least `output`, where that may be more; the demand
            is then bounded (see `Combined`).
        slot: it takes a slot, too.
    """

    input: int = 0
    output: int = 0
    largest: int | None = None
    slot: bool = True


ONE_REQUEST = Demand(slot=False)
"""What a call takes that reaches no model."""


class Refusal(NamedTuple):
    """Why a demand was not met. Nothing was taken for it.

    Attributes:
        kind, owner, window: the limit that is in the way.
        limit, used, requested: of that limit, its capacity, what is taken of it, and what was
            asked for.
        wait: ns after which it would be met if nothing else ran; None: never.
        under_way: tokens that open requests may still use, where these are what is in the way.
    """

    kind: Kind
    owner: str
    window: str
    limit: int
    used: int
    requested: int
    wait: int | None
    under_way: int = 0

    @property
    def message(self) -> str:
        """A sentence for the developer who reads it."""
        what = "concurrent requests" if self.kind == "concurrent" else self.kind
        per = f" per {self.window}" if self.window else ""
        limit = f"{self.owner} on {what}{per}"
        counts = f"Limit {self.limit}, Used {self.used}, Requested {self.requested}."
        if self.wait is None:
            return (
                f"Request too large for {limit}: {counts} Its input alone is larger than the"
                " limit, so that it can never be admitted."
            )
        open_ = f" Requests under way may use {self.under_way}." if self.under_way else ""
        again = f" Please try again in {go_duration(self.wait)}."
        return f"Rate limit reached for {limit}: {counts}{open_}{again}"


class Reservation:
    """What an admitted request holds, until it is settled, once."""

    __slots__ = ("_clock", "_requests", "_slots", "_taken")

    def __init__(
        self,
        slots: tuple[Slots, ...],
        requests: tuple[TokenBucket, ...],
        taken: list[tuple[TokenBucket, int, int, int, int]],
        clock: Clock,
    ) -> None:
        """Hold what `Combined.admit` took: see there."""
        self._slots = slots
        self._requests = requests
        self._taken: list[tuple[TokenBucket, int, int, int, int]] | None = taken
        self._clock = clock

    @property
    def open(self) -> bool:
        """Whether it is not settled."""
        return self._taken is not None

    def revoke(self) -> None:
        """The request was none after all: give back all that was taken, itself included."""
        if self._taken is not None:
            for bucket in self._requests:
                bucket.full_at -= bucket.unit
            self.settle(0)

    def settle(self, tokens: int) -> None:
        """The end: free the slots, and charge `tokens` in place of what was set aside.

        What was too much comes back, though no bucket is ever more than full; what was too little
        becomes a debt. A second call does nothing.
        """
        taken, self._taken = self._taken, None
        if taken is None:
            return
        for slots in self._slots:
            slots.held -= 1
        clock = self._clock
        now = clock.read()
        if now > clock.latest:
            clock.latest = now
        else:
            now = clock.latest
        for bucket, _, share, near, far in taken:
            full_at = bucket.full_at
            nothing_missing = bucket.amount * now
            if full_at < nothing_missing:  # what came while it was full is nobody's
                full_at = nothing_missing
            bucket.full_at = full_at + (tokens - share) * bucket.unit
            if far:
                bucket.exposed -= near - share
                bucket.far -= far


class Combined:
    """The limits of a key and of a route, together.

    What they promise of each bucket with capacity C and rate R, after a time t, whatever is asked
    in which order and however the clock goes:

    - what is charged, up to what was set aside for it, and all that is still set aside, is at most
      C + R * t;
    - the largest possible outputs (and the inputs) of all open bounded reservations are at most
      2 * C; a single one that may be more than that is alone;
    - as long as each of these is at most C and is kept to, a bucket's debt is at most C: a burst
      gets at most 2 * C + R * t, however little was set aside for it.
    """

    __slots__ = ("_clock", "requests", "slots", "tokens")

    def __init__(self, accounts: Iterable[Account], clock: Clock) -> None:
        accounts = tuple(accounts)
        self._clock = clock
        # Flat, and the buckets' arithmetic written out below, since every request pays for it:
        # calls of their methods would take three times as long.
        self.slots = tuple(account.slots for account in accounts)
        self.requests = tuple(b for account in accounts for b in account.requests)
        self.tokens = tuple(b for account in accounts for b in account.tokens)

    def admit(  # noqa: C901, PLR0912 - written out, see `__init__`
        self, demand: Demand
    ) -> Reservation | Refusal:
        """Take all of it, or nothing and say why."""
        tokens, output, largest, slot = demand
        clock = self._clock
        now = clock.read()
        if now > clock.latest:
            clock.latest = now
        else:
            now = clock.latest
        slots = self.slots if slot else ()
        for each in slots:
            if each.held >= each.most:
                return self._refusal(demand, now)
        for bucket in self.requests:
            nothing_missing = bucket.amount * now
            full_at = bucket.full_at
            if full_at < nothing_missing:
                full_at = nothing_missing
            full_at += bucket.unit
            if full_at - nothing_missing > bucket.full:
                return self._refusal(demand, now)
            bucket.next = full_at
        taken: list[tuple[TokenBucket, int, int, int, int]] = []
        if tokens:
            total = tokens + output
            for bucket in self.tokens:
                capacity = bucket.capacity
                if tokens > capacity:
                    return self._refusal(demand, now)
                need = share = total if total < capacity else capacity  # as `share`
                near = far = 0
                if largest is not None:
                    near = far = tokens + largest
                    if near > capacity:
                        near = capacity
                        far = min(far, BOUND * capacity)
                    if bucket.far + far > BOUND * capacity:  # as `crowded`
                        return self._refusal(demand, now)
                    debt = bucket.exposed + near - capacity  # as `lacks`
                    if debt > need:
                        need = debt
                nothing_missing = bucket.amount * now
                full_at = bucket.full_at
                if full_at < nothing_missing:
                    full_at = nothing_missing
                unit = bucket.unit
                if full_at + need * unit - nothing_missing > bucket.full:
                    return self._refusal(demand, now)
                taken.append((bucket, full_at + share * unit, share, near, far))
        for bucket in self.requests:
            bucket.full_at = bucket.next
        for bucket, full_at, share, near, far in taken:
            bucket.full_at = full_at
            if far:
                bucket.exposed += near - share
                bucket.far += far
        for each in slots:
            each.held += 1
        return Reservation(slots, self.requests, taken, clock)

    def _refusal(self, demand: Demand, now: int) -> Refusal:
        """The first reason: too large, then concurrent, requests, tokens.

        The wait is that of all buckets together, since whoever waits for one would else be refused
        by the next one. What is too large comes first for the same reason: no wait helps.
        """
        total = demand.input + demand.output
        worst = None if demand.largest is None else demand.input + demand.largest
        found: list[Refusal] = []
        for bucket in self.requests:
            lacks = bucket.unit - bucket.parts(now)
            if lacks > 0:
                found.append(_refused("requests", bucket, 1, bucket.wait(lacks), now))
        for bucket in self.tokens if demand.input else ():
            if demand.input > bucket.capacity:
                return _refused("tokens", bucket, demand.input, None, now)
            lacks, crowded = bucket.lacks(total, worst, now), bucket.crowded(worst)
            if lacks > 0 or crowded:
                # Nobody knows when others end; in this time the bucket makes what is too much.
                others = min(bucket.wait(crowded * bucket.unit), CROWDED_WAIT)
                share = bucket.share(total)
                wait = max(bucket.wait(lacks), others)
                refused = _refused("tokens", bucket, share, wait, now)
                if share * bucket.unit <= bucket.parts(now):
                    refused = refused._replace(under_way=bucket.far)
                found.append(refused)
        for slots in self.slots if demand.slot else ():
            if slots.held >= slots.most:
                return Refusal(
                    "concurrent", slots.owner, "", slots.most, slots.held, 1, CONCURRENT_WAIT
                )
        return found[0]._replace(wait=max(refusal.wait or 0 for refusal in found))

    def levels(self) -> list[Level]:
        """The tightest window of requests and of tokens, where there is one."""
        now = self._clock.now()
        found = []
        if self.requests:
            found.append(_tightest("requests", self.requests, now))
        if self.tokens:
            found.append(_tightest("tokens", self.tokens, now))
        return found


def _tightest(kind: Kind, buckets: tuple[TokenBucket, ...], now: int) -> Level:
    found, least = buckets[0], 0
    if len(buckets) > 1:  # written out, since every answer has it
        for bucket in buckets:
            missing = bucket.full_at - bucket.amount * now
            left = bucket.capacity if missing <= 0 else (bucket.full - missing) // bucket.unit
            if bucket is found or left < least:
                found, least = bucket, left
            elif left == least and bucket.wait(missing) > found.wait(
                found.full_at - found.amount * now
            ):
                found = bucket
    return found.level(kind, now)


def _refused(
    kind: Kind, bucket: TokenBucket, requested: int, wait: int | None, now: int
) -> Refusal:
    used = bucket.capacity - bucket.parts(now) // bucket.unit
    return Refusal(kind, bucket.owner, bucket.window, bucket.capacity, used, requested, wait)
