"""The one door to the store of sessions: what passes is timed, counted, and told to the operator.

Beyond it a store that is away is a ProxyError, `store_unavailable`; it is never "not found".
"""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from aiproxy import errors
from aiproxy.sessions import Loaded, NoRoomError, NotErasedError, StoreError
from aiproxy.sessions.items import LONGEST_ID
from aiproxy.stores.memory_sessions import MemorySessions
from aiproxy.stores.sqlite import SqliteSessions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from structlog.typing import FilteringBoundLogger

    from aiproxy.config import Sessions
    from aiproxy.exchange import Exchange
    from aiproxy.metrics import Metrics
    from aiproxy.sessions import Content, Delta, Found, Head, SessionStore, Shares, Turn

_WRITING = frozenset({"check", "put", "delete"})  # after one of these the store is well
PERIOD = 1.0  # seconds between steps of what is due in the store


def session_store(where: str) -> SessionStore:
    """The store that a configuration names, not open yet."""
    kind, _, path = where.partition(":")
    return SqliteSessions(Path(path)) if kind == "sqlite" else MemorySessions()


class SessionGate:
    """The sessions, for those who serve requests.

    Args:
        config: where they are kept, and the first bounds.

    Attributes:
        bounds: of what is kept and replayed, as configured.
        away: the store failed, and once more when that was looked into.
    """

    def __init__(self, config: Sessions, *, metrics: Metrics, log: FilteringBoundLogger) -> None:
        store = self._store = session_store(config.store)
        self._metrics = metrics
        self._log = log
        self._timer: asyncio.TimerHandle | None = None
        self.away = False
        self._doubted: float | None = None  # since when: it failed, and has not written since
        store.watch(self._told)
        self.configure(config)
        metrics.watch_sessions(lambda: store.shares)

    @property
    def name(self) -> str:
        """Of the store, as metrics have it."""
        return self._store.name

    @property
    def shares(self) -> Shares:
        """What the store holds."""
        return self._store.shares

    def configure(self, bounds: Sessions) -> None:
        """Other bounds; the store stays."""
        self.bounds = bounds
        self._store.configure(ttl=bounds.ttl, max_bytes=bounds.max_bytes)

    def open(self) -> None:
        """Open the store; may block.

        Raises:
            StoreError: it cannot be used.
        """
        self._store.open()

    def start(self) -> None:
        """Do what is due in the store, from now on."""
        self._timer = asyncio.get_running_loop().call_later(PERIOD, self._tend)

    def _tend(self) -> None:
        try:
            self._store.tend(prove=self._doubted is not None)
        finally:  # a fault of one step must not be the end of all expiry
            self.start()

    async def stop(self) -> None:
        """Close the store, after all requests have ended."""
        if self._timer is not None:
            self._timer.cancel()
        await self._store.close()

    # -- operations

    async def load(
        self, exchange: Exchange, response_id: str, *, to_go_on: bool = False
    ) -> Head | None:
        """Look for a turn of the key of this request, without its content.

        `to_go_on`: one that cannot be continued counts as missing.
        """
        if len(response_id) > LONGEST_ID:
            loaded = Loaded("missing")  # nobody's
        else:
            with self._operation("load"):
                loaded = await self._store.load(exchange.key, response_id)
        if to_go_on and loaded.head is not None and not loaded.head.whole:
            loaded = Loaded("missing")
        exchange.loads.append(loaded.result)
        return loaded.head

    async def find(self, exchange: Exchange, item_ids: Sequence[str]) -> Mapping[str, Found]:
        """Look for items of the key of this request."""
        with self._operation("find"):
            found = await self._store.find(exchange.key, item_ids)
        exchange.loads.extend("hit" if each in found else "missing" for each in item_ids)
        return found

    async def path(self, head: Head) -> Sequence[Delta] | None:
        """See `SessionStore.path`."""
        with self._operation("path"):
            return await self._store.path(head)

    async def content(self, head: Head) -> Content | None:
        """See `SessionStore.content`."""
        with self._operation("content"):
            return await self._store.content(head)

    async def items(self, owner: str, found: Sequence[Found]) -> Sequence[bytes] | None:
        """See `SessionStore.items`."""
        with self._operation("items"):
            return await self._store.items(owner, found)

    async def put(self, turn: Turn) -> None:
        """See `SessionStore.put`."""
        with self._operation("put"):
            await self._store.put(turn)

    async def delete(self, head: Head) -> bool:
        """See `SessionStore.delete`."""
        with self._operation("delete"):
            return await self._store.delete(head)

    def pin(self, head: Head) -> None:
        """A turn is being made that goes on from this one; its conversation must not go."""
        self._store.pins.add(head.root)

    def unpin(self, head: Head) -> None:
        """That turn has ended."""
        self._store.pins.remove(head.root)

    async def ready(self) -> None:
        """Refuse a request whose answer is to be kept if the store has failed and still does.

        Its answer would be made, paid for, and lost. A store that works again is found out here.
        """
        if self._doubted is not None:
            with self._operation("check"):
                await self._store.check()

    def reasoning_left_out(self, exchange: Exchange) -> None:
        """Tell the operator that an upstream does not get what another one has encrypted."""
        self._log.info(
            "reasoning left out",
            request_id=exchange.request_id,
            upstream=exchange.upstream,
            items=exchange.reasoning_left_out,
        )

    @contextmanager
    def _operation(self, operation: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except StoreError as error:
            self._failed(operation, error, began)
            if isinstance(error, NoRoomError):
                raise errors.no_room(str(error)) from None
            if isinstance(error, NotErasedError):
                raise errors.not_erased() from None
            raise errors.store_unavailable() from None
        else:
            self._done(operation)
        finally:
            self._metrics.store_used(self.name, operation, time.monotonic() - began)

    def _told(self, operation: str, error: BaseException | None) -> None:
        """What became of something that nobody waited for."""
        if error is None:
            self._done(operation)
        else:  # a check is made in doubt only, so it began after that
            self._failed(operation, error, time.monotonic() if operation == "check" else 0.0)

    def _done(self, operation: str) -> None:
        if operation not in _WRITING:
            return
        self._doubted = None
        if self.away:
            self.away = False
            self._log.info("sessions available again", store=self.name)

    def _failed(self, operation: str, error: BaseException, began: float) -> None:
        """Something that began then failed. The store is away once one failed that began in doubt.

        What failed for one reason at one time is one failure, and one is none: a balancer that asks
        whether we are ready would take us out for a moment's lock of the file.
        """
        self._metrics.store_failed(self.name, operation)
        if isinstance(error, NoRoomError):
            self._log.warning("turn not kept", reason=str(error))
        elif isinstance(error, NotErasedError):
            self._log.warning("deletion not finished", store=self.name, reason=str(error))
        elif self._doubted is None:
            self._doubted = time.monotonic()
            self._log.warning(
                "sessions failed", store=self.name, operation=operation, reason=str(error)
            )
        elif not self.away and began >= self._doubted:
            self.away = True
            self._log.error(
                "sessions not available", store=self.name, operation=operation, reason=str(error)
            )
