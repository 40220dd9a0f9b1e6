"""One thread that writes, in one transaction what waits by then: group commit.

A commit waits for the disk, so it is shared: while one is under way, what comes is gathered for the
next. An answer is given when its transaction is durable, never before.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

from aiproxy.sessions import NoRoomError, StoreError
from aiproxy.stores.sqlite_book import STEP

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiproxy.stores.sqlite_book import Book

T = TypeVar("T")

MOST = 256  # jobs of one transaction


class _Job(Generic[T]):
    """Something to do, and who waits for it."""

    __slots__ = ("error", "future", "loop", "result", "work")

    def __init__(self, work: Callable[[Book], T]) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[T] = self.loop.create_future()
        self.work: Callable[[Book], T] | None = work  # None: nobody waits for it any more
        self.result: T
        self.error: Exception | None = None

    def settle(self) -> None:
        """Tell it to who waits; in the event loop."""
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class Writer:
    """The thread, from its making on."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._jobs: queue.SimpleQueue[_Job[object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="sessions", daemon=True)
        self._thread.start()

    async def do(self, work: Callable[[Book], T], patience: float) -> T:
        """Do `work` within a transaction, and return once it is durable.

        Raises:
            StoreError: it failed, and nothing of it was done; or it was not done after `patience`
                seconds, and may be yet.
        """
        job = _Job(work)
        self._jobs.put(job)  # type: ignore[arg-type] # what it returns is for `settle` alone
        try:
            async with asyncio.timeout(patience):
                return await job.future
        except TimeoutError:
            raise StoreError(f"it did not answer within {patience:g} s") from None
        finally:
            job.work = None

    def tell(self, work: Callable[[Book], object]) -> asyncio.Future[object]:
        """Have it done some time; whoever wants to know looks at the future."""
        job = _Job(work)
        self._jobs.put(job)
        return job.future

    def close(self, patience: float) -> bool:
        """Do what waits, and end; blocks for at most `patience` seconds. Whether it has ended."""
        self._jobs.put(None)
        self._thread.join(patience)
        return not self._thread.is_alive()

    # -- in the thread

    def _run(self) -> None:
        ends = False
        while not ends:
            jobs: list[_Job[object]] = []
            while not ends and len(jobs) < MOST:
                try:
                    job = self._jobs.get(block=not jobs and not self._book.more)
                except queue.Empty:
                    break
                if job is None:
                    ends = True
                else:
                    jobs.append(job)
            if jobs or not ends:
                self._write(jobs)

    def _write(self, jobs: list[_Job[object]]) -> None:
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
        if book.deleted:
            self._truncate()
        self._settle(jobs)

    def _truncate(self) -> None:
        """Empty the log before a deletion is answered; what is committed stands in any case."""
        try:
            self._book.truncate()
        except sqlite3.Error:
            pass  # `tend` tries again

    def _roll_back(self) -> None:
        self._book.more = False  # what is due is looked at again later
        try:
            self._book.rollback()
        except sqlite3.Error:  # the next one will fail, too, and say why
            pass

    @staticmethod
    def _settle(jobs: list[_Job[object]]) -> None:
        if not jobs:
            return

        def settle() -> None:
            for job in jobs:
                job.settle()

        try:
            jobs[0].loop.call_soon_threadsafe(settle)
        except RuntimeError:  # the loop is closed: nobody waits
            pass
