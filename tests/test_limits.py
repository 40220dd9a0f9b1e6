"""Limits, by example: which one refuses first and what it says, durations, a reload, a restart."""

import asyncio
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiproxy.config import Limits
from aiproxy.limits import (
    ONE_REQUEST,
    SECOND,
    Account,
    Clock,
    Combined,
    Demand,
    Level,
    Refusal,
    Reservation,
    Saved,
    SavedBucket,
    TokenBucket,
    Window,
    go_duration,
)

MINUTE = 60 * SECOND


class Time:
    """A clock that a test sets, ns."""

    def __init__(self, ns: int = 0) -> None:
        self.ns = ns

    def read(self) -> int:
        """As `Clock` reads it."""
        return self.ns


class World:
    """Accounts and all that is open on them, on a clock that a test sets."""

    def __init__(self, limits: Sequence[Limits], ns: int = 0) -> None:
        self.time = Time(ns)
        self.clock = Clock(self.time.read)
        names = ("key 'a'", "route 'x'", "key 'b'", "route 'y'")
        self.accounts = [Account(name) for name, _ in zip(names, limits, strict=False)]
        for account, one in zip(self.accounts, limits, strict=True):
            account.resize(one, ns)
        self.all = Combined(self.accounts, self.clock)
        self.open: list[Reservation] = []

    def admit(self, demand: Demand) -> Reservation | Refusal:
        """Admit on all accounts; what is admitted is kept in `open`."""
        result = self.all.admit(demand)
        if isinstance(result, Reservation):
            self.open.append(result)
        return result

    def refused(self, demand: Demand) -> Refusal:
        """Return why a demand is refused, which it must be."""
        result = self.all.admit(demand)
        assert isinstance(result, Refusal)
        return result

    def admitted(self, demand: Demand) -> Reservation:
        """Return what a demand holds, which must be admitted."""
        result = self.all.admit(demand)
        assert isinstance(result, Reservation), result
        return result

    def levels(self) -> list[Level]:
        """Every level of every account."""
        return [it for account in self.accounts for it in account.levels(self.clock.now())]

    def state(self) -> list[object]:
        """All that admission depends on."""
        return [state(account, self.clock.now()) for account in self.accounts]


def state(account: Account, now: int) -> object:
    """All that admission depends on, of one account."""
    buckets = (*account.requests, *account.tokens)
    return [
        (account.slots.held, account.slots.most),
        [(b.spec, b.parts(now), b.exposed, b.far) for b in buckets],
    ]


def level(bucket: TokenBucket, now: int) -> Fraction:
    """The level in tokens."""
    return Fraction(bucket.parts(now), bucket.unit)


def limits(**written: Any) -> Limits:
    """Return limits as they are written in a configuration."""
    return Limits.model_validate(written)


def test_a_clock_never_goes_back() -> None:
    """It follows the one that it reads, and stands still while that is behind."""
    time = Time(5)
    clock = Clock(time.read)
    told = []
    for time.ns in (7, 6, 7, 8):
        told.append(clock.now())
    assert told == [7, 7, 7, 8]


def test_the_first_reason_is_told() -> None:
    """Too large comes first, then concurrent, requests and tokens, the key before the route."""
    key = limits(concurrent=1, requests="2/min", tokens="100/min")
    world = World([key, key])
    first = world.admitted(Demand(60))
    world.admitted(ONE_REQUEST)
    found = world.refused(Demand(101))
    assert (found.kind, found.owner, found.wait) == ("tokens", "key 'a'", None)
    found = world.refused(Demand(60))
    assert (found.kind, found.owner, found.wait) == ("concurrent", "key 'a'", SECOND)
    first.settle(60)
    found = world.refused(Demand(60))
    assert (found.kind, found.owner, found.wait) == ("requests", "key 'a'", 30 * SECOND)
    world.time.ns += 30 * SECOND
    found = world.refused(Demand(100))
    assert (found.kind, found.owner, found.wait) == ("tokens", "key 'a'", 6 * SECOND)


def test_the_wait_is_that_of_all() -> None:
    """The reason is the first, but the wait is the longest of all limits of key and route."""
    world = World([limits(requests="60/min", tokens="60/min"), limits(tokens="60/h")])
    for _ in range(60):
        world.admitted(Demand(1))
    found = world.refused(Demand(2))
    assert (found.kind, found.owner, found.wait) == ("requests", "key 'a'", 120 * SECOND)


