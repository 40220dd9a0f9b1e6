"""Deletions: answered once no content is on the disk, whoever reads the file."""

import asyncio
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aiproxy.sessions import Content, Head, NotErasedError, StoreError
from aiproxy.stores import sqlite
from aiproxy.stores.sqlite import SqliteSessions
from aiproxy.stores.sqlite_book import Book
from aiproxy.stores.sqlite_reader import Reader
from turns import ALICE, Clock, World, database, files_of, opened, sqlite_store

CANARY = "ERASED-CANARY-7731"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Say where the file is."""
    return tmp_path / "sessions.db"


def left(file: Path) -> list[str]:
    """Return the files that have the canary in them."""
    return [name for name, data in files_of(file).items() if CANARY.encode() in data]


@contextmanager
def read_elsewhere(file: Path) -> Iterator[None]:
    """Have another program read the file, as a backup does."""
    with database(file) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM turns").fetchone()
        yield


async def canary(here: World, name: str = "a") -> Head:
    """Put a turn with the canary in it."""
    return await here.put(name, content=Content(b'["%b"]' % CANARY.encode(), b"[]", b"", b""))


async def eventually_gone(store: SqliteSessions) -> None:
    """Wait until no turn is found any more."""
    while store.shares.turns:  # noqa: ASYNC110 - another thread removes them
        await asyncio.sleep(0.01)


async def test_h5_nobody_is_told_while_another_program_reads(file: Path) -> None:
    """Content that a backup holds on the disk is not called deleted, and the repeat is answered."""
    async with opened(file, patience=0.5) as store:
        here = World(store, Clock())
        head = await canary(here)
        with read_elsewhere(file):
            for _ in range(2):
                began = time.monotonic()
                with pytest.raises(NotErasedError, match="others read the file"):
                    await store.delete(head)
                assert time.monotonic() - began < 2.0
                found = await here.head("a")  # for a repeat of the deletion, and nothing else
                assert (found.key, found.whole) == (head.key, False)
                assert await store.content(found) is None
                assert await store.path(found) is None
            assert left(file)
        assert await store.delete(await here.head("a")) is True
        assert left(file) == []
        assert await here.result("a") == "missing"
        assert await store.delete(head) is False
        here.holds(removed=(0, 0, 1))


async def test_h5_a_repeat_is_answered_after_the_log_was_emptied(file: Path) -> None:
    """Who was told that it is not done yet finds it done, though nobody asked meanwhile."""
    async with opened(file, patience=0.3) as store:
        here = World(store, Clock())
        head = await canary(here)
        with read_elsewhere(file), pytest.raises(NotErasedError):
            await store.delete(head)
        await here.tend()
        assert left(file) == []
        assert await store.delete(await here.head("a")) is True
        assert await here.result("a") == "missing"


async def test_h5_who_left_is_not_told_and_may_ask_again(file: Path) -> None:
    """A deletion whose client left while it waited is done, and a repeat is told so."""
    async with opened(file, patience=5) as store:
        here = World(store, Clock())
        head = await canary(here)
        with read_elsewhere(file):
            leaving = asyncio.ensure_future(store.delete(head))
            await eventually_gone(store)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
        assert await store.delete(await here.head("a")) is True
        assert left(file) == []


async def test_h5_what_is_untold_is_bounded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of deletions that nobody was told of, so many are remembered, the latest ones."""
    monkeypatch.setattr(sqlite, "UNTOLD", 2)
    async with opened(file, patience=0.2) as store:
        here = World(store, Clock())
        heads = [await canary(here, name) for name in "abc"]
        with read_elsewhere(file):
            for head in heads:
                with pytest.raises(NotErasedError):
                    await store.delete(head)
        assert await here.results("a", "b", "c") == ["missing", "hit", "hit"]


