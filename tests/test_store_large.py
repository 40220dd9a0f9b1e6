"""Stores of conversations with many items, turns, bytes and owners: what a step of them costs."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from aiproxy.aside import LARGE
from aiproxy.sessions import Content, Head, Shares, StoreError, items
from aiproxy.stores import memory_sessions, sqlite_book
from aiproxy.stores.sqlite_book import Book
from turns import (
    ALICE,
    KINDS,
    PLENTY,
    TTL,
    Clock,
    World,
    array,
    database,
    message,
    opened,
    turn,
    world,
)


@pytest.fixture(params=KINDS)
async def here(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """Open an empty store of each kind."""
    async with world(request.param, tmp_path) as opened:
        yield opened


# Items that are referred to


@pytest.mark.parametrize("large", [False, True])
async def test_h2_an_array_is_cut_once(
    here: World, monkeypatch: pytest.MonkeyPatch, *, large: bool
) -> None:
    """However many items of a turn are referred to; and not in the event loop if it is large."""
    padding = "x" * (LARGE // 100 if large else 1)
    made = [message(padding, f"i{n}") for n in range(200)]
    given = [message(padding, f"j{n}") for n in range(3)]
    await here.put("a", content=Content(array(*given), array(*made), b"", b""))
    await here.put("b", ids=["k"])
    cut: list[threading.Thread] = []
    elements = items.elements

    def counted(text: bytes) -> list[bytes]:
        cut.append(threading.current_thread())
        return elements(text)

    for module in ("aiproxy.sessions.items", "aiproxy.stores.memory_sessions"):
        monkeypatch.setattr(f"{module}.elements", counted, raising=False)
    names = [*(f"i{n}" for n in range(200)), "j1", "k"]
    found = await here.store.find(ALICE, names)
    got = await here.store.items(ALICE, [found[name] for name in names])
    assert got == [*made, given[1], message("b of alice says k", "k")]
    assert len(cut) == 3
    if large:
        assert threading.current_thread() not in cut


async def test_m5_an_item_of_many_turns_is_forgotten_quickly(here: World) -> None:
    """One id in 5,000 turns, twice in each: they go as fast as others, and the latest counts."""
    given = array(message("x", "same"))
    puts = [
        turn(f"t{n}", content=Content(given, array(message(f"{n}", "same")), b"", b""))
        for n in range(5000)
    ]
    await asyncio.gather(*map(here.store.put, puts))
    found = (await here.store.find(ALICE, ["same"]))["same"]
    assert await here.store.items(ALICE, [found]) == [message("4999", "same")]
    await here.store.check()  # it is renewed by now
    here.store.configure(ttl=TTL, max_bytes=PLENTY)
    here.clock.now += TTL + 1
    began = time.process_time()
    while here.store.shares.turns:
        here.store.tend()
        await here.store.check()
    assert time.process_time() - began < (20.0 if here.store.name == "sqlite" else 3.0)
    assert await here.store.find(ALICE, ["same"]) == {}


async def test_l1_uses_share_a_renewal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is under way all others are gathered for the next; none is lost by a failure."""
    clock, renewals = Clock(), 0
    renew = Book.renew

    def counted(book: Book, roots: Iterable[int]) -> None:
        nonlocal renewals
        renewals += 1
        if renewals == 1:
            raise sqlite3.OperationalError("disk I/O error")
        renew(book, roots)

    monkeypatch.setattr(Book, "renew", counted)
    async with opened(tmp_path / "sessions.db", clock, patience=10) as store:
        here = World(store, clock)
        store.configure(ttl=TTL, max_bytes=PLENTY)
        heads = [await here.put(f"t{n}") for n in range(100)]
        clock.now += TTL / 2
        await store.path(heads[0])
        with suppress(StoreError):  # it may be of the same transaction
            await store.check()
        with database(tmp_path / "sessions.db") as other:
            await asyncio.to_thread(other.execute, "BEGIN IMMEDIATE")
            await asyncio.gather(*(store.path(head) for head in heads[1:]))
        await store.check()
        await store.check()
        assert renewals == 3
        clock.now += TTL * 3 / 4
        assert await here.results(*(f"t{n}" for n in range(100))) == ["hit"] * 100


# Many owners


