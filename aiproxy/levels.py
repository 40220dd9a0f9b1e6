"""Levels of limits over a restart: read at the start, written now and then, and at the end."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING

from aiproxy.stores.level_file import LevelFile, LevelFileError, TakenOverError

if TYPE_CHECKING:
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    from aiproxy.metrics import Metrics
    from aiproxy.stores.memory import MemoryLimits

PERIOD = 10.0  # seconds: as much is forgotten by a crash


class LevelKeeper:
    """Keeps the levels of `limits` in a file.

    Args:
        state: the state directory; None: there is none, and a restart forgets.
    """

    def __init__(
        self,
        limits: MemoryLimits,
        state: Path | None,
        *,
        metrics: Metrics,
        log: FilteringBoundLogger,
        period: float = PERIOD,
    ) -> None:
        self._limits = limits
        self._file = None if state is None else LevelFile(state)
        self._metrics = metrics
        self._log = log
        self._period = period
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Future[None] | None = None
        self._failing = False
        self._taken = False  # by another process, which began later

    def restore(self) -> None:
        """Take over what was written last. May block; to be called before the limits are set."""
        if self._file is None:
            return
        try:
            found = self._file.load()
        except LevelFileError as error:
            # Better than to serve nobody: the limits hold from here on.
            self._metrics.store_failed("levels", "load")
            self._log.error("levels not loaded", file=str(self._file.path), reason=str(error))
            return
        if found is not None:
            levels, age = found
            self._limits.restore(levels, age)

    def start(self) -> None:
        """Write from now on; say so if that cannot be."""
        if self._file is not None:
            self._begin()
        elif self._limits.any:
            self._log.warning(
                "levels not kept",
                reason="STATE_DIRECTORY is not set: a restart gives every key full buckets",
            )

    def _later(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._period, self._begin)

    def _begin(self) -> None:
        self._timer = None
        self._writing = self._write()
        if self._writing is not None:
            self._writing.add_done_callback(self._written)

    def _written(self, writing: asyncio.Future[None]) -> None:
        self._judge(writing)
        if self._writing is writing:  # it was not stopped meanwhile
            self._later()

    def _write(self) -> asyncio.Future[None] | None:
        """Begin to write the levels of this moment, in a thread: disks may be slow."""
        if self._file is None:
            return None
        save = partial(self._file.save, self._limits.save(), time.monotonic_ns(), time.time_ns())
        return asyncio.get_running_loop().run_in_executor(None, save)

    def _judge(self, writing: asyncio.Future[None]) -> None:
        """Log when it begins to fail, and when it is well again."""
        error = None if writing.cancelled() else writing.exception()
        taken = isinstance(error, TakenOverError)
        if taken != self._taken:
            self._taken = taken
            said = "levels kept by another process" if taken else "levels kept again"
            self._log.info(said)
        if taken:
            return
        if error is not None:
            self._metrics.store_failed("levels", "save")
            if not self._failing:
                self._log.error("levels not written", error=str(error))
        elif self._failing:
            self._log.info("levels written again")
        self._failing = error is not None
        self._metrics.limiter_degraded(degraded=self._failing)

    async def stop(self) -> None:
        """Write the last levels, after all requests have ended."""
        if self._timer is not None:
            self._timer.cancel()
        before, self._writing = self._writing, None
        if before is not None:
            await asyncio.wait([before])
        last = self._write()
        if last is not None:
            await asyncio.wait([last])
            self._judge(last)
