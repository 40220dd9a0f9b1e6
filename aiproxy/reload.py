"""A new configuration in place of the one in force: whole, or not at all.

The file is read and checked, and all that follows from it is built, in a thread; then one step
swaps it in. A bad file changes nothing. Requests in flight end under the snapshot they began with.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from aiproxy.config import ConfigError, changes, pinned
from aiproxy.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from structlog.typing import FilteringBoundLogger

    from aiproxy.config import Changes, Loaded, Mistake
    from aiproxy.metrics import Metrics
    from aiproxy.systemd import Notifier

    Source = Callable[[], Loaded]


class Reloaded(NamedTuple):
    """What a reload did."""

    changes: Changes
    warnings: list[Mistake]


class Reloader:
    """Reloads, one after another.

    Args:
        path: of the file, as mistakes name it.
        source: reads it, and the secrets it refers to.
        apply: puts a snapshot in force; awaits nothing.

    Attributes:
        began_at: when that of the start was put in force.
        loaded_at: when the configuration in force was put there.
        failed_at: when a reload failed, if the last one did.
    """

    def __init__(
        self,
        path: str,
        source: Source,
        apply: Callable[[Snapshot], None],
        *,
        metrics: Metrics,
        log: FilteringBoundLogger,
        notifier: Notifier,
    ) -> None:
        self._path = path
        self._source = source
        self._apply = apply
        self._metrics = metrics
        self._log = log
        self._notifier = notifier
        self._lock = asyncio.Lock()
        self._under_way: set[asyncio.Task[Reloaded]] = set()
        self._snapshot: Snapshot
        self.began_at: datetime
        self.loaded_at: datetime
        self.failed_at: datetime | None = None

    def begin(self, snapshot: Snapshot) -> None:
        """The configuration of the start."""
        self._put(snapshot)
        self.began_at = self.loaded_at

    @property
    def status(self) -> str:
        """How it goes, in one line."""
        config = self._snapshot.config
        serving = (
            f"Serving {len(config.routes)} routes to {len(config.upstreams)} upstreams"
            f" for {len(config.keys)} keys"
        )
        if self.failed_at is None:
            return serving
        return f"{serving}; the reload of {self.failed_at:%Y-%m-%d %H:%M:%S} UTC failed"

    def sentences(self, mistakes: Iterable[Mistake]) -> list[str]:
        """Mistakes or warnings as `aiproxy check` prints them."""
        return [mistake.text(self._path) for mistake in mistakes]

    async def reload(self) -> Reloaded:
        """Read the file again, and put it in force.

        Raises:
            ConfigError: it cannot be used; nothing has changed.
        """
        # On its own: whoever asked may leave, and what was begun is done all the same.
        work = asyncio.get_running_loop().create_task(self._in_turn())
        self._under_way.add(work)
        work.add_done_callback(self._under_way.discard)
        return await asyncio.shield(work)

    async def settle(self) -> None:
        """Wait for what is under way."""
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _in_turn(self) -> Reloaded:
        async with self._lock:
            self._notifier.reloading()
            try:
                return await self._reload()
            except Exception:
                self.failed_at = datetime.now(UTC)
                self._metrics.reload_failed()
                raise
            finally:
                self._notifier.ready(self.status)

    async def _reload(self) -> Reloaded:
        before = self._snapshot

        def build() -> tuple[Loaded, Changes, Snapshot]:
            loaded = self._source()
            changed = changes(before.config, loaded.config)
            return loaded, changed, Snapshot(pinned(before.config, loaded.config), before)

        loop = asyncio.get_running_loop()
        try:
            loaded, changed, snapshot = await loop.run_in_executor(None, build)
        except ConfigError as error:
            for sentence in self.sentences(error.mistakes):
                self._log.error("reload refused", mistake=sentence)
            self._log.error("reload failed", mistakes=len(error.mistakes))
            raise
        self._put(snapshot)
        before.retire(snapshot)
        for sentence in self.sentences(loaded.warnings):
            self._log.warning("configuration", warning=sentence)
        if changed.restart:
            self._log.warning("restart needed", keys=list(changed.restart))
        self._log.info("reloaded", **changed.fields())
        return Reloaded(changed, loaded.warnings)

    def _put(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._apply(snapshot)
        self.failed_at = None
        self.loaded_at = datetime.now(UTC)
        self._metrics.configured(snapshot.config.upstreams, time.time())