async def test_m3_a_write_looks_at_no_other_owner(tmp_path: Path) -> None:
    """The statements of a put, and of what is due, are as many with 2,000 owners as with one."""
    counts = []
    for owners in (1, 2000):
        clock = Clock()
        async with opened(tmp_path / f"{owners}.db", clock) as store:
            here = World(store, clock)
            store.configure(ttl=TTL, max_bytes=PLENTY)
            await asyncio.gather(*(store.put(turn("t", f"key-{n}")) for n in range(owners)))
            await here.tend()
            said: list[str] = []
            store._connection.set_trace_callback(said.append)
            await here.put("a")
            await here.tend()
            clock.now += TTL / 2
            await here.put("b")
            store.configure(ttl=TTL, max_bytes=store.shares.size - 1)
            await here.tend()
            store._connection.set_trace_callback(None)
            assert store.shares.turns == owners + 1
            counts.append(len(said))
    assert counts[1] <= counts[0] + 6  # some transactions may be apart


def test_m3_a_share_is_found_among_many() -> None:
    """Among 20,000 owners a turn is counted, judged and made room for in a moment."""
    shares = Shares()
    for number in range(20_000):
        shares.add(f"key-{number}", 1000 + number)
    bound = shares.size
    began = time.process_time()
    for number in range(1000):
        owner = f"key-{number * 7}"
        assert shares.fits(owner, 15_000, bound)
        shares.add(owner, 1000)
        largest = shares.largest()
        assert largest is not None
        shares.remove(largest, 1000, "size", 0)
    assert time.process_time() - began < 5.0  # going through all owners takes a minute


# Many bytes


async def test_m4_large_turns_do_not_outgrow_small_ones(here: World) -> None:
    """Who puts 100 KB over the bound has as many bytes of small turns give way, at once."""
    await asyncio.gather(*(here.store.put(turn(f"s{n}", size=700)) for n in range(3000)))
    bound = here.store.shares.size
    here.store.configure(ttl=0, max_bytes=bound)
    for number in range(15):
        await here.store.put(turn(f"l{number}", size=100_000))
        assert here.store.shares.size <= bound
    assert await here.results("l0", "l14") == ["hit", "hit"]


