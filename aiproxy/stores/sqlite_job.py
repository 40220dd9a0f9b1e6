"""What the event loop has a thread do: something that blocks, and somebody who waits for it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic, TypeVar

from aiproxy.sessions import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

A = TypeVar("A")
T = TypeVar("T")


class Job(Generic[A, T]):
    """Something to do with what the thread has, and who waits for it.

    Attributes:
        work: None once nobody waits for it any more.
        result, error: what came of it; the thread sets one of them.
    """

    __slots__ = ("error", "future", "loop", "result", "until", "work")

    def __init__(self, work: Callable[[A], T], until: float = 0.0) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[T] = self.loop.create_future()
        self.work: Callable[[A], T] | None = work
        self.until = until
        self.result: T
        self.error: Exception | None = None

    async def outcome(self, patience: float) -> T:
        """Wait for it, at most `patience` seconds.

        Raises:
            StoreError: it failed; or it was not done in time, and may be yet.
        """
        try:
            async with asyncio.timeout(patience):
                return await self.future
        except TimeoutError:
            raise StoreError(f"it did not answer within {patience:g} s") from None
        finally:
            self.work = None

    def settle(self) -> None:
        """Tell it to who waits; in the event loop."""
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


def settle(jobs: Iterable[Job[A, T]]) -> None:
    """Tell what came of some jobs of one loop; in the thread."""
    jobs = list(jobs)
    if not jobs:
        return

    def tell() -> None:
        for job in jobs:
            job.settle()

    try:
        jobs[0].loop.call_soon_threadsafe(tell)
    except RuntimeError:  # the loop is closed: nobody waits
        pass
