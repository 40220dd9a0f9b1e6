"""One thread that writes, in one transaction what waits by then: group commit.

A commit waits for the disk, so it is shared: while one is under way, what comes is gathered for the
next. An answer is given when its transaction is durable, never before; that to a deletion when the
content is out of the write-ahead log, too.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
import time
from typing import TYPE_CHECKING, TypeVar

from aiproxy.sessions import NoRoomError, NotErasedError, StoreError
from aiproxy.stores.sqlite_book import STEP
from aiproxy.stores.sqlite_job import Job, settle

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from aiproxy.stores.sqlite_book import Book
    from aiproxy.stores.sqlite_readers import Readers

T = TypeVar("T")

MOST = 256  # jobs of one transaction
HOLD = 0.25  # seconds at most that our own reads are waited for, while others are held
RETRY = 0.05  # seconds until the log is tried again, while others read it
GRACE = 0.5  # seconds in which the last try ends, to say what is in a deletion's way


class Writer:
    """The thread, from its making on."""

    def __init__(self, book: Book, readers: Readers) -> None:
        self._book = book
        self._readers = readers
        self._jobs: queue.SimpleQueue[Job[Book, object] | None] = queue.SimpleQueue()
        self._erasing: list[Job[Book, object]] = []  # deletions whose content is in the log yet
        self._thread = threading.Thread(target=self._run, name="sessions", daemon=True)
        self._thread.start()

    async def do(self, work: Callable[[Book], T], patience: float) -> T:
        """Do `work` within a transaction, and return once it is durable.

        Raises:
            StoreError: it failed, and nothing of it was done; or it was not done after `patience`
                seconds, and may be yet.
        """
        return await self._put(Job(work)).outcome(patience)

    async def erase(self, work: Callable[[Book], bool], patience: float) -> bool:
        """Do what deletes content, and return once that is nowhere in the file or its log.

        What else there is to do does not wait for it.

        Raises:
            NotErasedError: it is deleted, and still in the log after `patience` seconds.
            StoreError: as of `do`.
        """
        job = self._put(Job(work, time.monotonic() + patience))
        return await job.outcome(patience + GRACE)

    def tell(self, work: Callable[[Book], object]) -> asyncio.Future[object]:
        """Have it done some time; whoever wants to know looks at the future."""
        return self._put(Job(work)).future

    def _put(self, job: Job[Book, T]) -> Job[Book, T]:
        self._jobs.put(job)  # type: ignore[arg-type] # what it returns is for `settle` alone
        return job

    def close(self, patience: float) -> bool:
        """Do what waits, and end; blocks for at most `patience` seconds. Whether it has ended."""
        self._jobs.put(None)
        self._thread.join(patience)
        return not self._thread.is_alive()

    # -- in the thread

    def _run(self) -> None:
        book, ends = self._book, False
        while not ends:
            jobs, ends = self._gather()
            while book.crowded and book.more:
                self._write([])
            if jobs or book.more:
                self._write(jobs)
            if book.deleted or self._erasing:
                self._erase(ends=ends)

    def _gather(self) -> tuple[list[Job[Book, object]], bool]:
        """What waits; whether it is the last."""
        jobs: list[Job[Book, object]] = []
        while len(jobs) < MOST:
            try:
                waits = not jobs and not self._book.more
                job = self._jobs.get(block=waits, timeout=RETRY if self._erasing else None)
            except queue.Empty:
                break
            if job is None:
                return jobs, True
            jobs.append(job)
        return jobs, False

    def _write(self, jobs: list[Job[Book, object]]) -> None:
        book = self._book
        try:
            book.begin()
            for job in jobs:
                if (work := job.work) is None:
                    continue
                job.error = None  # of an attempt that was undone
                try:
                    job.result = work(book)
                except NoRoomError as error:  # of this job alone; it has changed nothing
                    job.error = error
            if book.more:  # no slower than turns come
                book.tend(max(STEP, 2 * len(jobs)))
            book.commit()
        except Exception as error:  # noqa: BLE001 - told to all who wait
            self._roll_back()
            fault = not isinstance(error, sqlite3.Error)  # of ours, in one of them
            if fault and len(jobs) > 1:
                for job in jobs:
                    self._write([job])
                return
            for job in jobs:
                job.error = error if fault else StoreError(str(error))
        done: list[Job[Book, object]] = []
        for job in jobs:
            erases = job.until and job.error is None and job.work is not None and job.result
            (self._erasing if erases else done).append(job)
        settle(done)

    def _roll_back(self) -> None:
        self._book.more = False  # what is due is looked at again later
        try:
            self._book.rollback()
        except sqlite3.Error:  # the next one will fail, too, and say why
            pass

    def _erase(self, *, ends: bool) -> None:
        """Try to empty the log, and answer the deletions that it was for, or whose time is up."""
        book, reason = self._book, "others read the file"
        book.deleted = False
        try:
            book.checkpoint()  # most of the work, while we read
            with self._readers.held(HOLD) as alone:
                if alone:
                    book.truncate()
        except sqlite3.Error as error:
            reason = str(error)
        now, waiting, self._erasing = time.monotonic(), self._erasing, []
        for job in waiting:
            if book.stale and job.until > now and not ends:
                self._erasing.append(job)
                continue
            if book.stale:
                job.error = NotErasedError(f"deleted content is in the log yet: {reason}")
            settle([job])