async def test_h5_own_reads_are_held(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of our own that are under way delay a deletion, and those that come wait for it."""
    content = Reader.content

    def slowly(reader: Reader, head: Head) -> Content | None:
        execute = reader._execute
        execute("BEGIN")
        found = content(reader, head)
        time.sleep(0.4)  # the read's own duration
        execute("COMMIT")
        return found

    async with opened(file) as store:
        here = World(store, Clock())
        head, other = await canary(here), await here.put("b")
        monkeypatch.setattr(Reader, "content", slowly)
        reads = [asyncio.ensure_future(store.content(other)) for _ in range(4)]
        await asyncio.sleep(0.1)  # the first of them are under way
        assert await store.delete(head) is True
        assert left(file) == []
        assert await asyncio.gather(*reads) == [here.put_turns[ALICE, "b"].content] * 4


async def test_l12_a_deletion_that_waits_holds_nobody_up(file: Path) -> None:
    """While deletions wait for a reader elsewhere, turns are put as fast as ever."""
    async with opened(file, patience=2) as store:
        here = World(store, Clock())
        heads = [await canary(here, f"a{n}") for n in range(5)]
        with read_elsewhere(file):
            deletions = [asyncio.ensure_future(store.delete(head)) for head in heads]
            await eventually_gone(store)
            began = time.monotonic()
            for number in range(20):
                await here.put(f"b{number}")
            assert time.monotonic() - began < 1.5
            assert not any(each.done() for each in deletions)
        assert await asyncio.gather(*deletions) == [True] * 5
        assert left(file) == []


CHILD = """
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_store_erasing import canary
from turns import Clock, World, opened
from aiproxy.stores.sqlite import SqliteSessions
from aiproxy.stores.sqlite_book import Book
async def main():
    async with opened(Path(sys.argv[1])) as store:
        here = World(store, Clock())
        head = await canary(here)
        await here.put("b")
        Book.truncate = lambda book: os.kill(os.getpid(), signal.SIGKILL)
        await store.delete(head)
asyncio.run(main())
"""


async def test_h5_a_kill_before_the_log_is_emptied(file: Path) -> None:
    """What was deleted when the process was killed is out of all files once it is opened again."""
    command = [sys.executable, "-c", CHILD, str(file), str(Path(__file__).parent)]
    child = await asyncio.create_subprocess_exec(*command)
    assert await child.wait() == -9
    assert left(file)
    async with opened(file) as store:
        assert left(file) == []
        results = [(await store.load(ALICE, name)).result for name in "ab"]
        assert results == ["missing", "hit"]


async def test_h5_a_log_that_somebody_reads_at_the_start(file: Path) -> None:
    """It keeps no daemon from starting, and is emptied when that reader has ended."""
    async with opened(file) as store:
        here = World(store, Clock())
        head = await canary(here)
        connection = store._connection
        with read_elsewhere(file):
            await asyncio.to_thread(
                connection.execute, "DELETE FROM turns WHERE id = ?", [head.key]
            )
            copy = file.parent / "copy"
            copy.mkdir()
            for name, data in files_of(file).items():
                if not name.endswith(("-shm", "-lock")):
                    (copy / name).write_bytes(data)
    with read_elsewhere(copy / file.name):
        async with opened(copy / file.name) as store:
            assert left(copy / file.name)
            await World(store, Clock()).tend()
            assert left(copy / file.name)
    async with opened(copy / file.name):
        assert left(copy / file.name) == []


async def test_h5_an_error_is_no_erasure(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that cannot be written when the log is to be emptied is told to who deletes alone."""

    def full(book: Book) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    async with opened(file, patience=0.4) as store:
        here = World(store, Clock())
        head = await canary(here)
        with monkeypatch.context() as patched:
            patched.setattr(Book, "truncate", full)
            with pytest.raises(NotErasedError, match="disk is full"):
                await store.delete(head)
            await here.put("b")
        assert await store.delete(head) is True
        assert left(file) == []


async def test_l6_a_read_that_hangs_keeps_nobody_from_closing(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that never answers is waited for a bounded time at the end."""
    monkeypatch.setattr(sqlite, "CLOSING", 0.3)
    store = await asyncio.to_thread(sqlite_store, file, Clock(), 0.2)
    here = World(store, Clock())
    head = await here.put("a")
    goes_on = threading.Event()
    monkeypatch.setattr(Reader, "content", lambda _reader, _head: goes_on.wait())
    with pytest.raises(StoreError, match="did not answer"):
        await store.content(head)
    began = time.monotonic()
    await store.close()
    assert time.monotonic() - began < 2
    goes_on.set()
