"""Turns in SQLite: what is done within a transaction, in the thread that writes.

Another process may write the same file, while one takes over from the other: what it has done is
seen when the next transaction begins. It does not know which conversations are in use here.
"""

from __future__ import annotations

import sqlite3
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from aiproxy.sessions import Head, NoRoomError, Pins, Shares
from aiproxy.stores.sqlite_file import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiproxy.sessions import Removal, Turn

STEP = 64  # turns that are removed in one transaction
MOST_OWED = 64 * 1024 * 1024  # bytes over its bound that the file may take for a moment
GIVING_WAY = 0.25  # seconds of a transaction in which others give way to what it has put
LOOK = 0.001  # seconds until a locked file is tried again
RECOUNT = 1.0  # seconds at least between two counts of all owners, while others write
FIRST = -1.0  # `used` of a conversation that is being removed: before all others
_GONE: tuple[Removal, ...] = ("deleted", "ttl", "size")  # by the value of `gone`; 0: it is not

_INSERT = """
INSERT INTO turns VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_USE = """
INSERT INTO conversations VALUES (?, ?, ?, ?, 1, 0) ON CONFLICT (id) DO UPDATE SET
    used = max(used, excluded.used), size = size + excluded.size, turns = turns + 1
"""
_OLDEST = "SELECT id, owner, used, gone FROM conversations ORDER BY used"
_INSERT_ITEM = "INSERT OR IGNORE INTO items VALUES (?, ?, ?, ?, ?, ?, ?)"


class Bounds(NamedTuple):
    """What is kept, and how long."""

    ttl: float  # seconds; 0: for ever
    max_bytes: int


class Book:
    """All that changes the file; for one thread. Every change is between `begin` and `commit`.

    Attributes:
        shares: what the file holds; others may read it.
        bounds: may be replaced at any time.
        more: the last `tend` left something to do.
        stale: something was removed whose traces may still be in the write-ahead log.
        deleted: the log is to be emptied for that now.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        bounds: Bounds,
        pins: Pins,
        *,
        patience: float,
        read: Callable[[], float] = time.time,
    ) -> None:
        self._connection = connection
        self._execute = connection.execute
        self._read = read
        self.bounds = bounds
        self._pins = pins
        self._patience = patience
        self._emptied: set[int] = set()  # conversations in use without a turn
        self.shares = Shares()
        self.more = False
        self.deleted = False
        self._undo: list[Callable[[], object]] = []  # what the transaction has changed here
        self._last_key = self._kept_key = 0  # the last one given, and as the file has it
        self._version = -1  # of the file, as SQLite tells whether others have written
        self._behind = False  # they have, and the owners were not counted since
        self._count_at = 0.0  # when they may be, on the monotonic clock
        self._owed = 0  # bytes that were put beyond the bound, and nothing has given way to
        self._owed_before = 0
        self.stale = True  # as a crash may have left it
        self._load()

    def _load(self) -> None:
        self._execute("PRAGMA busy_timeout = 0")  # see `_lock`
        self._lock()
        self._execute("DELETE FROM conversations WHERE turns <= 0")
        self._catch_up()
        self._execute("COMMIT")

    def _catch_up(self) -> None:
        """Learn what others have changed."""
        version = self._execute("PRAGMA data_version").fetchone()[0]
        if version != self._version:
            self._version = version
            self._behind = True
            (self._kept_key,) = self._execute("SELECT last FROM keys").fetchone()
            self._last_key = max(self._last_key, self._kept_key)
        if self._behind and time.monotonic() >= self._count_at:
            self._behind = False
            self._count()
            self._count_at = time.monotonic() + RECOUNT

    def _count(self) -> None:
        """What all owners hold, by the file."""
        shares = Shares(removed=self.shares.removed)
        for owner, size, turns in self._execute(
            "SELECT owner, sum(size), sum(turns) FROM conversations GROUP BY owner"
        ):
            shares.add(owner, size, turns)
        self.shares = shares

    # -- transactions

    def begin(self) -> None:
        """Begin a transaction; waits for others that have the file locked."""
        self._lock()
        self._owed_before = self._owed
        self._catch_up()

    def _lock(self) -> None:
        """Lock the file, at once when others release it.

        SQLite itself would look again ever more seldom: beside one that writes all the time its
        turn would not come.
        """
        until = time.monotonic() + self._patience
        while True:
            try:
                self._execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not busy or time.monotonic() >= until:
                    raise
                time.sleep(LOOK)
            else:
                return

    def commit(self) -> None:
        """Make durable what was done."""
        if self._last_key != self._kept_key:
            self._execute("UPDATE keys SET last = ?", (self._last_key,))
        self._execute("COMMIT")
        self._kept_key = self._last_key
        self._undo.clear()

    def rollback(self) -> None:
        """Undo what was done."""
        while self._undo:
            self._undo.pop()()
        self._owed = self._owed_before
        if self._connection.in_transaction:
            self._execute("ROLLBACK")

    def checkpoint(self) -> None:
        """Write of the log into the file what can be, beside those who read."""
        self._execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def truncate(self) -> None:
        """Empty the write-ahead log, so that what was removed is not there either.

        Nobody is waited for: `stale` says whether somebody who reads, for a backup say, was in the
        way.
        """
        busy, _, _ = self._execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self.stale = bool(busy)

    @property
    def crowded(self) -> bool:
        """No more is to be put until others have given way."""
        return self._owed > min(MOST_OWED, self.bounds.max_bytes // 8)

    # -- changes

    def put(self, turn: Turn) -> None:
        """See `SessionStore`."""
        owner, parent = turn.owner, turn.parent
        self._last_key += 1
        key = self._last_key
        root = key if parent is None else parent.root
        now = self._read()
        self._check_room(turn)
        if not turn.held:
            self._replace(turn.id, owner)
        whole = parent is None or self._is_whole(parent)
        self._execute(_USE, (root, owner, now, turn.size))
        content = turn.content
        self._execute(_INSERT, (
            key, turn.id, owner, root, None if parent is None else parent.key, turn.depth,
            turn.path_size, turn.tokens, turn.created, turn.model, turn.upstream, turn.held,
            turn.reasons, whole, turn.size, content.input, content.output, content.before,
            content.after,
        ))  # fmt: skip
        for item in turn.items:
            self._execute(_INSERT_ITEM, (
                owner, item.id, key, item.output, item.position, item.size, item.weight,
            ))  # fmt: skip
        self.shares.add(owner, turn.size)
        self._undo.append(partial(self.shares.remove, owner, turn.size, None))
        if (over := self.shares.size - self.bounds.max_bytes) > 0:
            self._owed += min(turn.size, over)
            self.more = True

    def _is_whole(self, parent: Head) -> bool:
        """Whether all turns before a new one are there."""
        row = self._execute("SELECT whole FROM turns WHERE id = ?", (parent.key,)).fetchone()
        return row is not None and bool(row[0])

    def _check_room(self, turn: Turn) -> None:
        """Refuse a turn that cannot stay. Changes nothing."""
        size = turn.size
        if turn.parent is not None:
            row = self._execute(
                "SELECT size FROM conversations WHERE id = ? AND gone = 0", (turn.parent.root,)
            ).fetchone()
            if row is None:
                raise NoRoomError("its conversation had to give way")
            size += row[0]
        shares, bound = self.shares, self.bounds.max_bytes
        if shares.size + turn.size > bound and not shares.fits(turn.owner, size, bound):
            raise NoRoomError("the conversation does not fit in sessions.max_bytes")

    def _replace(self, response: str, owner: str) -> None:
        """Remove a turn that an upstream gave the same id."""
        row = self._execute(
            "SELECT id, root, size FROM turns WHERE response = ? AND owner = ?", (response, owner)
        ).fetchone()
        if row is not None:
            key, root, size = row
            self._break(root, key)
            self._remove(owner, root, [(key, size)], None)

    def renew(self, roots: Iterable[int]) -> None:
        """Conversations were continued."""
        now = self._read()
        for root in roots:
            self._execute(
                "UPDATE conversations SET used = max(used, ?) WHERE id = ? AND gone = 0",
                (now, root),
            )

    def delete(self, head: Head) -> bool:
        """See `SessionStore`."""
        row = self._execute("SELECT root, size FROM turns WHERE id = ?", (head.key,)).fetchone()
        if row is None:
            return False
        root, size = row
        self._break(root, head.key)
        self._remove(head.owner, root, [(head.key, size)], "deleted")
        return True

    def _break(self, root: int, key: int) -> None:
        """Mark the turns that go on from one that is removed."""
        children: dict[int, list[int]] = {}
        for child, parent in self._execute("SELECT id, parent FROM turns WHERE root = ?", (root,)):
            children.setdefault(parent, []).append(child)
        lost, reached = [], [key]
        while reached:
            reached = [child for parent in reached for child in children.get(parent, ())]
            lost += reached
        self._connection.executemany(
            "UPDATE turns SET whole = 0 WHERE id = ?", [(each,) for each in lost]
        )

    def _remove(
        self, owner: str, root: int, turns: list[tuple[int, int]], reason: Removal | None
    ) -> None:
        keys = [(key,) for key, _ in turns]
        size = sum(size for _, size in turns)
        self._connection.executemany("DELETE FROM items WHERE turn = ?", keys)
        self._connection.executemany("DELETE FROM turns WHERE id = ?", keys)
        self._execute(
            "UPDATE conversations SET size = size - ?, turns = turns - ? WHERE id = ?",
            (size, len(turns), root),
        )
        if root in self._pins and reason not in ("ttl", "size"):
            if root not in self._emptied:
                self._emptied.add(root)  # or will be
                self._undo.append(partial(self._emptied.discard, root))
        else:
            self._execute("DELETE FROM conversations WHERE id = ? AND turns <= 0", (root,))
        self.shares.remove(owner, size, reason, len(turns))
        over = max(0, self.shares.size - self.bounds.max_bytes)
        self._owed = min(over, max(0, self._owed - size))
        self._undo.append(partial(self.shares.restore, owner, size, reason, len(turns)))
        self.stale = True

    def check(self) -> None:
        """Write something, to see that it can be done."""
        self._execute(f"PRAGMA user_version = {VERSION}")

    # -- what is due

    def tend(self, most: int = STEP) -> None:
        """Remove what has expired or must give way, `most` turns of it at a time.

        More of it if less has given way than was put: over its bound the file does not grow.
        `more` says whether there may be more to do at once.
        """
        self.more = False
        for root in [root for root in self._emptied if root not in self._pins]:
            self._execute("DELETE FROM conversations WHERE id = ? AND turns <= 0", (root,))
            self._emptied.discard(root)
            self._undo.append(partial(self._emptied.add, root))
        until = time.monotonic() + GIVING_WAY
        while most > 0 or (self._owed and time.monotonic() < until):
            found = self._due()
            if found is None:
                self._owed = 0
                # What was removed is out of the way: its traces can go, too.
                self.deleted = self.deleted or self.stale
                return
            most -= self._shrink(*found, most if most > 0 else STEP)
        self.more = True

    def _due(self) -> tuple[int, str, Removal] | None:
        """The conversation to remove next: its root, its owner, and why."""
        shares, bounds, now = self.shares, self.bounds, self._read()
        rows: Iterable[tuple[int, str, float, int]] = self._execute(_OLDEST)
        for root, owner, used, gone in rows:
            if gone:
                return root, owner, _GONE[gone]
            if not bounds.ttl or used + bounds.ttl > now:
                break
            if root not in self._pins:
                return root, owner, "ttl"
        if shares.size > bounds.max_bytes:
            owner = shares.largest() or ""
            victim = self._victim(owner)
            if victim is not None:
                return victim, owner, "size"
        return None

    def _victim(self, owner: str) -> int | None:
        """The conversation that gives way: the least recently used one that is not in use.

        If all others are, the first of these, and not the latest, of which a turn was just put.
        """
        rows: Iterable[tuple[int]] = self._execute(
            "SELECT id FROM conversations WHERE owner = ? ORDER BY used", (owner,)
        )
        first = found = None
        for (root,) in rows:
            if found is not None:
                return found
            first = root if first is None else first
            if root not in self._pins:
                found = root
        return first

    def _shrink(self, root: int, owner: str, reason: Removal, most: int) -> int:
        """Remove some turns of a conversation; how many."""
        turns = self._execute(
            "SELECT id, size FROM turns WHERE root = ? LIMIT ?", (root, most)
        ).fetchall()
        if len(turns) == most:  # from now on nobody finds the rest of it
            self._execute(
                "UPDATE conversations SET gone = ?, used = ? WHERE id = ?",
                (_GONE.index(reason), FIRST, root),
            )
        self._remove(owner, root, turns, reason)
        if not turns:
            self._execute("DELETE FROM conversations WHERE id = ?", (root,))
        return max(1, len(turns))
