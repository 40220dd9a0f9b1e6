"""A few threads that read the file; all of them can be held for a moment.

What was deleted can be taken out of the write-ahead log only while nobody reads the file. So
whoever does it holds the readers: what comes meanwhile waits.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from aiproxy.sessions import StoreError
from aiproxy.stores.sqlite_job import Job, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiproxy.stores.sqlite_reader import Reader

T = TypeVar("T")

MOST_WAITING = 1000  # reads; who comes then is told so at once, not after the patience


class Readers:
    """The threads, from their making on.

    Args:
        make: makes what a thread reads with; called there.
        threads: how many.
    """

    def __init__(self, make: Callable[[], Reader], threads: int) -> None:
        self._make = make
        self._jobs: queue.SimpleQueue[Job[Reader, object] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._held = False
        self._reading = 0
        # No thread that hangs in a read may keep the process.
        self._threads = [
            threading.Thread(target=self._run, name=f"sessions-read-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    async def do(self, work: Callable[[Reader], T], patience: float) -> T:
        """Read.

        Raises:
            StoreError: it cannot be read, or not within `patience` seconds, or too many wait.
        """
        if self._jobs.qsize() >= MOST_WAITING:
            raise StoreError(f"{MOST_WAITING} reads wait already")
        job = Job(work)
        self._jobs.put(job)  # type: ignore[arg-type] # what it returns is for `settle` alone
        return await job.outcome(patience)

    @contextmanager
    def held(self, patience: float) -> Iterator[bool]:
        """Have nobody read meanwhile; whether the reads under way ended within `patience` seconds.

        For one thread that is none of these.
        """
        with self._changed:
            self._held = True
            alone = self._changed.wait_for(lambda: not self._reading, patience)
        try:
            yield alone
        finally:
            with self._changed:
                self._held = False
                self._changed.notify_all()

    def close(self, patience: float) -> bool:
        """End; blocks for at most `patience` seconds. Whether all have ended."""
        for _ in self._threads:
            self._jobs.put(None)
        until = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # -- in the threads

    def _run(self) -> None:
        reader: Reader | None = None
        while (job := self._jobs.get()) is not None:
            if (work := job.work) is None:
                continue
            with self._reads():
                try:
                    if reader is None:
                        reader = self._make()
                    job.result = work(reader)
                except sqlite3.Error as error:
                    job.error = StoreError(str(error))
                except Exception as error:  # noqa: BLE001 - told to who waits
                    job.error = error
            settle([job])
        if reader is not None:
            reader.close()

    @contextmanager
    def _reads(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._held)
            self._reading += 1
        try:
            yield
        finally:
            with self._changed:
                self._reading -= 1
                self._changed.notify_all()