@pytest.mark.parametrize(
    ("demand", "message"),
    [
        (
            Demand(201),
            (
                "Request too large for key 'a' on tokens per minute: Limit 200, Used 60,"
                " Requested 201. Its input alone is larger than the limit, so that it can never be"
                " admitted."
            ),
        ),
        (
            Demand(150, 10),
            (
                "Rate limit reached for key 'a' on tokens per minute: Limit 200, Used 60,"
                " Requested 160. Please try again in 6s."
            ),
        ),
        (
            Demand(150, 1000),
            (
                "Rate limit reached for key 'a' on tokens per minute: Limit 200, Used 60,"
                " Requested 200. Please try again in 18s."
            ),
        ),
        (
            Demand(1, 0, 389),
            (
                "Rate limit reached for key 'a' on tokens per minute: Limit 200, Used 60,"
                " Requested 1. Requests under way may use 60. Please try again in 15s."
            ),
        ),
    ],
)
def test_a_message_says_all(demand: Demand, message: str) -> None:
    """It names the owner, the limit and its window, the figures, and when to try again."""
    world = World([limits(tokens="200/min")])
    world.admitted(Demand(10, 50, 50))
    assert world.refused(demand).message == message


def test_a_message_about_a_debt_that_may_come() -> None:
    """What is left would do, but not if all that is open came to its largest output."""
    world = World([limits(tokens="200/min"), limits(tokens="100/h")])
    world.admitted(Demand(10, 0, 90))
    world.admitted(Demand(20))
    assert world.refused(Demand(1, 0, 95)).message == (
        "Rate limit reached for route 'x' on tokens per hour: Limit 100, Used 30, Requested 1."
        " Requests under way may use 100. Please try again in 9m36s."
    )
    world.refused(Demand(1, 0, 80))
    world.admitted(Demand(1, 0, 79))
    assert [told.remaining for told in world.levels()] == [169, 69]
    two = World([limits(requests="1/min", tokens="10/h")])
    two.admitted(Demand(10)).settle(100)
    assert two.refused(ONE_REQUEST).wait == MINUTE


def test_messages_of_other_kinds() -> None:
    """Slots have no window; a request is asked for as one."""
    world = World([limits(concurrent=1, requests="1/day")])
    held = world.admitted(Demand())
    assert world.refused(Demand()).message == (
        "Rate limit reached for key 'a' on concurrent requests: Limit 1, Used 1, Requested 1."
        " Please try again in 1s."
    )
    held.settle(0)
    assert world.refused(Demand()).message == (
        "Rate limit reached for key 'a' on requests per day: Limit 1, Used 1, Requested 1."
        " Please try again in 24h0m0s."
    )


def test_what_turns_out_to_be_no_request_takes_nothing() -> None:
    """Revoking gives back the request, too; once, and not after it was settled."""
    world = World([Limits.model_validate({"requests": "5/min", "tokens": "90/min"})])
    world.admitted(Demand(10)).settle(10)
    before = world.all.levels()
    held = world.admitted(Demand(10, 20))
    for _ in range(2):
        held.revoke()
        assert world.all.levels() == before
    settled = world.admitted(Demand(10))
    settled.settle(10)
    after = world.all.levels()
    settled.revoke()
    assert world.all.levels() == after != before


def test_waiting_for_others_has_a_bound() -> None:
    """Where others must end first, the wait is a minute at most, however slow the bucket is."""
    world = World([limits(tokens="1000/day")])
    world.admitted(Demand(1, 0, 1999))
    found = world.refused(Demand(1, 0, 900))
    assert (found.wait, found.under_way) == (MINUTE, 2000)


@pytest.mark.parametrize(("tokens", "under_way"), [(90, 100), (91, 0)])
def test_whether_others_are_in_the_way(tokens: int, under_way: int) -> None:
    """What is under way is named where all that is asked for is there, to the last token."""
    world = World([limits(tokens="100/h")])
    world.admitted(Demand(10, 0, 90))
    assert world.refused(Demand(tokens, 0, 95)).under_way == under_way


def test_one_that_may_be_more_than_all_is_alone() -> None:
    """An unlimited output is admitted where no bounded one is open, and keeps out all of these."""
    world = World([limits(tokens="100/min")])
    huge = world.admitted(Demand(1, 0, 10**9))
    world.refused(Demand(1, 0, 0))
    world.admitted(Demand(1))  # promises nothing
    huge.settle(1)
    world.refused(Demand(100, 0, 10**9))
    world.admitted(Demand(1, 0, 10**9))


