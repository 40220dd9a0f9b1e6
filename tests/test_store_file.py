"""The SQLite file of conversations: what is durable, what is gone, what is refused."""

import asyncio
import dataclasses
import fcntl
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aiproxy.sessions import Delta, Head, StoreError
from aiproxy.stores import sqlite_book, sqlite_file, sqlite_reader, sqlite_readers
from aiproxy.stores.sqlite import SqliteSessions
from aiproxy.stores.sqlite_book import Book
from conftest import BlockingCalls
from invariants import eventually
from turns import ALICE, PLENTY, TTL, Clock, World, bare, turn

CANARY = "STORE-CANARY-5518"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Say where the file is."""
    return tmp_path / "sessions.db"


@pytest.fixture(autouse=True)
def _may_open(blocking_calls: BlockingCalls) -> None:
    """Let a store be opened in the loop, as before a daemon serves."""
    blocking_calls.allow("aiproxy/stores/sqlite.py", {"open"})


def opened(file: Path, clock: Clock | None = None, patience: float = 3.0) -> SqliteSessions:
    """Open a store."""
    store = SqliteSessions(file, patience=patience, read=clock or Clock())
    store.open()
    store.configure(ttl=TTL, max_bytes=PLENTY)
    return store


@pytest.fixture
async def store(file: Path) -> AsyncIterator[SqliteSessions]:
    """Open a store that waits for others but a little."""
    made = opened(file, patience=0.3)
    yield made
    await made.close()


async def head_of(store: SqliteSessions, name: str) -> Head:
    """Find a turn that is there."""
    head = (await store.load(ALICE, name)).head
    assert head is not None
    return head


def found_in(folder: Path, text: str) -> list[str]:
    """Return the files that have a text in them."""
    return [path.name for path in folder.iterdir() if text.encode() in path.read_bytes()]


# Durable


def test_how_it_is_kept(file: Path, tmp_path: Path) -> None:
    """A flushed log that does not stay large, overwritten deletions; its owner's alone."""
    store = opened(file)
    pragmas = {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1, "temp_store": 2}
    pragmas["journal_size_limit"] = 64 * 1024 * 1024
    for name, value in pragmas.items():
        assert store._connection.execute(f"PRAGMA {name}").fetchone()[0] == value
    asyncio.run(store.put(turn("a")))
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name
    asyncio.run(store.close())


async def test_it_is_all_there_again(file: Path) -> None:
    """After a restart turns, items, sizes and the order of use are as before; keys are new."""
    clock = Clock()
    store = World(opened(file, clock), clock)
    a, b = await store.chain("a", "b")
    clock.now += 1
    await store.put("c", ids=["msg_1"])
    clock.now += 1
    await store.path(b)
    shares = deepcopy(store.store.shares)
    await store.store.close()

    again = World(opened(file, clock), clock)
    assert (again.store.shares.size, again.store.shares.turns) == (shares.size, 3)
    assert [await again.head("a"), await again.head("b")] == [a, b]
    assert await again.path(b) is not None
    assert "msg_1" in await again.store.find(ALICE, ["msg_1"])
    new = await again.put("d")
    assert new.key > max(a.key, b.key) + 1
    again.store.configure(ttl=0, max_bytes=shares.size)
    again.store.tend()
    await again.store.check()
    assert await again.results("a", "b", "c") == ["hit", "hit", "missing"]
    await again.store.close()


CHILD = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from turns import turn
from aiproxy.stores.sqlite import SqliteSessions
async def main():
    store = SqliteSessions(Path(sys.argv[1]))
    store.open()
    store.configure(ttl=0, max_bytes=1 << 30)
    number = 0
    async def put():
        nonlocal number
        while True:
            number += 1
            name = f"turn-{number}"
            await store.put(turn(name))
            print(name, flush=True)
    await asyncio.gather(*(put() for _ in range(8)))
asyncio.run(main())
"""


async def test_what_was_put_survives_a_kill(file: Path) -> None:
    """Every turn that `put` has returned from is there after SIGKILL."""
    command = [sys.executable, "-c", CHILD, str(file), str(Path(__file__).parent)]
    child = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert child.stdout is not None
    names = [(await child.stdout.readline()).decode().strip() for _ in range(300)]
    child.kill()
    rest = (await child.stdout.read()).decode()
    await child.wait()
    names += rest[: rest.rfind("\n") + 1].splitlines()
    store = opened(file)
    assert store._connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    results = [(await store.load(ALICE, name)).result for name in names]
    assert results == ["hit"] * len(names)
    await store.close()


async def test_turns_share_a_commit(store: SqliteSessions, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is written in one transaction: far fewer than turns that come at once."""
    commits = 0
    commit = Book.commit

    def counted(book: Book) -> None:
        nonlocal commits
        commits += 1
        commit(book)

    monkeypatch.setattr(Book, "commit", counted)
    await asyncio.gather(*(store.put(turn(f"t{number}")) for number in range(500)))
    assert store.shares.turns == 500
    assert commits < 100


