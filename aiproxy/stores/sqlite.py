"""Conversations in an SQLite file: a restart and a crash keep them.

One thread writes, a few read, and the event loop waits for none of them: who asks gets an answer,
or an error within a bounded time.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from aiproxy.sessions import Loaded, Pins, Shares
from aiproxy.stores.sqlite_book import Book, Bounds
from aiproxy.stores.sqlite_file import SessionFile
from aiproxy.stores.sqlite_reader import Reader
from aiproxy.stores.sqlite_readers import Readers
from aiproxy.stores.sqlite_writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from aiproxy.sessions import Content, Delta, Found, Head, Turn

T = TypeVar("T")

PATIENCE = 3.0  # seconds for the file: as long may others lock it
READERS = 2  # threads
UNTOLD = 10_000  # deletions that are remembered until somebody is told
CLOSING = 10.0  # seconds at most for what waits to be written at the end


class SqliteSessions:
    """See `SessionStore`.

    Args:
        path: of the file.
        patience: seconds that an operation may take.
        read: a clock that a restart does not set back: seconds since the epoch.
    """

    name = "sqlite"

    def __init__(
        self,
        path: Path,
        *,
        patience: float = PATIENCE,
        read: Callable[[], float] = time.time,
    ) -> None:
        self._patience = patience
        self._read_clock = read
        self._file = SessionFile(path, patience=patience)
        self._bounds = Bounds(0.0, 0)
        self.pins = Pins()
        self._connection: sqlite3.Connection
        self._book: Book | None = None
        self._writer: Writer
        self._readers: Readers
        # Deleted, and nobody was told that it is done: who asks again is. By owner and id.
        self._untold: OrderedDict[tuple[str, str], Head] = OrderedDict()
        self._used: set[int] = set()  # roots of conversations that are not renewed yet
        self._renewing: asyncio.Future[object] | None = None
        self._tending: asyncio.Future[object] | None = None
        self._tell_outcome: Callable[[str, BaseException | None], None] | None = None

    @property
    def shares(self) -> Shares:
        """See `SessionStore`."""
        return Shares() if self._book is None else self._book.shares

    def open(self) -> None:
        """See `SessionStore`."""
        self._connection = connection = self._file.open()
        try:
            book = Book(
                connection,
                self._bounds,
                self.pins,
                patience=self._patience,
                read=self._read_clock,
            )
        except sqlite3.Error as error:
            connection.close()
            raise self._file.refused(error) from None
        with suppress(sqlite3.Error):  # `tend` tries again, and tells
            book.truncate()  # a crash may have come between a deletion and this
        self._readers = Readers(self._reader, READERS)
        self._book, self._writer = book, Writer(book, self._readers)

    def configure(self, *, ttl: float, max_bytes: int) -> None:
        """See `SessionStore`."""
        self._bounds = Bounds(ttl, max_bytes)
        if self._book is not None:
            self._book.bounds = self._bounds

    def watch(self, told: Callable[[str, BaseException | None], None]) -> None:
        """See `SessionStore`."""
        self._tell_outcome = told

    async def load(self, owner: str, response_id: str) -> Loaded:
        """See `SessionStore`."""
        ttl = self._bounds.ttl
        loaded = await self._read(lambda reader: reader.load(owner, response_id, ttl))
        untold = self._untold.get((owner, response_id))
        if untold is not None and loaded.head is None:  # there to be deleted, and for nothing else
            return Loaded("hit", replace(untold, whole=False))
        return loaded

    async def find(self, owner: str, item_ids: Sequence[str]) -> dict[str, Found]:
        """See `SessionStore`."""
        ttl = self._bounds.ttl
        return await self._read(lambda reader: reader.find(owner, item_ids, ttl))

    async def path(self, head: Head) -> list[Delta] | None:
        """See `SessionStore`."""
        path = await self._read(lambda reader: reader.path(head))
        if path is not None:
            self._renew([head.root])
        return path

    async def content(self, head: Head) -> Content | None:
        """See `SessionStore`."""
        return await self._read(lambda reader: reader.content(head))

    async def items(self, owner: str, found: Sequence[Found]) -> list[bytes] | None:
        """See `SessionStore`."""
        del owner  # a row's key is found by its owner alone
        items = await self._read(lambda reader: reader.items(found))
        if items is not None:
            self._renew(list({each.root for each in found}))
        return items

    async def put(self, turn: Turn) -> None:
        """See `SessionStore`."""
        await self._writer.do(lambda book: book.put(turn), self._patience)

    async def delete(self, head: Head) -> bool:
        """See `SessionStore`."""
        if not head.held:  # there is no content
            return await self._writer.do(lambda book: book.delete(head), self._patience)
        place, untold = (head.owner, head.id), self._untold
        before = untold.get(place)
        repeated = before is not None and before.key == head.key
        try:
            deleted = await self._writer.erase(
                lambda book: book.delete(head) or repeated, self._patience
            )
        except BaseException:  # it may be deleted
            untold[place] = head
            if len(untold) > UNTOLD:
                untold.popitem(last=False)
            raise
        untold.pop(place, None)
        return deleted

    async def check(self) -> None:
        """See `SessionStore`."""
        await self._writer.do(Book.check, self._patience)

    def tend(self, *, prove: bool = False) -> None:
        """See `SessionStore`."""
        if self._tending is not None and not self._tending.done():
            return
        if prove:
            self._tell("check", Book.check)
        self._renew(())
        self._tending = self._tell("tend", Book.tend)

    def _renew(self, roots: Iterable[int]) -> None:
        """Have conversations renewed some time: those of one commit with the next one."""
        self._used.update(roots)
        if self._renewing is None and self._used:
            used, self._used = self._used, set()
            self._renewing = self._tell("renew", lambda book: book.renew(used))
            self._renewing.add_done_callback(partial(self._renewed, used))

    def _renewed(self, used: set[int], future: asyncio.Future[object]) -> None:
        self._renewing = None
        if future.cancelled() or future.exception() is not None:
            self._used |= used  # with the next one: not at once, while it cannot be done
        else:
            self._renew(())

    def _tell(self, operation: str, work: Callable[[Book], object]) -> asyncio.Future[object]:
        future = self._writer.tell(work)
        future.add_done_callback(partial(self._told, operation))
        return future

    def _told(self, operation: str, future: asyncio.Future[object]) -> None:
        if future.cancelled():
            return
        error = future.exception()  # seen, even if nobody watches
        if self._tell_outcome is not None:
            self._tell_outcome(operation, error)

    async def _read(self, work: Callable[[Reader], T]) -> T:
        return await self._readers.do(work, self._patience)

    def _reader(self) -> Reader:
        return Reader(self._file.connect(), self.pins, self._read_clock)

    async def close(self) -> None:
        """See `SessionStore`."""
        if (used := self._used) and self._book is not None:
            self._tell("renew", lambda book: book.renew(used))
        await asyncio.get_running_loop().run_in_executor(None, self._close)

    def _close(self) -> None:
        if self._book is None:
            return
        self._book = None
        # A disk that hangs must not keep the process: what was promised is durable already.
        if self._writer.close(CLOSING) and self._readers.close(CLOSING):
            # The last of all processes writes the log into the file by this, and removes it.
            self._connection.close()