@pytest.mark.parametrize("demand", [ONE_REQUEST, Demand(0, 50), Demand(0, 50, 10**9)])
def test_without_input_no_tokens(demand: Demand) -> None:
    """A demand without input takes one request and no tokens, even where none are left."""
    world = World([limits(requests="5/min", tokens="10/min")])
    world.admitted(Demand(10)).settle(10**6)
    held = world.admitted(demand)
    assert world.accounts[0].slots.held == (1 if demand.slot else 0)
    held.settle(10**6)
    requests, tokens = world.all.levels()
    assert (requests.remaining, tokens.remaining) == (3, 10 - 10**6)
    assert world.accounts[0].slots.held == 0


def test_levels_as_told() -> None:
    """A level has what is left, below zero for a debt, and when it is full; slots if limited."""
    world = World([limits(requests="60/min", tokens="100/s", concurrent=3), limits(tokens="10/s")])
    held = world.admitted(Demand(5))
    opened = [held.open]
    assert [tuple(level) for level in world.levels()] == [
        ("requests", "minute", 60, 59, SECOND),
        ("tokens", "second", 100, 95, SECOND // 20),
        ("concurrent", "", 3, 2, 0),
        ("tokens", "second", 10, 5, SECOND // 2),
    ]
    held.settle(25)
    assert [*opened, held.open] == [True, False]
    assert [tuple(level) for level in world.levels()][1:] == [
        ("tokens", "second", 100, 75, SECOND // 4),
        ("concurrent", "", 3, 3, 0),
        ("tokens", "second", 10, -15, 5 * SECOND // 2),
    ]
    # A request is told the tightest of both owners: here the route's tokens.
    assert [tuple(level) for level in world.all.levels()] == [
        ("requests", "minute", 60, 59, SECOND),
        ("tokens", "second", 10, -15, 5 * SECOND // 2),
    ]


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0s"),
        (1, "1ms"),
        (20_000_000, "20ms"),
        (999_000_001, "1s"),
        (SECOND * 3 // 2, "1.5s"),
        (6 * MINUTE, "6m0s"),
        (61 * MINUTE + 10_000_000, "1h1m0.01s"),
        (48 * 60 * MINUTE, "48h0m0s"),
    ],
)
def test_durations_as_go_prints_them(ns: int, text: str) -> None:
    """Units that are zero in front are left out, those behind are not; no zeros end a fraction."""
    assert go_duration(ns) == text


@pytest.mark.parametrize(
    ("before", "after", "left"),
    [
        ("100/min", "100/min", [40]),
        ("100/min", "6000/h", [40]),  # what was used is not paid back
        ("100/min", "50/min", [20]),
        ("100/min", "1000/min", [40]),
        ("100/min", ["1000/h", "100/min"], [1000, 40]),
        (["100/min", "200/h"], ["200/h", "100/min"], [140, 40]),
        (["100/min", "200/h"], "1000/day", [40]),
        (["100/min", "200/h"], "200/h", [140]),
        ("100/min", [], []),
    ],
)
def test_a_reload_keeps_what_is_used(before: Any, after: Any, left: list[int]) -> None:
    """A window goes on from the one of its length, else from any; only one more begins full."""
    world = World([limits(tokens=before)])
    world.admitted(Demand(60)).settle(60)
    world.accounts[0].resize(limits(tokens=after), world.clock.now())
    assert [level.remaining for level in world.accounts[0].levels(0)] == left


def test_the_tightest_is_the_one_that_leaves_the_least() -> None:
    """However long another one takes to be full; of two that leave the same it is that one."""
    world = World([limits(requests=["10/min", "20/h"])])
    world.admitted(Demand())
    assert [(level.window, level.remaining) for level in world.all.levels()] == [("minute", 9)]
    alike = World([limits(requests=["10/min", "10/h"])])
    alike.admitted(Demand())
    assert [(level.window, level.remaining) for level in alike.all.levels()] == [("hour", 9)]


def test_the_least_part_is_waited_for() -> None:
    """A wait is rounded up to the nanosecond that brings the last part; nothing is no wait."""
    bucket = TokenBucket("it", Window(3, 1, 3), 0)
    assert bucket.amount == 3
    assert [bucket.wait(parts) for parts in (-1, 0, 1, 3, 4)] == [0, 0, 1, 1, 2]


def test_a_resize_rounds_down_and_keeps_a_debt() -> None:
    """A part that the new unit cannot hold is lost, and a debt does not shrink with a capacity."""
    bucket = TokenBucket("", Window(1, 1, 100), 0)
    bucket.put(1, 0)
    bucket.resize(Window(512, 1, 100), 0)
    assert bucket.parts(0) == 0
    bucket.put(-60 * bucket.unit, 0)
    bucket.resize(Window(512, 1, 50), 0)
    assert level(bucket, 0) == -60


def test_a_reload_changes_slots_and_keeps_who_holds_them() -> None:
    """Fewer slots than are held refuse all until enough are free; without a limit all count on."""
    world = World([limits(concurrent=3)])
    held = [world.admitted(Demand()) for _ in range(3)]
    world.accounts[0].resize(limits(concurrent=2), 0)
    held.pop().settle(0)
    found = world.refused(Demand())
    assert (found.limit, found.used) == (2, 2)
    world.accounts[0].resize(limits(), 0)
    held += [world.admitted(Demand()) for _ in range(9)]
    for one in held:
        one.settle(0)
    assert world.accounts[0].slots.held == 0


def test_saved_levels_are_text_and_never_more_than_full() -> None:
    """What is saved survives JSON; what is set aside is used; a forged level is capped."""
    world = World([limits(requests="2/min", tokens={"rate": "10/s", "burst": 40})])
    world.admitted(Demand(30))
    saved = world.accounts[0].save(world.clock.now())
    bucket = SavedBucket(amount=10, seconds=1, capacity=40, level=10_000_000)
    assert saved["tokens"] == [bucket]
    assert saved["requests"][0].level == 1_000_000
    other = Account("key 'a'")
    other.restore(msgspec.json.decode(msgspec.json.encode(saved), type=Saved), 0)
    assert [level.remaining for level in other.levels(0)] == [1, 10]
    other.restore({"tokens": [msgspec.structs.replace(bucket, level=10**12)]}, 0)
    assert [level.remaining for level in other.levels(0)] == [40]


# Tasks


@given(
    st.lists(st.integers(1, 10**6), min_size=1),
    st.integers(1, 10**6),
    st.integers(0, 10**7),
    st.none() | st.integers(0, 10**12),
)
def test_what_fits_is_admitted_when_full(
    most: list[int], asked: int, output: int, largest: int | None
) -> None:
    """A full account admits every input that no token limit is smaller than, and only those."""
    one, least = limits(requests="1/day", tokens=[f"{n}/day" for n in most]), min(most)
    for fits in {min(asked, least), least}:
        World([one, one]).admitted(Demand(fits, output, largest))
    assert World([one]).refused(Demand(least + asked, output, largest)).wait is None


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4), st.integers(0, 5)), max_size=20),
)
async def test_slots_end_at_zero(most: int, plans: list[tuple[int, int, int]]) -> None:
    """Tasks that end or are cancelled in any order free all slots, and never hold too many."""
    world = World([limits(concurrent=most), limits(requests="10/s", tokens="60/s")])

    async def request(tokens: int, pauses: int) -> None:
        held = world.all.admit(Demand(tokens, tokens, 3 * tokens))
        if isinstance(held, Refusal):
            return
        try:
            for _ in range(pauses):
                await asyncio.sleep(0)
        finally:
            held.settle(tokens)

    tasks: list[tuple[asyncio.Task[None], int]] = []
    for at in range(len(plans) + 6):
        if at < len(plans):
            tokens, pauses, after = plans[at]
            tasks.append((asyncio.create_task(request(tokens, pauses)), at + after))
        for task, when in tasks:
            if when == at:
                task.cancel()
        assert all(account.slots.held <= account.slots.most for account in world.accounts)
        await asyncio.sleep(0)
    await asyncio.gather(*(task for task, _ in tasks), return_exceptions=True)
    assert [account.slots.held for account in world.accounts] == [0, 0]


def go(text: str) -> int:
    """Nanoseconds, as Go's time.ParseDuration reads them."""
    units = {"h": 3600 * SECOND, "m": 60 * SECOND, "s": SECOND, "ms": 1_000_000}
    assert re.fullmatch(r"([0-9]+(\.[0-9]+)?(h|ms|m|s))+", text)
    total = Fraction(0)
    for number, unit in re.findall(r"([0-9.]+)(ms|h|m|s)", text):
        total += Fraction(number) * units[unit]
    assert total.denominator == 1
    return int(total)


@given(st.integers(0, 10**10) | st.integers(0, 10**16) | st.integers(0, 10**7).map(SECOND.__mul__))
def test_a_duration_is_read_back(ns: int) -> None:
    """Go reads what is written: never less than it was, and less than a millisecond more."""
    assert 0 <= go(go_duration(ns)) - ns < 1_000_000