async def test_an_answer_comes_after_its_commit(
    store: SqliteSessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn is durable before anybody is told so."""
    order: list[str] = []
    commit = Book.commit

    def seen(book: Book) -> None:
        commit(book)
        order.append("committed")

    monkeypatch.setattr(Book, "commit", seen)
    await store.put(turn("a"))
    order.append("told")
    assert order == ["committed", "told"]


async def test_a_turn_at_fault_takes_no_other_with_it(store: SqliteSessions) -> None:
    """What cannot be written at all fails alone; those of the same transaction are kept."""
    bad = dataclasses.replace(turn("bad"), model="\ud800")
    turns = [turn("a"), bad, turn("b")]
    results = await asyncio.gather(*map(store.put, turns), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), UnicodeEncodeError, type(None)]
    assert [(await store.load(ALICE, name)).result for name in ("a", "bad", "b")] == [
        "hit", "missing", "hit",
    ]  # fmt: skip
    assert store.shares.turns == 2


# Away


async def locked(file: Path, during: Callable[[], object]) -> None:
    """Do something while another connection has the file locked for writing."""
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    await asyncio.to_thread(other.execute, "BEGIN IMMEDIATE")
    try:
        done = during()
        if asyncio.iscoroutine(done):
            await done
    finally:
        await asyncio.to_thread(other.close)


async def test_f33_a_locked_file_is_waited_for_but_shortly(
    store: SqliteSessions, file: Path
) -> None:
    """Writing fails within the patience, reading goes on; then all is well again."""
    await store.put(turn("a"))
    before = deepcopy(store.shares)
    loop = asyncio.get_running_loop()

    async def during() -> None:
        began = loop.time()
        with pytest.raises(StoreError):
            await store.put(turn("b"))
        assert loop.time() - began < 5
        assert (await store.load(ALICE, "a")).result == "hit"

    await locked(file, during)
    assert store.shares == before
    await store.put(turn("b"))
    assert (await store.load(ALICE, "b")).result == "hit"


async def test_f31_a_full_disk_loses_nothing(store: SqliteSessions) -> None:
    """Of what cannot be written nothing is there, nothing is counted, and room helps."""
    await store.put(turn("a"))
    before = deepcopy(store.shares)
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    large = [turn(f"large {number}", size=100_000) for number in range(3)]
    results = await asyncio.gather(*map(store.put, large), return_exceptions=True)
    assert all(isinstance(result, StoreError) for result in results)
    assert "full" in str(results[0])
    assert store.shares == before
    for each in large:
        assert (await store.load(ALICE, each.id)).result == "missing"
    store._connection.execute("PRAGMA max_page_count = 1000000")
    await store.check()
    await asyncio.gather(*map(store.put, large))
    assert store.shares.turns == 4


async def test_who_leaves_takes_nothing_with_him(store: SqliteSessions, file: Path) -> None:
    """A put that is cancelled while it waits is not done, and others are."""

    async def during() -> None:
        leaving = asyncio.ensure_future(store.put(turn("left")))
        await asyncio.sleep(0)
        leaving.cancel()
        staying = asyncio.ensure_future(store.put(turn("stays")))
        with pytest.raises((StoreError, asyncio.CancelledError)):
            await staying
        with pytest.raises(asyncio.CancelledError):
            await leaving

    await locked(file, during)
    await store.put(turn("after"))
    assert (await store.load(ALICE, "left")).result == "missing"
    assert (await store.load(ALICE, "after")).result == "hit"
    assert store.shares.turns == 1


# Gone


@pytest.mark.parametrize("reason", ["deleted", "size", "ttl"])
async def test_what_is_removed_leaves_no_trace(file: Path, tmp_path: Path, reason: str) -> None:
    """No byte of a turn is in the file or its log, once it is deleted or was evicted."""
    clock = Clock()
    store = opened(file, clock)
    for number in range(100):
        await store.put(bare(f"{CANARY} {number}", ALICE, None, 3000))
    await store.put(turn("other"))
    assert found_in(tmp_path, CANARY)
    if reason == "deleted":
        for number in range(100):
            assert await store.delete(await head_of(store, f"{CANARY} {number}"))
    else:
        clock.now += 1
        await store.put(turn("kept"))
        if reason == "size":
            store.configure(ttl=0, max_bytes=1000)
        else:
            store.configure(ttl=0.5, max_bytes=PLENTY)
        store.tend()
        while store.shares.turns > 1 or found_in(tmp_path, CANARY):
            await store.check()
    assert found_in(tmp_path, CANARY) == []
    assert store.shares.removed[reason] >= 100  # type: ignore[index]
    await store.close()
    assert found_in(tmp_path, CANARY) == []


# Refused


async def test_several_have_it_open(file: Path) -> None:
    """What one has put, all others continue, count, and delete; no key is given twice."""
    one, other = opened(file), opened(file)
    await one.put(turn("a"))
    await other.put(turn("b", parent=await head_of(other, "a")))
    await one.put(turn("c", parent=await head_of(one, "b")))
    keys = [(await head_of(one, name)).key for name in "abc"]
    assert keys == sorted(set(keys))
    assert await other.delete(await head_of(other, "c"))
    assert (await one.load(ALICE, "c")).result == "missing"
    await one.put(turn("d"))
    assert (await head_of(other, "d")).key > keys[2]  # that of a deleted one is not given again
    await other.close()
    await one.put(turn("e"))
    await one.close()
    again = opened(file)
    assert again.shares.turns == 4
    await again.close()


async def test_what_others_hold_is_counted_within_a_second(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound holds over all who write: what one has put makes another's owners give way."""
    monkeypatch.setattr(sqlite_book, "RECOUNT", 0.0)
    one, other = opened(file), opened(file)
    for number in range(20):
        await one.put(turn(f"a-{number}"))
    most = one.shares.size
    other.configure(ttl=TTL, max_bytes=most)
    for number in range(20):
        await other.put(turn(f"b-{number}"))
    assert other.shares.size <= most + most // 8
    await one.put(turn("last"))
    assert one.shares.turns <= 24
    await one.close()
    await other.close()


async def test_too_many_reads_are_refused_at_once(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a disk that hangs nobody waits in vain: what is too much is told so at once."""
    monkeypatch.setattr(sqlite_readers, "MOST_WAITING", 3)
    store = opened(file, patience=30)
    await store.put(turn("a"))
    hangs = threading.Event()
    read = sqlite_reader.Reader.load

    def hang(*given: Any) -> Any:
        hangs.wait(30)
        return read(*given)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite_reader.Reader, "load", hang)
        under_way = [asyncio.ensure_future(store.load(ALICE, "a")) for _ in range(2)]
        await asyncio.sleep(0)
        await eventually(partial(waits, store, 0))  # both threads hang
        under_way += [asyncio.ensure_future(store.load(ALICE, "a")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(StoreError, match="3 reads wait already"):
            await store.load(ALICE, "a")
        hangs.set()
        await asyncio.wait(under_way)
    assert (await store.load(ALICE, "a")).result == "hit"
    await store.close()


async def test_a_fault_in_a_read_is_told_to_who_reads(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no failure of the file is a bug of ours, and is told as it is; the thread goes on."""
    store = opened(file)
    await store.put(turn("a"))

    def broken(*_given: Any) -> Any:
        raise ValueError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(sqlite_reader.Reader, "load", broken)
        with pytest.raises(ValueError, match="broken"):
            await store.load(ALICE, "a")
    assert (await store.load(ALICE, "a")).result == "hit"
    await store.close()


async def waits(store: SqliteSessions, reads: int) -> None:
    """Assert that so many reads wait for a thread."""
    assert store._readers._jobs.qsize() == reads


def test_a_file_that_another_process_opens_for_ever(file: Path) -> None:
    """It is waited for, but not for ever."""
    lock = os.open(f"{file}-lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(StoreError, match=f"{file}: another process is opening it"):
        opened(file, patience=0.1)
    os.close(lock)
    asyncio.run(opened(file, patience=0.1).close())


def test_what_is_refused_is_not_touched_nor_locked(file: Path) -> None:
    """A file of something else is left as it is; with a good one in its place it works."""
    file.write_bytes(b"this is no database, and must not become one" * 40)
    before = file.read_bytes()
    with pytest.raises(StoreError, match=f"{file}: this is no SQLite database"):
        opened(file)
    assert file.read_bytes() == before
    file.unlink()
    asyncio.run(opened(file).close())
    with sqlite3.connect(file) as other:
        other.execute(f"PRAGMA user_version = {sqlite_file.VERSION + 1}")
    other.close()
    with pytest.raises(StoreError, match=f"{file}: a newer version of aiproxy has written it"):
        opened(file)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    """The message names the file, and says what is the matter."""
    with pytest.raises(StoreError, match=f"{tmp_path}/no/sessions.db: No such file or directory"):
        opened(tmp_path / "no" / "sessions.db")
    with pytest.raises(StoreError, match=f"{tmp_path}: Is a directory"):
        opened(tmp_path)


# What a look-up costs


async def test_a_parent_is_judged_by_its_row(store: SqliteSessions) -> None:
    """Depth and size of 4,096 turns and 32 MiB are known by index look-ups, without a scan."""
    parent: Head | None = None
    for number in range(4096):
        made = bare(f"t{number}", ALICE, parent, 600)
        await store.put(made)
        parent = await head_of(store, made.id) if number % 512 == 511 else Head(
            made.id, number + 1, 1, None if parent is None else parent.key, ALICE, made.depth,
            made.path_size, None, 1, "m", "one", held=True, whole=True,
        )  # fmt: skip
    last = await head_of(store, "t4095")
    assert (last.depth, last.whole, last.size) == (4096, True, 4 * 4096)
    path = await store.path(last)
    assert path == [Delta("one", b"[]", b"[]")] * 4096
    plan = store._connection.execute(f"EXPLAIN QUERY PLAN {sqlite_reader._HEAD}", ("x",)).fetchall()
    assert [row[3].split()[0] for row in plan] == ["SEARCH", "SEARCH"]
    assert "t.input" not in sqlite_reader._HEAD
