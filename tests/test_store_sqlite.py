"""Conversations in use, and the SQLite file when others read it, when it is damaged or large."""

import asyncio
import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from aiproxy.sessions import ITEM, REMOVALS, ROW, Content, NoRoomError, Pins, Removal, StoreError
from aiproxy.stores import sqlite_file
from aiproxy.stores.sqlite_book import Book, Bounds
from aiproxy.stores.sqlite_file import SessionFile
from aiproxy.stores.sqlite_reader import Reader
from aiproxy.stores.sqlite_readers import Readers
from turns import (
    ALICE,
    BOB,
    KINDS,
    PLENTY,
    TTL,
    Clock,
    World,
    bare,
    bytes_read,
    database,
    files_of,
    opened,
    sqlite_store,
    turn,
    world,
)

PAGE = 4096
LARGE = 32 * 1024 * 1024


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Say where the file is."""
    return tmp_path / "sessions.db"


@pytest.fixture
def filled(file: Path) -> Path:
    """Make a file with many turns, that nobody has open."""
    store = sqlite_store(file, Clock())

    async def fill() -> None:
        for number in range(60):
            await store.put(turn(f"t{number}", ids=[f"i{number}"], size=9000))
        await store.close()

    asyncio.run(fill())
    return file


def root_page(file: Path, name: str) -> int:
    """Return the number of the first page of a table or an index."""
    with database(file) as other:
        query = "SELECT rootpage FROM sqlite_schema WHERE name = ?"
        return int(other.execute(query, (name,)).fetchone()[0])


def overwrite(file: Path, page: int) -> None:
    """Write garbage over a page."""
    with file.open("r+b") as raw:
        raw.seek((page - 1) * PAGE)
        raw.write(b"\xa5garbage" * (PAGE // 8))


def refused(file: Path) -> str:
    """Open a file that is refused, and return why; it is as it was, and nobody has it locked."""
    before = files_of(file)
    with pytest.raises(StoreError) as caught:
        sqlite_store(file, Clock())
    left = {name: data for name, data in files_of(file).items() if not name.endswith("-lock")}
    assert left == {name: data for name, data in before.items() if not name.endswith("-lock")}
    with Path(f"{file}-lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    reason = str(caught.value)
    assert reason.startswith(f"{file}: ")
    return reason.removeprefix(f"{file}: ")


def reopens(file: Path) -> None:
    """Check that a file is accepted."""
    store = sqlite_store(file, Clock())
    asyncio.run(store.put(turn("new")))
    asyncio.run(store.close())


# Refused


@pytest.mark.parametrize("set_to", [0, 1, 0x7FFFFFFF])
def test_a_database_of_something_else_is_refused(filled: Path, set_to: int) -> None:
    """Another application id is no file of ours, whatever else is in it; with ours it is."""
    with database(filled) as other:
        other.execute(f"PRAGMA application_id = {set_to}")
    assert refused(filled) == "this is a database of something else"
    with database(filled) as other:
        other.execute(f"PRAGMA application_id = {sqlite_file.APPLICATION_ID}")
    reopens(filled)


def test_a_database_without_any_mark_is_refused(file: Path) -> None:
    """A file with a table in it is somebody's, and is not taken over; an empty one is made ours."""
    with database(file) as other:
        other.execute("CREATE TABLE theirs (x)")
    assert refused(file) == "this is a database of something else"
    with database(file) as other:
        other.execute("DROP TABLE theirs")
    reopens(file)


def test_a_newer_file_is_refused(filled: Path) -> None:
    """What a newer version wrote is left to it, and the message says both formats."""
    version = sqlite_file.VERSION
    with database(filled) as other:
        other.execute(f"PRAGMA user_version = {version + 1}")
    reason = refused(filled)
    assert reason.startswith("a newer version of aiproxy has written it")
    assert f"its format is {version + 1}, and this one knows {version}" in reason
    with database(filled) as other:
        other.execute(f"PRAGMA user_version = {version}")
    reopens(filled)


