"""Turns, and stores to put them in, for tests of stores."""

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aiproxy.sessions import NOTHING, ROW, Content, Delta, Head, SessionStore, Share, Turn
from aiproxy.sessions.items import identified
from aiproxy.stores.memory_sessions import MemorySessions
from aiproxy.stores.sqlite import SqliteSessions

KINDS = ("memory", "sqlite")
PLENTY = 1 << 30
TTL = 100.0
ALICE, BOB, CAROL = "alice", "bob", "carol"


@dataclass
class Clock:
    """A clock that goes on by a little at each look, so that no two uses are at one time."""

    now: float = 1000.0
    tick: float = 0.0

    def __call__(self) -> float:
        """Return the time."""
        self.now += self.tick
        return self.now


def message(text: str, item_id: str | None = None) -> bytes:
    """Return an item, with an id or without."""
    named = "" if item_id is None else f'"id":"{item_id}",'
    return f'{{{named}"type":"message","content":"{text}"}}'.encode()


def array(*items: bytes) -> bytes:
    """Return an array of items."""
    return b"[" + b",".join(items) + b"]"


def turn(
    name: str,
    owner: str = ALICE,
    parent: Head | None = None,
    *,
    ids: Sequence[str] = (),
    size: int | None = None,
    held: bool = True,
    upstream: str = "one",
    content: Content | None = None,
) -> Turn:
    """Return a turn whose content says its name and owner.

    Args:
        name: its id.
        owner: whose it is.
        parent: what it goes on from.
        ids: of items of its output.
        size: that it counts in all, at least.
        held: its content is kept here.
        upstream: that made it.
        content: instead of its own.
    """
    if content is None:
        given = array(message(f"{name} of {owner} asks"))
        made = array(*(message(f"{name} of {owner} says {each}", each) for each in ids))
        content = Content(given, made, b'{"output":', b"}")
    items = identified(content.input, content.output)
    if not held:
        content = NOTHING
    whole = Turn(name, owner, parent, 1, "m", upstream, 7, held, content, items)
    padding = b" " * (0 if size is None else size - whole.size)
    return replace(whole, content=content._replace(after=content.after + padding))


def bare(name: str, owner: str, parent: Head | None, size: int) -> Turn:
    """Return a turn with little but its name in it, that counts so many bytes."""
    before = f"<{name}>".encode().ljust(size - ROW - 4, b".")
    content = Content(b"[]", b"[]", before, b"")
    return Turn(name, owner, parent, 1, "m", "one", None, content=content)


def delta(whole: Turn) -> Delta:
    """Return what is replayed of a turn."""
    return Delta(whole.upstream, whole.content.input, whole.content.output)


@dataclass
class World:
    """A store, and its clock."""

    store: SessionStore
    clock: Clock
    put_turns: dict[tuple[str, str], Turn] = field(default_factory=dict)

    async def put(
        self, name: str, owner: str = ALICE, parent: Head | None = None, **how: Any
    ) -> Head:
        """Put a turn, and find it; arguments as of `turn`."""
        made = turn(name, owner, parent, **how)
        await self.store.put(made)
        self.put_turns[owner, name] = made
        return await self.head(name, owner)

    async def chain(self, *names: str, owner: str = ALICE) -> list[Head]:
        """Put a conversation, each turn going on from the one before."""
        heads: list[Head] = []
        for name in names:
            heads.append(await self.put(name, owner, heads[-1] if heads else None))
        return heads

    async def head(self, name: str, owner: str = ALICE) -> Head:
        """Find a turn that is there."""
        loaded = await self.store.load(owner, name)
        assert loaded.result == "hit"
        assert loaded.head is not None
        return loaded.head

    async def result(self, name: str, owner: str = ALICE) -> str:
        """Look for a turn."""
        loaded = await self.store.load(owner, name)
        assert (loaded.head is not None) == (loaded.result == "hit")
        return loaded.result

    async def results(self, *names: str, owner: str = ALICE) -> list[str]:
        """Look for several."""
        return [await self.result(name, owner) for name in names]

    async def path(self, head: Head) -> list[bytes] | None:
        """Return the inputs along a path, and wait until its conversation is renewed."""
        found = await self.store.path(head)
        await self.store.check()
        return None if found is None else [each.input for each in found]

    def inputs(self, *names: str, owner: str = ALICE) -> list[bytes]:
        """Return the inputs of turns as they were put."""
        return [self.put_turns[owner, name].content.input for name in names]

    async def tend(self, times: int = 1) -> None:
        """Let the store do what is due."""
        for _ in range(times):
            self.store.tend()
            await self.store.check()
            await self.store.check()  # begins after the log was emptied

    def holds(self, *turns: tuple[str, str], removed: tuple[int, int, int] = (0, 0, 0)) -> None:
        """Check the shares: the owners and names of all turns, and removals as of REMOVALS."""
        expected: dict[str, Share] = {}
        for key in turns:
            share = expected.setdefault(key[0], Share())
            share.size += self.put_turns[key].size
            share.turns += 1
        shares = self.store.shares
        assert shares.by_owner == expected
        assert shares.turns == len(turns)
        assert shares.size == sum(share.size for share in expected.values())
        assert tuple(shares.removed.values()) == removed


def sqlite_store(path: Path, clock: Clock, patience: float = 3.0) -> SqliteSessions:
    """Open a file; blocks."""
    store = SqliteSessions(path, patience=patience, read=clock)
    store.open()
    store.configure(ttl=0, max_bytes=PLENTY)
    return store


@asynccontextmanager
async def opened(
    path: Path, clock: Clock | None = None, patience: float = 3.0
) -> AsyncIterator[SqliteSessions]:
    """Open a file for some time."""
    store = await asyncio.to_thread(sqlite_store, path, clock or Clock(), patience)
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def world(kind: str, folder: Path) -> AsyncIterator[World]:
    """Open an empty store of a kind."""
    clock = Clock(tick=1e-6)
    if kind == "sqlite":
        async with opened(folder / "sessions.db", clock) as store:
            yield World(store, clock)
        return
    memory = MemorySessions(clock)
    memory.open()
    memory.configure(ttl=0, max_bytes=PLENTY)
    yield World(memory, clock)
    await memory.close()


@contextmanager
def database(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the file as something else than aiproxy; with its own transactions."""
    connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        yield connection
    finally:
        connection.close()


def files_of(path: Path) -> dict[str, bytes]:
    """Return the contents of the file and of those that SQLite keeps beside it."""
    return {
        beside.name: beside.read_bytes()
        for beside in sorted(path.parent.glob(f"{path.name}*"))
        if beside.is_file()
    }


def bytes_read() -> int:
    """Return how many bytes this process has read, in system calls."""
    with open("/proc/self/io", "rb", buffering=0) as io:  # noqa: PTH123 - itself unbuffered
        first = os.read(io.fileno(), 64).splitlines()[0]
    return int(first.removeprefix(b"rchar: "))