async def test_m4_a_slow_disk_does_not_outgrow_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What gives way too slowly delays what is put, so that the file is never much over it."""
    monkeypatch.setattr(sqlite_book, "GIVING_WAY", 0.0)
    async with opened(tmp_path / "sessions.db") as store:
        await asyncio.gather(*(store.put(turn(f"s{n}", size=700)) for n in range(3000)))
        bound = store.shares.size
        store.configure(ttl=0, max_bytes=bound)
        most = 0
        for number in range(30):
            await store.put(turn(f"l{number}", size=100_000))
            most = max(most, store.shares.size)
        assert bound < most <= bound + bound // 8 + 100_000
        store.configure(ttl=0, max_bytes=PLENTY)
        await store.put(turn("last"))
        assert not store._book.crowded  # type: ignore[union-attr]


# A reload that lowers the bound


async def test_m6_a_lower_bound_is_come_to_in_steps(here: World) -> None:
    """Turns are put and found meanwhile, nothing grows, and the event loop is not held up."""
    store = here.store
    await asyncio.gather(*(store.put(turn(f"t{n}", size=700)) for n in range(6000)))
    store.configure(ttl=0, max_bytes=700 * 500)
    before, most = store.shares.turns, 0
    assert before > 5000
    number, size = 0, store.shares.size
    while store.shares.size > 700 * 500:
        store.tend()
        if number < 20:
            await store.put(turn(f"new{number}", size=5000))
            assert store.shares.size <= size
            size = store.shares.size
            number += 1
        before = store.shares.turns
        await asyncio.sleep(0)
        most = max(most, before - store.shares.turns)
    if store.name == "memory":
        assert most <= 2 * memory_sessions.STEP
    assert await here.result(f"new{number - 1}") == "hit"
    assert await here.result("t0") == "missing"


async def test_m6_a_step_is_no_longer_than_it_may_be() -> None:
    """Of single turns as many give way at a time as a step has, and not one more."""
    store = memory_sessions.MemorySessions(Clock())
    store.configure(ttl=0, max_bytes=PLENTY)
    for number in range(2 * memory_sessions.STEP):
        await store.put(turn(f"t{number}", size=700))
    store._max_bytes = 0
    before = store.shares.turns
    store.tend()
    assert before - store.shares.turns == memory_sessions.STEP
    await store.close()


async def test_m6_it_is_come_to_without_anybody_asking() -> None:
    """A store in memory goes on by itself, once it is told, and so with what has expired."""
    clock = Clock()
    store = memory_sessions.MemorySessions(clock)
    store.configure(ttl=TTL, max_bytes=PLENTY)
    for number in range(3000):
        await store.put(turn(f"t{number}", f"key-{number % 1000}", size=700))
    store.configure(ttl=TTL, max_bytes=700 * 2000)
    assert store.shares.turns > 2000
    async with asyncio.timeout(5):
        while store.shares.turns > 2000:  # noqa: ASYNC110 - the store has no event for it
            await asyncio.sleep(0.001)
    clock.now += TTL
    store.tend()
    assert store.shares.turns > 1000
    async with asyncio.timeout(5):
        while store.shares.turns:  # noqa: ASYNC110 - the same
            await asyncio.sleep(0.001)
    await store.close()


async def test_m6_a_large_turn_has_many_give_way_in_steps() -> None:
    """What a put removes does not hold the event loop up either, and it finds its room."""
    store = memory_sessions.MemorySessions(Clock())
    store.configure(ttl=0, max_bytes=700 * 5000)
    for number in range(5000):
        await store.put(turn(f"t{number}", size=700))
    putting = asyncio.ensure_future(store.put(turn("large", size=700 * 4000)))
    other = asyncio.ensure_future(store.put(turn("other", size=700 * 100)))
    before, most = store.shares.turns, 0
    while not (putting.done() and other.done()):
        await asyncio.sleep(0)
        most, before = max(most, before - store.shares.turns), store.shares.turns
        assert store.shares.size <= 700 * 5000
    await asyncio.gather(putting, other)
    assert most <= 3 * memory_sessions.STEP
    assert store.shares.turns == 902


# The event loop


async def longest_gap(until: asyncio.Event) -> float:
    """Return the longest time in which the event loop could not run, in seconds."""
    longest = 0.0
    while not until.is_set():
        before = time.perf_counter()
        await asyncio.sleep(0.001)
        longest = max(longest, time.perf_counter() - before)
    return longest


async def gap_during(work: Awaitable[object]) -> float:
    """Do something, and return how long the event loop could not run meanwhile."""
    until = asyncio.Event()
    watching = asyncio.ensure_future(longest_gap(until))
    await work
    until.set()
    return await watching


async def test_f33_a_locked_file_does_not_hold_up_the_loop(tmp_path: Path) -> None:
    """While it is locked, whatever is asked of the store, the event loop goes on."""
    async with opened(tmp_path / "sessions.db", patience=0.4) as store:
        here = World(store, Clock())
        head = await here.put("a", size=1_000_000, ids=["i"])
        found = (await store.find(ALICE, ["i"]))["i"]

        async def everything() -> None:
            asked = [
                work
                for n in range(20)
                for work in (
                    store.put(turn(f"t{n}", size=200_000)),
                    store.delete(head),
                    store.path(head),
                    store.items(ALICE, [found]),
                    store.check(),
                )
            ]
            store.tend(prove=True)
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
            assert sum(isinstance(each, StoreError) for each in outcomes) == 60

        gaps = []
        for _ in range(5):  # of a noisy machine the best counts
            with database(tmp_path / "sessions.db") as other:
                other.execute("PRAGMA busy_timeout = 10000")  # what came before may be written now
                await asyncio.to_thread(other.execute, "BEGIN IMMEDIATE")
                gaps.append(await gap_during(everything()))
        assert min(gaps) < 0.2  # each of these calls waits for longer


async def test_a_path_of_the_most_turns_and_bytes(here: World) -> None:
    """4,096 turns with 32 MiB go through the store whole, in order, and without a stop."""
    text = "x" * 8200
    parent: Head | None = None
    inputs: list[bytes] = []
    for number in range(4096):
        made = turn(f"t{number}", parent=parent, content=Content(
            array(message(f"{number} {text}")), b"[]", b"", b""
        ))  # fmt: skip
        await here.store.put(made)
        inputs.append(made.content.input)
        key = number + 1
        parent = Head(
            made.id, key, 1, None if parent is None else parent.key, ALICE, made.depth,
            made.path_size, 7, 1, "m", "one", held=True, whole=True,
        )  # fmt: skip
    head = await here.head("t4095")
    assert head == parent
    assert (head.depth, head.size > 32 * 1024 * 1024) == (4096, True)
    gaps = []
    for _ in range(3):
        gaps.append(await gap_during(reading := asyncio.ensure_future(here.store.path(head))))
        path = reading.result()
        assert path is not None
        assert [each.input for each in path] == inputs
    assert min(gaps) < 0.3
    assert await here.store.delete(await here.head("t0")) is True
    assert await here.store.path(head) is None
    here.store.configure(ttl=0, max_bytes=1000)
    for _ in range(1000):
        await here.tend()
        if not here.store.shares.turns:
            return
    raise AssertionError("it was not removed")