@pytest.mark.parametrize("which", ["middle", "turns", "conversations", "items", "schema", "cut"])
def test_a_damaged_file_is_refused(filled: Path, which: str) -> None:
    """Garbage over a page anywhere, or an end that is missing, is found and said at the start."""
    good = filled.read_bytes()
    if which == "cut":
        os.truncate(filled, len(good) // PAGE // 2 * PAGE)
    elif which == "schema":
        overwrite(filled, 1)
    elif which == "middle":
        overwrite(filled, len(good) // PAGE // 2)
    else:
        overwrite(filled, root_page(filled, which))
    reason = refused(filled)
    assert "damaged" in reason
    filled.write_bytes(good)
    reopens(filled)


@pytest.mark.parametrize("table", ["conversations", "turns_by_response"])
def test_damage_that_is_found_later_is_told_too(
    filled: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    """A file that is too large to be checked ends in a StoreError as well, wherever it is read."""
    monkeypatch.setattr(sqlite_file, "CHECK", -1.0)
    monkeypatch.setattr(sqlite_file, "_INSTRUCTIONS", 1)
    overwrite(filled, root_page(filled, table))
    if table == "conversations":
        assert "damaged" in refused(filled)
        return

    async def use() -> None:
        async with opened(filled) as store:
            with pytest.raises(StoreError, match="malformed"):
                await store.load(ALICE, "t0")
            with pytest.raises(StoreError, match="malformed"):
                await store.put(turn("new"))

    asyncio.run(use())


# Others that read the file, as a backup does


async def test_a_reader_elsewhere_keeps_no_turn_from_being_put(file: Path) -> None:
    """A backup may read for long: turns are put meanwhile; what was deleted goes after it."""
    async with opened(file, patience=0.3) as store:
        here = World(store, Clock())
        head = await here.put("a")
        with database(file) as other:
            other.execute("BEGIN")
            other.execute("SELECT count(*) FROM turns").fetchone()
            await here.put("b")
            await asyncio.gather(store.delete(head), return_exceptions=True)
            await here.chain("c", "d")
            assert b"a of alice asks" in b"".join(files_of(file).values())
        assert await here.results("b", "c", "d") == ["hit"] * 3
        await here.tend(times=2)
        assert b"a of alice asks" not in b"".join(files_of(file).values())


async def test_a_turn_without_content_is_deleted_whoever_reads(file: Path) -> None:
    """There is nothing of it to erase: nobody waits for the log, nor is told of it."""
    async with opened(file) as store:
        here = World(store, Clock())
        head = await here.put("a", held=False)
        with database(file) as other:
            other.execute("BEGIN")
            assert other.execute("SELECT count(*) FROM turns").fetchone() == (1,)
            assert await store.delete(head)
            other.execute("ROLLBACK")
        assert await here.result("a") == "missing"


async def test_a_log_that_cannot_be_emptied_fails_nobody(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is committed is kept: who put it is not told that it failed, for a disk full since."""
    async with opened(file, patience=0.4) as store:
        here = World(store, Clock())
        head = await here.put("a")

        def full(book: Book) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        with monkeypatch.context() as patched:
            patched.setattr(Book, "truncate", full)
            _, *outcomes = await asyncio.gather(
                store.delete(head), store.put(turn("b")), store.put(turn("c")),
                return_exceptions=True,
            )  # fmt: skip
        assert await here.results("b", "c") == ["hit", "hit"]
        assert outcomes == [None, None]
        assert store.shares.turns == 2


# One transaction of many


async def test_who_does_not_fit_fails_alone(file: Path) -> None:
    """Of turns that are written together those that fit are kept, and the others refused."""
    async with opened(file) as store:
        store.configure(ttl=0, max_bytes=10_000)
        turns = [turn(f"t{n}", size=20_000 if n % 3 == 0 else 600) for n in range(12)]
        outcomes = await asyncio.gather(*map(store.put, turns), return_exceptions=True)
        refusals = [isinstance(outcome, NoRoomError) for outcome in outcomes]
        assert refusals == [n % 3 == 0 for n in range(12)]
        results = [(await store.load(ALICE, f"t{n}")).result for n in range(12)]
        assert results == ["missing" if n % 3 == 0 else "hit" for n in range(12)]
        assert (store.shares.size, store.shares.turns) == (8 * 600, 8)


def changing(book: Book, work: Callable[[], object]) -> None:
    """Do something in a transaction."""
    book.begin()
    work()
    book.commit()


@pytest.mark.parametrize("reason", ["ttl", "size"])
def test_a_removal_goes_on_after_a_restart(file: Path, reason: Removal) -> None:
    """What of a conversation is not removed yet is found by nobody, and is removed for its reason.

    It is the first to go on with, whatever comes or is used meanwhile.
    """
    clock, kept = Clock(), SessionFile(file, patience=1)
    connection = kept.open()
    book = Book(connection, Bounds(TTL, PLENTY), Pins(), patience=1, read=clock)
    for number in range(200):
        made = bare(f"t{number}", ALICE, None, 600)
        changing(book, lambda made=made: book.put(made))  # type: ignore[misc]
    connection.execute("UPDATE turns SET root = 1")
    connection.execute("DELETE FROM conversations WHERE id <> 1")
    connection.execute("UPDATE conversations SET turns = 200, size = 200 * 600")
    head = Reader(connection, Pins(), clock).load(ALICE, "t199", 0).head
    connection.execute("PRAGMA query_only = OFF")
    if reason == "ttl":
        clock.now += TTL + 1
    else:
        book.bounds = Bounds(0, 1000)
    changing(book, lambda: book.tend(50))
    assert (book.more, book.shares.turns) == (True, 150)
    book.bounds = Bounds(0, PLENTY)
    changing(book, lambda: book.put(turn("live")))
    clock.now += 1
    changing(book, lambda: book.renew([1]))
    book.begin()
    with pytest.raises(NoRoomError):
        book.put(turn("late", parent=head))
    book.rollback()
    connection.close()

    async def goes_on() -> None:
        async with opened(file, clock) as store:
            assert store.shares.turns == 151
            results = {(await store.load(ALICE, f"t{n}")).result for n in range(200)}
            assert results == {"missing", "expired"}
            store.tend()
            for _ in range(10):
                await store.check()
            results = {(await store.load(ALICE, f"t{n}")).result for n in range(200)}
            assert results == {"missing"}
            assert store.shares.removed == {"ttl": 0, "size": 0, "deleted": 0} | {reason: 150}
            assert (await store.load(ALICE, "live")).result == "hit"

    asyncio.run(goes_on())


@pytest.mark.parametrize("reason", ["deleted", "ttl", "size"])
async def test_no_trace_is_left_once_all_is_done(file: Path, reason: Removal) -> None:
    """Neither of content nor of ids of items, as soon as the last of them was removed."""
    clock = Clock()
    async with opened(file, clock) as store:
        here = World(store, clock)
        heads = [await here.put(f"CANARY {n}", ids=[f"CANARY item {n}"]) for n in range(20)]
        clock.now += 10
        await here.put("kept", BOB)
        assert any(b"CANARY" in data for data in files_of(file).values())
        if reason == "deleted":
            for head in heads:
                await store.delete(head)
        elif reason == "ttl":
            store.configure(ttl=5, max_bytes=PLENTY)
            await here.tend()
        else:
            store.configure(ttl=0, max_bytes=1000)
            await here.tend()
        assert not [name for name, data in files_of(file).items() if b"CANARY" in data]
        assert store._connection.execute("SELECT count(*) FROM items").fetchone() == (0,)
        here.holds((BOB, "kept"), removed=tuple(20 * (reason == r) for r in REMOVALS))  # type: ignore[arg-type]


# Conversations in use


@pytest.mark.parametrize("kind", KINDS)
async def test_what_was_just_put_does_not_give_way_to_what_is_in_use(
    kind: str, tmp_path: Path
) -> None:
    """Who is told that a turn is kept finds it, even if all others of its key are in use."""
    async with world(kind, tmp_path) as here:
        here.store.configure(ttl=0, max_bytes=10_000)
        used = await here.put("a", size=6000)
        here.store.pins.add(used.root)
        new = await here.put("b", size=5000)
        assert await here.path(new) == here.inputs("b")
        here.holds((ALICE, "b"), removed=(0, 1, 0))


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_in_use_does_not_expire(kind: str, tmp_path: Path) -> None:
    """Until the last of several who use it has ended; others of its key expire meanwhile."""
    async with world(kind, tmp_path) as here:
        here.store.configure(ttl=TTL, max_bytes=PLENTY)
        used = await here.put("a", ids=["i"])
        await here.put("b")
        here.store.pins.add(used.root)
        here.store.pins.add(used.root)
        here.clock.now += 2 * TTL
        for _ in range(2):
            await here.tend()
            assert await here.results("a", "b") == ["hit", "missing"]
            assert set(await here.store.find(ALICE, ["i"])) == {"i"}
            here.store.pins.remove(used.root)
        assert await here.result("a") == "expired"
        await here.tend()
        here.holds(removed=(2, 0, 0))


@pytest.mark.parametrize("kind", KINDS)
async def test_it_expires_when_the_time_is_up(kind: str, tmp_path: Path) -> None:
    """At `ttl` seconds exactly a conversation is expired, and not a moment before."""
    async with world(kind, tmp_path) as here:
        here.clock.tick = 0
        here.store.configure(ttl=TTL, max_bytes=PLENTY)
        await here.put("a")
        here.clock.now += TTL - 0.5
        await here.tend()
        assert await here.result("a") == "hit"
        here.clock.now += 0.5
        assert await here.result("a") == "expired"
        await here.tend()
        assert await here.result("a") == "missing"


async def test_a_conversation_emptied_while_in_use_leaves_nothing(file: Path) -> None:
    """When its last turn was deleted and no other came, it counts no more, also when reopened."""
    async with opened(file) as store:
        here = World(store, Clock())
        head = await here.put("a")
        await here.put("b", BOB)
        store.pins.add(head.root)
        assert await store.delete(head)
        store.pins.remove(head.root)
        await here.tend()
        rows = store._connection.execute("SELECT owner FROM conversations").fetchall()
        assert rows == [(BOB,)]
    async with opened(file) as store:
        assert list(store.shares.by_owner) == [BOB]


def test_l5_what_was_emptied_is_known_after_a_rollback(file: Path) -> None:
    """A conversation without a turn is removed later if the transaction that did it was undone."""
    kept, pins = SessionFile(file, patience=1), Pins()
    connection = kept.open()
    book = Book(connection, Bounds(0, PLENTY), pins, patience=1, read=Clock())
    changing(book, lambda: book.put(turn("a")))
    head = Reader(connection, pins, Clock()).load(ALICE, "a", 0).head
    assert head is not None
    connection.execute("PRAGMA query_only = OFF")
    pins.add(head.root)
    book.begin()
    book.delete(head)
    book.rollback()
    assert book._emptied == set()
    changing(book, lambda: book.delete(head))
    pins.remove(head.root)
    book.begin()
    book.tend()
    book.rollback()
    assert connection.execute("SELECT count(*) FROM conversations").fetchone() == (1,)
    changing(book, book.tend)
    assert connection.execute("SELECT count(*) FROM conversations").fetchone() == (0,)
    connection.close()


def test_the_log_of_a_crash_is_emptied(file: Path) -> None:
    """A deletion may have been left in the log: it is emptied once nothing else is due."""
    connection = SessionFile(file, patience=1).open()
    book = Book(connection, Bounds(0, PLENTY), Pins(), patience=1, read=Clock())
    changing(book, book.tend)
    assert book.deleted
    book.truncate()
    book.deleted = False
    changing(book, book.tend)
    assert not book.deleted
    connection.close()


def test_who_reads_cannot_write(file: Path) -> None:
    """Only the thread that writes changes the file, whatever a reader is told to do."""
    kept = SessionFile(file, patience=1)
    kept.open().close()
    reader = Reader(kept.connect(), Pins(), Clock())
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader._execute("DELETE FROM turns")
    reader.close()


async def test_what_is_used_last_is_renewed_at_the_end(file: Path) -> None:
    """A conversation that was continued while another was being renewed does not expire early."""
    clock = Clock()
    async with opened(file, clock) as store:
        here = World(store, clock)
        heads = [await here.put("a"), await here.put("b", BOB)]
        clock.now += TTL
        for head in heads:
            store._renew([head.root])
        assert store._used == {heads[1].root}
    with database(file) as other:
        rows = other.execute("SELECT used FROM conversations").fetchall()
    assert rows == [(clock.now,), (clock.now,)]


async def test_no_thread_of_the_store_keeps_the_process(file: Path) -> None:
    """A disk that hangs is not waited for at the exit: all its threads are daemons."""
    async with opened(file):
        threads = [each for each in threading.enumerate() if each.name.startswith("sessions")]
        assert len(threads) == 3
        assert all(each.daemon for each in threads)


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("reads", [True, False])
async def test_what_hangs_keeps_the_file_open(
    file: Path,
    writes: bool,  # noqa: FBT001
    reads: bool,  # noqa: FBT001
) -> None:
    """A connection is not closed under a thread that hangs, be it one that reads."""
    async with opened(file) as store:
        real = store._writer, store._readers, store._connection, store._book
        store._writer = Mock(close=Mock(return_value=not writes))
        store._readers = Mock(close=Mock(return_value=not reads))
        store._connection = connection = Mock()
        store._close()
        assert connection.close.called is not (writes or reads)
        store._writer, store._readers, store._connection, store._book = real


async def test_readers_that_hang_share_one_patience(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many threads hang in a read, the end waits for them no longer than it is told to."""
    now, waits = 0.0, []

    class Hangs:
        def join(self, seconds: float) -> None:
            nonlocal now
            waits.append(seconds)
            now += seconds

        def is_alive(self) -> bool:
            return True

    readers = Readers(Mock(), 0)
    readers._threads = [Hangs(), Hangs(), Hangs()]  # type: ignore[list-item]
    monkeypatch.setattr("aiproxy.stores.sqlite_readers.time.monotonic", lambda: now)
    assert not readers.close(2.0)
    assert waits == [2.0, 0.0, 0.0]


# Large content


async def test_a_large_turn_is_judged_by_its_row(file: Path) -> None:
    """A look at a turn of 32 MiB, or at what goes on from it, reads a few pages of the file."""
    async with opened(file, patience=10) as store:
        here = World(store, Clock())
        content = Content(b'["%b"]' % (b"x" * LARGE), b'["%b"]' % (b"y" * 1000), b"{", b"}")
        head = await here.put("a", content=content, ids=["i"])
        child = await here.put("b", parent=head)
        two = turn("c", ids=["i", "j"])
        assert two.size == two.content.size + ROW + 2 * ITEM
    async with opened(file, patience=10) as store:
        await store.load(ALICE, "none")
        before = bytes_read()
        loaded = [await store.load(ALICE, name) for name in ("a", "b")]
        await store.load(BOB, "a")
        await store.find(ALICE, ["i"])
        assert bytes_read() - before < 64 * PAGE
        assert [each.head for each in loaded] == [head, child]
        assert head.size > LARGE
        assert await store.content(head) == content
